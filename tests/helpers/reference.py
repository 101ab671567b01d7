"""Ground truth for KV reuse: the same computation on plain transformers, with nothing shared.

A *donor* prompt was prefilled in full. In a *target* prompt the KV of some items (images, videos)
is taken from the donor: K turned by the difference of the RoPE positions, V as it is. All other
tokens, and a chosen part of the reused items, run through the decoder layers and attend over the
mixed KV. Only the projections, norms and MLPs are transformers' own; rotary embedding, positions,
cache, mask and attention are written out here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

Video = tuple[np.ndarray, Mapping[str, Any]]
"""Frames [t, height, width, 3] uint8 and the metadata dict that vLLM takes with them."""

ENCODER_INPUTS = {
    "image": ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}

TEXT_OF_ITEMS = {"internvl": (1, 1), "mistral3": (0, 1)}
"""Text tokens in front of and behind an item's embeddings that belong to it, by model type."""

PAIRS_OF_NEIGHBOURS = ("glm4v", "glm_ocr")
"""Model types that rotate pairs of neighbouring elements, the others one of each half."""

Offsets = Sequence[int] | Sequence[Sequence[int]]
"""Offsets within an item: one list for all layers, or one list per layer."""


@dataclass(frozen=True)
class Prompt:
    """A processed prompt of n tokens; axes is 3 with M-RoPE, else 1."""

    input_ids: Tensor  # [n] int64, placeholders expanded
    positions: Tensor  # [axes, n] int64
    spans: list[tuple[int, int]]  # [start, end) of each item, in prompt order
    embeds: Tensor  # [n, hidden], encoder features merged in
    deepstack: Tensor  # [levels, n, hidden], zero at text tokens; levels is 0 for most models
    inputs: dict[str, Any] = field(repr=False)  # what the processor returned for the items


@dataclass(frozen=True)
class KV:
    """Post-RoPE keys and values, [layers, n, kv_heads, head_dim] each."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Result:
    """What a request gives."""

    logprobs: Tensor  # [n_tokens, vocab] float32
    tokens: list[int]  # the tokens fed back, the greedy ones unless they were forced
    kv: KV  # of the prompt and of all generated tokens but the last


@dataclass(frozen=True)
class _Chunk:
    """A run of placeholder tokens that is positioned as one grid."""

    item: tuple[str, int]
    length: int
    grid: tuple[int, int, int] | None  # t, h, w in tokens; None without M-RoPE
    interval: float = 1.0  # temporal positions per step in t


class Reference:
    """Full prefill and KV reuse in float32 on CPU, token by token explicit."""

    def __init__(self, model_dir: Path | str) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(model_dir)
        self.text_model = self.model.model.language_model
        self.layers = self.text_model.layers
        config = self.model.config
        self.model_type, self.vision_config = config.model_type, config.vision_config
        self.tokens_per_second = float(getattr(self.vision_config, "tokens_per_second", 1.0))
        self.head_dim: int = self.layers[0].self_attn.head_dim
        self.kv_heads: int = config.text_config.num_key_value_heads
        if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or []):
            raise NotImplementedError("sliding-window layers")
        rotary = self.text_model.rotary_emb
        self.inv_freq = rotary.inv_freq.float()  # [pairs], of which heads may have more elements
        self.attention_scaling = float(rotary.attention_scaling)
        section = config.text_config.rope_parameters.get("mrope_section")
        self.query_scaling = config.text_config.rope_parameters.get("llama_4_scaling_beta", 0.0)
        self.axes = 3 if section else 1
        self.axis_of_freq = self._axis_of_freq(section)

    def _axis_of_freq(self, section: Sequence[int] | None) -> Tensor:
        """Say which position row drives each rotary frequency: [pairs] int64."""
        axis = torch.zeros(len(self.inv_freq), dtype=torch.int64)
        if section is None:
            return axis
        if not self.model_type.startswith("qwen3"):
            return torch.repeat_interleave(torch.arange(3), torch.tensor(section))
        for a in (1, 2):
            # t h w t h w ... while h and w have frequencies left, then t alone.
            axis[a : 3 * section[a] : 3] = a
        return axis

    def prompt(
        self, text: str, images: Sequence[Image.Image] = (), videos: Sequence[Video] = ()
    ) -> Prompt:
        """Process a text that has one placeholder per item."""
        inputs = self._process(text, images, videos)
        return self._build(inputs["input_ids"][0], inputs)

    def prompt_from_ids(
        self,
        token_ids: Sequence[int],
        images: Sequence[Image.Image] = (),
        videos: Sequence[Video] = (),
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> Prompt:
        """Process token ids with the placeholders already expanded: vLLM's `prompt_token_ids`.

        `spans` replaces the item spans, by default from an item's first placeholder token to its
        last, with the text that belongs to it. (vLLM's span of a Qwen3-VL video also has the
        timestamp before its first frame and the `<|vision_end|>` after its last.)
        """
        processor = self.processor
        dummy = processor.image_token * len(images)
        if videos:
            dummy += processor.video_token * len(videos)
        inputs = self._process(dummy, images, videos) if dummy else {}
        return self._build(torch.as_tensor(token_ids, dtype=torch.int64), inputs, spans)

    def _process(
        self, text: str, images: Sequence[Image.Image], videos: Sequence[Video]
    ) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"images": list(images)} if images else {}
        if videos:
            kwargs["videos"] = [frames for frames, _ in videos]
            kwargs["video_metadata"] = [
                {key: value for key, value in metadata.items() if key != "do_sample_frames"}
                for _, metadata in videos
            ]
            # Frames are taken as they come: sampling is the caller's, as it is in vLLM.
            kwargs["do_sample_frames"] = False
        inputs = dict(self.processor(text=[text], return_tensors="pt", **kwargs))
        if self.model_type == "internvl":
            tiles = [self.processor.image_processor(image)["pixel_values"] for image in images]
            inputs["num_tiles"] = [len(each) for each in tiles]
        return inputs

    @torch.no_grad()
    def _build(
        self, ids: Tensor, inputs: dict[str, Any], spans: Sequence[tuple[int, int]] | None = None
    ) -> Prompt:
        embeds = self.text_model.embed_tokens(ids)
        levels = len(getattr(self.vision_config, "deepstack_visual_indexes", None) or [])
        deepstack = embeds.new_zeros(levels, *embeds.shape)
        chunks: dict[int, deque[_Chunk]] = {}
        for kind, names in ENCODER_INPUTS.items():
            token_id = getattr(self.processor, f"{kind}_token_id", -1)  # not all take videos
            place = ids == token_id
            given = {name: inputs[name] for name in names if name in inputs}
            out = getattr(self.model.model, f"get_{kind}_features")(**given) if given else None
            features = list(out.pooler_output) if out else []
            if features and "num_tiles" in inputs:
                tiles = iter(features)
                features = [torch.cat([*islice(tiles, n)]) for n in inputs["num_tiles"]]
            lengths = [len(rows) for rows in features]
            if sum(lengths) != int(place.sum()):
                raise ValueError(f"{int(place.sum())} {kind} tokens for features {lengths}")
            if out:
                embeds[place] = torch.cat(features)
                for level in range(levels):
                    deepstack[level, place] = torch.cat(list(out.deepstack_features[level]))
                chunks[token_id] = self._chunks(kind, lengths, inputs)
        positions, derived = self._positions(ids, chunks)
        return Prompt(ids, positions, list(spans or derived), embeds, deepstack, inputs)

    def _chunks(self, kind: str, lengths: list[int], inputs: dict[str, Any]) -> deque[_Chunk]:
        chunks: deque[_Chunk] = deque()
        for i, length in enumerate(lengths):
            if self.model_type == "mistral3":
                # A text token behind every row of the image.
                patch_px = self.vision_config.patch_size * self.model.config.spatial_merge_size
                columns = int(inputs["image_sizes"][i][1]) // patch_px
                chunks.extend([_Chunk((kind, i), columns, None)] * (length // columns))
                continue
            if self.axes == 1:
                chunks.append(_Chunk((kind, i), length, None))
                continue
            merge = self.vision_config.spatial_merge_size
            t, h, w = inputs[f"{kind}_grid_thw"][i].tolist()
            h, w, interval = h // merge, w // merge, 1.0
            if kind == "video" and self.model_type.startswith("qwen3"):
                # Frames stand apart in the prompt, each behind its own timestamp.
                chunks.extend([_Chunk((kind, i), h * w, (1, h, w))] * t)
                continue
            if kind == "video":
                seconds = inputs.get("second_per_grid_ts", [1.0] * len(lengths))
                interval = self.tokens_per_second * float(seconds[i])
            chunks.append(_Chunk((kind, i), t * h * w, (t, h, w), interval))
        return chunks

    def _positions(
        self, ids: Tensor, chunks: dict[int, deque[_Chunk]]
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Walk the prompt; returns positions [axes, n] and the item spans."""
        rows: list[Tensor] = []
        spans: dict[tuple[str, int], tuple[int, int]] = {}
        at = following = 0  # token index, and the position that comes next on all axes
        while at < len(ids):
            queue = chunks.get(int(ids[at]))
            chunk = queue.popleft() if queue else _Chunk(("text", at), 1, None)
            end = at + chunk.length
            if (ids[at:end] != ids[at]).any():
                raise ValueError(f"{chunk.item} does not fit its placeholders at {at}")
            if queue is not None:
                spans[chunk.item] = (spans.get(chunk.item, (at, end))[0], end)
            if chunk.grid is None:
                block = torch.arange(chunk.length).expand(self.axes, -1)
            else:
                axis = [torch.arange(size, dtype=torch.float64) for size in chunk.grid]
                axis[0] = (axis[0] * chunk.interval).floor()
                block = torch.stack(torch.meshgrid(*axis, indexing="ij")).flatten(1).long()
            rows.append(block + following)
            # Behind an item the text goes on from the largest position on any axis. (For videos
            # transformers' get_rope_index looks at h and w only; vLLM does as is done here.)
            following = int(rows[-1].max()) + 1
            at = end
        before, behind = TEXT_OF_ITEMS.get(self.model_type, (0, 0))
        return torch.cat(rows, dim=1), [(at - before, to + behind) for at, to in spans.values()]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x [n, heads, head_dim] by positions [axes, n], in x's precision.

        Pure rotation: lengths stay, so that turning by a difference moves a key that is already
        rotated, and turning by zero changes no bit.
        """
        angles = positions[self.axis_of_freq].T.to(x.dtype) * self.inv_freq.to(x.dtype)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        pairs = len(self.inv_freq)
        turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        shape = (pairs, 2) if self.model_type in PAIRS_OF_NEIGHBOURS else (2, pairs)
        axis = shape.index(2) - 2
        first, second = turned.unflatten(-1, shape).unbind(axis)
        sides = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat((torch.stack(sides, axis).flatten(-2), rest), dim=-1)

    def move_keys(self, k: Tensor, difference: Tensor) -> Tensor:
        """Delta-RoPE in float64: k [layers, n, kv_heads, head_dim], difference [axes, n]."""
        return torch.stack([self.rotate(x.double(), difference).float() for x in k])

    def full(
        self, prompt: Prompt, n_tokens: int = 1, forced: Sequence[int] | None = None
    ) -> Result:
        """Prefill everything; see `reuse` for the arguments."""
        return self.reuse(prompt, {}, {}, n_tokens, forced)

    @torch.no_grad()
    def reuse(
        self,
        target: Prompt,
        reused: Mapping[int, tuple[Result | KV, Prompt, int]],
        recompute: Mapping[int, Offsets],
        n_tokens: int = 1,
        forced: Sequence[int] | None = None,
    ) -> Result:
        """Prefill the target over reused KV, then decode.

        Args:
            target: the prompt to answer.
            reused: target item -> (the donor's result, the donor's prompt, the donor's item).
            recompute: target item -> offsets in the item that are computed anew, the same for all
                layers or one list per layer, each a subset of the one before.
            n_tokens: how many tokens to generate.
            forced: tokens to go on with instead of the most likely ones, to compare log-probs
                along a given continuation.
        """
        n, n_layers = len(target.input_ids), len(self.layers)
        shape = (n_layers, n + n_tokens - 1, self.kv_heads, self.head_dim)
        # NaN makes every use of KV that was neither reused nor computed show in the result.
        cache = KV(torch.full(shape, torch.nan), torch.full(shape, torch.nan))
        computed = torch.ones(n_layers, n, dtype=torch.bool)
        if extra := recompute.keys() - reused.keys():
            raise ValueError(f"recompute names items that are not reused: {sorted(extra)}")
        for item, (donor, donor_prompt, donor_item) in reused.items():
            kv = donor.kv if isinstance(donor, Result) else donor
            start, end = target.spans[item]
            donor_start, donor_end = donor_prompt.spans[donor_item]
            here, there = slice(start, end), slice(donor_start, donor_end)
            mine, theirs = target.embeds[here], donor_prompt.embeds[there]
            if mine.shape != theirs.shape or not torch.allclose(mine, theirs, atol=1e-3):
                raise ValueError(f"item {item} differs from the donor's item {donor_item}")
            difference = target.positions[:, here] - donor_prompt.positions[:, there]
            cache.k[:, here] = self.move_keys(kv.k[:, there], difference)
            cache.v[:, here] = kv.v[:, there]
            computed[:, here] = False
            offsets: Any = list(recompute.get(item, ()))
            if not (offsets and isinstance(offsets[0], Sequence)):
                offsets = [offsets] * n_layers
            for layer, chosen in zip(range(n_layers), offsets, strict=True):
                computed[layer, here][torch.tensor(list(chosen), dtype=torch.int64)] = True
        if not computed[:, -1].all():
            raise ValueError("the last prompt token has to be computed: it gives the logits")
        if (computed[1:] & ~computed[:-1]).any():
            raise ValueError("a token can't be computed in a layer after it was not in the last")

        index = computed[0].nonzero().flatten()
        rows, positions = target.embeds[index], target.positions[:, index]
        hidden = self._run(rows, index, positions, cache, computed, target.deepstack)
        logprobs: list[Tensor] = []
        tokens: list[int] = []
        following = int(target.positions.max()) + 1
        for step in range(n_tokens):
            logprobs.append(self.model.lm_head(hidden[-1]).float().log_softmax(-1))
            if not logprobs[-1].isfinite().all():
                raise AssertionError("a query met KV that nobody had provided")
            tokens.append(int(logprobs[-1].argmax()) if forced is None else int(forced[step]))
            if step + 1 < n_tokens:
                embeds = self.text_model.embed_tokens(torch.tensor(tokens[-1:]))
                position = torch.full((self.axes, 1), following + step)
                hidden = self._run(embeds, torch.tensor([n + step]), position, cache)
        return Result(torch.stack(logprobs), tokens, cache)

    def _run(
        self,
        hidden: Tensor,
        index: Tensor,
        positions: Tensor,
        cache: KV,
        computed: Tensor | None = None,
        deepstack: Tensor | None = None,
    ) -> Tensor:
        """Run rows through all layers, writing their KV into the cache.

        Args:
            hidden: [m, hidden] rows that enter the first layer, in prompt order.
            index: [m] their token indices; positions: [axes, m].
            computed: [layers, n], the tokens that a layer computes; all rows if None.
            deepstack: [levels, n, hidden], added behind the first layers.

        Returns:
            The normed hidden states of the rows that reach the end, [m', hidden].
        """
        for number, layer in enumerate(self.layers):
            if computed is not None:
                stays = computed[number, index]
                hidden, index, positions = hidden[stays], index[stays], positions[:, stays]
            x = layer.input_layernorm(hidden)
            x = self._attend(layer.self_attn, x, index, positions, cache, number)
            # GLM-4 norms what a branch gives, too.
            hidden = hidden + getattr(layer, "post_self_attn_layernorm", nn.Identity())(x)
            # A mixture of experts takes batches only.
            x = layer.mlp(layer.post_attention_layernorm(hidden)[None])[0]
            hidden = hidden + getattr(layer, "post_mlp_layernorm", nn.Identity())(x)
            if deepstack is not None and number < len(deepstack):
                hidden = hidden + deepstack[number, index]
        return self.text_model.norm(hidden)

    def _attend(
        self, attn: Any, x: Tensor, index: Tensor, positions: Tensor, cache: KV, number: int
    ) -> Tensor:
        """Attention of rows x [m, hidden] over the mixed KV of one layer: [m, hidden]."""
        q = attn.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = attn.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = attn.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        # YaRN and its kin scale cos and sin, so q and k each once.
        q = self.rotate(q, positions) * self.attention_scaling
        k = self.rotate(k, positions) * self.attention_scaling
        if self.query_scaling:
            # Llama 4's: keys are as they are.
            parameters = self.model.config.text_config.rope_parameters
            steps = positions[0] // parameters["original_max_position_embeddings"]
            q = q * (1 + self.query_scaling * torch.log1p(steps))[:, None, None]
        cache.k[number, index], cache.v[number, index] = k, v
        length = int(index.max()) + 1
        keys, values = (
            side[number, :length].repeat_interleave(q.shape[1] // self.kv_heads, dim=1)
            for side in (cache.k, cache.v)
        )
        visible = torch.arange(length) <= index[:, None]  # [m, length], by token index
        scores = torch.einsum("qhd,khd->hqk", q, keys) * self.head_dim**-0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return attn.o_proj(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))

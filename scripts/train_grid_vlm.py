#!/usr/bin/env python
"""Train a tiny vision-language model on the grid task (`grid_vqa`), on a CPU.

The result is a Qwen2.5-VL checkpoint of about 4.6 M parameters that vLLM and transformers load
like a published one. How well it answers each family of questions is written beside it.

Usage::

    python scripts/train_grid_vlm.py --minutes 45 --output OUTPUT_DIR

What makes it quick:

- The vision encoder is trained first, alone: a cell's token is to be the sum of the embeddings of
  its name, its colour and its shape. Afterwards it is frozen.
- Some attention heads start as what they are wanted for: to look a fixed distance back, or at
  tokens that resemble the one that asks.
- A training sequence is one prefix (text and images) with many branches of queries. A branch sees
  the prefix and itself, and its positions continue those of the prefix. So every branch computes
  exactly what a prompt of its own would, and the images are computed once.
- A branch lists several queries with their answers: ``colour second BD red AF blue``. Its first
  query is a prompt as it is asked later.
- At each image token, too, the language model predicts words: the cell's name, colour and shape.
  An answer can then be copied from the token that attention finds.
- Query families are drawn more often the more answers are still wrong.
- Matrices are trained with Muon, everything else with AdamW.

Training continues from its last state, kept under ``.cache/``, if there is one.
"""

import argparse
import copy
import ctypes
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grid_vqa as task
import numpy as np
import torch
import transformers
from make_tiny_model import save_model, write_json, write_processors
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tiny_architectures import ARCHITECTURES, CLIP_MEAN, CLIP_STD, MROPE_SECTION, QWEN_TOKENS
from torch.nn.functional import cross_entropy
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / ".cache" / "grid-vlm"
EVALUATION_SEED = 2**31  # training draws from seeds below
HEAD_DIM = 64  # one that vLLM's CPU attention supports
ROPE_THETA = 1e4
MAX_POSITIONS = 4096
PATCH_PX = 14
UNKNOWN = "<|unknown|>"
END = "<|im_end|>"
PAD = "<|endoftext|>"
FAMILIES = tuple(task.FAMILIES)
# A family is hardly drawn before the families it builds on are answered.
BUILDS_ON = {
    "rule": ("colour", "shape"),
    "has": ("find",),
    "count": ("find",),
    "same": ("colour",),
    "chain": ("colour", "where"),
    "relay": ("find", "chain"),
}
# How often sequences have one, two and three images, and the shares of right answers at which the
# next stage begins. Which cell is asked for is learned before which image.
STAGES: tuple[tuple[tuple[float, float, float], dict[str, float]], ...] = (
    ((1.0, 0.0, 0.0), {"colour": 0.9, "shape": 0.9, "where": 0.9, "find": 0.8}),
    ((0.3, 0.7, 0.0), {"colour": 0.9, "shape": 0.9}),
    ((0.2, 0.65, 0.15), {}),
)
# The chat template puts the parts of all messages in a row, as in training: there are no roles.
CHAT_TEMPLATE = """\
{%- set space = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{{- space.text + message['content'] -}}
{%- set space.text = ' ' -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{{- space.text + '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}
{{- space.text + part['text'] -}}
{%- endif -%}
{%- set space.text = ' ' -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model, and how it is trained.

    Attributes:
        rows: sequences of one forward pass with two images; more with one, fewer with three.
        passes: forward passes of one step.
        branches: branches of a sequence.
        branch_tokens: tokens of a branch.
        vision_steps: steps of the vision encoder's training.
    """

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 512
    vision_hidden: int = 128
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 256
    rows: int = 4
    passes: int = 2
    branches: int = 10
    branch_tokens: int = 24
    vision_steps: int = 120
    muon_lr: float = 2e-3
    adam_lr: float = 1.5e-3


# --------------------------------------------------------------------------------------------
# Vocabulary and model
# --------------------------------------------------------------------------------------------

VOCABULARY = {word: i for i, word in enumerate((*QWEN_TOKENS, UNKNOWN, *task.WORDS))}
VOCAB_SIZE = -(-len(VOCABULARY) // 64) * 64


def build_model(recipe: Recipe, seed: int) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """The untrained model.

    Attention and MLP outputs start at zero, so that every token starts as what it is; text
    embeddings have about the magnitude that image embeddings will have.
    """
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": recipe.hidden,
            "intermediate_size": recipe.mlp,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "num_key_value_heads": recipe.kv_heads,
            "max_position_embeddings": MAX_POSITIONS,
            "max_window_layers": recipe.layers,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "mrope_section": MROPE_SECTION,
            },
            "bos_token_id": VOCABULARY[PAD],
            "eos_token_id": VOCABULARY[END],
            "pad_token_id": VOCABULARY[PAD],
        },
        vision_config={
            "depth": recipe.vision_layers,
            "num_heads": recipe.vision_heads,
            "hidden_size": recipe.vision_hidden,
            "intermediate_size": recipe.vision_mlp,
            "out_hidden_size": recipe.hidden,
            "fullatt_block_indexes": list(range(recipe.vision_layers)),
        },
        image_token_id=VOCABULARY["<|image_pad|>"],
        video_token_id=VOCABULARY["<|video_pad|>"],
        vision_start_token_id=VOCABULARY["<|vision_start|>"],
        vision_end_token_id=VOCABULARY["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.6 * parameter[0].numel() ** -0.5)
            if ".layers." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        first, *others = (layer.self_attn for layer in model.model.language_model.layers)
        _start_positional_heads(first)
        for attention in others:
            _start_matching_heads(attention)
        words = model.get_input_embeddings().weight.normal_(std=0.7)
        model.get_output_embeddings().weight.copy_(words / 35)
    return model


def _start_positional_heads(attention: torch.nn.Module) -> None:
    """Let one head attend to the token one position back, and one to that two back.

    So a cell's name knows the label before it, and an image's tokens know the label before the
    image. Only biases are set, in the dimensions that turn with the temporal position.
    """
    pairs, strength = 4, 6.0  # the fastest ones; the right distance leads by a factor of 80
    half = HEAD_DIM // 2
    angles = _frequencies()[:pairs]
    attention.k_proj.bias[:pairs] = strength
    heads = attention.q_proj.bias.view(-1, HEAD_DIM)
    group = len(heads) // (len(attention.k_proj.bias) // HEAD_DIM)
    for distance, head in zip((1, 2), heads[:group], strict=False):
        head[:pairs] = strength * torch.cos(distance * angles)
        head[half : half + pairs] = -strength * torch.sin(distance * angles)


def _start_matching_heads(attention: torch.nn.Module) -> None:
    """Let one head of each group attend to tokens that resemble the one that asks.

    Queries and keys start as the same projection, in the dimensions that hardly turn over the
    length of a prompt.
    """
    half = HEAD_DIM // 2
    slow = torch.arange(half)[_frequencies() < 1 / 200]
    dims = torch.cat([slow, slow + half])
    keys = attention.k_proj.weight.view(-1, HEAD_DIM, attention.k_proj.in_features)
    queries = attention.q_proj.weight.view(len(keys), -1, *keys.shape[1:])
    for query, key in zip(queries[:, 0], keys, strict=True):
        basis = torch.linalg.qr(torch.randn(key.shape[1], len(dims))).Q.T
        query.zero_()
        query[dims] = key[dims] = 1.5 * basis


def _frequencies() -> torch.Tensor:
    """Angle by which each pair of a head's dimensions turns per position: float [HEAD_DIM / 2]."""
    return ROPE_THETA ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))


def tile_patches() -> torch.Tensor:
    """What the image processor makes of every cell: float [colour * shape * cell, 4, 1176].

    Each cell gives 2 x 2 patches; the processor shows every image twice, for two frames.
    """
    tiles = torch.from_numpy(task.tiles()).flatten(0, 2).permute(0, 3, 1, 2) / 255
    tiles = (tiles - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    n = len(tiles)
    patches = tiles.reshape(n, 3, 2, PATCH_PX, 2, PATCH_PX).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(n, 4, 3, 1, PATCH_PX, PATCH_PX).expand(-1, -1, -1, 2, -1, -1)
    return patches.reshape(n, 4, -1).contiguous()


def tile_indices(grids: Iterable[task.Grid]) -> torch.Tensor:
    """Index of each cell's tile: int64 [images, 36]."""
    kinds = [np.array(g.colours) * (len(task.SHAPES) + 1) + np.array(g.shapes) for g in grids]
    return torch.from_numpy(np.stack(kinds) * task.IMAGE_TOKENS + np.arange(task.IMAGE_TOKENS))


def encode_images(visual: torch.nn.Module, patches: torch.Tensor) -> torch.Tensor:
    """Image embeddings: float [images * 36, hidden], from patches [images, 36, 4, 1176]."""
    side = 2 * task.SIDE
    grid = torch.tensor([[1, side, side]]).expand(len(patches), -1)
    return visual(patches.flatten(0, 2), grid_thw=grid).pooler_output


def train_vision(
    model: transformers.Qwen2_5_VLForConditionalGeneration,
    tiles: torch.Tensor,
    recipe: Recipe,
    seed: int,
) -> float:
    """Train the vision encoder to show each cell as the sum of the words for it.

    The words are the embeddings of its name, its colour and its shape, which stay as they are.

    Returns:
        The share of words that the last step's image embeddings tell right.
    """
    rng = np.random.default_rng((seed, 1))
    visual, table = model.model.visual, model.get_input_embeddings().weight.detach()
    optimizer = torch.optim.AdamW(visual.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, recipe.vision_steps)
    right = 0.0
    for _ in range(recipe.vision_steps):
        indices = tile_indices([task.make_grid(rng) for _ in range(16)])
        features = encode_images(visual, tiles[indices])
        words = [(table[ids], which) for ids, which in _words_of(indices)]
        wanted = torch.stack([embeddings[which] for embeddings, which in words]).sum(0)
        loss = (features * 3**0.5 - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        hits = [((features @ e.T).argmax(1) == which).float().mean() for e, which in words]
        right = float(torch.stack(hits).mean())
    visual.requires_grad_(False)
    return right


def _words_of(tiles: torch.Tensor) -> list[tuple[list[int], torch.Tensor]]:
    """For the name, the colour and the shape of cells: ids of all words, and which one it is.

    Args:
        tiles: int64 [images, 36], see `tile_indices`.
    """
    kinds, cells = tiles.flatten() // task.IMAGE_TOKENS, tiles.flatten() % task.IMAGE_TOKENS
    shapes = (*task.SHAPES, task.STAR)
    properties = (
        (task.CELLS, cells),
        (task.COLOURS, kinds // len(shapes)),
        (shapes, kinds % len(shapes)),
    )
    return [([VOCABULARY[word] for word in words], which) for words, which in properties]


# --------------------------------------------------------------------------------------------
# Training sequences
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Sequences of the same shape: a prefix and then all branches.

    Attributes:
        tiles: int64 [images, 36], the images of all rows in order.
        ids: int64 [rows, tokens].
        positions: int64 [3, rows, tokens], M-RoPE positions.
        prefix: tokens of the prefix.
        branch: tokens of a branch.
        targets: int64 [answers, 4]: row, token at which the answer is predicted, the answer's
            id, and its family; the end after an answer counts as one more family.
    """

    tiles: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    prefix: int
    branch: int
    targets: torch.Tensor


def encode(parts: Sequence[task.Part]) -> tuple[list[int], np.ndarray]:
    """Token ids and M-RoPE positions int64 [3, tokens] of a prompt."""
    ids: list[int] = []
    columns: list[np.ndarray] = []
    position = 0
    image = np.stack(
        [
            np.zeros(task.IMAGE_TOKENS, dtype=np.int64),
            *np.divmod(np.arange(task.IMAGE_TOKENS), task.SIDE),
        ]
    )
    for part in parts:
        if isinstance(part, int):
            pads = [VOCABULARY["<|image_pad|>"]] * task.IMAGE_TOKENS
            ids += [VOCABULARY["<|vision_start|>"], *pads, VOCABULARY["<|vision_end|>"]]
            columns += [np.full((3, 1), position), image + position + 1]
            position += 1 + task.SIDE
            columns.append(np.full((3, 1), position))
            position += 1
        else:
            words = [VOCABULARY[word] for word in part.split()]
            ids += words
            columns.append(np.tile(np.arange(position, position + len(words)), (3, 1)))
            position += len(words)
    return ids, np.concatenate(columns, axis=1)


def make_batch(
    rng: np.random.Generator, n_images: int, rows: int, recipe: Recipe, shares: np.ndarray
) -> Batch:
    """Random sequences.

    Args:
        shares: float [families]: how often each is drawn.
    """
    # The prefixes have the same length: a rule takes the place of three filler words.
    filler = int(rng.integers(task.MAX_FILLER + 4))
    all_ids, all_positions, all_grids, targets = [], [], [], []
    for row in range(rows):
        scene = task.make_scene(rng, n_images, rule=filler >= 3 and rng.random() < 0.6)
        words = filler - 3 * (scene.rule is not None)
        ids, positions = encode(task.make_prefix(rng, scene.rule, n_images, words))
        prefix, start = len(ids), int(positions.max()) + 1
        usable = np.array(
            [
                (n_images > 1 or family not in task.TWO_IMAGE_FAMILIES)
                and (scene.rule is not None or family != "rule")
                for family in FAMILIES
            ]
        )
        bounds = np.cumsum(shares * usable)
        for _ in range(recipe.branches):
            branch, answers = _make_branch(rng, scene, bounds / bounds[-1], recipe.branch_tokens)
            targets += [(row, len(ids) + at, answer, family) for at, answer, family in answers]
            ids += branch
        steps = start + np.tile(np.arange(recipe.branch_tokens), recipe.branches)
        all_ids.append(ids)
        all_positions.append(np.concatenate([positions, np.tile(steps, (3, 1))], axis=1))
        all_grids += scene.grids
    return Batch(
        tile_indices(all_grids),
        torch.tensor(all_ids),
        torch.from_numpy(np.stack(all_positions, axis=1)),
        prefix,
        recipe.branch_tokens,
        torch.tensor(targets),
    )


def _make_branch(
    rng: np.random.Generator, scene: task.Scene, bounds: np.ndarray, length: int
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Listings up to a length, and (token, answer, family) of what is to be predicted."""
    ids: list[int] = []
    targets: list[tuple[int, int, int]] = []
    while True:
        family = int(np.searchsorted(bounds, rng.random(), side="right"))
        listing = task.list_queries(rng, FAMILIES[family], scene, int(rng.integers(1, 7)))
        head = listing.head
        for words, answer in listing.items:
            query = [VOCABULARY[word] for word in head + words]
            if len(ids) + len(query) > length:
                return ids + [VOCABULARY[PAD]] * (length - len(ids)), targets
            ids += query
            targets.append((len(ids) - 1, VOCABULARY[answer], family))
            if len(ids) == length:
                return ids, targets
            targets.append((len(ids), VOCABULARY[END], len(FAMILIES)))
            ids.append(VOCABULARY[answer])
            head = ()


# --------------------------------------------------------------------------------------------
# Forward pass over a tree of branches
# --------------------------------------------------------------------------------------------


def _tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix: int, branch: int
) -> torch.Tensor:
    """Causal attention in which branches see the prefix and themselves, not each other.

    Args:
        query: float [rows, heads, tokens, HEAD_DIM], scaled.
        key, value: float [rows, KV heads, tokens, HEAD_DIM].

    Returns:
        float [rows, tokens, heads * HEAD_DIM].
    """
    rows, heads, tokens, dim = query.shape
    kv = key.shape[1]
    group, count = heads // kv, (tokens - prefix) // branch
    cut = (prefix, tokens - prefix)
    query_prefix, query_branch = query.view(rows, kv, group, tokens, dim).split(cut, dim=3)
    key_prefix, key_branch = key.split(cut, dim=2)
    value_prefix, value_branch = value.split(cut, dim=2)
    key_branch = key_branch.reshape(rows, kv, 1, count, branch, dim)
    value_branch = value_branch.reshape(rows, kv, 1, count, branch, dim)

    flat = query_prefix.reshape(rows, kv, group * prefix, dim)
    scores = (flat @ key_prefix.mT).view(rows, kv, group, prefix, prefix)
    weights = (scores + _causal_bias(prefix)).softmax(-1).view(rows, kv, group * prefix, prefix)
    out_prefix = (weights @ value_prefix).view(rows, heads, prefix, dim)

    flat = query_branch.reshape(rows, kv, group * count * branch, dim)
    to_prefix = (flat @ key_prefix.mT).view(rows, kv, group, count, branch, prefix)
    own = flat.view(rows, kv, group, count, branch, dim) @ key_branch.mT
    weights = torch.cat([to_prefix, own + _causal_bias(branch)], -1).softmax(-1)
    to_prefix, own = weights.split((prefix, branch), dim=-1)
    flat = to_prefix.reshape(rows, kv, group * count * branch, prefix)
    out_branch = (flat @ value_prefix).view(rows, kv, group, count, branch, dim)
    out_branch = (out_branch + own @ value_branch).view(rows, heads, -1, dim)
    out = torch.cat([out_prefix, out_branch], 2)
    return out.transpose(1, 2).reshape(rows, tokens, heads * dim)


def _causal_bias(tokens: int) -> torch.Tensor:
    at = torch.arange(tokens)
    return torch.where(at[:, None] >= at, 0.0, -1e9)


def _layer(
    layer: torch.nn.Module,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    prefix: int,
    branch: int,
) -> torch.Tensor:
    """transformers' decoder layer with tree attention: float [rows, tokens, hidden]."""
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    query, key, value = (
        projection(h).view(*h.shape[:2], -1, HEAD_DIM).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    query = query * attention.scaling
    x = x + attention.o_proj(_tree_attention(query, key, value, prefix, branch))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def forward(
    model: transformers.Qwen2_5_VLForConditionalGeneration,
    batch: Batch,
    tiles: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the batch's targets and of its image tokens: float [tokens, vocabulary] each."""
    language = model.model.language_model
    with torch.no_grad():
        images = encode_images(model.model.visual, tiles[batch.tiles])
    x = language.embed_tokens(batch.ids)
    is_image = batch.ids == VOCABULARY["<|image_pad|>"]
    x = x.masked_scatter(is_image[..., None], images)
    cos, sin = language.rotary_emb(x, batch.positions)
    for layer in language.layers:
        x = _layer(layer, x, cos, sin, batch.prefix, batch.branch)
    wanted = x[batch.targets[:, 0], batch.targets[:, 1]]
    logits = model.lm_head(language.norm(torch.cat([wanted, x[is_image]])))
    return logits.split((len(wanted), len(images)))


def naming_loss(logits: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """How badly image tokens tell the name, the colour and the shape of their cells.

    Args:
        logits: float [image tokens, vocabulary].
        tiles: int64 [images, 36], see `tile_indices`.
    """
    losses = [cross_entropy(logits[:, ids], which) for ids, which in _words_of(tiles)]
    return torch.stack(losses).mean()


# --------------------------------------------------------------------------------------------
# Optimisation
# --------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made nearly orthogonal (Newton-Schulz).

    Updates have the root mean square that AdamW's usually have. Unlike torch's own, it handles
    matrices of the same shape together and in float32, as this is faster on CPUs without bfloat16,
    and its state lies in shared memory from the start.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter).share_memory_()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all matrices."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                momentum = self.state[parameter]["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                # Wide matrices have the smaller Gram matrix.
                alike[tuple(sorted(update.shape))].append((parameter, update))
            for (_, longer), pairs in alike.items():
                wide = [u.T if u.shape[0] > u.shape[1] else u for _, u in pairs]
                scale = group["lr"] * 0.2 * math.sqrt(longer)
                for (p, _), u in zip(pairs, _orthogonalise(torch.stack(wide)), strict=True):
                    p.sub_(u.T if p.shape[0] > p.shape[1] else u, alpha=scale)


def _orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of wide matrices [n, rows, columns] near one."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(3.4445 * x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x)
    return x


@dataclass(frozen=True)
class _Order:
    """What all processes do in one step."""

    step: int
    n_images: int
    rows: int
    shares: np.ndarray
    rate: float


class Trainer:
    """The state of a training run.

    Several processes of one thread each share the model: threads that wait for each other in
    every operation lose far more whenever something else runs on the machine. In each step every
    process takes passes as long as there are any, then updates the matrices that are its own.

    Attributes:
        step: steps done.
        minutes: time they took.
        right: running share of right answers by family, with one, two and three images. The
            data is always new, so this is what the model does on data it has not seen.
        log: `loss` and `right` in the course of time.
    """

    def __init__(self, recipe: Recipe, seed: int, checkpoint: Path, processes: int) -> None:
        torch.set_num_threads(1)
        self.recipe, self.seed, self.checkpoint = recipe, seed, checkpoint
        self.tiles = tile_patches()
        self.model = build_model(recipe, seed).share_memory()
        self.step = 0
        self._steps_since_start = 0
        self.minutes = 0.0
        self.loss = math.nan
        self.right = {name: [0.0] * task.MAX_IMAGES for name in FAMILIES}
        self.stage = 0
        self.log: list[dict[str, Any]] = []
        layers = self.model.model.language_model.layers
        matrices = [p for p in layers.parameters() if p.dim() == 2]
        chosen = {id(p) for p in [*matrices, *self.model.model.visual.parameters()]}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self._muon = [Muon(matrices[i::processes], recipe.muon_lr) for i in range(processes)]
        self._adam = torch.optim.AdamW(others, recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0)
        if checkpoint.exists():
            self._load()
        else:
            self.vision_right = train_vision(self.model, self.tiles, recipe, seed)
        self.model.model.visual.requires_grad_(False)

        owned = [[*(others if i == 0 else ()), *matrices[i::processes]] for i in range(processes)]
        self._parameters = [parameter for mine in owned for parameter in mine]
        ends = np.cumsum([sum(p.numel() for p in mine) for mine in owned]).tolist()
        self._slices = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self._gradients = torch.zeros(processes, ends[-1]).share_memory_()
        # By process: loss, and right answers and all answers by family.
        self._figures = torch.zeros(processes, 3, len(FAMILIES) + 1).share_memory_()
        context = multiprocessing.get_context("fork")
        # Should a process die, the others notice.
        self._barrier = context.Barrier(processes, timeout=3600)
        self._next_pass = context.Value("i", 0)
        self._pipes = []
        for index in range(1, processes):
            pipe, end = context.Pipe()
            context.Process(target=self._serve, args=(index, end), daemon=True).start()
            self._pipes.append(pipe)
        self._start(0)

    def _start(self, index: int) -> None:
        views = self._gradients[index].split([p.numel() for p in self._parameters])
        for parameter, view in zip(self._parameters, views, strict=True):
            parameter.grad = view.view_as(parameter)

    def _serve(self, index: int, pipe: Connection) -> None:
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
        self._start(index)
        while True:
            try:
                order = pipe.recv()
            except (EOFError, KeyboardInterrupt):
                return
            self._work(index, order)

    def _work(self, index: int, order: _Order) -> None:
        """The part of process `index` in a step."""
        recipe = self.recipe
        figures, gradients = self._figures[index].zero_(), self._gradients[index].zero_()
        self._barrier.wait()
        while True:
            with self._next_pass.get_lock():
                number = self._next_pass.value
                self._next_pass.value += 1
            if number >= recipe.passes:
                break
            rng = np.random.default_rng((self.seed, 2, order.step, number))
            batch = make_batch(rng, order.n_images, order.rows, recipe, order.shares)
            logits, image_logits = forward(self.model, batch, self.tiles)
            answers, families = batch.targets[:, 2], batch.targets[:, 3]
            losses = cross_entropy(logits, answers, reduction="none")
            # The end after an answer is easy and frequent.
            weights = torch.where(families == len(FAMILIES), 0.1, 1.0)
            loss = (losses * weights).sum() / weights.sum() / recipe.passes
            naming = naming_loss(image_logits, batch.tiles) / recipe.passes
            (loss + 0.5 * naming).backward()
            figures[0, 0] += loss.detach()
            right = (logits.argmax(1) == answers).float()
            figures[1] += torch.bincount(families, right, figures.shape[1]).float()
            figures[2] += torch.bincount(families, minlength=figures.shape[1])
        self._barrier.wait()
        mine = self._slices[index]
        gradients[mine] = self._gradients[:, mine].sum(0)
        self._muon[index].param_groups[0]["lr"] = recipe.muon_lr * order.rate
        self._muon[index].step()
        if index == 0:
            self._adam.param_groups[0]["lr"] = recipe.adam_lr * order.rate
            self._adam.step()
            self._next_pass.value = 0
        self._barrier.wait()

    def advance(self, progress: float) -> None:
        """One step.

        Args:
            progress: share of the training that is over, from 0 to 1; the learning rate falls in
                the last quarter.
        """
        began = time.perf_counter()
        while self.stage < len(STAGES) - 1 and all(
            self.right[name][self.stage] > share for name, share in STAGES[self.stage][1].items()
        ):
            self.stage += 1
        rng = np.random.default_rng((self.seed, 3, self.step))
        n_images = 1 + int(rng.choice(task.MAX_IMAGES, p=STAGES[self.stage][0]))
        rows = max(1, round(self.recipe.rows * (1.4, 1, 0.8)[n_images - 1]))
        self._steps_since_start += 1
        rate = min(1.0, self._steps_since_start / 20) * min(1.0, 4 * (1 - progress) + 0.01)
        order = _Order(self.step, n_images, rows, self._shares(n_images), rate)
        for pipe in self._pipes:
            pipe.send(order)
        self._work(0, order)
        losses, right, asked = self._figures.sum(0).tolist()
        for name, hits, n in zip(FAMILIES, right, asked, strict=False):
            if n:
                keep = 0.995 ** min(n, 20)
                before = self.right[name][n_images - 1]
                self.right[name][n_images - 1] = keep * before + (1 - keep) * hits / n
        self.loss = losses[0]
        self.step += 1
        self.minutes += (time.perf_counter() - began) / 60
        if self.step % 50 == 0:
            self.log.append(
                {
                    "step": self.step,
                    "minutes": round(self.minutes, 2),
                    "loss": round(self.loss, 4),
                    "right": {n: [round(x, 3) for x in xs] for n, xs in self.right.items()},
                }
            )

    def _shares(self, n_images: int) -> np.ndarray:
        """How often each family is drawn: float [families]."""
        right = {name: shares[n_images - 1] for name, shares in self.right.items()}
        shares = [
            0.06 + min(1 - right[name], 0.4)
            if all(right[other] > 0.8 for other in BUILDS_ON.get(name, ()))
            else 0.02
            for name in FAMILIES
        ]
        return np.array(shares)

    def save(self) -> None:
        """Keep the state, for a later `Trainer` with the same arguments to continue.

        The optimizers' state is left out; they start anew, with low learning rates.
        """
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "recipe": asdict(self.recipe),
                "model": self.model.state_dict(),
                "run": {name: getattr(self, name) for name in self._RUN},
            },
            partial,
        )
        partial.replace(self.checkpoint)

    _RUN = ("step", "minutes", "loss", "right", "stage", "log", "vision_right")

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{self.checkpoint} is of another recipe: remove it to start anew")
        self.model.load_state_dict(state["model"])
        for name in self._RUN:
            setattr(self, name, state["run"][name])


# --------------------------------------------------------------------------------------------
# Checkpoint directory and evaluation
# --------------------------------------------------------------------------------------------


def write_checkpoint(
    model: transformers.Qwen2_5_VLForConditionalGeneration, directory: Path
) -> None:
    """Write the model in bfloat16, its tokenizer and its processor settings."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    save_model(copy.deepcopy(model).to(torch.bfloat16), directory)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = (*QWEN_TOKENS, UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": [t for t in QWEN_TOKENS if t not in (PAD, END)],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "model_max_length": MAX_POSITIONS,
            "pad_token": PAD,
            "unk_token": UNKNOWN,
        },
    )
    write_processors(directory, ARCHITECTURES["qwen2_5_vl"], "tiny", CHAT_TEMPLATE)
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": VOCABULARY[PAD],
            "eos_token_id": [VOCABULARY[END], VOCABULARY[PAD]],
            "pad_token_id": VOCABULARY[PAD],
            "do_sample": False,
        },
    )


@torch.inference_mode()
def evaluate(directory: Path, n: int, n_images: int) -> dict[str, float]:
    """Exact match by family, of a checkpoint as transformers loads it.

    Args:
        n: new questions per family, each a prompt of its own.
        n_images: images of each prompt.

    Returns:
        The share of questions of each family that greedy decoding answers with the right word
        and then the end. Families that need more images are left out.
    """
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype="float32")
    processor = transformers.AutoProcessor.from_pretrained(directory)
    result = {}
    for index, family in enumerate(task.FAMILIES):
        if n_images < 2 and family in task.TWO_IMAGE_FAMILIES:
            continue
        rng = np.random.default_rng((EVALUATION_SEED, n_images, index))
        questions = [task.make_question(rng, family, n_images) for _ in range(n)]
        right = 0
        for start in range(0, n, 50):
            some = questions[start : start + 50]
            inputs = processor(
                # The answer is appended: what follows it is predicted in the same pass.
                text=[f"{question.text()} {question.answer}" for question in some],
                images=[image for question in some for image in question.images()],
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
            predicted = model(**inputs).logits.argmax(-1)
            last = inputs["attention_mask"].sum(1) - 1
            row = torch.arange(len(some))
            wanted = inputs["input_ids"][row, last]
            ends = predicted[row, last] == VOCABULARY[END]
            right += int(((predicted[row, last - 1] == wanted) & ends).sum())
        result[family] = right / n
    return result


def run(
    recipe: Recipe,
    seed: int,
    steps: int | None,
    minutes: float | None,
    output: Path,
    questions: Sequence[int],
    checkpoint: Path,
    processes: int,
) -> dict[str, Any]:
    """Train until `steps` or `minutes` are over, write and evaluate the checkpoint.

    Args:
        questions: questions per family in the evaluation, with one, two and three images.

    Returns:
        What is written to ``training.json``.
    """
    _keep_freed_memory()
    console = Console()
    trainer = Trainer(recipe, seed, checkpoint, processes)
    console.print(f"vision encoder: {trainer.vision_right:.1%} of cells' properties read right")

    def done() -> float:
        return min(1.0, trainer.step / steps if steps else trainer.minutes / (minutes or 1))

    saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=1.0, completed=done())
        while done() < 1:
            trainer.advance(done())
            text = f"step {trainer.step}, {trainer.minutes:.1f} min, loss {trainer.loss:.3f}"
            progress.update(bar, completed=done(), description=text)
            if trainer.step % 50 == 0:
                rights = " ".join(
                    f"{name} {'/'.join(f'{r:.2f}' for r in rs)}"
                    for name, rs in trainer.right.items()
                )
                console.print(f"{text}: {rights}", soft_wrap=True)
            if time.monotonic() - saved > 60:
                trainer.save()
                saved = time.monotonic()
    trainer.save()

    write_checkpoint(trainer.model, output)
    results = {str(i): evaluate(output, n, i) for i, n in enumerate(questions, start=1)}
    table = Table("family", *(f"{n} images" for n in results), title="exact match")
    for family in task.FAMILIES:
        shares = (result.get(family) for result in results.values())
        table.add_row(family, *("" if share is None else f"{share:.3f}" for share in shares))
    console.print(table)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": seed,
        "steps": trainer.step,
        "minutes": round(trainer.minutes, 1),
        "processes": processes,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "recipe": asdict(recipe),
        "questions_per_family_by_images": {str(i): n for i, n in enumerate(questions, start=1)},
        "exact_match_by_images": results,
        "log": trainer.log,
    }
    write_json(output / "training.json", report)
    write_card(output, report)
    return report


SOLVED = 0.9


def write_card(output: Path, report: Mapping[str, Any]) -> None:
    """Write the model's ``README.md``, with an example image, from what `run` returns."""
    results = report["exact_match_by_images"]
    questions = report["questions_per_family_by_images"]
    rows = []
    for family, asks_for in task.FAMILIES.items():
        shares = (f"{r[family]:.3f}" if family in r else "" for r in results.values())
        rows.append(f"| `{family}` | {asks_for} | {' | '.join(shares)} |")
    solved = [name for name, share in results["2"].items() if share >= SOLVED]
    others = [name for name in results["2"] if name not in solved]
    rng = np.random.default_rng((EVALUATION_SEED, 0))
    examples = []
    for family in task.FAMILIES:
        question = task.make_question(rng, family, 2)
        examples.append(f'- `{family}`: "{question.text("[image]")}" -> "{question.answer}"')
    first, second = question.images()
    pixels = np.concatenate([first, np.full_like(first[:, :12], 255), second], axis=1)
    Image.fromarray(pixels).save(output / "sample.png")
    card = f"""\
# A tiny vision-language model trained on coloured grids

A Qwen2.5-VL model of {report["parameters"] / 1e6:.1f} M parameters ({report["recipe"]["layers"]} \
layers, hidden size {report["recipe"]["hidden"]}, bfloat16), really trained, on a CPU, to answer
questions about one to three images. vLLM and transformers load this directory like a published
checkpoint; nothing has to be downloaded.

![two images of a prompt](sample.png)

An image has {task.IMAGE_PX} x {task.IMAGE_PX} px and 6 x 6 cells, and becomes 36 tokens. Answers
are one word. `scripts/grid_vqa.py` makes images and questions, and prompts in which the same
images stand in other places.

## What it answers

Share of new questions that greedy decoding answers with exactly the right word and then ends, each
question a prompt of its own ({", ".join(str(n) for n in questions.values())} questions per family \
with {", ".join(questions)} images):

| family | asks for | {" | ".join(f"images: {n}" for n in questions)} |
| --- | --- | {" | ".join("---" for _ in questions)} |
{chr(10).join(rows)}

At least {SOLVED:.0%} with two images: {", ".join(f"`{name}`" for name in solved) or "none"}. \
Not there: {", ".join(f"`{name}`" for name in others) or "none"}.

One prompt of each family (`[image]` stands for `{task.IMAGE_PLACEHOLDER}`):

{chr(10).join(examples)}

## How it was made

    {report["command"]}

took {report["steps"]} steps and {report["minutes"]:.0f} minutes with {report["processes"]} \
processes of one thread each; `training.json` has the recipe, and the loss and the shares of right
answers on the way. No loss tells an image's tokens which image of the prompt they belong to.
"""
    (output / "README.md").write_text(card, encoding="utf-8")


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of returning it: a step frees and takes it anew."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**30)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Train a tiny vision-language model.")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="steps in all, those of earlier runs included")
    length.add_argument("--minutes", type=float, help="minutes in all, as --steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True)
    args = parser.parse_args(argv)
    if not 0 <= args.seed < EVALUATION_SEED:
        parser.error(f"--seed must be from 0 to {EVALUATION_SEED - 1}")
    checkpoint = CHECKPOINTS / f"seed-{args.seed}.pt"
    questions = (200, 500, 200)
    processes = os.cpu_count() or 1
    run(
        Recipe(), args.seed, args.steps, args.minutes, args.output, questions, checkpoint, processes
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

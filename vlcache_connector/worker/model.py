"""The model object, and what the sparse prefill asks of it.

vLLM seams: `SupportsMultiModal.embed_multimodal` / `embed_input_ids` / `get_language_model`,
`SupportsMRoPE` (`vllm/model_executor/models/interfaces.py`), the decoder layers' call,
Qwen3-VL's deepstack buffers (`vllm/model_executor/models/qwen3_vl.py`), and
`LoRAModelManager`'s mapping of rows to adapters (`vllm/lora/model_manager.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.model_executor.models.utils import extract_layer_index
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from ..rope import RotarySpec
from ..streams import upload
from ..support import UnsupportedError, model_dtype
from .rotary import UnsupportedRotaryError, rotary_spec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Stretch:
    """Consecutive decoder layers of a pass that compute the same rows.

    Attributes:
        layers: indices of the decoder layers.
        stays: int64, the rows of the stretch before that are left; None: all of them.
        metadata: attention metadata per layer name.
        slot_mapping: int64 [rows] per layer name.
    """

    layers: range
    stays: torch.Tensor | None
    metadata: dict[str, Any]
    slot_mapping: dict[str, torch.Tensor]


def encode(model: Any, modality: str, data: Any, device: torch.device) -> torch.Tensor:
    """Run a model's vision encoder on one item's processed inputs: rows [n_embeds, width]."""
    _, _, kwargs = next(iter(group_and_batch_mm_kwargs([(modality, data)], device=device)))
    rows: torch.Tensor = model.embed_multimodal(**kwargs)[0]
    return rows


class SparsePrefillModel:
    """A vision-language model, seen by what a sparse prefill needs.

    Args:
        model: vLLM's top-level model, e.g. `Qwen2_5_VLForConditionalGeneration`.
        layer_names: names of the decoder's attention layers.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        vllm_config: VllmConfig,
        layer_names: Sequence[str],
        device: torch.device,
    ) -> None:
        self._model: Any = model
        self._vllm_config = vllm_config
        self._device = device
        self.layer_names = sorted(layer_names, key=extract_layer_index)
        context = vllm_config.compilation_config.static_forward_context
        self.layers: dict[str, Any] = {name: context[name] for name in self.layer_names}
        self.rotary = self._common_rotary()
        # From vLLM 0.33 on; such a kernel rotates keys, too.
        if any(getattr(layer, "kv_cache_update_bypass", False) for layer in self.layers.values()):
            raise UnsupportedError(
                "this model's own kernel writes its KV cache, past the write that segments are "
                "captured at; remove --kv-transfer-config"
            )

    def _common_rotary(self) -> RotarySpec:
        specs: dict[str, RotarySpec] = {}
        attention_layers = {id(layer) for layer in self.layers.values()}
        found = 0
        for module in self._model.modules():
            if id(getattr(module, "attn", None)) in attention_layers:
                rotary = getattr(module, "rotary_emb", None)
                if rotary is None:
                    raise UnsupportedError(f"{type(module).__name__} has no rotary embedding")
                try:
                    spec = rotary_spec(rotary)
                except UnsupportedRotaryError as error:
                    raise UnsupportedError(
                        f"this model's keys can't be rotated to another position ({error}); "
                        "remove --kv-transfer-config"
                    ) from error
                specs[spec.fingerprint()] = spec
                found += 1
        if found != len(self.layers) or len(specs) != 1:
            raise UnsupportedError(
                f"{len(self.layers)} attention layers, {found} with a rotary embedding, "
                f"{len(specs)} different ones: all layers must rotate alike"
            )
        return next(iter(specs.values()))

    def positions(self, token_ids: list[int], features: Sequence[Any]) -> torch.Tensor:
        """RoPE positions of a whole prompt: int64 [3, n] with M-RoPE, else [1, n], on the CPU."""
        if self._vllm_config.model_config.uses_mrope:
            positions, _ = self._model.get_mrope_input_positions(token_ids, list(features))
            return positions.to(torch.int64)
        return torch.arange(len(token_ids), dtype=torch.int64)[None]

    def encode(self, modality: str, data: Any) -> torch.Tensor:
        """Run the vision encoder on one item's processed inputs: rows [n_embeds, width]."""
        return encode(self._model, modality, data, self._device)

    @contextmanager
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        encoder_rows: list[torch.Tensor],
        is_embed: torch.Tensor,
    ) -> Iterator[NestedPass]:
        """One pass over scattered tokens; its only result is their KV in the paged cache.

        Args:
            token_ids: int64 [n].
            positions: int64 [3, n] or [1, n].
            encoder_rows: the encoder rows of the tokens with `is_embed`, in order, on any device.
            is_embed: bool [n], on the CPU.
        """
        with self._own_state(len(token_ids)):
            embeds = self._model.embed_input_ids(
                upload(token_ids, self._device),
                multimodal_embeddings=[
                    rows.to(self._device, non_blocking=True) for rows in encoder_rows
                ],
                # On the CPU, as vLLM's own: from a mask on the device its merge would have to wait
                # for the number of rows.
                is_multimodal=is_embed,
            ).to(model_dtype(self._vllm_config))
            axes = positions if positions.shape[0] == 3 else positions[0]
            yield NestedPass(self, embeds, upload(axes, self._device))

    def run_whole(self, stretch: Stretch, hidden: torch.Tensor, positions: torch.Tensor) -> None:
        """All decoder layers of a nested pass, through the model's own forward."""
        with self._context(stretch, len(hidden)):
            self._model(
                input_ids=None,
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=hidden,
            )

    def run_layers(
        self,
        stretch: Stretch,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        deepstack: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Some decoder layers of a nested pass: hidden states and residual behind them."""
        layers = self._decoder_layers()
        with self._context(stretch, len(hidden)):
            for index in stretch.layers:
                hidden, residual = layers[index](positions, hidden, residual)
                if index < len(deepstack):
                    hidden = hidden + deepstack[index]
        return hidden, residual

    def _context(self, stretch: Stretch, num_tokens: int) -> AbstractContextManager[None]:
        return set_forward_context(
            stretch.metadata,
            self._vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=stretch.slot_mapping,
        )

    def _decoder_layers(self) -> Sequence[Any]:
        """The decoder layers: `layer(positions, hidden, residual) -> (hidden, residual)`."""
        layers: Sequence[Any] = self._model.get_language_model().model.layers
        if len(layers) != len(self.layers):
            raise RuntimeError(f"{len(layers)} decoder layers for {len(self.layers)} KV caches")
        return layers

    def take_deepstack(self, num_tokens: int) -> list[torch.Tensor]:
        """Rows [num_tokens, width] that Qwen3-VL adds behind its first layers, one per layer."""
        if not getattr(self._model, "deepstack_input_embeds_num_tokens", 0):
            return []
        rows = self._model._get_deepstack_input_embeds(num_tokens).tensors
        taken = [rows[name].clone() for name in sorted(rows, key=_number_behind)]
        self._model._clear_deepstack_input_embeds(num_tokens)
        return taken

    @contextmanager
    def _own_state(self, num_tokens: int) -> Iterator[None]:
        """Put aside what vLLM has set on the model for its own batch; back on every way out.

        It prepares that batch before the sparse prefill runs.
        """
        with self._base_weights(num_tokens), self._own_deepstack_buffers():
            yield

    @contextmanager
    def _base_weights(self, num_tokens: int) -> Iterator[None]:
        """No row of the pass is an adapter's, whatever the main batch's rows are."""
        manager = getattr(self._model, "lora_manager", None)
        if manager is None:
            yield
            return
        before = manager._last_mapping
        try:
            manager.set_adapter_mapping(LoRAMapping((0,) * num_tokens, (0,), is_prefill=True))
            yield
        finally:
            if before is not None:
                adapters = {*before.index_mapping, *before.prompt_mapping} - {0}
                # A batch whose adapters have been unloaded since is over.
                if adapters <= set(manager.lora_index_to_id):
                    manager.set_adapter_mapping(before)

    @contextmanager
    def _own_deepstack_buffers(self) -> Iterator[None]:
        """Qwen3-VL's buffers hold the main batch's image features, or nothing but zeros."""
        model = self._model
        in_use = getattr(model, "deepstack_input_embeds_num_tokens", 0)
        saved = [rows[:in_use].clone() for rows in model.deepstack_input_embeds] if in_use else []
        try:
            if in_use:
                model._clear_deepstack_input_embeds(in_use)
            yield
        finally:
            # A pass that failed has left its own features there.
            left = getattr(model, "deepstack_input_embeds_num_tokens", 0)
            if left:
                model._clear_deepstack_input_embeds(left)
            if saved:
                model._set_deepstack_input_embeds(torch.stack(saved))


class NestedPass:
    """A pass that has begun: its stretches run one after the other.

    Args:
        hidden: embeddings of the tokens, [n, width].
        positions: int64 [3, n] or [n].
    """

    def __init__(
        self, model: SparsePrefillModel, hidden: torch.Tensor, positions: torch.Tensor
    ) -> None:
        self._model = model
        self._hidden = hidden
        self._positions = positions
        self._residual: torch.Tensor | None = None
        self._deepstack: list[torch.Tensor] | None = None

    def run(self, stretch: Stretch) -> None:
        """Run the next layers.

        All of them at once run as vLLM would run them (compiled, if so configured), others one by
        one. Layers behind the last stretch that is run are left out.
        """
        if len(stretch.layers) == len(self._model.layers):
            self._model.run_whole(stretch, self._hidden, self._positions.contiguous())
            return
        if self._deepstack is None:
            self._deepstack = self._model.take_deepstack(len(self._hidden))
        if stretch.stays is not None:
            stays = upload(stretch.stays, self._hidden.device)
            self._hidden, self._positions = self._hidden[stays], self._positions[..., stays]
            self._residual = None if self._residual is None else self._residual[stays]
            self._deepstack = [rows[stays] for rows in self._deepstack]
        self._positions = self._positions.contiguous()
        self._hidden, self._residual = self._model.run_layers(
            stretch, self._hidden, self._residual, self._positions, self._deepstack
        )


def _number_behind(name: str) -> int:
    return int(name.rsplit("_", 1)[1])

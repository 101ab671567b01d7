"""The two residency indices of an engine, shared by its KV half and its encoder half."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..support import config_of, engine_id, model_dtype
from .index import ResidencyIndex

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_indices: dict[str, tuple[ResidencyIndex, ResidencyIndex]] = {}


def get_indices(vllm_config: VllmConfig) -> tuple[ResidencyIndex, ResidencyIndex]:
    """Indices of the KV segments and of the encoder rows; made on first use."""
    name = engine_id(vllm_config)
    if name not in _indices:
        config = config_of(vllm_config)
        num_ranks = vllm_config.parallel_config.tensor_parallel_size
        _indices[name] = (
            ResidencyIndex(config.cpu_bytes // num_ranks, num_ranks),
            ResidencyIndex(config.encoder_cpu_bytes, num_ranks),
        )
    return _indices[name]


def drop_indices(vllm_config: VllmConfig) -> None:
    """Forget the engine's indices."""
    _indices.pop(engine_id(vllm_config), None)


def encoder_row_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of one encoder output row; deepstack models put several features side by side."""
    model = vllm_config.model_config
    vision = getattr(model.hf_config, "vision_config", None)
    levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return model.get_inputs_embeds_size() * (1 + levels) * model_dtype(vllm_config).itemsize

"""The segment store of a worker process, shared by the KV half and the encoder half."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from ..store import LMCacheSegmentStore, SegmentStore
from ..support import config_of, engine_id, kv_shape, model_fingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_stores: dict[str, SegmentStore] = {}

_SLACK = 1.05
"""Room for headers and alignment, which the scheduler side's accounts leave out."""


def get_store(vllm_config: VllmConfig) -> SegmentStore:
    """The store of this engine's worker; made on first use."""
    name = engine_id(vllm_config)
    if name not in _stores:
        config, shape = config_of(vllm_config), kv_shape(vllm_config)
        num_ranks = vllm_config.parallel_config.tensor_parallel_size
        budget = config.cpu_bytes // num_ranks + config.encoder_cpu_bytes
        _stores[name] = LMCacheSegmentStore(
            model_name=vllm_config.model_config.model,
            fingerprint=model_fingerprint(vllm_config),
            rank=get_tensor_model_parallel_rank(),
            world_size=num_ranks,
            budget_bytes=int(budget * _SLACK) + (8 << 20),
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            kv_dtype=shape.dtype,
            # This process wrote the memory itself: a checksum over each read would only cost time.
            verify=False,
        )
    return _stores[name]


def close_store(vllm_config: VllmConfig) -> None:
    """Close the engine's store; does nothing the second time."""
    store = _stores.pop(engine_id(vllm_config), None)
    if store is not None:
        store.close()

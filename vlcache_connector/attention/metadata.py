"""From runs to attention metadata: how an unmodified causal kernel does a sparse prefill.

Every run becomes a row of its own: its queries are the run's tokens, its sequence length is the
position behind the run's last token, its block table is the request's. A causal varlen kernel
aligns queries with the end of their row, so each query sees exactly the positions up to its own.

vLLM seams: `CommonAttentionMetadata`, `AttentionMetadataBuilder` (`vllm/v1/attention/backend.py`),
and the buffers of `FlashAttentionMetadataBuilder` and `FlashInferMetadataBuilder`
(`vllm/v1/attention/backends`), which bound how many rows they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import select_common_block_size

from ..protocol import Span
from ..streams import upload

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class Row:
    """A run of one request.

    Attributes:
        span: the run's tokens.
        block_ids: the request's KV blocks from its first token on.
    """

    span: Span
    block_ids: Sequence[int] | np.ndarray


def slots_of(span: Span, block_ids: Sequence[int] | np.ndarray, block_size: int) -> np.ndarray:
    """Slots of the paged KV cache for the tokens of `span`: int64 [len(span)]."""
    first, last = span.start // block_size, -(-span.end // block_size)
    if last > len(block_ids):
        raise IndexError(f"{len(block_ids)} blocks of {block_size} tokens don't cover {span}")
    blocks = np.asarray(block_ids[first:last], dtype=np.int64)
    slots = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
    return slots[span.start - first * block_size :][: len(span)]


def max_rows_of(builder: Any) -> int | None:
    """The most rows of metadata that a builder's buffers hold; None: any number."""
    # FlashAttention 3 under full CUDA graphs: one entry, and four for every row.
    buffer = getattr(builder, "scheduler_metadata", None)
    if buffer is not None:
        return (len(buffer) - 1) // 4
    # FlashInfer.
    return getattr(builder, "max_num_reqs", None)


class MetadataFactory:
    """Builds the metadata of a pass for all decoder layers of one KV cache group.

    Attributes:
        max_rows: most rows that may be built for at a time; None: any number.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        layers: dict[str, Any],
        device: torch.device,
    ) -> None:
        group = kv_cache_config.kv_cache_groups[0]
        self._layer_names = list(layers)
        self._device = device
        self._block_size = group.kv_cache_spec.block_size
        backend = next(iter(layers.values())).get_attn_backend()
        kernel_block = select_common_block_size(self._block_size, [backend], [group.kv_cache_spec])
        self._kernel_blocks_per_block = self._block_size // kernel_block
        with set_current_vllm_config(vllm_config):
            self._builder = backend.get_builder_cls()(
                group.kv_cache_spec.copy_with_new_block_size(kernel_block),
                self._layer_names,
                vllm_config,
                device,
            )
        self.max_rows = max_rows_of(self._builder)

    def build(self, rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Metadata and slot mapping per layer name, for a forward over `rows` in order."""
        lengths = np.array([len(row.span) for row in rows], dtype=np.int32)
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        ends = np.array([row.span.end for row in rows], dtype=np.int32)
        slots = np.concatenate(
            [slots_of(row.span, row.block_ids, self._block_size) for row in rows]
        )
        starts_cpu, ends_cpu = torch.from_numpy(starts), torch.from_numpy(ends)
        slot_mapping = upload(torch.from_numpy(slots), self._device)
        common = CommonAttentionMetadata(
            query_start_loc=upload(starts_cpu, self._device),
            query_start_loc_cpu=starts_cpu,
            seq_lens=upload(ends_cpu, self._device),
            seq_lens_cpu_upper_bound=ends_cpu,
            num_reqs=len(rows),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=upload(self._block_table(rows), self._device),
            slot_mapping=slot_mapping,
            causal=True,
            is_prefilling=torch.ones(len(rows), dtype=torch.bool),
        )
        metadata = self._builder.build(common_prefix_len=0, common_attn_metadata=common)
        return (
            dict.fromkeys(self._layer_names, metadata),
            dict.fromkeys(self._layer_names, slot_mapping),
        )

    def _block_table(self, rows: Sequence[Row]) -> torch.Tensor:
        ratio = self._kernel_blocks_per_block
        table = np.zeros((len(rows), max(len(row.block_ids) for row in rows)), dtype=np.int32)
        for index, row in enumerate(rows):
            table[index, : len(row.block_ids)] = row.block_ids
        if ratio > 1:
            table = (table[:, :, None] * ratio + np.arange(ratio, dtype=np.int32)).reshape(
                len(rows), -1
            )
        return torch.from_numpy(np.ascontiguousarray(table))

"""Puts KV segments into stores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlcache_connector.store import SegmentStore


def put_kv(
    store: SegmentStore, key: str, positions: Tensor, layers: Sequence[tuple[Tensor, Tensor]]
) -> int:
    """Store K and V [n, kv_heads, head_dim] of all layers; bytes taken, 0 if there is no room."""
    writer = store.open_kv(key, positions)
    if writer is None:
        return 0
    for layer, parts in enumerate(layers):
        for target, part in zip(writer.layer(layer), parts, strict=True):
            target.copy_(part)
    return writer.finish()

"""Engines of small segments, and what is put into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_connector.storage.engine import SegmentEngine
from vlcache_connector.storage.layout import SegmentLayout, Space

MIB = 1 << 20


def make_layout(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: torch.dtype = torch.float32,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    **options: Any,
) -> SegmentLayout:
    """Of a rank; `options` are those of `Space` and of `SegmentLayout`."""
    space = {"namespace": "vlcache-model", "rank": rank, "num_ranks": num_ranks}
    space |= {key: options.pop(key) for key in ("namespace", "max_object_bytes") if key in options}
    options = {
        "positions_rows": 3,
        "encoder_width": 64,
        "encoder_dtype": torch.float32,
        **options,
    }
    return SegmentLayout(Space(**space), num_layers, num_kv_heads, head_dim, kv_dtype, **options)


def make_engine(*args: Any, num_bytes: int = MIB, side: Any = None, **kwargs: Any) -> SegmentEngine:
    """Host memory only; the other arguments are those of `make_layout`."""
    return SegmentEngine(make_layout(*args, **kwargs), num_bytes, side=side)


def put_kv(
    engine: SegmentEngine, key: str, positions: Tensor, layers: Sequence[tuple[Tensor, Tensor]]
) -> int:
    """Store K and V [n, kv_heads, head_dim] of all layers; bytes taken, 0 if there is no room."""
    writer = engine.open_kv(key, positions)
    if writer is None:
        return 0
    for layer, parts in enumerate(layers):
        for target, part in zip(writer.layer(layer), parts, strict=True):
            target.copy_(part)
    return writer.finish()

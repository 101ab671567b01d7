"""Engines of small segments, and what is put into them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from vlcache_connector.config import VLCacheConfig
from vlcache_connector.storage.adapters import open_adapters
from vlcache_connector.storage.engine import Lookup, SegmentEngine
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.layout import SegmentLayout, Space

if TYPE_CHECKING:
    from vlcache_connector.storage.guarded import GuardedConfig

MIB = 1 << 20
T = TypeVar("T")


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


def adapters_of(
    *specs: Mapping[str, Any], transfer_seconds: float = 3.0, **options: Any
) -> list[GuardedConfig]:
    """Of `l2_adapters` and other options of `VLCacheConfig`; what hangs is given up sooner.

    Guards stand lookups of a busy machine, unless a test shortens `fetch_deadline_seconds`.
    """
    options = {"fetch_deadline_seconds": 4.0, **options}
    made = open_adapters(
        VLCacheConfig(l2_adapters=list(map(dict, specs)), **options), can_store=True
    )
    for adapter in made:
        adapter.transfer_seconds = transfer_seconds
    return made


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


def put_random(engine: SegmentEngine, segment: SegmentId, num_tokens: int, seed: int = 0) -> bool:
    """Store made-up KV or encoder rows; whether there was room."""
    generator = torch.Generator().manual_seed(seed)
    layout = engine._layout
    if segment.kind == "encoder":
        shape = (num_tokens, layout.encoder_width)
        rows = torch.randn(shape, generator=generator).to(layout.encoder_dtype)
        return engine.put_encoder(segment.key, rows) > 0
    positions = torch.randint(
        0, 1000, (layout.positions_rows, num_tokens), generator=generator, dtype=torch.int64
    )
    writer = engine.open_kv(segment.key, positions)
    if writer is None:
        return False
    for layer in range(layout.num_layers):
        target = writer.layer(layer)
        target.copy_(torch.randn(target.shape, generator=generator))
    return writer.finish() > 0


def holds_random(engine: SegmentEngine, segment: SegmentId, num_tokens: int, seed: int = 0) -> bool:
    """Whether host memory has what `put_random` stored, bit by bit."""
    generator = torch.Generator().manual_seed(seed)
    layout = engine._layout
    found = engine.get(segment)
    if found is None or found.info.num_tokens != num_tokens:
        return False
    with found:
        if segment.kind == "encoder":
            shape = (num_tokens, layout.encoder_width)
            rows = torch.randn(shape, generator=generator).to(layout.encoder_dtype)
            return torch.equal(torch.cat(tuple(found.rows())), rows)
        positions = torch.randint(
            0, 1000, (layout.positions_rows, num_tokens), generator=generator, dtype=torch.int64
        )
        assert found.info.positions is not None
        is_equal = torch.equal(found.info.positions, positions)
        for layer in range(layout.num_layers):
            pair = found.pair(layer)
            is_equal &= torch.equal(
                pair, torch.randn(pair.shape, generator=generator).to(pair.dtype)
            )
        return is_equal


Fetch = Literal["hit", "miss", "skipped", "failed", "late"]


def fetch(
    engine: SegmentEngine, segment: SegmentId, num_tokens: int, seconds: float = 10.0
) -> Fetch:
    """Look for a segment, and load it if it is there, as the scheduler side has it done."""
    until = time.monotonic() + seconds
    engine.look_up([Lookup(segment.key, [segment], num_tokens)])
    answers = wait_for(engine.take_looked_up, until)
    if not answers:
        return "late"
    [answer] = answers
    if segment.key not in answer.tiers:
        return answer.no_answer or "miss"
    engine.load(segment, num_tokens, until)
    ended = wait_for(engine.take_loaded, until)
    if not ended:
        return "late"
    [loaded] = ended
    return "hit" if loaded.is_here else "failed"


def wait_for(take: Callable[[], list[T]], until: float) -> list[T]:
    """What `take` returns as soon as that is anything; nothing if it takes too long."""
    while not (taken := take()) and time.monotonic() < until:
        time.sleep(0.002)
    return taken

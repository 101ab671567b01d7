"""Segment capture against writes of which the test keeps its own account."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import CacheConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from tests.helpers.stored import make_engine
from tests.helpers.unordered_device import Device
from vlcache_connector.attention import hook
from vlcache_connector.protocol import CapturePlan, Item, RequestContext, Span, StepPlan
from vlcache_connector.storage.engine import SegmentEngine
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.streams import Side
from vlcache_connector.support import KVShape
from vlcache_connector.worker.capture import SegmentCapture
from vlcache_connector.worker.encoder import EncoderRows
from vlcache_connector.worker.pace import Pace
from vlcache_connector.worker.storage import Storage
from vlcache_connector.worker.worker import WorkerSide

LAYERS = ["layers.0.attn", "layers.1.attn", "layers.2.attn"]
SHAPE = KVShape(
    num_layers=len(LAYERS), num_kv_heads=2, head_dim=4, dtype=torch.float32, block_size=4
)


_stores: dict[KVShape, SegmentEngine] = {}


def make_store(shape: KVShape, side: Side | None = None) -> SegmentEngine:
    """A store of 1 MiB."""
    return make_engine(shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.dtype, side=side)


def store_of(shape: KVShape) -> SegmentEngine:
    """One store for all tests."""
    if shape not in _stores:
        _stores[shape] = make_store(shape)
    return _stores[shape]


@pytest.fixture(autouse=True)
def _nothing_is_left_half_written() -> Iterator[None]:
    yield
    for store in _stores.values():
        abandon(store)


def abandon(store: SegmentEngine) -> None:
    for writing in list(store._writing.values()):
        store._give_back(writing)


def make_capture(shape: KVShape = SHAPE) -> SegmentCapture:
    abandon(store_of(shape))  # what the example before did not end
    return SegmentCapture(LAYERS, shape, torch.device("cpu"), store_of(shape).open_kv)


def expect(
    capture: SegmentCapture, name: str, item: int, *, num_tokens: int, offset: int, slots: Tensor
) -> None:
    positions = torch.arange(num_tokens)[None]
    capture.expect(name, item, f"{name}/{item}", positions, offset=offset, slots=slots)


def stored(
    capture: SegmentCapture, name: str, item: int, shape: KVShape = SHAPE
) -> list[Tensor] | None:
    """K and V [2, n, kv_heads, head_dim] per layer as the store has them; None if it has not."""
    captured = capture.finish(name, item)
    if captured is None:
        return None
    store = store_of(shape)
    if not captured.writer.finish(captured.valid):
        return None
    with store.get(SegmentId(f"{name}/{item}", "kv")) as segment:
        return [torch.stack(segment.layer(layer)) for layer in range(shape.num_layers)]


@pytest.fixture(autouse=True, scope="module")
def stores_are_closed() -> Iterator[None]:
    yield
    for store in _stores.values():
        store.close()
    _stores.clear()


def values_of(layer: int, rows: list[tuple[int, int]], shape: KVShape = SHAPE) -> Tensor:
    """K and V [2, n, kv_heads, head_dim] that tell layer, request, token, head and entry apart."""
    size = shape.num_kv_heads * shape.head_dim
    row = torch.tensor([100_000 * layer + 1000 * name + token for name, token in rows])
    phase = 0.7 * size * row.double()[:, None] + torch.arange(size)
    kv = torch.stack([phase.sin(), phase.cos()])
    return kv.view(2, -1, shape.num_kv_heads, shape.head_dim).to(shape.dtype)


@dataclass
class Pass:
    """What one forward writes: (request, token, slot) rows, in the order of the batch."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, name: int, span: Span, slots: list[int]) -> None:
        self.rows += [(name, span.start + i, slot) for i, slot in enumerate(slots)]

    def write(self, capture: SegmentCapture, shape: KVShape = SHAPE) -> None:
        slots = torch.tensor([slot for _, _, slot in self.rows], dtype=torch.int64)
        rows = [(name, token) for name, token, _ in self.rows]
        for index, layer in enumerate(LAYERS):
            key, value = values_of(index, rows, shape)
            capture.on_kv_write(layer, key, value, slots)
        capture.end_pass()


def assert_captured(
    capture: SegmentCapture, name: int, item: int, span: Span, shape: KVShape = SHAPE
) -> None:
    layers = stored(capture, str(name), item, shape)
    assert layers is not None
    assert len(layers) == len(LAYERS)
    for index, kv in enumerate(layers):
        rows = [(name, token) for token in range(span.start, span.end)]
        assert torch.equal(kv, values_of(index, rows, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_segment_that_is_written_at_once_is_captured_bit_by_bit(dtype: torch.dtype) -> None:
    shape = replace(SHAPE, dtype=dtype)
    capture, written = make_capture(shape), Pass()
    slots = [9, 10, 11, 4, 5]
    expect(capture, "7", 0, num_tokens=5, offset=0, slots=torch.tensor(slots))
    written.add(7, Span(30, 35), slots)
    written.write(capture, shape)
    assert_captured(capture, 7, 0, Span(30, 35), shape)
    assert len(capture) == 0


@dataclass(frozen=True)
class Step:
    """A pass of a random schedule: which tokens of which request it writes, and what besides."""

    parts: tuple[tuple[int, Span], ...]
    padding: int


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[tuple[int, int], Span], list[Step], random.Random]:
    """Items of several requests, written chunk by chunk together with the text between them."""
    items: dict[tuple[int, int], Span] = {}
    chunks: list[list[tuple[int, Span]]] = []
    for name in range(draw(st.integers(1, 3))):
        position = 0
        for index in range(draw(st.integers(0, 3))):
            start = position + draw(st.integers(0, 3))
            position = start + draw(st.integers(1, 8))
            items[name, index] = Span(start, position)
        end = position + draw(st.integers(1, 3))
        cuts = sorted({0, end, *draw(st.lists(st.integers(0, end), max_size=3))})
        chunks.append([(name, Span(*pair)) for pair in pairwise(cuts)])
    steps = []
    for number in range(max(len(own) for own in chunks)):
        parts = [own[number] for own in chunks if number < len(own)]
        steps.append(Step(tuple(draw(st.permutations(parts))), draw(st.integers(0, 4))))
    return items, steps, draw(st.randoms(use_true_random=False))


@settings(max_examples=40)
@given(schedule=schedules())
def test_rows_scattered_over_passes_and_requests_come_together(
    schedule: tuple[dict[tuple[int, int], Span], list[Step], random.Random],
) -> None:
    items, steps, rng = schedule
    capture = make_capture()
    slots = list(range(200))
    rng.shuffle(slots)
    for step in steps:
        written = Pass()
        for name, chunk in step.parts:
            own = {token: slots.pop() for token in range(chunk.start, chunk.end)}
            written.add(name, chunk, list(own.values()))
            for (owner, index), span in items.items():
                part = span.clip(chunk.start, chunk.end)
                if owner == name and part:
                    wanted = [own[token] for token in range(part.start, part.end)]
                    expect(
                        capture,
                        str(name),
                        index,
                        num_tokens=len(span),
                        offset=part.start - span.start,
                        slots=torch.tensor(wanted),
                    )
        written.rows += [(99, 0, -1)] * step.padding
        rng.shuffle(written.rows)
        written.write(capture)
    assert len(capture) == len(items)
    for (name, index), span in items.items():
        assert_captured(capture, name, index, span)


def test_padding_and_slots_that_are_written_twice_do_no_harm() -> None:
    capture, written = make_capture(), Pass()
    expect(capture, "1", 0, num_tokens=3, offset=0, slots=torch.tensor([6, 2, 7]))
    written.add(5, Span(0, 3), [3, 3, -1])
    written.add(1, Span(10, 13), [6, 2, 7])
    written.add(5, Span(3, 7), [-1, 3, 0, -1])
    written.write(capture)
    assert_captured(capture, 1, 0, Span(10, 13))


def test_rows_behind_the_slots_are_padding() -> None:
    capture = make_capture()
    expect(capture, "1", 0, num_tokens=2, offset=0, slots=torch.tensor([5, 4]))
    for index, layer in enumerate(LAYERS):
        key, value = values_of(index, [(1, 0), (1, 1), (1, 2), (1, 3)])
        capture.on_kv_write(layer, key, value, torch.tensor([4, 5]))
    capture.end_pass()
    layers = stored(capture, "1", 0)
    assert layers is not None
    for index, kv in enumerate(layers):
        assert torch.equal(kv, values_of(index, [(1, 1), (1, 0)]))


def test_an_item_in_two_parts_of_one_pass_comes_together() -> None:
    capture, written = make_capture(), Pass()
    expect(capture, "1", 2, num_tokens=4, offset=2, slots=torch.tensor([1, 0]))
    expect(capture, "1", 2, num_tokens=4, offset=0, slots=torch.tensor([8, 9]))
    written.add(1, Span(20, 24), [8, 9, 1, 0])
    written.write(capture)
    assert_captured(capture, 1, 2, Span(20, 24))


def test_keys_that_are_views_with_gaps_are_captured() -> None:
    capture = make_capture()
    expect(capture, "1", 0, num_tokens=2, offset=0, slots=torch.tensor([4, 5]))
    for index, layer in enumerate(LAYERS):
        fused = torch.cat(list(values_of(index, [(1, 0), (1, 1)])), dim=-1)
        key, value = fused.chunk(2, dim=-1)
        assert not key.is_contiguous()
        capture.on_kv_write(layer, key, value, torch.tensor([4, 5]))
    capture.end_pass()
    assert_captured(capture, 1, 0, Span(0, 2))


@settings(max_examples=40)
@given(
    span=st.integers(1, 8).map(lambda n: Span(40, 40 + n)),
    others=st.lists(st.integers(0, 6), min_size=len(LAYERS), max_size=len(LAYERS)),
    rng=st.randoms(use_true_random=False),
)
def test_a_segment_is_captured_while_other_rows_leave_from_layer_to_layer(
    span: Span, others: list[int], rng: random.Random
) -> None:
    capture = make_capture()
    slots = rng.sample(range(50), len(span) + max(others))
    own, rest = slots[: len(span)], slots[len(span) :]
    expect(capture, "7", 0, num_tokens=len(span), offset=0, slots=torch.tensor(own))
    for index, (layer, count) in enumerate(zip(LAYERS, sorted(others, reverse=True), strict=True)):
        rows = [(7, span.start + i, slot) for i, slot in enumerate(own)]
        rows += [(5, i, slot) for i, slot in enumerate(rest[:count])]
        rng.shuffle(rows)
        key, value = values_of(index, [(name, token) for name, token, _ in rows])
        capture.rows_change()
        capture.on_kv_write(layer, key, value, torch.tensor([slot for _, _, slot in rows]))
    capture.end_pass()
    assert_captured(capture, 7, 0, span)


def test_a_slot_that_is_missing_after_rows_change_spoils_the_segment() -> None:
    capture = make_capture()
    expect(capture, "1", 0, num_tokens=2, offset=0, slots=torch.tensor([3, 9]))
    for index, (layer, slots) in enumerate(zip(LAYERS, [[3, 9], [3, 9], [3]], strict=True)):
        key, value = values_of(index, [(1, token) for token in range(len(slots))])
        capture.rows_change()
        capture.on_kv_write(layer, key, value, torch.tensor(slots))
    capture.end_pass()
    assert stored(capture, "1", 0) is None


def test_a_pass_that_ends_before_the_last_layer_spoils_the_segment() -> None:
    capture = make_capture()
    expect(capture, "1", 0, num_tokens=1, offset=0, slots=torch.tensor([3]))
    for index, layer in enumerate(LAYERS[:-1]):
        key, value = values_of(index, [(1, 0)])
        capture.rows_change()
        capture.on_kv_write(layer, key, value, torch.tensor([3]))
    capture.end_pass()
    assert capture.finish("1", 0) is None


def test_rows_may_change_while_nothing_is_expected() -> None:
    capture = make_capture()
    capture.rows_change()
    assert not capture.is_armed


def test_a_capture_is_armed_from_expect_until_the_pass_ends() -> None:
    capture = make_capture()
    assert not capture.is_armed
    expect(capture, "1", 0, num_tokens=2, offset=0, slots=torch.tensor([0]))
    assert capture.is_armed
    capture.end_pass()
    assert not capture.is_armed


def test_writes_that_nobody_expects_are_ignored() -> None:
    capture, written = make_capture(), Pass()
    written.add(1, Span(0, 4), [0, 1, 2, 3])
    written.write(capture)
    assert len(capture) == 0


def test_writes_that_pass_unseen_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """As those that a CUDA graph replays, or a fused kernel does."""
    capture = make_capture()
    with caplog.at_level("WARNING", logger="vlcache_connector.worker.capture"):
        for item in range(2):
            expect(capture, "unseen", item, num_tokens=2, offset=0, slots=torch.tensor([0, 1]))
            capture.end_pass()
            assert capture.finish("unseen", item) is None
        written = Pass()
        expect(capture, "1", 0, num_tokens=2, offset=0, slots=torch.tensor([0, 1]))
        written.add(1, Span(3, 5), [0, 1])
        written.write(capture)
    [record] = caplog.records
    assert "not stored" in record.getMessage()
    assert_captured(capture, 1, 0, Span(3, 5))


def test_writes_of_other_layers_are_ignored() -> None:
    capture, written = make_capture(), Pass()
    expect(capture, "1", 0, num_tokens=2, offset=0, slots=torch.tensor([0, 1]))
    capture.on_kv_write(
        "draft.attn", torch.ones(2, 2, 4), torch.ones(2, 2, 4), torch.tensor([0, 1])
    )
    written.add(1, Span(3, 5), [0, 1])
    written.write(capture)
    assert_captured(capture, 1, 0, Span(3, 5))


def test_slots_that_are_used_again_in_a_later_pass_are_not_taken_again() -> None:
    capture = make_capture()
    expect(capture, "1", 0, num_tokens=4, offset=0, slots=torch.tensor([0, 1]))
    first, second = Pass(), Pass()
    first.add(1, Span(0, 2), [0, 1])
    first.write(capture)
    expect(capture, "1", 0, num_tokens=4, offset=2, slots=torch.tensor([2, 3]))
    second.add(1, Span(2, 4), [2, 3])
    second.add(8, Span(0, 2), [0, 1])
    second.write(capture)
    assert_captured(capture, 1, 0, Span(0, 4))


def test_a_captured_segment_is_a_copy() -> None:
    capture = make_capture()
    expect(capture, "1", 0, num_tokens=1, offset=0, slots=torch.tensor([3]))
    key, value = values_of(0, [(1, 0)])
    written = key.clone()
    for layer in LAYERS:
        capture.on_kv_write(layer, key, value, torch.tensor([3]))
    capture.end_pass()
    key.zero_()
    layers = stored(capture, "1", 0)
    assert layers is not None
    assert torch.equal(layers[0][0], written)


def test_cancelling_a_request_gives_up_all_its_items_and_no_others() -> None:
    capture, written = make_capture(), Pass()
    for name, item, slot in (("1", 0, 0), ("1", 1, 1), ("11", 0, 2)):
        expect(capture, name, item, num_tokens=1, offset=0, slots=torch.tensor([slot]))
    before = store_of(SHAPE).bytes_used
    capture.cancel("1")
    assert len(capture) == 1
    assert store_of(SHAPE).bytes_used < before
    written.add(1, Span(0, 2), [0, 1])
    written.add(11, Span(5, 6), [2])
    written.write(capture)
    assert_captured(capture, 11, 0, Span(5, 6))
    assert capture.finish("1", 0) is None


def test_a_slot_that_is_not_written_spoils_the_segment() -> None:
    capture, written = make_capture(), Pass()
    expect(capture, "1", 0, num_tokens=2, offset=0, slots=torch.tensor([3, 9]))
    written.add(1, Span(0, 2), [3, 8])
    written.write(capture)
    assert stored(capture, "1", 0) is None


def test_a_cancelled_item_can_be_captured_anew() -> None:
    capture, first, second = make_capture(), Pass(), Pass()
    expect(capture, "1", 0, num_tokens=3, offset=0, slots=torch.tensor([0, 1]))
    first.add(1, Span(100, 102), [0, 1])
    first.write(capture)
    capture.cancel("1")
    expect(capture, "1", 0, num_tokens=3, offset=0, slots=torch.tensor([5, 6, 7]))
    second.add(1, Span(0, 3), [5, 6, 7])
    second.write(capture)
    assert_captured(capture, 1, 0, Span(0, 3))


def test_cancelling_an_unknown_request_does_nothing() -> None:
    capture = make_capture()
    capture.cancel("nobody")
    assert len(capture) == 0


def test_keys_of_another_shape_are_refused() -> None:
    capture = make_capture()
    expect(capture, "1", 0, num_tokens=2, offset=0, slots=torch.tensor([0, 1]))
    with pytest.raises((RuntimeError, ValueError)):
        capture.on_kv_write(
            LAYERS[0], torch.ones(2, 2, 8), torch.ones(2, 2, 8), torch.tensor([0, 1])
        )


class BrokenSide(Device):
    def copy(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no copies any more")


def test_rows_that_could_not_leave_are_not_taken_for_captured() -> None:
    capture = SegmentCapture(
        LAYERS, SHAPE, torch.device("cpu"), store_of(SHAPE).open_kv, BrokenSide(0)
    )
    expect(capture, "1", 0, num_tokens=2, offset=0, slots=torch.tensor([0, 1]))
    written = Pass()
    written.add(1, Span(0, 2), [0, 1])
    with pytest.raises(RuntimeError, match="no copies"):
        written.write(capture)
    assert not capture.is_armed
    assert stored(capture, "1", 0) is None


@pytest.mark.parametrize("seed", range(5))
def test_rows_leave_on_the_side_stream(seed: int) -> None:
    device = Device(seed)
    with contextlib.closing(make_store(SHAPE, device)) as store:
        capture = SegmentCapture(LAYERS, SHAPE, torch.device("cpu"), store.open_kv, device)
        for offset in (0, 2):
            slots = [9 - offset, 1 + offset]
            expect(capture, "1", 0, num_tokens=4, offset=offset, slots=torch.tensor(slots))
            written = Pass()
            written.add(1, Span(offset, offset + 2), slots)
            written.write(capture)
        captured = capture.finish("1", 0)
        assert captured is not None
        assert captured.writer.finish(captured.valid) > 0
        with store.get(SegmentId("1/0", "kv")) as segment:
            for layer in range(len(LAYERS)):
                found = torch.stack(segment.layer(layer))
                assert torch.equal(found, values_of(layer, [(1, token) for token in range(4)]))


WORKER_SHAPE = KVShape(
    num_layers=len(LAYERS), num_kv_heads=2, head_dim=32, dtype=torch.float32, block_size=32
)


@pytest.fixture
def store() -> SegmentEngine:
    return store_of(WORKER_SHAPE)


@pytest.fixture
def worker(tiny_model: Callable[..., Path], store: SegmentEngine) -> Iterator[WorkerSide]:
    """A worker side over attention layers without a model: it can capture, but not compute."""
    shape = WORKER_SHAPE
    hook.install()
    config = VllmConfig(
        model_config=ModelConfig(model=str(tiny_model()), dtype="float32", max_model_len=512),
        cache_config=CacheConfig(block_size=shape.block_size),
    )
    with set_current_vllm_config(config):
        layers = {
            name: Attention(
                shape.num_kv_heads,
                shape.head_dim,
                1.0,
                num_kv_heads=shape.num_kv_heads,
                cache_config=config.cache_config,
                prefix=name,
            )
            for name in LAYERS
        }
    model: Any = SimpleNamespace(
        layers=layers,
        layer_names=LAYERS,
        rotary=None,
        positions=lambda token_ids, features: torch.arange(len(token_ids))[None],
    )
    group = KVCacheGroupSpec(LAYERS, layers[LAYERS[0]].get_kv_cache_spec(config))
    storage = Storage(store, shape.num_layers)
    side = WorkerSide(
        model,
        shape,
        storage,
        EncoderRows(storage, torch.device("cpu")),
        rank=0,
        pace=Pace(),
        vllm_config=config,
        kv_cache_config=KVCacheConfig(4, [], [group]),
        device=torch.device("cpu"),
    )
    yield side
    side.close()


@pytest.mark.skipif(not current_platform.is_cpu(), reason="float32 KV on the CPU backend")
@pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")
@pytest.mark.parametrize("failing", [None, 0, 1])
def test_a_segment_is_stored_only_if_all_its_chunks_were_captured(
    worker: WorkerSide,
    store: SegmentEngine,
    monkeypatch: pytest.MonkeyPatch,
    failing: int | None,
) -> None:
    item = Item(index=0, span=Span(2, 6), ordinal=0, key="key", encoder_key="rows")
    worker.begin_step(StepPlan(contexts=[RequestContext("1", list(range(8)), (item,), [])]))
    stored = 0
    for number, chunk in enumerate([Span(2, 4), Span(4, 6)]):
        with monkeypatch.context() as patched:
            if number == failing:
                # No argument fits: every call raises.
                patched.setattr(SegmentCapture, "on_kv_write", lambda: None)
            worker.expect_captures([CapturePlan("1", 0, "key", chunk, (0,))])
            rows = [(1, token) for token in range(chunk.start, chunk.end)]
            for index, layer in enumerate(LAYERS):
                key, value = values_of(index, rows, WORKER_SHAPE)
                worker.on_kv_write(layer, key, value, torch.arange(chunk.start, chunk.end))
            worker.end_step(2)
        report = worker.take_report(is_idle=False)
        stored += 0 if report is None else report.stored.get("key", 0)
    assert stored == (failing is None)
    assert store.contains(SegmentId("key", "kv")) == (failing is None)

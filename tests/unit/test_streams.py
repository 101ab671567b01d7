"""The order of copies and reads: right on a device that runs its streams as it likes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.stored import make_engine
from tests.helpers.unordered_device import Device
from vlcache_connector import streams
from vlcache_connector.rope import RotarySpec
from vlcache_connector.storage.engine import SegmentEngine
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.segment import Segment, SegmentInfo
from vlcache_connector.streams import Leaving, Outbox, Ring, StagedSegment, upload
from vlcache_connector.support import KVShape
from vlcache_connector.worker import loader
from vlcache_connector.worker.device import DeviceSegments
from vlcache_connector.worker.injection import PlacedSegment, write_by_vllm
from vlcache_connector.worker.loader import LoadedPlan, Loader
from vlcache_connector.worker.storage import Storage

CPU = torch.device("cpu")
# LMCache's logging sets off a deprecation inside OpenTelemetry.
logging_sets_off_a_warning = pytest.mark.filterwarnings(
    "ignore:`LoggingHandler`:DeprecationWarning"
)
SPEC = RotarySpec(torch.tensor([1.0, 0.3, 0.1, 0.03]), 8, 8, is_neox=True)
ROW_BYTES = 2 * 2 * 8 * 4


def make_segment(number: int, num_layers: int, tokens: int) -> Segment:
    """K and V of values that no other segment has, in two objects."""
    kv = torch.arange(num_layers * 2 * tokens * 16, dtype=torch.float32) + 1e5 * number
    kv = kv.view(num_layers, 2, tokens, 2, 8)
    info = SegmentInfo(SegmentId(str(number), "kv"), tokens, None)
    return Segment(info, [kv[:1], kv[1:]], lambda _: None)


def read_through(
    device: Device, ring: Ring, segments: list[Segment], num_layers: int, *, stop: int
) -> list[tuple[Tensor, Tensor]]:
    """Read all layers before `stop` as an injection does; what was read and should have been."""
    pairs = [[segment.pair(layer) for layer in range(num_layers)] for segment in segments]
    staged = ring.start(pairs)
    read = []
    for layer in range(stop):
        for index, segment in enumerate(segments):
            for found, expected in zip(
                StagedSegment(staged, index, segment).layer(layer),
                segment.layer(layer),
                strict=True,
            ):
                result = torch.empty_like(expected)
                device.run(lambda to=result, found=found: to.copy_(found))
                read.append((result, expected))
        staged.written(layer)
        staged.written(layer)  # as often as a layer is asked for
    staged.close()
    return read


def is_right(read: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(result, expected) for result, expected in read)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_GROUP_BYTES", 3000)


loads = st.lists(
    st.tuples(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(0, 7)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 30), loads=loads, ring_rows=st.integers(1, 200))
def test_every_layer_is_read_as_it_is_stored(
    seed: int, loads: list[tuple[list[int], int]], ring_rows: int
) -> None:
    """Loads follow each other in one ring; some end before all layers were read."""
    num_layers, number, read = 7, 0, []
    device = Device(seed)
    ring = Ring(device, CPU, ring_rows * ROW_BYTES)
    for tokens, stop in loads:
        segments = [
            make_segment(number + index, num_layers, count) for index, count in enumerate(tokens)
        ]
        number += len(segments)
        read += read_through(device, ring, segments, num_layers, stop=stop)
    device.drain()
    assert is_right(read)


def test_where_streams_do_not_wait_the_bytes_are_wrong() -> None:
    """So the test above can fail."""
    wrong = 0
    for seed in range(20):
        device = Device(seed, is_deaf=True)
        ring = Ring(device, CPU, 14 * ROW_BYTES)
        segments = [make_segment(seed, 7, 6)]
        read = read_through(device, ring, segments, 7, stop=7)
        device.drain()
        wrong += not is_right(read)
    assert wrong > 10


def test_layers_come_through_the_ring_ahead_of_their_turn() -> None:
    device = Device(0)
    segment = make_segment(1, 7, 16)
    staged = Ring(device, CPU, 3 * 16 * ROW_BYTES).start([[segment.pair(i) for i in range(7)]])
    assert [staged.get(0, layer) is not None for layer in range(7)] == [True] * 3 + [False] * 4
    staged.written(0)
    assert [staged.get(0, layer) is not None for layer in range(7)] == [
        *[False],
        *[True] * 3,
        *[False] * 3,
    ]
    staged.close()
    device.drain()


def test_what_does_not_fit_twice_is_read_from_the_host() -> None:
    device = Device(0)
    small, large = make_segment(1, 7, 2), make_segment(2, 7, 50)
    staged = Ring(device, CPU, 60 * ROW_BYTES).start(
        [[segment.pair(i) for i in range(7)] for segment in (large, small)]
    )
    assert staged.get(0, 0) is None
    assert staged.get(1, 0) is not None
    assert StagedSegment(staged, 0, large).layer(3)[0].data_ptr() == large.layer(3)[0].data_ptr()
    staged.close()
    device.drain()


def test_a_device_without_room_for_the_ring_is_one_line_and_no_ring(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    device = Device(0)
    storage: Any = SimpleNamespace(side=device, leaving=Leaving(device, CPU))
    shape = KVShape(7, 2, 8, torch.float32, block_size=16)
    nobody: Any = None
    made = Loader(storage, nobody, nobody, shape, CPU, write_by_vllm, nobody)
    entries = []
    for number in range(2):
        segment = make_segment(number, 7, 2)
        placed = PlacedSegment(segment, SPEC, torch.arange(2), None)
        entries.append(LoadedPlan(nobody, {0: segment}, {0: placed}))
    with monkeypatch.context() as patched, caplog.at_level("WARNING", logger=loader.__name__):
        patched.setattr(torch, "empty", no_room)
        for entry in entries:
            made.stage([entry])
            made.finish([])
    assert [type(entry.placed[0].segment) for entry in entries] == [Segment, Segment]
    [line] = [record.getMessage() for record in caplog.records]
    assert "Lower --gpu-memory-utilization" in line
    device.drain()


def test_a_load_reads_through_the_ring() -> None:
    device = Device(0)
    storage: Any = SimpleNamespace(side=device, leaving=Leaving(device, CPU))
    shape = KVShape(7, 2, 8, torch.float32, block_size=16)
    nobody: Any = None
    made = Loader(storage, nobody, nobody, shape, CPU, write_by_vllm, nobody)
    released: list[int] = []
    segment = make_segment(1, 7, 2)
    segment._on_release = lambda _: released.append(1)
    placed = PlacedSegment(segment, SPEC, torch.arange(2), None)
    entry = LoadedPlan(nobody, {0: segment}, {0: placed})
    made.stage([entry])
    key, _ = entry.placed[0].kv(6, slice(0, 2))
    found = torch.zeros_like(key)
    device.run(lambda: found.copy_(key))
    expected = segment.layer(6)[0].clone()
    made.finish([entry])
    device.drain()
    assert torch.equal(found, expected)
    assert key.data_ptr() != segment.layer(6)[0].data_ptr()
    storage.leaving.poll()
    assert released == [1]


@pytest.mark.parametrize("seed", range(10))
def test_memory_is_given_back_when_both_streams_are_done_with_it(seed: int) -> None:
    device, released = Device(seed), []
    leaving = Leaving(device, CPU)
    done = {"main": False, "side": torch.zeros(1)}
    device.copy([(done["side"], torch.ones(1))])
    device.run(lambda: done.update(main=True))

    def release() -> None:
        released.append((done["main"], bool(done["side"])))

    leaving.add(release)
    while not released:
        leaving.poll()
        device.step()
    leaving.close()
    assert released == [(True, True)]


def test_close_waits_for_what_is_still_read() -> None:
    device, released = Device(3), []
    leaving = Leaving(device, CPU)
    copied = torch.zeros(1)
    device.copy([(copied, torch.ones(1))])
    leaving.add(lambda: released.append(bool(copied)))
    leaving.close()
    assert released == [True]


def test_without_a_side_stream_memory_is_given_back_at_once() -> None:
    released: list[int] = []
    Leaving(None, CPU).add(lambda: released.append(1))
    assert released == [1]


@pytest.mark.parametrize("seed", range(20))
def test_a_segment_is_read_from_the_device_tier_only_when_it_is_there(seed: int) -> None:
    device = Device(seed)
    tier = DeviceSegments(1 << 20, CPU, device, Leaving(device, CPU))
    segment = make_segment(1, 7, 5)
    expected = [segment.pair(layer).clone() for layer in range(7)]
    promoted = tier.promote(segment, 7)
    again = tier.get("1")
    assert again is not None
    read = []
    for opened in (promoted, again):
        for layer in range(7):
            found, result = opened.pair(layer), torch.empty_like(expected[layer])
            device.run(lambda to=result, found=found: to.copy_(found))
            read.append((result, expected[layer]))
    device.drain()
    assert is_right(read)


# -- what leaves the device -----------------------------------------------------------------

OUTBOX_ROWS = 16


def send(device: Device, outbox: Outbox, target: Tensor, source: Tensor) -> None:
    """Send what the model's stream has yet to write."""

    def fill(view: Tensor, rows: slice) -> None:
        device.run(lambda: view.copy_(source[:, rows]))

    outbox.send(target, fill)


def send_all(
    device: Device, sizes: list[int], flushes: list[bool], num_rows: int
) -> list[tuple[Tensor, Tensor]]:
    """Send tensors of as many rows; what arrived and should have."""
    outbox = Outbox(device, CPU, num_rows * ROW_BYTES)
    sent = []
    for number, (size, flush) in enumerate(zip(sizes, flushes, strict=False)):
        # Every other one is a part of a longer segment, as chunks of a prefill are.
        source = make_segment(number, 1, size).pair(0)
        target = torch.zeros(2, size + number % 2, 2, 8)[:, :size]
        send(device, outbox, target, source)
        sent.append((target, source))
        if flush:
            outbox.flush()
    outbox.flush()
    device.drain()
    return sent


@settings(max_examples=150)
@given(
    seed=st.integers(0, 1 << 30),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    flushes=st.lists(st.booleans(), min_size=20, max_size=20),
    num_rows=st.integers(8, 100),
)
def test_all_that_is_sent_arrives(
    seed: int, sizes: list[int], flushes: list[bool], num_rows: int
) -> None:
    assert is_right(send_all(Device(seed), sizes, flushes, num_rows))


def test_where_streams_do_not_wait_what_is_sent_is_wrong() -> None:
    """So the test above can fail."""
    sizes, flushes = [5] * 20, [True] * 20
    wrong = sum(
        not is_right(send_all(Device(seed, is_deaf=True), sizes, flushes, 8)) for seed in range(20)
    )
    assert wrong > 10


def test_rows_that_no_slot_can_hold_are_refused() -> None:
    outbox = Outbox(Device(0), CPU, 8 * ROW_BYTES)
    with pytest.raises(ValueError, match="slots have"):
        outbox.send(torch.zeros(2, 1, 64, 64), lambda view, rows: None)


def test_small_tensors_leave_together() -> None:
    device = Device(0)
    outbox = Outbox(device, CPU, 4 * 100 * ROW_BYTES)
    for number in range(10):
        source = make_segment(number, 1, 5).pair(0)
        send(device, outbox, torch.zeros_like(source), source)
    assert not device.num_copies
    outbox.flush()
    assert device.num_copies == 1
    device.drain()


@pytest.fixture
def make_store() -> Iterator[Callable[[Device], SegmentEngine]]:
    with contextlib.ExitStack() as stores:

        def make(device: Device) -> SegmentEngine:
            store = make_engine(7, 2, 8, side=device)
            stores.callback(store.close)
            return store

        yield make


def put(store: SegmentEngine, device: Device, key: str, *, valid: bool = True) -> list[Any]:
    """Store what the model's stream has yet to write; what it will have written."""
    written = make_segment(3, 7, 5)
    writer = store.open_kv(key, torch.arange(5)[None])
    assert writer is not None
    is_valid = torch.tensor(not valid)
    outbox = Outbox(device, CPU, OUTBOX_ROWS * ROW_BYTES)
    for layer in range(7):
        send(device, outbox, writer.layer(layer), written.pair(layer))
    outbox.flush()
    device.run(lambda: is_valid.fill_(valid))
    assert writer.finish(is_valid) > 0
    return [written.layer(layer) for layer in range(7)]


@logging_sets_off_a_warning
@pytest.mark.parametrize("seed", range(10))
def test_a_segment_can_be_opened_while_it_is_on_its_way(
    make_store: Callable[[Device], SegmentEngine], seed: int
) -> None:
    device = Device(seed)
    store = make_store(device)
    expected = put(store, device, "key")
    assert store.contains(SegmentId("key", "kv"))
    with store.get(SegmentId("key", "kv")) as segment:
        for layer in range(7):
            for found, part in zip(segment.layer(layer), expected[layer], strict=True):
                assert torch.equal(found, part)
    assert store.settle() == [(SegmentId("key", "kv"), True)]
    assert store.settle() == []
    store.check_integrity()


@logging_sets_off_a_warning
def test_what_turns_out_not_to_be_valid_is_not_stored(
    make_store: Callable[[Device], SegmentEngine],
) -> None:
    device = Device(1)
    store = make_store(device)
    put(store, device, "key", valid=False)
    assert store.settle(waits=True) == [(SegmentId("key", "kv"), False)]
    assert not store.contains(SegmentId("key", "kv"))
    assert store.get(SegmentId("key", "kv")) is None
    assert store.bytes_used == 0


@logging_sets_off_a_warning
def test_what_is_removed_on_its_way_keeps_its_memory_until_it_has_arrived(
    make_store: Callable[[Device], SegmentEngine],
) -> None:
    device = Device(1)
    store = make_store(device)
    put(store, device, "key")
    store.remove(SegmentId("key", "kv"))
    assert not store.contains(SegmentId("key", "kv"))
    assert store.bytes_used > 0
    assert store.settle(waits=True) == []
    assert store.bytes_used == 0
    store.check_integrity()


@logging_sets_off_a_warning
def test_what_is_abandoned_keeps_its_memory_until_nothing_is_copied_to_it(
    make_store: Callable[[Device], SegmentEngine],
) -> None:
    device = Device(1)
    store = make_store(device)
    writer = store.open_kv("key", torch.arange(5)[None])
    assert writer is not None
    source, target = torch.ones(2, 5, 2, 8), writer.layer(0)
    device.copy([(target, source)])
    writer.abandon()
    writer.abandon()
    assert store.bytes_used > 0
    assert store.settle(waits=True) == []
    assert torch.equal(target, source)
    assert store.bytes_used == 0
    assert store.get(SegmentId("key", "kv")) is None
    store.check_integrity()


@logging_sets_off_a_warning
def test_the_scheduler_side_is_told_of_what_is_not_stored_after_all(
    make_store: Callable[[Device], SegmentEngine],
) -> None:
    device = Device(1)
    store = make_store(device)
    storage = Storage(store, 7, side=device)
    put(store, device, "good")
    put(store, device, "bad", valid=False)
    assert storage.flush(1.0)
    assert storage.settle() == [SegmentId("bad", "kv")]
    assert storage.settle() == []


def test_upload_on_a_cpu_copies_nothing() -> None:
    tensor = torch.arange(3)
    assert upload(tensor, CPU) is tensor

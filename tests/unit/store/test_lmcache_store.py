"""The segment store over a real LMCache: exact contents, exact accounting, no eviction."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.helpers.stored import put_kv
from tests.helpers.unordered_device import Device
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.store import LMCacheSegmentStore, lmcache_store
from vlcache_connector.store.lmcache_pool import PAGE_BYTES

LAYERS, HEADS, DIM = 5, 2, 8
LAYER_BYTES_PER_TOKEN = 2 * HEADS * DIM * 4
MIB = 1 << 20

# LMCache's logging sets off a deprecation inside OpenTelemetry.
pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")

Layers = list[tuple[Tensor, Tensor]]
MakeStore = Callable[..., LMCacheSegmentStore]


@pytest.fixture
def make_store() -> Iterator[MakeStore]:
    stores: list[LMCacheSegmentStore] = []

    def make(budget_bytes: int = MIB, **options: object) -> LMCacheSegmentStore:
        settings = {"num_kv_heads": HEADS, "head_dim": DIM, "kv_dtype": torch.float32} | options
        store = LMCacheSegmentStore("org/model", "print", 0, 1, budget_bytes, LAYERS, **settings)
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


def test_its_threads_use_the_device_of_their_rank(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's default is device 0, where the first call would take memory of a context."""
    used: dict[str, int] = {}
    for name, value in {
        "is_available": lambda: True,
        "current_device_index": lambda: 3,
        "set_device_index": lambda index: used.update({threading.current_thread().name: index}),
    }.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    device = Device(0)
    store = make_store(side=device)
    assert put(store, "key", 4) > 0
    device.drain()
    assert store.settle(waits=True) == [(SegmentId("key", "kv"), True)]
    assert used == {"vlcache-store-start": 3, "vlcache-seal_0": 3}


def kv(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layers:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, 2, num_tokens, HEADS, DIM)
    return [(k, v) for k, v in torch.randn(shape, generator=generator).to(dtype)]


def positions(num_tokens: int, rows: int = 3) -> Tensor:
    return torch.arange(rows * num_tokens).view(rows, num_tokens)


def put(store: LMCacheSegmentStore, key: str, num_tokens: int, seed: int = 0) -> int:
    return put_kv(store, key, positions(num_tokens), kv(num_tokens, seed))


def assert_stored(store: LMCacheSegmentStore, key: str, num_tokens: int, seed: int = 0) -> None:
    segment = store.get(SegmentId(key, "kv"))
    assert segment is not None
    with segment:
        for layer, (k, v) in enumerate(kv(num_tokens, seed)):
            stored_k, stored_v = segment.layer(layer)
            assert torch.equal(stored_k, k)
            assert torch.equal(stored_v, v)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_comes_back_bit_equal(
    make_store: MakeStore, num_groups: int, dtype: torch.dtype
) -> None:
    per_layer = 64 * LAYER_BYTES_PER_TOKEN * dtype.itemsize // 4
    limit = -(-LAYERS // num_groups) * per_layer + 2048
    store = make_store(kv_dtype=dtype, max_object_bytes=max(limit, PAGE_BYTES))
    layers = kv(64, dtype=dtype)
    strided = [(k, v.transpose(0, 1).contiguous().transpose(0, 1)) for k, v in layers]
    stored = put_kv(store, "image", positions(64), strided)
    assert stored == store.usage().bytes_used == store.kv_bytes(64)
    with store.get(SegmentId("image", "kv")) as segment:
        assert segment.info.id == SegmentId("image", "kv")
        assert segment.info.num_tokens == 64
        assert torch.equal(segment.info.positions, positions(64))
        for layer, (k, v) in enumerate(layers):
            assert torch.equal(segment.layer(layer)[0], k)
            assert torch.equal(segment.layer(layer)[1], v)
        for absent in (-1, LAYERS):
            with pytest.raises(IndexError, match="no layer"):
                segment.layer(absent)
        store.check_integrity()
    with pytest.raises(RuntimeError, match="released"):
        segment.layer(0)
    segment.release()
    store.check_integrity()
    assert len(list(store._pool._held)) == num_groups


@pytest.mark.parametrize("num_objects", [1, 4])
def test_encoder_rows_come_back_bit_equal(make_store: MakeStore, num_objects: int) -> None:
    rows = torch.randn(400, 64).to(torch.bfloat16)
    store = make_store(max_object_bytes=rows.nbytes // num_objects + 600)
    assert store.put_encoder("image", rows) > 0
    assert len(store._pool._held) == num_objects
    with store.get(SegmentId("image", "encoder")) as segment:
        parts = segment.rows()
        assert len(parts) == num_objects
        assert torch.equal(torch.cat(parts), rows)
        assert segment.info.num_tokens == 400
        assert segment.info.positions is None
        with pytest.raises(RuntimeError, match="kind 'encoder'"):
            segment.layer(0)
    store.check_integrity()


def test_kinds_and_keys_do_not_meet(make_store: MakeStore) -> None:
    store = make_store()
    put(store, "image", 16)
    assert store.contains(SegmentId("image", "kv"))
    for key, kind in (("image", "encoder"), ("other", "kv")):
        assert not store.contains(SegmentId(key, kind))
        assert store.get(SegmentId(key, kind)) is None
        store.remove(SegmentId(key, kind))
    assert sum(store.counters.refused.values()) == 0
    assert_stored(store, "image", 16)


def test_a_put_replaces(make_store: MakeStore) -> None:
    store = make_store()
    put(store, "image", 64, seed=1)
    stored = put(store, "image", 16, seed=2)
    assert store.usage().bytes_used == stored
    assert store.usage().num_segments == 1
    assert_stored(store, "image", 16, seed=2)
    store.check_integrity()


def test_out_of_room_leaves_nothing_and_evicts_nothing(make_store: MakeStore) -> None:
    store = make_store(budget_bytes=MIB, max_object_bytes=200_000)
    sizes = {}
    while stored := put(store, f"image{len(sizes)}", 500, seed=len(sizes)):
        sizes[f"image{len(sizes)}"] = stored
    full = store.usage()
    assert full.bytes_used == sum(sizes.values()) <= full.bytes_budget == MIB
    assert full.bytes_budget - full.bytes_used < sizes["image0"]
    for _ in range(3):
        assert put(store, "one too many", 500) == 0
        assert store.put_encoder("one too many", torch.zeros(MIB)[None]) == 0
    assert store.usage() == full
    assert not store.contains(SegmentId("one too many", "kv"))
    assert store.get(SegmentId("one too many", "kv")) is None
    assert store.counters.put_failed == 7
    for seed, key in enumerate(sizes):
        assert_stored(store, key, 500, seed)
    store.check_integrity()

    store.remove(SegmentId("image1", "kv"))
    assert store.usage().bytes_used == full.bytes_used - sizes["image1"]
    assert put(store, "one too many", 500, seed=9) == sizes["image1"]
    assert_stored(store, "one too many", 500, seed=9)
    store.check_integrity()


def test_lmcache_itself_can_evict_nothing(make_store: MakeStore) -> None:
    from lmcache.v1.memory_management import MemoryFormat

    store = make_store()
    put(store, "image", 100)
    manager = store._pool._manager
    shape = torch.Size([MIB - PAGE_BYTES])
    args = {"fmt": MemoryFormat.EC_TD, "eviction": True, "busy_loop": False}
    assert manager.allocate(shape, torch.uint8, **args) is None
    manager.clear()
    assert_stored(store, "image", 100)
    store.check_integrity()


def test_a_failed_allocation_does_not_wait(make_store: MakeStore) -> None:
    store = make_store()
    put(store, "image", 500)
    start = time.monotonic()
    assert put(store, "too large", 5000) == 0
    assert time.monotonic() - start < 15  # by default it would wait for ever


def test_smaller_objects_go_where_large_ones_do_not_fit(make_store: MakeStore) -> None:
    store = make_store(budget_bytes=MIB)
    count = 0
    while put(store, f"small{count}", 100, seed=count):
        count += 1
    for index in range(0, count, 2):
        store.remove(SegmentId(f"small{index}", "kv"))
    whole = store.kv_bytes(300)
    assert put(store, "large", 300, seed=99) >= whole
    assert_stored(store, "large", 300, seed=99)
    for index in range(1, count, 2):
        assert_stored(store, f"small{index}", 100, seed=index)
    store.check_integrity()


def test_a_segment_of_too_large_layers_is_not_stored(make_store: MakeStore) -> None:
    store = make_store(max_object_bytes=10_000)
    assert put(store, "image", 100) == 0
    assert store.counters.put_failed == 1
    assert store.kv_bytes(100) >= LAYERS * 100 * LAYER_BYTES_PER_TOKEN


def test_a_reader_keeps_the_memory_of_a_removed_segment(make_store: MakeStore) -> None:
    store = make_store(budget_bytes=MIB)
    stored = put(store, "image", 1000, seed=1)
    segment = store.get(SegmentId("image", "kv"))
    store.remove(SegmentId("image", "kv"))
    assert not store.contains(SegmentId("image", "kv"))
    assert (store.usage().bytes_used, store.usage().num_segments) == (stored, 0)
    assert put(store, "other", 1000) == 0
    assert torch.equal(segment.layer(4)[1], kv(1000, seed=1)[4][1])
    store.check_integrity()
    segment.release()
    assert store.usage().bytes_used == 0
    assert put(store, "other", 1000) == stored


def test_colliding_ids_are_refused(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_store, "object_id", lambda segment, group: group)
    store = make_store()
    put(store, "mine", 16)
    assert store.get(SegmentId("other", "kv")) is None
    assert store.get(SegmentId("mine", "encoder")) is None
    assert store.counters.refused["identity"] == 2
    assert put(store, "other", 16) == 0
    store.remove(SegmentId("other", "kv"))
    assert_stored(store, "mine", 16)
    store.check_integrity()


@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_refused_and_found(make_store: MakeStore, verify: bool) -> None:
    store = make_store(verify=verify, max_object_bytes=20_000)
    put(store, "image", 100)
    (*_, last) = store._pool._held.values()
    last.tensor[-1] ^= 1
    if verify:
        assert store.get(SegmentId("image", "kv")) is None
        assert store.counters.refused["checksum"] == 1
        assert store.usage().num_segments == 1
    with pytest.raises(AssertionError, match=r"'image'.*damaged"):
        store.check_integrity()
    store.remove(SegmentId("image", "kv"))
    store.check_integrity()


def test_objects_of_different_segments_are_not_mixed(make_store: MakeStore) -> None:
    store = make_store(max_object_bytes=20_000)
    put(store, "image", 100)
    first, second, *_ = store._pool._held.values()
    second.tensor.copy_(first.tensor)
    assert store.get(SegmentId("image", "kv")) is None
    assert store.counters.refused["shape"] == 1
    with pytest.raises(AssertionError, match="does not continue"):
        store.check_integrity()


def test_check_integrity_finds_what_lmcache_lost_and_what_was_leaked(
    make_store: MakeStore,
) -> None:
    store = make_store()
    put(store, "image", 10)
    (leaked,) = store._pool.allocate([100])
    with pytest.raises(AssertionError, match="bytes taken"):
        store.check_integrity()
    leaked.ref_count_down()
    store.check_integrity()
    (obj,) = store._pool._held.values()
    obj.ref_count_up()
    with pytest.raises(AssertionError, match="references"):
        store.check_integrity()
    obj.ref_count_down()
    store._pool._manager.local_cpu_backend.hot_cache.clear()
    with pytest.raises(AssertionError, match="keys"):
        store.check_integrity()


def test_a_copy_that_fails_leaves_nothing(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()

    def fail(*_: object) -> None:
        raise OSError("device lost")

    monkeypatch.setattr(lmcache_store.codec, "seal", fail)
    with pytest.raises(OSError, match="device lost"):
        put(store, "image", 10)
    assert store.usage().bytes_used == 0
    assert not store.contains(SegmentId("image", "kv"))


def test_random_operations_keep_the_books(make_store: MakeStore) -> None:
    rng = random.Random(0)
    store = make_store(budget_bytes=MIB, max_object_bytes=100_000)
    expected: dict[str, tuple[int, int, int]] = {}
    reading = []
    for step in range(120):
        key = f"image{rng.randrange(8)}"
        action = rng.choice(["put", "put", "get", "remove", "release"])
        if action == "put":
            num_tokens = rng.randrange(1, 700)
            expected.pop(key, None)
            if stored := put(store, key, num_tokens, seed=step):
                expected[key] = (num_tokens, step, stored)
        elif action == "get":
            segment = store.get(SegmentId(key, "kv"))
            assert (segment is None) == (key not in expected)
            if segment is not None:
                num_tokens, seed, _ = expected[key]
                reading.append((segment, kv(num_tokens, seed)[-1][1]))
        elif action == "remove":
            store.remove(SegmentId(key, "kv"))
            expected.pop(key, None)
        elif reading:
            reading.pop(rng.randrange(len(reading)))[0].release()
        for segment, last_v in reading:
            assert torch.equal(segment.layer(LAYERS - 1)[1], last_v)
        store.check_integrity()
        assert store.usage().num_segments == len(expected)
        assert store.usage().bytes_used >= sum(stored for *_, stored in expected.values())
    assert store.counters.put_failed > 0
    for segment, _ in reading:
        segment.release()
    for key, (num_tokens, seed, _) in expected.items():
        assert_stored(store, key, num_tokens, seed)
    store.clear()
    assert (store.usage().bytes_used, store.usage().num_segments) == (0, 0)
    store.check_integrity()


def test_close_ends_threads_and_handles(make_store: MakeStore) -> None:
    before = set(threading.enumerate())
    store = make_store()
    started = set(threading.enumerate()) - before
    assert started
    assert all(thread.daemon for thread in started)  # a forgotten close must not hang the process
    put(store, "image", 10)
    segment = store.get(SegmentId("image", "kv"))
    store.close()
    store.close()
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(RuntimeError, match="released"):
        segment.layer(0)
    assert not store.contains(SegmentId("image", "kv"))
    for use in (lambda: put(store, "image", 10), lambda: store.get(SegmentId("image", "kv"))):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_the_environment_is_left_as_it_was(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    make_store()
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    assert os.environ["LMCACHE_TRACK_USAGE"] == "false"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("budget", [0, -1, 1.5, True])
def test_budget_is_validated(make_store: MakeStore, budget: object) -> None:
    with pytest.raises(ValueError, match=r"cpu_bytes must be a positive number of bytes, got"):
        make_store(budget_bytes=budget)


def test_other_settings_are_validated(make_store: MakeStore) -> None:
    for size in (0, lmcache_store.MAX_OBJECT_BYTES + 1):
        with pytest.raises(ValueError, match="max_object_bytes must be"):
            make_store(max_object_bytes=size)
    with pytest.raises(ValueError, match="cannot be stored"):
        make_store(kv_dtype=torch.int64)
    with pytest.raises(MemoryError, match="cpu_bytes"):
        make_store(budget_bytes=1 << 60)


def test_wrong_tensors_are_a_callers_error(make_store: MakeStore) -> None:
    store = make_store()
    with pytest.raises(ValueError, match="positions are"):
        store.open_kv("image", positions(10, rows=2))
    with pytest.raises(ValueError, match="encoder rows are"):
        store.put_encoder("image", torch.zeros(0, 4))
    assert store.counters.put_failed == 0

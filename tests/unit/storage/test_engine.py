"""Host memory over a real LMCache: exact contents, exact accounting, no eviction."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.helpers.stored import MIB, make_engine, put_kv
from tests.helpers.unordered_device import Device
from vlcache_connector.storage import engine as module
from vlcache_connector.storage.engine import Loaded, SegmentEngine
from vlcache_connector.storage.header import SegmentId

LAYERS, HEADS, DIM = 5, 2, 8
LAYER_BYTES_PER_TOKEN = 2 * HEADS * DIM * 4

# LMCache's logging sets off a deprecation inside OpenTelemetry.
pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")

Layers = list[tuple[Tensor, Tensor]]
MakeEngine = Callable[..., SegmentEngine]


@pytest.fixture(scope="module")
def closing() -> Iterator[Executor]:
    """Closes engines meanwhile: LMCache's threads take a second to end."""
    with ThreadPoolExecutor(16) as threads:
        yield threads


@pytest.fixture
def make(closing: Executor) -> Iterator[MakeEngine]:
    engines: list[SegmentEngine] = []

    def made(num_bytes: int = MIB, **options: object) -> SegmentEngine:
        engines.append(make_engine(LAYERS, HEADS, DIM, num_bytes=num_bytes, **options))
        return engines[-1]

    yield made
    for engine in engines:
        closing.submit(engine.close)


def test_its_threads_use_the_device_of_their_rank(
    make: MakeEngine, monkeypatch: pytest.MonkeyPatch
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
    engine = make(side=device)
    assert put(engine, "key", 4) > 0
    device.drain()
    assert engine.settle(waits=True) == [(SegmentId("key", "kv"), True)]
    assert used == {"vlcache-seal_0": 3}


def kv(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layers:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, 2, num_tokens, HEADS, DIM)
    return [(k, v) for k, v in torch.randn(shape, generator=generator).to(dtype)]


def positions(num_tokens: int, rows: int = 3) -> Tensor:
    return torch.arange(rows * num_tokens).view(rows, num_tokens)


def put(engine: SegmentEngine, key: str, num_tokens: int, seed: int = 0) -> int:
    return put_kv(engine, key, positions(num_tokens), kv(num_tokens, seed))


def assert_stored(engine: SegmentEngine, key: str, num_tokens: int, seed: int = 0) -> None:
    segment = engine.get(SegmentId(key, "kv"))
    assert segment is not None
    with segment:
        for layer, (k, v) in enumerate(kv(num_tokens, seed)):
            stored_k, stored_v = segment.layer(layer)
            assert torch.equal(stored_k, k)
            assert torch.equal(stored_v, v)


def num_objects(engine: SegmentEngine) -> int:
    return sum(len(resident.objects.keys) for resident in engine._resident.values())


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_comes_back_bit_equal(make: MakeEngine, num_groups: int, dtype: torch.dtype) -> None:
    per_layer = 64 * LAYER_BYTES_PER_TOKEN * dtype.itemsize // 4
    limit = -(-LAYERS // num_groups) * per_layer + 2048
    engine = make(kv_dtype=dtype, max_object_bytes=limit)
    layers = kv(64, dtype=dtype)
    strided = [(k, v.transpose(0, 1).contiguous().transpose(0, 1)) for k, v in layers]
    stored = put_kv(engine, "image", positions(64), strided)
    assert 0 < stored <= engine.bytes_used
    with engine.get(SegmentId("image", "kv")) as segment:
        assert segment.info.id == SegmentId("image", "kv")
        assert segment.info.num_tokens == 64
        assert torch.equal(segment.info.positions, positions(64))
        for layer, (k, v) in enumerate(layers):
            assert torch.equal(segment.layer(layer)[0], k)
            assert torch.equal(segment.layer(layer)[1], v)
        for absent in (-1, LAYERS):
            with pytest.raises(IndexError, match="no layer"):
                segment.layer(absent)
        engine.check_integrity()
    with pytest.raises(RuntimeError, match="released"):
        segment.layer(0)
    segment.release()
    engine.check_integrity()
    assert num_objects(engine) == num_groups


@pytest.mark.parametrize("count", [1, 4])
def test_encoder_rows_come_back_bit_equal(make: MakeEngine, count: int) -> None:
    rows = torch.randn(400, 64).to(torch.bfloat16)
    engine = make(max_object_bytes=rows.nbytes // count + 600)
    assert engine.put_encoder("image", rows) > 0
    assert num_objects(engine) == count
    with engine.get(SegmentId("image", "encoder")) as segment:
        parts = segment.rows()
        assert len(parts) == count
        assert torch.equal(torch.cat(tuple(parts)), rows)
        assert segment.info.num_tokens == 400
        assert segment.info.positions is None
        with pytest.raises(RuntimeError, match="kind 'encoder'"):
            segment.layer(0)
    engine.check_integrity()


def test_kinds_and_keys_do_not_meet(make: MakeEngine) -> None:
    engine = make()
    put(engine, "image", 16)
    assert engine.contains(SegmentId("image", "kv"))
    for key, kind in (("image", "encoder"), ("other", "kv")):
        assert not engine.contains(SegmentId(key, kind))
        assert engine.get(SegmentId(key, kind)) is None
        engine.remove(SegmentId(key, kind))
    assert_stored(engine, "image", 16)


def test_a_put_replaces(make: MakeEngine) -> None:
    engine = make()
    put(engine, "image", 64, seed=1)
    put(engine, "image", 16, seed=2)
    assert_stored(engine, "image", 16, seed=2)
    engine.remove(SegmentId("image", "kv"))
    assert engine.bytes_used == 0
    engine.check_integrity()


def test_out_of_room_leaves_nothing_and_evicts_nothing(make: MakeEngine) -> None:
    engine = make(max_object_bytes=200_000)
    count = 0
    while put(engine, f"image{count}", 500, seed=count):
        count += 1
    assert count
    full = engine.bytes_used
    assert full <= MIB
    for _ in range(3):
        assert put(engine, "one too many", 500) == 0
        assert engine.put_encoder("one too many", torch.zeros(MIB)[None]) == 0
    assert engine.bytes_used == full
    assert not engine.contains(SegmentId("one too many", "kv"))
    assert engine.get(SegmentId("one too many", "kv")) is None
    for seed in range(count):
        assert_stored(engine, f"image{seed}", 500, seed)
    engine.check_integrity()

    engine.remove(SegmentId("image1", "kv"))
    assert engine.bytes_used < full
    assert put(engine, "one too many", 500, seed=9)
    assert engine.bytes_used == full
    assert_stored(engine, "one too many", 500, seed=9)
    engine.check_integrity()


def test_a_segment_that_no_object_can_hold_is_not_stored(
    make: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlcache_connector.storage.layout.LARGEST_OBJECT", 10_000)
    engine = make()
    assert put(engine, "image", 100) == 0
    assert engine.bytes_used == 0
    engine.load(SegmentId("image", "kv"), 100, float("inf"))
    assert engine.take_loaded() == [Loaded(SegmentId("image", "kv"), is_here=False)]
    assert put(engine, "small", 10)


def test_layers_larger_than_objects_should_be_are_objects_of_their_own(make: MakeEngine) -> None:
    engine = make(max_object_bytes=100 * LAYER_BYTES_PER_TOKEN // 2)
    assert put(engine, "image", 100)
    assert num_objects(engine) == LAYERS
    assert_stored(engine, "image", 100)


def test_a_reader_keeps_the_memory_of_a_removed_segment(make: MakeEngine) -> None:
    engine = make()
    put(engine, "image", 1000, seed=1)
    used = engine.bytes_used
    segment = engine.get(SegmentId("image", "kv"))
    engine.remove(SegmentId("image", "kv"))
    assert not engine.contains(SegmentId("image", "kv"))
    assert engine.bytes_used == used
    assert put(engine, "other", 1000) == 0
    assert put(engine, "image", 10) == 0  # its name is in use
    assert torch.equal(segment.layer(4)[1], kv(1000, seed=1)[4][1])
    engine.check_integrity()
    segment.release()
    assert put(engine, "other", 1000)
    assert engine.bytes_used == used
    engine.check_integrity()


def test_what_was_removed_and_is_still_read_is_here_when_it_is_to_be_loaded(
    make: MakeEngine,
) -> None:
    engine = make()
    put(engine, "image", 10)
    segment = engine.get(SegmentId("image", "kv"))
    engine.remove(SegmentId("image", "kv"))
    engine.load(SegmentId("image", "kv"), 10, float("inf"))
    assert engine.take_loaded() == [Loaded(SegmentId("image", "kv"), is_here=True)]
    segment.release()
    assert_stored(engine, "image", 10)
    engine.check_integrity()


def test_what_is_removed_before_its_load_begins_is_not_loaded(make: MakeEngine) -> None:
    engine = make()
    engine.load(SegmentId("image", "kv"), 10, float("inf"))
    engine.remove(SegmentId("image", "kv"))
    assert engine.take_loaded() == [Loaded(SegmentId("image", "kv"), is_here=False)]
    assert not engine.is_busy


def test_two_writers_of_one_segment_do_not_meet(make: MakeEngine) -> None:
    engine = make()
    writer = engine.open_kv("image", positions(10))
    assert writer is not None
    assert engine.open_kv("image", positions(10)) is None
    engine.check_integrity()
    writer.abandon()
    assert put(engine, "image", 10)
    assert_stored(engine, "image", 10)


def test_damage_is_found(make: MakeEngine) -> None:
    engine = make(max_object_bytes=20_000)
    put(engine, "image", 100)
    [resident] = engine._resident.values()
    resident.buffers[-1][-1] ^= 1
    with pytest.raises(AssertionError, match=r"'image'.*damaged"):
        engine.check_integrity()
    engine.remove(SegmentId("image", "kv"))
    engine.check_integrity()


def test_check_integrity_finds_what_lmcache_lost_and_what_was_leaked(make: MakeEngine) -> None:
    engine = make()
    put(engine, "image", 10)
    [resident] = engine._resident.values()
    handle = engine._lmcache.submit_prefetch_task(module._task(resident.objects))
    assert engine._lmcache.query_prefetch_status(handle) is not None
    with pytest.raises(AssertionError, match="locked"):
        engine.check_integrity()
    engine._lmcache.finish_read_prefetched(list(resident.objects.keys))
    engine.check_integrity()
    resident.readers += 1
    with pytest.raises(AssertionError, match="readers"):
        engine.check_integrity()
    resident.readers -= 1
    engine._lmcache.delete_l1_keys(list(resident.objects.keys))
    with pytest.raises(AssertionError, match="LMCache has 0 objects"):
        engine.check_integrity()


def test_a_copy_that_fails_leaves_nothing(
    make: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()

    def fail(*_: object) -> None:
        raise OSError("device lost")

    monkeypatch.setattr(module.codec, "seal", fail)
    with pytest.raises(OSError, match="device lost"):
        put(engine, "image", 10)
    assert engine.bytes_used == 0
    assert not engine.contains(SegmentId("image", "kv"))
    engine.check_integrity()


def test_random_operations_keep_the_books(make: MakeEngine) -> None:
    rng = random.Random(0)
    engine = make(max_object_bytes=100_000)
    expected: dict[str, tuple[int, int]] = {}
    reading = []
    failed = 0
    for step in range(120):
        key = f"image{rng.randrange(8)}"
        action = rng.choice(["put", "put", "get", "remove", "release"])
        if action == "put":
            num_tokens = rng.randrange(1, 700)
            expected.pop(key, None)
            if put(engine, key, num_tokens, seed=step):
                expected[key] = (num_tokens, step)
            else:
                failed += 1
        elif action == "get":
            segment = engine.get(SegmentId(key, "kv"))
            assert (segment is None) == (key not in expected)
            if segment is not None:
                num_tokens, seed = expected[key]
                reading.append((segment, kv(num_tokens, seed)[-1][1]))
        elif action == "remove":
            engine.remove(SegmentId(key, "kv"))
            expected.pop(key, None)
        elif reading:
            reading.pop(rng.randrange(len(reading)))[0].release()
        for segment, last_v in reading:
            assert torch.equal(segment.layer(LAYERS - 1)[1], last_v)
        engine.check_integrity()
        assert {key for key, _ in engine._resident} == expected.keys()
    assert failed
    for segment, _ in reading:
        segment.release()
    for key, (num_tokens, seed) in expected.items():
        assert_stored(engine, key, num_tokens, seed)
    engine.clear()
    assert engine.bytes_used == 0
    engine.check_integrity()


def test_close_ends_threads_and_handles(make: MakeEngine) -> None:
    before = set(threading.enumerate())
    engine = make()
    started = set(threading.enumerate()) - before
    assert started
    assert all(thread.daemon for thread in started)  # a forgotten close must not hang the process
    put(engine, "image", 10)
    segment = engine.get(SegmentId("image", "kv"))
    engine.close()
    engine.close()
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(RuntimeError, match="released"):
        segment.layer(0)
    assert not engine.contains(SegmentId("image", "kv"))
    assert engine.get(SegmentId("image", "kv")) is None
    with pytest.raises(RuntimeError, match="closed"):
        put(engine, "image", 10)


def test_the_environment_is_left_as_it_was(
    make: MakeEngine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    make()
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    assert os.environ["LMCACHE_TRACK_USAGE"] == "false"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("budget", [0, -1, 1.5, True])
def test_budget_is_validated(make: MakeEngine, budget: int) -> None:
    with pytest.raises(ValueError, match=r"cpu_bytes must be a positive number of bytes, got"):
        make(num_bytes=budget)


def test_other_settings_are_validated(make: MakeEngine) -> None:
    with pytest.raises(MemoryError, match="cpu_bytes"):
        make(num_bytes=1 << 60)


def test_wrong_tensors_are_a_callers_error(make: MakeEngine) -> None:
    engine = make()
    with pytest.raises(ValueError, match="positions are"):
        engine.open_kv("image", positions(10, rows=2))
    with pytest.raises(ValueError, match="encoder rows are"):
        engine.put_encoder("image", torch.zeros(0, 4))
    with pytest.raises(ValueError, match="cannot be stored"):
        engine.put_encoder("image", torch.zeros(1, 4, dtype=torch.int64))


def test_what_a_worker_imports_at_its_start_does_not_import_lmcache() -> None:
    """vLLM looks at all modules then, and can't look at those of llvmlite."""
    code = "import sys, vlcache_connector.worker.rank; sys.exit('lmcache' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

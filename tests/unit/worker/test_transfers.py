"""Fetches and writes of one rank, between a real store and real tiers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.helpers.stored import put_kv
from vlcache_connector.protocol import Fetched, FetchPlan, TierState
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.store import LMCacheSegmentStore
from vlcache_connector.tiers import (
    CircuitBreaker,
    Deadline,
    DiskTier,
    GuardedTier,
    Name,
    TierError,
)
from vlcache_connector.tiers.guarded import TransferTime
from vlcache_connector.worker.pace import Pace
from vlcache_connector.worker.transfers import Transfers

LAYERS, HEADS, DIM, TOKENS = 3, 2, 8, 16
MIB = 1 << 20

pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")


@pytest.fixture
def make_store() -> Iterator[Callable[..., LMCacheSegmentStore]]:
    stores: list[LMCacheSegmentStore] = []

    def make(fingerprint: str = "print", budget: int = MIB) -> LMCacheSegmentStore:
        store = LMCacheSegmentStore(
            "model",
            fingerprint,
            0,
            1,
            budget,
            LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            kv_dtype=torch.float32,
            verify=False,
        )
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


class SlowDisk(DiskTier):
    """Waits for a gate before it writes."""

    gate: threading.Event

    def write(self, name: Name, objects: Sequence[object], deadline: Deadline) -> None:
        self.gate.wait(30)
        super().write(name, objects, deadline)  # type: ignore[arg-type]


def disk(path: Path, tier: type[DiskTier] = DiskTier, speed: int | None = None) -> GuardedTier:
    path.mkdir(exist_ok=True)
    time_ = TransferTime(0.0 if speed else None, speed)
    return GuardedTier(tier(path, "test", 64 * MIB, None), CircuitBreaker("disk"), read_time=time_)


def transfers(
    store: LMCacheSegmentStore,
    *tiers: GuardedTier,
    queue_bytes: int = MIB,
    pace: Pace | None = None,
    read_seconds: float = 20.0,
) -> Transfers:
    return Transfers(
        store,
        tiers,
        rank=0,
        num_ranks=1,
        read_seconds=read_seconds,
        queue_bytes=queue_bytes,
        pace=pace,
    )


def put(store: LMCacheSegmentStore, key: str, seed: int = 0) -> torch.Tensor:
    kv = torch.randn(LAYERS, 2, TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    assert put_kv(store, key, torch.arange(3 * TOKENS).view(3, TOKENS), [(k, v) for k, v in kv])
    return kv


def fetch(
    moving: Transfers,
    *keys: str,
    max_bytes: int = MIB,
    saved_tokens: int = 8,
    num_tokens: int = TOKENS,
) -> Fetched:
    moving.fetch(FetchPlan(keys, "kv", max_bytes, saved_tokens, num_tokens))
    [(name, ended)] = moving.take_ended(wait_seconds=20.0)
    assert name == keys[0]
    return ended


def test_what_one_store_wrote_another_gets_bit_by_bit(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path
) -> None:
    first = make_store()
    kv = put(first, "a/0")
    writing = transfers(first, disk(tmp_path))
    writing.write(SegmentId("a/0", "kv"))
    assert writing.flush(20.0)
    first.check_integrity()  # nothing is held any more
    writing.close()

    second = make_store()
    reading = transfers(second, disk(tmp_path))
    ended = fetch(reading, "a/1", "a/0")
    assert (ended.key, ended.tier, ended.ranks) == ("a/0", "disk", 1)
    assert not second.contains(SegmentId("a/0", "kv"))  # nobody has admitted it
    reading.admit("a/1")
    with second.get(SegmentId("a/0", "kv")) as segment:  # type: ignore[union-attr]
        for layer in range(LAYERS):
            assert torch.equal(segment.layer(layer)[0], kv[layer, 0])
            assert torch.equal(segment.layer(layer)[1], kv[layer, 1])
    reading.close()


def test_a_miss_is_an_answer(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path
) -> None:
    moving = transfers(make_store(), disk(tmp_path))
    assert fetch(moving, "a/0") == Fetched(1, None, None, 0)
    moving.admit("a/0")
    moving.discard("a/0")
    moving.close()


@pytest.mark.parametrize("change", ["model", "damage", "size"])
def test_what_is_not_what_it_says_is_refused(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path, change: str
) -> None:
    first = make_store()
    put(first, "a/0")
    writing = transfers(first, disk(tmp_path))
    writing.write(SegmentId("a/0", "kv"))
    assert writing.flush(20.0)
    writing.close()
    if change == "damage":
        [path] = [
            path
            for path in tmp_path.rglob("*")
            if path.is_file() and path.stat().st_size > MIB // 100
        ]
        with path.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 255]))
    reading = transfers(make_store("other" if change == "model" else "print"), disk(tmp_path))
    ended = fetch(reading, "a/0", max_bytes=100 if change == "size" else MIB)
    assert (ended.key, ended.tier, ended.no_answer) == (None, "disk", "failed")
    event = {
        "model": "disk.read.refused_identity",
        "damage": "disk.read.refused_checksum",
        "size": "disk.read.damaged",
    }[change]
    assert reading.take_events()[event] == 1
    assert fetch(reading, "a/0").key is None  # it was thrown away
    reading.close()


def test_what_was_refused_is_not_asked_for_again_until_it_was_stored_anew(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where this server may not remove it."""
    monkeypatch.setattr(GuardedTier, "remove", lambda *_: 0)
    first = make_store()
    put(first, "a/0")
    writing = transfers(first, disk(tmp_path))
    writing.write(SegmentId("a/0", "kv"))
    assert writing.flush(20.0)

    moving = transfers(make_store(), disk(tmp_path))
    assert fetch(moving, "a/0", num_tokens=TOKENS + 1).key is None
    assert moving.take_events()["disk.read.refused_shape"] == 1
    assert fetch(moving, "a/0", num_tokens=TOKENS + 1).key is None
    events = moving.take_events()
    assert events["disk.read.refused_shape"] == events["disk.read.bytes"] == 0

    store = make_store()
    put(store, "a/0")
    own = transfers(store, disk(tmp_path))
    assert fetch(own, "a/0", num_tokens=TOKENS + 1).key is None
    own.write(SegmentId("a/0", "kv"))
    assert own.flush(20.0)
    assert fetch(own, "a/0").key == "a/0"
    for each in (writing, moving, own):
        each.close()


def test_while_the_weights_are_others_nothing_is_read_or_written(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path
) -> None:
    store = make_store()
    put(store, "before/0")
    moving = transfers(store, disk(tmp_path))
    moving.write(SegmentId("before/0", "kv"))
    assert moving.flush(20.0)
    moving.set_open(False)
    put(store, "after/0")
    moving.write(SegmentId("after/0", "kv"))
    assert moving.flush(20.0)
    ended = fetch(moving, "before/0")
    assert (ended.key, ended.no_answer) == (None, "skipped")
    moving.set_open(True)
    assert fetch(moving, "after/0").key is None
    assert fetch(moving, "before/0").key == "before/0"
    moving.close()


def test_serving_never_waits_for_a_tier_and_a_full_queue_drops_the_write(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path
) -> None:
    store = make_store()
    SlowDisk.gate = threading.Event()
    kv_bytes = LAYERS * 2 * TOKENS * HEADS * DIM * 4
    moving = transfers(store, disk(tmp_path, SlowDisk), queue_bytes=2 * kv_bytes + 4096)
    started = time.monotonic()
    for number in range(4):
        put(store, f"{number}/0", number)
        moving.write(SegmentId(f"{number}/0", "kv"))
    assert time.monotonic() - started < 30  # the gate is still closed
    assert not moving.flush(0.1)
    assert moving.take_events()["write.queue_full"] == 2
    # What is being written keeps its memory, also when it is dropped meanwhile.
    store.remove(SegmentId("0/0", "kv"))
    SlowDisk.gate.set()
    assert moving.flush(20.0)
    assert moving.take_events()["disk.write.calls"] == 2
    store.check_integrity()
    assert fetch(moving, "0/0").key == "0/0"
    moving.discard("0/0")
    assert fetch(moving, "3/0").key is None
    moving.close()


def test_a_segment_found_in_a_slow_tier_moves_to_the_faster_ones(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path
) -> None:
    store = make_store()
    put(store, "a/0")
    slow = transfers(store, disk(tmp_path / "slow"))
    slow.write(SegmentId("a/0", "kv"))
    assert slow.flush(20.0)
    slow.close()
    fast, both = disk(tmp_path / "fast"), make_store()
    second = disk(tmp_path / "slow")
    second._tier.name = "redis"
    moving = transfers(both, fast, second)
    assert fetch(moving, "a/0").tier == "redis"
    moving.admit("a/0")
    assert moving.flush(20.0)
    assert fetch(moving, "a/0").tier == "disk"
    moving.close()


@pytest.mark.parametrize(("speed", "is_loaded"), [(10**9, True), (10**3, False), (None, True)])
def test_a_load_that_takes_longer_than_computing_is_not_made(
    make_store: Callable[..., LMCacheSegmentStore],
    tmp_path: Path,
    speed: int | None,
    is_loaded: bool,
) -> None:
    store = make_store()
    put(store, "a/0")
    pace = Pace(pinned=1000.0)
    moving = transfers(store, disk(tmp_path, speed=speed), pace=pace)
    moving.write(SegmentId("a/0", "kv"))
    assert moving.flush(20.0)
    ended = fetch(moving, "a/0", saved_tokens=8)  # 8 ms of computing
    assert (ended.key == "a/0") == is_loaded
    assert ended.tier == "disk"
    assert ended.no_answer == (None if is_loaded else "skipped")
    assert moving.take_events()["disk.read.not_worth"] == (not is_loaded)
    # Encoder rows are not weighed; once in a while, nothing is.
    assert fetch(moving, "a/0", saved_tokens=0).key == "a/0"
    if not is_loaded:
        tries = [fetch(moving, "a/0").key for _ in range(40)]
        assert tries.count("a/0") == 2
    moving.close()


def test_a_read_that_takes_too_long_is_not_begun_again(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path
) -> None:
    class SlowReads(DiskTier):
        count = 0

        def read(self, name: Name, max_bytes: int, deadline: Deadline) -> list[memoryview] | None:
            self.count += 1
            time.sleep(deadline.seconds_left)
            deadline.check()
            return None

    slow = SlowReads(tmp_path, "test", MIB, None)
    store = make_store()
    put(store, "a/0")
    pace = Pace(pinned=1000.0)
    guarded = GuardedTier(slow, CircuitBreaker("disk"))
    moving = transfers(store, guarded, pace=pace, read_seconds=0.2)
    moving.write(SegmentId("a/0", "kv"))
    assert moving.flush(20.0)
    ended = [fetch(moving, "a/0", saved_tokens=8).no_answer for _ in range(4)]
    assert ended == ["failed", "skipped", "skipped", "skipped"]
    assert slow.count == 1
    assert fetch(moving, "a/0", saved_tokens=2000).no_answer == "failed"  # computing takes 2 s
    moving.close()


def test_a_tier_that_gives_no_answer_is_told_from_a_miss(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path
) -> None:
    class BrokenDisk(DiskTier):
        def sizes(self, names: Sequence[Name], deadline: Deadline) -> list[int | None]:
            raise TierError("timeout", "no answer")

    broken = GuardedTier(
        BrokenDisk(tmp_path, "test", MIB, None), CircuitBreaker("disk", failures=2)
    )
    moving = transfers(make_store(), broken)
    ended = [fetch(moving, "a/0") for _ in range(3)]
    assert [(e.tier, e.no_answer) for e in ended] == [
        ("disk", "failed"),
        ("disk", "failed"),
        ("disk", "skipped"),
    ]
    assert moving.tier_states() == {"disk": TierState("open", None, None)}
    moving.close()


def test_the_state_of_a_tier_is_what_loads_are_weighed_by(
    make_store: Callable[..., LMCacheSegmentStore], tmp_path: Path
) -> None:
    moving = transfers(make_store(), disk(tmp_path, speed=4096))
    assert moving.tier_states() == {"disk": TierState("closed", 0.0, 4096.0)}
    moving.close()


def test_pace_is_learned_from_long_steps_only() -> None:
    pace = Pace()
    pace.add(8, 1.0, 1.5)
    assert pace.tokens_per_second is None
    pace.add(200, 1.0, 1.5)
    assert pace.tokens_per_second == 400.0
    pace.add(300, 2.0, 2.5)
    assert pace.tokens_per_second == 440.0
    pinned = Pace(pinned=7.0)
    pinned.add(200, 1.0, 1.5)
    assert pinned.tokens_per_second == 7.0

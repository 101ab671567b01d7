"""The guard around an adapter that does what it is told to, or does not."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.config import (
    L2AdapterConfigBase,
    register_l2_adapter_type,
)
from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory
from lmcache.v1.memory_management import MemoryObj, MemoryObjMetadata, TensorMemoryObj

from vlcache_connector.storage import codec
from vlcache_connector.storage.answers import AnsweringAdapter, Operation
from vlcache_connector.storage.codec import SegmentId
from vlcache_connector.storage.guarded import GuardedAdapter, GuardedConfig
from vlcache_connector.storage.layout import Form, Space
from vlcache_connector.storage.tier import Tier

SPACE = Space("vlcache-model", rank=0, num_ranks=1, max_object_bytes=4096)
FORM = Form("encoder", 7, (1, 333), 7, "float32", positions_rows=0)
"""Of objects of two lengths."""
SECONDS = 20.0


@dataclass
class Server:
    """What adapters of a test speak to.

    Attributes:
        hangs: operations that are answered only when they are not in here any more.
        fails: operations that fail, but for their answer.
        asked: operations and how many objects each was for.
        locked: by key.
    """

    values: dict[ObjectKey, bytes] = field(default_factory=dict)
    hangs: set[str] = field(default_factory=set)
    fails: set[str] = field(default_factory=set)
    is_away: bool = False
    asked: list[tuple[str, int]] = field(default_factory=list)
    locked: Counter[ObjectKey] = field(default_factory=Counter)
    adapters: list[ServerAdapter] = field(default_factory=list)

    def count(self, operation: str) -> int:
        return sum(name == operation for name, _ in self.asked)


class ServerConfig(L2AdapterConfigBase):
    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ServerConfig:
        raise NotImplementedError

    @classmethod
    def help(cls) -> str:
        return "for tests"


class ServerAdapter(AnsweringAdapter):
    """The first writer of an object wins, as with files."""

    def __init__(self, server: Server) -> None:
        if server.is_away:
            raise ConnectionError("nobody there")
        super().__init__()
        self.server = server
        self.closed = threading.Event()
        server.adapters.append(self)

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        def store() -> L2StoreResult:
            if "store" in self.server.fails:
                return L2StoreResult(False, 0)
            new = [pair for pair in zip(keys, objects, strict=True) if pair[0] not in self._values]
            self._values.update((key, bytes(obj.byte_array)) for key, obj in new)
            return L2StoreResult(True, sum(obj.get_size() for _, obj in new))

        return self._begin("store", len(keys), store)

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        def look_up() -> Bitmap:
            if "lookup" in self.server.fails:
                return Bitmap(len(keys))
            found = [key in self._values for key in keys]
            self.server.locked.update(key for key in keys if key in self._values)
            return bitmap(found)

        return self._begin("lookup", len(keys), look_up)

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        def load() -> Bitmap:
            if "load" in self.server.fails:
                return Bitmap(len(keys))
            for key, obj in zip(keys, objects, strict=True):
                value = torch.frombuffer(bytearray(self._values[key]), dtype=torch.uint8)
                obj.tensor.copy_(value)
            return bitmap([True] * len(keys))

        return self._begin("load", len(keys), load)

    def pop_lookup_error(self, task_id: int) -> str | None:
        return "refused" if "lookup" in self.server.fails else None

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        self.server.locked.subtract(keys)

    def delete(self, keys: list[ObjectKey]) -> None:
        self.server.asked.append(("delete", len(keys)))
        while "delete" in self.server.hangs and not self.closed.wait(0.005):
            pass
        for key in keys:
            self._values.pop(key, None)

    def close(self) -> None:
        self.closed.set()

    @property
    def _values(self) -> dict[ObjectKey, bytes]:
        return self.server.values

    def _begin(self, operation: Operation, num_keys: int, work: Callable[[], Any]) -> int:
        self.server.asked.append((operation, num_keys))
        if f"take {operation}" in self.server.fails:
            raise RuntimeError("not today")
        task_id = self._new_id()

        def run() -> None:
            while operation in self.server.hangs and not self.closed.wait(0.005):
                pass
            if not self.closed.is_set():
                self._answer(operation, task_id, work())

        if operation in self.server.hangs:
            threading.Thread(target=run, daemon=True).start()
        else:
            run()
        return task_id


register_l2_adapter_type("test_server", ServerConfig)
register_l2_adapter_factory(
    "test_server",
    lambda config, desc: ServerAdapter(config.server),  # type: ignore[attr-defined]
)


def bitmap(bits: Sequence[bool]) -> Bitmap:
    made = Bitmap(len(bits))
    for index, bit in enumerate(bits):
        if bit:
            made.set(index)
    return made


class Rig:
    """A guarded adapter, as LMCache uses it."""

    def __init__(self, server: Server, tier: Tier | None = None, **options: Any) -> None:
        self.server = server
        self.tier = tier or Tier("x", clock=lambda: self.now)
        self.now = 1000.0
        settings = {"reconnects": True, "lookup_seconds": 0.05, "transfer_seconds": 30.0}
        config = GuardedConfig(ServerConfig(server), tier=self.tier, **(settings | options))
        self.guard = GuardedAdapter(config, None)

    def events(self) -> dict[str, int]:
        """Since the last call, without the tier's name."""
        return {name[2:]: number for name, number in self.tier.take_events().items()}

    def fill(self) -> None:
        """Let the server have `KEYS`."""
        pairs = zip(KEYS, OBJECTS, strict=True)
        self.server.values.update((key, bytes(obj.byte_array)) for key, obj in pairs)

    def store(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2StoreResult:
        return self.stored(self.guard.submit_store_task(keys, objects))

    def stored(self, task_id: int) -> L2StoreResult:
        [(found, result)] = wait(lambda: self.guard.pop_completed_store_tasks().items())
        assert found == task_id
        return result

    def lookup(self, keys: list[ObjectKey]) -> list[int]:
        task_id = self.guard.submit_lookup_and_lock_task(keys, {})
        return wait(lambda: self.guard.query_lookup_and_lock_result(task_id)).get_indices_list()

    def load(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> list[int]:
        task_id = self.guard.submit_load_task(keys, objects)
        found = wait(lambda: self.guard.query_load_result(task_id)).get_indices_list()
        self.guard.submit_unlock(keys)
        return found

    def read(self, keys: list[ObjectKey]) -> bool:
        """What a request does; whether it got everything."""
        found = self.lookup(keys)
        if len(found) < len(keys):
            self.guard.submit_unlock([keys[index] for index in found])
            return False
        return len(self.load(keys, blank(keys))) == len(keys)


def wait(get: Callable[[], Any]) -> Any:
    """The first answer that is one."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        answer = get()
        if answer:
            return answer
        if answer is not None and isinstance(answer, Bitmap):
            return answer
        time.sleep(0.001)
    raise AssertionError("no answer")


def memory(num_bytes: int) -> MemoryObj:
    meta = MemoryObjMetadata(
        shape=torch.Size([num_bytes]),
        dtype=torch.uint8,
        address=0,
        phy_size=num_bytes,
        ref_count=1,
        shapes=[torch.Size([num_bytes])],
        dtypes=[torch.uint8],
    )
    return TensorMemoryObj(torch.zeros(num_bytes, dtype=torch.uint8), meta, None)


def segment(name: str) -> tuple[list[ObjectKey], list[MemoryObj]]:
    """Objects of a segment of its own content."""
    of = SegmentId(name, "encoder")
    headers = SPACE.headers(of, FORM, b"")
    objects = [memory(codec.encoded_size(header)) for header in headers]
    for header, obj in zip(headers, objects, strict=True):
        codec.payload_view(obj.tensor, header).fill_(len(name))
        codec.seal(obj.tensor, header)
    return SPACE.object_keys(of, len(headers), ""), objects


def blank(keys: list[ObjectKey]) -> list[MemoryObj]:
    sizes = SPACE.sizes(SegmentId("any", "encoder"), FORM)
    return [memory(size) for size in sizes[: len(keys)]]


KEYS, OBJECTS = segment("a")
NUM_BYTES = sum(obj.get_size() for obj in OBJECTS)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def make(server: Server) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(tier: Tier | None = None, **options: Any) -> Rig:
        rigs.append(Rig(server, tier, **options))
        return rigs[-1]

    yield make
    server.hangs.clear()
    for rig in rigs:
        rig.guard.close()


@pytest.fixture
def rig(make: Callable[..., Rig]) -> Rig:
    return make()


def test_what_is_read_and_written_is_recorded(rig: Rig) -> None:
    assert len({obj.get_size() for obj in OBJECTS}) == 2
    assert rig.store(KEYS, OBJECTS) == NUM_BYTES
    assert rig.events() == {"write.bytes": NUM_BYTES}
    assert rig.tier.read_time.line() is None
    assert rig.lookup(KEYS) == list(range(len(KEYS)))
    buffers = blank(KEYS)
    assert rig.load(KEYS, buffers) == list(range(len(KEYS)))
    for got, written in zip(buffers, OBJECTS, strict=True):
        assert torch.equal(got.tensor, written.tensor)
    assert rig.events() == {"read.bytes": NUM_BYTES}
    line = rig.tier.read_time.line()
    assert line is not None
    assert 0 < line[0] + line[1] * NUM_BYTES < SECONDS
    assert not +rig.server.locked


def test_only_what_is_not_there_is_stored(rig: Rig) -> None:
    assert rig.store(KEYS[:2], OBJECTS[:2]).is_successful()
    rig.server.asked.clear()
    rest = sum(obj.get_size() for obj in OBJECTS[2:])
    assert rig.store(KEYS, OBJECTS) == rest
    stored = sum(number for name, number in rig.server.asked if name == "store")
    assert stored == len(KEYS) - 2
    rig.events()
    assert rig.store(KEYS, OBJECTS) == 0  # a success
    assert rig.events() == {}
    assert not +rig.server.locked


@pytest.mark.parametrize("damage", ["flipped", "cut short"])
def test_what_could_not_be_loaded_is_replaced(rig: Rig, damage: str) -> None:
    rig.fill()
    values = rig.server.values
    good = dict(values)
    values[KEYS[1]] = values[KEYS[1]][:-1] + bytes([values[KEYS[1]][-1] ^ 1])
    assert rig.lookup(KEYS) == list(range(len(KEYS)))
    rig.events()
    if damage == "flipped":
        assert 1 not in rig.load(KEYS, blank(KEYS))
        counted = rig.events()
        assert (counted["refused.checksum"], counted.get("load.failed")) == (1, None)
    else:
        rig.server.fails.add("load")
        assert rig.load(KEYS, blank(KEYS)) == []
        rig.server.fails.clear()
        assert rig.events() == {"load.failed": len(KEYS)}
    assert rig.tier.read_time.line() is None  # of a whole load only
    assert rig.store(KEYS, OBJECTS).is_successful()
    assert values == good
    assert rig.read(KEYS)
    # That was that: nothing more is replaced.
    rig.events()
    assert rig.store(KEYS, OBJECTS) == 0
    assert rig.server.count("delete") == 1


def test_slow_lookups_leave_it_alone_and_are_late_each(rig: Rig) -> None:
    rig.fill()
    rig.server.hangs.add("lookup")
    for _ in range(4):
        task = rig.guard.submit_lookup_and_lock_task(KEYS, {})
        rig.now += 0.5
        found = wait(lambda task=task: rig.guard.query_lookup_and_lock_result(task))
        assert found.popcount() == 0
    assert rig.tier.state().guard == "open"
    asked = len(rig.server.asked)
    for _ in range(3):
        assert rig.lookup(KEYS) == []
    assert len(rig.server.asked) == asked
    counted = rig.events()
    assert (counted["lookup.late"], counted["lookup.skipped"]) == (4, 3)
    # What they found after all is unlocked.
    rig.server.hangs.clear()
    wait(lambda: not +rig.server.locked or None)


def test_lookups_that_fail_at_once_leave_it_alone(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.fill()
    rig.server.fails.add("lookup")
    for _ in range(4):
        assert rig.tier.state().guard == "closed"
        assert rig.lookup(KEYS) == []
    assert rig.tier.state().guard == "open"
    assert "failures=4/4" in caplog.text
    assert "last_error='refused'" in caplog.text
    # Stores do not depend on what they find.
    assert rig.store(*segment("new")) == NUM_BYTES
    assert rig.tier.stores.state == "closed"


def test_lookups_that_find_nothing_are_no_failures(rig: Rig) -> None:
    for _ in range(10):
        assert rig.lookup(KEYS) == []
    assert rig.tier.state().guard == "closed"
    assert rig.events() == {}


def test_loads_that_fail_leave_it_alone_although_lookups_succeed(rig: Rig) -> None:
    rig.fill()
    rig.server.fails.add("load")
    for _ in range(4):
        assert rig.tier.state().guard == "closed"
        assert rig.lookup(KEYS) == list(range(len(KEYS)))
        assert rig.lookup(KEYS[:1]) == [0]
        assert rig.load(KEYS, blank(KEYS)) == []
    assert rig.tier.state().guard == "open"
    assert rig.lookup(KEYS) == []
    assert rig.events() == {"load.failed": 4 * len(KEYS), "lookup.skipped": 1}


def test_a_probe_closes_it_again(rig: Rig) -> None:
    rig.fill()
    rig.server.fails.add("load")
    while rig.tier.state().guard == "closed":
        assert not rig.read(KEYS)
    rig.now += 1.3
    assert not rig.read(KEYS)
    assert rig.tier.state().guard == "open"
    rig.server.fails.clear()
    asked = len(rig.server.asked)
    assert not rig.read(KEYS)
    assert len(rig.server.asked) == asked
    rig.now += 2.5
    assert rig.read(KEYS)
    assert rig.tier.state().guard == "closed"


def test_a_probe_is_looked_for_twice_and_loaded_once(rig: Rig) -> None:
    rig.fill()
    rig.server.fails.add("load")
    while rig.tier.state().guard == "closed":
        assert not rig.read(KEYS)
    rig.server.fails.clear()
    rig.now += 1.3
    for _ in range(2):  # by the engine, and by LMCache
        assert rig.lookup(KEYS) == list(range(len(KEYS)))
    assert rig.load(KEYS, blank(KEYS)) == list(range(len(KEYS)))
    assert rig.tier.state().guard == "closed"
    assert rig.read(KEYS)


def test_loads_that_hang_leave_it_alone_while_they_hang(rig: Rig) -> None:
    rig.fill()
    rig.server.hangs.add("load")
    buffers = [blank(KEYS) for _ in range(4)]
    tasks = []
    for objects in buffers:
        assert rig.lookup(KEYS)
        tasks.append(rig.guard.submit_load_task(KEYS, objects))
    rig.now += 1.1
    wait(lambda: rig.tier.reads.state == "open" or None)
    assert rig.lookup(KEYS) == []
    # Their memory is in use until they end.
    assert all(rig.guard.query_load_result(task) is None for task in tasks)
    rig.server.hangs.clear()
    for task in tasks:
        found = wait(lambda task=task: rig.guard.query_load_result(task))
        assert found.popcount() == len(KEYS)


def test_stores_that_fail_are_left_out_and_reads_go_on(rig: Rig) -> None:
    rig.fill()
    rig.server.fails.add("store")
    for index in range(4):
        assert not rig.store(*segment(f"new {index}")).is_successful()
    assert rig.tier.stores.state == "open"
    assert rig.tier.state().guard == "closed"
    asked = len(rig.server.asked)
    assert not rig.store(*segment("other")).is_successful()
    assert len(rig.server.asked) == asked
    assert rig.events() == {"store.failed": 4, "store.skipped": 1}
    assert rig.read(KEYS)
    rig.server.fails.clear()
    rig.now += 1.3
    assert rig.store(*segment("other")).is_successful()
    assert rig.tier.stores.state == "closed"


def test_reads_that_fail_do_not_hold_up_stores(rig: Rig) -> None:
    rig.fill()
    rig.server.fails.add("load")
    while rig.tier.reads.state == "closed":
        rig.read(KEYS)
    assert rig.store(*segment("new")) == NUM_BYTES


def test_a_store_that_hangs_keeps_its_memory_and_no_more_than_allowed(
    make: Callable[..., Rig],
) -> None:
    rig = make(max_store_bytes=2 * NUM_BYTES, transfer_seconds=0.05)
    rig.server.hangs.add("store")
    hanging = [rig.guard.submit_store_task(*segment(name)) for name in "ab"]
    assert not rig.store(*segment("c")).is_successful()
    assert rig.events() == {"store.queue_full": 1}
    time.sleep(0.2)
    assert rig.guard.pop_completed_store_tasks() == {}
    rig.now += 11
    # Two that hang are too few to be judged by; and nothing is to be had by more of them.
    assert rig.tier.stores.state == "closed"
    rig.server.hangs.clear()
    ended: dict[int, L2StoreResult] = {}
    wait(lambda: ended.update(rig.guard.pop_completed_store_tasks()) or len(ended) == 2 or None)
    assert set(ended) == set(hanging)
    assert all(result == NUM_BYTES for result in ended.values())
    assert rig.store(*segment("c")) == NUM_BYTES


@pytest.mark.parametrize("what", ["lookup", "delete"])
def test_a_store_that_hangs_before_it_writes_gives_its_memory_back(
    make: Callable[..., Rig], what: str
) -> None:
    rig = make(max_store_bytes=NUM_BYTES, transfer_seconds=0.05)
    rig.fill()
    if what == "delete":
        rig.server.fails.add("load")
        assert not rig.read(KEYS)
        rig.server.fails.clear()
    rig.events()
    rig.server.hangs.add(what)
    asked = rig.server.count("store")
    for _ in range(4):
        assert not rig.store(KEYS, OBJECTS).is_successful()
    assert rig.events() == {"store.failed": 4}
    assert rig.tier.stores.state == "open"
    # Late answers store nothing, and lock nothing.
    rig.server.hangs.clear()
    wait(lambda: not rig.guard._parts or None)
    assert rig.server.count("store") == asked
    assert not +rig.server.locked

    def is_stored() -> bool | None:
        rig.now += 100
        return rig.store(KEYS, OBJECTS).is_successful() or None

    wait(is_stored)
    assert rig.read(KEYS)


def test_a_tier_that_is_shut_has_nothing_and_takes_nothing(rig: Rig) -> None:
    rig.fill()
    rig.tier.set_open(False)
    rig.events()
    rig.server.asked.clear()
    assert rig.lookup(KEYS) == []
    assert rig.load(KEYS, blank(KEYS)) == []
    assert not rig.store(*segment("new")).is_successful()
    assert rig.server.asked == []
    assert rig.events() == {}
    rig.tier.set_open(True)
    assert rig.read(KEYS)


def test_a_consumer_reads_and_changes_nothing(make: Callable[..., Rig]) -> None:
    rig = make(Tier("x", can_store=False))
    rig.fill()
    before = dict(rig.server.values)
    assert rig.read(KEYS)
    rig.server.fails.add("load")
    assert not rig.read(KEYS)
    assert not rig.store(KEYS, OBJECTS).is_successful()
    assert not rig.store(*segment("new")).is_successful()
    rig.guard.delete(KEYS)
    assert rig.server.values == before
    assert {name for name, _ in rig.server.asked} == {"lookup", "load"}


@pytest.mark.parametrize("operation", ["lookup", "load", "store"])
def test_what_the_adapter_does_not_take_is_a_failure(rig: Rig, operation: str) -> None:
    rig.fill()
    rig.server.fails.add(f"take {operation}")
    for _ in range(4):
        if operation == "store":
            assert not rig.store(*segment("new")).is_successful()
        else:
            assert not rig.read(KEYS)
    opening = rig.tier.stores if operation == "store" else rig.tier.reads
    assert opening.state == "open"
    expected = {
        "lookup": {},
        "load": {"load.failed": 4 * len(KEYS)},
        "store": {"store.failed": 4},
    }
    assert rig.events() == expected[operation]


def test_an_adapter_that_is_away_is_made_later(server: Server, make: Callable[..., Rig]) -> None:
    server.is_away = True
    rig = make()
    assert rig.guard.report_status() == {"is_healthy": False, "error": "nobody there"}
    assert rig.lookup(KEYS) == []
    assert not rig.store(KEYS, OBJECTS).is_successful()
    assert rig.events() == {"lookup.skipped": 1, "store.skipped": 1}
    assert rig.tier.state().guard == "closed"
    server.is_away = False
    wait(lambda: rig.guard.report_status()["is_healthy"] or None)
    assert rig.store(KEYS, OBJECTS).is_successful()
    assert rig.read(KEYS)


@pytest.mark.parametrize("operation", ["lookup", "load", "store"])
def test_an_adapter_that_does_not_reconnect_is_made_anew_when_it_hangs(
    make: Callable[..., Rig], operation: Operation
) -> None:
    rig = make(reconnects=False, transfer_seconds=0.1)
    rig.fill()
    rig.server.hangs.add(operation)
    if operation == "store":
        assert not rig.store(*segment("new")).is_successful()
    else:
        assert not rig.read(KEYS)
    first, second = wait(lambda: rig.server.adapters if len(rig.server.adapters) > 1 else None)
    assert first.closed.is_set()
    assert rig.events()["rebuilt"] == 1
    rig.server.hangs.clear()
    wait(lambda: rig.guard.report_status()["is_healthy"] or None)
    assert rig.read(KEYS)
    assert not second.closed.is_set()


def test_lookups_are_over_in_time_behind_one_that_hangs_for_ever(make: Callable[..., Rig]) -> None:
    rig = make(transfer_seconds=0.06)
    rig.server.hangs.add("lookup")
    for _ in range(3):
        assert rig.lookup(KEYS) == []
        time.sleep(0.1)
    assert rig.events()["lookup.late"] == 3

"""The guarded tier: nothing is raised, everything is counted, times are learned."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
from typing_extensions import Buffer

from vlcache_connector.tiers import (
    FAULTS,
    CircuitBreaker,
    Deadline,
    Entry,
    Fault,
    GuardedTier,
    Name,
    Tier,
    TierError,
    TierName,
    TierUsage,
    TransferTime,
)

NAME = Name("kv", "key", 0, 1)


def soon() -> Deadline:
    return Deadline(20)


class FaultyTier(Tier):
    """Does what it is told to, and notes what it is asked for."""

    name: TierName = "redis"

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.asked: list[str] = []
        self.removed: list[Name] = []

    def _act(self, operation: str) -> None:
        self.asked.append(operation)
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error

    def sizes(self, names: Sequence[Name], deadline: Deadline) -> list[int | None]:
        self._act("sizes")
        return [7] * len(names)

    def read(self, name: Name, max_bytes: int, deadline: Deadline) -> list[memoryview] | None:
        self._act("read")
        return [memoryview(bytearray(7))]

    def beginning(self, name: Name, num_bytes: int, deadline: Deadline) -> memoryview | None:
        raise NotImplementedError

    def write(self, name: Name, objects: Sequence[Buffer], deadline: Deadline) -> None:
        self._act("write")

    def remove(self, names: Sequence[Name], deadline: Deadline) -> int:
        error, self.error = self.error, None
        self._act("remove")
        self.error = error
        self.removed += names
        return len(names)

    def entries(self, deadline: Deadline) -> Iterator[Entry]:
        raise NotImplementedError

    def usage(self, deadline: Deadline) -> TierUsage:
        raise NotImplementedError

    def record_model(self, fingerprint: str, model_name: str, deadline: Deadline) -> None:
        self._act("record_model")

    def models(self, deadline: Deadline) -> Mapping[str, str]:
        raise NotImplementedError

    def close(self) -> None:
        self._act("close")


@pytest.fixture
def faulty() -> FaultyTier:
    return FaultyTier()


def guard(tier: Tier, **options: object) -> GuardedTier:
    settings = {"failures": 3, "min_backoff_seconds": 100.0} | options
    return GuardedTier(tier, CircuitBreaker(tier.name, **settings))  # type: ignore[arg-type]


def operations(guarded: GuardedTier) -> dict[str, Callable[[], object]]:
    return {
        "sizes": lambda: guarded.sizes([NAME, NAME], soon()),
        "read": lambda: guarded.read(NAME, 100, soon()),
        "write": lambda: guarded.write(NAME, [b"1234", b"5"], soon()),
        "record_model": lambda: guarded.record_model("fp", "model", soon()),
    }


FAILED = {"sizes": "failed", "read": "failed", "write": False, "record_model": False}
SKIPPED = {"sizes": "skipped", "read": "skipped", "write": False, "record_model": False}


def test_success_passes_and_is_counted(faulty: FaultyTier) -> None:
    guarded = guard(faulty)
    found = {name: call() for name, call in operations(guarded).items()}
    assert found == {"sizes": [7, 7], "read": [bytes(7)], "write": True, "record_model": True}
    assert guarded.remove([NAME], soon()) == 1
    counters = guarded.take_counters()
    assert counters.calls == dict.fromkeys([*FAILED, "remove"], 1)
    assert not counters.faults
    assert not counters.skipped
    assert (counters.bytes_read, counters.bytes_written, counters.damaged) == (7, 5, 0)
    assert not guarded.take_counters().calls  # taken


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", list(FAILED))
def test_faults_are_misses_and_counted(
    faulty: FaultyTier, operation: str, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = guard(faulty)
    faulty.error = TierError(fault, "why")
    assert operations(guarded)[operation]() == FAILED[operation]
    counters = guarded.take_counters()
    assert counters.faults == {(operation, fault): 1}
    assert (counters.bytes_read, counters.bytes_written) == (0, 0)
    assert caplog.text == ""
    # What the tier itself calls damaged must not be met again.
    assert faulty.removed == ([NAME] if (operation, fault) == ("read", "damaged") else [])


def test_other_exceptions_are_logged_once_per_kind(
    faulty: FaultyTier, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = guard(faulty, failures=100)
    for error in (KeyError("a"), KeyError("b"), ZeroDivisionError("c")):
        faulty.error = error
        for operation in ("read", "write"):
            assert operations(guarded)[operation]() == FAILED[operation]
    faults = guarded.take_counters().faults
    assert faults == {("read", "other"): 3, ("write", "other"): 3}
    logged = [(record.args, record.exc_info[0]) for record in caplog.records]  # type: ignore[index]
    assert logged == [
        ((operation, "redis"), kind)
        for kind in (KeyError, ZeroDivisionError)
        for operation in ("read", "write")
    ]
    assert "in _act" in caplog.text  # a traceback


def test_failures_open_the_breaker(faulty: FaultyTier, caplog: pytest.LogCaptureFixture) -> None:
    guarded = guard(faulty)
    faulty.error = TierError("connection", "refused")
    for _ in range(5):
        guarded.sizes([NAME], soon())
    assert faulty.asked == ["sizes"] * 3
    assert guarded.breaker.state == "open"
    faulty.error = None
    for name, call in operations(guarded).items():
        assert call() == SKIPPED[name]
    guarded.damaged(NAME, soon())
    counters = guarded.take_counters()
    assert faulty.asked == ["sizes"] * 3
    assert counters.skipped == {"sizes": 3, "read": 1, "write": 1, "record_model": 1, "remove": 1}
    assert counters.calls == {"sizes": 3}
    (record,) = caplog.records
    assert "to=open" in record.message
    assert "last='connection: refused'" in record.message


@pytest.mark.parametrize("fault", ["full", "damaged"])
def test_answers_do_not_open_the_breaker(faulty: FaultyTier, fault: Fault) -> None:
    guarded = guard(faulty)
    faulty.error = TierError(fault, "why")
    for _ in range(10):
        guarded.write(NAME, [b"x"], soon())
    assert guarded.breaker.state == "closed"


def test_slow_calls_open_the_breaker(faulty: FaultyTier) -> None:
    guarded = guard(faulty, slow_seconds=0.01, window=3)
    faulty.seconds = 0.02
    for _ in range(3):
        assert guarded.read(NAME, 100, soon()) == [bytes(7)]
    assert guarded.breaker.state == "open"


def test_slow_writes_do_not_open_it(faulty: FaultyTier) -> None:
    guarded = guard(faulty, slow_seconds=0.01, window=3)
    faulty.seconds = 0.02
    for _ in range(6):
        assert guarded.write(NAME, [b"x"], soon())
    assert guarded.read(NAME, 100, soon()) is not None
    assert guarded.breaker.state == "closed"


def test_a_caller_that_comes_too_late_says_nothing_about_the_tier(faulty: FaultyTier) -> None:
    guarded = guard(faulty)
    for _ in range(10):
        assert guarded.read(NAME, 100, Deadline(0)) == "failed"
    assert faulty.asked == []
    assert guarded.breaker.state == "closed"
    assert guarded.take_counters().faults == {("read", "timeout"): 10}


def test_an_interrupted_probe_does_not_block_the_breaker(faulty: FaultyTier) -> None:
    guarded = guard(faulty, min_backoff_seconds=0.0)
    faulty.error = TierError("timeout", "x")
    while guarded.breaker.state == "closed":
        guarded.read(NAME, 100, soon())
    faulty.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        guarded.read(NAME, 100, soon())
    faulty.error = None
    assert guarded.read(NAME, 100, soon()) == [bytes(7)]
    assert guarded.breaker.state == "closed"


def test_closing_never_raises(faulty: FaultyTier, caplog: pytest.LogCaptureFixture) -> None:
    faulty.error = ValueError("x")
    guard(faulty).close()
    assert faulty.asked == ["close"]
    assert "Closing the redis tier failed" in caplog.text


def test_counters_are_exact_under_threads(faulty: FaultyTier) -> None:
    guarded = guard(faulty)
    taken = []

    def work() -> None:
        for _ in range(300):
            guarded.read(NAME, 100, soon())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken.append(guarded.take_counters())
    taken.append(guarded.take_counters())
    assert sum(counters.calls["read"] for counters in taken) == 1800
    assert sum(counters.bytes_read for counters in taken) == 1800 * 7


def test_latency_and_bandwidth_are_learned() -> None:
    rng = random.Random(0)
    transfer = TransferTime()
    assert transfer.estimate(1) is None
    for _ in range(300):
        size = rng.randrange(1_000_000, 100_000_000)
        transfer.observe(size, 0.02 + size / 1e9)
    assert transfer.estimate(0) == pytest.approx(0.02, rel=0.1)
    assert transfer.estimate(500_000_000) == pytest.approx(0.52, rel=0.05)
    for _ in range(60):  # the network has become slower
        size = rng.randrange(1_000_000, 100_000_000)
        transfer.observe(size, 0.02 + size / 1e8)
    assert transfer.estimate(500_000_000) == pytest.approx(5.02, rel=0.05)


def test_transfers_of_one_size_tell_a_rate_only() -> None:
    transfer = TransferTime()
    for _ in range(10):
        transfer.observe(1000, 0.5)
    assert transfer.estimate(1000) == pytest.approx(0.5)
    assert transfer.estimate(2000) == pytest.approx(1.0)


def test_estimates_are_never_negative() -> None:
    rng = random.Random(1)
    transfer = TransferTime()
    for _ in range(200):
        transfer.observe(rng.randrange(1, 1000), rng.random())
        previous = 0.0
        for size in (0, 1, 1000, 10**9):
            estimate = transfer.estimate(size)
            assert estimate is not None
            assert estimate >= previous
            previous = estimate


def test_an_estimate_lies_on_the_line_that_is_told() -> None:
    transfer = TransferTime()
    assert transfer.line() is None
    for size in (1_000_000, 5_000_000, 20_000_000) * 40:
        transfer.observe(size, 0.02 + size / 1e9)
    line = transfer.line()
    assert line == (pytest.approx(0.02, rel=0.1), pytest.approx(1e-9, rel=0.1))
    assert transfer.estimate(3_000_000) == pytest.approx(line[0] + 3_000_000 * line[1])


def test_pinned_values_stay() -> None:
    both = TransferTime(0.1, 1000.0)
    assert both.line() == (0.1, 0.001)
    assert both.estimate(500) == pytest.approx(0.6)
    both.observe(1, 100.0)
    assert both.estimate(500) == pytest.approx(0.6)
    bandwidth = TransferTime(bytes_per_second=1000.0)
    assert bandwidth.estimate(1) is None
    bandwidth.observe(1000, 1.25)
    assert bandwidth.estimate(2000) == pytest.approx(2.25)
    latency = TransferTime(latency_seconds=0.25)
    latency.observe(1000, 1.25)
    assert latency.estimate(2000) == pytest.approx(2.25)


def test_reads_and_writes_are_learned_apart(faulty: FaultyTier) -> None:
    guarded = guard(faulty)
    faulty.seconds = 0.05
    guarded.read(NAME, 100, soon())
    faulty.error = TierError("timeout", "x")
    guarded.write(NAME, [b"x"], soon())
    assert 0.05 <= (guarded.estimate_read_seconds(7) or 0.0) < 10
    assert guarded.estimate_write_seconds(7) is None
    faulty.error = None
    guarded.write(NAME, [b"1234567"], soon())
    assert 0.05 <= (guarded.estimate_write_seconds(7) or 0.0) < 10


def test_logging_is_of_this_module(caplog: pytest.LogCaptureFixture, faulty: FaultyTier) -> None:
    caplog.set_level(logging.DEBUG)
    guarded = guard(faulty, failures=1)
    faulty.error = TierError("auth", "no")
    guarded.read(NAME, 1, soon())
    assert {record.name for record in caplog.records} == {"vlcache_connector.tiers.breaker"}

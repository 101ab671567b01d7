"""The circuit breaker, by a clock of its own."""

from __future__ import annotations

import threading

import pytest

from vlcache_connector.tiers import CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A breaker with its clock and its log."""

    def __init__(self, **options: object) -> None:
        self.clock = Clock()
        self.lines: list[str] = []
        settings = {
            "failures": 3,
            "slow_seconds": 1.0,
            "slow_share": 0.5,
            "window": 4,
            "min_backoff_seconds": 2.0,
            "max_backoff_seconds": 10.0,
            "clock": self.clock,
            "uniform": lambda low, high: 1.0,
            "log": self.lines.append,
        } | options
        self.breaker = CircuitBreaker("redis", **settings)

    def call(self, failure: str | None = None, seconds: float = 0.1) -> bool:
        permit = self.breaker.acquire()
        if permit is None:
            return False
        self.breaker.record(permit, seconds, failure)
        return True

    def open(self) -> None:
        while self.breaker.state == "closed":
            assert self.call("connection: refused")


def test_failures_in_a_row_open_it() -> None:
    rig = Rig()
    for failure in ("x", "x", None, "x", "x"):
        assert rig.call(failure)
        assert rig.breaker.state == "closed"
    assert rig.lines == []
    assert rig.call("auth: it's refused")
    assert rig.breaker.state == "open"
    assert not rig.call()
    assert rig.lines == [
        "vlcache_breaker tier=redis from=closed to=open reason='3 failures in a row' "
        'retry_in_seconds=2.0 last="auth: it\'s refused"'
    ]


def test_the_share_of_slow_calls_opens_it() -> None:
    rig = Rig()
    for seconds in (1.1, 1.1, 1.1, 0.9):
        assert rig.breaker.state == "closed"
        rig.call(seconds=seconds)
    assert rig.breaker.state == "open"
    assert "75% of calls slow" in rig.lines[0]


def test_half_of_the_calls_slow_is_not_more_than_half() -> None:
    rig = Rig()
    for seconds in (1.1, 0.9) * 20:
        assert rig.call(seconds=seconds)
    assert rig.breaker.state == "closed"


def test_slow_calls_leave_the_window() -> None:
    rig = Rig()
    for seconds in (1.1, 1.1, 0.1, 0.1, 1.1, 0.1, 0.1):
        rig.call(seconds=seconds)
    assert rig.breaker.state == "closed"


def test_one_probe_at_a_time_decides() -> None:
    rig = Rig()
    rig.open()
    rig.clock.now += 1.9
    assert rig.breaker.acquire() is None
    rig.clock.now += 0.2
    probe = rig.breaker.acquire()
    assert probe is not None
    assert rig.breaker.state == "half_open"
    assert rig.breaker.acquire() is None
    rig.breaker.record(probe, 0.1)
    assert rig.breaker.state == "closed"
    assert rig.call()
    changes = [(line.split()[2], line.split()[3]) for line in rig.lines]
    assert changes == [
        ("from=closed", "to=open"),
        ("from=open", "to=half_open"),
        ("from=half_open", "to=closed"),
    ]


@pytest.mark.parametrize("slow", [False, True])
def test_the_back_off_doubles_up_to_its_maximum_and_starts_over(slow: bool) -> None:
    rig = Rig()
    rig.open()
    for wait in (2.0, 4.0, 8.0, 10.0, 10.0):
        rig.clock.now += wait - 0.01
        assert not rig.call()
        rig.clock.now += 0.02
        assert rig.call(None if slow else "x", 1.5 if slow else 0.1)
        assert rig.breaker.state == "open"
    rig.clock.now += 10.1
    assert rig.call()
    rig.open()
    rig.clock.now += 2.1
    assert rig.call()
    assert rig.breaker.state == "closed"


def test_jitter_spreads_the_back_off() -> None:
    asked: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return 1.2

    rig = Rig(uniform=uniform)
    rig.open()
    rig.clock.now += 2.3
    assert not rig.call()
    rig.clock.now += 0.2
    assert rig.call()
    assert asked == [(0.8, 1.2)]


def test_reports_of_earlier_states_do_not_count() -> None:
    rig = Rig()
    late = [rig.breaker.acquire() for _ in range(4)]
    rig.open()
    for permit in late:
        assert permit is not None
    rig.breaker.record(late[0], 0.1)  # type: ignore[arg-type]
    assert rig.breaker.state == "open"
    rig.clock.now += 2.1
    probe = rig.breaker.acquire()
    rig.breaker.record(late[1], 0.1)  # type: ignore[arg-type]
    assert rig.breaker.state == "half_open"
    rig.breaker.record(late[2], 0.1, "x")  # type: ignore[arg-type]
    assert rig.breaker.state == "half_open"
    assert probe is not None
    rig.breaker.record(probe, 0.1)
    rig.breaker.record(late[3], 0.1, "x")  # type: ignore[arg-type]
    assert rig.breaker.state == "closed"
    for _ in range(2):
        rig.call("x")
    assert rig.breaker.state == "closed"


def test_threads_get_one_probe() -> None:
    rig = Rig(window=1000, failures=10)
    for _ in range(50):
        rig.open()
        rig.clock.now += 100
        barrier = threading.Barrier(8)
        permits: list[int | None] = []

        def probe(barrier: threading.Barrier = barrier, found: list[int | None] = permits) -> None:
            barrier.wait()
            found.append(rig.breaker.acquire())

        threads = [threading.Thread(target=probe) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (granted,) = [permit for permit in permits if permit is not None]
        rig.breaker.record(granted, 0.1)
        assert rig.breaker.state == "closed"

"""What a tier is left alone for, and until when; by a clock of its own."""

from __future__ import annotations

import random

import pytest

from vlcache_connector.storage.opening import Attempt, Opening
from vlcache_connector.storage.tier import Tier

LOOKUP, LOAD = 0.05, 1.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """Reads of a tier, with their clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.opening = Opening("tier=x", {"lookup": LOOKUP, "load": LOAD}, clock=self.clock)

    def lookup(self, seconds: float = 0.001) -> bool:
        """Whether it was let through."""
        if not self.opening.admit():
            return False
        attempt = self.opening.begin("lookup")
        self.clock.now += seconds
        self.opening.end(attempt)
        return True

    def load(self, seconds: float = 0.1, error: str | None = None) -> None:
        attempt = self.opening.begin("load")
        self.clock.now += seconds
        self.opening.end(attempt, error)

    def read(self, seconds: float = 0.1, error: str | None = None) -> bool:
        """A lookup that finds something, and the load that follows."""
        if not self.lookup():
            return False
        self.load(seconds, error)
        return True

    def until_half_open(self) -> float:
        """How many seconds pass until something is let through."""
        began = self.clock.now
        while self.opening.state == "open":
            self.clock.now += 0.01
        return self.clock.now - began

    def open_by_loads(self) -> None:
        while self.opening.state == "closed":
            assert self.read(error="lost")


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_slow_lookups_open_it_at_their_median(rig: Rig) -> None:
    for seconds in (0.001, 0.06, 0.06):
        assert rig.lookup(seconds)
    assert rig.opening.state == "closed"
    assert rig.lookup(0.06)
    assert rig.opening.state == "open"
    assert not rig.lookup()


def test_a_few_slow_ones_among_many_do_not(rig: Rig) -> None:
    for _ in range(10):
        for seconds in (0.001, 0.001, 0.4, 0.001, 0.001):
            assert rig.lookup(seconds)
            assert rig.read(2.0 if seconds > LOOKUP else 0.01)
    assert rig.opening.state == "closed"


@pytest.mark.parametrize(("seconds", "error"), [(0.01, "lost"), (1.1, None)])
def test_lookups_that_succeed_do_not_hide_loads_that_are_of_no_use(
    rig: Rig, seconds: float, error: str | None
) -> None:
    for _ in range(3):
        assert rig.read(seconds, error)
        for _ in range(20):
            assert rig.lookup()
    assert rig.opening.state == "closed"
    assert rig.read(seconds, error)
    assert rig.opening.state == "open"


def test_half_of_the_last_eight_loads_are_enough(rig: Rig) -> None:
    for _ in range(50):
        rig.read()
    for error in (None, "a", None, "b", None, "c", None):
        assert rig.read(error=error)
    assert rig.opening.state == "closed"
    assert rig.read(error="d")
    assert rig.opening.state == "open"


@pytest.mark.parametrize("operation", ["lookup", "load"])
def test_what_hangs_is_judged_while_it_hangs(rig: Rig, operation: str) -> None:
    hanging = [rig.opening.begin(operation) for _ in range(4)]  # type: ignore[arg-type]
    rig.clock.now += {"lookup": LOOKUP, "load": LOAD}[operation]
    rig.opening.check()
    assert rig.opening.state == "closed"
    rig.clock.now += 0.001
    rig.opening.check()
    assert rig.opening.state == "open"
    rig.until_half_open()
    # Ends of what was begun before say nothing any more.
    for attempt in hanging:
        rig.opening.end(attempt)
    assert rig.opening.state == "half_open"


def test_one_probe_at_a_time_is_let_through(rig: Rig) -> None:
    rig.open_by_loads()
    rig.until_half_open()
    assert rig.opening.admit()
    assert not rig.opening.admit()
    lookup = rig.opening.begin("lookup")
    assert not rig.opening.admit()
    rig.opening.end(lookup)
    load = rig.opening.begin("load")
    rig.clock.now += 0.5
    assert not rig.opening.admit()
    rig.opening.end(load)
    assert rig.opening.state == "closed"
    assert rig.opening.admit()
    assert rig.opening.admit()


def test_a_lookup_does_not_close_what_loads_opened(rig: Rig) -> None:
    rig.open_by_loads()
    rig.until_half_open()
    for _ in range(5):
        assert rig.lookup()  # finds nothing: the next one may try
        assert rig.opening.state == "half_open"
    assert rig.read()
    assert rig.opening.state == "closed"


def test_a_quick_lookup_closes_what_slow_ones_opened(rig: Rig) -> None:
    while rig.opening.state == "closed":
        rig.lookup(0.5)
    rig.until_half_open()
    assert rig.lookup()
    assert rig.opening.state == "closed"


@pytest.mark.parametrize("hangs", [False, True])
def test_back_off_doubles_until_a_minute_and_begins_anew_when_it_worked(
    rig: Rig, hangs: bool
) -> None:
    def fail() -> None:
        rig.lookup()
        if hangs:
            rig.opening.begin("load")
            rig.clock.now += 1.1
            rig.opening.check()
        else:
            rig.load(error="lost")

    random.seed(0)
    rig.open_by_loads()
    waits = []
    for _ in range(9):
        waits.append(rig.until_half_open())
        fail()
    expected = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert all(0.79 * e <= w <= 1.21 * e for w, e in zip(waits, expected, strict=True))
    assert len({wait / e for wait, e in zip(waits, expected, strict=True)}) > 5  # spread
    rig.until_half_open()
    assert rig.read()
    # Closed for less than it was open: nothing has become better.
    rig.open_by_loads()
    assert rig.until_half_open() > 45
    assert rig.read()
    rig.clock.now += 100
    rig.open_by_loads()
    assert rig.until_half_open() < 1.3


def test_each_change_is_a_line_that_says_why(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for error in (None, "first", "last"):
        rig.read(0.25, error)
    rig.read(0.5, "last")
    rig.until_half_open()
    rig.read()
    opened, half_open, closed = [record.message for record in caplog.records]
    assert opened.startswith(
        "vlcache_opening tier=x from=closed to=open operation=load median_seconds=0.250 "
        "budget_seconds=1.000 failures=3/4 retry_in_seconds="
    )
    assert opened.endswith(" last_error='last'")
    assert half_open == "vlcache_opening tier=x from=open to=half_open"
    assert closed == "vlcache_opening tier=x from=half_open to=closed operation=load"


def test_an_opening_that_is_read_forgets_nothing_of_what_hangs(rig: Rig) -> None:
    kept: list[Attempt] = []
    for _ in range(3):
        kept.append(rig.opening.begin("load"))
        rig.clock.now += 1.1
        rig.opening.check()
        assert rig.opening.state == "closed"
    rig.opening.end(kept[0])  # late, and counted once
    rig.opening.check()
    assert rig.opening.state == "closed"
    rig.load(1.1)
    assert rig.opening.state == "open"


@pytest.mark.parametrize(("deadline", "budget"), [(1.0, 0.05), (10.0, 0.5), (0.01, 0.005)])
def test_a_tier_spends_a_small_share_of_the_deadline_on_lookups(
    deadline: float, budget: float
) -> None:
    for seconds, state in ((0.9 * budget, "closed"), (1.1 * budget, "open")):
        clock = Clock()
        tier = Tier("x", fetch_deadline_seconds=deadline, clock=clock)
        for _ in range(4):
            attempt = tier.reads.begin("lookup")
            clock.now += seconds
            tier.reads.end(attempt)
        assert tier.reads.state == tier.state().guard == state
        assert tier.stores.state == "closed"

"""The residency index: one example per rule, then all rules at once in any order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vlcache_connector.scheduler.index import ResidencyIndex


def make_index(budget: int, ready: dict[str, int] | None = None, ranks: int = 1) -> ResidencyIndex:
    """An index that holds `ready` (key -> bytes), the least recently used key first."""
    index = ResidencyIndex(budget, ranks)
    for key, num_bytes in (ready or {}).items():
        assert index.reserve(key, num_bytes)
        index.stored(key, ranks)
    index.check_integrity()
    return index


def test_room_is_made_by_evicting_what_was_not_used_for_longest() -> None:
    index = make_index(30, {"a": 10, "b": 10, "c": 10})
    assert index.reserve("d", 15)
    assert index.take_evicted() == ["a", "b"]
    assert "c" in index
    assert index.used_bytes == 25


def test_a_promise_counts_as_use() -> None:
    index = make_index(30, {"a": 10, "b": 10, "c": 10})
    index.promise("a")
    index.settle()
    index.settle()
    assert index.reserve("d", 10)
    assert index.take_evicted() == ["b"]


def test_what_never_comes_back_does_not_drive_out_what_does() -> None:
    index = ResidencyIndex(100, 1)
    for key in "abc":
        assert index.reserve(key, 20)
        index.stored(key, 1)
        index.promise(key)
    for number in range(20):  # one-offs share what is left
        assert index.reserve(str(number), 20)
        index.stored(str(number), 1)
        index.settle()
    assert all(index.is_ready(key) for key in "abc")
    index.check_integrity()


def test_what_was_used_again_long_ago_makes_room_for_what_is_now() -> None:
    index = ResidencyIndex(100, 1)
    for key in "abcde":
        assert index.reserve(key, 20)
        index.stored(key, 1)
    for key in "abcde":
        index.promise(key)  # of five, four may stay
        index.settle()
        index.check_integrity()
    index.settle()
    index.settle()
    for key in "xy":
        assert index.reserve(key, 20)
    assert [index.is_ready(key) for key in "abcde"] == [False, False, True, True, True]
    index.check_integrity()


def test_a_promised_key_stays_for_this_step_and_the_next() -> None:
    index = make_index(10, {"a": 10})
    index.promise("a")
    assert not index.reserve("b", 10)
    index.settle()
    assert not index.reserve("b", 10)
    assert index.is_ready("a")
    index.settle()
    assert index.reserve("b", 10)
    assert index.take_evicted() == ["a"]


def test_a_renewed_promise_lasts_as_long_as_a_new_one() -> None:
    index = make_index(10, {"a": 10})
    index.promise("a")
    index.settle()
    index.promise("a")
    index.settle()
    assert not index.reserve("b", 10)
    index.settle()
    assert index.reserve("b", 10)


def test_reserved_keys_are_never_evicted() -> None:
    index = make_index(30, {"old": 10})
    assert index.reserve("writing", 20)
    assert not index.reserve("large", 30)
    assert index.reserve("small", 10)
    assert index.take_evicted() == ["old"]
    assert "writing" in index


def test_events_are_counted_until_they_are_taken() -> None:
    index = make_index(30, ranks=2)
    assert index.reserve("a", 20)
    index.stored("a", 1)
    assert not index.take_events()
    index.stored("a", 1)
    index.stored("a", 1)  # more than there are
    assert index.reserve("b", 20)
    assert not index.reserve("c", 20)
    assert not index.reserve("b", 20)  # known, which is no lack of room
    assert index.take_events() == {"stored": 1, "evicted": 1, "no_room": 1}
    index.stored("b", 2)
    index.clear()
    assert index.take_events() == {"stored": 1}


def test_a_promise_is_counted_as_long_as_it_is_kept() -> None:
    index = make_index(30, {"a": 10, "b": 10})
    index.promise("a")
    assert index.num_promised == 1
    index.settle()
    index.promise("a")
    index.promise("b")
    assert index.num_promised == 2
    index.settle()
    index.settle()
    assert index.num_promised == 0


def test_what_does_not_fit_changes_nothing() -> None:
    index = make_index(30, {"a": 10, "b": 10})
    index.promise("b")
    assert not index.reserve("large", 21)
    assert not index.reserve("huge", 31)
    assert index.is_ready("a")
    assert index.is_ready("b")
    assert (len(index), index.used_bytes, index.take_evicted()) == (2, 20, [])


def test_what_can_never_fit_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    index = ResidencyIndex(30, 1, "encoder_cpu_bytes")
    for key in "ab":
        assert not index.reserve(key, 31)
    [record] = caplog.records
    assert "takes 31 bytes" in record.getMessage()
    assert "Raise encoder_cpu_bytes" in record.getMessage()


def test_a_key_that_is_known_is_not_reserved_again() -> None:
    index = make_index(30, {"a": 10})
    assert not index.reserve("a", 10)
    assert index.reserve("b", 10)
    assert not index.reserve("b", 10)
    assert index.used_bytes == 20


def test_the_whole_budget_can_be_used_by_one_key() -> None:
    index = make_index(30, {"a": 10, "b": 10})
    assert index.reserve("whole", 30)
    assert index.used_bytes == 30


@pytest.mark.parametrize("reports", [[1, 1, 1], [2, 1], [3]], ids=str)
def test_a_key_is_ready_once_all_ranks_have_stored_it(reports: list[int]) -> None:
    index = ResidencyIndex(10, num_ranks=3)
    assert not index.is_ready("a")
    index.reserve("a", 10)
    for ranks in reports:
        assert not index.is_ready("a")
        assert "a" in index
        index.stored("a", ranks)
    assert index.is_ready("a")


def test_a_key_that_nobody_reserved_is_to_be_dropped() -> None:
    index = make_index(10)
    index.stored("stray", 1)
    assert "stray" not in index
    assert index.take_evicted() == ["stray"]


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_lost_key_is_forgotten_and_dropped_everywhere(is_ready: bool) -> None:
    index = make_index(10)
    index.reserve("a", 10)
    index.stored("a", int(is_ready))
    index.lost("a")
    assert "a" not in index
    assert (index.used_bytes, index.take_evicted()) == (0, ["a"])


def test_an_unknown_key_can_not_be_lost() -> None:
    index = make_index(10)
    index.lost("a")
    assert index.take_evicted() == []


def test_a_discarded_key_is_forgotten_without_a_word() -> None:
    index = make_index(10)
    index.reserve("a", 10)
    index.discard("a")
    index.discard("unknown")
    assert "a" not in index
    assert (index.used_bytes, index.take_evicted()) == (0, [])
    assert index.reserve("a", 10)


def test_clear_forgets_everything_and_what_is_being_written_is_dropped_when_it_is_there() -> None:
    index = make_index(30, {"a": 10, "b": 10})
    index.reserve("writing", 10)
    index.clear()
    assert index.take_evicted() == ["a", "b", "writing"]
    assert len(index) == index.used_bytes == 0
    index.stored("writing", 1)
    assert not index.is_ready("writing")
    assert index.take_evicted() == ["writing"]


def test_evicted_keys_are_told_once() -> None:
    index = make_index(10, {"a": 10})
    index.reserve("b", 10)
    assert index.take_evicted() == ["a"]
    assert index.take_evicted() == []


def test_a_key_is_evicted_on_demand_and_dropped_everywhere() -> None:
    index = make_index(30, {"a": 10, "b": 10})
    assert index.evict("b")
    assert "b" not in index
    assert (index.used_bytes, index.take_evicted()) == (10, ["b"])


def test_what_is_promised_being_written_or_unknown_can_not_be_evicted() -> None:
    index = make_index(30, {"a": 10})
    index.promise("a")
    assert not index.evict("a")
    index.settle()
    assert not index.evict("a")
    assert index.reserve("writing", 10)
    assert not index.evict("writing")
    assert not index.evict("unknown")
    assert index.take_evicted() == []
    index.settle()
    assert index.evict("a")


def test_every_way_to_forget_a_key_is_told() -> None:
    index = make_index(50, {"evicted": 10, "for room": 10, "lost": 10, "cleared": 10})
    index.reserve("discarded", 10)
    told: list[str] = []
    index.on_forgotten = told.append
    index.evict("evicted")
    index.lost("lost")
    index.discard("discarded")
    for key in ("evicted", "lost", "discarded", "unknown"):
        index.evict(key)
        index.lost(key)
        index.discard(key)
    index.stored("stray", 1)
    assert told == ["evicted", "lost", "discarded"]
    assert index.reserve("writing", 40)
    index.clear()
    assert told[3:] == ["for room", "cleared", "writing"]


def test_a_key_is_forgotten_before_anyone_is_told() -> None:
    index = make_index(10, {"a": 10})
    known: list[bool] = []
    index.on_forgotten = lambda key: known.append(key in index)
    index.evict("a")
    assert known == [False]


KEYS = st.sampled_from("abcdef")
BUDGET = 40
RANKS = 2


class Residency(RuleBasedStateMachine):
    """Against a plain account of the same keys."""

    def __init__(self) -> None:
        super().__init__()
        self.index = ResidencyIndex(BUDGET, RANKS)
        self.sizes: dict[str, int] = {}
        """Of known keys."""
        self.once: list[str] = []
        self.again: list[str] = []
        """Known keys in the order in which they go."""
        self.missing: dict[str, int] = {}
        """Known key -> ranks that have not stored it."""
        self.promises: list[set[str]] = [set(), set()]
        """Of this step and of the one before."""
        self.dropped: list[str] = []
        """What the workers have yet to be told."""
        self.told: set[str] = set()
        """Keys by what `on_forgotten` says: those that were reserved and not forgotten since."""
        self.index.on_forgotten = self.told.remove

    def ready(self) -> list[str]:
        return [key for key in self.once + self.again if self.missing[key] == 0]

    def forget(self, key: str) -> None:
        del self.sizes[key], self.missing[key]
        (self.once if key in self.once else self.again).remove(key)

    @initialize(sizes=st.lists(st.integers(5, 12), max_size=4))
    def begin_with_ready_keys(self, sizes: list[int]) -> None:
        for key, num_bytes in zip("abcd", sizes, strict=False):
            self.reserve(key, num_bytes)
            self.stored(key, RANKS)

    @rule(key=KEYS, num_bytes=st.integers(1, BUDGET + 5))
    def reserve(self, key: str, num_bytes: int) -> None:
        known = key in self.sizes
        kept = set().union(*self.promises)
        victims = [victim for victim in self.ready() if victim not in kept]
        room = BUDGET - sum(self.sizes.values())
        gone = []
        while room < num_bytes and victims:
            gone.append(victims.pop(0))
            room += self.sizes[gone[-1]]
        fits = not known and room >= num_bytes
        assert self.index.reserve(key, num_bytes) == fits
        if fits:
            for victim in gone:
                self.forget(victim)
            self.dropped += gone
            self.sizes[key], self.missing[key] = num_bytes, RANKS
            self.once.append(key)
            self.told.add(key)

    @rule(key=KEYS, ranks=st.integers(1, RANKS))
    def stored(self, key: str, ranks: int) -> None:
        self.index.stored(key, ranks)
        if key in self.sizes:
            self.missing[key] = max(0, self.missing[key] - ranks)
        else:
            self.dropped.append(key)

    @precondition(lambda self: self.ready())
    @rule(data=st.data())
    def promise(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.ready()))
        self.index.promise(key)
        (self.once if key in self.once else self.again).remove(key)
        self.again.append(key)
        while sum(self.sizes[used] for used in self.again) > 0.8 * BUDGET:
            self.once.append(self.again.pop(0))
        self.promises[0].add(key)

    @rule(steps=st.integers(1, 3))
    def settle(self, steps: int) -> None:
        for _ in range(steps):
            self.index.settle()
            self.promises = [set(), self.promises[0]]

    @rule(key=KEYS)
    def lost(self, key: str) -> None:
        self.index.lost(key)
        if key in self.sizes:
            self.forget(key)
            self.dropped.append(key)

    @rule(key=KEYS)
    def discard(self, key: str) -> None:
        self.index.discard(key)
        if key in self.sizes:
            self.forget(key)

    @rule(key=KEYS)
    def evict(self, key: str) -> None:
        can_go = key in self.ready() and key not in set().union(*self.promises)
        assert self.index.evict(key) == can_go
        if can_go:
            self.forget(key)
            self.dropped.append(key)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        for key in list(self.sizes):
            self.forget(key)
            self.dropped.append(key)

    @rule()
    def take_evicted(self) -> None:
        assert self.index.take_evicted() == self.dropped
        self.dropped = []

    @invariant()
    def accounts_agree(self) -> None:
        self.index.check_integrity()
        assert self.index.used_bytes == sum(self.sizes.values()) <= BUDGET
        assert len(self.index) == len(self.sizes)
        assert self.told == set(self.sizes)
        for key in "abcdef":
            assert (key in self.index) == (key in self.sizes)
            assert self.index.is_ready(key) == (self.missing.get(key) == 0)


TestResidency = Residency.TestCase
TestResidency.settings = settings(max_examples=40, stateful_step_count=30)

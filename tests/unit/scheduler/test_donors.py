"""Donor variants: one example per rule, then all rules at once in any order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vlcache_connector.calibration import RELATIONS, Relation, relation_of
from vlcache_connector.keys import split_variant, variant_key
from vlcache_connector.protocol import Item, Span
from vlcache_connector.scheduler.donors import Donors
from vlcache_connector.scheduler.index import ResidencyIndex

ALL = frozenset(RELATIONS)
SAME: frozenset[Relation] = frozenset({"single_image", "same_ordinal"})
LONE: frozenset[Relation] = SAME | {"lone_donor"}
SINGLE: frozenset[Relation] = frozenset({"single_image"})
NOTHING: frozenset[Relation] = frozenset()


def item(ordinal: int, key: str = "cat") -> Item:
    return Item(index=ordinal, span=Span(0, 4), ordinal=ordinal, key=key, encoder_key="rows")


def make(
    allowed: frozenset[Relation] = SAME, *, max_variants: int = 2, budget: int = 100
) -> tuple[ResidencyIndex, Donors]:
    index = ResidencyIndex(budget, num_ranks=1)
    return index, Donors(index, allowed=allowed, max_variants=max_variants)


def store(index: ResidencyIndex, donors: Donors, target: Item, num_bytes: int = 10) -> str:
    key = donors.reserve(target, num_bytes)
    assert key is not None
    index.stored(key, 1)
    return key


def make_with(allowed: frozenset[Relation], *ordinals: int) -> tuple[ResidencyIndex, Donors]:
    """Ready variants at these ordinals, whatever the gate lets through."""
    index, donors = make(allowed, max_variants=99)
    for ordinal in ordinals:
        key = variant_key("cat", str(ordinal))
        assert index.reserve(key, 10)
        index.stored(key, 1)
        donors._ordinals.setdefault("cat", {})[ordinal] = key
    return index, donors


@pytest.mark.parametrize(
    ("allowed", "stored", "target", "expected"),
    [
        (ALL, (0, 1, 2), 0, 0),
        (ALL, (0, 1, 2), 1, 1),
        (ALL, (2, 1, 0), 2, 2),
        (ALL, (0, 1, 3), 2, 0),  # a lone donor before one behind other images
        (ALL, (1, 5), 4, 5),  # the nearer one
        (ALL, (1, 2), 0, 1),
        (SAME, (0, 1), 1, 1),
        (SAME, (0, 1), 0, 0),
        (SAME, (0, 1), 2, None),
        (LONE, (0, 1), 2, 0),
        (LONE, (1, 3), 2, None),
        (LONE, (1,), 0, None),
        (SINGLE, (0,), 0, 0),
        (SINGLE, (0, 1), 1, None),
        (NOTHING, (0, 1), 0, None),
        (ALL, (), 0, None),
    ],
)
def test_the_best_allowed_relation_wins(
    allowed: frozenset[Relation], stored: tuple[int, ...], target: int, expected: int | None
) -> None:
    _, donors = make_with(allowed, *stored)
    found = donors.find(item(target))
    assert found == (None if expected is None else variant_key("cat", str(expected)))
    assert donors.is_forbidden(item(target)) == (bool(stored) and expected is None)


def test_another_items_segments_are_neither_found_nor_forbidden() -> None:
    _, donors = make_with(SAME, 0, 1)
    assert donors.find(item(0, "dog")) is None
    assert not donors.is_forbidden(item(2, "dog"))


def test_a_segment_is_found_once_it_is_ready() -> None:
    index, donors = make()
    key = donors.reserve(item(0), 10)
    assert key == variant_key("cat", "0")
    assert donors.find(item(0)) is None
    index.stored(key, 1)
    assert donors.find(item(0)) == key


def test_a_worse_relation_serves_while_the_best_one_is_being_written() -> None:
    index, donors = make_with(ALL, 0)
    assert index.reserve("cat/1", 10)
    donors._ordinals["cat"][1] = "cat/1"
    assert donors.find(item(1)) == "cat/0"
    index.stored("cat/1", 1)
    assert donors.find(item(1)) == "cat/1"


@pytest.mark.parametrize(
    ("allowed", "stored", "target", "is_wanted"),
    [
        (SAME, 0, 0, False),
        (SAME, 0, 1, True),
        (SAME, 1, 1, False),
        (LONE, 0, 1, False),
        (LONE, 1, 0, True),
        (ALL, 3, 1, False),
    ],
)
@pytest.mark.parametrize("is_ready", [False, True])
def test_no_new_variant_is_stored_where_one_may_be_reused(
    allowed: frozenset[Relation], stored: int, target: int, is_wanted: bool, is_ready: bool
) -> None:
    index, donors = make(allowed)
    key = donors.reserve(item(stored), 10)
    assert key is not None
    index.stored(key, int(is_ready))
    expected = variant_key("cat", str(target)) if is_wanted else None
    assert donors.reserve(item(target), 10) == expected
    assert len(index) == 1 + is_wanted


def test_the_oldest_variant_makes_way_for_a_new_one() -> None:
    index, donors = make(max_variants=2)
    for ordinal in (3, 1, 2):
        store(index, donors, item(ordinal))
    assert index.take_evicted() == ["cat/3"]
    assert [donors.find(item(ordinal)) for ordinal in (1, 2, 3)] == ["cat/1", "cat/2", None]
    assert len(index) == 2


def test_other_items_keep_their_variants() -> None:
    index, donors = make(max_variants=1)
    store(index, donors, item(0, "dog"))
    store(index, donors, item(0))
    store(index, donors, item(1))
    assert index.take_evicted() == ["cat/0"]
    assert donors.find(item(0, "dog")) == "dog/0"


def test_a_promised_variant_stays_and_the_next_oldest_goes() -> None:
    index, donors = make(max_variants=2)
    for ordinal in (0, 1):
        store(index, donors, item(ordinal))
    index.promise("cat/0")
    assert donors.reserve(item(2), 10) == "cat/2"
    assert index.take_evicted() == ["cat/1"]


def test_nothing_is_stored_when_no_variant_can_go() -> None:
    index, donors = make(max_variants=2)
    store(index, donors, item(0))
    index.promise("cat/0")
    assert donors.reserve(item(1), 10) == "cat/1"  # being written from here on
    assert donors.reserve(item(2), 10) is None
    assert index.take_evicted() == []
    assert donors.find(item(0)) == "cat/0"


def test_a_variant_that_has_no_room_is_not_known() -> None:
    _, donors = make(budget=10)
    assert donors.reserve(item(0), 11) is None
    assert donors._ordinals == {}
    assert not donors.is_forbidden(item(1))


def test_a_variant_that_can_not_be_stored_drives_none_out() -> None:
    index, donors = make(max_variants=1, budget=20)
    store(index, donors, item(0))
    assert donors.reserve(item(1), 21) is None
    assert donors.find(item(0)) == "cat/0"


def test_a_variant_that_nobody_may_ever_reuse_drives_no_useful_one_out() -> None:
    """Where only lone images are safe, a donor behind others serves no request at all."""
    index, donors = make(SINGLE, max_variants=2)
    store(index, donors, item(0))
    for ordinal in (1, 2, 3):
        key = donors.reserve(item(ordinal), 10)
        if key is not None:
            index.stored(key, 1)
    assert donors.find(item(0)) == "cat/0"


def test_a_variant_is_not_stored_over_and_over_at_the_same_place() -> None:
    index, donors = make(SINGLE, max_variants=1)
    key = donors.reserve(item(1), 10)
    if key is not None:
        index.stored(key, 1)
    assert donors.reserve(item(1), 10) is None
    assert index.take_evicted() == []


def test_room_is_made_with_the_items_own_older_variants_too() -> None:
    index, donors = make(max_variants=9, budget=25)
    for ordinal in (0, 1, 2):
        store(index, donors, item(ordinal))
    assert index.take_evicted() == ["cat/0"]
    assert [donors.find(item(ordinal)) for ordinal in (0, 1, 2)] == [None, "cat/1", "cat/2"]


@pytest.mark.parametrize("how", ["evict", "lost", "discard"])
def test_what_the_index_forgets_is_no_variant_any_more(how: str) -> None:
    index, donors = make()
    for ordinal in (0, 1):
        store(index, donors, item(ordinal))
    getattr(index, how)("cat/0")
    assert donors.find(item(0)) is None
    assert donors.find(item(1)) == "cat/1"
    getattr(index, how)("cat/1")
    assert donors._ordinals == {}
    assert not donors.is_forbidden(item(5))


def test_nothing_is_left_behind_once_everything_is_evicted() -> None:
    index, donors = make(budget=1000)
    for ordinal in range(3):
        for name in ("cat", "dog", "cow"):
            store(index, donors, item(ordinal, name))
    index.clear()
    assert len(index) == 0
    assert donors._ordinals == {}


ITEMS = st.builds(item, st.integers(0, 3), st.sampled_from(["cat", "dog", "cow"]))
BUDGET = 60


class Variants(RuleBasedStateMachine):
    """Whatever happens: variants and index agree, and only allowed donors are found."""

    @initialize(
        allowed=st.sampled_from([ALL, SAME, LONE, SINGLE, NOTHING]), limit=st.integers(1, 3)
    )
    def begin(self, allowed: frozenset[Relation], limit: int) -> None:
        self.allowed, self.limit = allowed, limit
        self.index, self.donors = make(allowed, max_variants=limit, budget=BUDGET)
        self.known: set[str] = set()
        """Reserved keys, whether or not they are still there."""
        self.promises: list[set[str]] = [set(), set()]

    def variants_of(self, key: str) -> list[int]:
        """By the index alone."""
        parts = [split_variant(known) for known in self.known if known in self.index]
        return [int(variant) for name, variant in parts if name == key]

    @rule(wanted=ITEMS, num_bytes=st.integers(5, 30))
    def reserve(self, wanted: Item, num_bytes: int) -> None:
        before = self.variants_of(wanted.key)
        key = self.donors.reserve(wanted, num_bytes)
        assert all(promised in self.index for promised in set().union(*self.promises))
        if key is None:
            return
        assert key == variant_key(wanted.key, str(wanted.ordinal))
        assert not any(relation_of(o, wanted.ordinal) in self.allowed for o in before)
        self.known.add(key)
        assert not self.index.is_ready(key)

    @rule(wanted=ITEMS)
    def find(self, wanted: Item) -> None:
        found = self.donors.find(wanted)
        ready = [
            ordinal
            for ordinal in self.variants_of(wanted.key)
            if relation_of(ordinal, wanted.ordinal) in self.allowed
            and self.index.is_ready(variant_key(wanted.key, str(ordinal)))
        ]
        if found is None:
            assert not ready
            return
        name, variant = split_variant(found)
        assert name == wanted.key
        assert int(variant) in ready
        best = min(RELATIONS.index(relation_of(o, wanted.ordinal)) for o in ready)
        assert RELATIONS.index(relation_of(int(variant), wanted.ordinal)) == best
        self.index.promise(found)
        self.promises[0].add(found)

    @rule(wanted=ITEMS)
    def is_forbidden(self, wanted: Item) -> None:
        relations = {relation_of(o, wanted.ordinal) for o in self.variants_of(wanted.key)}
        assert self.donors.is_forbidden(wanted) == (
            bool(relations) and not relations & self.allowed
        )

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def stored(self, data: st.DataObject) -> None:
        self.index.stored(data.draw(st.sampled_from(sorted(self.known))), 1)

    @rule()
    def settle(self) -> None:
        self.index.settle()
        self.promises = [set(), self.promises[0]]

    @precondition(lambda self: self.known)
    @rule(data=st.data(), how=st.sampled_from(["lost", "discard", "evict"]))
    def forget(self, data: st.DataObject, how: str) -> None:
        promised = set().union(*self.promises)
        candidates = sorted(self.known - promised)
        if candidates:
            getattr(self.index, how)(data.draw(st.sampled_from(candidates)))

    @invariant()
    def accounts_agree(self) -> None:
        self.index.check_integrity()
        own = {
            key: (name, ordinal)
            for name, variants in self.donors._ordinals.items()
            for ordinal, key in variants.items()
        }
        assert all(key == variant_key(name, str(o)) for key, (name, o) in own.items())
        assert set(own) == {key for key in self.known if key in self.index}
        assert len(own) == len(self.index)
        assert all(0 < len(v) <= self.limit for v in self.donors._ordinals.values())

    def teardown(self) -> None:
        if hasattr(self, "index"):
            for key in self.known:
                self.index.lost(key)
            assert self.donors._ordinals == {}


TestVariants = Variants.TestCase
TestVariants.settings = settings(max_examples=40, stateful_step_count=30)

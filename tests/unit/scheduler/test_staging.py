"""Lookups, loads and promises: who waits for what, for how long, and what becomes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlcache_connector.calibration import RELATIONS, Relation
from vlcache_connector.keys import variant_key
from vlcache_connector.protocol import Found, Item, Loaded, LoadPlan, LookupPlan, NoAnswer, Span
from vlcache_connector.scheduler.donors import Donors
from vlcache_connector.scheduler.index import ResidencyIndex
from vlcache_connector.scheduler.requests import Lookup
from vlcache_connector.scheduler.staging import Staging

ALL = frozenset(RELATIONS)
KV_BYTES, ROW_BYTES = 10, 3


def item(key: str = "cat", ordinal: int = 0) -> Item:
    return Item(ordinal, Span(10 * ordinal, 10 * ordinal + 4), ordinal, key, f"{key} rows")


class World:
    """The scheduler side around a `Staging`, with a clock of its own."""

    def __init__(
        self,
        *,
        budget: int = 100,
        num_ranks: int = 1,
        allowed: frozenset[Relation] = ALL,
        slow_tiers: frozenset[str] = frozenset(),
    ) -> None:
        self.now = 0.0
        self.segments = ResidencyIndex(budget, num_ranks)
        self.rows = ResidencyIndex(budget, num_ranks)
        self.donors = Donors(self.segments, allowed=allowed, max_variants=2)
        self.asked_whether_worth: list[tuple[str, int, int]] = []

        def is_worth(*question: tuple[str, int, int]) -> bool:
            self.asked_whether_worth.append(question)
            return question[0] not in slow_tiers

        self.staging = Staging(
            self.segments,
            self.rows,
            self.donors,
            num_ranks=num_ranks,
            deadline_seconds=1.0,
            is_worth=is_worth,
            clock=lambda: self.now,
        )

    def waits(self, req_id: str, *items: Item, saved_tokens: int = 4) -> bool:
        return self.staging.is_pending(
            req_id, items, lambda _: KV_BYTES, lambda _: ROW_BYTES, lambda _: saved_tokens
        )

    def step(self) -> tuple[list[LookupPlan], list[LoadPlan]]:
        plans = self.staging.take_plans()
        for index in (self.segments, self.rows):
            index.settle()
        return plans

    def find(self, *names: str, tiers: dict[str, str] | None = None) -> list[str]:
        """A rank has found segments; keys of what it is to load then."""
        self.staging.update(
            {name: Found(1, {name: "valkey"} if tiers is None else tiers) for name in names}, {}
        )
        return [plan.key for plan in self.step()[1]]

    def miss(self, *names: str, no_answer: NoAnswer | None = None) -> None:
        self.staging.update({name: Found(1, {}, no_answer) for name in names}, {})

    def load(self, *keys: str, is_here: bool = True) -> None:
        """Loads ended on a rank."""
        self.staging.update({}, {key: Loaded(1, is_here) for key in keys})

    def fetch(self, *names: str) -> None:
        """A rank finds and loads segments."""
        self.load(*self.find(*names))


def kv_name(key: str = "cat", ordinal: int = 0) -> str:
    return variant_key(key, str(ordinal))


def test_a_request_waits_until_its_segments_are_there() -> None:
    world = World()
    assert world.waits("1", item())
    lookups, loads = world.step()
    assert [(plan.kind, plan.keys[0]) for plan in lookups] == [
        ("kv", kv_name()),
        ("encoder", "cat rows"),
    ]
    assert not loads
    assert world.waits("1", item())
    assert world.step() == ([], [])  # it asks once

    assert world.find(kv_name(), "cat rows") == [kv_name(), "cat rows"]
    assert world.waits("1", item())
    assert not world.segments.is_ready(kv_name())
    assert world.segments.used_bytes == KV_BYTES  # memory on its way is part of the books
    assert world.rows.used_bytes == ROW_BYTES
    world.load(kv_name())
    assert world.waits("1", item())
    world.load("cat rows")
    assert not world.waits("1", item())
    assert world.rows.is_ready("cat rows")
    assert world.donors.find(item()) == kv_name()
    assert world.staging.tier_of("1") == "valkey"


def test_what_is_not_found_is_not_waited_for() -> None:
    world = World()
    world.waits("1", item())
    world.step()
    world.miss(kv_name(), "cat rows")
    assert not world.waits("1", item())
    assert world.step() == ([], [])
    assert len(world.segments) == len(world.rows) == 0
    assert world.staging.tier_of("1") is None


def test_nobody_waits_longer_than_the_deadline_and_what_comes_late_is_kept() -> None:
    world = World()
    assert world.waits("1", item())
    world.step()
    world.now = 0.9
    assert world.find(kv_name()) == [kv_name()]
    assert world.waits("1", item())
    world.now = 1.0
    assert not world.waits("1", item())
    world.load(kv_name())
    assert world.donors.find(item()) == kv_name()


def test_what_is_found_too_late_is_not_loaded() -> None:
    world = World()
    world.waits("1", item())
    world.step()
    world.now = 1.0
    assert world.find(kv_name(), "cat rows") == []
    assert len(world.segments) == len(world.rows) == 0
    assert world.staging.lookup("1", item()) == Lookup(item(), "late", "valkey")


def test_a_load_says_how_long_it_is_waited_for_by_the_last_who_asked() -> None:
    world = World()
    world.waits("1", item())
    world.now = 0.75
    world.waits("2", item())
    world.step()
    world.now = 1.25
    world.staging.update({kv_name(): Found(1, {kv_name(): "fs"})}, {})
    [load] = world.step()[1]
    assert load == LoadPlan(kv_name(), "kv", 4, seconds_left=0.5)


def test_two_requests_share_a_fetch() -> None:
    world = World()
    assert world.waits("1", item())
    assert world.waits("2", item(ordinal=0))
    lookups, _ = world.step()
    assert len(lookups) == 2
    world.fetch(kv_name(), "cat rows")
    assert not world.waits("1", item())
    assert not world.waits("2", item())
    assert world.staging.tier_of("2") == "valkey"


def test_what_is_known_already_is_not_looked_for() -> None:
    world = World()
    assert world.donors.reserve(item(), KV_BYTES) == kv_name()
    assert world.rows.reserve("cat rows", ROW_BYTES)
    assert not world.waits("1", item())
    assert world.step() == ([], [])


@pytest.mark.parametrize(
    ("saved_tokens", "expected"),
    [(4, []), (3, ["cat rows"])],  # all of its tokens; one is recomputed
)
def test_rows_that_no_token_needs_are_not_looked_for(
    saved_tokens: int, expected: list[str]
) -> None:
    world = World()
    assert world.donors.reserve(item(), KV_BYTES) == kv_name()
    world.segments.stored(kv_name(), 1)
    assert world.waits("1", item(), saved_tokens=saved_tokens) == bool(expected)
    assert [plan.keys[0] for plan in world.step()[0]] == expected


def test_a_reuse_that_saves_nothing_fetches_no_kv() -> None:
    world = World()
    assert world.waits("1", item(), saved_tokens=0)
    lookups, _ = world.step()
    assert [plan.kind for plan in lookups] == ["encoder"]


@pytest.mark.parametrize(
    ("allowed", "ordinal", "expected"),
    [
        (ALL, 1, [1, 0, 2, 3]),  # the same ordinal, a lone donor, other images in front
        (ALL, 6, [6, 0, 3, 2, 1]),
        (frozenset({"single_image", "same_ordinal"}), 2, [2]),
        (frozenset({"single_image"}), 0, [0]),
        (frozenset({"single_image"}), 1, []),
    ],
)
def test_the_best_variant_is_asked_for_first_and_no_forbidden_one(
    allowed: frozenset[Relation], ordinal: int, expected: list[int]
) -> None:
    world = World(allowed=allowed)
    world.waits("1", item(ordinal=ordinal))
    lookups, _ = world.step()
    keys = [plan.keys for plan in lookups if plan.kind == "kv"]
    assert keys == ([tuple(kv_name(ordinal=n) for n in expected)] if expected else [])


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        ({0: "valkey"}, 0),
        ({1: "valkey", 0: "valkey"}, 1),
        ({1: "valkey", 0: "fs"}, 0),  # the nearest tier
        ({2: "fs", 3: "fs"}, 2),
    ],
)
def test_the_best_variant_of_the_nearest_tier_is_loaded(
    tiers: dict[int, str], expected: int
) -> None:
    world = World()
    world.waits("1", item(ordinal=1))
    world.step()
    found = {kv_name(ordinal=n): tier for n, tier in tiers.items()}
    key = kv_name(ordinal=expected)
    assert world.find(kv_name(ordinal=1), tiers=found) == [key]
    world.load(key)
    assert world.donors.find(item(ordinal=1)) == key
    assert world.staging.lookup("1", item(ordinal=1)).tier == tiers[expected]


def test_all_ranks_have_to_find_the_same() -> None:
    first, second = Found(1, {"a": "fs", "b": "fs"}), Found(1, {"b": "valkey", "c": "fs"})
    assert first.merge(second) == second.merge(first) == Found(2, {"b": "valkey"})

    world = World(num_ranks=2)
    world.waits("1", item(ordinal=1))
    world.step()
    name, other = kv_name(ordinal=1), kv_name(ordinal=0)
    assert world.find(name, tiers={name: "fs", other: "fs"}) == []
    assert world.waits("1", item(ordinal=1))
    assert world.find(name, tiers={other: "fs"}) == [other]
    world.load(other)
    assert world.donors.find(item(ordinal=1)) is None
    world.load(other)
    assert world.donors.find(item(ordinal=1)) == other


def test_a_load_that_fails_on_a_rank_is_dropped_on_all() -> None:
    world = World(num_ranks=2)
    world.waits("1", item())
    world.step()
    world.find(kv_name())
    assert world.find(kv_name()) == [kv_name()]
    world.load(kv_name())
    world.load(kv_name(), is_here=False)
    assert world.segments.take_evicted() == [kv_name()]
    assert world.donors.find(item()) is None
    assert world.staging.lookup("1", item()) == Lookup(item(), "failed", "valkey")


def test_a_segment_without_room_is_not_loaded() -> None:
    world = World(budget=KV_BYTES - 1)
    world.waits("1", item())
    world.step()
    assert world.find(kv_name()) == []
    assert len(world.segments) == 0
    assert world.staging.lookup("1", item()) == Lookup(item(), "skipped", "valkey")


def test_a_segment_that_does_not_pay_is_not_loaded_but_now_and_then() -> None:
    world = World(slow_tiers=frozenset({"valkey"}))
    loads = 0
    for number in range(40):
        name = f"image {number}"
        world.waits(name, item(name))
        world.step()
        keys = world.find(kv_name(name))
        loads += len(keys)
        expected = "late" if keys else "skipped"
        assert world.staging.lookup(name, item(name)).outcome == expected
        world.load(*keys)
        world.find(f"{name} rows")  # nothing is saved by knowing how long they take
    assert loads == 2
    assert set(world.asked_whether_worth) == {("valkey", KV_BYTES, 4)}


def test_what_was_loaded_is_not_evicted_before_it_was_used() -> None:
    world = World(budget=KV_BYTES)
    world.waits("1", item())
    world.step()
    world.fetch(kv_name())
    assert not world.segments.reserve("another", KV_BYTES)
    world.step()
    assert not world.segments.reserve("another", KV_BYTES)
    world.step()
    assert world.segments.reserve("another", KV_BYTES)


def test_a_request_that_ended_leaves_nothing_behind() -> None:
    world = World()
    world.waits("1", item())
    world.step()
    world.staging.forget("1")
    world.fetch(kv_name(), "cat rows")
    assert world.segments.is_ready(kv_name())
    assert world.rows.is_ready("cat rows")
    assert not world.staging._tickets
    assert not world.staging._running
    assert not world.staging._loading


def test_a_lookup_tells_what_became_of_an_items_kv() -> None:
    world = World()
    names = ("cat", "dog", "cow", "hen")
    items = [replace(item(name), index=index) for index, name in enumerate(names)]
    found, missing, unasked, broken = items
    world.waits("1", *items)
    world.step()
    assert [world.staging.lookup("1", image) for image in items] == [
        Lookup(image, "late") for image in items
    ]
    world.fetch(kv_name("cat"))
    world.miss(kv_name("dog"))
    world.miss(kv_name("cow"), no_answer="skipped")
    world.miss(kv_name("hen"), no_answer="failed")
    assert world.staging.lookup("1", found) == Lookup(found, "hit", "valkey")
    assert world.staging.lookup("1", missing) == Lookup(missing, "miss")
    assert world.staging.lookup("1", unasked) == Lookup(unasked, "skipped")
    assert world.staging.lookup("1", broken) == Lookup(broken, "failed")
    assert world.staging.lookup("2", found) == Lookup(found, "miss")  # it never asked


def test_an_item_that_was_not_to_be_fetched_is_no_late_one() -> None:
    world = World()
    world.waits("1", item(), saved_tokens=0)
    assert world.staging.lookup("1", item()) == Lookup(item(), "miss")


def test_the_time_that_a_request_waited_ends_with_the_wait() -> None:
    world = World()
    assert world.waits("1", item())
    world.step()
    assert world.staging.waited_seconds("1") is None
    world.now = 0.25
    world.miss(kv_name(), "cat rows")
    assert not world.waits("1", item())
    world.now = 0.5
    assert not world.waits("1", item())
    assert world.staging.waited_seconds("1") == 0.25


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((None, None), None),
        (("skipped", None), "skipped"),
        ((None, "failed"), "failed"),
        (("failed", "skipped"), "failed"),
    ],
)
def test_of_two_ranks_without_an_answer_the_failed_one_is_told(
    answers: tuple[NoAnswer | None, NoAnswer | None], expected: NoAnswer | None
) -> None:
    first, second = (Found(1, {}, answer) for answer in answers)
    assert first.merge(second).no_answer == second.merge(first).no_answer == expected


def test_what_was_under_way_when_the_weights_changed_is_thrown_away() -> None:
    world = World()
    assert world.waits("loading", item("ant"))
    assert world.waits("looking", item("cat"))
    world.step()
    world.find(kv_name("ant"), "ant rows")
    world.staging.reset()
    world.segments.clear()
    world.rows.clear()
    world.segments.take_evicted()
    world.load(kv_name("ant"), "ant rows")
    assert kv_name("ant") in world.segments.take_evicted()  # workers are to drop it
    assert "ant rows" in world.rows.take_evicted()
    assert world.find(kv_name("cat"), "cat rows") == []
    assert len(world.segments) == len(world.rows) == 0


def test_a_request_that_waits_asks_anew_when_the_weights_changed() -> None:
    world = World()
    assert world.waits("1", item())
    world.staging.reset()  # before the workers heard of it
    assert world.step() == ([], [])
    assert world.waits("1", item())
    lookups, _ = world.step()
    assert [plan.keys[0] for plan in lookups] == [kv_name(), "cat rows"]
    world.fetch(kv_name(), "cat rows")
    assert not world.waits("1", item())


def test_a_lookup_says_how_many_tokens_and_rows_there_must_be() -> None:
    world = World()
    made = replace(item(), embeds=(Span(0, 1), Span(2, 4)))
    world.waits("1", made)
    lookups, _ = world.step()
    assert [(plan.kind, plan.num_tokens) for plan in lookups] == [("kv", 4), ("encoder", 3)]

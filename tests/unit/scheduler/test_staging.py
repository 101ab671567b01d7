"""Fetches before promises: who waits for what, for how long, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from vlcache_connector.calibration import RELATIONS, Relation
from vlcache_connector.keys import variant_key
from vlcache_connector.protocol import Fetched, FetchPlan, Item, Span
from vlcache_connector.scheduler.donors import Donors
from vlcache_connector.scheduler.index import ResidencyIndex
from vlcache_connector.scheduler.requests import Lookup
from vlcache_connector.scheduler.staging import Staging
from vlcache_connector.tiers import NoAnswer

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
        max_bytes: int = 1000,
        allowed: frozenset[Relation] = ALL,
    ) -> None:
        self.now = 0.0
        self.segments = ResidencyIndex(budget, num_ranks)
        self.rows = ResidencyIndex(budget, num_ranks)
        self.donors = Donors(self.segments, allowed=allowed, max_variants=2)
        self.staging = Staging(
            self.segments,
            self.rows,
            self.donors,
            num_ranks=num_ranks,
            deadline_seconds=1.0,
            max_bytes=max_bytes,
            clock=lambda: self.now,
        )

    def waits(self, req_id: str, *items: Item, saved_tokens: int = 4) -> bool:
        return self.staging.is_pending(
            req_id, items, lambda _: KV_BYTES, lambda _: ROW_BYTES, lambda _: saved_tokens
        )

    def step(self) -> tuple[Sequence[FetchPlan], Sequence[str], Sequence[str]]:
        plans = self.staging.take_plans()
        for index in (self.segments, self.rows):
            index.settle()
        return plans

    def end(self, *names: str, key: str | None = None, tier: str = "redis", ranks: int = 1) -> None:
        self.staging.update(
            {name: Fetched(ranks, key or name, tier, num_bytes=KV_BYTES) for name in names}
        )

    def miss(self, *names: str, no_answer: NoAnswer | None = None) -> None:
        tier = "redis" if no_answer else None
        self.staging.update({name: Fetched(1, None, tier, 0, no_answer) for name in names})


def kv_name(key: str = "cat", ordinal: int = 0) -> str:
    return variant_key(key, str(ordinal))


def test_a_request_waits_until_its_segments_are_there() -> None:
    world = World()
    assert world.waits("1", item())
    fetches, _, _ = world.step()
    assert [(plan.kind, plan.keys[0]) for plan in fetches] == [
        ("kv", kv_name()),
        ("encoder", "cat rows"),
    ]
    assert world.waits("1", item())
    assert world.step() == ([], [], [])  # it asks once

    world.end(kv_name(), "cat rows")
    # KV may be claimed in the step that is being planned, encoder rows when they are there.
    assert world.segments.is_ready(kv_name())
    assert not world.rows.is_ready("cat rows")
    assert world.step() == ([], [kv_name(), "cat rows"], [])
    assert world.waits("1", item())
    world.rows.stored("cat rows", 1)
    assert not world.waits("1", item())
    assert world.donors.find(item()) == kv_name()
    assert world.staging.tier_of("1") == "redis"


def test_what_is_not_found_is_not_waited_for() -> None:
    world = World()
    world.waits("1", item())
    world.step()
    world.miss(kv_name(), "cat rows")
    assert not world.waits("1", item())
    assert world.step() == ([], [], [])
    assert len(world.segments) == len(world.rows) == 0
    assert world.staging.tier_of("1") is None


def test_nobody_waits_longer_than_the_deadline_and_what_comes_late_is_kept() -> None:
    world = World()
    assert world.waits("1", item())
    world.step()
    world.now = 0.99
    assert world.waits("1", item())
    world.now = 1.0
    assert not world.waits("1", item())
    world.end(kv_name())
    assert world.donors.find(item()) == kv_name()


def test_two_requests_share_a_fetch() -> None:
    world = World()
    assert world.waits("1", item())
    assert world.waits("2", item(ordinal=0))
    fetches, _, _ = world.step()
    assert len(fetches) == 2
    world.end(kv_name(), "cat rows")
    world.step()
    world.rows.stored("cat rows", 1)
    assert not world.waits("1", item())
    assert not world.waits("2", item())
    assert world.staging.tier_of("2") == "redis"


def test_what_is_known_already_is_not_fetched() -> None:
    world = World()
    assert world.donors.reserve(item(), KV_BYTES) == kv_name()
    assert world.rows.reserve("cat rows", ROW_BYTES)
    assert not world.waits("1", item())
    assert world.step() == ([], [], [])


def test_a_reuse_that_saves_nothing_fetches_no_kv() -> None:
    world = World()
    assert world.waits("1", item(), saved_tokens=0)
    fetches, _, _ = world.step()
    assert [plan.kind for plan in fetches] == ["encoder"]


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
    fetches, _, _ = world.step()
    keys = [plan.keys for plan in fetches if plan.kind == "kv"]
    assert keys == ([tuple(kv_name(ordinal=n) for n in expected)] if expected else [])


def test_another_variant_than_the_best_is_taken_as_what_it_is() -> None:
    world = World()
    world.waits("1", item(ordinal=1))
    world.step()
    world.end(kv_name(ordinal=1), key=kv_name(ordinal=0))
    assert world.donors.find(item(ordinal=1)) == kv_name(ordinal=0)
    assert world.step()[1] == [kv_name(ordinal=1)]  # fetches go by the name they were asked by


@pytest.mark.parametrize("second", ["other", "none", "same"])
def test_all_ranks_have_to_find_the_same(second: str) -> None:
    world = World(num_ranks=2)
    world.waits("1", item(ordinal=1))
    world.step()
    name = kv_name(ordinal=1)
    world.end(name, key=name)
    assert world.waits("1", item(ordinal=1))
    assert world.donors.find(item(ordinal=1)) is None
    if second == "none":
        world.miss(name)
    else:
        world.end(name, key=name if second == "same" else kv_name(ordinal=0))
    _, admitted, unwanted = world.step()
    expected = ([name], []) if second == "same" else ([], [name])
    assert (admitted, unwanted) == expected
    assert (world.donors.find(item(ordinal=1)) == name) == (second == "same")


def test_a_segment_without_room_is_thrown_away() -> None:
    world = World(budget=KV_BYTES - 1)
    world.waits("1", item())
    world.step()
    world.end(kv_name())
    assert world.step() == ([], [], [kv_name()])
    assert len(world.segments) == 0


def test_what_was_fetched_is_not_evicted_before_it_was_used() -> None:
    world = World(budget=KV_BYTES)
    world.waits("1", item())
    world.step()
    world.end(kv_name())
    assert not world.segments.reserve("another", KV_BYTES)
    world.step()
    assert not world.segments.reserve("another", KV_BYTES)
    world.step()
    assert world.segments.reserve("another", KV_BYTES)


def test_fetches_wait_for_each_other_when_memory_is_short() -> None:
    world = World(max_bytes=KV_BYTES + ROW_BYTES)
    assert world.waits("1", item("cat"))
    assert world.waits("2", item("dog"))
    assert len(world.step()[0]) == 2
    world.miss(kv_name("cat"), "cat rows")
    assert world.waits("2", item("dog"))
    assert {plan.keys[0] for plan in world.step()[0]} == {kv_name("dog"), "dog rows"}


def test_a_request_that_ended_leaves_nothing_behind() -> None:
    world = World()
    world.waits("1", item())
    world.step()
    world.staging.forget("1")
    world.end(kv_name(), "cat rows")
    world.step()
    world.rows.stored("cat rows", 1)
    world.step()
    assert world.segments.is_ready(kv_name())
    assert not world.staging._tickets
    assert not world.staging._running


def test_encoder_rows_that_found_no_room_are_not_promised() -> None:
    world = World()
    world.waits("1", item(), saved_tokens=0)
    world.step()
    world.end("cat rows")
    world.step()
    assert world.waits("1", item(), saved_tokens=0)
    world.rows.lost("cat rows")
    assert not world.waits("1", item(), saved_tokens=0)
    assert not world.rows.is_ready("cat rows")
    assert not world.staging._running


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
    world.end(kv_name("cat"))
    world.miss(kv_name("dog"))
    world.miss(kv_name("cow"), no_answer="skipped")
    world.miss(kv_name("hen"), no_answer="failed")
    assert world.staging.lookup("1", found) == Lookup(found, "hit", "redis")
    assert world.staging.lookup("1", missing) == Lookup(missing, "miss")
    assert world.staging.lookup("1", unasked) == Lookup(unasked, "skipped", "redis")
    assert world.staging.lookup("1", broken) == Lookup(broken, "failed", "redis")
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
    first, second = (Fetched(1, None, None, 0, answer) for answer in answers)
    assert first.merge(second).no_answer == second.merge(first).no_answer == expected


def test_what_was_under_way_when_the_weights_changed_is_thrown_away() -> None:
    world = World()
    assert world.waits("settled", item("ant"))
    assert world.waits("running", item("cat"))
    world.step()
    world.end(kv_name("ant"), "ant rows")  # to be admitted in the next step
    world.staging.reset()
    world.segments.clear()
    world.rows.clear()
    assert world.step() == ([], [], [kv_name("ant"), "ant rows"])
    world.end(kv_name("cat"), "cat rows")
    assert len(world.segments) == len(world.rows) == 0
    assert world.step() == ([], [], [kv_name("cat"), "cat rows"])


def test_a_request_that_waits_asks_anew_when_the_weights_changed() -> None:
    world = World()
    assert world.waits("1", item())
    world.staging.reset()  # before the workers heard of it
    assert world.waits("1", item())
    fetches, _, _ = world.step()
    assert [plan.keys[0] for plan in fetches] == [kv_name(), "cat rows"]
    world.staging.reset()
    assert world.waits("1", item())
    assert world.step() == ([], [], [])  # what runs is of before: it is waited for, and not taken
    world.end(kv_name(), "cat rows")
    assert not world.waits("1", item())
    assert len(world.segments) == len(world.rows) == 0


def test_a_fetch_says_how_many_tokens_and_rows_there_must_be() -> None:
    world = World()
    made = replace(item(), embeds=(Span(0, 1), Span(2, 4)))
    world.waits("1", made)
    fetches, _, _ = world.step()
    assert [(plan.kind, plan.num_tokens) for plan in fetches] == [("kv", 4), ("encoder", 3)]

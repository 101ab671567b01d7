"""What the scheduler side counts: events by their metric, ranks once, gauges when they change."""

from __future__ import annotations

from functools import reduce
from typing import Any, get_args

import pytest

from vlcache_connector import metrics
from vlcache_connector.config import ADAPTER_TYPES
from vlcache_connector.metrics import Metric, VLCacheStats
from vlcache_connector.protocol import (
    EncoderReport,
    ItemReuse,
    Outcome,
    PrefillFigures,
    ReusePlan,
    Span,
    Stage,
    StepReport,
    TierState,
    TTFTPart,
    WorkerState,
)
from vlcache_connector.scheduler.index import ResidencyIndex
from vlcache_connector.scheduler.requests import Claimed, HeldBack, Loaded, Refusal, Staged
from vlcache_connector.scheduler.statistics import Statistics
from vlcache_connector.storage.header import RefusalReason


class World:
    """Statistics over two indices of two ranks."""

    def __init__(self) -> None:
        self.segments = ResidencyIndex(100, 2)
        self.rows = ResidencyIndex(100, 2)
        self.statistics = Statistics({"kv": self.segments, "encoder": self.rows})
        self.start = self.statistics.take()

    def taken(self, metric: Metric) -> dict[tuple[str, ...], Any]:
        """What is new of one metric; the rest is thrown away."""
        return values(self.statistics.take(), metric)


def values(stats: VLCacheStats | None, metric: Metric) -> dict[tuple[str, ...], Any]:
    return {} if stats is None else stats.data.get(metric.name, {})


@pytest.fixture
def world() -> World:
    return World()


def state(
    tokens_per_second: float | None = 1000.0,
    guard: str = "closed",
    latency: float | None = 0.5,
    speed: float | None = 100.0,
) -> WorkerState:
    return WorkerState(tokens_per_second, {"fs": TierState(guard, latency, speed)})


def loaded_request(figures: PrefillFigures) -> Loaded:
    """A request with two images of 20 tokens each, behind 10 tokens of text each."""
    reused = tuple(
        ItemReuse(i, f"key {i}", Span(start, start + 20), (Stage(0, (Span(start, start + 2),)),))
        for i, start in enumerate((10, 40))
    )
    staged = Staged((), "fs")
    claimed = Claimed(ReusePlan(Span(0, 60), reused, "r", ()), {0: "cpu", 1: "fs"}, staged)
    return claimed.loaded(figures)


FIGURES = PrefillFigures({0: 18, 1: 18}, 4, (24, 24))
SECONDS: dict[TTFTPart, float] = {"staging": 0.125, "load": 0.5, "sparse_prefill": 0.25}


def test_nothing_is_told_while_nothing_happens(world: World) -> None:
    assert world.start is not None  # of the gauges
    assert world.statistics.take() is None
    world.statistics.take_report(StepReport())
    assert world.statistics.take() is None


def test_what_was_taken_is_new_once_and_is_still_known_by_name(world: World) -> None:
    world.statistics.happened("refused.gate")
    assert world.taken(metrics.REFUSED) == {("gate",): 1}
    assert world.statistics.take() is None
    world.statistics.happened("refused.gate")
    assert world.taken(metrics.REFUSED) == {("gate",): 1}
    assert world.statistics.events == {"refused.gate": 2}


EVENTS = {
    **{
        f"refused.{reason}": (metrics.REFUSED, reason)
        for reason in (*get_args(Refusal), *get_args(HeldBack))
    },
    **{f"fs.refused.{reason}": (metrics.REFUSED, reason) for reason in get_args(RefusalReason)},
    **{f"{tier}.read.bytes": (metrics.READ_BYTES, tier) for tier in ADAPTER_TYPES},
    **{f"{tier}.write.bytes": (metrics.WRITTEN_BYTES, tier) for tier in ADAPTER_TYPES},
    "refused.not_worth": (metrics.REFUSED, "not_worth"),
    "valkey.lookup.late": (metrics.FELL_BACK, "tier_lookup"),
    "valkey.load.failed": (metrics.FELL_BACK, "tier_load"),
    "valkey.store.failed": (metrics.FELL_BACK, "tier_store"),
    "valkey.lookup.skipped": (metrics.REFUSED, "left_alone"),
    "valkey.store.skipped": (metrics.REFUSED, "left_alone"),
    "valkey.store.queue_full": (metrics.REFUSED, "queue_full"),
    "failed.fetch": (metrics.FELL_BACK, "fetch"),
    **{
        f"failed.{what}": (metrics.FELL_BACK, what)
        for what in ("read", "plan", "store", "canonical")
    },
}


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_is_counted_by_its_metric_under_a_label_of_the_table(
    world: World, event: str
) -> None:
    metric, label = EVENTS[event]
    [allowed] = metric.labels.values()
    assert label in allowed
    world.statistics.take_report(StepReport(events={event: 3}))
    stats = world.statistics.take()
    assert stats is not None
    assert stats.data == {metric.name: {(label,): 3}}


@pytest.mark.parametrize("event", ["fs.rebuilt", "failed.load", "failed.sparse prefill"])
def test_what_no_metric_counts_is_known_by_name_only(world: World, event: str) -> None:
    world.statistics.happened(event)
    assert world.statistics.take() is None
    assert world.statistics.events == {event: 1}


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_lookups_are_counted_by_tier_and_outcome(world: World, outcome: Outcome) -> None:
    assert set(get_args(Outcome)) == set(metrics.OUTCOMES)
    world.statistics.looked_up(None, outcome)
    world.statistics.looked_up("valkey", outcome)
    stats = world.statistics.take()
    assert values(stats, metrics.LOOKUPS) == {("none", outcome): 1, ("valkey", outcome): 1}
    late = {("late",): 2} if outcome == "late" else {}
    assert values(stats, metrics.REFUSED) == late


def test_a_loaded_request_is_counted_by_the_tiers_of_its_images(world: World) -> None:
    world.statistics.take_report(StepReport(states={0: state(tokens_per_second=20.0)}))
    world.statistics.loaded(loaded_request(FIGURES), {**SECONDS, "forward": 9.0})
    stats = world.statistics.take()
    assert values(stats, metrics.LOOKUPS) == {("cpu", "hit"): 1, ("fs", "hit"): 1}
    assert values(stats, metrics.REUSED_TOKENS) == {("cpu",): 18, ("fs",): 18}
    assert values(stats, metrics.RECOMPUTED_TOKENS) == {(): 4}
    assert values(stats, metrics.SPARSE_PREFILL_TOKENS) == {(): 24}
    # 60 claimed tokens would have taken 3 s.
    assert values(stats, metrics.NET_SAVED_SECONDS) == {(): pytest.approx(3 - 0.875)}
    assert values(stats, metrics.FELL_BACK) == {}


@pytest.mark.parametrize(("speed", "saved"), [(None, {}), (100.0, {(): 0.6 - 0.875})])
def test_a_request_that_lost_time_counts_and_one_of_unknown_worth_does_not(
    world: World, speed: float | None, saved: dict[tuple[str, ...], float]
) -> None:
    world.statistics.take_report(StepReport(states={0: state(tokens_per_second=speed)}))
    world.statistics.loaded(loaded_request(FIGURES), SECONDS)
    assert world.taken(metrics.NET_SAVED_SECONDS) == pytest.approx(saved)


@pytest.mark.parametrize("part", SECONDS)
def test_nothing_is_saved_by_a_load_of_unknown_cost(world: World, part: TTFTPart) -> None:
    world.statistics.take_report(StepReport(states={0: state()}))
    known = {other: took for other, took in SECONDS.items() if other != part}
    world.statistics.loaded(loaded_request(FIGURES), known)
    assert world.taken(metrics.NET_SAVED_SECONDS) == {}


def test_parts_of_the_time_to_first_token_are_observed_by_tier(world: World) -> None:
    assert set(get_args(TTFTPart)) == set(metrics.PARTS)
    world.statistics.answered({"queue": 0.5, "forward": 0.25}, None)
    world.statistics.answered({"queue": 0.75, "staging": 0.0}, "valkey")
    assert world.taken(metrics.TTFT_PART_SECONDS) == {
        ("queue", "none"): [0.5],
        ("forward", "none"): [0.25],
        ("queue", "valkey"): [0.75],
        ("staging", "valkey"): [0.0],
    }


def test_what_requests_wait_for_in_vain_is_lost(world: World) -> None:
    world.statistics.waited_in_vain(0.0)
    assert world.taken(metrics.NET_SAVED_SECONDS) == {}
    world.statistics.waited_in_vain(0.25)
    world.statistics.waited_in_vain(0.5)
    assert world.taken(metrics.NET_SAVED_SECONDS) == {(): -0.75}


def test_what_was_lost_at_the_load_is_a_failed_lookup_and_a_fallback(world: World) -> None:
    figures = PrefillFigures({0: 18}, 2, (42, 42), fallback="segment lost")
    world.statistics.loaded(loaded_request(figures), SECONDS)
    stats = world.statistics.take()
    assert values(stats, metrics.LOOKUPS) == {("cpu", "hit"): 1, ("fs", "failed"): 1}
    assert values(stats, metrics.FELL_BACK) == {("segment_lost",): 1}
    assert values(stats, metrics.REUSED_TOKENS)[("cpu",)] == 18
    world.statistics.loaded(loaded_request(PrefillFigures(fallback="failed")), {})
    stats = world.statistics.take()
    assert values(stats, metrics.LOOKUPS) == {("cpu", "failed"): 1, ("fs", "failed"): 1}
    assert values(stats, metrics.FELL_BACK) == {("failed",): 1}


def test_two_ranks_sum_their_bytes_and_count_tokens_and_segments_once(world: World) -> None:
    for index in (world.segments, world.rows):
        index.reserve("a", 10)
    ranks = [
        StepReport(
            stored={"a": 1},
            encoder=EncoderReport({"a": 1}),
            figures={"r": FIGURES},
            events={"fs.read.bytes": 100 + rank},
            states={rank: state()},
        )
        for rank in range(2)
    ]
    report = reduce(StepReport.aggregate, ranks)
    for key, count in report.stored.items():
        world.segments.stored(key, count)
    for key, count in report.encoder.stored.items():
        world.rows.stored(key, count)
    world.statistics.take_report(report)
    [figures] = report.figures.values()
    world.statistics.loaded(loaded_request(figures), SECONDS)
    stats = world.statistics.take()
    assert values(stats, metrics.READ_BYTES) == {("fs",): 201}
    assert values(stats, metrics.STORED_SEGMENTS) == {("kv",): 1, ("encoder",): 1}
    assert values(stats, metrics.STORED_BYTES) == {("kv",): 10, ("encoder",): 10}
    assert values(stats, metrics.LOOKUPS) == {("cpu", "hit"): 1, ("fs", "hit"): 1}
    assert values(stats, metrics.REUSED_TOKENS) == {("cpu",): 18, ("fs",): 18}
    assert values(stats, metrics.SPARSE_PREFILL_TOKENS) == {(): 24}


def test_gauges_are_those_of_the_slowest_rank_whoever_reports(world: World) -> None:
    slow = state(500.0, "half_open", latency=0.75, speed=None)
    fast = state(900.0, "closed", latency=0.25, speed=100.0)
    world.statistics.take_report(
        StepReport(states={0: slow}).aggregate(StepReport(states={1: fast}))
    )
    stats = world.statistics.take()
    assert values(stats, metrics.PREFILL_TOKENS_PER_SECOND) == {(): 500.0}
    assert values(stats, metrics.GUARD_STATE) == {("fs",): 1}
    assert values(stats, metrics.TIER_LATENCY_SECONDS) == {("fs",): 0.75}
    assert values(stats, metrics.TIER_BYTES_PER_SECOND) == {("fs",): 100.0}
    # A step in which only the fast one has news.
    world.statistics.take_report(StepReport(states={1: state(800.0, "open", 0.25, 50.0)}))
    stats = world.statistics.take()
    assert stats is not None
    assert stats.data == {
        metrics.GUARD_STATE.name: {("fs",): 2},
        metrics.TIER_BYTES_PER_SECOND.name: {("fs",): 50.0},
    }


def test_segments_in_host_memory(world: World) -> None:
    for key in "ab":
        assert world.segments.reserve(key, 50)
        world.segments.stored(key, 2)
    world.segments.promise("b")
    world.rows.reserve("rows", 10)
    world.rows.stored("rows", 2)
    world.rows.promise("rows")
    stats = world.statistics.take()
    assert values(stats, metrics.STORED_SEGMENTS) == {("kv",): 2, ("encoder",): 1}
    assert values(stats, metrics.STORED_BYTES) == {("kv",): 100, ("encoder",): 10}
    assert values(stats, metrics.PINNED_SEGMENTS) == {(): 2}
    assert world.segments.reserve("c", 50)
    assert not world.segments.reserve("d", 50)
    for index in (world.segments, world.rows):
        index.settle()
        index.settle()
    stats = world.statistics.take()
    assert values(stats, metrics.EVICTED_SEGMENTS) == {("kv",): 1}
    assert values(stats, metrics.REFUSED) == {("no_room",): 1}
    assert values(stats, metrics.PINNED_SEGMENTS) == {(): 0}
    assert values(stats, metrics.STORED_BYTES) == {}  # as many as before
    world.rows.clear()
    stats = world.statistics.take()
    assert values(stats, metrics.EVICTED_SEGMENTS) == {}
    assert values(stats, metrics.STORED_BYTES) == {("encoder",): 0}


def test_how_long_a_load_takes_is_that_of_the_slowest_rank_that_knows(world: World) -> None:
    assert world.statistics.read_seconds("fs", 100) is None
    slow, fast = state(latency=0.5, speed=50.0), state(latency=0.25, speed=None)
    world.statistics.take_report(StepReport(states={0: slow, 1: fast, 2: state(latency=None)}))
    assert world.statistics.read_seconds("fs", 100) == 2.5
    assert world.statistics.read_seconds("valkey", 100) is None

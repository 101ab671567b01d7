"""The types that cross between the sides: spans, plans that lose an item, merged reports."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_connector.protocol import (
    EncoderStepReport,
    Item,
    PrefillFigures,
    ReusedSpan,
    ReusePlan,
    Span,
    StepReport,
    uncovered,
)

property_test = settings(deadline=None, max_examples=40)
keys = st.sampled_from(["a", "b", "c", "d"])
counts = st.integers(0, 1000)
seconds = st.floats(0, 10)


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start = draw(st.integers(0, 40))
    return Span(start, start + draw(st.integers(0, 40)))


@st.composite
def plans(draw: st.DrawFn) -> ReusePlan:
    """A plan with up to three reused stretches of each of up to four items."""
    position = start = draw(st.integers(0, 20))
    reused = []
    for item in range(draw(st.integers(0, 4))):
        position += draw(st.integers(0, 5))
        for _ in range(draw(st.integers(1, 3))):
            end = position + draw(st.integers(1, 9))
            reused.append(ReusedSpan(item, Span(position, end)))
            position = end + draw(st.integers(0, 3))
    claim = Span(start, position + draw(st.integers(1, 5)))
    return ReusePlan(
        req_id="request",
        claim=claim,
        runs=tuple(uncovered(claim, [part.span for part in reused])),
        reused=tuple(reused),
        recomputed=draw(counts),
        captures={7: "key"},
        block_ids=(3, 1, 2),
    )


figures = st.builds(
    PrefillFigures,
    reused_tokens=counts,
    recomputed_tokens=counts,
    computed_tokens=counts,
    load_seconds=seconds,
    sparse_prefill_seconds=seconds,
    fallback=st.none() | st.just("error"),
)
reports = st.builds(
    StepReport,
    stored=st.dictionaries(keys, st.integers(1, 2)),
    lost=st.sets(keys),
    encoder_stored=st.dictionaries(keys, st.integers(1, 2)),
    encoder_lost=st.sets(keys),
    figures=st.dictionaries(keys, figures),
    failures=st.dictionaries(keys, st.integers(1, 2)),
)
encoder_reports = st.builds(EncoderStepReport, stored=st.sets(keys), lost=st.sets(keys))


def tokens(*parts: Span) -> list[int]:
    return [token for part in parts for token in range(part.start, part.end)]


def assert_partitions(plan: ReusePlan) -> None:
    """Runs and reused spans together are the claim, and the runs are maximal and in order."""
    assert sorted(tokens(*plan.runs, *(part.span for part in plan.reused))) == tokens(plan.claim)
    assert all(plan.runs)
    assert all(run.end < following.start for run, following in pairwise(plan.runs))


@property_test
@given(span=spans(), window=spans())
def test_a_clipped_span_holds_exactly_the_common_tokens(span: Span, window: Span) -> None:
    clipped = span.clip(window.start, window.end)
    assert set(tokens(clipped)) == set(tokens(span)) & set(tokens(window))


@property_test
@given(span=spans(), window=spans())
def test_a_clipped_span_lies_in_its_window_even_when_empty(span: Span, window: Span) -> None:
    clipped = span.clip(window.start, window.end)
    assert window.start <= clipped.start <= clipped.end <= window.end
    assert bool(clipped) == (len(clipped) > 0)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((0, 20), Span(5, 9)),
        ((6, 8), Span(6, 8)),
        ((0, 7), Span(5, 7)),
        ((7, 20), Span(7, 9)),
        ((0, 5), Span(5, 5)),
        ((9, 12), Span(9, 9)),
        ((0, 3), Span(3, 3)),
        ((12, 15), Span(12, 12)),
    ],
)
def test_clip_by_example(window: tuple[int, int], expected: Span) -> None:
    assert Span(5, 9).clip(*window) == expected


@property_test
@given(plan=plans())
def test_uncovered_stretches_are_maximal_and_complete(plan: ReusePlan) -> None:
    assert_partitions(plan)


@pytest.mark.parametrize(
    ("covered", "expected"),
    [
        ([], [Span(2, 10)]),
        ([Span(2, 10)], []),
        ([Span(2, 4)], [Span(4, 10)]),
        ([Span(8, 10)], [Span(2, 8)]),
        ([Span(3, 4), Span(4, 6), Span(8, 9)], [Span(2, 3), Span(6, 8), Span(9, 10)]),
    ],
)
def test_uncovered_by_example(covered: list[Span], expected: list[Span]) -> None:
    assert uncovered(Span(2, 10), covered) == expected


def test_nothing_of_an_empty_span_is_uncovered() -> None:
    assert uncovered(Span(4, 4), []) == []


def test_an_item_has_a_row_for_every_token_that_takes_one() -> None:
    item = Item(index=0, span=Span(3, 8), key="kv", encoder_key="encoder")
    assert item.num_embeds == 5
    assert replace(item, is_embed=(False, True, True, False, True)).num_embeds == 3


@property_test
@given(plan=plans())
def test_a_plan_counts_its_tokens(plan: ReusePlan) -> None:
    assert plan.num_computed == len(tokens(*plan.runs))
    assert plan.num_computed + plan.num_reused == len(plan.claim)


@property_test
@given(plan=plans(), dropped=st.lists(st.integers(0, 5), max_size=4))
def test_a_plan_without_items_still_covers_its_claim_exactly(
    plan: ReusePlan, dropped: list[int]
) -> None:
    reduced = reduce(ReusePlan.without, dropped, plan)
    assert_partitions(reduced)
    assert reduced.reused == tuple(part for part in plan.reused if part.item not in dropped)


@property_test
@given(plan=plans(), item=st.integers(0, 5))
def test_tokens_of_an_item_that_is_dropped_count_as_recomputed(plan: ReusePlan, item: int) -> None:
    reduced = plan.without(item)
    assert reduced.recomputed - plan.recomputed == plan.num_reused - reduced.num_reused
    assert reduced.num_computed + reduced.num_reused == len(plan.claim)
    assert reduced.without(item) == reduced


@property_test
@given(plan=plans(), item=st.integers(0, 5))
def test_dropping_an_item_changes_nothing_else(plan: ReusePlan, item: int) -> None:
    reduced = plan.without(item)
    assert plan == replace(reduced, runs=plan.runs, reused=plan.reused, recomputed=plan.recomputed)


def test_figures_of_two_ranks_show_the_slower_one_and_the_lesser_reuse() -> None:
    fast = PrefillFigures(90, 10, 30, load_seconds=0.5, sparse_prefill_seconds=0.25)
    slow = PrefillFigures(
        0, 100, 120, load_seconds=0.25, sparse_prefill_seconds=1.5, fallback="segment lost"
    )
    expected = PrefillFigures(
        0, 100, 120, load_seconds=0.5, sparse_prefill_seconds=1.5, fallback="segment lost"
    )
    assert fast.merge(slow) == slow.merge(fast) == expected


@property_test
@given(a=figures, b=figures, c=figures)
def test_merging_figures_needs_no_order(
    a: PrefillFigures, b: PrefillFigures, c: PrefillFigures
) -> None:
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(a) == a


@property_test
@given(ranks=st.lists(reports, min_size=1, max_size=4))
def test_an_aggregate_counts_ranks_and_joins_losses(ranks: list[StepReport]) -> None:
    total = reduce(StepReport.aggregate, ranks)
    for key in "abcd":
        assert total.stored.get(key, 0) == sum(rank.stored.get(key, 0) for rank in ranks)
        assert total.encoder_stored.get(key, 0) == sum(
            rank.encoder_stored.get(key, 0) for rank in ranks
        )
        assert total.failures.get(key, 0) == sum(rank.failures.get(key, 0) for rank in ranks)
        assert (key in total.lost) == any(key in rank.lost for rank in ranks)
        assert (key in total.encoder_lost) == any(key in rank.encoder_lost for rank in ranks)


@property_test
@given(ranks=st.lists(reports, min_size=1, max_size=4))
def test_an_aggregate_merges_the_figures_of_every_request(ranks: list[StepReport]) -> None:
    total = reduce(StepReport.aggregate, ranks)
    for req_id in "abcd":
        own = [rank.figures[req_id] for rank in ranks if req_id in rank.figures]
        assert total.figures.get(req_id) == (reduce(PrefillFigures.merge, own) if own else None)


@property_test
@given(a=reports, b=reports)
def test_an_aggregate_does_not_depend_on_the_order_of_ranks(a: StepReport, b: StepReport) -> None:
    assert a.aggregate(b) == b.aggregate(a)


@property_test
@given(a=reports)
def test_a_rank_with_nothing_to_tell_changes_nothing(a: StepReport) -> None:
    assert a.aggregate(StepReport()) == StepReport().aggregate(a) == a


def test_aggregating_leaves_the_reports_of_the_ranks_alone() -> None:
    first = StepReport(stored={"a": 1}, lost={"b"}, figures={"r": PrefillFigures(1)})
    second = StepReport(stored={"a": 1}, lost={"c"}, figures={"r": PrefillFigures(0)})
    first.aggregate(second)
    assert first == StepReport(stored={"a": 1}, lost={"b"}, figures={"r": PrefillFigures(1)})
    assert second == StepReport(stored={"a": 1}, lost={"c"}, figures={"r": PrefillFigures(0)})


@pytest.mark.parametrize(
    "report",
    [
        StepReport(stored={"a": 1}),
        StepReport(lost={"a"}),
        StepReport(encoder_stored={"a": 1}),
        StepReport(encoder_lost={"a"}),
        StepReport(figures={"r": PrefillFigures()}),
        StepReport(failures={"load": 1}),
    ],
)
def test_a_report_with_any_entry_is_not_empty(report: StepReport) -> None:
    assert not report.is_empty()


def test_failures_are_counted_by_kind() -> None:
    report = StepReport()
    for what in ("load", "store", "load"):
        report.failed(what)
    assert report.failures == {"load": 2, "store": 1}


def test_a_new_report_is_empty() -> None:
    assert StepReport().is_empty()


@property_test
@given(ranks=st.lists(encoder_reports, min_size=2, max_size=4))
def test_encoder_rows_that_any_rank_lost_are_not_stored(ranks: list[EncoderStepReport]) -> None:
    total = reduce(EncoderStepReport.aggregate, ranks)
    assert total.lost == set().union(*(rank.lost for rank in ranks))
    assert total.stored == set().union(*(rank.stored for rank in ranks)) - total.lost


@property_test
@given(a=encoder_reports, b=encoder_reports)
def test_encoder_reports_merge_in_any_order(a: EncoderStepReport, b: EncoderStepReport) -> None:
    assert a.aggregate(b) == b.aggregate(a)

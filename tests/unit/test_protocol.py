"""The types that cross between the sides: spans, layered plans, merged reports."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_connector.protocol import (
    Blend,
    EncoderReport,
    Item,
    ItemReuse,
    PrefillFigures,
    ReusePlan,
    Span,
    Stage,
    StepReport,
    TTFTPart,
    inside,
    of_runs,
    stretches_of,
    uncovered,
)

property_test = settings(max_examples=40)
keys = st.sampled_from(["a", "b", "c", "d"])
counts = st.integers(0, 1000)
seconds = st.floats(0, 10)
NUM_LAYERS = 6


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start = draw(st.integers(0, 40))
    return Span(start, start + draw(st.integers(0, 40)))


def tokens(*parts: Span) -> list[int]:
    return [token for part in parts for token in range(part.start, part.end)]


def stretches(chosen: Collection[int]) -> tuple[Span, ...]:
    """Maximal spans of consecutive tokens."""
    groups = groupby(enumerate(sorted(chosen)), key=lambda pair: pair[1] - pair[0])
    parts = [[token for _, token in group] for _, group in groups]
    return tuple(Span(part[0], part[-1] + 1) for part in parts)


@st.composite
def shrinking_stages(draw: st.DrawFn, span: Span) -> tuple[Stage, ...]:
    """Up to three sets, each a part of the one before; equal and empty ones included."""
    later = draw(st.sets(st.integers(1, NUM_LAYERS - 1), max_size=2))
    chosen, stages = tokens(span), []
    for first_layer in (0, *sorted(later)):
        kept = draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
        chosen = [token for token, keep in zip(chosen, kept, strict=True) if keep]
        stages.append(Stage(first_layer, stretches(chosen)))
    return tuple(stages)


@st.composite
def reuses(draw: st.DrawFn, item: int, span: Span) -> ItemReuse:
    if draw(st.integers(0, 3)) == 0:
        blend = Blend(draw(st.integers(0, NUM_LAYERS - 2)), Fraction(draw(st.integers(1, 7)), 7))
        return ItemReuse(item, f"donor {item}", span, (Stage(0, stretches(tokens(span))),), blend)
    return ItemReuse(item, f"donor {item}", span, draw(shrinking_stages(span)))


@st.composite
def plans(draw: st.DrawFn) -> ReusePlan:
    """A plan with up to four reused items; the last one may have no token inside the claim."""
    position = start = draw(st.integers(0, 20))
    reused = []
    for item in range(draw(st.integers(0, 4))):
        begin = position + draw(st.integers(0, 5))
        position = begin + draw(st.integers(1, 12))
        reused.append(draw(reuses(item, Span(begin, position))))
    end = max(position, start + 1) + draw(st.integers(0, 3))
    if draw(st.booleans()):
        reused.append(ItemReuse(9, "donor 9", Span(end, end), (Stage(0, ()),)))
    return ReusePlan(
        req_id="request",
        claim=Span(start, end),
        reused=tuple(reused),
        captures={7: "key"},
        block_ids=(3, 1, 2),
    )


layers = st.integers(0, NUM_LAYERS - 1)
figures = st.builds(
    PrefillFigures,
    reused=st.dictionaries(st.integers(0, 2), counts),
    recomputed_tokens=counts,
    computed_by_layer=st.lists(counts, min_size=3, max_size=3).map(tuple),
    on_device=st.frozensets(st.integers(0, 2)),
    fallback=st.none() | st.just("error"),
)
encoder_reports = st.builds(
    EncoderReport, stored=st.dictionaries(keys, st.integers(1, 2)), lost=st.sets(keys)
)
reports = st.builds(
    StepReport,
    stored=st.dictionaries(keys, st.integers(1, 2)),
    lost=st.sets(keys),
    encoder=encoder_reports,
    figures=st.dictionaries(keys, figures),
    prefilling=st.sampled_from([(), ("a", "b")]),  # the same plan's on all ranks
    seconds=st.dictionaries(st.sampled_from(["load", "sparse_prefill", "forward"]), seconds),
    events=st.dictionaries(keys, st.integers(1, 2)),
)


def reused_by_item(plan: ReusePlan, layer: int) -> dict[int, set[int]]:
    """The account: an item's tokens without those of the last stage that has begun."""
    account = {}
    for reuse in plan.reused:
        begun = [stage for stage in reuse.stages if stage.first_layer <= layer]
        account[reuse.item] = set(tokens(reuse.span)) - set(tokens(*begun[-1].tokens))
    return account


def assert_partitions(plan: ReusePlan, layer: int) -> None:
    """Runs and reused spans together are the claim, and the runs are maximal and in order."""
    runs = plan.runs_at(layer)
    reused = [span for reuse in plan.reused for span in reuse.reused_at(layer)]
    assert sorted(tokens(*runs, *reused)) == tokens(plan.claim)
    assert all(runs)
    assert all(reused)
    assert all(run.end < following.start for run, following in pairwise(runs))


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
@given(whole=spans(), chosen=st.sets(st.integers(0, 80)))
def test_uncovered_stretches_are_maximal_and_complete(whole: Span, chosen: set[int]) -> None:
    covered = stretches(chosen & set(tokens(whole)))
    assert tuple(uncovered(whole, covered)) == stretches(set(tokens(whole)) - chosen)


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
    item = Item(index=0, span=Span(3, 8), ordinal=0, key="kv", encoder_key="encoder")
    assert item.num_embeds == 5
    assert replace(item, embeds=(Span(1, 3), Span(4, 5))).num_embeds == 3
    assert replace(item, embeds=()).num_embeds == 0


masks = st.lists(st.booleans(), max_size=20)


@given(mask=masks)
def test_stretches_cover_what_is_set(mask: list[bool]) -> None:
    found = stretches_of(np.array(mask, dtype=bool))
    covered = [token for span in found for token in range(span.start, span.end)]
    assert covered == [token for token, is_set in enumerate(mask) if is_set]
    assert all(a.end < b.start for a, b in pairwise(found))


@given(mask=masks)
def test_rows_in_front_of_a_token_are_those_of_a_loop_over_the_mask(mask: list[bool]) -> None:
    embeds = tuple(stretches_of(np.array(mask, dtype=bool)))
    item = Item(0, Span(7, 7 + len(mask)), 0, "kv", "encoder", embeds)
    for offset in range(len(mask) + 1):
        assert item.rows_before(offset) == sum(mask[:offset])
        assert replace(item, embeds=None).rows_before(offset) == offset


@given(
    edges=st.lists(st.integers(0, 30), min_size=2, max_size=12, unique=True).map(sorted),
    runs=st.lists(st.integers(0, 30), min_size=2, max_size=12, unique=True).map(sorted),
)
def test_what_has_tokens_in_runs_is_found_as_by_trying_all(
    edges: list[int], runs: list[int]
) -> None:
    spans = [Span(*pair) for pair in zip(edges[::2], edges[1::2], strict=False)]
    items = [Item(index, span, index, "kv", "rows") for index, span in enumerate(spans)]
    parts = [Span(*pair) for pair in zip(runs[::2], runs[1::2], strict=False)]
    for part in parts:
        found = [item for item in items if item.span.clip(part.start, part.end)]
        assert list(inside(items, part)) == found
    in_some = [
        item for item in items if any(item.span.clip(part.start, part.end) for part in parts)
    ]
    assert of_runs(items, parts) == in_some


@property_test
@given(plan=plans(), layer=layers)
def test_runs_and_reused_spans_partition_the_claim_in_every_layer(
    plan: ReusePlan, layer: int
) -> None:
    assert_partitions(plan, layer)


@property_test
@given(plan=plans(), layer=layers)
def test_a_layer_reuses_what_the_stage_it_belongs_to_leaves_out(
    plan: ReusePlan, layer: int
) -> None:
    account = reused_by_item(plan, layer)
    for reuse in plan.reused:
        assert set(tokens(*reuse.reused_at(layer))) == account[reuse.item]
        assert set(tokens(*reuse.computed_at(layer))) == (
            set(tokens(reuse.span)) - account[reuse.item]
        )


@property_test
@given(plan=plans())
def test_what_a_layer_computes_the_layers_below_have_computed_too(plan: ReusePlan) -> None:
    by_layer = [set(tokens(*plan.runs_at(layer))) for layer in range(NUM_LAYERS)]
    assert all(above <= below for below, above in pairwise(by_layer))


@property_test
@given(plan=plans())
def test_a_plan_counts_its_tokens(plan: ReusePlan) -> None:
    entering = set(tokens(*plan.runs_at(0)))
    assert plan.num_computed == len(entering)
    known = {token for reuse in plan.reused for token in tokens(reuse.span)}
    assert plan.num_recomputed == len(entering & known)
    assert plan.num_computed - plan.num_recomputed == len(plan.claim) - len(known)


@property_test
@given(plan=plans())
def test_reused_tokens_are_counted_in_the_last_layer(plan: ReusePlan) -> None:
    account = reused_by_item(plan, NUM_LAYERS - 1)
    for reuse in plan.reused:
        if reuse.blend is None:
            assert reuse.num_reused == len(account[reuse.item])
        else:
            stay = -(-len(reuse.span) * reuse.blend.share // 1)
            assert reuse.num_reused == len(reuse.span) - stay
    assert plan.num_reused == sum(reuse.num_reused for reuse in plan.reused)


@property_test
@given(plan=plans())
def test_no_token_in_front_of_the_first_reused_one_is_ever_a_donors(plan: ReusePlan) -> None:
    may_be_reused = {
        token
        for reuse in plan.reused
        for token in tokens(reuse.span)
        if reuse.blend is not None or token in reused_by_item(plan, NUM_LAYERS - 1)[reuse.item]
    }
    assert plan.first_reused == min(may_be_reused, default=None)


@pytest.mark.parametrize(
    ("stages", "blend", "expected"),
    [
        ((Stage(0, ()),), None, 10),
        ((Stage(0, (Span(10, 14),)),), None, 14),
        ((Stage(0, (Span(10, 20),)),), None, None),
        ((Stage(0, (Span(10, 20),)), Stage(3, (Span(10, 12),))), None, 12),
        ((Stage(0, (Span(10, 20),)), Stage(3, ())), None, 10),
        ((Stage(0, (Span(12, 20),)),), None, 10),
        ((Stage(0, (Span(10, 20),)),), Blend(1, Fraction(1, 2)), 10),
    ],
)
def test_the_first_reused_token_by_example(
    stages: tuple[Stage, ...], blend: Blend | None, expected: int | None
) -> None:
    reuse = ItemReuse(0, "donor", Span(10, 20), stages, blend)
    assert reuse.first_reused == expected
    later = ItemReuse(1, "donor", Span(25, 30), (Stage(0, ()),))
    plan = ReusePlan(Span(0, 30), (reuse, later), "request", ())
    assert plan.first_reused == (25 if expected is None else expected)


def test_a_plan_without_reuse_has_no_first_reused_token() -> None:
    plan = ReusePlan(Span(3, 9), (), "request", ())
    assert plan.first_reused is None
    assert plan.runs_at(0) == plan.runs_at(5) == [Span(3, 9)]
    assert (plan.num_computed, plan.num_recomputed, plan.num_reused) == (6, 0, 0)


def test_a_layered_plan_by_example() -> None:
    layered = ItemReuse(
        0,
        "donor a",
        Span(4, 14),
        (Stage(0, (Span(4, 8), Span(10, 12))), Stage(2, (Span(4, 6),)), Stage(4, ())),
    )
    blended = ItemReuse(
        1, "donor b", Span(16, 20), (Stage(0, (Span(16, 20),)),), Blend(1, Fraction(1, 3))
    )
    plan = ReusePlan(Span(0, 20), (layered, blended), "request", ())
    assert plan.runs_at(0) == plan.runs_at(1) == [Span(0, 8), Span(10, 12), Span(14, 20)]
    assert plan.runs_at(2) == plan.runs_at(3) == [Span(0, 6), Span(14, 20)]
    assert plan.runs_at(4) == plan.runs_at(99) == [Span(0, 4), Span(14, 20)]
    assert plan.num_computed == 16
    assert plan.num_recomputed == 10
    assert plan.num_reused == 10 + 2
    assert plan.first_reused == 4
    assert plan.without(0).first_reused == 16


@pytest.mark.parametrize(
    ("share", "expected"), [(Fraction(1, 3), 4), (Fraction(1, 10), 1), (Fraction(1), 10)], ids=str
)
def test_a_blend_keeps_its_share_rounded_up(share: Fraction, expected: int) -> None:
    assert Blend(1, share).count(10) == expected


@property_test
@given(plan=plans(), dropped=st.lists(st.integers(0, 5), max_size=4), layer=layers)
def test_a_plan_without_items_still_covers_its_claim_exactly(
    plan: ReusePlan, dropped: list[int], layer: int
) -> None:
    reduced = reduce(ReusePlan.without, dropped, plan)
    assert_partitions(reduced, layer)
    assert reduced.reused == tuple(part for part in plan.reused if part.item not in dropped)


@property_test
@given(plan=plans(), item=st.integers(0, 5))
def test_all_tokens_of_an_item_that_is_dropped_are_computed(plan: ReusePlan, item: int) -> None:
    reduced = plan.without(item)
    own = {token for reuse in plan.reused if reuse.item == item for token in tokens(reuse.span)}
    for layer in range(NUM_LAYERS):
        assert set(tokens(*reduced.runs_at(layer))) == set(tokens(*plan.runs_at(layer))) | own
    assert reduced.without(item) == reduced


@property_test
@given(plan=plans(), item=st.integers(0, 5))
def test_dropping_an_item_changes_nothing_else(plan: ReusePlan, item: int) -> None:
    assert plan == replace(plan.without(item), reused=plan.reused)


def test_figures_of_two_ranks_show_the_lesser_reuse() -> None:
    more = PrefillFigures({0: 60, 1: 30}, 10, (30, 25), frozenset({0, 1}))
    less = PrefillFigures({0: 50}, 100, (120, 120), frozenset({0}), "segment lost")
    assert more.merge(less) == less.merge(more) == less


def test_the_slowest_rank_tells_what_each_part_of_a_step_took() -> None:
    ranks = [
        StepReport(prefilling=("r",), seconds={"load": 0.5, "forward": 0.25}),
        StepReport(prefilling=("r",), seconds={"load": 0.125, "forward": 0.75}),
        StepReport(prefilling=("r",)),
    ]
    total = reduce(StepReport.aggregate, ranks)
    assert total == StepReport(prefilling=("r",), seconds={"load": 0.5, "forward": 0.75})


class Measured:
    """Laps on a device that is through with the step, or never will be."""

    def seconds(self) -> dict[TTFTPart, float]:
        return {"forward": 0.5}


class Broken(Measured):
    def seconds(self) -> dict[TTFTPart, float]:
        raise RuntimeError("device lost")


def test_what_a_device_measured_is_read_when_the_report_leaves_the_worker() -> None:
    report = StepReport(prefilling=("r",), laps=Measured())
    assert report.seconds == {}
    sent = pickle.loads(pickle.dumps(report))
    assert sent == StepReport(prefilling=("r",), seconds={"forward": 0.5})
    here = StepReport(laps=Measured())
    here.settle()
    here.settle()
    assert here == StepReport(seconds={"forward": 0.5})


def test_times_that_cant_be_read_cost_no_report() -> None:
    report = StepReport(stored={"a": 1}, laps=Broken())
    report.settle()
    assert report == StepReport(stored={"a": 1}, events={"failed.pace": 1})


def test_a_rank_that_computed_nothing_leaves_the_others_layers() -> None:
    assert PrefillFigures().merge(PrefillFigures({0: 1}, 2, (3, 2))).computed_by_layer == (3, 2)


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
        assert total.events.get(key, 0) == sum(rank.events.get(key, 0) for rank in ranks)
        assert (key in total.lost) == any(key in rank.lost for rank in ranks)


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
    first = StepReport(stored={"a": 1}, lost={"b"}, figures={"r": PrefillFigures({0: 1})})
    second = StepReport(stored={"a": 1}, lost={"c"}, figures={"r": PrefillFigures({0: 0})})
    first.aggregate(second)
    assert first == StepReport(stored={"a": 1}, lost={"b"}, figures={"r": PrefillFigures({0: 1})})
    assert second == StepReport(stored={"a": 1}, lost={"c"}, figures={"r": PrefillFigures({0: 0})})


@pytest.mark.parametrize(
    "report",
    [
        StepReport(stored={"a": 1}),
        StepReport(lost={"a"}),
        StepReport(encoder=EncoderReport(stored={"a": 1})),
        StepReport(encoder=EncoderReport(lost={"a"})),
        StepReport(figures={"r": PrefillFigures()}),
        StepReport(prefilling=("r",)),
        StepReport(events={"disk.read.calls": 1}),
    ],
)
def test_a_report_with_any_entry_is_not_empty(report: StepReport) -> None:
    assert not report.is_empty()


def test_failures_are_counted_by_kind() -> None:
    report = StepReport()
    for what in ("load", "store", "load"):
        report.failed(what)
    assert report.events == {"failed.load": 2, "failed.store": 1}


def test_a_new_report_is_empty() -> None:
    assert StepReport().is_empty()


@property_test
@given(ranks=st.lists(reports, min_size=2, max_size=4))
def test_an_aggregate_counts_the_ranks_that_hold_encoder_rows(ranks: list[StepReport]) -> None:
    total = reduce(StepReport.aggregate, ranks).encoder
    assert total == reduce(EncoderReport.aggregate, (rank.encoder for rank in ranks))
    assert total.lost == set().union(*(rank.encoder.lost for rank in ranks))
    for key in "abcd":
        assert total.stored.get(key, 0) == sum(rank.encoder.stored.get(key, 0) for rank in ranks)


@property_test
@given(a=encoder_reports, b=encoder_reports)
def test_encoder_reports_merge_in_any_order(a: EncoderReport, b: EncoderReport) -> None:
    assert a.aggregate(b) == b.aggregate(a)

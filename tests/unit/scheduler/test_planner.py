"""Reuse plans against a token-by-token account of the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_connector.calibration import LayerSchedule
from vlcache_connector.protocol import Blend, Item, ItemReuse, Layout, Span, Stage
from vlcache_connector.scheduler.planner import plan_reuse
from vlcache_connector.selection import (
    Budget,
    FirstK,
    NoRecompute,
    RecomputeSelector,
    Selection,
    make_selectors,
)

NUM_LAYERS = 4
SCHEDULES = [LayerSchedule(ratio=0.25, layers=[0.5, 0.3, 0.2, 0.0])]


@dataclass(frozen=True)
class Middle(RecomputeSelector):
    """Recompute tokens that are not the first ones."""

    start: int
    count: int

    def select(self, num_tokens: int, budget: Budget) -> Selection:
        return Selection.uniform(
            range(min(self.start, num_tokens), min(self.start + self.count, num_tokens))
        )


@dataclass(frozen=True)
class EveryOther(RecomputeSelector):
    """Not contiguous, as a range or as a list."""

    as_list: bool

    def select(self, num_tokens: int, budget: Budget) -> Selection:
        offsets = range(0, num_tokens, 2)
        return Selection.uniform(list(offsets) if self.as_list else offsets)


@dataclass(frozen=True)
class Shrinking(RecomputeSelector):
    """Other tokens from layer to layer, with gaps."""

    def select(self, num_tokens: int, budget: Budget) -> Selection:
        return Selection(
            tuple(
                (layer, [offset for offset in range(num_tokens) if offset % (step + 1) == 0])
                for layer, step in ((0, 1), (1, 3), (3, 7))
            )
        )


@dataclass(frozen=True)
class Prompt:
    """One planning problem.

    Attributes:
        stored: keys of the stored segments.
    """

    items: tuple[Item, ...]
    num_tokens: int
    num_computed: int
    stored: frozenset[str]
    selector: RecomputeSelector
    budget: Budget

    def plan(self) -> Layout | None:
        return plan_reuse(
            self.items,
            num_computed=self.num_computed,
            num_tokens=self.num_tokens,
            donors={i.index: f"donor of {i.key}" for i in self.items if i.key in self.stored},
            select=self.select,
        )

    def select(self, num_tokens: int) -> Selection:
        return self.selector.select(num_tokens, self.budget)

    def checked_plan(self) -> Layout:
        plan = self.plan()
        assert plan is not None
        return plan

    @property
    def known(self) -> list[Item]:
        """Stored items of which something is left to compute."""
        return [
            item
            for item in self.items
            if item.key in self.stored and item.span.end > self.num_computed
        ]

    def donor_of(self, token: int, layer: int) -> int | None:
        """Index of the item whose stored KV `token` is to get; None: it is computed."""
        for item in self.known:
            if item.span.start <= token < item.span.end:
                stages = self.select(len(item.span)).stages
                chosen = [offsets for first_layer, offsets in stages if first_layer <= layer][-1]
                return None if token - item.span.start in chosen else item.index
        return None


selectors = st.sampled_from(
    [
        *make_selectors(NUM_LAYERS, SCHEDULES).values(),
        EveryOther(as_list=True),
        EveryOther(as_list=False),
        Shrinking(),
    ]
) | st.builds(Middle, start=st.integers(0, 20), count=st.integers(0, 20))
layers = st.integers(0, NUM_LAYERS - 1)
budgets = st.builds(
    Budget,
    ratio=st.sampled_from([0.0, 0.02, 0.05, 0.3, 0.5, 1.0]),
    min_tokens=st.sampled_from([0, 1, 4, 100]),
)


drawn_items = st.tuples(st.integers(0, 5), st.integers(1, 25), st.sampled_from("abcd"))


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Items with or without text between them; equal keys are the same picture again."""
    position, items = 0, []
    for gap, length, name in draw(st.lists(drawn_items, max_size=5)):
        start = position + gap
        position = start + length
        # Indices need not follow the order in the prompt.
        index = (len(items) + 3) % 5
        span = Span(start, position)
        items.append(Item(index, span, len(items), key=name, encoder_key=f"rows of {name}"))
    num_tokens = max(1, position + draw(st.integers(0, 5)))
    return Prompt(
        items=tuple(items),
        num_tokens=num_tokens,
        num_computed=draw(st.integers(0, num_tokens - 1)),
        stored=draw(st.frozensets(st.sampled_from("abcd"))),
        selector=draw(selectors),
        budget=draw(budgets),
    )


plannable = prompts().filter(lambda prompt: prompt.plan() is not None)
property_test = settings(max_examples=60)


def tokens(*parts: Span) -> list[int]:
    return [token for part in parts for token in range(part.start, part.end)]


def stretches(chosen: Sequence[int]) -> list[Span]:
    """Maximal spans of consecutive tokens."""
    groups = groupby(enumerate(chosen), key=lambda pair: pair[1] - pair[0])
    parts = [[token for _, token in group] for _, group in groups]
    return [Span(part[0], part[-1] + 1) for part in parts]


@property_test
@given(prompt=prompts())
def test_there_is_a_plan_exactly_when_a_stored_item_ends_behind_the_computed_tokens(
    prompt: Prompt,
) -> None:
    # vLLM computes the last token itself, so nothing can be claimed when only that one is left.
    can_claim = prompt.num_computed < prompt.num_tokens - 1
    plan = prompt.plan()
    assert (plan is not None) == (bool(prompt.known) and can_claim)
    if plan is not None:
        end = max(item.span.end for item in prompt.known)
        assert plan.claim == Span(prompt.num_computed, min(end, prompt.num_tokens - 1))


@property_test
@given(prompt=plannable, layer=layers)
def test_runs_and_reused_spans_partition_the_claim(prompt: Prompt, layer: int) -> None:
    plan = prompt.checked_plan()
    reused = [span for reuse in plan.reused for span in reuse.reused_at(layer)]
    parts = [*plan.runs_at(layer), *reused]
    assert all(parts)
    assert sorted(tokens(*parts)) == tokens(plan.claim)


@property_test
@given(prompt=plannable, layer=layers)
def test_runs_are_the_maximal_stretches_of_tokens_without_a_donor_in_order(
    prompt: Prompt, layer: int
) -> None:
    plan = prompt.checked_plan()
    computed = [token for token in tokens(plan.claim) if prompt.donor_of(token, layer) is None]
    assert plan.runs_at(layer) == stretches(computed)


@property_test
@given(prompt=plannable, layer=layers)
def test_reused_tokens_come_from_their_own_item_in_order(prompt: Prompt, layer: int) -> None:
    plan = prompt.checked_plan()
    donors = {token: r.item for r in plan.reused for token in tokens(*r.reused_at(layer))}
    expected = {token: prompt.donor_of(token, layer) for token in tokens(plan.claim)}
    assert donors == {token: item for token, item in expected.items() if item is not None}
    assert list(donors) == sorted(donors)


@property_test
@given(prompt=plannable)
def test_every_known_item_is_reused_from_the_donor_that_was_found(prompt: Prompt) -> None:
    plan = prompt.checked_plan()
    assert [(reuse.item, reuse.donor) for reuse in plan.reused] == [
        (item.index, f"donor of {item.key}") for item in prompt.known
    ]
    for reuse, item in zip(plan.reused, prompt.known, strict=True):
        assert reuse.span == item.span.clip(plan.claim.start, plan.claim.end)
        assert reuse.blend == prompt.select(len(item.span)).blend


@property_test
@given(prompt=plannable)
def test_recompute_sets_are_the_selected_offsets_inside_the_claim(prompt: Prompt) -> None:
    plan = prompt.checked_plan()
    for reuse, item in zip(plan.reused, prompt.known, strict=True):
        selection = prompt.select(len(item.span))
        assert [stage.first_layer for stage in reuse.stages] == [
            first_layer for first_layer, _ in selection.stages
        ]
        for stage, (_, offsets) in zip(reuse.stages, selection.stages, strict=True):
            inside = {item.span.start + offset for offset in offsets} & set(tokens(plan.claim))
            assert list(stage.tokens) == stretches(sorted(inside))
    assert plan.num_recomputed == sum(len(tokens(*reuse.stages[0].tokens)) for reuse in plan.reused)


@property_test
@given(prompt=plannable, layer=layers)
def test_unknown_items_are_computed_completely(prompt: Prompt, layer: int) -> None:
    plan = prompt.checked_plan()
    unknown = [item for item in prompt.items if item.key not in prompt.stored]
    claimed = tokens(*(item.span.clip(plan.claim.start, plan.claim.end) for item in unknown))
    assert set(claimed) <= set(tokens(*plan.runs_at(layer)))


def item(index: int, start: int, end: int, key: str) -> Item:
    return Item(index, Span(start, end), index, key=key, encoder_key=f"rows of {key}")


def plan_of(
    *items: Item,
    num_tokens: int,
    num_computed: int = 0,
    stored: str = "",
    selector: RecomputeSelector | None = None,
    budget: Budget | None = None,
) -> Layout | None:
    return Prompt(
        items,
        num_tokens,
        num_computed,
        frozenset(stored),
        selector or FirstK(),
        budget or Budget(ratio=0.1, min_tokens=2),
    ).plan()


def reused_spans(plan: Layout, layer: int = 0) -> list[tuple[int, Span]]:
    return [(reuse.item, span) for reuse in plan.reused for span in reuse.reused_at(layer)]


def test_text_an_unknown_and_a_known_item_by_example() -> None:
    plan = plan_of(item(0, 4, 14, "a"), item(1, 20, 60, "b"), num_tokens=70, stored="b")
    assert plan == Layout(
        claim=Span(0, 60),
        reused=(ItemReuse(1, "donor of b", Span(20, 60), (Stage(0, (Span(20, 24),)),)),),
    )
    assert plan.runs_at(0) == [Span(0, 24)]


def test_an_item_that_is_shown_twice_is_reused_twice() -> None:
    plan = plan_of(item(0, 2, 12, "a"), item(1, 15, 25, "a"), num_tokens=30, stored="a")
    assert plan is not None
    assert plan.runs_at(0) == [Span(0, 4), Span(12, 17)]
    assert reused_spans(plan) == [(0, Span(4, 12)), (1, Span(17, 25))]
    assert plan.num_recomputed == 4


def test_a_prompt_that_ends_with_an_item_leaves_its_last_token_to_vllm() -> None:
    plan = plan_of(item(0, 2, 12, "a"), num_tokens=12, stored="a")
    assert plan is not None
    assert plan.claim == Span(0, 11)
    assert reused_spans(plan) == [(0, Span(4, 11))]


def test_an_item_of_which_only_the_last_token_of_the_prompt_is_left_reuses_nothing() -> None:
    plan = plan_of(item(0, 9, 10, "a"), num_tokens=10, stored="a", selector=NoRecompute())
    assert plan is not None
    assert plan.claim == Span(0, 9)
    assert plan.runs_at(0) == [Span(0, 9)]
    assert (plan.num_reused, plan.first_reused) == (0, None)


def test_an_item_whose_beginning_is_computed_already_is_reused_from_there_on() -> None:
    plan = plan_of(item(0, 2, 42, "a"), num_tokens=50, num_computed=4, stored="a")
    assert plan is not None
    assert plan.runs_at(0) == [Span(4, 6)]
    assert reused_spans(plan) == [(0, Span(6, 42))]
    assert plan.num_recomputed == 2


def test_a_recompute_set_that_is_computed_already_is_not_computed_again() -> None:
    plan = plan_of(item(0, 2, 42, "a"), num_tokens=50, num_computed=16, stored="a")
    assert plan is not None
    assert plan.runs_at(0) == []
    assert reused_spans(plan) == [(0, Span(16, 42))]
    assert plan.reused[0].stages == (Stage(0, ()),)
    assert plan.num_recomputed == 0


def test_a_recompute_set_inside_an_item_splits_it() -> None:
    plan = plan_of(item(3, 2, 12, "a"), num_tokens=20, stored="a", selector=Middle(4, 3))
    assert plan is not None
    assert plan.runs_at(0) == [Span(0, 2), Span(6, 9)]
    assert reused_spans(plan) == [(3, Span(2, 6)), (3, Span(9, 12))]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_recompute_set_with_gaps_is_taken_token_by_token(as_list: bool) -> None:
    plan = plan_of(item(0, 2, 7, "a"), num_tokens=20, stored="a", selector=EveryOther(as_list))
    assert plan is not None
    assert plan.runs_at(0) == [Span(0, 3), Span(4, 5), Span(6, 7)]
    assert reused_spans(plan) == [(0, Span(3, 4)), (0, Span(5, 6))]
    assert plan.num_recomputed == 3


def test_each_layer_recomputes_its_own_tokens() -> None:
    plan = plan_of(item(0, 2, 12, "a"), num_tokens=20, stored="a", selector=Shrinking())
    assert plan is not None
    by_layer = [tokens(*plan.runs_at(layer)) for layer in range(NUM_LAYERS)]
    assert by_layer[0] == [0, 1, 2, 4, 6, 8, 10]
    assert by_layer[1] == by_layer[2] == [0, 1, 2, 6, 10]
    assert by_layer[3] == [0, 1, 2, 10]
    assert plan.num_computed == 7
    assert plan.num_reused == 8


def test_a_choice_at_run_time_is_planned_as_everything_computed() -> None:
    cacheblend = make_selectors(NUM_LAYERS, [])["cacheblend"]
    plan = plan_of(item(0, 2, 12, "a"), num_tokens=20, stored="a", selector=cacheblend)
    assert plan is not None
    [reuse] = plan.reused
    assert reuse.blend == Blend(1, Fraction(2, 10))
    assert plan.runs_at(0) == plan.runs_at(NUM_LAYERS - 1) == [Span(0, 12)]
    assert (plan.num_recomputed, plan.num_reused, plan.first_reused) == (10, 8, 2)


def test_neighbouring_items_without_recomputation_leave_no_run_between_them() -> None:
    plan = plan_of(
        item(0, 0, 10, "a"),
        item(1, 10, 20, "b"),
        num_tokens=21,
        stored="ab",
        selector=NoRecompute(),
    )
    assert plan is not None
    assert plan.runs_at(0) == []
    assert reused_spans(plan) == [(0, Span(0, 10)), (1, Span(10, 20))]


def test_unknown_items_behind_the_last_known_one_are_left_to_vllm() -> None:
    plan = plan_of(item(0, 2, 12, "a"), item(1, 14, 24, "b"), num_tokens=30, stored="a")
    assert plan is not None
    assert plan.claim == Span(0, 12)


@pytest.mark.parametrize(
    ("num_computed", "stored"), [(0, ""), (0, "z"), (12, "a"), (25, "a")], ids=str
)
def test_there_is_no_plan_without_a_stored_item_ahead(num_computed: int, stored: str) -> None:
    plan = plan_of(
        item(0, 2, 12, "a"),
        item(1, 14, 24, "b"),
        num_tokens=30,
        num_computed=num_computed,
        stored=stored,
    )
    assert plan is None

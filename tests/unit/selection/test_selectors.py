"""Recompute-token selectors: how many tokens, which, and in which layers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlcache_connector.calibration import LayerSchedule
from vlcache_connector.config import SelectorName, VLCacheConfig
from vlcache_connector.protocol import Blend
from vlcache_connector.selection import (
    Budget,
    CacheBlend,
    FirstK,
    FullRecompute,
    LayerAware,
    NoRecompute,
    RandomK,
    RecomputeSelector,
    Selection,
    first_k_by_layer,
    make_selectors,
)

NUM_LAYERS = 4
SCHEDULES = [
    LayerSchedule(ratio=0.05, layers=[0.1, 0.1, 0.0, 0.0]),
    LayerSchedule(ratio=0.2, layers=[0.5, 0.2, 0.1, 0.0]),
    LayerSchedule(ratio=0.6, layers=[1.0, 0.8, 0.4, 0.2]),
]
SELECTORS = make_selectors(NUM_LAYERS, SCHEDULES)

property_test = settings(max_examples=60)
lengths = st.integers(1, 20_000)
# Ratios as people write them: up to four decimals.
percentages = st.integers(0, 10_000)
minima = st.integers(0, 64)
shares = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> list[LayerSchedule]:
    """Up to three schedules of ascending ratios, for the same number of layers."""
    num_layers = draw(st.integers(1, 6))
    drawn = draw(
        st.lists(st.lists(shares, min_size=num_layers, max_size=num_layers), max_size=3, min_size=1)
    )
    by_ratio = {sum(layers) / num_layers: sorted(layers, reverse=True) for layers in drawn}
    return [
        LayerSchedule(ratio=min(ratio, 1.0), layers=by_ratio[ratio]) for ratio in sorted(by_ratio)
    ]


def by_layer(selection: Selection, num_layers: int) -> list[list[int]]:
    """Offsets that each layer recomputes, before any choice at run time."""
    return [
        list(next(chosen for first, chosen in reversed(selection.stages) if first <= layer))
        for layer in range(num_layers)
    ]


def only_stage(selection: Selection) -> Sequence[int]:
    """Offsets of a selection that is the same in all layers."""
    assert selection.blend is None
    [(first_layer, offsets)] = selection.stages
    assert first_layer == 0
    return offsets


@pytest.fixture(params=SELECTORS, ids=str)
def selector(request: pytest.FixtureRequest) -> RecomputeSelector:
    return SELECTORS[request.param]


def test_every_configurable_name_has_a_selector() -> None:
    assert set(SELECTORS) == set(get_args(SelectorName))
    assert VLCacheConfig().selector in SELECTORS


def test_only_layer_aware_needs_schedules() -> None:
    assert set(SELECTORS) - set(make_selectors(NUM_LAYERS, [])) == {"layer_aware"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("first_k", FirstK),
        ("layer_aware", LayerAware),
        ("cacheblend", CacheBlend),
        ("random_k", RandomK),
        ("none", NoRecompute),
        ("full", FullRecompute),
    ],
)
def test_a_name_stands_for_its_own_selector(
    name: SelectorName, expected: type[RecomputeSelector]
) -> None:
    assert type(SELECTORS[name]) is expected


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 256, 9999])
@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("min_tokens", [0, 8, 10_000])
def test_offsets_ascend_inside_the_segment_and_shrink_from_stage_to_stage(
    selector: RecomputeSelector, num_tokens: int, ratio: float, min_tokens: int
) -> None:
    selection = selector.select(num_tokens, Budget(ratio, min_tokens))
    first_layers = [first_layer for first_layer, _ in selection.stages]
    assert first_layers[0] == 0
    assert first_layers == sorted(set(first_layers))
    assert first_layers[-1] < NUM_LAYERS
    for _, offsets in selection.stages:
        assert list(offsets) == sorted(set(offsets))
        assert not offsets or 0 <= offsets[0] <= offsets[-1] < num_tokens
    for (_, before), (_, after) in pairwise(selection.stages):
        assert set(after) < set(before)


@pytest.mark.parametrize("num_tokens", [1, 7, 256])
@pytest.mark.parametrize("min_tokens", [0, 8])
def test_only_full_recomputes_anything_with_ratio_zero(
    selector: RecomputeSelector, num_tokens: int, min_tokens: int
) -> None:
    selection = selector.select(num_tokens, Budget(0.0, min_tokens))
    expected = range(num_tokens) if isinstance(selector, FullRecompute) else range(0)
    assert list(only_stage(selection)) == list(expected)


@pytest.mark.parametrize("num_tokens", [1, 7, 256])
@pytest.mark.parametrize("min_tokens", [0, 8])
def test_all_but_none_recompute_everything_with_ratio_one(
    selector: RecomputeSelector, num_tokens: int, min_tokens: int
) -> None:
    selection = selector.select(num_tokens, Budget(1.0, min_tokens))
    expected = range(0) if isinstance(selector, NoRecompute) else range(num_tokens)
    assert list(only_stage(selection)) == list(expected)


@property_test
@given(n=lengths, ratio=st.floats(0, 1), minimum=minima)
def test_none_recomputes_nothing(n: int, ratio: float, minimum: int) -> None:
    assert len(only_stage(NoRecompute().select(n, Budget(ratio, minimum)))) == 0


@property_test
@given(n=lengths, ratio=st.floats(0, 1), minimum=minima)
def test_full_recomputes_everything(n: int, ratio: float, minimum: int) -> None:
    assert only_stage(FullRecompute().select(n, Budget(ratio, minimum))) == range(n)


@property_test
@given(n=lengths, percent=percentages, minimum=minima)
def test_first_k_takes_the_ratio_rounded_up_but_at_least_the_minimum(
    n: int, percent: int, minimum: int
) -> None:
    share = Fraction(percent, 10_000)
    expected = min(n, max(minimum, math.ceil(share * n))) if percent else 0
    assert only_stage(FirstK().select(n, Budget(percent / 10_000, minimum))) == range(expected)


@property_test
@given(n=lengths, minimum=minima)
def test_first_k_with_ratio_zero_recomputes_nothing_whatever_the_minimum(
    n: int, minimum: int
) -> None:
    assert len(only_stage(FirstK().select(n, Budget(0.0, minimum)))) == 0


@property_test
@given(n=lengths, low=st.floats(0, 1), high=st.floats(0, 1), minimum=minima)
def test_first_k_never_recomputes_less_for_a_higher_ratio(
    n: int, low: float, high: float, minimum: int
) -> None:
    low, high = sorted((low, high))
    few, many = (only_stage(FirstK().select(n, Budget(ratio, minimum))) for ratio in (low, high))
    assert len(few) <= len(many)


@pytest.mark.parametrize(
    ("n", "ratio", "minimum", "expected"),
    [
        (100, 0.07, 0, 7),  # 0.07 * 100 is 7.000000000000001
        (1600, 0.05, 8, 80),
        (1601, 0.05, 8, 81),
        (100, 0.05, 8, 8),
        (5, 0.05, 8, 5),
        (1, 0.02, 0, 1),
        (10_000, 0.0001, 0, 1),
    ],
)
def test_first_k_by_example(n: int, ratio: float, minimum: int, expected: int) -> None:
    assert only_stage(FirstK().select(n, Budget(ratio, minimum))) == range(expected)


@property_test
@given(n=st.integers(1, 3000), ratio=shares, minimum=minima)
def test_random_k_takes_as_many_as_first_k_and_always_the_same(
    n: int, ratio: float, minimum: int
) -> None:
    budget = Budget(ratio, minimum)
    chosen = only_stage(RandomK().select(n, budget))
    assert len(chosen) == len(only_stage(FirstK().select(n, budget)))
    assert list(chosen) == list(only_stage(RandomK().select(n, budget)))


def test_random_k_never_changes() -> None:
    """All ranks and runs have to agree, whatever the process."""
    assert list(only_stage(RandomK().select(20, Budget(0.25, 0)))) == [3, 4, 5, 8, 10]


def test_random_k_does_not_simply_take_the_first_tokens() -> None:
    chosen = only_stage(RandomK().select(1000, Budget(0.1, 0)))
    assert chosen[-1] > 500


def test_random_k_leaves_the_global_generator_alone() -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    RandomK().select(100, Budget(0.5, 0))
    assert random.random() == expected


@property_test
@given(drawn=schedules(), n=st.integers(1, 3000), ratio=shares, minimum=minima)
def test_layer_aware_takes_first_tokens_and_never_more_from_layer_to_layer(
    drawn: list[LayerSchedule], n: int, ratio: float, minimum: int
) -> None:
    selection = LayerAware(drawn).select(n, Budget(ratio, minimum))
    chosen = by_layer(selection, len(drawn[0].layers))
    assert all(offsets == list(range(len(offsets))) for offsets in chosen)
    assert all(len(above) <= len(below) for below, above in pairwise(chosen))


@property_test
@given(drawn=schedules(), n=st.integers(1, 3000), ratio=shares)
@example(
    drawn=[LayerSchedule(ratio=0.39433691742919763, layers=[0.5, 0.2886738348583953])],
    n=1,
    ratio=0.9999999999999999,
)
def test_layer_aware_keeps_to_the_budget_on_average(
    drawn: list[LayerSchedule], n: int, ratio: float
) -> None:
    selection = LayerAware(drawn).select(n, Budget(ratio, 0))
    counts = [len(offsets) for offsets in by_layer(selection, len(drawn[0].layers))]
    # Each layer rounds up, and a schedule's ratio is its mean to three decimals.
    mean = sum(counts) / len(counts)
    assert (ratio - 0.0011) * n - 1e-5 <= mean <= (ratio + 0.0011) * n + 1


@property_test
@given(drawn=schedules(), n=st.integers(1, 3000), minimum=minima, data=st.data())
def test_layer_aware_is_exact_at_the_given_ratios(
    drawn: list[LayerSchedule], n: int, minimum: int, data: st.DataObject
) -> None:
    schedule = data.draw(st.sampled_from(drawn))
    if schedule.ratio in (0.0, 1.0):
        return
    budget = Budget(schedule.ratio, minimum)
    expected = first_k_by_layer(n, schedule.layers, budget)
    assert LayerAware(drawn).select(n, budget) == expected


@property_test
@given(drawn=schedules(), n=st.integers(1, 3000), low=shares, high=shares)
def test_layer_aware_recomputes_no_less_on_average_for_a_higher_ratio(
    drawn: list[LayerSchedule], n: int, low: float, high: float
) -> None:
    few, many = (
        sum(map(len, by_layer(LayerAware(drawn).select(n, Budget(r, 0)), len(drawn[0].layers))))
        for r in sorted((low, high))
    )
    # Single layers may trade tokens; their sum only by what rounding up and the ratios' precision
    # leave open.
    assert few <= many + len(drawn[0].layers) * (1 + 0.0022 * n)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.05, [100, 100, 0, 0]),
        (0.2, [500, 200, 100, 0]),
        (0.4, [750, 500, 250, 100]),
        (0.8, [1000, 900, 700, 600]),
        (0.025, [50, 50, 0, 0]),
    ],
)
def test_layer_aware_interpolates_between_schedules(ratio: float, expected: list[int]) -> None:
    selection = LayerAware(SCHEDULES).select(1000, Budget(ratio, 0))
    assert [len(offsets) for offsets in by_layer(selection, NUM_LAYERS)] == expected


def test_layer_aware_has_a_stage_per_change_only() -> None:
    selection = LayerAware(SCHEDULES).select(1000, Budget(0.05, 0))
    assert selection == Selection(((0, range(100)), (2, range(0))))


def test_layer_aware_applies_the_minimum_only_where_a_layer_recomputes_anything() -> None:
    selection = LayerAware(SCHEDULES).select(1000, Budget(0.05, 300))
    assert selection == Selection(((0, range(300)), (2, range(0))))


def test_layer_aware_recomputes_nothing_with_ratio_zero_whatever_a_schedule_says() -> None:
    """A schedule's ratio is its mean to three decimals only, so zero may have shares above it."""
    schedule = LayerSchedule(ratio=0.0, layers=[0.001, 0.0])
    selection = LayerAware([schedule]).select(1000, Budget(0.0, 8))
    assert by_layer(selection, 2) == [[], []]


@pytest.mark.parametrize(
    ("counts", "stages"),
    [
        ([5, 5, 5], ((0, range(5)),)),
        ([5, 3, 3], ((0, range(5)), (1, range(3)))),
        ([5, 3, 0], ((0, range(5)), (1, range(3)), (2, range(0)))),
        ([0, 0], ((0, range(0)),)),
    ],
)
def test_first_tokens_by_layer_begin_a_stage_where_the_count_changes(
    counts: list[int], stages: tuple[tuple[int, range], ...]
) -> None:
    assert Selection.first_k(counts) == Selection(stages)
    assert first_k_by_layer(10, [count / 10 for count in counts], Budget(0.7, 0)) == (
        Selection(stages)
    )


@pytest.mark.parametrize("layers", [[0.1, 0.2], [0.5, 0.0, 0.1], [0.0, 1.0]], ids=str)
def test_shares_that_rise_are_refused(layers: list[float]) -> None:
    with pytest.raises(ValueError, match="must not rise"):
        first_k_by_layer(100, layers, Budget(0.1, 0))


@pytest.mark.parametrize("n", [1, 10, 100])
def test_shares_that_rise_are_refused_however_short_the_segment(n: int) -> None:
    """Whether a schedule is valid must not depend on the image."""
    with pytest.raises(ValueError, match="must not rise"):
        first_k_by_layer(n, [0.05, 0.06], Budget(0.1, 0))


@property_test
@given(n=st.integers(1, 3000), ratio=st.floats(0.001, 1), minimum=minima)
def test_cacheblend_computes_everything_and_then_lets_the_share_of_first_k_stay(
    n: int, ratio: float, minimum: int
) -> None:
    budget = Budget(ratio, minimum)
    selection = CacheBlend(NUM_LAYERS).select(n, budget)
    count = len(only_stage(FirstK().select(n, budget)))
    assert selection.stages == ((0, range(n)),)
    if count == n:
        assert selection.blend is None
    else:
        assert selection.blend == Blend(check_layer=1, share=Fraction(count, n))
        assert selection.blend.count(n) == count


@pytest.mark.parametrize(("num_layers", "can_choose"), [(1, False), (2, False), (3, True)])
def test_cacheblend_needs_a_layer_behind_the_one_it_checks(
    num_layers: int, can_choose: bool
) -> None:
    selection = CacheBlend(num_layers).select(100, Budget(0.1, 0))
    assert selection.stages == ((0, range(100)),)
    assert (selection.blend is not None) == can_choose

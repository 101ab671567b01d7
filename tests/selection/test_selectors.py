"""Recompute-token selectors: how many tokens, and which."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_connector.config import SelectorName, VLCacheConfig
from vlcache_connector.selection import (
    SELECTORS,
    Budget,
    FirstK,
    FullRecompute,
    NoRecompute,
    RecomputeSelector,
)

property_test = settings(deadline=None, max_examples=60)
lengths = st.integers(1, 20_000)
# Ratios as people write them: up to four decimals.
percentages = st.integers(0, 10_000)
minima = st.integers(0, 64)


@pytest.fixture(params=SELECTORS, ids=str)
def selector(request: pytest.FixtureRequest) -> RecomputeSelector:
    return SELECTORS[request.param]()


def test_every_configurable_name_has_a_selector() -> None:
    assert set(SELECTORS) == set(get_args(SelectorName))
    assert VLCacheConfig().selector in SELECTORS


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 256, 9999])
@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("min_tokens", [0, 8, 10_000])
def test_offsets_are_contiguous_and_lie_inside_the_segment(
    selector: RecomputeSelector, num_tokens: int, ratio: float, min_tokens: int
) -> None:
    offsets = selector.select(num_tokens, Budget(ratio, min_tokens))
    assert offsets.step == 1
    assert 0 <= offsets.start <= offsets.stop <= num_tokens


@property_test
@given(n=lengths, ratio=st.floats(0, 1), minimum=minima)
def test_none_recomputes_nothing(n: int, ratio: float, minimum: int) -> None:
    assert len(NoRecompute().select(n, Budget(ratio, minimum))) == 0


@property_test
@given(n=lengths, ratio=st.floats(0, 1), minimum=minima)
def test_full_recomputes_everything(n: int, ratio: float, minimum: int) -> None:
    assert FullRecompute().select(n, Budget(ratio, minimum)) == range(n)


@property_test
@given(n=lengths, percent=percentages, minimum=minima)
def test_first_k_takes_the_ratio_rounded_up_but_at_least_the_minimum(
    n: int, percent: int, minimum: int
) -> None:
    share = Fraction(percent, 10_000)
    expected = min(n, max(minimum, math.ceil(share * n))) if percent else 0
    assert FirstK().select(n, Budget(percent / 10_000, minimum)) == range(expected)


@property_test
@given(n=lengths, minimum=minima)
def test_first_k_with_ratio_one_recomputes_everything(n: int, minimum: int) -> None:
    assert FirstK().select(n, Budget(1.0, minimum)) == range(n)


@property_test
@given(n=lengths, minimum=minima)
def test_first_k_with_ratio_zero_recomputes_nothing_whatever_the_minimum(
    n: int, minimum: int
) -> None:
    assert len(FirstK().select(n, Budget(0.0, minimum))) == 0


@property_test
@given(n=lengths, low=st.floats(0, 1), high=st.floats(0, 1), minimum=minima)
def test_first_k_never_recomputes_less_for_a_higher_ratio(
    n: int, low: float, high: float, minimum: int
) -> None:
    low, high = sorted((low, high))
    few, many = (FirstK().select(n, Budget(ratio, minimum)) for ratio in (low, high))
    assert few.stop <= many.stop


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
    assert FirstK().select(n, Budget(ratio, minimum)) == range(expected)

"""Claims are made where they pay, as far as that is known."""

from __future__ import annotations

from copy import copy
from itertools import count

import numpy as np
import pytest

from vlcache_connector.scheduler.break_even import BreakEven

SPEED = 1000.0
"""Tokens per second of vLLM's own prefill."""


def learned(*claims: tuple[int, float], is_on: bool = True) -> BreakEven:
    """From claims by reused tokens and the seconds that they cost beyond computing."""
    made = BreakEven(is_on=is_on)
    for reused, cost in claims:
        made.learn(reused=reused, computed=20, seconds=20 / SPEED + cost, tokens_per_second=SPEED)
    return made


def least_that_pays(made: BreakEven) -> int:
    # Each is asked of a copy: a claim that is not made casts doubt on what is known.
    return next(tokens for tokens in count(1) if copy(made).pays(tokens, SPEED))


def test_every_claim_pays_until_something_is_known() -> None:
    assert learned().pays(1, SPEED)
    assert learned((10, 9.0)).pays(1, None)
    assert learned((10, 9.0), is_on=False).pays(1, SPEED)
    without_speed = BreakEven(is_on=True)
    without_speed.learn(reused=10, computed=20, seconds=9.0, tokens_per_second=None)
    assert without_speed.pays(1, SPEED)


@pytest.mark.parametrize(("fixed", "per_token"), [(0.1, 0.0), (0.1, 0.0005), (0.0, 0.0005)])
def test_what_pays_follows_from_what_claims_cost(fixed: float, per_token: float) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 1000, 40).tolist()
    made = learned(*((n, (fixed + per_token * n) * rng.uniform(0.95, 1.05)) for n in sizes))
    expected = fixed / (1 / SPEED - per_token)
    assert least_that_pays(made) == pytest.approx(max(1, expected), rel=0.15)


def test_a_load_that_is_slower_than_computing_never_pays() -> None:
    made = learned((100, 0.2), (400, 0.8), (900, 1.8))
    assert not any(copy(made).pays(tokens, SPEED) for tokens in (10, 100, 1000))


def test_claims_of_one_size_tell_of_others_what_they_can() -> None:
    made = learned(*[(400, 0.1)] * 3)
    assert not made.pays(90, SPEED)  # may cost as much as a large one
    assert made.pays(110, SPEED)
    assert made.pays(4000, SPEED)  # in proportion


def test_what_was_learned_long_ago_is_forgotten() -> None:
    slow = [(n, 0.5) for n in (200, 400, 600)]
    fast = [(n, 0.05) for n in (200, 400, 600)]
    assert least_that_pays(learned(*slow)) > 400
    assert least_that_pays(learned(*slow, *fast * 40)) < 80


def test_claims_that_never_paid_are_tried_again_some_time() -> None:
    made = learned((100, 0.15), (200, 0.3))
    refused = next(n for n in count() if made.pays(100, SPEED))
    assert 10 < refused < 100
    made.learn(reused=100, computed=0, seconds=0.15, tokens_per_second=SPEED)
    assert not made.pays(100, SPEED)


def test_a_claim_that_cost_nothing_makes_no_claim_pay_back() -> None:
    """A measured time may be shorter than the computed tokens' share of a prefill."""
    made = BreakEven(is_on=True)
    made.learn(reused=50, computed=100, seconds=0.01, tokens_per_second=SPEED)
    assert made.pays(1, SPEED)

"""Whether reuse is good enough on a model, by donor relation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import numpy as np

from ..calibration import (
    RELATIONS,
    Relation,
    RelationResult,
    Sample,
    Thresholds,
    Verdict,
    Verification,
    verdict_of,
)
from .cases import Comparison, ImageSource, Render, compare, make_cases
from .runner import Runner

DEFAULT_THRESHOLDS = Thresholds(kl=0.05, flip_rate=0.02)
"""Mean KL divergence in nats, and the share of greedy first tokens that differ."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)[::-1]
"""From nothing to everything."""

_Z = 1.645
"""One-sided 95 % quantile of the normal distribution."""


def measure(
    runner: Runner,
    requests: int,
    images: ImageSource,
    render: Render,
    seed: int,
    advance: Callable[[], None],
) -> dict[Relation, list[Comparison]]:
    """Compare reuse, as the engine is configured, with a full recompute.

    Args:
        requests: per relation.
        advance: called once per request.
    """
    result = {}
    for relation in RELATIONS:
        cases = make_cases([relation], requests, images, render, seed=seed, label="verify")
        result[relation] = [
            comparison for case in cases for comparison in compare(runner, case, [{}], advance)
        ]
    return result


def result_of(comparisons: Sequence[Comparison], thresholds: Thresholds) -> RelationResult:
    """A relation passes when the measured means keep the thresholds.

    That is a statement about the sample; `upper_bounds` is the one about the requests to come.
    """
    kl = float(np.mean([c.kl for c in comparisons]))
    flip_rate = float(np.mean([c.flipped for c in comparisons]))
    return RelationResult(
        requests=len(comparisons),
        kl=float(f"{kl:.4g}"),
        flip_rate=round(flip_rate, 4),
        passed=kl <= thresholds.kl and flip_rate <= thresholds.flip_rate,
    )


def upper_bounds(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """One-sided 95 % confidence bounds of the mean KL divergence and of the flip rate.

    The first is the normal approximation, the second Wilson's score bound. Without a single flip
    the latter is 2.7 / (n + 2.7): 4 % of 64 requests, 2 % of 133.
    """
    n = len(comparisons)
    kl = np.array([c.kl for c in comparisons])
    spread = float(kl.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    rate = sum(c.flipped for c in comparisons) / n
    middle = rate + _Z**2 / (2 * n)
    half = _Z * math.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2))
    return float(kl.mean()) + _Z * spread, (middle + half) / (1 + _Z**2 / n)


def verification_of(
    measured: Mapping[Relation, Sequence[Comparison]],
    thresholds: Thresholds,
    *,
    selector: str,
    recompute_ratio: float,
    sample: Sample,
) -> Verification:
    """What goes into the file."""
    relations = {
        relation: result_of(comparisons, thresholds) for relation, comparisons in measured.items()
    }
    return Verification(
        selector=selector,
        recompute_ratio=recompute_ratio,
        sample=sample,
        thresholds=thresholds,
        relations=relations,
        verdict=verdict_of(relations),
    )

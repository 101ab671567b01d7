"""Where a model needs recomputation: schedules for the `layer_aware` selector.

Measured is D(d, r): the KL divergence of the first answer token from a full recompute when the
first share r of each image's tokens is recomputed in the layers below d, and everything else is
reused. From it, a budget of token-layers is dealt to the layers (VLCache, arXiv 2512.12977,
dynamic layer-aware recomputation), under the sparse prefill's rule that shares never rise with
depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..calibration import LayerSchedule, Relation
from .cases import Case, Comparison, compare
from .runner import Runner

BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Shares of the images' token-layers that schedules are made for."""
RELATIONS_MEASURED: tuple[Relation, ...] = ("lone_donor", "other_ordinal", "same_ordinal")
_RANKS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_MAX_BINS = 7


@dataclass(frozen=True)
class Surface:
    """D on a grid.

    Attributes:
        depths: layers below which is recomputed, from 0 to the number of layers.
        ranks: recomputed shares of an image's tokens, from 0 to 1.
        kl: float64 [depths, ranks], in nats.
    """

    depths: tuple[int, ...]
    ranks: tuple[float, ...]
    kl: np.ndarray


def cut_layers(num_layers: int) -> tuple[int, ...]:
    """The depths of the grid, evenly spread."""
    return tuple(sorted({round(num_layers * cut / _MAX_BINS) for cut in range(_MAX_BINS + 1)}))


def measure_surface(
    runner: Runner, cases: Iterable[Case], num_layers: int, advance: Callable[[], None]
) -> Surface:
    """Mean D over `cases`.

    Along d = 0 and r = 0 nothing is recomputed, which is one measurement; at the far corner
    everything is, which needs none.

    Args:
        advance: called `num_grid_points` times per case.
    """
    depths = cut_layers(num_layers)
    points = _points(num_layers)
    options = [
        {"layer_ratios": [_RANKS[j]] * depths[i] + [0.0] * (num_layers - depths[i])}
        for i, j in points
    ]
    mean = _mean_kl([compare(runner, case, options, advance) for case in cases])
    kl = np.zeros((len(depths), len(_RANKS)))
    kl[0, :] = kl[:, 0] = mean[0]
    for point, value in zip(points[1:], mean[1:], strict=True):
        kl[point] = value
    return Surface(depths, _RANKS, kl)


def num_grid_points(num_layers: int) -> int:
    """Measurements per case."""
    return len(_points(num_layers))


def _points(num_layers: int) -> list[tuple[int, int]]:
    inner = [(i, j) for i in range(1, len(cut_layers(num_layers))) for j in range(1, len(_RANKS))]
    return [(0, 0), *inner[:-1]]


def allocate(surface: Surface, budget: float) -> list[float]:
    """Deal a budget to the layers, greedily.

    The layers between two depths of the grid (a bin) share one number s_i; s_0 >= s_1 >= ... is a
    staircase. Only rectangles were measured, so D of a staircase is taken to be additive over the
    cells (bin x stretch of ranks) of which it consists, each with its mixed difference of D.
    Summed up over the cells of one bin,

        D(s) = D(0, 0) - sum_i [D(d_i, s_i) - D(d_i+1, s_i)],

    which is exact for rectangles; between ranks it is interpolated.

    A step raises all bins up to one of them to at least one of the grid's ranks: the step with the
    largest drop of D per token-layer is taken. Single cells would not do: an image token's KV in
    layer 0 does not depend on its context, so that to recompute it there brings nothing but the
    way to the layers above. A step that costs more than is left is taken up to a lower rank.

    Args:
        budget: mean share over the layers, in [0, 1].

    Returns:
        The share of each layer; their mean is the budget, within rounding to 4 digits.
    """
    ranks = np.array(surface.ranks)
    widths = np.diff(surface.depths)
    costs = widths / widths.sum()
    drops = surface.kl[:-1] - surface.kl[1:]

    def drop(shares: np.ndarray) -> float:
        return sum(float(np.interp(s, ranks, row)) for s, row in zip(shares, drops, strict=True))

    shares = np.zeros(len(widths))
    while (left := budget - float(costs @ shares)) > 1e-9:
        steps = [
            raised
            for deepest in range(len(widths))
            for rank in ranks
            if (raised := _raise(shares, costs, deepest, rank, left)) is not None
        ]
        before = shares
        shares = max(steps, key=lambda s: (drop(s) - drop(before)) / float(costs @ (s - before)))
    return [round(share, 4) for share in np.repeat(shares, widths).tolist()]


def _raise(
    shares: np.ndarray, costs: np.ndarray, deepest: int, rank: float, left: float
) -> np.ndarray | None:
    """The bins up to `deepest` raised to at least `rank`, or as far as `left` allows.

    Returns:
        None when that changes nothing.
    """

    def raised_to(level: float) -> np.ndarray:
        return np.concatenate([np.maximum(shares[: deepest + 1], level), shares[deepest + 1 :]])

    def cost(level: float) -> float:
        return float(costs @ (raised_to(level) - shares))

    if cost(rank) <= 1e-9:
        return None
    if cost(rank) > left:
        # The cost of a level is linear between the present shares.
        levels = sorted({rank, *(share for share in shares[: deepest + 1] if share < rank)})
        rank = float(np.interp(left, [cost(level) for level in levels], levels))
    return raised_to(rank)


@dataclass(frozen=True)
class Validated:
    """A schedule against `first_k` on requests that it was not made from.

    Attributes:
        schedule: what goes into the file: the uniform one where the allocated one was no better.
        allocated_kl: of the allocated schedule, mean, in nats.
        token_layers, first_k_token_layers: computed per request, text included, mean.
    """

    schedule: LayerSchedule
    allocated_kl: float
    token_layers: float
    first_k_token_layers: float

    @property
    def is_uniform(self) -> bool:
        """Whether `first_k` was better."""
        assert self.schedule.first_k_kl is not None
        return self.allocated_kl > self.schedule.first_k_kl


def validate(
    runner: Runner,
    cases: Iterable[Case],
    allocated: Sequence[Sequence[float]],
    advance: Callable[[], None],
) -> list[Validated]:
    """Measure an allocation for each of `BUDGETS`, and keep it where it is no worse than `first_k`.

    Args:
        allocated: share per layer, one list per budget.
        advance: called twice per budget and case.
    """
    options: list[dict[str, Any]] = [{"layer_ratios": list(layers)} for layers in allocated]
    options += [{"selector": "first_k", "recompute_ratio": budget} for budget in BUDGETS]
    comparisons = [compare(runner, case, options, advance) for case in cases]
    kl = _mean_kl(comparisons)
    work = np.mean([[c.token_layers for c in row] for row in comparisons], axis=0)
    result = []
    for index, (budget, layers) in enumerate(zip(BUDGETS, allocated, strict=True)):
        uniform = index + len(BUDGETS)
        if kl[index] > kl[uniform]:
            layers = [budget] * len(layers)
        schedule = LayerSchedule(
            ratio=budget,
            layers=list(layers),
            kl=_rounded(min(kl[index], kl[uniform])),
            first_k_kl=_rounded(kl[uniform]),
        )
        result.append(
            Validated(schedule, _rounded(kl[index]), float(work[index]), float(work[uniform]))
        )
    return result


def _mean_kl(comparisons: Sequence[Sequence[Comparison]]) -> np.ndarray:
    """Over the cases: float64 [options]."""
    return np.mean([[c.kl for c in row] for row in comparisons], axis=0)


def _rounded(kl: float) -> float:
    return float(f"{kl:.4g}")

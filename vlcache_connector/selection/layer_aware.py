"""Each layer its own number of tokens: most where the answer is most sensitive to reuse."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

from ..calibration import LayerSchedule
from .base import Budget, RecomputeSelector, Selection


class LayerAware(RecomputeSelector):
    """Recompute the first `ceil(r_l * n)` tokens in layer l (VLCache, dynamic layer-aware
    recomputation). The shares r_l never rise with l and come from a calibration of the model.

    Args:
        schedules: shares per layer for some ratios; in between they are interpolated.
    """

    def __init__(self, schedules: Sequence[LayerSchedule]) -> None:
        num_layers = len(schedules[0].layers)
        known = {schedule.ratio: tuple(schedule.layers) for schedule in schedules}
        known |= {0.0: (0.0,) * num_layers, 1.0: (1.0,) * num_layers}
        self._known = sorted(known.items())

    def select(self, num_tokens: int, budget: Budget) -> Selection:
        return first_k_by_layer(num_tokens, self._shares(budget.ratio), budget)

    def _shares(self, ratio: float) -> list[float]:
        after = bisect_left(self._known, ratio, key=lambda entry: entry[0])
        high_ratio, high = self._known[after]
        if high_ratio == ratio:
            return list(high)
        low_ratio, low = self._known[after - 1]
        weight = (ratio - low_ratio) / (high_ratio - low_ratio)
        mixed = (a + weight * (b - a) for a, b in zip(low, high, strict=True))
        return list(accumulate(mixed, min))  # rounding may lift one above the one before it


def first_k_by_layer(num_tokens: int, shares: Sequence[float], budget: Budget) -> Selection:
    """The first `ceil(shares[l] * num_tokens)` tokens in layer l.

    Raises:
        ValueError: the shares rise from one layer to the next.
    """
    if any(below < above for below, above in pairwise(shares)):
        raise ValueError(f"recompute shares must not rise from layer to layer: {list(shares)}")
    return Selection.first_k([budget.count(num_tokens, share) for share in shares])

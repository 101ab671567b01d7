"""The tokens whose keys deviate most from the donor's: CacheBlend's rule."""

from __future__ import annotations

from fractions import Fraction

from ..protocol import Blend
from .base import Budget, RecomputeSelector, Selection


class CacheBlend(RecomputeSelector):
    """Compute all tokens up to a check layer, then go on with those whose keys deviate most
    there (CacheBlend, arXiv 2405.16444, section 4.3).

    The share is of what the layers behind the check layer compute; the layers up to it come on
    top, and are counted. Layer 0 can't be the check layer: its keys depend on the token alone.

    Args:
        num_layers: decoder layers of the model.
    """

    CHECK_LAYER = 1

    def __init__(self, num_layers: int) -> None:
        self._can_choose = num_layers > self.CHECK_LAYER + 1

    def select(self, num_tokens: int, budget: Budget) -> Selection:
        count = budget.count(num_tokens)
        everything: tuple[tuple[int, range], ...] = ((0, range(num_tokens)),)
        if count == 0:
            return Selection.uniform(range(0))
        if not self._can_choose or count == num_tokens:
            return Selection(everything)
        return Selection(everything, Blend(self.CHECK_LAYER, Fraction(count, num_tokens)))

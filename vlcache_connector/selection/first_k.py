"""The first tokens of the segment: errors of early tokens reach all later ones."""

from __future__ import annotations

import math

from .base import Budget, RecomputeSelector


class FirstK(RecomputeSelector):
    """Recompute the first `max(min_tokens, ceil(ratio * n))` tokens (VLCache, section on
    selective recomputation; also EPIC's LegoLink and MPIC)."""

    def select(self, num_tokens: int, budget: Budget) -> range:
        if budget.ratio == 0:
            return range(0)
        # A product such as 0.07 * 100 is a hair above 7; it must not become 8 tokens.
        count = math.ceil(round(budget.ratio * num_tokens, 6))
        return range(min(num_tokens, max(budget.min_tokens, count)))

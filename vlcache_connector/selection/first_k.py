"""The first tokens of the segment: errors of early tokens reach all later ones."""

from __future__ import annotations

from .base import Budget, RecomputeSelector, Selection


class FirstK(RecomputeSelector):
    """Recompute the first `max(min_tokens, ceil(ratio * n))` tokens in every layer (VLCache,
    section on selective recomputation; also EPIC's LegoLink and MPIC)."""

    def select(self, num_tokens: int, budget: Budget) -> Selection:
        return Selection.uniform(range(budget.count(num_tokens)))

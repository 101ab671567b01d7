"""No recomputation: blind reuse, the lower bound of cost and accuracy."""

from __future__ import annotations

from .base import Budget, RecomputeSelector, Selection


class NoRecompute(RecomputeSelector):
    """Reuse every token."""

    def select(self, num_tokens: int, budget: Budget) -> Selection:
        return Selection.uniform(range(0))

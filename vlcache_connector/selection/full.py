"""Recompute everything: exact, through the same sparse prefill."""

from __future__ import annotations

from .base import Budget, RecomputeSelector, Selection


class FullRecompute(RecomputeSelector):
    """Reuse no KV; the stored encoder rows still save the vision encoder's pass."""

    def select(self, num_tokens: int, budget: Budget) -> Selection:
        return Selection.uniform(range(num_tokens))

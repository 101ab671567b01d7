"""Random tokens of the segment: what any rule has to beat."""

from __future__ import annotations

import random

from .base import Budget, RecomputeSelector, Selection


class RandomK(RecomputeSelector):
    """Recompute as many tokens as `FirstK` does, anywhere in the segment, in every layer.

    The choice depends on the segment's length only, so that all ranks and runs agree.
    """

    def select(self, num_tokens: int, budget: Budget) -> Selection:
        chosen = random.Random(num_tokens).sample(range(num_tokens), budget.count(num_tokens))
        return Selection.uniform(sorted(chosen))

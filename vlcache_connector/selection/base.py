"""The interface of recompute-token selectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """How much of a segment may be recomputed.

    Attributes:
        ratio: share of the segment's tokens, in [0, 1].
        min_tokens: least number of tokens when `ratio` is above zero.
    """

    ratio: float
    min_tokens: int


class RecomputeSelector(ABC):
    """Picks the tokens of a reused segment that are computed anew in the target request.

    Reuse error of a token reaches every later one: `e_total(k) = e_self(k) + sum_{i<k}
    e_prop(i -> k)` (VLCache, arXiv 2512.12977, error analysis).
    """

    @abstractmethod
    def select(self, num_tokens: int, budget: Budget) -> range:
        """Offsets, within a segment of `num_tokens` tokens, of the tokens to recompute."""

"""The interface of recompute-token selectors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol import Blend


@dataclass(frozen=True)
class Budget:
    """How much of a segment may be recomputed.

    Attributes:
        ratio: share of the segment's tokens, in [0, 1], on average over the layers.
        min_tokens: least number of tokens, wherever the share is above zero.
    """

    ratio: float
    min_tokens: int

    def count(self, num_tokens: int, ratio: float | None = None) -> int:
        """Tokens of a segment of `num_tokens`, at this ratio or another one."""
        share = self.ratio if ratio is None else ratio
        if share <= 0:
            return 0
        # A product such as 0.07 * 100 is a hair above 7; it must not become 8 tokens.
        return min(num_tokens, max(self.min_tokens, math.ceil(round(share * num_tokens, 6))))


@dataclass(frozen=True)
class Selection:
    """What is recomputed of one segment.

    Attributes:
        stages: (first decoder layer, offsets in order) each; the first begins at layer 0, each
            is a subset of the one before.
        blend: a further choice, made while the prefill runs.
    """

    stages: tuple[tuple[int, Sequence[int]], ...]
    blend: Blend | None = None

    @classmethod
    def uniform(cls, offsets: Sequence[int]) -> Selection:
        """The same tokens in all layers."""
        return cls(((0, offsets),))

    @classmethod
    def first_k(cls, counts: Sequence[int]) -> Selection:
        """The first `counts[l]` tokens in layer l; the counts must not rise."""
        return cls(
            tuple(
                (layer, range(count))
                for layer, count in enumerate(counts)
                if layer == 0 or count != counts[layer - 1]
            )
        )


class RecomputeSelector(ABC):
    """Picks the tokens of a reused segment that are computed anew in the target request.

    Reuse error of a token reaches every later one: `e_total(k) = e_self(k) + sum_{i<k}
    e_prop(i -> k)` (VLCache, arXiv 2512.12977, error analysis).
    """

    @abstractmethod
    def select(self, num_tokens: int, budget: Budget) -> Selection:
        """What to recompute of a segment of `num_tokens` tokens."""

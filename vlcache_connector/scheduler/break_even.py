"""Whether a claim pays: what it saves against what it costs.

A claim saves the computation of the tokens that are reused. It costs a load and a forward of its
own: reading all weights once more and, in short passes, launching every kernel once more. For a
small image on a fast model that is more than it saves. Both are learned: the speed of vLLM's own
prefill, and what claims have cost beyond the tokens that they computed.
"""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.95
"""What an observation still counts after the next one."""
_DOUBT = 0.98
"""What a cost that keeps claims from being made is taken for after each of them: it may have been
that of a busy moment, and nothing else would ever show."""


@dataclass
class _Line:
    """Least squares through (x, y), older points counting less and less."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        for name, value in (("n", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, _MEMORY * getattr(self, name) + value)

    def at(self, x: float) -> float:
        """Neither the constant part nor the slope is below zero."""
        spread = self.n * self.xx - self.x * self.x
        if spread <= 1e-6 * self.n * self.xx:
            # All at one place: a smaller claim may cost as much, a larger one does in proportion.
            return self.y / self.n * max(1.0, x * self.n / self.x)
        slope = (self.n * self.xy - self.x * self.y) / spread
        if slope < 0:
            return self.y / self.n
        constant = (self.y - slope * self.x) / self.n
        return constant + slope * x if constant >= 0 else self.xy / self.xx * x


class BreakEven:
    """Learns what claims cost, and weighs new ones.

    Args:
        is_on: False makes every claim pay.
    """

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._cost = _Line()
        self._doubt = 1.0

    def learn(
        self, *, reused: int, computed: int, seconds: float, tokens_per_second: float | None
    ) -> None:
        """A claim was filled.

        Args:
            reused: tokens that were reused.
            computed: tokens that its sparse prefill computed.
            seconds: that loading and computing took.
            tokens_per_second: of vLLM's own prefill; None: not known yet.
        """
        if reused and tokens_per_second is not None:
            self._cost.add(reused, max(0.0, seconds - computed / tokens_per_second))
            self._doubt = 1.0

    def pays(self, reused: int, tokens_per_second: float | None) -> bool:
        """Whether a claim that reuses so many tokens is worth it, as far as that is known."""
        if not self._is_on or tokens_per_second is None or not self._cost.n:
            return True
        if self._doubt * self._cost.at(reused) <= reused / tokens_per_second:
            return True
        self._doubt *= _DOUBT
        return False

"""How fast this worker computes a prefill, for weighing loads against it."""

from __future__ import annotations

from .stopwatch import Instant, is_past, seconds_between

_LEAST_TOKENS = 64
"""Steps with fewer tokens mostly measure what a step costs anyway."""
_WEIGHT = 0.2
"""Of the latest step in the running mean."""


class Pace:
    """Tokens per second of vLLM's own forwards, without the vision encoder.

    Args:
        pinned: a known speed, which nothing changes.
    """

    def __init__(self, pinned: float | None = None) -> None:
        self._is_pinned = pinned is not None
        self._running: list[tuple[int, Instant, Instant]] = []
        self.tokens_per_second = pinned
        """None until a step was long enough to tell."""

    def add(self, num_tokens: int, start: Instant, end: Instant) -> None:
        """A forward of `num_tokens` has run, or is queued on the device."""
        if self._is_pinned:
            return
        if num_tokens >= _LEAST_TOKENS:
            self._running.append((num_tokens, start, end))
        while self._running and is_past(self._running[0][2]):
            tokens, *lap = self._running.pop(0)
            self._learn(tokens / seconds_between(*lap))

    def _learn(self, tokens_per_second: float) -> None:
        before = self.tokens_per_second
        if before is None:
            self.tokens_per_second = tokens_per_second
        else:
            self.tokens_per_second = before + _WEIGHT * (tokens_per_second - before)

"""How fast this worker computes a prefill, for weighing loads against it."""

from __future__ import annotations

import time

import torch

_LEAST_TOKENS = 64
"""Steps with fewer tokens mostly measure what a step costs anyway."""
_WEIGHT = 0.2
"""Of the latest step in the running mean."""


class Pace:
    """Tokens per second of vLLM's own forwards, without the vision encoder.

    Args:
        device: of the model; on accelerators events tell the time, so that nothing waits.
        pinned: a known speed, which nothing changes.
    """

    def __init__(self, device: torch.device, pinned: float | None = None) -> None:
        self._on_host = device.type == "cpu"
        self._is_pinned = pinned is not None
        self._began: float | torch.Event | None = None
        self._running: list[tuple[int, torch.Event, torch.Event]] = []
        self.tokens_per_second = pinned
        """None until a step was long enough to tell."""

    def begin(self) -> None:
        """vLLM's own forward is about to start."""
        if not self._is_pinned:
            self._began = self._now()

    def end(self, num_tokens: int) -> None:
        """It is over, or queued on the device, and computed `num_tokens`."""
        began, self._began = self._began, None
        if began is None or num_tokens < _LEAST_TOKENS:
            return
        if isinstance(began, float):
            self._add(num_tokens / (time.perf_counter() - began))
        else:
            self._running.append((num_tokens, began, self._mark()))
        while self._running and self._running[0][2].query():
            tokens, start, end = self._running.pop(0)
            self._add(tokens / (start.elapsed_time(end) / 1000))

    def _now(self) -> float | torch.Event:
        return time.perf_counter() if self._on_host else self._mark()

    @staticmethod
    def _mark() -> torch.Event:
        event = torch.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, tokens_per_second: float) -> None:
        before = self.tokens_per_second
        if before is None:
            self.tokens_per_second = tokens_per_second
        else:
            self.tokens_per_second = before + _WEIGHT * (tokens_per_second - before)

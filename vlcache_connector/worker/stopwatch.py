"""How long the parts of a step take in the model's own stream.

On accelerators events tell the time, so that nothing waits, and what counts is when the device is
done, not when the host asked it to. An event is read once the device has passed it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import torch

from ..protocol import TTFTPart

Instant = float | torch.Event
"""A point in time: seconds on the host, or an event in the model's stream."""


def clock_of(device: torch.device) -> Callable[[], Instant]:
    """What tells the time of a model on `device`."""
    return time.perf_counter if device.type == "cpu" else _mark


def _mark() -> torch.Event:
    event = torch.Event(enable_timing=True)
    event.record()
    return event


def is_past(instant: Instant) -> bool:
    """Whether the device has got there."""
    return isinstance(instant, float) or instant.query()


def seconds_between(start: Instant, end: Instant) -> float:
    """Seconds from one point to another of the same kind, both past."""
    if isinstance(start, float) or isinstance(end, float):
        return end - start  # type: ignore[operator]  # of the same kind
    return start.elapsed_time(end) / 1000


class Laps:
    """Points in time, in order, each with the part that begins there; see `protocol.Laps`."""

    def __init__(self) -> None:
        self._begun: list[tuple[TTFTPart | None, Instant]] = []

    def add(self, part: TTFTPart | None, instant: Instant) -> None:
        """`part` begins at `instant`; None: nothing that is timed."""
        self._begun.append((part, instant))

    def seconds(self) -> dict[TTFTPart, float]:
        """Seconds by part; nothing while the device is not through with all of them."""
        if not self._begun or not is_past(self._begun[-1][1]):
            return {}
        total: defaultdict[TTFTPart, float] = defaultdict(float)
        for (part, start), (_, end) in pairwise(self._begun):
            if part is not None:
                total[part] += seconds_between(start, end)
        return dict(total)


class Stopwatch:
    """Times the parts of one step after the other.

    Args:
        clock: tells the time, see `clock_of`.

    Attributes:
        laps: what has run in this step; it grows until the next one begins.
    """

    def __init__(self, clock: Callable[[], Instant]) -> None:
        self._clock = clock
        self.laps = Laps()

    def restart(self) -> None:
        """A step begins."""
        self.laps = Laps()

    def start(self, part: TTFTPart | None) -> Instant:
        """From now on it is `part` that runs; None: nothing that is timed."""
        now = self._clock()
        self.laps.add(part, now)
        return now

"""How long transfers take."""

from __future__ import annotations

import threading


class TransferTime:
    """How long transfers take: a latency plus bytes over a bandwidth, learned from transfers.

    The last ten or so count. Thread-safe.
    """

    _WEIGHT = 0.1

    def __init__(self) -> None:
        """Nothing known."""
        self._lock = threading.Lock()
        # Weighted means of bytes, seconds, bytes * seconds, bytes * bytes.
        self._means: tuple[float, float, float, float] | None = None

    def observe(self, num_bytes: int, seconds: float) -> None:
        """Learn from a transfer that succeeded; `num_bytes` above zero."""
        new = (num_bytes, seconds, num_bytes * seconds, num_bytes * num_bytes)
        with self._lock:
            old = self._means or new
            a, b, c, d = (x + self._WEIGHT * (y - x) for x, y in zip(old, new, strict=True))
            self._means = (a, b, c, d)

    def estimate(self, num_bytes: int) -> float | None:
        """Seconds for a transfer of this many bytes; None before the first one."""
        line = self.line()
        return None if line is None else line[0] + line[1] * num_bytes

    def line(self) -> tuple[float, float] | None:
        """Latency in seconds, and seconds per byte; None before the first transfer."""
        with self._lock:
            means = self._means
        if means is None:
            return None
        size, seconds, product, square = means
        rate = seconds / size
        # The line of least squares, drawn towards the one through the origin: with transfers
        # of one size, nothing tells latency and bandwidth apart.
        prior = 0.01 * size * size
        variance = max(0.0, square - size * size)
        slope = (product - size * seconds + prior * rate) / (variance + prior)
        slope = min(max(slope, 0.0), rate)
        return max(0.0, seconds - slope * size), slope

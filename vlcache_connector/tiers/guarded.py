"""A tier as the transfer threads use it: no call raises, hangs on a broken server, or is uncounted.

What goes wrong is a miss or a dropped write to the caller; the counters tell it apart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from typing_extensions import Buffer

from .base import Deadline, Fault, Name, NoAnswer, Tier, TierError, TierName
from .breaker import CircuitBreaker

logger = logging.getLogger(__name__)

Operation = Literal["sizes", "read", "write", "remove", "record_model"]
T = TypeVar("T")

# These say nothing bad about the tier's health: it answered.
_ANSWERS: tuple[Fault, ...] = ("full", "damaged")


@dataclass
class TierCounters:
    """What a tier did since the counters were last taken.

    Attributes:
        calls: calls that were made, by operation.
        skipped: calls that were not made because the breaker is open, by operation.
        faults: calls that failed, by operation and fault.
        bytes_read: bytes of segments that were read.
        bytes_written: bytes of segments that were written.
        damaged: segments that the reader found damaged after they were read.
    """

    calls: Counter[Operation] = field(default_factory=Counter)
    skipped: Counter[Operation] = field(default_factory=Counter)
    faults: Counter[tuple[Operation, Fault]] = field(default_factory=Counter)
    bytes_read: int = 0
    bytes_written: int = 0
    damaged: int = 0


class TransferTime:
    """How long transfers take: a latency plus bytes over a bandwidth, learned from transfers.

    The last ten or so count. Thread-safe.
    """

    _WEIGHT = 0.1

    def __init__(
        self, latency_seconds: float | None = None, bytes_per_second: float | None = None
    ) -> None:
        """
        Args:
            latency_seconds: not learned, but this.
            bytes_per_second: not learned, but this.
        """
        self._latency = latency_seconds
        self._bandwidth = bytes_per_second
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
        if self._latency is not None and self._bandwidth is not None:
            return self._latency, 1 / self._bandwidth
        if means is None:
            return None
        size, seconds, product, square = means
        rate = seconds / size
        if self._bandwidth is not None:
            slope = 1 / self._bandwidth
        elif self._latency is not None:
            slope = max(0.0, seconds - self._latency) / size
        else:
            # The line of least squares, drawn towards the one through the origin: with transfers
            # of one size, nothing tells latency and bandwidth apart.
            prior = 0.01 * size * size
            variance = max(0.0, square - size * size)
            slope = (product - size * seconds + prior * rate) / (variance + prior)
            slope = min(max(slope, 0.0), rate)
        latency = self._latency if self._latency is not None else seconds - slope * size
        return max(0.0, latency), slope


class GuardedTier:
    """A tier behind a circuit breaker. Every method may be called from any thread; none raises."""

    def __init__(
        self,
        tier: Tier,
        breaker: CircuitBreaker,
        *,
        read_time: TransferTime | None = None,
        write_time: TransferTime | None = None,
    ) -> None:
        """Take a tier over.

        Args:
            tier: closed by `close`.
            breaker: of this tier alone.
            read_time: with what is pinned of it; by default all is learned.
            write_time: likewise.
        """
        self._tier = tier
        self._breaker = breaker
        self._read_time = read_time or TransferTime()
        self._write_time = write_time or TransferTime()
        self._lock = threading.Lock()
        self._counters = TierCounters()
        self._logged: set[tuple[Operation, type[BaseException]]] = set()

    @property
    def name(self) -> TierName:
        """Of the tier."""
        return self._tier.name

    @property
    def breaker(self) -> CircuitBreaker:
        """Its state tells whether calls are made at present."""
        return self._breaker

    def estimate_read_seconds(self, num_bytes: int) -> float | None:
        """Seconds that reading a segment of this many bytes takes; None: nothing known."""
        return self._read_time.estimate(num_bytes)

    def read_line(self) -> tuple[float, float] | None:
        """Latency of reading in seconds, and seconds per byte; None: nothing known."""
        return self._read_time.line()

    def estimate_write_seconds(self, num_bytes: int) -> float | None:
        """Seconds that writing a segment of this many bytes takes; None: nothing known."""
        return self._write_time.estimate(num_bytes)

    def sizes(self, names: Sequence[Name], deadline: Deadline) -> list[int | None] | NoAnswer:
        """As `Tier.sizes`, if the tier gives an answer."""
        found = self._call("sizes", deadline, lambda: self._tier.sizes(names, deadline))
        return found if isinstance(found, str) else found[0]

    def read(
        self, name: Name, max_bytes: int, deadline: Deadline
    ) -> list[memoryview] | NoAnswer | None:
        """As `Tier.read`, if the tier gives an answer. What it finds damaged itself is removed."""
        damaged = False

        def read() -> list[memoryview] | None:
            nonlocal damaged
            try:
                return self._tier.read(name, max_bytes, deadline)
            except TierError as error:
                damaged = error.fault == "damaged"
                raise

        found = self._call("read", deadline, read)
        if damaged:
            self.remove([name], deadline)
        if isinstance(found, str):
            return found
        objects, seconds = found
        if objects is None:
            return None
        num_bytes = sum(obj.nbytes for obj in objects)
        with self._lock:
            self._counters.bytes_read += num_bytes
        if num_bytes:
            self._read_time.observe(num_bytes, seconds)
        return objects

    def learn_timeout(self, num_bytes: int, seconds: float) -> None:
        """A read was given up after so long: a whole one takes no less."""
        if seconds > (self._read_time.estimate(num_bytes) or 0.0):
            self._read_time.observe(num_bytes, seconds)

    def write(self, name: Name, objects: Sequence[Buffer], deadline: Deadline) -> bool:
        """As `Tier.write`; whether it was stored."""
        done = self._call("write", deadline, lambda: self._tier.write(name, objects, deadline))
        if isinstance(done, str):
            return False
        num_bytes = sum(memoryview(obj).nbytes for obj in objects)
        with self._lock:
            self._counters.bytes_written += num_bytes
        if num_bytes:
            self._write_time.observe(num_bytes, done[1])
        return True

    def remove(self, names: Sequence[Name], deadline: Deadline) -> int:
        """As `Tier.remove`; zero when it fails."""
        done = self._call("remove", deadline, lambda: self._tier.remove(names, deadline))
        return 0 if isinstance(done, str) else done[0]

    def damaged(self, name: Name, deadline: Deadline) -> None:
        """Report that what `read` returned is no valid segment: it is counted and removed."""
        with self._lock:
            self._counters.damaged += 1
        self.remove([name], deadline)

    def record_model(self, fingerprint: str, model_name: str, deadline: Deadline) -> bool:
        """As `Tier.record_model`; whether it was noted."""
        record = lambda: self._tier.record_model(fingerprint, model_name, deadline)  # noqa: E731
        return not isinstance(self._call("record_model", deadline, record), str)

    def take_counters(self) -> TierCounters:
        """The counters since the last time; they begin at zero again."""
        with self._lock:
            taken, self._counters = self._counters, TierCounters()
        return taken

    def close(self) -> None:
        """Close the tier. Idempotent."""
        try:
            self._tier.close()
        except Exception:
            logger.exception("Closing the %s tier failed", self.name)

    def _call(
        self, operation: Operation, deadline: Deadline, call: Callable[[], T]
    ) -> tuple[T, float] | NoAnswer:
        """What a call returned, and how long it took in seconds."""
        if deadline.seconds_left == 0.0:  # the caller came too late; the tier has no part in it
            self._count(operation, "timeout")
            return "failed"
        permit = self._breaker.acquire()
        if permit is None:
            with self._lock:
                self._counters.skipped[operation] += 1
            return "skipped"
        started = time.monotonic()
        failure: str | None = "interrupted"
        try:
            result = call()
            failure = None
        except TierError as error:
            self._count(operation, error.fault)
            failure = None if error.fault in _ANSWERS else f"{error.fault}: {error}"
            return "failed"
        except Exception as error:
            self._count(operation, "other")
            self._log_once(operation, error)
            failure = f"other: {type(error).__name__}"
            return "failed"
        finally:
            seconds = time.monotonic() - started
            # Requests wait for lookups and reads only.
            awaited = seconds if operation in ("sizes", "read") else None
            self._breaker.record(permit, awaited, failure)
            with self._lock:
                self._counters.calls[operation] += 1
        return result, seconds

    def _count(self, operation: Operation, fault: Fault) -> None:
        with self._lock:
            self._counters.faults[operation, fault] += 1

    def _log_once(self, operation: Operation, error: Exception) -> None:
        kind = (operation, type(error))
        with self._lock:
            known = kind in self._logged
            self._logged.add(kind)
        if not known:
            logger.error(
                "The %s of the %s tier failed; this is logged once",
                operation,
                self.name,
                exc_info=error,
            )

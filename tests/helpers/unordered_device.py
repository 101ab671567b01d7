"""A device whose streams run when they like: what is ordered by events, and nothing else."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable

from torch import Tensor

from vlcache_connector.streams import Mark, Pair


class Event:
    """Recorded by a stream when it gets there."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.passed = False
        self.time = 0

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds: one for each operation of the model's in between."""
        assert self.passed
        assert end.passed
        return float(end.time - self.time)

    def synchronize(self) -> None:
        while not self.passed:
            self._device.step()


class Device:
    """Two streams of operations; each call may let some of what is queued run.

    Attributes:
        main: the model's stream.
        num_copies: calls of `copy`.
    """

    def __init__(self, seed: int, *, is_deaf: bool = False) -> None:
        self._random = random.Random(seed)
        self._is_deaf = is_deaf
        self._lock = threading.RLock()
        # One stream may be far ahead of the other.
        self._main_first = self._random.choice((0.02, 0.5, 0.98))
        self.num_copies = 0
        self._num_run = 0
        self.main: deque[Callable[[], bool]] = deque()
        self._side: deque[Callable[[], bool]] = deque()

    def step(self) -> bool:
        """Run one operation of a stream that can go on; False if none can."""
        with self._lock:
            streams = [self.main, self._side]
            if self._random.random() > self._main_first:
                streams.reverse()
            for stream in streams:
                if stream and stream[0]():
                    stream.popleft()
                    return True
            return False

    def drain(self) -> None:
        """Run everything."""
        while self.step():
            pass
        assert not self.main
        assert not self._side, "the streams wait for each other"

    def run(self, operation: Callable[[], object]) -> None:
        """Queue an operation of the model's."""

        def run() -> bool:
            operation()
            self._num_run += 1
            return True

        self._queue(self.main, run)

    def _queue(self, stream: deque[Callable[[], bool]], operation: Callable[[], bool]) -> None:
        with self._lock:
            stream.append(operation)
        for _ in range(self._random.choice((0, 0, 0, 1, 2))):
            self.step()

    def _record(self, stream: deque[Callable[[], bool]]) -> Event:
        event = Event(self)

        def operation() -> bool:
            event.passed, event.time = True, self._num_run
            return True

        self._queue(stream, operation)
        return event

    def _wait(self, stream: deque[Callable[[], bool]], mark: Mark) -> None:
        self._queue(stream, lambda: self._is_deaf or mark.query())

    # -- `vlcache_connector.streams.Side` ---------------------------------------------

    def mark(self) -> Event:
        return self._record(self.main)

    def copy(self, pairs: Iterable[Pair], after: Mark | None = None) -> Event:
        self.num_copies += 1
        if after is not None:
            self._wait(self._side, after)
        for target, source in pairs:
            self._queue(self._side, lambda t=target, s=source: (t.copy_(s), True)[1])
        return self._record(self._side)

    def wait(self, mark: Mark) -> None:
        self._wait(self.main, mark)

    def hold(self, tensor: Tensor) -> None:
        pass

"""A circuit breaker: leaves a tier alone for a while when it fails or has become slow."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

logger = logging.getLogger(__name__)

BreakerState = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Closed: calls go through. Open: none does, until the back-off has passed. Half-open: one
    call at a time does, and decides: closed again, or open for twice as long.

    Thread-safe. Each state change makes one line of `key=value` pairs.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: int = 5,
        slow_seconds: float = 1.0,
        slow_share: float = 0.5,
        window: int = 20,
        min_backoff_seconds: float = 1.0,
        max_backoff_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
        log: Callable[[str], None] = logger.warning,
    ) -> None:
        """Closed.

        Args:
            name: of the tier, for the log.
            failures: this many in a row open it.
            slow_seconds: a call that takes longer is slow.
            slow_share: share of slow calls among the last `window` that opens it, once there were
                that many; 1.0 or above: never.
            window: calls that are looked at for `slow_share`.
            min_backoff_seconds: how long it stays open the first time.
            max_backoff_seconds: what doubling ends at.
            clock: seconds, never going back.
            uniform: a random number between two; spreads back-offs by up to a fifth, so that
                processes do not come back all at once.
            log: gets the line of each state change.
        """
        self._name = name
        self._failures = failures
        self._slow_seconds = slow_seconds
        self._slow_share = slow_share
        self._window = window
        self._min_backoff = min_backoff_seconds
        self._max_backoff = max_backoff_seconds
        self._clock = clock
        self._uniform = uniform
        self._log = log
        self._lock = threading.Lock()
        self._state: BreakerState = "closed"
        # Counts state changes: what calls of an earlier state report is out of date.
        self._epoch = 0
        self._failed_in_row = 0
        self._slow: deque[bool] = deque(maxlen=window)
        self._backoff = min_backoff_seconds
        self._retry_at = 0.0
        self._probing = False

    @property
    def state(self) -> BreakerState:
        """An open breaker becomes half-open with the first call after its back-off."""
        return self._state

    def acquire(self) -> int | None:
        """Ask to make a call.

        Returns:
            What `record` has to be given after the call, whatever came of it; None: no call.
        """
        line = None
        with self._lock:
            if self._state == "open":
                if self._clock() < self._retry_at:
                    return None
                line = self._change("half_open", "back-off over")
            if self._state == "half_open":
                if self._probing:
                    return None
                self._probing = True
            permit = self._epoch
        if line:
            self._log(line)
        return permit

    def record(self, permit: int, seconds: float | None, failure: str | None = None) -> None:
        """Report a call.

        Args:
            permit: what `acquire` returned.
            seconds: how long it took; None: nobody waited for it, so that it can't be slow.
            failure: what went wrong, for the log; None: nothing.
        """
        line = None
        with self._lock:
            if permit != self._epoch:
                return
            slow = seconds is not None and seconds > self._slow_seconds
            if self._state == "half_open":
                if failure is None and not slow:
                    self._backoff = self._min_backoff
                    line = self._change("closed", "probe succeeded")
                else:
                    self._backoff = min(2 * self._backoff, self._max_backoff)
                    line = self._change("open", "probe failed", failure or "slow")
            else:
                self._failed_in_row = self._failed_in_row + 1 if failure is not None else 0
                if seconds is not None:
                    self._slow.append(slow)
                share = sum(self._slow) / self._window
                if self._failed_in_row >= self._failures:
                    line = self._change("open", f"{self._failures} failures in a row", failure)
                elif len(self._slow) == self._window and share > self._slow_share:
                    line = self._change("open", f"{share:.0%} of calls slow", failure)
        if line:
            self._log(line)

    def _change(self, state: BreakerState, reason: str, failure: str | None = None) -> str:
        line = f"vlcache_breaker tier={self._name} from={self._state} to={state} reason={reason!r}"
        if state == "open":
            wait = self._backoff * self._uniform(0.8, 1.2)
            self._retry_at = self._clock() + wait
            line += f" retry_in_seconds={wait:.1f}"
        if failure:
            line += f" last={failure!r}"
        self._state = state
        self._epoch += 1
        self._failed_in_row = 0
        self._slow.clear()
        self._probing = False
        return line

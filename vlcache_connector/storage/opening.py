"""When a tier is left alone: while requests wait for it, and get nothing for that."""

from __future__ import annotations

import logging
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vlcache_connector.storage.answers import Operation

logger = logging.getLogger(__name__)

State = Literal["closed", "half_open", "open"]

_WINDOW = 8
_MIN_OUTCOMES = 4
_MIN_BACKOFF = 1.0
_MAX_BACKOFF = 60.0
_SPREAD = 0.2
"""Of back-offs, so that processes do not come back all at once."""


@dataclass(frozen=True, eq=False)
class Attempt:
    """An operation that was begun; for `Opening.end`."""

    operation: Operation
    began: float
    epoch: int


@dataclass(frozen=True)
class _Outcome:
    seconds: float
    error: str | None = None


class Opening:
    """Judges operations by their last outcomes, each operation by itself.

    An outcome is bad if it failed or took longer than the operation's budget; what is still on its
    way counts as soon as it has taken longer. Closed: all are let through. Open, once the median
    outcome of an operation is bad: none is, until a back-off has passed, which doubles each time.
    Half-open: one at a time is, until one of the operation that opened it decides.

    Thread-safe. Each change makes one line of `key=value` pairs in the log.
    """

    def __init__(
        self,
        name: str,
        budgets: Mapping[Operation, float],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Closed.

        Args:
            name: for the log.
            budgets: seconds for each operation.
            clock: seconds, never going back.
        """
        self._name = name
        self._budgets = dict(budgets)
        self._longest = max(budgets.values())
        self._clock = clock
        self._lock = threading.RLock()
        self._state: State = "closed"
        self._epoch = 0
        """Counts changes: what was begun before the last one says nothing any more."""
        self._outcomes: dict[Operation, deque[_Outcome]] = {}
        self._pending: set[Attempt] = set()
        self._forget()
        self._opened_by: Operation | None = None
        self._backoff = _MIN_BACKOFF
        self._retry_at = 0.0
        self._closed_at = float("-inf")
        self._probe_until = 0.0
        """Until then the probe may begin."""

    @property
    def state(self) -> State:
        """An open one whose back-off has passed is half-open."""
        with self._lock:
            if self._state == "open" and self._clock() >= self._retry_at:
                self._change("half_open", "")
            return self._state

    def admit(self) -> bool:
        """Ask whether something may be begun. Half-open: only by one at a time, the probe."""
        with self._lock:
            if self.state == "half_open":
                now = self._clock()
                if self._pending or now < self._probe_until:
                    return False
                self._probe_until = now + self._longest
                return True
            return self._state == "closed"

    def begin(self, operation: Operation) -> Attempt:
        """What was admitted, or follows from it, begins; `end` has to be called."""
        with self._lock:
            attempt = Attempt(operation, self._clock(), self._epoch)
            self._pending.add(attempt)
            return attempt

    def end(self, attempt: Attempt, error: str | None = None) -> None:
        """Report what came of an attempt, once.

        Args:
            error: what went wrong; None: nothing.
        """
        with self._lock:
            if attempt.epoch != self._epoch:
                return
            self._pending.discard(attempt)
            operation, now = attempt.operation, self._clock()
            self._outcomes[operation].append(_Outcome(now - attempt.began, error))
            self._judge(operation)
            if self._state == "half_open" and operation == self._opened_by:
                self._closed_at = now
                self._change("closed", f" operation={operation}")
            else:
                self._probe_until = 0.0

    def check(self) -> None:
        """Judge what is still on its way, as it is now."""
        with self._lock:
            for operation in self._budgets:
                self._judge(operation)

    def _judge(self, operation: Operation) -> None:
        now, budget = self._clock(), self._budgets[operation]
        overdue = [
            _Outcome(now - attempt.began)
            for attempt in self._pending
            if attempt.operation == operation and now - attempt.began > budget
        ]
        outcomes = [*self._outcomes[operation], *overdue][-_WINDOW:]
        num_bad = sum(out.error is not None or out.seconds > budget for out in outcomes)
        if self._state == "half_open":
            is_bad = num_bad > 0
        else:
            is_bad = len(outcomes) >= _MIN_OUTCOMES and 2 * num_bad >= len(outcomes)
        if is_bad and self._state != "open":
            self._open(operation, outcomes)

    def _open(self, operation: Operation, outcomes: list[_Outcome]) -> None:
        now = self._clock()
        # Closed for a moment only, the tier is no better than it was.
        is_again = self._state == "half_open" or now - self._closed_at < self._backoff
        self._backoff = min(2 * self._backoff, _MAX_BACKOFF) if is_again else _MIN_BACKOFF
        wait = self._backoff * random.uniform(1 - _SPREAD, 1 + _SPREAD)
        self._retry_at = now + wait
        self._opened_by = operation
        median = statistics.median_high(outcome.seconds for outcome in outcomes)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        reason = (
            f" operation={operation} median_seconds={median:.3f} "
            f"budget_seconds={self._budgets[operation]:.3f} failures={len(errors)}/{len(outcomes)} "
            f"retry_in_seconds={wait:.1f}"
        )
        if errors:
            reason += f" last_error={errors[-1]!r}"
        self._change("open", reason)

    def _change(self, state: State, reason: str) -> None:
        logger.warning("vlcache_opening %s from=%s to=%s%s", self._name, self._state, state, reason)
        self._state = state
        self._epoch += 1
        self._probe_until = 0.0
        self._forget()

    def _forget(self) -> None:
        self._pending.clear()
        self._outcomes = {operation: deque(maxlen=_WINDOW) for operation in self._budgets}

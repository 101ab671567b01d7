"""What a rank makes of one L2 adapter: whether it is used, what it did, and how fast it is.

Shared by the adapter's guard, which records, and the engine, which asks. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from vlcache_connector.storage.transfer_time import TransferTime

if TYPE_CHECKING:
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

    from vlcache_connector.protocol import TierState


class Tier:
    """An L2 adapter below host memory.

    Attributes:
        name: the adapter's type; label of its metrics.
        can_store: objects are written to it; not by consumers.
        read_time: of its loads.
        adapter: the guarded one, once LMCache has made it.
        lookup_seconds: a lookup that takes longer found nothing.
    """

    adapter: L2AdapterInterface | None = None
    lookup_seconds = 0.5

    def __init__(self, name: str, *, can_store: bool = True) -> None:
        """In use."""
        self.name = name
        self.can_store = can_store
        self.read_time = TransferTime()
        self._lock = threading.Lock()
        self._is_open = True
        self._events: Counter[str] = Counter()

    @property
    def is_open(self) -> bool:
        """Whether it is used at all: what it holds is of the weights that were loaded."""
        return self._is_open

    @property
    def is_left_alone(self) -> bool:
        """Whether lookups would find nothing, because nobody is asked."""
        return not self._is_open

    def set_open(self, is_open: bool) -> None:
        """While it is not open, lookups find nothing and nothing is stored."""
        self._is_open = is_open

    def count(self, event: str, amount: int = 1) -> None:
        """Record an event; `take_events` gives it the tier's name in front."""
        with self._lock:
            self._events[f"{self.name}.{event}"] += amount

    def take_events(self) -> Counter[str]:
        """What happened since the last call, by kind."""
        with self._lock:
            events, self._events = self._events, Counter()
        return events

    def state(self) -> TierState:
        """For the scheduler side."""
        from vlcache_connector.protocol import TierState

        latency, seconds_per_byte = self.read_time.line() or (None, None)
        speed = 1 / seconds_per_byte if seconds_per_byte else None
        return TierState("closed", latency, speed)

"""What a rank makes of one L2 adapter: whether it is used, what it did, and how fast it is.

Shared by the adapter's guard, which records, and the engine, which asks. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from vlcache_connector.storage.opening import Opening
from vlcache_connector.storage.transfer_time import TransferTime

if TYPE_CHECKING:
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

    from vlcache_connector.protocol import TierState


_LOOKUP_SHARE = 0.05
_MIN_LOOKUP_SECONDS = 0.005
_STORE_SECONDS = 10.0
"""A store that takes longer hangs."""


class Tier:
    """An L2 adapter below host memory.

    Attributes:
        name: the adapter's type; label of its metrics.
        can_store: objects are written to it and deleted from it; not by consumers.
        store_at_sight: objects are written when they are offered for the first or second time.
        read_time: of its loads.
        adapter: the guarded one, once LMCache has made it.
        lookup_seconds: a lookup that takes longer found nothing.
        reads: whether lookups, and loads with them, are let through.
        stores: whether stores are, which no request waits for.
    """

    adapter: L2AdapterInterface | None = None
    lookup_seconds = 0.5

    def __init__(
        self,
        name: str,
        *,
        can_store: bool = True,
        store_at_sight: int = 1,
        fetch_deadline_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """In use.

        Args:
            fetch_deadline_seconds: how long requests wait for what they look for at most. A load
                that takes longer was for nothing, and so is a lookup that takes more than a small
                share of it.
            clock: seconds, never going back.
        """
        self.name = name
        self.can_store = can_store
        self.store_at_sight = store_at_sight
        self.read_time = TransferTime()
        lookup_seconds = max(_LOOKUP_SHARE * fetch_deadline_seconds, _MIN_LOOKUP_SECONDS)
        self.reads = Opening(
            f"tier={name} of=reads",
            {"lookup": lookup_seconds, "load": fetch_deadline_seconds},
            clock=clock,
        )
        self.stores = Opening(f"tier={name} of=stores", {"store": _STORE_SECONDS}, clock=clock)
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
        return not self._is_open or self.reads.state == "open"

    def set_open(self, is_open: bool) -> None:
        """While it is not open, lookups find nothing and nothing is stored."""
        self._is_open = is_open

    def count(self, event: str, amount: int = 1) -> None:
        """Record an event; `take_events` gives it the tier's name in front.

        The guard's: `read.bytes`, `write.bytes` (really written); of lookups `lookup.late`,
        `lookup.skipped`; of objects `load.failed` (found, but not to be loaded),
        `refused.<reason>`; of stores `store.failed`, `store.skipped`, `store.queue_full`; and
        `rebuilt`. "Skipped" is what the adapter was not asked for.
        """
        if amount:
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
        return TierState(self.reads.state, latency, speed)

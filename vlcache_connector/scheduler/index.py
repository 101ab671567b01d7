"""What is stored, and what has to go: the scheduler side's view of the workers' stores.

The scheduler side decides what is evicted and the workers only carry it out, in step order. What
was promised to a request in this step or the one before is never evicted, so that a load can't
fail for lack of the segment.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from vllm.logger import init_logger

logger = init_logger(__name__)

IndexEvent = Literal["stored", "evicted", "no_room"]
"""A segment became ready, had to make room, or found none."""


@dataclass
class _Entry:
    num_bytes: int
    ranks_missing: int
    """Ranks that have not reported it stored; 0: ready."""


_AGAIN_SHARE = 0.8
"""Of the budget, at most, for what was used again."""


class ResidencyIndex:
    """A segmented LRU over content keys with a byte budget; entries are first reserved, then ready.

    What was used again goes only when nothing is left that was not: images that never come back do
    not drive out those that do (`configs/results/nodes.md`).

    Args:
        budget_bytes: bytes per rank.
        num_ranks: tensor-parallel ranks that must store a key before it is ready.
        setting: the budget's key in the configuration.
    """

    def __init__(self, budget_bytes: int, num_ranks: int, setting: str = "cpu_bytes") -> None:
        self._budget = budget_bytes
        self._setting = setting
        self._has_warned = False
        self._num_ranks = num_ranks
        self._entries: dict[str, _Entry] = {}
        self._once: OrderedDict[str, None] = OrderedDict()
        """Not used again so far, or not for long; what was used last comes last."""
        self._again: OrderedDict[str, None] = OrderedDict()
        self._used = 0
        self._used_again = 0
        """Bytes of what is in `_again`."""
        self._evicted: list[str] = []
        self._promised: set[str] = set()
        self._promised_before: set[str] = set()
        self._events: Counter[IndexEvent] = Counter()
        self.on_forgotten: Callable[[str], None] | None = None
        """Called with every key that is no longer known."""
        self.on_ready: Callable[[str], None] | None = None
        """Called with every key that all ranks hold from now on."""

    def __contains__(self, key: str) -> bool:
        """Whether `key` is reserved or ready."""
        return key in self._entries

    def is_ready(self, key: str) -> bool:
        """Whether all ranks hold `key`."""
        entry = self._entries.get(key)
        return entry is not None and entry.ranks_missing == 0

    def promise(self, key: str) -> None:
        """A request of this step loads `key`: keep it, and count it as just used."""
        self._promised.add(key)
        if key in self._again:
            self._again.move_to_end(key)
            return
        del self._once[key]
        self._again[key] = None
        self._used_again += self._entries[key].num_bytes
        while self._used_again > _AGAIN_SHARE * self._budget:
            oldest, _ = self._again.popitem(last=False)
            self._used_again -= self._entries[oldest].num_bytes
            self._once[oldest] = None

    def settle(self) -> None:
        """A step is planned; promises older than one step are kept by now."""
        self._promised_before, self._promised = self._promised, set()

    def reserve(self, key: str, num_bytes: int) -> bool:
        """Make room for `key`, evicting what was not used again, or not for longest.

        Returns:
            False, with nothing changed, when `key` is known already or doesn't fit.
        """
        if key in self._entries:
            return False
        free = self._budget - self._used
        victims = []
        for victim in chain(self._once, self._again):
            if free >= num_bytes:
                break
            if self._can_go(victim):
                victims.append(victim)
                free += self._entries[victim].num_bytes
        if free < num_bytes:
            self._events["no_room"] += 1
            if num_bytes > self._budget and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "VLCache: an image takes %d bytes on each rank, and all of %s is %d there: it "
                    "is not stored. Raise %s (this is logged once)",
                    *(num_bytes, self._setting, self._budget, self._setting),
                )
            return False
        for victim in victims:
            self.evict(victim)
        self._entries[key] = _Entry(num_bytes, self._num_ranks)
        self._once[key] = None
        self._used += num_bytes
        return True

    def _can_go(self, key: str) -> bool:
        # What is being written can't be evicted, only given up.
        is_promised = key in self._promised or key in self._promised_before
        return self.is_ready(key) and not is_promised

    def evict(self, key: str) -> bool:
        """Drop `key` unless it is promised or being written."""
        if not self._can_go(key):
            return False
        self.lost(key)
        self._events["evicted"] += 1
        return True

    def stored(self, key: str, ranks: int) -> None:
        """Some ranks report that they hold `key`; if nobody reserved it, they are to drop it."""
        entry = self._entries.get(key)
        if entry is None:
            self._evicted.append(key)
            return
        was_ready = entry.ranks_missing == 0
        entry.ranks_missing = max(0, entry.ranks_missing - ranks)
        if entry.ranks_missing == 0 and not was_ready:
            self._events["stored"] += 1
            if self.on_ready is not None:
                self.on_ready(key)

    def lost(self, key: str) -> None:
        """A rank could not store or load `key`; the others are told to drop it."""
        if key in self._entries:
            self.discard(key)
            self._evicted.append(key)

    def discard(self, key: str) -> None:
        """Forget `key` (nothing was stored under it)."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._used -= entry.num_bytes
            if key in self._again:
                del self._again[key]
                self._used_again -= entry.num_bytes
            else:
                del self._once[key]
            if self.on_forgotten is not None:
                self.on_forgotten(key)

    def take_evicted(self) -> list[str]:
        """Keys to be dropped by the workers, since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def clear(self) -> None:
        """Forget everything, what is being written as well."""
        for key in list(self._entries):
            self.lost(key)

    def take_events(self) -> Counter[IndexEvent]:
        """How often each event happened since the last call."""
        events, self._events = self._events, Counter()
        return events

    @property
    def num_promised(self) -> int:
        """Segments that are not evicted because requests were promised them."""
        return len(self._promised | self._promised_before)

    @property
    def used_bytes(self) -> int:
        """Bytes per rank, reserved ones included."""
        return self._used

    def __len__(self) -> int:
        return len(self._entries)

    def check_integrity(self) -> None:
        """Raise AssertionError when the accounts don't add up."""
        assert self._used == sum(entry.num_bytes for entry in self._entries.values())
        assert 0 <= self._used <= self._budget
        assert self._entries.keys() == {*self._once, *self._again}
        assert self._used_again == sum(self._entries[key].num_bytes for key in self._again)

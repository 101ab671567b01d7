"""Moves segments between host memory and the tiers below it, in threads of their own.

The worker's step only hands over work and takes back what is done: no step waits for a tier.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vllm.logger import init_logger

from ..protocol import Fetched, FetchPlan, TierState, worse
from ..storage.header import RefusedObject, SegmentId
from ..store import EncodedSegment, SegmentStore
from ..tiers import Deadline, GuardedTier, Name, NoAnswer, TierName
from .pace import Pace

logger = init_logger(__name__)

_READERS = 4
_WRITE_SECONDS = 10.0
_LAST_MOMENT_SECONDS = 5.0
_MAX_REFUSED = 4096
_TRY_AGAIN_AFTER = 20
"""Loads that are skipped as too slow before one is made anyway: speeds change."""


@dataclass(frozen=True)
class _Arrival:
    """A segment that was fetched and not yet admitted."""

    id: SegmentId
    tier: TierName
    objects: Sequence[memoryview]


@dataclass(frozen=True)
class _Missing:
    """Nothing was found.

    Attributes:
        tier: slowest one that gave no answer; None: none has the segment.
        no_answer: why.
    """

    tier: TierName | None = None
    no_answer: NoAnswer | None = None


@dataclass(frozen=True)
class Admission:
    """What became of a fetched segment.

    Attributes:
        is_stored: it is in host memory now; there was no room for it otherwise.
    """

    id: SegmentId
    is_stored: bool


class Transfers:
    """Fetches and writes of one rank.

    Args:
        store: this rank's host memory; touched by the caller's thread only.
        tiers: below it, fastest first.
        rank: this rank.
        num_ranks: tensor-parallel degree.
        read_seconds: longest that a fetch may take.
        queue_bytes: most bytes on their way to the tiers.
        pace: of this worker, which loads are weighed against; None makes every load.
    """

    def __init__(
        self,
        store: SegmentStore,
        tiers: Sequence[GuardedTier],
        *,
        rank: int,
        num_ranks: int,
        read_seconds: float,
        queue_bytes: int,
        pace: Pace | None,
    ) -> None:
        self._store = store
        self._tiers = tiers
        self._place = (rank, num_ranks)
        self._read_seconds = read_seconds
        self._queue_bytes = queue_bytes
        self._pace = pace
        self._events: Counter[str] = Counter()
        self._readers = ThreadPoolExecutor(_READERS, "vlcache-fetch")
        self._writer = ThreadPoolExecutor(1, "vlcache-write")
        self._changed = threading.Condition()
        self._ended: list[tuple[str, Fetched]] = []
        self._arrived: dict[str, _Arrival] = {}
        self._running = 0
        self._written: list[EncodedSegment] = []
        self._queued_bytes = 0
        self._skipped = 0
        self._is_open = True
        self._refused: OrderedDict[tuple[TierName, Name], None] = OrderedDict()
        """What was not what its name says; a tier may be one that this server can't remove it
        from."""
        self._is_closed = False

    def set_open(self, is_open: bool) -> None:
        """Whether the tiers are used; what is on its way to them arrives all the same."""
        if is_open != self._is_open:
            logger.warning(
                "VLCache: the weights are %s: disk and Redis are %s",
                "those that were loaded again" if is_open else "no longer those that were loaded",
                "in use" if is_open else "left alone, what they hold is of those",
            )
        self._is_open = is_open

    # -- fetching ---------------------------------------------------------------------------

    def fetch(self, plan: FetchPlan) -> None:
        """Look for a segment in the tiers; `take_ended` tells how that went."""
        with self._changed:
            self._running += 1
        self._readers.submit(self._fetch, plan)

    def _fetch(self, plan: FetchPlan) -> None:
        found: _Arrival | _Missing = _Missing(no_answer="failed")
        try:
            if not self._is_open:
                found = _Missing(no_answer="skipped")
            elif not self._is_closed:
                found = self._look_for(plan)
        except Exception:
            self._count("fetch.failed")
            logger.exception("VLCache: fetch of segment %s failed", plan.keys[0][:16])
        arrival = found if isinstance(found, _Arrival) else None
        ended = Fetched(
            ranks=1,
            key=arrival.id.key if arrival else None,
            tier=found.tier,
            num_bytes=sum(map(len, arrival.objects)) if arrival else 0,
            no_answer=None if isinstance(found, _Arrival) else found.no_answer,
        )
        with self._changed:
            self._running -= 1
            self._ended.append((plan.keys[0], ended))
            if arrival is not None:
                self._arrived[plan.keys[0]] = arrival
            self._changed.notify_all()

    def _look_for(self, plan: FetchPlan) -> _Arrival | _Missing:
        missing = _Missing()
        deadline = Deadline(self._read_seconds)
        for tier in self._tiers:
            found = self._look_in(tier, plan, deadline)
            if isinstance(found, _Arrival):
                return found
            if found is not None:
                missing = _Missing(tier.name, worse(missing.no_answer, found))
        return missing

    def _look_in(
        self, tier: GuardedTier, plan: FetchPlan, deadline: Deadline
    ) -> _Arrival | NoAnswer | None:
        """The best segment that a tier has; None: it has none."""
        names = [Name(plan.kind, key, *self._place) for key in plan.keys]
        sizes = tier.sizes(names, deadline)
        if isinstance(sizes, str):
            return sizes
        no_answer: NoAnswer | None = None
        for name, num_bytes in zip(names, sizes, strict=True):
            if num_bytes is None:
                continue
            if not self._is_worth(tier, num_bytes, plan.saved_tokens):
                self._count(f"{tier.name}.read.not_worth")
                return worse(no_answer, "skipped")
            if self._was_refused(tier, name):
                continue
            left = deadline.seconds_left
            objects = tier.read(name, plan.max_bytes, deadline)
            if objects is None:
                continue
            if isinstance(objects, str):
                if left > 0.0 and deadline.seconds_left == 0.0:
                    tier.learn_timeout(num_bytes, left)
                no_answer = worse(no_answer, objects)
                continue
            try:
                self._store.check_encoded(name.id, objects, plan.num_tokens)
            except RefusedObject as refusal:
                self._count(f"{tier.name}.read.refused_{refusal.reason}")
                logger.warning("VLCache: %s segment refused: %s", tier.name, refusal)
                self._refuse(tier, name)
                tier.damaged(name, deadline)
                no_answer = "failed"
                continue
            return _Arrival(name.id, tier.name, objects)
        return no_answer

    def _is_worth(self, tier: GuardedTier, num_bytes: int, saved_tokens: int) -> bool:
        seconds = tier.estimate_read_seconds(num_bytes)
        speed = self._pace.tokens_per_second if self._pace is not None else None
        if not saved_tokens or seconds is None or speed is None:
            return True
        if seconds < saved_tokens / speed:
            return True
        self._skipped += 1
        return self._skipped % _TRY_AGAIN_AFTER == 0

    def _refuse(self, tier: GuardedTier, name: Name) -> None:
        with self._changed:
            self._refused[tier.name, name] = None
            if len(self._refused) > _MAX_REFUSED:
                self._refused.popitem(last=False)

    def _was_refused(self, tier: GuardedTier, name: Name) -> bool:
        with self._changed:
            return (tier.name, name) in self._refused

    def take_ended(self, wait_seconds: float = 0.0) -> list[tuple[str, Fetched]]:
        """Fetches that ended, by name.

        Args:
            wait_seconds: how long to wait for one while any is running.
        """
        with self._changed:
            if wait_seconds:
                self._changed.wait_for(lambda: self._ended or not self._running, wait_seconds)
            ended, self._ended = self._ended, []
        return ended

    def admit(self, name: str) -> Admission | None:
        """Move a fetched segment to host memory, and to the tiers above the one it was in.

        Returns:
            None when there is no such segment.
        """
        with self._changed:
            arrival = self._arrived.pop(name, None)
        if arrival is None:
            return None
        try:
            num_bytes = self._store.put_encoded(arrival.id, arrival.objects)
        except Exception:
            logger.exception("VLCache: fetched segment %s not kept", arrival.id.key[:16])
            num_bytes = 0
        if num_bytes:
            above = self._tiers[: [tier.name for tier in self._tiers].index(arrival.tier)]
            if above:
                self._write(arrival.id, above)
        else:
            self._count("admit.no_room")
        return Admission(arrival.id, num_bytes > 0)

    def discard(self, name: str) -> None:
        """Throw away a fetched segment."""
        with self._changed:
            self._arrived.pop(name, None)

    def _count(self, event: str) -> None:
        with self._changed:
            self._events[event] += 1

    def take_events(self) -> Counter[str]:
        """What happened since the last call, by kind."""
        with self._changed:
            events, self._events = self._events, Counter()
        for tier in self._tiers:
            counters = tier.take_counters()
            for operation, count in counters.calls.items():
                events[f"{tier.name}.{operation}.calls"] += count
            for operation, count in counters.skipped.items():
                events[f"{tier.name}.{operation}.skipped"] += count
            for (operation, fault), count in counters.faults.items():
                events[f"{tier.name}.{operation}.{fault}"] += count
            events[f"{tier.name}.read.bytes"] += counters.bytes_read
            events[f"{tier.name}.write.bytes"] += counters.bytes_written
        return +events

    def tier_states(self) -> dict[str, TierState]:
        """What is known of each tier, by name."""
        states = {}
        for tier in self._tiers:
            latency, seconds_per_byte = tier.read_line() or (None, None)
            speed = 1 / seconds_per_byte if seconds_per_byte else None
            states[str(tier.name)] = TierState(tier.breaker.state, latency, speed)
        return states

    # -- writing ----------------------------------------------------------------------------

    def write(self, segment: SegmentId) -> None:
        """Copy a segment of the store to all tiers, some time soon."""
        self._write(segment, self._tiers)

    def _write(self, segment: SegmentId, tiers: Sequence[GuardedTier]) -> None:
        self.release_written()
        if not self._is_open:
            return
        encoded = self._store.get_encoded(segment)
        if encoded is None:
            return
        if self._queued_bytes + encoded.num_bytes > self._queue_bytes:
            self._count("write.queue_full")
            encoded.release()
            return
        self._queued_bytes += encoded.num_bytes
        self._writer.submit(self._copy, encoded, tiers)

    def _copy(self, segment: EncodedSegment, tiers: Sequence[GuardedTier]) -> None:
        try:
            for tier in tiers:
                if not self._is_closed:
                    name = Name(segment.id.kind, segment.id.key, *self._place)
                    if tier.write(name, segment.objects, Deadline(_WRITE_SECONDS)):
                        with self._changed:
                            self._refused.pop((tier.name, name), None)
        finally:
            with self._changed:
                self._written.append(segment)
                self._changed.notify_all()

    def release_written(self) -> None:
        """Give memory of finished writes back to the store."""
        with self._changed:
            written, self._written = self._written, []
        for segment in written:
            self._queued_bytes -= segment.num_bytes
            segment.release()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written; whether it was in time."""
        ends = time.monotonic() + seconds
        while self._queued_bytes and time.monotonic() < ends:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._written), ends - time.monotonic())
            self.release_written()
        return self._queued_bytes == 0

    def close(self) -> None:
        """End the threads, after a last moment for what is queued to be written."""
        self.flush(_LAST_MOMENT_SECONDS)
        self._is_closed = True
        self._readers.shutdown(cancel_futures=True)
        self._writer.shutdown()
        self.release_written()
        self._arrived.clear()
        for tier in self._tiers:
            tier.close()

"""LMCache's storage engine as VLCache uses it: whole segments in host memory, and below it.

Host memory is LMCache's L1, whose own eviction is off: a segment stays until `remove`. What is
stored is handed to all adapters, in LMCache's threads. Nothing here waits for anything outside of
the process. An engine is used from one thread.

LMCache seam: `lmcache.v1.distributed.storage_manager.StorageManager`, and what is private of it in
`_abandon`, `_offer` and `flush`.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlcache_connector.storage import codec
from vlcache_connector.storage.header import RefusedObject, SegmentId
from vlcache_connector.storage.layout import (
    SegmentLayout,
    SegmentObjects,
    check_object,
    read_objects,
)
from vlcache_connector.storage.segment import KVWriter, Segment, SegmentInfo

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey, PrefetchHandle
    from lmcache.v1.distributed.storage_manager import StorageManager
    from lmcache.v1.memory_management import MemoryObj

    from vlcache_connector.protocol import NoAnswer
    from vlcache_connector.storage.guarded import GuardedConfig
    from vlcache_connector.storage.tier import Tier
    from vlcache_connector.streams import Pair, Side

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 24 * 3600
"""After so long LMCache takes a lock for forgotten. Ours are given back."""
_WRITE_TAG = "storage_manager"
"""Under which `StorageManager.reserve_write` writes."""
_MAX_LOADS = 8
_NO_QUOTA = 1 << 62


@dataclass(frozen=True)
class Lookup:
    """Segments of which any would do.

    Attributes:
        name: whose answer it is.
        segments: best first.
        num_tokens: tokens, or encoder rows, of each of them.
    """

    name: str
    segments: Sequence[SegmentId]
    num_tokens: int


@dataclass(frozen=True)
class LookedUp:
    """Which segments there are below host memory.

    Attributes:
        name: of the lookup.
        tiers: key of a segment -> the nearest tier that has it.
        no_answer: of a tier that may have more: "failed", it did not answer in time, or else
            "skipped", it was not asked.
    """

    name: str
    tiers: dict[str, str]
    no_answer: NoAnswer | None


@dataclass(frozen=True)
class Loaded:
    """What became of a segment that was to be loaded.

    Attributes:
        is_here: it is in host memory now.
    """

    id: SegmentId
    is_here: bool


@dataclass(eq=False)
class _Resident:
    """A segment in host memory.

    Attributes:
        objects: of it.
        buffers: of the objects.
        info: what it is.
        is_new: it was written here, and has not been opened since.
        readers: open handles.
    """

    objects: SegmentObjects
    buffers: Sequence[Tensor]
    info: SegmentInfo
    is_new: bool = False
    readers: int = 0

    def payloads(self) -> list[Tensor]:
        """Layers or rows, object by object."""
        return [
            codec.last_payload(buffer, header)
            for buffer, header in zip(self.buffers, self.objects.headers, strict=True)
        ]

    def check(self) -> None:
        """Raise AssertionError where its memory is not what it was."""
        for key, buffer in zip(self.objects.keys, self.buffers, strict=True):
            try:
                check_object(key, buffer)
            except RefusedObject as refusal:
                raise AssertionError(f"{self.objects.id}: {refusal}") from refusal


@dataclass(eq=False)
class _Writing:
    """A segment that is being written, in memory that LMCache has reserved."""

    objects: SegmentObjects
    buffers: Sequence[Tensor]

    def payloads(self) -> list[Tensor]:
        """Where the layers or rows go, object by object."""
        return [
            codec.payload_view(buffer, header)
            for buffer, header in zip(self.buffers, self.objects.headers, strict=True)
        ]

    def seal(self) -> None:
        """All is written: complete the objects."""
        for buffer, header in zip(self.buffers, self.objects.headers, strict=True):
            codec.seal(buffer, header)


@dataclass(eq=False)
class _Arriving:
    """A segment that is being copied from the device.

    Attributes:
        sources: of the copies, which have to stay until these are done.
        valid: bool [1] in host memory, once they are done; None: it is.
        sealed: done when the objects are complete.
    """

    writing: _Writing
    sources: Sequence[Tensor]
    valid: Tensor | None
    sealed: Future[None]


@dataclass(eq=False)
class _Asked:
    """A lookup on its way.

    Attributes:
        keys: one object of each segment, by which the segment is looked for.
        tasks: what is asked of each tier, and when.
        found: the segments of `keys`, by their indices, that a tier has.
    """

    lookups: Sequence[Lookup]
    keys: Sequence[ObjectKey]
    tasks: dict[Tier, tuple[int, float]]
    found: dict[Tier, frozenset[int]] = field(default_factory=dict)
    no_answer: NoAnswer | None = None


@dataclass(order=True)
class _Wanted:
    deadline: float
    order: int
    objects: SegmentObjects = field(compare=False)


class SegmentEngine:
    """Segments of one rank.

    Args:
        layout: of the rank's segments.
        num_bytes: of host memory, which is allocated at once.
        adapters: below host memory, the nearest first.
        side: a stream for copies from the device; None copies before `put_encoder` returns.
        salt_quota_bytes: of one salt in each adapter whose configuration has LMCache evict by
            salt; None: none has.

    Raises:
        ValueError: `num_bytes` is no positive number.
        MemoryError: there is not as much memory.
    """

    def __init__(
        self,
        layout: SegmentLayout,
        num_bytes: int,
        adapters: Sequence[GuardedConfig] = (),
        *,
        side: Side | None = None,
        salt_quota_bytes: int | None = None,
    ) -> None:
        if type(num_bytes) is not int or num_bytes <= 0:
            raise ValueError(f"cpu_bytes must be a positive number of bytes, got {num_bytes!r}")
        self._layout = layout
        self._side = side
        self._sealer = None
        if side is not None:
            self._sealer = ThreadPoolExecutor(1, "vlcache-seal", initializer=_same_device())
        self._resident: dict[SegmentId, _Resident] = {}
        self._leaving: dict[SegmentId, tuple[SegmentObjects, _Resident | None]] = {}
        """Removed, but still read: by open handles, or by LMCache on their way to an adapter."""
        self._writing: dict[SegmentId, _Writing] = {}
        self._arriving: dict[SegmentId, _Arriving] = {}
        self._unwanted: list[_Arriving] = []
        """Removed while they were arriving, or never finished."""
        self._settled: list[tuple[SegmentId, bool]] = []
        self._open: dict[Segment, _Resident] = {}
        self._asked: list[_Asked] = []
        self._wanted: list[_Wanted] = []
        self._order = itertools.count()
        self._given_up: list[SegmentId] = []
        """They were to be loaded, and are too large or not wanted any more."""
        self._loading: dict[SegmentId, tuple[PrefetchHandle, _Wanted]] = {}
        self._dropped: set[SegmentId] = set()
        """Removed while they were being loaded."""
        self._tiers = [adapter.tier for adapter in adapters]
        self._manager: StorageManager | None = _start(num_bytes, adapters)
        self._salt_quota_bytes = salt_quota_bytes
        self._salts: set[str] = set()
        """Those that LMCache has a quota of."""

    @property
    def _lmcache(self) -> StorageManager:
        if self._manager is None:
            raise RuntimeError("the segment engine is closed")
        return self._manager

    # -- writing --------------------------------------------------------------------------------

    def open_kv(self, key: str, positions: Tensor) -> KVWriter | None:
        """Begin to store a segment's post-RoPE KV; it replaces a segment of this key and kind.

        Args:
            key: content key.
            positions: the donor's base RoPE positions, any integer dtype, `[rows, n]` with 1 or 3
                rows.

        Returns:
            None if it can't be stored: no room, too large, or being written, loaded or read.

        Raises:
            ValueError: `positions` are not of the described form.
        """
        packed = codec.pack_positions(positions)
        writing = self._make_room(self._layout.kv(key, packed, *positions.shape))
        if writing is None:
            return None
        layers = [layer for payload in writing.payloads() for layer in payload]
        return KVWriter(
            key,
            layers,
            lambda valid: self._take_in(writing, (), valid),
            lambda: self._give_back(writing),
        )

    def put_encoder(self, key: str, rows: Tensor) -> int:
        """Store the encoder's output for a segment; it replaces one of this key and kind.

        The copying may go on after it returns; the segment can be opened all the same, which waits
        for it. The tensor is not to be changed any more.

        Args:
            key: content key.
            rows: `[n, width]`, any device and strides.

        Returns:
            Bytes taken; 0 if it could not be stored, and then nothing is stored under the key.

        Raises:
            ValueError: a tensor is not of the described form.
        """
        if rows.dim() != 2 or rows.numel() == 0:
            raise ValueError(f"encoder rows are [n, width], not {tuple(rows.shape)}")
        writing = self._make_room(self._layout.encoder(key, rows.shape, rows.dtype))
        if writing is None:
            return 0
        parts = rows.split([header.shape[0] for header in writing.objects.headers])
        return self._take_in(writing, list(zip(writing.payloads(), parts, strict=True)))

    def _make_room(self, objects: SegmentObjects | None) -> _Writing | None:
        """Memory for a segment, in place of one of its key."""
        if objects is None:
            return None
        segment = objects.id
        self._set_quota(objects)
        self.remove(segment)
        self._purge()
        if segment in self._leaving or segment in self._writing or segment in self._loading:
            return None
        if any(arriving.writing.objects.id == segment for arriving in self._unwanted):
            return None
        reserved: dict[ObjectKey, MemoryObj] = {}
        for size in dict.fromkeys(objects.sizes):
            pairs = zip(objects.keys, objects.sizes, strict=True)
            keys = [key for key, num_bytes in pairs if num_bytes == size]
            reserved.update(self._lmcache.reserve_write(keys, _memory_layout(size)))
        if len(reserved) < len(objects.keys):
            self._abandon(list(reserved))
            return None
        writing = _Writing(objects, [reserved[key].tensor for key in objects.keys])
        self._writing[segment] = writing
        return writing

    def _set_quota(self, objects: SegmentObjects) -> None:
        """Before anything of its salt may be stored: LMCache evicts what has no quota."""
        salt = objects.keys[0].cache_salt
        if self._salt_quota_bytes is not None and salt not in self._salts:
            self._salts.add(salt)
            # What has no salt is everybody's.
            quota = self._salt_quota_bytes if salt else _NO_QUOTA
            self._lmcache.quota_manager.set_quota(salt, quota)

    def _abandon(self, keys: Sequence[ObjectKey]) -> None:
        # StorageManager itself knows no way to give a reservation back.
        self._lmcache._l1_manager.finish_write_and_delete(list(keys), tag=_WRITE_TAG)

    def _take_in(
        self, writing: _Writing, pairs: Sequence[Pair], valid: Tensor | None = None
    ) -> int:
        """Keep a segment once `pairs` are copied, if it is valid then; bytes taken."""
        segment = writing.objects.id
        if self._side is not None:
            del self._writing[segment]
            self._arriving[segment] = self._send(self._side, writing, pairs, valid)
            return writing.objects.num_bytes
        try:
            is_valid = valid is None or bool(valid)
            if is_valid:
                for target, source in pairs:
                    target.copy_(source)
                writing.seal()
        except BaseException:
            self._give_back(writing)
            raise
        if not is_valid:
            self._give_back(writing)
            return 0
        del self._writing[segment]
        self._settled.append((segment, True))
        self._keep(writing)
        return writing.objects.num_bytes

    def _send(
        self, side: Side, writing: _Writing, pairs: Sequence[Pair], valid: Tensor | None
    ) -> _Arriving:
        """Copy on the side stream, behind what is copied there by now; a thread seals the objects
        when all is there."""
        assert self._sealer is not None
        is_valid = None
        if valid is not None:
            is_valid = torch.empty(1, dtype=torch.bool, pin_memory=valid.is_cuda)
            pairs = [*pairs, (is_valid, valid.view(1))]
        arrived = side.copy(pairs, side.mark())

        def seal() -> None:
            arrived.synchronize()
            writing.seal()

        sources = [source for _, source in pairs]
        return _Arriving(writing, sources, is_valid, self._sealer.submit(seal))

    def _give_back(self, writing: _Writing) -> None:
        """Store nothing; the memory is free as soon as no copy writes to it."""
        del self._writing[writing.objects.id]
        if self._side is None or self._sealer is None:
            self._abandon(writing.objects.keys)
            return
        written = self._side.copy((), self._side.mark())
        self._unwanted.append(
            _Arriving(writing, (), None, self._sealer.submit(written.synchronize))
        )

    def settle(self, *, waits: bool = False) -> list[tuple[SegmentId, bool]]:
        """What `KVWriter.finish` and `put_encoder` have taken and has now been copied, and
        whether it is stored.

        Args:
            waits: for all that is still being copied.
        """
        if waits:
            wait([it.sealed for it in (*self._arriving.values(), *self._unwanted)])
        for segment in [name for name, it in self._arriving.items() if it.sealed.done()]:
            self._arrive(segment)
        for arriving in [it for it in self._unwanted if it.sealed.done()]:
            self._unwanted.remove(arriving)
            self._abandon(arriving.writing.objects.keys)
        self._purge()
        settled, self._settled = self._settled, []
        return settled

    def _arrive(self, segment: SegmentId) -> None:
        """Keep what is arriving, as soon as it is here."""
        arriving = self._arriving.pop(segment, None)
        if arriving is None:
            return
        try:
            arriving.sealed.result()
            is_stored = arriving.valid is None or bool(arriving.valid)
        except Exception:
            logger.exception("Segment %s (%s) could not be copied from the device", *segment)
            is_stored = False
        if is_stored:
            self._keep(arriving.writing)
        else:
            self._abandon(arriving.writing.objects.keys)
        self._settled.append((segment, is_stored))

    def _keep(self, writing: _Writing) -> None:
        objects = writing.objects
        self._lmcache.finish_write(list(objects.keys))
        positions = codec.unpack_positions(objects.headers[0])
        info = _info(objects, positions)
        self._resident[objects.id] = _Resident(objects, writing.buffers, info, is_new=True)

    def _offer(self, objects: SegmentObjects) -> None:
        """Hand a segment in host memory to the adapters once more."""
        # StorageManager itself does so only with what was just written.
        self._lmcache._store_controller._listener.on_l1_keys_write_finished(list(objects.keys))

    # -- host memory ----------------------------------------------------------------------------

    def get(self, segment: SegmentId) -> Segment | None:
        """Open a segment in host memory; None if it is not there. To be released."""
        self._arrive(segment)
        resident = self._resident.get(segment)
        if resident is None:
            return None
        handle = Segment(resident.info, resident.payloads(), self._release)
        resident.readers += 1
        self._open[handle] = resident
        if resident.is_new and any(tier.store_at_sight > 1 for tier in self._tiers):
            self._offer(resident.objects)
        resident.is_new = False
        return handle

    def _release(self, handle: Segment) -> None:
        self._open.pop(handle).readers -= 1

    def contains(self, segment: SegmentId) -> bool:
        """Whether the segment is in host memory, or on its way from the device."""
        return segment in self._resident or segment in self._arriving

    def remove(self, segment: SegmentId) -> None:
        """Forget a segment in host memory. Open handles stay valid and keep its memory."""
        arriving = self._arriving.pop(segment, None)
        if arriving is not None:
            self._unwanted.append(arriving)
        if segment in self._loading:
            self._dropped.add(segment)
        if any(wanted.objects.id == segment for wanted in self._wanted):
            self._wanted = [it for it in self._wanted if it.objects.id != segment]
            heapq.heapify(self._wanted)
            self._given_up.append(segment)
        resident = self._resident.pop(segment, None)
        if resident is not None:
            self._leaving[segment] = (resident.objects, resident)
            self._purge()

    def _purge(self) -> None:
        """Free what was removed and is no longer read."""
        for segment, (objects, resident) in list(self._leaving.items()):
            if resident is None or not resident.readers:
                _, num_locked = self._lmcache.delete_l1_keys(list(objects.keys))
                if not num_locked:
                    del self._leaving[segment]
                else:  # some of its objects may be gone
                    self._leaving[segment] = (objects, None)

    def clear(self) -> None:
        """Remove every segment."""
        for segment in {*self._resident, *self._arriving, *self._loading}:
            self.remove(segment)

    # -- below host memory ----------------------------------------------------------------------

    def look_up(self, lookups: Sequence[Lookup]) -> None:
        """Ask all tiers for segments, in one call of each; `take_looked_up` has the answers."""
        keys = [
            self._layout.last_key(it, look.num_tokens) for look in lookups for it in look.segments
        ]
        asked = _Asked(lookups, keys, {})
        for tier in self._tiers:
            if tier.is_left_alone or tier.adapter is None:
                asked.no_answer = "skipped"
                continue
            task = tier.adapter.submit_lookup_and_lock_task(list(keys), {})
            asked.tasks[tier] = (task, time.monotonic())
        self._asked.append(asked)

    def take_looked_up(self) -> list[LookedUp]:
        """Answers that came since the last call."""
        ended = []
        for asked in list(self._asked):
            for tier, (task, since) in list(asked.tasks.items()):
                assert tier.adapter is not None
                bitmap = tier.adapter.query_lookup_and_lock_result(task)
                if bitmap is None:
                    continue
                del asked.tasks[tier]
                found = asked.found[tier] = frozenset(bitmap.get_indices_list())
                if found:
                    tier.adapter.submit_unlock([asked.keys[index] for index in found])
                elif time.monotonic() - since >= tier.lookup_seconds:
                    asked.no_answer = "failed"
            if not asked.tasks:
                self._asked.remove(asked)
                ended += self._answers(asked)
        return ended

    def _answers(self, asked: _Asked) -> list[LookedUp]:
        indices = itertools.count()
        answers = []
        for look in asked.lookups:
            tiers: dict[str, str] = {}
            for segment, index in zip(look.segments, indices, strict=False):
                having = (tier for tier in self._tiers if index in asked.found.get(tier, ()))
                tier = next(having, None)
                if tier is not None:
                    tiers[segment.key] = tier.name
            answers.append(LookedUp(look.name, tiers, asked.no_answer))
        return answers

    def load(self, segment: SegmentId, num_tokens: int, deadline: float) -> None:
        """Bring a segment to host memory; `take_loaded` tells how that went.

        Args:
            num_tokens: tokens, or encoder rows, that it has to have.
            deadline: monotonic seconds, until when it may begin.
        """
        objects = self._layout.expected(segment, num_tokens)
        if objects is None:
            self._given_up.append(segment)
        else:
            self._set_quota(objects)  # what comes from afar is stored nearby
            heapq.heappush(self._wanted, _Wanted(deadline, next(self._order), objects))

    def take_loaded(self) -> list[Loaded]:
        """Segments of `load` that are here, or will not be."""
        ended = [Loaded(segment, False) for segment in self._given_up]
        self._given_up.clear()
        for segment, (handle, wanted) in list(self._loading.items()):
            result = self._lmcache.query_prefetch_status(handle)
            if result is not None:
                del self._loading[segment]
                ended.append(self._end_load(wanted.objects, result))
        now = time.monotonic()
        late = sum(wanted.deadline <= now for _, wanted in self._loading.values())
        while self._wanted:
            wanted = self._wanted[0]
            if wanted.deadline > now and len(self._loading) - late >= _MAX_LOADS:
                break
            heapq.heappop(self._wanted)
            segment = wanted.objects.id
            if self._is_here(segment):
                ended.append(Loaded(segment, True))
            elif wanted.deadline <= now or segment in self._writing or segment in self._loading:
                ended.append(Loaded(segment, False))
            else:
                handle = self._lmcache.submit_prefetch_task(_task(wanted.objects))
                self._loading[segment] = (handle, wanted)
        return ended

    def _is_here(self, segment: SegmentId) -> bool:
        """Whether a segment is in host memory, or was kept there by its readers."""
        _, leaving = self._leaving.get(segment, (None, None))
        if leaving is not None:
            del self._leaving[segment]
            self._resident[segment] = leaving
        return self.contains(segment)

    def _end_load(self, objects: SegmentObjects, result: Any) -> Loaded:
        """What a load brought; all of the objects have a lock then, or none has."""
        segment, keys = objects.id, list(objects.keys)
        is_wanted = segment not in self._dropped
        self._dropped.discard(segment)
        resident = None
        if all(row.popcount() for row in result.hit_cells):
            _, found = self._lmcache.unsafe_read(keys)
            buffers = [obj.tensor for obj in found]
            try:
                positions = read_objects(objects.headers, buffers)
                resident = _Resident(objects, buffers, _info(objects, positions))
            except RefusedObject as refusal:
                logger.warning("Segment %s (%s) refused: %s", *segment, refusal)
            self._lmcache.finish_read_prefetched(keys)
        if resident is None or not is_wanted:
            self._leaving[segment] = (objects, None)  # all of it, or what there was of it
            self._purge()
            return Loaded(segment, False)
        self._leaving.pop(segment, None)
        self._resident[segment] = resident
        if len(self._tiers) > 1:  # for those above the one that it came from; others have it
            self._offer(objects)
        return Loaded(segment, True)

    @property
    def is_busy(self) -> bool:
        """Whether lookups or loads are on their way."""
        return bool(self._asked or self._wanted or self._loading or self._given_up)

    @property
    def tiers(self) -> Sequence[Tier]:
        """Below host memory, the nearest first."""
        return self._tiers

    # -- the whole ------------------------------------------------------------------------------

    @property
    def bytes_used(self) -> int:
        """Host memory that is taken: stored, being written, being loaded, still being read."""
        return int(self._lmcache.get_l1_usage()[0])

    def take_events(self) -> Counter[str]:
        """What happened in the tiers since the last call, by kind."""
        return sum((tier.take_events() for tier in self._tiers), Counter())

    def flush(self, seconds: float) -> bool:
        """Wait until all has arrived and the adapters have taken it; whether it was in time."""
        self._settled = self.settle(waits=True)
        ends = time.monotonic() + seconds
        quiet = 0
        while time.monotonic() < ends:
            status = self._lmcache._store_controller.report_status()
            busy = status["pending_keys_count"] or status["in_flight_task_count"]
            # Both are 0 for a moment between "taken from the queue" and "handed over".
            quiet = 0 if busy else quiet + 1
            if quiet == 5:
                return True
            time.sleep(0.01)
        return False

    def check_integrity(self) -> None:
        """Check the books against LMCache's, and every stored byte; slow.

        Raises:
            AssertionError: with what is wrong.
        """
        self.flush(10.0)
        self._purge()
        residents = [*self._resident.values()]
        residents += [it for _, it in self._leaving.values() if it is not None]
        for resident in residents:
            resident.check()
        status = self._lmcache.report_status()["l1_manager"]
        _require(status["is_healthy"], "LMCache's allocator is inconsistent")
        if not self._loading:
            held = [it.objects for it in residents]
            held += [it.objects for it in self._writing.values()]
            ours, theirs = sum(len(it.keys) for it in held), status["total_object_count"]
            _require(ours == theirs, f"LMCache has {theirs} objects, not {ours}")
            _require(not status["read_locked_count"], "objects are locked")
        readers = Counter(self._open.values())
        for resident in residents:
            _require(readers[resident] == resident.readers, f"readers of {resident.objects.id}")

    def close(self) -> None:
        """Release all memory and threads. Open handles are released. Idempotent."""
        if self._manager is None:
            return
        self.settle(waits=True)
        if self._sealer is not None:
            self._sealer.shutdown()
        for handle in list(self._open):
            handle.release()
        self._resident.clear()
        self._leaving.clear()
        self._manager.close()
        self._manager = None


def _info(objects: SegmentObjects, positions: Tensor | None) -> SegmentInfo:
    return SegmentInfo(objects.id, objects.headers[0].num_tokens, positions)


def _task(objects: SegmentObjects) -> Any:
    """One row for each object, one column: LMCache then finds all of them or none."""
    from lmcache.v1.distributed.api import GroupedObjectKeys, PrefetchTaskSpec

    return PrefetchTaskSpec(
        [
            GroupedObjectKeys([key], key.object_group_id, _memory_layout(size))
            for key, size in zip(objects.keys, objects.sizes, strict=True)
        ],
        fetching_policy="full",
    )


def _memory_layout(num_bytes: int) -> MemoryLayoutDesc:
    from lmcache.v1.distributed.api import MemoryLayoutDesc

    return MemoryLayoutDesc([torch.Size([num_bytes])], [torch.uint8])


def _start(num_bytes: int, adapters: Sequence[GuardedConfig]) -> StorageManager:
    from lmcache.v1.distributed.config import (
        DRAML1ManagerConfig,
        EvictionConfig,
        L1MemoryManagerConfig,
        StorageManagerConfig,
    )
    from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
    from lmcache.v1.distributed.storage_manager import StorageManager

    memory = L1MemoryManagerConfig(size_in_bytes=num_bytes, use_lazy=False, shm_name="")
    config = StorageManagerConfig(
        l1_manager_config=DRAML1ManagerConfig(
            memory_config=memory, read_ttl_seconds=_LOCK_SECONDS, write_ttl_seconds=_LOCK_SECONDS
        ),
        # What goes is decided for all ranks at once, and not by LMCache for each.
        eviction_config=EvictionConfig("noop"),
        l2_adapter_config=L2AdaptersConfig(list(adapters)),
        prefetch_policy="retain",
        # Nobody waits in LMCache's queue, which is first come, first served.
        prefetch_max_in_flight=1 << 16,
    )
    try:
        return StorageManager(config)
    except (RuntimeError, MemoryError) as error:
        raise MemoryError(
            f"cpu_bytes: a host memory pool of {num_bytes} bytes could not be allocated; choose "
            f"less than the machine has free ({error})"
        ) from error


def _same_device() -> Callable[[], None]:
    """What a new thread has to call to use the device that this one uses.

    A thread's default is device 0, whatever this worker uses: its first call there would take
    memory of a context on it.
    """
    if not torch.accelerator.is_available():
        return lambda: None
    return functools.partial(
        torch.accelerator.set_device_index, torch.accelerator.current_device_index()
    )


def _require(condition: bool, message: str) -> None:
    """Raise AssertionError, under `python -O` too."""
    if not condition:
        raise AssertionError(message)

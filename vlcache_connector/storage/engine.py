"""LMCache's storage engine as VLCache uses it: whole segments, staged by a deadline, then read.

Nothing here waits for anything outside of the process. An engine is used from one thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vlcache_connector.storage import codec
from vlcache_connector.storage.codec import ObjectHeader, RefusedObject, SegmentId
from vlcache_connector.storage.layout import Form, Space, read_objects
from vlcache_connector.storage.segment import Segment, SegmentInfo

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey, PrefetchHandle
    from lmcache.v1.distributed.storage_manager import StorageManager
    from lmcache.v1.memory_management import MemoryObj

    from vlcache_connector.storage.guarded import GuardedConfig

logger = logging.getLogger(__name__)

Outcome = Literal["hit", "miss", "late"]

_READ_SECONDS = 24 * 3600
"""After so long LMCache takes a lock for forgotten. Ours are counted, and given back."""
_WRITE_TAG = "storage_manager"
"""Under which `StorageManager.reserve_write` writes."""


@dataclass(frozen=True)
class Staged:
    """What became of a segment that was to be staged.

    Attributes:
        outcome: "hit", "miss" (not there, or refused) or "late" (not there by the deadline).
        segment: for a hit: open for reading, and to be released.
        num_loaded_bytes: of its objects that were not in host memory before.
    """

    id: SegmentId
    outcome: Outcome
    segment: Segment | None = None
    num_loaded_bytes: int = 0


@dataclass(frozen=True)
class _Objects:
    """A segment's objects as they have to be."""

    id: SegmentId
    headers: Sequence[ObjectHeader]
    keys: list[ObjectKey]
    sizes: Sequence[int]


@dataclass(order=True)
class _Wanted:
    deadline: float
    order: int
    objects: _Objects = field(compare=False)


class Writer:
    """A segment that is being written: `finish` or `abandon` it.

    Attributes:
        parts: where the units go, in order: a tensor `[units, ...]` for each object, in host
            memory, pinned if there is an accelerator.
    """

    def __init__(
        self, parts: Sequence[Tensor], on_finish: Callable[[], None], on_abandon: Callable[[], None]
    ) -> None:
        """Made by the engine; one of the two is called, once."""
        self.parts = parts
        self._on_finish: Callable[[], None] | None = on_finish
        self._on_abandon = on_abandon

    def finish(self) -> None:
        """Store what was written; it may be opened at once."""
        on_finish, self._on_finish = self._on_finish, None
        self.parts = ()
        if on_finish is not None:
            on_finish()

    def abandon(self) -> None:
        """Store nothing. Does nothing behind `finish`, or the second time."""
        if self._on_finish is not None:
            self._on_finish = None
            self.parts = ()
            self._on_abandon()


class SegmentEngine:
    """Segments of one rank.

    What is in host memory stays there until `remove`; who uses the engine keeps to its size.
    """

    def __init__(
        self,
        space: Space,
        num_bytes: int,
        adapters: Sequence[GuardedConfig] = (),
        *,
        max_loads: int = 8,
    ) -> None:
        """Allocate host memory.

        Args:
            space: whose objects.
            num_bytes: of host memory.
            adapters: below host memory, fastest first.
            max_loads: most segments that are looked for at a time.

        Raises:
            MemoryError: there is not as much memory.
        """
        self._space = space
        self._max_loads = max_loads
        self._wanted: list[_Wanted] = []
        self._order = itertools.count()
        self._running: list[tuple[PrefetchHandle, _Wanted]] = []
        self._late: list[tuple[PrefetchHandle, _Objects]] = []
        self._open: dict[int, tuple[Segment, list[ObjectKey]]] = {}
        self._manager = _start(num_bytes, adapters)
        self._has_l2 = bool(adapters)

    # -- writing --------------------------------------------------------------------------------

    def write(
        self, segment: SegmentId, form: Form, positions: Tensor | None = None, *, salt: str = ""
    ) -> Writer | None:
        """Begin to write a segment, in place of one of this name.

        Args:
            positions: the donor's, `[rows, num_tokens]`; None for "encoder".
            salt: see `Space.object_keys`.

        Returns:
            None if there is no room, or it is being read or written.
        """
        packed = b"" if positions is None else codec.pack_positions(positions)
        headers = self._space.headers(segment, form, packed)
        keys = self._space.object_keys(segment, len(headers), salt)
        self._manager.delete_l1_keys(keys)
        reserved: dict[ObjectKey, MemoryObj] = {}
        for key, header in zip(keys, headers, strict=True):
            size = codec.encoded_size(header)
            reserved.update(self._manager.reserve_write([key], _layout(size)))
            if key not in reserved:
                self._abandon(list(reserved))
                return None
        buffers = [reserved[key].tensor for key in keys]
        parts = [codec.payload_view(*pair) for pair in zip(buffers, headers, strict=True)]

        def finish() -> None:
            for buffer, header in zip(buffers, headers, strict=True):
                codec.seal(buffer, header)
            self._manager.finish_write(keys)

        return Writer(parts, finish, lambda: self._abandon(keys))

    def _abandon(self, keys: list[ObjectKey]) -> None:
        # StorageManager itself knows no way to give a reservation back.
        self._manager._l1_manager.finish_write_and_delete(keys, tag=_WRITE_TAG)

    def remove(self, segment: SegmentId, form: Form, *, salt: str = "") -> bool:
        """Forget a segment in host memory; False if it is being read."""
        objects = self._objects(segment, form, salt)
        return self._manager.delete_l1_keys(objects.keys)[1] == 0

    # -- reading --------------------------------------------------------------------------------

    def get(self, segment: SegmentId, form: Form, *, salt: str = "") -> Segment | None:
        """Open a segment in host memory; None if it is not there. To be released."""
        objects = self._objects(segment, form, salt)
        handle = self._manager.submit_prefetch_task(_task(objects), skip_l2=True)
        staged = self._end(objects, self._manager.query_prefetch_status(handle))
        return staged.segment

    def stage(self, segment: SegmentId, form: Form, deadline: float, *, salt: str = "") -> None:
        """Look for a segment in host memory and below; `poll` tells how that went.

        Args:
            deadline: monotonic seconds, until when anybody wants it.
        """
        objects = self._objects(segment, form, salt)
        heapq.heappush(self._wanted, _Wanted(deadline, next(self._order), objects))

    def poll(self) -> list[Staged]:
        """Segments of `stage` that are here, are not there, or are late since the last call."""
        ended = []
        now = time.monotonic()
        for handle, wanted in list(self._running):
            result = self._manager.query_prefetch_status(handle)
            if result is not None:
                self._running.remove((handle, wanted))
                ended.append(self._end(wanted.objects, result))
                if ended[-1].segment is None:
                    self._manager.delete_l1_keys(wanted.objects.keys)  # those that were there
            elif wanted.deadline <= now:
                # It goes on, and has to be taken back when it ends.
                self._running.remove((handle, wanted))
                self._late.append((handle, wanted.objects))
                ended.append(Staged(wanted.objects.id, "late"))
        for handle, objects in list(self._late):
            result = self._manager.query_prefetch_status(handle)
            if result is not None:
                self._late.remove((handle, objects))
                staged = self._end(objects, result)
                if staged.segment is not None:
                    staged.segment.release()
                self._manager.delete_l1_keys(objects.keys)
        while self._wanted and self._wanted[0].deadline <= now:
            ended.append(Staged(heapq.heappop(self._wanted).objects.id, "late"))
        while self._wanted and len(self._running) < self._max_loads:
            wanted = heapq.heappop(self._wanted)
            found = self._begin(wanted)
            if found is not None:
                ended.append(found)
        return ended

    def _begin(self, wanted: _Wanted) -> Staged | None:
        """Start to look for a segment; at once what is in host memory, where no adapter is asked:
        LMCache would wait for all of them."""
        task = _task(wanted.objects)
        handle = self._manager.submit_prefetch_task(task, skip_l2=True)
        staged = self._end(wanted.objects, self._manager.query_prefetch_status(handle))
        if staged.segment is not None or not self._has_l2:
            return staged
        self._running.append((self._manager.submit_prefetch_task(task), wanted))
        return None

    def _end(self, objects: _Objects, result: Any) -> Staged:
        """What a lookup found; all of the objects have a lock then, or none has."""
        if not all(row.popcount() for row in result.hit_cells):
            return Staged(objects.id, "miss")
        _, found = self._manager.unsafe_read(objects.keys)
        buffers = [obj.tensor for obj in found]
        try:
            positions = read_objects(objects.headers, buffers)
        except RefusedObject as refusal:
            logger.warning("Segment %s (%s) refused: %s", *objects.id, refusal)
            self._manager.finish_read_prefetched(objects.keys)
            self._manager.delete_l1_keys(objects.keys)
            return Staged(objects.id, "miss")
        parts = [codec.last_payload(*pair) for pair in zip(buffers, objects.headers, strict=True)]
        info = SegmentInfo(objects.id, objects.headers[0].num_tokens, positions)
        segment = Segment(info, parts, self._release)
        self._open[id(segment)] = (segment, objects.keys)
        loaded = sum(
            size
            for size, row in zip(objects.sizes, result.l2_hit_cells, strict=True)
            if row.popcount()
        )
        return Staged(objects.id, "hit", segment, loaded)

    def _release(self, segment: Segment) -> None:
        _, keys = self._open.pop(id(segment))
        self._manager.finish_read_prefetched(keys)

    def _objects(self, segment: SegmentId, form: Form, salt: str) -> _Objects:
        blank = bytes(4 * form.positions_rows * form.num_tokens)
        headers = self._space.headers(segment, form, blank)
        keys = self._space.object_keys(segment, len(headers), salt)
        return _Objects(segment, headers, keys, [codec.encoded_size(header) for header in headers])

    # -- the whole ------------------------------------------------------------------------------

    @property
    def bytes_used(self) -> int:
        """Host memory that is taken: stored, being written, being loaded."""
        return self._manager.get_l1_usage()[0]

    def flush(self, seconds: float) -> bool:
        """Wait until the adapters were given what was stored; whether it was in time."""
        ends = time.monotonic() + seconds
        quiet = 0
        while time.monotonic() < ends:
            status = self._manager._store_controller.report_status()
            busy = status["pending_keys_count"] or status["in_flight_task_count"]
            # Both are 0 for a moment between "taken from the queue" and "handed over".
            quiet = 0 if busy else quiet + 1
            if quiet == 5:
                return True
            time.sleep(0.01)
        return False

    def check_integrity(self) -> None:
        """Check that nothing is locked but what is open, once all is stored below, see `flush`.

        Raises:
            AssertionError: something is.
        """
        locked = self._manager.report_status()["l1_manager"]["read_locked_count"]
        ours = {key for _, keys in self._open.values() for key in keys}
        if locked != len(ours):
            raise AssertionError(f"{locked} objects are locked, {len(ours)} are open")

    def close(self) -> None:
        """Release all memory and threads; open segments are released."""
        for segment, _ in list(self._open.values()):
            segment.release()
        self._manager.close()


def _task(objects: _Objects) -> Any:
    """One row for each object, one column: LMCache then finds all of them or none."""
    from lmcache.v1.distributed.api import GroupedObjectKeys, PrefetchTaskSpec

    return PrefetchTaskSpec(
        [
            GroupedObjectKeys([key], key.object_group_id, _layout(size))
            for key, size in zip(objects.keys, objects.sizes, strict=True)
        ],
        fetching_policy="full",
    )


def _layout(num_bytes: int) -> MemoryLayoutDesc:
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
            memory_config=memory, read_ttl_seconds=_READ_SECONDS, write_ttl_seconds=_READ_SECONDS
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
            f"cpu_bytes: a host memory pool of {num_bytes} bytes could not be allocated ({error})"
        ) from error

"""Segment store over LMCache's pool of pinned host memory."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlcache_connector.storage import codec
from vlcache_connector.storage.codec import ObjectHeader, RefusedObject, SegmentId
from vlcache_connector.storage.grouping import groupings
from vlcache_connector.storage.segment import KVWriter, Segment, SegmentInfo
from vlcache_connector.store.base import EncodedSegment, SegmentStore, StoreCounters, StoreUsage
from vlcache_connector.store.lmcache_pool import (
    PAGE_BYTES,
    LMCachePool,
    release,
    require,
    same_device,
)
from vlcache_connector.store.objects import as_buffers, complete, decode_objects

if TYPE_CHECKING:
    from lmcache.v1.memory_management import MemoryObj

    from vlcache_connector.streams import Pair, Side

logger = logging.getLogger(__name__)

MAX_OBJECT_BYTES = 256 << 20


def object_id(segment: SegmentId, group: int) -> int:
    """64 bits that LMCache finds an object by. A collision is refused: the header has the key."""
    text = f"{segment.kind}/{group}/{segment.key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(eq=False)
class _Room:
    """Objects of a segment that is being written."""

    headers: Sequence[ObjectHeader]
    objects: Sequence[MemoryObj]

    @property
    def id(self) -> SegmentId:
        return self.headers[0].id

    @property
    def ids(self) -> list[int]:
        return _ids(self.headers)

    def payloads(self) -> list[Tensor]:
        """Where the layers or rows go, object by object."""
        return [
            codec.payload_view(obj.tensor, header)
            for header, obj in zip(self.headers, self.objects, strict=True)
        ]

    def seal(self) -> None:
        """All is written: complete the objects."""
        for header, obj in zip(self.headers, self.objects, strict=True):
            codec.seal(obj.tensor, header)


@dataclass(frozen=True)
class _Resident:
    """A stored segment, as it was written or checked.

    Attributes:
        ids: of its objects.
        info: what it is.
        payloads: of its objects.
    """

    ids: Sequence[int]
    info: SegmentInfo
    payloads: Sequence[Tensor]


@dataclass(eq=False)
class _Arriving:
    """A segment that is being copied from the device.

    Attributes:
        sources: of the copies, which have to stay until these are done.
        valid: bool [1] in host memory, once they are done; None: it is.
        sealed: done when the objects are complete.
    """

    room: _Room
    sources: Sequence[Tensor]
    valid: Tensor | None
    sealed: Future[None]


class LMCacheSegmentStore(SegmentStore):
    """Keeps segments in LMCache's local CPU tier: KV as one object per group of consecutive
    layers, the encoder's output as one per group of rows.
    """

    def __init__(
        self,
        model_name: str,
        fingerprint: str,
        rank: int,
        world_size: int,
        budget_bytes: int,
        num_layers: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        kv_dtype: torch.dtype,
        max_object_bytes: int = 64 << 20,
        verify: bool = True,
        side: Side | None = None,
    ) -> None:
        """Allocate the whole budget.

        Args:
            model_name: label of LMCache's keys and metrics.
            fingerprint: model fingerprint, bound into every object.
            rank: this worker's index.
            world_size: number of workers.
            budget_bytes: host memory for stored segments, in bytes (setting `cpu_bytes`).
            num_layers: layers of a KV segment.
            num_kv_heads: KV heads of this worker.
            head_dim: elements of a head.
            kv_dtype: dtype of K and V.
            max_object_bytes: no object gets larger, at most `MAX_OBJECT_BYTES`. A segment whose
                single layers are larger cannot be stored.
            verify: read every header and compare every checksum in `get`, which reads the whole
                segment once; else what is in memory is taken for what was put there.
            side: a stream for copies from the device; None copies before `put_*` returns.

        Raises:
            ValueError: a setting is out of its range.
            MemoryError: the budget cannot be allocated.
        """
        if type(budget_bytes) is not int or budget_bytes <= 0:
            raise ValueError(f"cpu_bytes must be a positive number of bytes, got {budget_bytes!r}")
        if not PAGE_BYTES <= max_object_bytes <= MAX_OBJECT_BYTES:
            raise ValueError(
                f"max_object_bytes must be {PAGE_BYTES} to {MAX_OBJECT_BYTES} bytes, got "
                f"{max_object_bytes!r}"
            )
        self.counters = StoreCounters()
        self._fingerprint = fingerprint
        self._budget = budget_bytes
        self._num_layers = num_layers
        self._head_shape = (num_kv_heads, head_dim)
        self._kv_dtype = codec.dtype_name(kv_dtype)
        self._max_object_bytes = max_object_bytes
        self._verify = verify
        self._side = side
        self._sealer = None
        if side is not None:
            self._sealer = ThreadPoolExecutor(1, "vlcache-seal", initializer=same_device())
        self._arriving: dict[SegmentId, _Arriving] = {}
        self._writing: list[_Room] = []
        self._unwanted: list[_Arriving] = []
        """Removed while they were arriving, or never finished."""
        self._settled: list[tuple[SegmentId, bool]] = []
        self._resident: dict[SegmentId, _Resident] = {}
        self._reading: dict[Segment | EncodedSegment, list[MemoryObj]] = {}
        self._pool = LMCachePool(
            model_name=model_name,
            rank=rank,
            world_size=world_size,
            pool_bytes=_aligned(budget_bytes),
            kv_shape=(num_layers, 2, 256, *self._head_shape),
            kv_dtype=kv_dtype,
        )

    def open_kv(self, key: str, positions: Tensor) -> KVWriter | None:
        template = self._kv_layer(key, codec.pack_positions(positions), positions.shape[0])
        room = self._make_room(template, self._num_layers)
        if room is None:
            return None
        self._writing.append(room)
        layers = [layer for payload in room.payloads() for layer in payload]
        return KVWriter(
            key, layers, lambda valid: self._finish(room, valid), lambda: self._abandon(room)
        )

    def _finish(self, room: _Room, valid: Tensor | None) -> int:
        self._writing.remove(room)
        self.remove(room.id)
        if any(map(self._pool.contains, room.ids)):
            self._give_back(room)
            self.counters.put_failed += 1
            return 0
        return self._take_in(room, (), valid)

    def _abandon(self, room: _Room) -> None:
        self._writing.remove(room)
        self._give_back(room)

    def _give_back(self, room: _Room) -> None:
        """Free the objects, as soon as no copy writes to them."""
        if self._side is None or self._sealer is None:
            release(room.objects)
            return
        written = self._side.copy((), self._side.mark())
        self._unwanted.append(_Arriving(room, (), None, self._sealer.submit(written.synchronize)))

    def put_encoder(self, key: str, rows: Tensor) -> int:
        if rows.dim() != 2 or rows.numel() == 0:
            raise ValueError(f"encoder rows are [n, width], not {tuple(rows.shape)}")
        unit = self._unit(SegmentId(key, "encoder"), (1, rows.shape[1]), rows.shape[0])
        template = replace(unit, dtype=codec.dtype_name(rows.dtype))
        room = self._make_room(template, rows.shape[0])
        if room is None:
            return 0
        parts = rows.split([header.shape[0] for header in room.headers])
        return self._take_in(room, list(zip(room.payloads(), parts, strict=True)))

    def settle(self, *, waits: bool = False) -> list[tuple[SegmentId, bool]]:
        if waits:
            wait([it.sealed for it in (*self._arriving.values(), *self._unwanted)])
        for segment in [name for name, it in self._arriving.items() if it.sealed.done()]:
            self._arrive(segment)
        for arriving in [it for it in self._unwanted if it.sealed.done()]:
            self._unwanted.remove(arriving)
            release(arriving.room.objects)
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
        room = arriving.room
        if is_stored:
            self._keep(segment, room.headers, room.objects)
        else:
            release(room.objects)
            self.counters.put_failed += 1
        self._settled.append((segment, is_stored))

    def get(self, segment: SegmentId) -> Segment | None:
        self._pool.check_open()
        self._arrive(segment)
        objects: list[MemoryObj] = []
        try:
            opened = (self._checked if self._verify else self._known)(segment, objects)
        except RefusedObject as refusal:
            self.counters.refused[refusal.reason] += 1
            logger.warning("Stored segment %s (%s) refused: %s", *segment, refusal)
            opened = None
        if opened is None:
            release(objects)
            return None
        info, parts = opened
        handle = Segment(info, parts, self._release)
        self._reading[handle] = objects
        return handle

    def put_encoded(self, segment: SegmentId, objects: Sequence[memoryview]) -> int:
        self.remove(segment)
        headers = [codec.read_header(buffer) for buffer in as_buffers(objects)]
        memory = None
        if not any(map(self._pool.contains, _ids(headers))):
            memory = self._allocate([len(part) for part in objects])
        if memory is None:
            self.counters.put_failed += 1
            return 0
        for obj, part in zip(memory, objects, strict=True):
            obj.tensor.numpy().data[:] = part
        return self._keep(segment, headers, memory)

    def check_encoded(
        self, segment: SegmentId, objects: Sequence[memoryview], num_tokens: int
    ) -> None:
        buffers = iter(as_buffers(objects))
        header, _ = complete(self._decode(segment, buffers), len(objects))
        if header.num_tokens != num_tokens:
            raise RefusedObject("shape", f"of {header.num_tokens} tokens, not {num_tokens}")

    def get_encoded(self, segment: SegmentId) -> EncodedSegment | None:
        self._arrive(segment)
        objects: list[MemoryObj] = []
        if self._known(segment, objects) is None:
            release(objects)
            return None
        parts = [obj.tensor.numpy().data for obj in objects]
        handle = EncodedSegment(segment, parts, lambda: self._release(handle))
        self._reading[handle] = objects
        return handle

    def contains(self, segment: SegmentId) -> bool:
        return segment in self._resident or segment in self._arriving

    def remove(self, segment: SegmentId) -> None:
        arriving = self._arriving.pop(segment, None)
        if arriving is not None:
            self._unwanted.append(arriving)
        resident = self._resident.pop(segment, None)
        if resident is not None:
            self._pool.remove(resident.ids)

    def kv_bytes(self, num_tokens: int) -> int:
        template = self._kv_layer("k" * 256, bytes(12 * num_tokens), 3)
        for headers in groupings(template, self._num_layers, self._max_object_bytes):
            return sum(_aligned(codec.encoded_size(header)) for header in headers)
        return self._num_layers * template.payload_bytes  # too large to be stored

    def usage(self) -> StoreUsage:
        num_segments = len(self._resident) + len(self._arriving)
        return StoreUsage(self._pool.allocated_bytes, self._budget, num_segments)

    def clear(self) -> None:
        for segment in [*self._resident, *self._arriving]:
            self.remove(segment)

    def check_integrity(self) -> None:
        self._settled = self.settle(waits=True)
        used = self._pool.allocated_bytes
        require(used <= self._budget, f"{used} bytes used of {self._budget}")
        borrowed = [*self._reading.values(), *(room.objects for room in self._writing)]
        self._pool.check_integrity(obj for objects in borrowed for obj in objects)
        for segment, resident in self._resident.items():
            objects: list[MemoryObj] = []
            try:
                opened = self._read(segment, objects)
                complete = opened is not None and len(objects) == len(resident.ids)
                require(complete, f"{segment} is not complete")
            except RefusedObject as refusal:
                raise AssertionError(f"{segment}: {refusal}") from refusal
            finally:
                release(objects)

    def close(self) -> None:
        self.settle(waits=True)
        if self._sealer is not None:
            self._sealer.shutdown()
        for segment in list(self._reading):
            segment.release()
        for room in self._writing:
            release(room.objects)
        self._writing.clear()
        self._resident.clear()
        self._pool.close()

    def _kv_layer(self, key: str, positions: bytes, positions_rows: int) -> ObjectHeader:
        """Header of one layer, for `groupings`."""
        num_tokens = len(positions) // (4 * positions_rows)
        unit = self._unit(SegmentId(key, "kv"), (1, 2, num_tokens, *self._head_shape), num_tokens)
        return replace(unit, positions=positions, positions_rows=positions_rows)

    def _unit(self, segment: SegmentId, shape: tuple[int, ...], num_tokens: int) -> ObjectHeader:
        return ObjectHeader(
            format_version=codec.FORMAT_VERSION,
            kind=segment.kind,
            key=segment.key,
            fingerprint=self._fingerprint,
            group=0,
            num_groups=1,
            first_layer=0,
            shape=shape,
            dtype=self._kv_dtype,
            positions=b"",
            positions_rows=0,
            num_tokens=num_tokens,
        )

    def _make_room(self, template: ObjectHeader, num_units: int) -> _Room | None:
        """Objects for a segment of layers or rows like `template`, in place of one of its key."""
        self.remove(template.id)
        for headers in groupings(template, num_units, self._max_object_bytes):
            sizes = [codec.encoded_size(header) for header in headers]
            # An id that is taken by now belongs to a segment of another key.
            if not self._has_room(sizes) or any(map(self._pool.contains, _ids(headers))):
                break
            objects = self._allocate(sizes)
            if objects is not None:
                return _Room(headers, objects)
            # The room is there, but in smaller pieces.
        self.counters.put_failed += 1
        return None

    def _take_in(self, room: _Room, pairs: Sequence[Pair], valid: Tensor | None = None) -> int:
        """Keep a segment once `pairs` are copied, if it is valid then."""
        if self._side is not None:
            self._arriving[room.id] = self._send(self._side, room, pairs, valid)
            return sum(obj.get_physical_size() for obj in room.objects)
        if valid is not None and not bool(valid):
            release(room.objects)
            self.counters.put_failed += 1
            return 0
        try:
            for target, source in pairs:
                target.copy_(source)
            room.seal()
        except BaseException:
            release(room.objects)
            raise
        self._settled.append((room.id, True))
        return self._keep(room.id, room.headers, room.objects)

    def _send(
        self, side: Side, room: _Room, pairs: Sequence[Pair], valid: Tensor | None
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
            room.seal()

        return _Arriving(room, [source for _, source in pairs], is_valid, self._sealer.submit(seal))

    def _has_room(self, sizes: Sequence[int]) -> bool:
        return sum(map(_aligned, sizes)) <= self._budget - self._pool.allocated_bytes

    def _allocate(self, sizes: Sequence[int]) -> list[MemoryObj] | None:
        return self._pool.allocate(sizes) if self._has_room(sizes) else None

    def _keep(
        self, segment: SegmentId, headers: Sequence[ObjectHeader], objects: Sequence[MemoryObj]
    ) -> int:
        payloads = [
            codec.last_payload(obj.tensor, header)
            for header, obj in zip(headers, objects, strict=True)
        ]
        ids = _ids(headers)
        self._pool.put(ids, objects)
        self._resident[segment] = _Resident(ids, _info(headers[0]), payloads)
        return sum(obj.get_physical_size() for obj in objects)

    def _known(
        self, segment: SegmentId, objects: list[MemoryObj]
    ) -> tuple[SegmentInfo, Sequence[Tensor]] | None:
        """As `_checked`, without a look into memory."""
        resident = self._resident.get(segment)
        if resident is None:
            return None
        for id_ in resident.ids:
            obj = self._pool.get(id_)
            if obj is None:
                return None
            objects.append(obj)
        return resident.info, resident.payloads

    def _checked(
        self, segment: SegmentId, objects: list[MemoryObj]
    ) -> tuple[SegmentInfo, Sequence[Tensor]] | None:
        """What a segment is and all its payloads; else as `_read`."""
        opened = self._read(segment, objects)
        return None if opened is None else (_info(opened[0]), opened[1])

    def _read(
        self, segment: SegmentId, objects: list[MemoryObj]
    ) -> tuple[ObjectHeader, list[Tensor]] | None:
        """The first header and all payloads of a segment, or None if an object is not there.

        `objects` gets a reference to each object that was opened, for the caller to release.
        Raises RefusedObject if an object is, or if they are no segment of this store.
        """

        def buffers() -> Iterator[Tensor]:
            for group in itertools.count():
                obj = self._pool.get(object_id(segment, group))
                if obj is None:
                    return
                objects.append(obj)
                yield obj.tensor

        return self._decode(segment, buffers())

    def _decode(
        self, segment: SegmentId, buffers: Iterator[Tensor]
    ) -> tuple[ObjectHeader, list[Tensor]] | None:
        """The first header and all payloads of a segment, or None if there are too few buffers.

        Takes as many buffers as the segment has objects.
        """
        opened = decode_objects(
            segment,
            buffers,
            fingerprint=self._fingerprint,
            num_layers=self._num_layers,
            verify=True,
        )
        if opened is not None and segment.kind == "kv":
            form = (opened[0].shape[3:], opened[0].dtype)
            if form != (self._head_shape, self._kv_dtype):
                raise RefusedObject("shape", f"KV of {form} is not this store's")
        return opened

    def _release(self, segment: Segment | EncodedSegment) -> None:
        release(self._reading.pop(segment))


def _info(header: ObjectHeader) -> SegmentInfo:
    return SegmentInfo(header.id, header.num_tokens, codec.unpack_positions(header))


def _ids(headers: Sequence[ObjectHeader]) -> list[int]:
    return [object_id(header.id, header.group) for header in headers]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES

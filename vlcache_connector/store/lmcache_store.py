"""Segment store over LMCache's pool of pinned host memory."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlcache_connector.store import codec
from vlcache_connector.store.base import (
    EncodedSegment,
    Segment,
    SegmentInfo,
    SegmentStore,
    StoreCounters,
    StoreUsage,
)
from vlcache_connector.store.codec import Kind, ObjectHeader, RefusedObject
from vlcache_connector.store.grouping import groupings
from vlcache_connector.store.lmcache_pool import PAGE_BYTES, LMCachePool, release, require
from vlcache_connector.store.objects import as_buffers, complete, decode_objects

if TYPE_CHECKING:
    from lmcache.v1.memory_management import MemoryObj

logger = logging.getLogger(__name__)

MAX_OBJECT_BYTES = 256 << 20


def object_id(key: str, kind: Kind, group: int) -> int:
    """64 bits that LMCache finds an object by. A collision is refused: the header has the key."""
    text = f"{kind}/{group}/{key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


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
            verify: compare checksums in `get`, which reads the whole segment once.

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
        self._resident: dict[tuple[str, Kind], list[int]] = {}
        self._reading: dict[Segment | EncodedSegment, list[MemoryObj]] = {}
        self._pool = LMCachePool(
            model_name=model_name,
            rank=rank,
            world_size=world_size,
            pool_bytes=_aligned(budget_bytes),
            kv_shape=(num_layers, 2, 256, *self._head_shape),
            kv_dtype=kv_dtype,
        )

    def put_kv(self, key: str, positions: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> int:
        template = self._kv_layer(key, codec.pack_positions(positions), positions.shape[0])
        form = (template.shape[2:], codec.DTYPES[self._kv_dtype])
        forms = {(tuple(tensor.shape), tensor.dtype) for kv in layers for tensor in kv}
        if len(layers) != self._num_layers or forms != {form}:
            raise ValueError(
                f"KV is {self._num_layers} layers of {form}, not {len(layers)} of {forms}"
            )

        def fill(first: int, payload: Tensor) -> None:
            for slot, (k, v) in zip(payload, layers[first:], strict=False):
                slot[0].copy_(k, non_blocking=True)
                slot[1].copy_(v, non_blocking=True)

        return self._put(template, self._num_layers, fill, layers[0][0].device)

    def put_encoder(self, key: str, rows: Tensor) -> int:
        if rows.dim() != 2 or rows.numel() == 0:
            raise ValueError(f"encoder rows are [n, width], not {tuple(rows.shape)}")

        def fill(first: int, payload: Tensor) -> None:
            payload.copy_(rows[first : first + payload.shape[0]], non_blocking=True)

        unit = self._unit("encoder", key, (1, rows.shape[1]), rows.shape[0])
        template = replace(unit, dtype=codec.dtype_name(rows.dtype))
        return self._put(template, rows.shape[0], fill, rows.device)

    def get(self, key: str, kind: Kind) -> Segment | None:
        objects: list[MemoryObj] = []
        try:
            opened = self._read(key, kind, objects, verify=self._verify)
        except RefusedObject as refusal:
            self.counters.refused[refusal.reason] += 1
            logger.warning("Stored segment %s (%s) refused: %s", key, kind, refusal)
            opened = None
        if opened is None:
            release(objects)
            return None
        header, parts = opened
        info = SegmentInfo(key, kind, header.num_tokens, codec.unpack_positions(header))
        segment = Segment(info, parts, self._release)
        self._reading[segment] = objects
        return segment

    def put_encoded(self, key: str, kind: Kind, objects: Sequence[memoryview]) -> int:
        self.remove(key, kind)
        ids = [object_id(key, kind, group) for group in range(len(objects))]
        memory = None
        if not any(map(self._pool.contains, ids)):
            memory = self._allocate([len(part) for part in objects])
        if memory is None:
            self.counters.put_failed += 1
            return 0
        for obj, part in zip(memory, objects, strict=True):
            obj.tensor.numpy().data[:] = part
        return self._keep(key, kind, ids, memory)

    def check_encoded(self, key: str, kind: Kind, objects: Sequence[memoryview]) -> None:
        complete(self._decode(key, kind, iter(as_buffers(objects)), verify=True), len(objects))

    def get_encoded(self, key: str, kind: Kind) -> EncodedSegment | None:
        ids = self._resident.get((key, kind))
        if ids is None:
            return None
        objects = [obj for id_ in ids if (obj := self._pool.get(id_)) is not None]
        if len(objects) < len(ids):
            release(objects)
            return None
        parts = [obj.tensor.numpy().data for obj in objects]
        segment = EncodedSegment(key, kind, parts, lambda: self._release(segment))
        self._reading[segment] = objects
        return segment

    def contains(self, key: str, kind: Kind) -> bool:
        return (key, kind) in self._resident

    def remove(self, key: str, kind: Kind) -> None:
        self._pool.remove(self._resident.pop((key, kind), ()))

    def kv_bytes(self, num_tokens: int) -> int:
        template = self._kv_layer("k" * 256, bytes(12 * num_tokens), 3)
        for headers in groupings(template, self._num_layers, self._max_object_bytes):
            return sum(_aligned(codec.encoded_size(header)) for header in headers)
        return self._num_layers * template.payload_bytes  # too large to be stored

    def usage(self) -> StoreUsage:
        return StoreUsage(self._pool.allocated_bytes, self._budget, len(self._resident))

    def clear(self) -> None:
        for key, kind in list(self._resident):
            self.remove(key, kind)

    def check_integrity(self) -> None:
        used = self._pool.allocated_bytes
        require(used <= self._budget, f"{used} bytes used of {self._budget}")
        self._pool.check_integrity(obj for objs in self._reading.values() for obj in objs)
        for (key, kind), ids in self._resident.items():
            objects: list[MemoryObj] = []
            try:
                opened = self._read(key, kind, objects, verify=True)
                complete = opened is not None and len(objects) == len(ids)
                require(complete, f"segment {key!r} ({kind}) is not complete")
            except RefusedObject as refusal:
                raise AssertionError(f"segment {key!r} ({kind}): {refusal}") from refusal
            finally:
                release(objects)

    def close(self) -> None:
        for segment in list(self._reading):
            segment.release()
        self._resident.clear()
        self._pool.close()

    def _kv_layer(self, key: str, positions: bytes, positions_rows: int) -> ObjectHeader:
        """Header of one layer, for `groupings`."""
        num_tokens = len(positions) // (4 * positions_rows)
        unit = self._unit("kv", key, (1, 2, num_tokens, *self._head_shape), num_tokens)
        return replace(unit, positions=positions, positions_rows=positions_rows)

    def _unit(self, kind: Kind, key: str, shape: tuple[int, ...], num_tokens: int) -> ObjectHeader:
        return ObjectHeader(
            format_version=codec.FORMAT_VERSION,
            kind=kind,
            key=key,
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

    def _put(
        self,
        template: ObjectHeader,
        num_units: int,
        fill: Callable[[int, Tensor], None],
        source: torch.device,
    ) -> int:
        """Store a segment of layers or rows like `template`, which `fill` copies from `source`.

        `fill` gets the index of a payload's first layer or row, and the payload.
        """
        self.remove(template.key, template.kind)
        for headers in groupings(template, num_units, self._max_object_bytes):
            ids = [object_id(header.key, header.kind, header.group) for header in headers]
            sizes = [codec.encoded_size(header) for header in headers]
            # An id that is taken by now belongs to a segment of another key.
            if not self._has_room(sizes) or any(map(self._pool.contains, ids)):
                break
            objects = self._allocate(sizes)
            if objects is None:  # the room is there, but in smaller pieces
                continue
            try:
                self._write(headers, objects, fill, source)
            except BaseException:
                release(objects)
                raise
            return self._keep(template.key, template.kind, ids, objects)
        self.counters.put_failed += 1
        return 0

    def _has_room(self, sizes: Sequence[int]) -> bool:
        return sum(map(_aligned, sizes)) <= self._budget - self._pool.allocated_bytes

    def _allocate(self, sizes: Sequence[int]) -> list[MemoryObj] | None:
        return self._pool.allocate(sizes) if self._has_room(sizes) else None

    def _keep(self, key: str, kind: Kind, ids: list[int], objects: Sequence[MemoryObj]) -> int:
        self._pool.put(ids, objects)
        self._resident[key, kind] = ids
        return sum(obj.get_physical_size() for obj in objects)

    def _write(
        self,
        headers: Sequence[ObjectHeader],
        objects: Sequence[MemoryObj],
        fill: Callable[[int, Tensor], None],
        source: torch.device,
    ) -> None:
        first = 0
        for header, obj in zip(headers, objects, strict=True):
            fill(first, codec.payload_view(obj.tensor, header))
            first += header.shape[0]
        if source.type != "cpu":  # the checksum reads what the copies wrote
            torch.accelerator.current_stream(source).synchronize()
        for header, obj in zip(headers, objects, strict=True):
            codec.seal(obj.tensor, header)

    def _read(
        self, key: str, kind: Kind, objects: list[MemoryObj], *, verify: bool
    ) -> tuple[ObjectHeader, list[Tensor]] | None:
        """The first header and all payloads of a segment, or None if an object is not there.

        `objects` gets a reference to each object that was opened, for the caller to release.
        Raises RefusedObject if an object is, or if they are no segment of this store.
        """

        def buffers() -> Iterator[Tensor]:
            for group in itertools.count():
                obj = self._pool.get(object_id(key, kind, group))
                if obj is None:
                    return
                objects.append(obj)
                yield obj.tensor

        return self._decode(key, kind, buffers(), verify=verify)

    def _decode(
        self, key: str, kind: Kind, buffers: Iterator[Tensor], *, verify: bool
    ) -> tuple[ObjectHeader, list[Tensor]] | None:
        """The first header and all payloads of a segment, or None if there are too few buffers.

        Takes as many buffers as the segment has objects.
        """
        opened = decode_objects(
            key,
            kind,
            buffers,
            fingerprint=self._fingerprint,
            num_layers=self._num_layers,
            verify=verify,
        )
        if opened is not None and kind == "kv":
            form = (opened[0].shape[3:], opened[0].dtype)
            if form != (self._head_shape, self._kv_dtype):
                raise RefusedObject("shape", f"KV of {form} is not this store's")
        return opened

    def _release(self, segment: Segment | EncodedSegment) -> None:
        release(self._reading.pop(segment))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES

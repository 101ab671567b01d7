"""What a segment looks like as objects of LMCache: their number, sizes, keys and headers.

Whoever reads a segment has to know the size of each object beforehand. So it follows from the model
and the segment's own size alone, and nothing has to be asked for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlcache_connector.keys import salt_of
from vlcache_connector.storage import codec
from vlcache_connector.storage.codec import Kind, ObjectHeader, RefusedObject, SegmentId
from vlcache_connector.storage.grouping import grouping

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import ObjectKey

_KINDS: tuple[Kind, ...] = ("kv", "encoder")
_MAX_GROUPS = 1 << 16
LARGEST_OBJECT = 256 << 20


@dataclass(frozen=True)
class Form:
    """The form of a segment, whichever its content.

    Attributes:
        kind: "kv" or "encoder".
        num_tokens: tokens of the segment ("encoder": rows).
        unit: shape of one unit: "kv", a layer: `(1, 2, num_tokens, kv_heads, head_dim)`;
            "encoder", a row: `(1, width)`.
        num_units: layers or rows.
        dtype: a key of `codec.DTYPES`.
        positions_rows: rows of the donor's positions, 1 or 3; 0 for "encoder".
    """

    kind: Kind
    num_tokens: int
    unit: tuple[int, ...]
    num_units: int
    dtype: str
    positions_rows: int


@dataclass(frozen=True)
class Space:
    """The objects of one rank of a deployment.

    Attributes:
        namespace: part of each key, such as the model's fingerprint; must not contain "@".
        rank: tensor-parallel rank.
        num_ranks: tensor-parallel degree.
        max_object_bytes: no object of more than one unit gets larger; adapters keep buffers of the
            largest one.
    """

    namespace: str
    rank: int
    num_ranks: int
    max_object_bytes: int = 16 << 20

    def headers(self, segment: SegmentId, form: Form, positions: bytes) -> list[ObjectHeader]:
        """Headers of a segment's objects, in order.

        Args:
            positions: of `form`'s length, see `ObjectHeader.positions`.

        Raises:
            ValueError: a unit is larger than any object may be.
        """
        template = ObjectHeader(
            format_version=codec.FORMAT_VERSION,
            kind=form.kind,
            key=segment.key,
            fingerprint=_identity(self.namespace, self.kv_rank),
            group=0,
            num_groups=1,
            first_layer=0,
            shape=form.unit,
            dtype=form.dtype,
            positions=positions,
            positions_rows=form.positions_rows,
            num_tokens=form.num_tokens,
        )
        headers = grouping(template, form.num_units, self.max_object_bytes)
        if codec.encoded_size(headers[0]) > LARGEST_OBJECT or len(headers) > _MAX_GROUPS:
            raise ValueError(f"a segment of {form.num_tokens} tokens is too large to be stored")
        return headers

    def sizes(self, segment: SegmentId, form: Form) -> list[int]:
        """Lengths of a segment's objects in bytes, in order; raises as `headers`."""
        positions = bytes(4 * form.positions_rows * form.num_tokens)
        return [codec.encoded_size(header) for header in self.headers(segment, form, positions)]

    def object_keys(self, segment: SegmentId, num_objects: int, salt: str) -> list[ObjectKey]:
        """LMCache's keys of a segment's objects, in order.

        Args:
            salt: whose objects they are, as LMCache accounts for them (quotas, encryption).
        """
        from lmcache.v1.distributed.api import ObjectKey

        first = _MAX_GROUPS * _KINDS.index(segment.kind)
        return [
            ObjectKey(_digest(segment), self.namespace, self.kv_rank, first + group, salt)
            for group in range(num_objects)
        ]

    @property
    def kv_rank(self) -> int:
        """This rank as LMCache packs it."""
        from lmcache.v1.distributed.api import ObjectKey

        return ObjectKey.ComputeKVRank(self.num_ranks, self.rank, self.num_ranks, self.rank)


@dataclass(frozen=True)
class SegmentObjects:
    """A segment's objects as they have to be.

    Attributes:
        headers: without checksums, and without positions where the segment is to be read.
        keys: LMCache's.
        sizes: in bytes.
    """

    id: SegmentId
    headers: Sequence[ObjectHeader]
    keys: Sequence[ObjectKey]
    sizes: Sequence[int]

    @property
    def num_bytes(self) -> int:
        """Of all objects."""
        return sum(self.sizes)


@dataclass(frozen=True)
class SegmentLayout:
    """How one rank's segments become objects.

    Attributes:
        space: of the rank's KV.
        num_layers: of a KV segment.
        num_kv_heads: KV heads of this rank.
        head_dim: entries of a head.
        kv_dtype: of K and V.
        positions_rows: rows of a donor's positions, 1 (RoPE) or 3 (M-RoPE).
        encoder_width: entries of an encoder row.
        encoder_dtype: of encoder rows.
    """

    space: Space
    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype
    positions_rows: int
    encoder_width: int
    encoder_dtype: torch.dtype

    def kv(self, key: str, positions: bytes, rows: int, num_tokens: int) -> SegmentObjects | None:
        """A KV segment with the donor's packed positions; None if it is too large."""
        return self._objects(SegmentId(key, "kv"), self._kv_form(num_tokens, rows), positions)

    def encoder(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> SegmentObjects | None:
        """Encoder rows [rows, width], which all ranks share; None if they are too large."""
        form = self._encoder_form(shape[0], shape[1], dtype)
        return self._objects(SegmentId(key, "encoder"), form, b"")

    def expected(self, segment: SegmentId, num_tokens: int) -> SegmentObjects | None:
        """A segment to be read, whatever its positions; None if it is too large."""
        form = self._form(segment.kind, num_tokens)
        return self._objects(segment, form, bytes(4 * form.positions_rows * num_tokens))

    def last_key(self, segment: SegmentId, num_tokens: int) -> ObjectKey:
        """Key of the object of a segment that is written last."""
        space = self._space_of(segment.kind)
        count = _num_objects(space, self._form(segment.kind, num_tokens))
        return space.object_keys(segment, count, salt_of(segment.key))[-1]

    def _objects(self, segment: SegmentId, form: Form, positions: bytes) -> SegmentObjects | None:
        space = self._space_of(segment.kind)
        try:
            headers = space.headers(segment, form, positions)
        except ValueError:
            return None
        keys = space.object_keys(segment, len(headers), salt_of(segment.key))
        return SegmentObjects(segment, headers, keys, list(map(codec.encoded_size, headers)))

    def _space_of(self, kind: Kind) -> Space:
        return self.space if kind == "kv" else replace(self.space, rank=0, num_ranks=1)

    def _form(self, kind: Kind, num_tokens: int) -> Form:
        if kind == "kv":
            return self._kv_form(num_tokens, self.positions_rows)
        return self._encoder_form(num_tokens, self.encoder_width, self.encoder_dtype)

    def _kv_form(self, num_tokens: int, positions_rows: int) -> Form:
        unit = (1, 2, num_tokens, self.num_kv_heads, self.head_dim)
        dtype = codec.dtype_name(self.kv_dtype)
        return Form("kv", num_tokens, unit, self.num_layers, dtype, positions_rows)

    @staticmethod
    def _encoder_form(num_rows: int, width: int, dtype: torch.dtype) -> Form:
        return Form("encoder", num_rows, (1, width), num_rows, codec.dtype_name(dtype), 0)


@functools.lru_cache(1024)
def _num_objects(space: Space, form: Form) -> int:
    """Of a segment; 1 if it is too large, as if there were one that nobody has."""
    try:
        positions = bytes(4 * form.positions_rows * form.num_tokens)
        return len(space.headers(SegmentId("", form.kind), form, positions))
    except ValueError:
        return 1


def kind_and_group(key: ObjectKey) -> tuple[Kind, int]:
    """Of an object by its key.

    Raises:
        RefusedObject: no object of ours has this key.
    """
    kind, group = divmod(key.object_group_id, _MAX_GROUPS)
    if kind >= len(_KINDS):
        raise RefusedObject("identity", f"there is no object group {key.object_group_id}")
    return _KINDS[kind], group


def check_object(key: ObjectKey, memory: Tensor) -> None:
    """Check an object of unknown content, every byte of it, against the key it came under.

    Args:
        memory: uint8 `[length of the object]`, host memory.

    Raises:
        RefusedObject: it is damaged, or another object than the key says.
    """
    header = codec.read_header(memory)
    kind, group = kind_and_group(key)
    if (_digest(header.id), header.kind, header.group) != (key.chunk_hash, kind, group):
        raise RefusedObject("identity", f"stored as group {header.group} of {header.key!r}")
    identity = _identity(key.model_name, key.kv_rank)
    codec.decode(memory, expect_key=header.key, expect_fingerprint=identity, verify=True)


def read_objects(headers: Sequence[ObjectHeader], buffers: Sequence[Tensor]) -> Tensor | None:
    """Compare the headers of checked objects with those expected; only positions may differ.

    Returns:
        The donor's positions, int64 `[rows, num_tokens]`; None for "encoder".

    Raises:
        RefusedObject: "shape", they are not this segment.
    """
    positions: bytes | None = None
    for expected, buffer in zip(headers, buffers, strict=True):
        found = codec.read_header(buffer)
        if positions is None:
            positions = found.positions
        if found != replace(expected, positions=positions, checksum=found.checksum):
            raise RefusedObject("shape", f"object {expected.group} is of another form")
    return codec.unpack_positions(replace(headers[0], positions=positions or b""))


def _identity(namespace: str, kv_rank: int) -> str:
    """What an object says of its model and rank: objects of two ranks may look the same else."""
    return f"{namespace}/{kv_rank:08x}"


def _digest(segment: SegmentId) -> bytes:
    return hashlib.sha256(f"{segment.kind}/{segment.key}".encode()).digest()

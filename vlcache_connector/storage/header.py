"""The header of a stored object: its schema, its one valid encoding, and why one is refused."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import msgpack
import numpy as np
import torch
from torch import Tensor

Kind = Literal["kv", "encoder"]


class SegmentId(NamedTuple):
    """What a segment is stored under: its content key, and whether it is KV or encoder rows."""

    key: str
    kind: Kind


RefusalReason = Literal["format", "version", "identity", "shape", "checksum"]
REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 4 << 20

# float8 is carried as the raw bytes it is: elements are copied, never converted.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_DIM = 1 << 40

# Types on the wire, matched exactly (`bool` is no int). The checksum is 8 bytes there, so that the
# header's length does not depend on its value.
_WIRE_TYPES: dict[str, type] = {
    **dict.fromkeys(("format_version", "group", "num_groups", "first_layer"), int),
    **dict.fromkeys(("positions_rows", "num_tokens"), int),
    **dict.fromkeys(("kind", "key", "fingerprint", "dtype"), str),
    **{"shape": tuple, "positions": bytes, "checksum": bytes},
}


class RefusedObject(Exception):  # noqa: N818 -- a refusal is an expected outcome, not a fault
    """An object that must not be used.

    Attributes:
        reason: what is wrong with it: "format" (not an object of this format), "version" (written
            by another version), "identity" (stored under another key or model), "shape" (sizes
            that contradict each other or the reader), "checksum" (damaged content).
    """

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: RefusalReason = reason


@dataclass(frozen=True)
class ObjectHeader:
    """What an object says about itself.

    Attributes:
        format_version: `FORMAT_VERSION` of the writer.
        kind: "kv" or "encoder".
        key: the content key the segment is stored under.
        fingerprint: the model fingerprint of the writer.
        group: index of this object among the segment's objects.
        num_groups: number of objects the segment consists of.
        first_layer: first model layer in the payload; 0 for "encoder".
        shape: payload shape; "kv": `[layers, 2, num_tokens, kv_heads, head_dim]`, "encoder":
            `[rows, width]`, where the groups' rows add up to `num_tokens`.
        dtype: payload dtype, a key of `DTYPES`.
        positions: the donor's base RoPE positions, int32 little-endian, row-major
            `[positions_rows, num_tokens]`; empty for "encoder".
        positions_rows: 1 (RoPE) or 3 (M-RoPE); 0 for "encoder".
        num_tokens: tokens of the segment ("encoder": rows), over all groups.
        checksum: xxh3_64 over the encoded header without this field, then the payload.
    """

    format_version: int
    kind: Kind
    key: str
    fingerprint: str
    group: int
    num_groups: int
    first_layer: int
    shape: tuple[int, ...]
    dtype: str
    positions: bytes
    positions_rows: int
    num_tokens: int
    checksum: int = 0

    @property
    def id(self) -> SegmentId:
        """Of the segment that the object is a part of."""
        return SegmentId(self.key, self.kind)

    @property
    def payload_bytes(self) -> int:
        """Length of the payload in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """The name of `dtype` in headers; raises ValueError if objects cannot carry it."""
    try:
        return _DTYPE_NAMES[dtype]
    except KeyError:
        raise ValueError(f"dtype {dtype} cannot be stored; one of {sorted(DTYPES)}") from None


def pack_positions(positions: Tensor) -> bytes:
    """`[rows, n]` of any integer dtype as `ObjectHeader.positions`.

    Raises:
        ValueError: it is not such a tensor with 1 or 3 rows and n > 0, or exceeds int32.
    """
    if positions.dim() != 2 or positions.shape[0] not in (1, 3) or positions.shape[1] == 0:
        raise ValueError(f"positions are [1 or 3, n], not {tuple(positions.shape)}")
    host = positions.detach().cpu().numpy()
    packed = host.astype("<i4")
    if host.dtype.kind not in "iu" or (packed != host).any():
        raise ValueError(f"positions are integers in the range of int32, not {positions.dtype}")
    return packed.tobytes()


def unpack_positions(header: ObjectHeader) -> Tensor | None:
    """`header.positions` as int64 `[positions_rows, num_tokens]`; None for kind "encoder"."""
    if header.kind == "encoder":
        return None
    positions = np.frombuffer(header.positions, "<i4").astype(np.int64)
    return torch.from_numpy(positions).view(header.positions_rows, header.num_tokens)


def layout_problem(header: ObjectHeader) -> str | None:
    """Why the header's sizes cannot be, or None. Bounds everything computed from them."""
    rank = {"kv": 5, "encoder": 2}.get(header.kind)
    if rank is None or header.dtype not in DTYPES:
        return f"unknown kind {header.kind!r} or dtype {header.dtype!r}"
    if len(header.shape) != rank or not all(1 <= dim <= _MAX_DIM for dim in header.shape):
        return f"shape {header.shape} is none of kind {header.kind!r}"
    if not 0 <= header.group < header.num_groups or header.first_layer < 0:
        return f"group {header.group} of {header.num_groups} from layer {header.first_layer}"
    if header.kind == "encoder":
        consistent = header.positions_rows == 0 and header.shape[0] <= header.num_tokens
    else:
        consistent = header.positions_rows in (1, 3) and header.shape[1:3] == (2, header.num_tokens)
    if not consistent or len(header.positions) != 4 * header.positions_rows * header.num_tokens:
        return (
            f"{header.num_tokens} tokens with {header.positions_rows} rows of positions in "
            f"{len(header.positions)} bytes do not fit shape {header.shape}"
        )
    return None


def pack_header(header: ObjectHeader, *, with_checksum: bool = True) -> bytes:
    """The header's one valid encoding: a msgpack map of its fields, in their order."""
    wire = {field.name: getattr(header, field.name) for field in fields(header)}
    del wire["checksum"]
    if with_checksum:
        wire["checksum"] = header.checksum.to_bytes(8, "little")
    return msgpack.packb(wire)


def unpack_header(packed: memoryview) -> ObjectHeader:
    """Read a header of unknown content; `layout_problem` is left to the caller.

    Raises:
        RefusedObject: "format" or "version".
    """
    wire = _unpack_map(packed)
    version = wire.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise RefusedObject("version", f"format version {version}, not {FORMAT_VERSION}")
    if {name: type(value) for name, value in wire.items()} != _WIRE_TYPES:
        raise RefusedObject("format", "header fields do not match the schema")
    if any(type(dim) is not int for dim in wire["shape"]) or len(wire["checksum"]) != 8:
        raise RefusedObject("format", "shape or checksum do not match the schema")
    wire["checksum"] = int.from_bytes(wire["checksum"], "little")
    header = ObjectHeader(**wire)
    # A header that was changed without changing its meaning is refused as well.
    # As bytes: a memoryview is compared element by element.
    if pack_header(header) != bytes(packed):
        raise RefusedObject("format", "header is not in canonical encoding")
    return header


def _unpack_map(packed: memoryview) -> dict[str, Any]:
    try:
        wire = msgpack.unpackb(
            packed,
            use_list=False,
            max_array_len=8,
            max_map_len=2 * len(_WIRE_TYPES),
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise RefusedObject("format", f"header is not msgpack: {error}") from error
    if type(wire) is not dict:
        raise RefusedObject("format", "header is not a map")
    return wire

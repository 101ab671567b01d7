"""Self-describing object format of the segment store.

One object is one uint8 buffer::

    0        4 bytes  magic "VLCS"
    4        u32 LE   length of the header in bytes
    8        header   msgpack map, one entry per field of `ObjectHeader`
    ...      zeros    up to the next multiple of 64
    payload  the tensor, C order, exactly `prod(shape) * itemsize` bytes, to the buffer's end

Nothing read from an object is executed or trusted: the header has a strict schema and exactly one
valid encoding, every size is bounded before anything is allocated, and the checksum covers all
that the schema does not determine. There is no pickle.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import torch
import xxhash
from torch import Tensor

from vlcache_connector.storage.header import (
    DTYPES,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    REFUSAL_REASONS,
    Kind,
    ObjectHeader,
    RefusalReason,
    RefusedObject,
    SegmentId,
    dtype_name,
    layout_problem,
    pack_header,
    pack_positions,
    unpack_header,
    unpack_positions,
)

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "MAX_HEADER_BYTES",
    "REFUSAL_REASONS",
    "Kind",
    "ObjectHeader",
    "RefusalReason",
    "RefusedObject",
    "SegmentId",
    "decode",
    "dtype_name",
    "encode_into",
    "encoded_size",
    "last_payload",
    "pack_positions",
    "payload_view",
    "read_header",
    "seal",
    "unpack_positions",
]

_MAGIC = b"VLCS"
_PREFIX = struct.Struct("<4sI")
_ALIGN = 64


def encoded_size(header: ObjectHeader) -> int:
    """Length in bytes of the object with this header; the checksum field does not matter.

    Raises:
        ValueError: the header contradicts itself, or is longer than `MAX_HEADER_BYTES`.
    """
    if problem := layout_problem(header):
        raise ValueError(problem)
    length = len(pack_header(header))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return _payload_offset(length) + header.payload_bytes


def payload_view(buffer: Tensor, header: ObjectHeader) -> Tensor:
    """The payload of an object to be written, as a view of `header.shape` and `header.dtype`.

    For writers that fill the payload piece by piece; `seal` completes the object.

    Raises:
        ValueError: `buffer` is not a contiguous 1-D uint8 host tensor of `encoded_size(header)`.
    """
    size = encoded_size(header)
    _as_memory(buffer)
    if buffer.numel() != size:
        raise ValueError(f"the buffer has {buffer.numel()} bytes, the object needs {size}")
    return _view(buffer, size - header.payload_bytes, header)


def last_payload(buffer: Tensor, header: ObjectHeader) -> Tensor:
    """The payload of a complete object whose header is known: a view."""
    return _view(buffer, buffer.numel() - header.payload_bytes, header)


def seal(buffer: Tensor, header: ObjectHeader) -> ObjectHeader:
    """Write the header of an object whose payload is complete; raises as `payload_view`.

    Returns:
        The header as written, with its checksum.
    """
    start = buffer.numel() - payload_view(buffer, header).nbytes
    memory = _as_memory(buffer)
    sealed = replace(header, checksum=_checksum(header, memory[start:]))
    packed = pack_header(sealed)
    memory[:start] = (_PREFIX.pack(_MAGIC, len(packed)) + packed).ljust(start, b"\0")
    return sealed


def encode_into(buffer: Tensor, header: ObjectHeader, tensor: Tensor) -> ObjectHeader:
    """Write a whole object.

    Args:
        buffer: uint8 `[encoded_size(header)]`, host memory.
        header: its checksum field is ignored.
        tensor: `header.shape`, `header.dtype`, any device and strides.

    Returns:
        The header as written, with its checksum.

    Raises:
        ValueError: `tensor` or `buffer` do not fit `header`.
    """
    if tuple(tensor.shape) != header.shape or dtype_name(tensor.dtype) != header.dtype:
        raise ValueError(
            f"{tuple(tensor.shape)} {tensor.dtype} is not {header.shape} {header.dtype}"
        )
    payload_view(buffer, header).copy_(tensor)
    return seal(buffer, header)


def decode(
    buffer: Tensor, *, expect_key: str, expect_fingerprint: str, verify: bool
) -> tuple[ObjectHeader, Tensor]:
    """Read an object.

    Args:
        buffer: uint8 `[length of the object]`, host memory, unknown content.
        expect_key: content key the object has to be stored under.
        expect_fingerprint: model fingerprint it has to carry.
        verify: compare the checksum, which reads the whole payload. Without it, damage in the
            payload and in fields that nothing else determines goes unseen.

    Returns:
        The header, and the payload as a view into `buffer` of its shape and dtype.

    Raises:
        RefusedObject: the object is not what is expected, or damaged.
        ValueError: `buffer` is not a contiguous 1-D uint8 host tensor.
    """
    memory = _as_memory(buffer)
    header, start = _read_header(memory)
    if header.key != expect_key:
        raise RefusedObject("identity", f"stored under {header.key!r}, not {expect_key!r}")
    if header.fingerprint != expect_fingerprint:
        raise RefusedObject(
            "identity", f"model fingerprint {header.fingerprint!r}, not {expect_fingerprint!r}"
        )
    if problem := layout_problem(header):
        raise RefusedObject("shape", problem)
    if len(memory) - start != header.payload_bytes:
        raise RefusedObject(
            "shape",
            f"{len(memory) - start} payload bytes for {header.shape} {header.dtype}, which has "
            f"{header.payload_bytes}",
        )
    if verify and _checksum(header, memory[start:]) != header.checksum:
        raise RefusedObject("checksum", f"content of {header.key!r} group {header.group} damaged")
    return header, _view(buffer, start, header)


def read_header(buffer: Tensor) -> ObjectHeader:
    """What an object says about itself, for those who know neither its key nor its model.

    Its schema is checked, nothing else. The object's first bytes are enough, if they hold all of
    the header.

    Raises:
        RefusedObject: "format" or "version".
        ValueError: `buffer` is not a contiguous 1-D uint8 host tensor.
    """
    return _read_header(_as_memory(buffer))[0]


def header_bytes(beginning: memoryview) -> int:
    """How many of an object's first bytes hold its header, by its very first ones.

    Raises:
        RefusedObject: "format".
    """
    if len(beginning) < _PREFIX.size:
        raise RefusedObject("format", f"{len(beginning)} bytes are too few")
    magic, length = _PREFIX.unpack_from(beginning)
    if magic != _MAGIC:
        raise RefusedObject("format", "wrong magic")
    if length > MAX_HEADER_BYTES:
        raise RefusedObject("format", f"header length {length}")
    return _payload_offset(length)


def _read_header(memory: memoryview) -> tuple[ObjectHeader, int]:
    """Header of unknown content, schema checked, and the payload's offset."""
    start = header_bytes(memory)
    if start > len(memory):
        raise RefusedObject("format", f"a header of {start} bytes in {len(memory)}")
    end = _PREFIX.size + _PREFIX.unpack_from(memory)[1]
    header = unpack_header(memory[_PREFIX.size : end])
    if any(memory[end:start]):
        raise RefusedObject("format", "padding is not zero")
    return header, start


def _payload_offset(header_length: int) -> int:
    return -(-(_PREFIX.size + header_length) // _ALIGN) * _ALIGN


def _checksum(header: ObjectHeader, payload: memoryview) -> int:
    digest = xxhash.xxh3_64(pack_header(header, with_checksum=False))
    digest.update(payload)
    return digest.intdigest()


def _as_memory(buffer: Tensor) -> memoryview:
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(
            f"an object is a contiguous 1-D uint8 tensor, not {buffer.dtype} {tuple(buffer.shape)}"
        )
    return buffer.numpy().data


def _view(buffer: Tensor, start: int, header: ObjectHeader) -> Tensor:
    return buffer[start:].view(DTYPES[header.dtype]).view(header.shape)

"""A segment from its encoded objects, of unknown content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlcache_connector.storage import codec
from vlcache_connector.storage.codec import ObjectHeader, RefusedObject, SegmentId
from vlcache_connector.storage.grouping import check_grouping


def as_buffers(objects: Sequence[memoryview]) -> list[Tensor]:
    """The objects as tensors over the same memory.

    Raises:
        RefusedObject: one is empty.
    """
    if not all(map(len, objects)):
        raise RefusedObject("format", "an object is empty")
    return [torch.frombuffer(part, dtype=torch.uint8) for part in objects]


def decode_objects(
    segment: SegmentId,
    buffers: Iterator[Tensor],
    *,
    fingerprint: str,
    num_layers: int | None,
    verify: bool,
) -> tuple[ObjectHeader, list[Tensor]] | None:
    """Read a segment.

    Args:
        segment: that it has to be.
        buffers: as many are taken as the segment has objects.
        fingerprint: model fingerprint it has to carry.
        num_layers: layers that a KV segment has to have; None: as many as its objects have.
        verify: compare checksums, see `codec.decode`.

    Returns:
        The first header and all payloads, or None if there are too few buffers.

    Raises:
        RefusedObject: an object is not what is expected, or they are not one segment.
    """
    headers: list[ObjectHeader] = []
    parts: list[Tensor] = []
    while not headers or len(headers) < headers[0].num_groups:
        buffer = next(buffers, None)
        if buffer is None:
            return None
        header, part = codec.decode(
            buffer, expect_key=segment.key, expect_fingerprint=fingerprint, verify=verify
        )
        if header.kind != segment.kind:
            raise RefusedObject("identity", f"of kind {header.kind!r}, not {segment.kind!r}")
        headers.append(header)
        parts.append(part)
    if segment.kind == "encoder":
        num_units = headers[0].num_tokens
    elif num_layers is None:
        num_units = sum(header.shape[0] for header in headers)
    else:
        num_units = num_layers
    check_grouping(headers, num_units)
    return headers[0], parts


def complete(
    opened: tuple[ObjectHeader, list[Tensor]] | None, num_objects: int
) -> tuple[ObjectHeader, list[Tensor]]:
    """What `decode_objects` returned, if it was all of this many objects.

    Raises:
        RefusedObject: they are too few, or too many.
    """
    if opened is None or opened[0].num_groups != num_objects:
        raise RefusedObject("shape", f"{num_objects} objects are not the whole segment")
    return opened


def check_objects(segment: SegmentId, objects: Sequence[memoryview]) -> None:
    """Check objects, every byte of them, without knowing the model that they are of.

    Raises:
        RefusedObject: they are not this segment.
    """
    buffers = as_buffers(objects)
    fingerprint = codec.read_header(buffers[0]).fingerprint if buffers else ""
    opened = decode_objects(
        segment, iter(buffers), fingerprint=fingerprint, num_layers=None, verify=True
    )
    complete(opened, len(objects))

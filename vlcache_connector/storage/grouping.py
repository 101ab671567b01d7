"""How a segment is cut into objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vlcache_connector.storage.codec import ObjectHeader, RefusedObject, encoded_size

_MAX_HALVINGS = 4


def groupings(
    template: ObjectHeader, num_units: int, max_object_bytes: int
) -> Iterator[list[ObjectHeader]]:
    """Ways to cut a segment into objects of about equal size, the coarsest first.

    The finer ones, down to 1/16 of its size, are for memory whose free blocks are too small for it.

    Args:
        template: header of one unit ("kv": a layer, "encoder": a row): `shape[0]` is 1.
        num_units: number of units in the segment.
        max_object_bytes: no object gets larger. Nothing is yielded if a unit or its header is.

    Yields:
        The objects' headers, in order; their `shape[0]` add up to `num_units`.
    """
    try:
        # A larger group's integers may take the header past one more multiple of 64.
        overhead = encoded_size(template) - template.payload_bytes + 64
    except ValueError:
        return
    units = min(num_units, (max_object_bytes - overhead) // template.payload_bytes)
    for _ in range(1 + _MAX_HALVINGS):
        if units < 1:
            return
        num_groups = -(-num_units // units)
        units = -(-num_units // num_groups)
        yield [
            replace(
                template,
                group=group,
                num_groups=num_groups,
                first_layer=group * units if template.kind == "kv" else 0,
                shape=(min(units, num_units - group * units), *template.shape[1:]),
            )
            for group in range(num_groups)
        ]
        units //= 2


def check_grouping(headers: Sequence[ObjectHeader], num_units: int) -> None:
    """Check that objects that were read, each valid in itself, make up one segment.

    Args:
        headers: at least one, in order.
        num_units: layers or rows that the segment has to have.

    Raises:
        RefusedObject: "shape", if they do not.
    """
    first = headers[0]
    units = 0
    for group, header in enumerate(headers):
        expected = replace(
            first,
            group=group,
            first_layer=units if first.kind == "kv" else 0,
            shape=(header.shape[0], *first.shape[1:]),
            checksum=header.checksum,
        )
        if header != expected:
            raise RefusedObject("shape", f"object {group} does not continue the segment")
        units += header.shape[0]
    if len(headers) != first.num_groups or units != num_units:
        raise RefusedObject(
            "shape", f"{len(headers)} of {first.num_groups} objects, {units} of {num_units} units"
        )

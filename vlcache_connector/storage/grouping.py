"""How a segment is cut into objects."""

from __future__ import annotations

from dataclasses import replace

from vlcache_connector.storage.codec import encoded_size
from vlcache_connector.storage.header import ObjectHeader


def grouping(template: ObjectHeader, num_units: int, max_object_bytes: int) -> list[ObjectHeader]:
    """Cut a segment into objects of about equal size.

    Args:
        template: header of one unit ("kv": a layer, "encoder": a row): `shape[0]` is 1.
        num_units: number of units in the segment.
        max_object_bytes: no object gets larger, unless a single unit is.

    Returns:
        The objects' headers, in order; their `shape[0]` add up to `num_units`.

    Raises:
        ValueError: the header contradicts itself, or is too long.
    """
    # A larger group's integers may take the header past one more multiple of 64.
    overhead = encoded_size(template) - template.payload_bytes + 64
    units = max(1, min(num_units, (max_object_bytes - overhead) // template.payload_bytes))
    num_groups = -(-num_units // units)
    units = -(-num_units // num_groups)
    num_groups = -(-num_units // units)
    return [
        replace(
            template,
            group=group,
            num_groups=num_groups,
            first_layer=group * units if template.kind == "kv" else 0,
            shape=(min(units, num_units - group * units), *template.shape[1:]),
        )
        for group in range(num_groups)
    ]

"""K and V of one layer's paged cache, and how torch writes rotated rows into them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rope import RotarySpec, rotate

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of K and V, and of a cache that keeps them as they are."""
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Of a cache that keeps them divided by a scale."""


@dataclass(frozen=True)
class PagedKV:
    """Views of one layer's paged cache; slot s is place s % block_size of block s // block_size.

    Attributes:
        key: [blocks, block_size, kv_heads, head_dim], of any strides; one of `PLAIN_DTYPES`, that
            of K itself, or of `FLOAT8_DTYPES`.
        value: the same for V.
        key_scale: float32, one element on the cache's device, that K is divided by on its way into
            a float8 cache. Of no effect in others.
        value_scale: the same for V.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor
    value_scale: Tensor


def turns_of(angles: Tensor) -> Tensor:
    """Cosines and sines of angles: float32 [n, rotary_dim // 2] to [n, 2, rotary_dim // 2].

    The kernel takes these. Made once for all layers, they are less work than all else it does.
    """
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def scatter_reference(
    paged: PagedKV,
    spec: RotarySpec,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    angles: Tensor | None,
) -> None:
    """What `delta_rope.scatter` does with `turns_of(angles)`, in torch; see there."""
    if angles is not None:
        key = rotate(spec, key, angles)
    is_written = slots >= 0
    slots = slots[is_written]
    block_size = paged.key.shape[1]
    places = slots // block_size, slots % block_size
    for rows, cache, scale in (
        (key, paged.key, paged.key_scale),
        (value, paged.value, paged.value_scale),
    ):
        stored = rows[is_written]
        if cache.dtype in FLOAT8_DTYPES:
            limit = torch.finfo(cache.dtype).max
            stored = (stored.to(torch.float32) / scale).clamp(-limit, limit).to(cache.dtype)
            # Indexed writes know no float8.
            cache, stored = cache.view(torch.uint8), stored.view(torch.uint8)
        cache[places] = stored

"""Whether the kernel runs on this device, and gives the bits that torch gives."""

from typing import Any

import torch
from torch import Tensor

from ..rope import RotarySpec
from .paged import FLOAT8_DTYPES, PagedKV, scatter_reference, turns_of

_BLOCKS = 3


def obstacle(paged: PagedKV, spec: RotarySpec, dtype: torch.dtype) -> str | None:
    """Try the kernel on a few tokens, in a cache of its own that lies like `paged`.

    It compiles the forms that are used later, which takes seconds where Triton has not kept them.

    Args:
        paged: a layer's cache; it is neither read nor written.
        spec: how the model rotates.
        dtype: of K and V.

    Returns:
        Why the kernel can't be used; None: it can.
    """
    try:
        # Only now: where Triton can't be imported, this is the way to find out.
        from .delta_rope import scatter

        device, (block_size, kv_heads) = paged.key.device, paged.key.shape[1:3]
        num_tokens = _BLOCKS * block_size
        # Whatever the defaults of device and dtype are where vLLM starts.
        generator = torch.Generator("cpu").manual_seed(0)
        numbers: Any = {"generator": generator, "device": "cpu", "dtype": torch.float32}
        slots = torch.randperm(num_tokens, generator=generator, device="cpu")
        slots[::5] = -1
        kv = torch.randn(2, num_tokens, kv_heads, spec.head_dim, **numbers)
        key, value = kv.to(device, dtype)
        angles = torch.randn(num_tokens, spec.num_pairs, **numbers)
        angles[::3] = 0.0
        for some in (None, angles[1:2].to(device), angles.to(device)):
            actual, expected = _empty_like(paged), _empty_like(paged)
            turns = None if some is None else turns_of(some)
            scatter(actual, spec, key, value, slots.to(device), turns)
            scatter_reference(expected, spec, key, value, slots.to(device), some)
            if not _is_same(actual.key, expected.key) or not _is_same(actual.value, expected.value):
                return "its results differ from torch's"
    except Exception as error:
        # Compilers and drivers raise what they like; vLLM has to start all the same.
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _empty_like(paged: PagedKV) -> PagedKV:
    scale = torch.full((1,), 0.25, device=paged.key.device, dtype=torch.float32)
    return PagedKV(_zeros_like(paged.key), _zeros_like(paged.value), scale, 2 * scale)


def _zeros_like(cache: Tensor) -> Tensor:
    """A few blocks whose dimensions come in the same order in memory."""
    strides = cache.stride()
    order = sorted(range(len(strides)), key=lambda dim: strides[dim], reverse=True)
    shape = (_BLOCKS, *cache.shape[1:])
    zeros = torch.zeros([shape[dim] for dim in order], device=cache.device).to(cache.dtype)
    return zeros.permute([order.index(dim) for dim in range(len(strides))])


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.dtype in FLOAT8_DTYPES:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)

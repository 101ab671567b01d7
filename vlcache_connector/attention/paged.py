"""A layer's paged cache as views of K and V.

vLLM seams: how `do_kv_cache_update` of FLASH_ATTN, FLASHINFER and TRITON_ATTN
(`vllm/v1/attention/backends`) finds K and V in `layer.kv_cache` [blocks, kv_heads, block_size,
2 * head_dim], whose strides follow the `KVCacheLayout` in use, and `layer.kv_cache_dtype`,
`layer._k_scale`, `layer._v_scale`. Other backends arrange a block as they like.
"""

from typing import Any

import torch
from vllm.platforms import current_platform

from ..kernels.paged import PLAIN_DTYPES, PagedKV
from ..rope import RotarySpec

PACKED_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""Names of the backends that keep K and V of a token and head side by side."""


def is_covered(layer: Any, spec: RotarySpec, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether `paged_kv` describes a layer's cache, and the kernel can write to it.

    Args:
        layer: vLLM's attention layer, its cache bound.
        spec: how the model rotates.
        dtype: of K and V.

    Returns:
        The answer, and why not.
    """
    backend = layer.get_attn_backend().get_name()
    if backend not in PACKED_BACKENDS:
        return False, f"attention backend {backend}"
    if layer.attn_type != "decoder" or layer.kv_sharing_target_layer_name is not None:
        return False, "layers without a KV cache of their own"
    cache, name = layer.kv_cache, layer.kv_cache_dtype
    if cache.dim() != 4 or cache.shape[1] != layer.num_kv_heads:
        return False, f"KV cache of shape {list(cache.shape)}"
    if cache.shape[-1] != 2 * spec.head_dim or cache.stride(-1) != 1:
        return False, f"KV cache of shape {list(cache.shape)}, strides {list(cache.stride())}"
    if dtype not in PLAIN_DTYPES:
        return False, f"K and V in {dtype}"
    if _float8_of(layer) is None:
        return cache.dtype == dtype, f"kv_cache_dtype={name} ({cache.dtype}) for {dtype}"
    if current_platform.is_fp8_fnuz():
        return False, f"kv_cache_dtype={name} in this GPU's own format"
    if layer._k_scale.numel() != 1 or layer._v_scale.numel() != 1:
        return False, f"kv_cache_dtype={name} with a scale per head"
    return cache.dtype.itemsize == 1, f"kv_cache_dtype={name} in {cache.dtype}"


def paged_kv(layer: Any) -> PagedKV:
    """Views of a layer's paged cache, which `is_covered` says yes to."""
    cache, float8 = layer.kv_cache, _float8_of(layer)
    if float8 is not None:
        cache = cache.view(float8)
    key, value = cache.transpose(1, 2).chunk(2, dim=-1)
    return PagedKV(key, value, layer._k_scale, layer._v_scale)


def _float8_of(layer: Any) -> torch.dtype | None:
    """What the backend takes the bytes of a quantised cache for."""
    name = layer.kv_cache_dtype
    if name in ("fp8", "fp8_e4m3"):
        return torch.float8_e4m3fn
    if name == "fp8_e5m2":
        # TRITON_ATTN knows one float8 only, by whatever name.
        is_triton = layer.get_attn_backend().get_name() == "TRITON_ATTN"
        return torch.float8_e4m3fn if is_triton else torch.float8_e5m2
    return None

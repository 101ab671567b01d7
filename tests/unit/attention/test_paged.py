"""Views of vLLM's paged caches, in every layout that vLLM has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
)

from vlcache_connector.attention.paged import PACKED_BACKENDS, is_covered, paged_kv
from vlcache_connector.rope import RotarySpec

BLOCKS, LAYERS, BLOCK_SIZE, HEADS, DIM = 5, 3, 16, 2, 24
SPEC = RotarySpec(0.5 ** torch.arange(12, dtype=torch.float32), DIM, DIM, is_neox=True)


def vllm_caches(layout: KVCacheLayout, dtype: torch.dtype) -> list[Tensor]:
    """[blocks, kv_heads, block_size, 2 * head_dim] per layer, as vLLM lays them out."""
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=HEADS, head_size=DIM, dtype=dtype)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    size = BLOCKS * LAYERS * BLOCK_SIZE * HEADS * 2 * DIM * dtype.itemsize
    names = [f"layer.{index}" for index in range(LAYERS)]
    placement = KVCacheTensor(size, names, layer_stride, block_stride)
    return create_kv_cache_views(
        torch.zeros(size, dtype=torch.int8), spec, BLOCKS, layout, placement
    )


def make_layer(
    cache: Tensor, *, backend: str = "FLASH_ATTN", kv_cache_dtype: str = "auto", **changes: Any
) -> Any:
    layer = {
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "num_kv_heads": HEADS,
        "kv_cache": cache,
        "kv_cache_dtype": kv_cache_dtype,
        "_k_scale": torch.tensor(0.5),
        "_v_scale": torch.tensor(2.0),
        "get_attn_backend": lambda: SimpleNamespace(get_name=lambda: backend),
    }
    return SimpleNamespace(**layer | changes)


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda layout: layout.name)
@pytest.mark.parametrize("backend", PACKED_BACKENDS)
def test_views_of_every_layout(layout: KVCacheLayout, backend: str) -> None:
    caches = vllm_caches(layout, torch.bfloat16)
    layer = make_layer(caches[1], backend=backend)
    assert is_covered(layer, SPEC, torch.bfloat16)[0]
    paged = paged_kv(layer)
    assert paged.key.shape == paged.value.shape == (BLOCKS, BLOCK_SIZE, HEADS, DIM)
    assert (paged.key_scale, paged.value_scale) == (layer._k_scale, layer._v_scale)
    paged.key[3, 7, 1] = 1.0
    paged.value[2, 5, 0] = 2.0
    assert bool((caches[1][3, 1, 7, :DIM] == 1.0).all())
    assert bool((caches[1][2, 0, 5, DIM:] == 2.0).all())
    assert [int(cache.count_nonzero()) for cache in caches] == [0, 2 * DIM, 0]


@pytest.mark.parametrize(
    ("backend", "name", "expected"),
    [
        ("FLASH_ATTN", "fp8", torch.float8_e4m3fn),
        ("FLASHINFER", "fp8_e4m3", torch.float8_e4m3fn),
        ("FLASHINFER", "fp8_e5m2", torch.float8_e5m2),
        ("TRITON_ATTN", "fp8_e4m3", torch.float8_e4m3fn),
        ("TRITON_ATTN", "fp8_e5m2", torch.float8_e4m3fn),
    ],
)
def test_float8_is_what_the_backend_takes_it_for(
    backend: str, name: str, expected: torch.dtype
) -> None:
    [cache, *_] = vllm_caches(KVCacheLayout.LBNHC, STR_DTYPE_TO_TORCH_DTYPE[name])
    layer = make_layer(cache, backend=backend, kv_cache_dtype=name)
    assert is_covered(layer, SPEC, torch.bfloat16)[0]
    paged = paged_kv(layer)
    assert paged.key.dtype == paged.value.dtype == expected
    assert paged.value.data_ptr() == cache.data_ptr() + DIM


def plain() -> Tensor:
    return vllm_caches(KVCacheLayout.LBHNC, torch.float16)[0]


def quantised() -> Tensor:
    return vllm_caches(KVCacheLayout.LBHNC, torch.uint8)[0]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (make_layer(plain(), backend="CPU_ATTN"), "attention backend CPU_ATTN"),
        (make_layer(plain(), backend="FLASH_ATTN_DIFFKV"), "attention backend FLASH_ATTN_DIFFKV"),
        (make_layer(plain(), attn_type="encoder"), "cache of their own"),
        (make_layer(plain(), kv_sharing_target_layer_name="layer.0"), "cache of their own"),
        (make_layer(torch.tensor([])), "shape [0]"),
        (make_layer(plain(), num_kv_heads=4), "shape [5, 2, 16, 48]"),
        (make_layer(plain()[..., :40]), "shape [5, 2, 16, 40]"),
        (make_layer(plain().repeat_interleave(2, -1)[..., ::2]), "strides"),
        (make_layer(plain(), kv_cache_dtype="bfloat16"), "torch.float16) for torch.bfloat16"),
        (make_layer(quantised(), kv_cache_dtype="int8_per_token_head"), "int8_per_token_head"),
        (make_layer(quantised(), kv_cache_dtype="nvfp4"), "nvfp4"),
        (make_layer(plain(), kv_cache_dtype="fp8"), "fp8 in torch.float16"),
        (
            make_layer(quantised(), kv_cache_dtype="fp8", _k_scale=torch.ones(HEADS)),
            "a scale per head",
        ),
    ],
)
def test_what_is_not_covered_has_a_reason(layer: Any, reason: str) -> None:
    covered, why = is_covered(layer, SPEC, torch.bfloat16)
    assert not covered
    assert reason in why


def test_keys_of_other_dtypes_are_not_covered() -> None:
    layer = make_layer(vllm_caches(KVCacheLayout.LBHNC, torch.float64)[0])
    assert is_covered(layer, SPEC, torch.float64) == (False, "K and V in torch.float64")

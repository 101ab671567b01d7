"""What is refused at start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

import vlcache_connector
from vlcache_connector.support import (
    UnsupportedError,
    check_supported,
)
from vlcache_connector.worker.worker import WorkerSide


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_kv_cache_in_another_format_is_refused_by_key_value_and_what_is_allowed(
    tiny_model: Callable[..., Path],
) -> None:
    vlcache_connector.register()
    config = VllmConfig(
        model_config=ModelConfig(model=str(tiny_model()), dtype="float32", max_model_len=512),
        cache_config=CacheConfig(cache_dtype="int8_per_token_head"),
        kv_transfer_config=KVTransferConfig(kv_connector="VLCacheConnector", kv_role="kv_both"),
    )
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    caches = KVCacheConfig(4, [], [KVCacheGroupSpec(["layer"], spec)])
    with pytest.raises(UnsupportedError) as refused:
        check_supported(config, caches)
    assert str(refused.value).splitlines() == [
        "VLCacheConnector can't run with:",
        "  kv_cache_dtype=int8_per_token_head: allowed are auto, bfloat16, float16, float32, fp8, "
        "fp8_e4m3, fp8_e5m2",
    ]


def test_an_attention_backend_that_is_not_wrapped_is_refused_by_name() -> None:
    backend = SimpleNamespace(get_name=lambda: "FLEX_ATTENTION")
    layer = SimpleNamespace(impl=object(), get_attn_backend=lambda: backend)
    model: Any = SimpleNamespace(layers={"layer": layer})
    nothing: Any = None
    with pytest.raises(UnsupportedError) as refused:
        WorkerSide(
            model,
            nothing,
            nothing,
            rank=0,
            pace=nothing,
            vllm_config=nothing,
            kv_cache_config=nothing,
            device=torch.device("cpu"),
        )
    assert str(refused.value) == (
        "attention backend FLEX_ATTENTION is not wrapped by VLCache; choose --attention-backend "
        "FLASH_ATTN, FLASHINFER or TRITON_ATTN"
    )

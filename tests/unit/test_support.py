"""What is refused at start; the fingerprint of a checkpoint, and what it depends on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlcache_connector.support import (
    UnsupportedError,
)
from vlcache_connector.worker.worker import WorkerSide


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

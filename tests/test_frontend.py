"""The connector opens no door in vLLM's frontend that was closed without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from vlcache_connector import register

VLCACHE = {"kv_connector": "VLCacheConnector", "kv_role": "kv_both"}
ENCODER = {"ec_connector": "VLCacheEncoderConnector", "ec_role": "ec_both"}
FOREIGN = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def multimodal_config(model: Path, **arguments: Any) -> Any:
    register()
    config = EngineArgs(model=str(model), max_model_len=1024, **arguments).create_engine_config()
    return config.model_config.multimodal_config


@pytest.mark.parametrize(
    "arguments",
    [
        {"kv_transfer_config": VLCACHE},
        {"ec_transfer_config": ENCODER},
        {"kv_transfer_config": VLCACHE, "ec_transfer_config": ENCODER},
    ],
    ids=["KV half", "encoder half", "both"],
)
def test_embeddings_are_refused_as_without_the_connector(
    tiny_model: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    config = multimodal_config(tiny_model(), **arguments)
    assert not config.enable_mm_embeds
    assert not config.allow_missing_mm_embeddings


def test_what_the_user_asks_for_stays(tiny_model: Callable[..., Path]) -> None:
    config = multimodal_config(tiny_model(), kv_transfer_config=VLCACHE, enable_mm_embeds=True)
    assert config.enable_mm_embeds
    assert not config.allow_missing_mm_embeddings


def test_other_connectors_are_left_alone(tiny_model: Callable[..., Path]) -> None:
    config = multimodal_config(tiny_model(), kv_transfer_config=FOREIGN)
    assert config.enable_mm_embeds
    assert config.allow_missing_mm_embeddings

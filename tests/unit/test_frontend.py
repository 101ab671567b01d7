"""One flag turns on both halves, and opens no door that was closed without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.encoder_output_width import (
    measure_encoder_output_widths,
)
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.engine.arg_utils import EngineArgs

from vlcache_connector import register

VLCACHE = {"kv_connector": "VLCacheConnector", "kv_role": "kv_both"}
ENCODER = {"ec_connector": "VLCacheEncoderConnector", "ec_role": "ec_both"}
FOREIGN = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def engine_config(model: Path, **arguments: Any) -> VllmConfig:
    register()
    return EngineArgs(model=str(model), max_model_len=1024, **arguments).create_engine_config()


def multimodal_config(model: Path, **arguments: Any) -> Any:
    return engine_config(model, **arguments).model_config.multimodal_config


@pytest.mark.parametrize("kv_role", ["kv_both", "kv_producer", "kv_consumer"])
def test_the_kv_half_turns_on_the_encoder_half(
    tiny_model: Callable[..., Path], kv_role: str
) -> None:
    config = engine_config(tiny_model(), kv_transfer_config=VLCACHE | {"kv_role": kv_role})
    kv, ec = config.kv_transfer_config, config.ec_transfer_config
    assert kv is not None
    assert ec is not None
    assert ec.ec_connector == "VLCacheEncoderConnector"
    assert ec.engine_id == kv.engine_id
    connector = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
    assert connector.is_consumer
    assert connector.is_producer == (kv_role != "kv_consumer")


def test_vllm_encodes_nothing_at_the_start(tiny_model: Callable[..., Path]) -> None:
    config = engine_config(tiny_model(), kv_transfer_config=VLCACHE)
    measure_encoder_output_widths(config, lambda *_: pytest.fail("an item is encoded"))


@pytest.mark.parametrize(
    "transfer",
    [FOREIGN, VLCACHE | {"kv_connector_extra_config": {"enabled": False}}],
    ids=["another connector", "switched off"],
)
def test_nothing_else_does(tiny_model: Callable[..., Path], transfer: dict[str, Any]) -> None:
    assert engine_config(tiny_model(), kv_transfer_config=transfer).ec_transfer_config is None


def test_an_encoder_connector_of_the_users_stays(tiny_model: Callable[..., Path]) -> None:
    config = engine_config(
        tiny_model(),
        kv_transfer_config=VLCACHE,
        ec_transfer_config=ENCODER | {"ec_connector": "ECExampleConnector"},
    )
    assert config.ec_transfer_config is not None
    assert config.ec_transfer_config.ec_connector == "ECExampleConnector"


def test_a_wrong_option_is_refused_before_anything_is_loaded(
    tiny_model: Callable[..., Path],
) -> None:
    transfer = VLCACHE | {"kv_connector_extra_config": {"cpu_byte": 1}}
    with pytest.raises(ValueError, match="unknown key cpu_byte=1; allowed keys: enabled"):
        engine_config(tiny_model(), kv_transfer_config=transfer)


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

"""One flag turns on both halves, and opens no door that was closed without it."""

from __future__ import annotations

import pickle
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
from vlcache_connector.config import ConfigError
from vlcache_connector.support import may_reuse

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
    shared = {"kv_role": kv_role, "kv_connector_extra_config": {"disk_path": "/tmp/nowhere"}}
    config = engine_config(tiny_model(), kv_transfer_config=VLCACHE | shared)
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


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_an_encoder_half_that_gets_no_content_hashes_says_so(
    tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture, cache_gb: int
) -> None:
    config = engine_config(
        tiny_model(),
        ec_transfer_config=ENCODER,
        enable_prefix_caching=False,
        mm_processor_cache_gb=cache_gb,
    )
    with caplog.at_level("WARNING", logger="vlcache_connector.encoder_connector"):
        ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER).shutdown()
    told = [r for r in caplog.records if "mm_processor_cache_gb=0: " in r.getMessage()]
    assert len(told) == (cache_gb == 0)


@pytest.mark.parametrize(
    "transfer",
    [FOREIGN, VLCACHE | {"kv_connector_extra_config": {"enabled": False}}],
    ids=["another connector", "switched off"],
)
def test_nothing_else_does(tiny_model: Callable[..., Path], transfer: dict[str, Any]) -> None:
    assert engine_config(tiny_model(), kv_transfer_config=transfer).ec_transfer_config is None


def test_vllm_keeps_no_blocks_back_for_loads_that_run_in_order(
    tiny_model: Callable[..., Path],
) -> None:
    """vLLM's scheduler defers the freeing of blocks for consumers; see `OrderedTransfer`."""
    config = engine_config(tiny_model(), kv_transfer_config=VLCACHE)
    kv = pickle.loads(pickle.dumps(config.kv_transfer_config))
    assert not kv.is_kv_consumer
    assert kv.is_kv_producer
    assert may_reuse(kv)
    assert config.kv_transfer_config is not None
    assert (kv.kv_role, kv.engine_id) == ("kv_both", config.kv_transfer_config.engine_id)
    foreign = engine_config(tiny_model(), kv_transfer_config=FOREIGN).kv_transfer_config
    assert foreign is not None
    assert foreign.is_kv_consumer


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
    with pytest.raises(ConfigError, match="unknown key cpu_byte=1; allowed keys: enabled"):
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

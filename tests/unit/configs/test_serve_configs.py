"""configs/*.yaml: read by vLLM's own parser, and served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.helpers.deployment import CONFIGS, parse_command
from vlcache_connector.config import VLCacheConfig
from vlcache_connector.storage.adapters import configured
from vlcache_connector.support import config_of, inert_reason

TIERS: dict[str, list[str]] = {
    "gpu": [],
    "cpu": [],
    "redis": ["valkey"],
    "consumer": ["valkey"],
    "mooncake": ["mooncake"],
}
"""Below host memory, by the name of the configuration."""


def test_all_configurations_are_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(TIERS)


@pytest.mark.parametrize("name", TIERS)
def test_vllm_and_vlcache_take_it(name: str, tiny_model: Callable[..., Path]) -> None:
    args = parse_command([str(tiny_model()), "--config", str(CONFIGS / f"{name}.yaml")])
    args.model = args.model_tag
    vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    kv, ec = vllm_config.kv_transfer_config, vllm_config.ec_transfer_config
    assert kv is not None
    assert kv.kv_connector == "VLCacheConnector"
    assert kv.kv_role == ("kv_consumer" if name == "consumer" else "kv_both")
    assert inert_reason(vllm_config) is None
    assert configured(config_of(vllm_config)) == TIERS[name]
    # The KV half's flag turned it on.
    assert ec is not None
    assert (ec.ec_connector, ec.ec_role) == ("VLCacheEncoderConnector", "ec_consumer")


@pytest.mark.parametrize("name", TIERS)
def test_no_option_repeats_its_default(name: str) -> None:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    options: dict[str, Any] = content["kv-transfer-config"]["kv_connector_extra_config"]
    config = VLCacheConfig.from_extra_config(options)
    assert options
    for key in options:
        assert getattr(config, key) != VLCacheConfig.model_fields[key].default, key


def test_servers_that_share_agree() -> None:
    shared = []
    for name in ("redis", "consumer"):
        content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        options = content["kv-transfer-config"]["kv_connector_extra_config"]
        shared.append({key: options[key] for key in ("redis_url", "deployment")})
    assert shared[0] == shared[1]

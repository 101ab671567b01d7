"""The adapters that a user asks for, as LMCache's users know them, each one guarded."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlcache_connector.config import ADAPTER_TYPES, VLCacheConfig

if TYPE_CHECKING:
    from vlcache_connector.storage.guarded import GuardedConfig


def configured(config: VLCacheConfig) -> list[str]:
    """Names of the tiers below host memory, the nearest first."""
    names = ["fs"] if config.disk_path else []
    return names + (["valkey"] if config.redis_url else [])


def open_adapters(config: VLCacheConfig, *, can_store: bool) -> list[GuardedConfig]:
    specs = []
    if config.disk_path:
        from pathlib import Path

        Path(config.disk_path).mkdir(parents=True, exist_ok=True)
        specs.append({"type": "fs", "base_path": config.disk_path})
    if config.redis_url:
        from urllib.parse import urlsplit

        url = urlsplit(config.redis_url)
        specs.append({"type": "valkey", "startup_nodes": f"{url.hostname}:{url.port}"})
    out = guarded_configs(specs, lookup_seconds=0.5, transfer_seconds=10.0)
    for c in out:
        c.tier.can_store = can_store
    return out


_COMMON = {"type", "eviction", "serde", "shared", "persist_enabled"}
_PACKAGES = {"valkey": ("glide_sync", "valkey-glide-sync")}
_NEVER_RECONNECTS = ("resp",)


def guarded_configs(
    specs: Sequence[Mapping[str, Any]], *, lookup_seconds: float, transfer_seconds: float
) -> list[GuardedConfig]:
    """LMCache's configurations of L2 adapters.

    Args:
        specs: `l2_adapters` of the extra config: `{"type": "fs", "base_path": ...}` and so on.
        lookup_seconds: see `GuardedConfig`.
        transfer_seconds: see `GuardedConfig`.

    Raises:
        ValueError: a type or a key is unknown, a value is not allowed, or a package is missing;
            names the key, what it is, and what is allowed.
    """
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config

    from vlcache_connector.storage.guarded import GuardedConfig
    from vlcache_connector.storage.tier import Tier

    for index, spec in enumerate(specs):
        _check(f"l2_adapters[{index}]", spec)
    parsed = parse_args_to_l2_adapters_config(Namespace(l2_adapter=list(map(json.dumps, specs))))
    return [
        GuardedConfig(
            config,
            tier=Tier(spec["type"]),
            reconnects=spec["type"] not in _NEVER_RECONNECTS,
            lookup_seconds=lookup_seconds,
            transfer_seconds=transfer_seconds,
        )
        for spec, config in zip(specs, parsed.adapters, strict=True)
    ]


def _check(name: str, spec: Mapping[str, Any]) -> None:
    from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class

    kind = spec.get("type")
    if kind not in ADAPTER_TYPES:
        raise ValueError(f"{name}.type={kind!r}: one of {', '.join(ADAPTER_TYPES)} is allowed")
    # Else LMCache imports adapters one by one until it finds it, and all that they need.
    importlib.import_module(f"lmcache.v1.distributed.l2_adapters.{kind}_l2_adapter")
    # LMCache ignores keys that it doesn't know.
    arguments = inspect.signature(get_l2_adapter_config_class(kind).__init__).parameters
    allowed = _COMMON | {argument for argument in arguments if argument != "self"}
    for key in spec:
        if key not in allowed:
            raise ValueError(
                f"{name}.{key}={spec[key]!r}: adapters of type {kind!r} have the keys "
                f"{', '.join(sorted(allowed))}"
            )
    module, package = _PACKAGES.get(kind, (None, None))
    if module is not None and importlib.util.find_spec(module) is None:
        raise ValueError(f"{name}.type={kind!r}: needs the package {package}, which is missing")

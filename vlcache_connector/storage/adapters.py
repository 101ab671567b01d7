"""The adapters that a user asks for, as LMCache's users know them, each one guarded.

LMCache seam: the configurations of its L2 adapters
(`lmcache/v1/distributed/l2_adapters/config.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from vlcache_connector.config import ADAPTER_TYPES, ConfigError, VLCacheConfig
from vlcache_connector.storage.redis_url import LOGIN_HINT, RedisAddress

if TYPE_CHECKING:
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
    from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase

    from vlcache_connector.storage.encrypted import EncryptionKey
    from vlcache_connector.storage.guarded import GuardedConfig

_COMMON = {"type": str, "eviction": dict, "shared": bool, "persist_enabled": bool}
"""Keys that adapters of all types have, and what their values are."""
_KINDS = {str: "a string", dict: "an object", bool: "true or false"}
_OURS = {
    "mooncake": ("mooncake", "vlcache_connector.storage.mooncake"),
    "valkey": ("vlcache_valkey", "vlcache_connector.storage.valkey"),
}
"""Types that are not LMCache's as they are: the name in LMCache's registry, and the module."""
_PACKAGES = {
    "mooncake": ("mooncake", "mooncake-transfer-engine-non-cuda"),
    "valkey": ("glide_sync", "valkey-glide-sync"),
}
_BY_SALT = {"eviction_policy": "IsolatedLRU", "trigger_watermark": 1.0, "eviction_ratio": 0.25}
_LMCACHE = "lmcache.v1.distributed.l2_adapters"
_NEVER_RECONNECTS = ("resp",)
_REDIS = ("valkey", "resp")
_SECRETS = ("username", "password")
_SECRET_NAME = re.compile("pass|secret|token|cred|auth|key", re.IGNORECASE)
_LOOKUP_SHARE = 0.5
"""Of the time that a request waits: what was found has to be loaded in the rest."""
_LONGEST_TRANSFER_SECONDS = 10.0
_REQUEST_SECONDS = 2.0


@dataclass(frozen=True)
class _Entry:
    """An adapter that was asked for.

    Attributes:
        name: where, for messages.
        spec: LMCache's JSON object.
        names: of keys that the user gave other names.
    """

    name: str
    spec: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        return str(self.spec["type"])

    def refused(self, problem: str) -> ConfigError:
        for key, name in self.names.items():
            problem = problem.replace(f"{key}=", f"{name}=")
        return ConfigError(f"kv_connector_extra_config: {self.name}{problem}")


def configured(config: VLCacheConfig) -> list[str]:
    """Names of the tiers below host memory that a configuration asks for, nearest first.

    LMCache is not imported.

    Raises:
        ConfigError: an adapter has no type, or one that is unknown; the file of LMCache's can't be
            read; `redis_url` is malformed.
    """
    return list(dict.fromkeys(entry.type for entry in _entries(config)))


def open_adapters(config: VLCacheConfig, *, can_store: bool) -> list[GuardedConfig]:
    """LMCache's configurations of the adapters, nearest first.

    What is made of them tries again and again to reach its server; see `require_adapters`.

    Args:
        config: the options.
        can_store: whether objects are written to them.

    Raises:
        ConfigError: as `configured`, or a key is unknown, a value is not allowed, or a package is
            missing; one line that names it, and what to do.
    """
    return _guarded(_entries(config), config, can_store=can_store)


def require_adapters(config: VLCacheConfig, adapters: Sequence[L2AdapterInterface | None]) -> None:
    """Refuse to start without an adapter, where `require_tiers` says so.

    Args:
        config: the options.
        adapters: what was made of `open_adapters`, in that order.

    Raises:
        ConfigError: one of them could not be made; says why.
    """
    if not config.require_tiers:
        return
    for entry, adapter in zip(_entries(config), adapters, strict=True):
        error = adapter.report_status().get("error") if adapter is not None else "LMCache has none"
        if error:
            raise entry.refused(
                f" ({entry.type}) is not there, and require_tiers=true: {error}; see to it that "
                "it answers, or set require_tiers=false"
            )


# -- what was asked for -------------------------------------------------------------------------


def _entries(config: VLCacheConfig) -> list[_Entry]:
    entries = []
    if config.disk_path is not None:
        names = {"base_path": "disk_path"}
        entries.append(_Entry("disk_path", {"type": "fs", "base_path": config.disk_path}, names))
    entries += _listed("l2_adapters", config.l2_adapters)
    if config.lmcache_config_file is not None:
        entries += _from_file(config.lmcache_config_file)
    if config.redis_url is not None:
        entries.append(_from_url(config))
    return [_with_expiry(entry, config.ttl_seconds) for entry in entries]


def _listed(name: str, specs: Sequence[Any]) -> list[_Entry]:
    entries = []
    for index, spec in enumerate(specs):
        where = f"{name}[{index}]"
        if not isinstance(spec, Mapping):
            kind = type(spec).__name__
            raise ConfigError(
                f"kv_connector_extra_config: {where} is a {kind}; an object "
                f'{{"type": ..., ...}} is needed'
            )
        if spec.get("type") not in ADAPTER_TYPES:
            raise ConfigError(
                f"kv_connector_extra_config: {where}.type={spec.get('type')!r}: one of "
                f"{', '.join(ADAPTER_TYPES)} is allowed"
            )
        entries.append(_Entry(where, spec))
    return entries


def _from_file(path: str) -> list[_Entry]:
    where = f"lmcache_config_file={path!r}"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"{error.strerror}; name a readable file"
        raise ConfigError(f"kv_connector_extra_config: {where}: {problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"kv_connector_extra_config: {where}: neither YAML nor JSON{line}"
        ) from None
    specs = content.get("l2_adapters") if isinstance(content, Mapping) else None
    if not isinstance(specs, list):
        raise ConfigError(
            f"kv_connector_extra_config: {where}: a key l2_adapters with a list of objects "
            "is needed in it"
        )
    return _listed(f"{where}: l2_adapters", specs)


def _from_url(config: VLCacheConfig) -> _Entry:
    assert config.redis_url is not None
    try:
        address = RedisAddress.from_url(config.redis_url)
    except ValueError as error:
        raise ConfigError(f"kv_connector_extra_config: {error}") from None
    spec: dict[str, Any] = {
        "type": "valkey",
        "tls_enable": address.tls,
        "tls_ca_file": config.redis_tls_ca_file,
        "request_timeout": max(_REQUEST_SECONDS, 2 * config.fetch_deadline_seconds),
    }
    if address.topology == "unix":
        spec["unix_socket_path"] = address.socket_path
    else:
        spec["startup_nodes"] = ",".join(map(_node, address.hosts))
        spec["cluster_mode"] = address.topology == "cluster"
    if address.database:
        spec["database_id"] = address.database
    name = f"redis_url={config.redis_url!r}"
    return _Entry(name, spec, {"tls_ca_file": "redis_tls_ca_file"})


def _node(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _with_expiry(entry: _Entry, seconds: int) -> _Entry:
    # Who has LMCache evict needs objects that stay: its books don't learn of those that expire.
    if entry.type != "valkey" or entry.spec.get("max_capacity_gb"):
        return entry
    return _Entry(entry.name, {"ttl_seconds": seconds, **entry.spec}, entry.names)


def _with_quota(entry: _Entry, config: VLCacheConfig) -> _Entry:
    """LMCache evicts by salt, where it is to."""
    if config.salt_quota_bytes is None:
        return entry
    if "eviction" in entry.spec:
        raise entry.refused(
            f": eviction={entry.spec['eviction']!r} and salt_quota_bytes={config.salt_quota_bytes} "
            "exclude each other; leave out one of them"
        )
    return _Entry(entry.name, {**entry.spec, "eviction": _BY_SALT}, entry.names)


# -- LMCache's configurations -------------------------------------------------------------------


def _guarded(
    entries: Sequence[_Entry], config: VLCacheConfig, *, can_store: bool
) -> list[GuardedConfig]:
    from vlcache_connector.storage.guarded import GuardedConfig
    from vlcache_connector.storage.tier import Tier

    deadline = config.fetch_deadline_seconds
    key = encryption_key(config)
    return [
        GuardedConfig(
            _encrypted(_adapter_config(_with_quota(entry, config)), key),
            tier=Tier(
                entry.type,
                can_store=can_store,
                store_at_sight=config.store_at_sight,
                fetch_deadline_seconds=deadline,
            ),
            reconnects=entry.type not in _NEVER_RECONNECTS,
            lookup_seconds=_LOOKUP_SHARE * deadline,
            transfer_seconds=max(_LONGEST_TRANSFER_SECONDS, 2 * deadline),
            max_store_bytes=config.write_queue_bytes,
        )
        for entry in entries
    ]


def encryption_key(config: VLCacheConfig) -> EncryptionKey | None:
    """What objects below host memory are encrypted with; None: they are not.

    Raises:
        ConfigError: the file can't be read, or is too short.
    """
    from vlcache_connector.storage.encrypted import EncryptionKey

    path = config.encryption_key_file
    return None if path is None else EncryptionKey.read(path)


def _encrypted(config: L2AdapterConfigBase, key: EncryptionKey | None) -> L2AdapterConfigBase:
    from vlcache_connector.storage.encrypted import EncryptedConfig

    return config if key is None else EncryptedConfig(config, key)


def _adapter_config(entry: _Entry) -> L2AdapterConfigBase:
    from lmcache.v1.distributed.l2_adapters import config as theirs

    needed, package = _PACKAGES.get(entry.type, (None, None))
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise entry.refused(f": type {entry.type!r} needs a package: pip install {package}")
    name, module = _OURS.get(entry.type, (entry.type, f"{_LMCACHE}.{entry.type}_l2_adapter"))
    # Else LMCache imports adapters one by one until it finds it, and all that they need.
    importlib.import_module(module)
    _check_keys(entry, theirs.get_l2_adapter_config_class(name))
    spec = json.dumps({**entry.spec, "type": name})
    theirs.logger.disabled = True  # all that it says of a bad value is raised, too
    try:
        [config] = theirs.parse_args_to_l2_adapters_config(Namespace(l2_adapter=[spec])).adapters
    except (TypeError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValidationError):
            item = cause.errors()[0]
            key = ".".join(map(str, item["loc"]))
            if item["type"] == "missing":
                raise entry.refused(f": {key} is missing") from None
            raise entry.refused(f": {key}={item['input']!r} is refused: {item['msg']}") from None
        if entry.type in _OURS:
            raise entry.refused(f": {cause}") from None
        # LMCache names the key, but seldom its value.
        said = set(re.findall(r"\w+", str(cause))) - {"type"}
        values = [f"{key}={value!r}: " for key, value in entry.spec.items() if key in said]
        raise entry.refused(f": {''.join(values)}{cause}") from None
    return config


def _check_keys(entry: _Entry, config_class: type[L2AdapterConfigBase]) -> None:
    """LMCache ignores keys that it doesn't know, and takes the common ones for what they are."""
    secrets = _SECRETS if entry.type in _REDIS else ()
    allowed = sorted({*_COMMON, *inspect.signature(config_class).parameters} - set(secrets))
    for key, value in entry.spec.items():
        if key in secrets:
            other = "" if entry.type == "valkey" else "use type 'valkey', and "
            raise entry.refused(f": {key} has no place in a configuration; {other}{LOGIN_HINT}")
        if key == "serde":
            raise entry.refused(
                ": serde is not supported; for encryption set encryption_key_file, which is for "
                "all adapters"
            )
        if key not in allowed:
            shown = "***" if _SECRET_NAME.search(key) else repr(value)
            raise entry.refused(
                f": unknown key {key}={shown}; adapters of type {entry.type!r} have the keys "
                f"{', '.join(allowed)}"
            )
        kind = _COMMON.get(key)
        if kind is not None and not isinstance(value, kind):
            raise entry.refused(f": {key}={value!r} is refused: {_KINDS[kind]} is needed")

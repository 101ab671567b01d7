"""The adapters of a configuration: what LMCache is given, and how the rest is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlcache_connector.config import ADAPTER_TYPES, ConfigError, VLCacheConfig
from vlcache_connector.storage import adapters
from vlcache_connector.storage.adapters import configured, encryption_key, open_adapters

SECRET = "S3CRET"
FS = {"type": "fs", "base_path": "/x"}
VALKEY = {"type": "valkey", "startup_nodes": "a:1"}
LOGIN = "put who to log in as into VLCACHE_REDIS_USERNAME and VLCACHE_REDIS_PASSWORD, or into"


def refusal(**options: Any) -> str:
    """The one line that a configuration is refused with."""
    with pytest.raises(ConfigError) as refused:
        open_adapters(VLCacheConfig.from_extra_config(options), can_store=True)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("kv_connector_extra_config: ")
    assert SECRET not in message
    return message.removeprefix("kv_connector_extra_config: ")


def inner(**options: Any) -> Any:
    """LMCache's configuration of the only adapter."""
    [config] = open_adapters(VLCacheConfig.from_extra_config(options), can_store=True)
    return config.inner_config


def test_the_nearest_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "lmcache.yaml"
    path.write_text(
        "chunk_size: 256\nl2_adapters:\n- {type: resp, host: b, port: 2}\n", encoding="utf-8"
    )
    config = VLCacheConfig(
        disk_path="/near",
        l2_adapters=[VALKEY, {"type": "fs_native", "base_path": "/y"}],
        lmcache_config_file=str(path),
        redis_url="redis://far",
    )
    opened = open_adapters(config, can_store=False)
    names = ["fs", "valkey", "fs_native", "resp", "valkey"]
    assert [each.tier.name for each in opened] == names
    assert [each.tier.can_store for each in opened] == [False] * 5
    assert [each.reconnects for each in opened] == [name != "resp" for name in names]
    near, _, _, from_file, far = (each.inner_config for each in opened)
    assert near.base_path == "/near"
    assert (from_file.host, from_file.port) == ("b", 2)
    assert far.addresses == [("far", 6379)]
    assert configured(config) == ["fs", "valkey", "fs_native", "resp"]
    assert open_adapters(VLCacheConfig(), can_store=True) == []
    assert configured(VLCacheConfig()) == []


def test_a_file_may_be_json(tmp_path: Path) -> None:
    path = tmp_path / "lmcache.json"
    path.write_text(json.dumps({"l2_adapters": [FS]}), encoding="utf-8")
    assert inner(lmcache_config_file=str(path)).base_path == "/x"


def test_names_of_tiers_are_known_without_lmcache() -> None:
    code = (
        "import sys\n"
        "from vlcache_connector.config import VLCacheConfig\n"
        "from vlcache_connector.storage.adapters import configured\n"
        "print(configured(VLCacheConfig(disk_path='/x', redis_url='redis://h')))\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('lmcache', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['fs', 'valkey']", "[]"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", {"addresses": [("h", 6379)], "tls_enable": False, "database_id": None}),
        ("redis://h:1/7", {"addresses": [("h", 1)], "database_id": 7, "cluster_mode": False}),
        ("rediss://[::1]:2", {"addresses": [("::1", 2)], "tls_enable": True}),
        ("redis+cluster://a,b:3", {"addresses": [("a", 6379), ("b", 3)], "cluster_mode": True}),
        ("rediss+cluster://a", {"tls_enable": True, "cluster_mode": True}),
        ("unix:///run/a%20b.sock", {"unix_socket_path": "/run/a b.sock", "startup_nodes": None}),
    ],
)
def test_a_url_is_a_valkey_adapter(url: str, expected: dict[str, Any]) -> None:
    config = inner(redis_url=url, ttl_seconds=77)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.ttl_seconds == 77


def test_objects_expire_unless_lmcache_evicts_them() -> None:
    def seconds(**keys: Any) -> Any:
        return inner(l2_adapters=[VALKEY | keys], ttl_seconds=77).ttl_seconds

    assert seconds() == 77
    assert seconds(ttl_seconds=5) == 5
    assert seconds(ttl_seconds=None) is None
    assert seconds(max_capacity_gb=1.5) is None


def test_common_keys_reach_lmcache() -> None:
    eviction = {"eviction_policy": "LRU", "trigger_watermark": 0.5}
    for spec in (FS, VALKEY):
        common = {"eviction": eviction, "shared": True, "persist_enabled": False}
        config = inner(l2_adapters=[spec | common])
        assert config.eviction_config.trigger_watermark == 0.5
        assert config.shared
        assert not config.persist_config.persist_enabled


def test_who_has_quotas_of_salts_says_no_more_of_eviction() -> None:
    spec = FS | {"eviction": {"eviction_policy": "LRU"}}
    says = refusal(l2_adapters=[spec], salt_quota_bytes=7)
    assert says == (
        "l2_adapters[0]: eviction={'eviction_policy': 'LRU'} and salt_quota_bytes=7 exclude each "
        "other; leave out one of them"
    )
    config = inner(l2_adapters=[FS], salt_quota_bytes=7)
    assert config.eviction_config.eviction_policy == "IsolatedLRU"


def test_what_is_no_key_is_refused_in_one_line(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(SECRET.encode())
    for path, says in (
        (tmp_path / "none", "No such file or directory; name a readable file"),
        (tmp_path, "Is a directory; name a readable file"),
        (
            short,
            f"the file has {len(SECRET)} bytes, at least 32 random ones are needed; make one: "
            "head -c 32 /dev/urandom > FILE",
        ),
    ):
        config = VLCacheConfig(disk_path="/x", encryption_key_file=str(path))
        with pytest.raises(ConfigError) as raised:
            open_adapters(config, can_store=True)
        where = f"kv_connector_extra_config: encryption_key_file={str(path)!r}: "
        assert str(raised.value) == where + says


def test_a_key_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(SECRET.encode() * 8)
    key = encryption_key(VLCacheConfig(encryption_key_file=str(path)))
    assert key is not None
    assert SECRET not in repr(key)
    assert len(key.id) == 64


def test_half_of_the_deadline_is_for_looking() -> None:
    config = VLCacheConfig(disk_path="/x", fetch_deadline_seconds=30.0)
    [opened] = open_adapters(config, can_store=True)
    assert (opened.lookup_seconds, opened.transfer_seconds) == (15.0, 60.0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, f".type=None: one of {', '.join(ADAPTER_TYPES)} is allowed"),
        ({"type": "tape"}, ".type='tape': one of fs, "),
        ({"type": "mooncake_store"}, ".type='mooncake_store': one of fs, "),
        ({"type": ["fs"]}, ".type=['fs']: one of fs, "),
        ({"type": "fs"}, ": base_path must be a non-empty string"),
        (FS | {"base_path": 3}, ": base_path=3: base_path must be a non-empty string"),
        (FS | {"size": 1}, ": unknown key size=1; adapters of type 'fs' have the keys base_path, "),
        (FS | {"api_key": SECRET}, ": unknown key api_key=***; "),
        (FS | {"use_odirect": 1}, ": use_odirect=1: use_odirect must be a boolean"),
        (FS | {"eviction": "LRU"}, ": eviction='LRU' is refused: an object is needed"),
        (FS | {"eviction": {"eviction_policy": "x"}}, "eviction_policy must be 'LRU', "),
        (FS | {"shared": "no"}, ": shared='no' is refused: true or false is needed"),
        (FS | {"serde": {"type": "fp8"}}, ": serde is not supported; for encryption set enc"),
        ({"type": "resp", "host": "a", "port": "b"}, ": port='b': port must be a positive integer"),
        (
            {"type": "resp", "host": "a", "port": 1, "password": SECRET},
            f": password has no place in a configuration; use type 'valkey', and {LOGIN}",
        ),
        (VALKEY | {"password": SECRET}, f": password has no place in a configuration; {LOGIN}"),
        (VALKEY | {"username": SECRET}, f": username has no place in a configuration; {LOGIN}"),
        (VALKEY | {"Password": SECRET}, ": unknown key Password=***; "),
        ({"type": "valkey"}, ": one of startup_nodes and unix_socket_path is needed"),
        (VALKEY | {"unix_socket_path": "/x"}, ": one of startup_nodes and unix_socket_path is"),
        (
            VALKEY | {"startup_nodes": 3},
            ": startup_nodes=3 is refused: Input should be a valid",
        ),
        (
            VALKEY | {"startup_nodes": f"redis://me:{SECRET}@a:1"},
            ": startup_nodes: a host is missing or malformed; 'host:port' is needed",
        ),
        (VALKEY | {"startup_nodes": "a:0"}, ": startup_nodes: a port is no number from 1 to "),
        (VALKEY | {"startup_nodes": "a:1,b:1"}, "'a:1,b:1': several need cluster_mode"),
        (VALKEY | {"cluster_mode": True, "database_id": 1}, ": database_id=1: a cluster has only"),
        (
            VALKEY | {"cluster_mode": "no"},
            ": cluster_mode='no' is refused: Input should be a",
        ),
        (VALKEY | {"num_workers": 0}, ": num_workers=0 is refused: Input should be greater than 0"),
        (
            VALKEY | {"ttl_seconds": 0.5},
            ": ttl_seconds=0.5 is refused: Input should be a valid",
        ),
        (VALKEY | {"key_prefix": "a@b"}, ": key_prefix='a@b' is refused: String should match"),
        (VALKEY | {"tls_ca_file": "/x.pem"}, ": tls_ca_file='/x.pem': needs TLS"),
        (
            VALKEY | {"tls_enable": True, "tls_ca_file": "/x.pem"},
            ": tls_ca_file='/x.pem': No such file or directory; name a readable file",
        ),
        (
            {"type": "valkey", "unix_socket_path": "/x", "tls_enable": True},
            ": unix_socket_path goes with neither tls_enable nor cluster_mode",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_adapters_are_refused_by_place_key_and_value(spec: dict[str, Any], says: str) -> None:
    message = refusal(l2_adapters=[FS, spec])
    assert message.startswith("l2_adapters[1]")
    assert says in message


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "metadata_server is missing"),
        ({"metadata_server": "a:1"}, "metadata_server='a:1' is refused: String should match"),
        ({"global_segment_size": "lots"}, "global_segment_size='lots' is refused: "),
        ({"protocol": "udp"}, "protocol='udp' is refused: Input should be 'tcp' or 'rdma'"),
        ({"master_server_address": "a:1"}, "unknown key master_server_address='a:1'; adapters of"),
        ({"master_server_addr": "a"}, "master_server_addr='a' is refused: String should match"),
    ],
)
def test_bad_keys_of_mooncake_are_refused(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(adapters, "_PACKAGES", {})  # whether it is installed or not
    good = {"metadata_server": "P2PHANDSHAKE", "master_server_addr": "a:1"} if keys else {}
    assert says in refusal(l2_adapters=[{"type": "mooncake"} | good | keys])


def test_mooncake_takes_byte_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_PACKAGES", {})
    servers = {"metadata_server": "http://a:1/metadata", "master_server_addr": "a:2"}
    config = inner(l2_adapters=[{"type": "mooncake", "global_segment_size": "4GiB"} | servers])
    assert config.global_segment_size == 4 << 30


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("valkey-glide-sync", {"redis_url": "redis://a"}),
        ("mooncake-transfer-engine-non-cuda", {"l2_adapters": [{"type": "mooncake"}]}),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, spec: dict[str, Any]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert f" needs a package: pip install {name}" in refusal(**spec)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"redis_url": "http://h"}, "redis_url='http://h': allowed are redis://"),
        ({"redis_url": f"redis://me:{SECRET}@h"}, "redis_url='redis://***@h': a user or password"),
        ({"redis_url": "redis+sentinel://h/main"}, "/main': sentinels can't be asked; name the "),
        (
            {"redis_url": "redis://h", "redis_tls_ca_file": "/x.pem"},
            "redis_url='redis://h': redis_tls_ca_file='/x.pem': needs TLS",
        ),
        (
            {"redis_url": "rediss://h", "redis_tls_ca_file": "/x.pem"},
            "redis_url='rediss://h': redis_tls_ca_file='/x.pem': No such file or directory; name",
        ),
        (
            {"redis_url": "rediss://h", "redis_tls_ca_file": __file__},
            "no certificate in PEM form in it",
        ),
    ],
)
def test_bad_short_forms_are_refused_by_their_own_keys(options: dict[str, Any], says: str) -> None:
    assert says in refusal(**options)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ": No such file or directory; name a readable file"),
        (b"a: [", ": neither YAML nor JSON in line 1"),
        (b"\xff\xfe\xff", ": neither YAML nor JSON"),
        (b"", ": a key l2_adapters with a list of objects is needed in it"),
        (b"- type: fs", ": a key l2_adapters with a list of objects is needed in it"),
        (b"l2_adapters: {type: fs}", ": a key l2_adapters with a list of objects is needed in it"),
        (b"l2_adapters: [fs]", ': l2_adapters[0] is a str; an object {"type": ..., ...} is needed'),
        (b"l2_adapters: [{type: tape}]", ": l2_adapters[0].type='tape': one of fs, "),
        (b"l2_adapters: [{type: fs}]", ": l2_adapters[0]: base_path must be a non-empty string"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "lmcache.yaml"
    if content is not None:
        path.write_bytes(content)
    assert f"lmcache_config_file={str(path)!r}{says}" in refusal(lmcache_config_file=str(path))

"""configs/docker: health checks and the composition's Redis, tried on real processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from local_redis import LocalRedis, find_server, free_port
from redis.backoff import NoBackoff
from redis.retry import Retry
from serving import VLLMServer

from tests.helpers.deployment import (
    DOCKER,
    DOCKERFILES,
    SERVICES,
    arguments,
    redis_options,
    run,
)
from tests.helpers.stored_objects import SECONDS, kv_form, sealed
from vlcache_connector import cli
from vlcache_connector.config import VLCacheConfig
from vlcache_connector.storage.adapters import open_adapters
from vlcache_connector.storage.blocking import BlockingAdapter
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.layout import Space
from vlcache_connector.storage.names import Namespace


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_health_check_tells_a_server_from_none(
    dockerfile: Path, cpu_server: VLLMServer
) -> None:
    [check] = arguments(dockerfile, "HEALTHCHECK")
    python, *rest = json.loads(check.partition("CMD ")[2])
    assert python == "python3"

    def healthy(port: int | str) -> bool:
        command = [part.replace(":8000/", f":{port}/") for part in rest]
        return run(sys.executable, *command).returncode == 0

    assert healthy(cpu_server.base_url.rpartition(":")[2])
    assert not healthy(free_port())


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    assert run("sh", DOCKER / "make_secrets.sh", folder).returncode == 0
    return folder


@pytest.fixture
def composed_redis(redis_server: Callable[..., LocalRedis], secrets: Path) -> LocalRedis:
    """A redis-server with the options and users of the composition, and one who may look."""
    acl = secrets / "users-and-observer.acl"
    observer = "user observer on nopass ~* &* +@all\n"
    acl.write_text((secrets / "users.acl").read_text() + observer)
    return redis_server(**redis_options(SERVICES["redis"]["command"]) | {"aclfile": acl})


def client(server: LocalRedis, username: str | None, password: str | None = "none") -> Any:
    # By default a refusal is tried again, too.
    retry = Retry(NoBackoff(), 0)
    return redis.Redis(port=server.port, username=username, password=password, retry=retry)


def test_the_tier_needs_no_more_than_its_user_may(
    composed_redis: LocalRedis,
    secrets: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLCACHE_REDIS_CREDENTIALS_FILE", str(secrets / "redis_credentials"))
    config = VLCacheConfig(redis_url=composed_redis.url)
    [guarded] = open_adapters(config, can_store=True)
    space = Space(str(Namespace("default", "1" * 64)), rank=0, num_ranks=1)
    objects = sealed(space, SegmentId("key", "kv"), kv_form(80))
    assert len(objects) == 1
    [(key, value)] = objects.items()
    with BlockingAdapter(guarded.inner_config, value.numel(), SECONDS) as adapter:
        adapter.memory.copy_(value)
        assert adapter.store({key: adapter.memory})
        assert adapter.look_up([key])
        assert adapter.load({key: adapter.memory})
        adapter.delete([key])
        assert not adapter.look_up([key])
        assert adapter.store({key: adapter.memory})
    for command in (["ls"], ["stat"], ["check"], ["rm", "--all", "--yes"]):
        assert cli.main([*command, "--redis-url", composed_redis.url]) == 0
    assert "Removed: 1" in capsys.readouterr().out
    refused = [
        entry
        for entry in client(composed_redis, "observer").acl_log()
        # But for the start of the server, which nobody may ask, and what redis-py asks for in vain.
        if (entry["username"], entry["object"]) not in (("default", "ping"), ("vlcache", "client"))
    ]
    assert refused == []


def test_others_may_nothing(composed_redis: LocalRedis, secrets: Path) -> None:
    for username in ("default", "vlcache", "nobody"):
        with pytest.raises(redis.AuthenticationError):
            client(composed_redis, username).ping()
    with pytest.raises(redis.AuthenticationError):
        client(composed_redis, None, None).ping()
    health = client(composed_redis, "health")
    assert health.ping()
    for command in (("GET", "vlcache1-a"), ("SCAN", "0"), ("INFO",), ("CONFIG", "GET", "*")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            health.execute_command(*command)
    password = (secrets / "redis_credentials").read_text().strip().partition(":")[2]
    own = client(composed_redis, "vlcache", password)
    assert own.set("vlcache1-a", "b")
    for command in (("SET", "other:a", "b"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            own.execute_command(*command)


def test_it_is_a_cache(composed_redis: LocalRedis) -> None:
    observer = client(composed_redis, "observer")
    assert observer.config_get("maxmemory") == {"maxmemory": str(16 << 30)}
    assert observer.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
    assert observer.config_get("save") == {"save": ""}
    assert observer.config_get("appendonly") == {"appendonly": "no"}


def test_its_health_check_tells_it_from_none(composed_redis: LocalRedis) -> None:
    redis_cli = Path(str(find_server())).with_name("redis-cli")
    if not redis_cli.exists():
        pytest.skip("no redis-cli")
    [shell, check] = SERVICES["redis"]["healthcheck"]["test"]
    assert shell == "CMD-SHELL"

    def healthy(port: int) -> bool:
        command = check.replace("redis-cli", f"{redis_cli} -p {port}")
        return run("sh", "-c", command).returncode == 0

    assert healthy(composed_redis.port)
    assert not healthy(free_port())

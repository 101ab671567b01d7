"""Opening the tiers of a configuration: what is refused, and that no message shows a secret."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from local_redis import LocalRedis, free_port

from vlcache_connector.config import ConfigError, VLCacheConfig
from vlcache_connector.tiers import opening
from vlcache_connector.tiers.opening import open_tiers


def refusal(**settings: object) -> str:
    with pytest.raises(ConfigError) as refused:
        open_tiers(VLCacheConfig.from_extra_config(settings), "model", "model")
    assert str(refused.value).startswith("kv_connector_extra_config: ")
    return str(refused.value).partition(": ")[2]


def test_the_fastest_comes_first_and_knows_the_model(
    redis_server: Callable[..., LocalRedis], tmp_path: Path
) -> None:
    config = VLCacheConfig(disk_path=str(tmp_path), redis_url=redis_server().url)
    tiers = open_tiers(config, "f1nger", "models/m")
    assert [tier.name for tier in tiers] == ["disk", "redis"]
    for tier in tiers:
        assert tier._tier.models(opening.Deadline(5)) == {"f1nger": "models/m"}
        tier.close()
    assert open_tiers(VLCacheConfig(), "f1nger", "models/m") == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"disk_path": "/proc/nothing"}, "disk_path='/proc/nothing': No such file or directory;"),
        ({"redis_url": "http://127.0.0.1"}, "redis_url='http://127.0.0.1'"),
        ({"redis_url": "redis://127.0.0.1:high"}, "redis_url='redis://127.0.0.1:high'"),
        (
            {"redis_url": "redis://127.0.0.1", "redis_tls_ca_file": "/x.pem"},
            "redis_tls_ca_file='/x.pem' without TLS",
        ),
        (
            {"redis_url": "rediss://127.0.0.1", "redis_tls_ca_file": "/x.pem"},
            "redis_tls_ca_file='/x.pem': No such file or directory; name a readable file",
        ),
        ({"disk_path": ".", "deployment": "-x"}, "deployment='-x'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_settings_are_refused(settings: dict[str, str], expected: str) -> None:
    assert refusal(**settings).startswith(expected)


def test_a_redis_that_does_not_answer_is_refused(
    redis_server: Callable[..., LocalRedis], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    message = refusal(redis_url=url)
    assert message.startswith(f"redis_url={url!r} can't be used: ")
    assert message.endswith("(connection); see to it that it can, or leave redis_url out")

    monkeypatch.setattr(opening, "_START_SECONDS", 0.3)
    server = redis_server()
    server.pause()
    assert "(timeout)" in refusal(redis_url=server.url)

    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", "wr0ng")
    message = refusal(redis_url=redis_server(requirepass="s3cret").url)
    assert "(auth); put who to log in as into VLCACHE_REDIS_USERNAME and " in message
    assert "wr0ng" not in message


def test_a_redis_that_takes_nothing_may_still_be_read(
    redis_server: Callable[..., LocalRedis],
) -> None:
    primary = redis_server()
    replica = redis_server(replicaof=f"127.0.0.1 {primary.port}")
    [tier] = open_tiers(VLCacheConfig(redis_url=replica.url), "model", "model")
    tier.close()

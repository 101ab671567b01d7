"""A Mooncake master and a node of one's own: for the scripts that need them, and for the tests."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from local_process import LocalProcess
from local_redis import free_port

_START_SECONDS = 20.0
_READY = b"ready\n"


def find_master() -> str | None:
    """The mooncake_master of this environment, if it runs here."""
    beside = Path(sys.executable).parent / "mooncake_master"
    if not beside.exists() or shutil.which("ldd") is None:
        return None
    libraries = subprocess.run(["ldd", str(beside)], capture_output=True, text=True, check=False)
    return None if "not found" in libraries.stdout else str(beside)


class MooncakeError(RuntimeError):
    """The master or the node could not be started."""


class Master(LocalProcess):
    """A master on 127.0.0.1 and free ports, with its metadata server."""

    def __init__(self, command: str, folder: Path) -> None:
        self._command = command
        self._folder = folder
        self._ports = [free_port() for _ in range(3)]

    @property
    def params(self) -> dict[str, Any]:
        """Of an adapter; its node contributes 64 MiB."""
        rpc, http, _ = self._ports
        return {
            "local_hostname": "127.0.0.1",
            "metadata_server": f"http://127.0.0.1:{http}/metadata",
            "master_server_addr": f"127.0.0.1:{rpc}",
            "global_segment_size": 64 << 20,
        }

    def start(self) -> None:
        """Start it, empty, and wait until it answers.

        Raises:
            MooncakeError: it does not.
        """
        rpc, http, metrics = self._ports
        options = {
            "rpc_address": "127.0.0.1",
            "rpc_port": rpc,
            "enable_http_metadata_server": "true",
            "http_metadata_server_host": "127.0.0.1",
            "http_metadata_server_port": http,
            "metrics_host": "127.0.0.1",
            "metrics_port": metrics,
            "log_dir": self._folder,
        }
        self._process = subprocess.Popen(
            [self._command, *(f"--{name}={value}" for name, value in options.items())],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + _START_SECONDS
        for port in (rpc, http):
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if time.monotonic() > until:
                        self.kill()
                        raise MooncakeError(f"{self._command} does not answer") from None
                    time.sleep(0.05)


class MooncakeNode(LocalProcess):
    """A node in a process of its own that contributes memory, and nothing else.

    Args:
        params: see `Master.params`.
        log: takes what it prints.
    """

    def __init__(self, params: dict[str, Any], log: Path) -> None:
        self._params = params
        self._log = log

    def start(self) -> None:
        """Start it, and wait until it is a part of the store; does nothing while it runs.

        Raises:
            MooncakeError: it ended, or does not become one.
        """
        if self._process is not None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(self._params)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == _READY:
                return
        self.kill()
        raise MooncakeError(f"Mooncake's node ended; see {self._log}")


def _serve(params: dict[str, Any]) -> None:
    """What a node's process does, until nobody holds its standard input any more."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    code = store.setup(
        params["local_hostname"],
        params["metadata_server"],
        params["global_segment_size"],
        16 << 20,
        "tcp",
        "",
        params["master_server_addr"],
    )
    if code:
        raise MooncakeError(f"Mooncake's setup failed with code {code}")
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))

"""A Mooncake master of one's own, and nodes in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from local_redis import free_port

_START_SECONDS = 20.0


def find_master() -> str | None:
    """The mooncake_master of this environment, if it runs here."""
    beside = Path(sys.executable).parent / "mooncake_master"
    if not beside.exists() or shutil.which("ldd") is None:
        return None
    libraries = subprocess.run(["ldd", str(beside)], capture_output=True, text=True, check=False)
    return None if "not found" in libraries.stdout else str(beside)


class Master:
    """A master on 127.0.0.1 and free ports, with its metadata server.

    A context manager; what is started here is ended by its process id.
    """

    def __init__(self, command: str, folder: Path) -> None:
        self._command = command
        self._folder = folder
        self._ports = [free_port() for _ in range(3)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Master:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def params(self) -> dict[str, Any]:
        """Of an adapter."""
        rpc, http, _ = self._ports
        return {
            "local_hostname": "127.0.0.1",
            "metadata_server": f"http://127.0.0.1:{http}/metadata",
            "master_server_addr": f"127.0.0.1:{rpc}",
            "global_segment_size": 64 << 20,
        }

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
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
                    assert time.monotonic() < until, "the master does not answer"
                    time.sleep(0.05)

    def kill(self) -> None:
        """End it without a goodbye; does nothing the second time."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(timeout=20)

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)


class Node:
    """A process that does what it is asked.

    Args:
        serve: runs there, with one end of a pipe and `arguments`.
        log: takes what it prints.
    """

    def __init__(self, serve: Callable[..., None], log: Path, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(
            target=_run, args=(serve, str(log), there, arguments), daemon=True
        )
        self._process.start()

    def ask(self, *question: Any, seconds: float = 60) -> Any:
        """Ask, and wait for the answer."""
        self._pipe.send(question)
        assert self._pipe.poll(seconds), f"no answer to {question[:1]}"
        return self._pipe.recv()

    def kill(self) -> None:
        """End it without a goodbye."""
        self._process.kill()
        self._process.join(20)


def _run(
    serve: Callable[..., None], log: str, pipe: Connection, arguments: tuple[Any, ...]
) -> None:
    # Mooncake logs a lot to standard error.
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    serve(pipe, *arguments)

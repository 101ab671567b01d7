"""Nodes that share a Mooncake store, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


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

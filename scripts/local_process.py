"""A server of one's own as a process: started, stopped for a while, and ended by its id."""

from __future__ import annotations

import os
import signal
import subprocess
from abc import ABC, abstractmethod
from typing import Self


class LocalProcess(ABC):
    """A context manager. What is started here is ended by its process id, in whichever way the
    block is left.
    """

    _process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @abstractmethod
    def start(self) -> None:
        """Start it, and wait until it answers."""

    def kill(self) -> None:
        """End it without a goodbye, stopped or not; does nothing the second time."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(timeout=20)

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGCONT)

"""Makes an L2 adapter in a thread of its own: its server may be away, or take its time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5
"""Seconds between two attempts, doubled until the longest pause."""
LONGEST_PAUSE = 30.0


class AdapterMaker:
    """Tries until there is an adapter.

    Attributes:
        error: why there is none at present; None: there is one.
    """

    def __init__(
        self,
        make: Callable[[], L2AdapterInterface],
        on_made: Callable[[L2AdapterInterface], bool],
    ) -> None:
        """
        Args:
            make: makes one, or raises.
            on_made: takes one, in the maker's thread; False: it is not wanted any more.
        """
        self.error: str | None = "it is being made"
        self._make = make
        self._on_made = on_made
        self._tried = threading.Event()
        self._stopped = threading.Event()

    def start(
        self, old: L2AdapterInterface | None = None, on_closed: Callable[[], None] | None = None
    ) -> None:
        """Begin to make one; not while one is being made.

        Args:
            old: not used any more: closed before.
            on_closed: called when it is, in the maker's thread.
        """
        threading.Thread(
            target=self._run, args=(old, on_closed), name="vlcache-guard-make", daemon=True
        ).start()

    def wait(self, seconds: float) -> None:
        """Wait for the first attempt to end."""
        self._tried.wait(seconds)

    def stop(self) -> None:
        """Try no more. An attempt that goes on is not waited for."""
        self._stopped.set()

    def _run(self, old: L2AdapterInterface | None, on_closed: Callable[[], None] | None) -> None:
        if old is not None:
            close_quietly(old)
        if on_closed is not None:
            on_closed()
        pause = FIRST_PAUSE
        while not self._stopped.is_set():
            try:
                adapter = self._make()
            except Exception as error:
                if self.error != str(error):
                    logger.error("VLCache: an L2 adapter is left alone: %s", error)
                self.error = str(error)
                self._tried.set()
                self._stopped.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            self.error = None
            if not self._on_made(adapter):
                close_quietly(adapter)
            self._tried.set()
            return


def close_quietly(adapter: L2AdapterInterface) -> None:
    """Close an adapter; one that cannot be closed is logged."""
    try:
        adapter.close()
    except Exception:
        logger.exception("VLCache: an L2 adapter could not be closed")

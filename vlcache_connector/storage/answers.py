"""Answers of L2 adapters: what every adapter of ours does alike, handing out task ids and keeping
answers until they are asked for; and how one waits for those of another.

LMCache seam: `L2AdapterInterface` (`lmcache/v1/distributed/l2_adapters/base.py`).
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform import consume_fd, create_event_notifier

if TYPE_CHECKING:
    from lmcache.lmcache_native import Bitmap
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.internal_api import L2StoreResult
    from lmcache.v1.memory_management import MemoryObj

Answer = TypeVar("Answer")
Patience = Callable[[], float]
"""Seconds to wait before it is asked again; raises where nobody waits any more."""

Operation = Literal["lookup", "load", "store"]
_OPERATIONS: tuple[Operation, ...] = ("lookup", "load", "store")


@runtime_checkable
class TellsLookupErrors(Protocol):
    """An adapter that can tell a lookup that failed from one that found nothing."""

    def pop_lookup_error(self, task_id: int) -> str | None:
        """Why a lookup failed, once it was answered and once only; None: it did not."""


class AnsweringAdapter(L2AdapterInterface):
    """An adapter whose tasks end in `_answer`, in any thread."""

    def __init__(self, max_capacity_bytes: int = 0) -> None:
        super().__init__(max_capacity_bytes=max_capacity_bytes)
        self._lock = threading.RLock()
        self._notifiers = {operation: create_event_notifier() for operation in _OPERATIONS}
        self._answers: dict[Operation, dict[int, Any]] = {name: {} for name in _OPERATIONS}
        self._next_id = 0

    def get_store_event_fd(self) -> int:
        return int(self._notifiers["store"].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._notifiers["lookup"].fileno())

    def get_load_event_fd(self) -> int:
        return int(self._notifiers["load"].fileno())

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._lock:
            answers, self._answers["store"] = self._answers["store"], {}
        return answers

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._answers["lookup"].pop(task_id, None)

    def query_load_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._answers["load"].pop(task_id, None)

    def _new_id(self) -> int:
        with self._lock:
            self._next_id += 1
            return self._next_id - 1

    def _answer(self, operation: Operation, task_id: int, answer: Any) -> None:
        with self._lock:
            self._answers[operation][task_id] = answer
        self._notifiers[operation].notify()

    def _close_notifiers(self) -> None:
        for notifier in self._notifiers.values():
            notifier.close()


def store_and_wait(
    adapter: L2AdapterInterface,
    keys: list[ObjectKey],
    objects: list[MemoryObj],
    patience: Patience,
) -> L2StoreResult:
    """Store objects by an adapter that nobody else stores by meanwhile."""
    task_id = adapter.submit_store_task(keys, objects)
    done: dict[int, L2StoreResult] = {}

    def answer() -> L2StoreResult | None:
        done.update(adapter.pop_completed_store_tasks())
        return done.get(task_id)

    return wait_for(adapter.get_store_event_fd(), answer, patience)


def load_and_wait(
    adapter: L2AdapterInterface,
    keys: list[ObjectKey],
    objects: list[MemoryObj],
    patience: Patience,
) -> Bitmap:
    """Load objects by an adapter; which of them came."""
    task_id = adapter.submit_load_task(keys, objects)
    return wait_for(
        adapter.get_load_event_fd(), lambda: adapter.query_load_result(task_id), patience
    )


def wait_for(fd: int, answer: Callable[[], Answer | None], patience: Patience) -> Answer:
    """An answer of an adapter, which signals it by an event."""
    while (found := answer()) is None:
        if select.select([fd], [], [], patience())[0]:
            consume_fd(fd)
    return found

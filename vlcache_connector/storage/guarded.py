"""An L2 adapter around any other of LMCache's, for what LMCache leaves open.

* Every object is checked before LMCache may show it: a damaged one is a miss, and never resident.
* A lookup is over in time: LMCache asks all adapters, and waits for the slowest.
* An adapter whose server is away at start is made in a thread, again and again. Until then it has
  nothing, and takes nothing.
* A batch is split by length of the objects, which some adapters take for granted.

Loads and stores are never given up while the adapter may still touch their memory. An adapter that
neither connects again by itself nor notices that nobody answers is closed, which ends its threads,
and made anew when a store fails or anything takes too long.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2AdapterListener, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import (
    L2AdapterConfigBase,
    get_type_name_for_config,
    register_l2_adapter_type,
)
from lmcache.v1.distributed.l2_adapters.factory import (
    create_l2_adapter_from_registry,
    register_l2_adapter_factory,
)
from lmcache.v1.platform import consume_fd, create_event_notifier

from vlcache_connector.storage.answers import AnsweringAdapter, Operation
from vlcache_connector.storage.codec import RefusalReason, RefusedObject
from vlcache_connector.storage.layout import check_object
from vlcache_connector.storage.tier import Tier

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.5
"""Seconds between two attempts to make an adapter, doubled until the longest pause."""
_LONGEST_PAUSE = 30.0
_CLOSE_SECONDS = 5.0
_CLOCK_MS = 20
_IDLE_MS = 1000


class GuardedConfig(L2AdapterConfigBase):
    """Of a guarded adapter.

    Args:
        inner: the adapter's own.
        tier: what the guard records in, and goes by.
        reconnects: the adapter bounds its own calls and connects again by itself. If not, it has to
            end its threads when it is closed.
        lookup_seconds: a lookup that takes longer found nothing.
        transfer_seconds: after anything that takes longer, an adapter that does not reconnect is
            made anew.
        start_seconds: how long to wait for it to be made the first time.
    """

    def __init__(
        self,
        inner: L2AdapterConfigBase,
        *,
        tier: Tier,
        reconnects: bool,
        lookup_seconds: float = 0.5,
        transfer_seconds: float = 10.0,
        start_seconds: float = 5.0,
    ) -> None:
        self.inner_config = inner  # the name under which LMCache looks for it
        self.tier = tier
        self.reconnects = reconnects
        self.lookup_seconds = tier.lookup_seconds = lookup_seconds
        self.transfer_seconds = transfer_seconds
        self.start_seconds = start_seconds
        self.eviction_config = inner.eviction_config
        self.serde_config = inner.serde_config

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> GuardedConfig:
        """Not for users, whose adapters are guarded anyway."""
        raise ValueError("type 'vlcache_guarded' can't be configured by itself")

    @classmethod
    def help(cls) -> str:
        return "made by VLCache around each adapter"


@dataclass
class Counters:
    """What happened since the start, by kind.

    Attributes:
        refused: objects that were loaded and refused, by reason.
        overdue: lookups that took too long.
        rebuilt: how often the adapter was made anew.
    """

    refused: dict[RefusalReason, int] = field(default_factory=dict)
    overdue: int = 0
    rebuilt: int = 0


@dataclass(eq=False)
class _Task:
    """What LMCache asked for; its parts are what the adapter was asked for."""

    id: int
    operation: Operation
    keys: Sequence[ObjectKey]
    objects: Sequence[MemoryObj]
    since: float
    parts: int = 0
    done: set[int] = field(default_factory=set)
    """Indices of the keys that were found, loaded or stored."""
    answered: bool = False
    num_bytes: int = 0


class _Bridge(L2AdapterListener):
    """Passes on what the inner adapter says of its keys, whichever one it is at the time."""

    def __init__(self, outer: GuardedAdapter) -> None:
        self._outer = outer

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self._outer._notify_keys_stored(keys, sizes)

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self._outer._notify_keys_accessed(keys)

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        pass  # without sizes: `GuardedAdapter.delete` passes it on


class GuardedAdapter(AnsweringAdapter):
    """See the module. Called from LMCache's threads; has one of its own, and one while the inner
    adapter is made.

    Attributes:
        counters: what happened so far.
    """

    def __init__(self, config: GuardedConfig, l1_memory_desc: L1MemoryDesc | None) -> None:
        capacity = getattr(config.inner_config, "max_capacity_gb", 0)
        super().__init__(max_capacity_bytes=int(capacity * (1 << 30)))
        self.counters = Counters()
        self._config = config
        self._make = partial(create_l2_adapter_from_registry, config.inner_config, l1_memory_desc)
        self._wake = create_event_notifier()
        self._inner: L2AdapterInterface | None = None
        self._parts: dict[tuple[Operation, int], tuple[_Task, Sequence[int]]] = {}
        """Of the present inner adapter, by its own task ids."""
        self._rebuild_at = 0.0
        self._rebuild_pause = _FIRST_PAUSE
        self._stored_bytes: dict[ObjectKey, int] = {}
        self._error: str | None = "it is being made"
        self._closing = threading.Event()
        self._made = threading.Event()
        self._start_making(None, {})
        self._made.wait(config.start_seconds)
        self._thread = threading.Thread(target=self._run, name="vlcache-guard", daemon=True)
        self._thread.start()

    # -- LMCache's interface ------------------------------------------------------------------

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        return self._submit(
            "store", keys, objects, lambda inner, *part: inner.submit_store_task(*part)
        )

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        return self._submit(
            "lookup",
            keys,
            (),
            lambda inner, part, _: inner.submit_lookup_and_lock_task(part, group_layout_descs),
        )

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        return self._submit(
            "load", keys, objects, lambda inner, *part: inner.submit_load_task(*part)
        )

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        with self._lock:
            if self._inner is not None:
                self._inner.submit_unlock(keys)

    def delete(self, keys: list[ObjectKey]) -> None:
        with self._lock:
            inner = self._inner
        if inner is not None:
            inner.delete(keys)
        with self._lock:
            sizes = [self._stored_bytes.pop(key, 0) for key in keys]
        # Whether they were still there or not: what others removed is gone, too.
        self._notify_keys_deleted(keys, sizes)

    def set_backend_identity(self, name: str, shared: bool = False) -> None:
        super().set_backend_identity(get_type_name_for_config(self._config.inner_config), shared)

    def report_status(self) -> dict[str, Any]:
        with self._lock:
            inner, error = self._inner, self._error
        if inner is None:
            return {"is_healthy": False, "error": error}
        return inner.report_status()

    def close(self) -> None:
        """End the threads. What the inner adapter is doing has a few seconds to end."""
        self._closing.set()
        self._wake.notify()
        self._thread.join()
        with self._lock:
            inner, self._inner = self._inner, None
        if inner is not None:
            closing = threading.Thread(target=_close_quietly, args=(inner,), daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)
        self._wake.close()
        self._close_notifiers()

    # -- handing on ---------------------------------------------------------------------------

    def _submit(
        self,
        operation: Operation,
        keys: Sequence[ObjectKey],
        objects: Sequence[MemoryObj],
        start: Callable[[L2AdapterInterface, list[ObjectKey], list[MemoryObj]], int],
    ) -> int:
        with self._lock:
            task = _Task(self._new_id(), operation, list(keys), list(objects), time.monotonic())
            inner = self._inner
            batches = _by_length(objects) if objects else [range(len(keys))]
            for batch in batches if inner is not None else ():
                part = [keys[index] for index in batch]
                buffers = [objects[index] for index in batch] if objects else []
                try:
                    # The lock is held until it is known whose part it is: it may be done at once.
                    self._parts[operation, start(inner, part, buffers)] = (task, batch)
                    task.parts += 1
                except Exception as error:
                    logger.warning("VLCache: %s was not taken: %s", operation, error)
            if not task.parts:
                self._end(task)
        self._wake.notify()  # for its deadline
        return task.id

    def _end(self, task: _Task) -> None:
        if task.answered:
            return
        task.answered = True
        answer: Any
        if task.operation == "store":
            answer = L2StoreResult(len(task.done) == len(task.keys), task.num_bytes)
        else:
            answer = Bitmap(len(task.keys))
            for index in task.done:
                answer.set(index)
        self._answer(task.operation, task.id, answer)

    # -- the guard's own thread ----------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            poller = select.poll()
            poller.register(self._wake.fileno(), select.POLLIN)
            in_flight = False
            with self._lock:
                inner = self._inner
                if inner is not None:
                    for fd in _event_fds(inner):
                        poller.register(fd, select.POLLIN)
                    in_flight = bool(self._parts)
            for fd, _ in poller.poll(_CLOCK_MS if in_flight else _IDLE_MS):
                _consume(fd)
            try:
                if inner is not None:
                    self._collect(inner)
                    self._look_at_clock()
            except Exception:
                logger.exception("VLCache: the guard of an adapter failed")

    def _collect(self, inner: L2AdapterInterface) -> None:
        """Take what the inner adapter has done."""
        with self._lock:
            stored = inner.pop_completed_store_tasks()
            waiting = [name for name in self._parts if name[0] != "store"]
        for task_id, result in stored.items():
            self._end_part("store", task_id, result)
        for operation, task_id in waiting:
            query = (
                inner.query_lookup_and_lock_result
                if operation == "lookup"
                else inner.query_load_result
            )
            bitmap = query(task_id)
            if bitmap is not None:
                self._end_part(operation, task_id, bitmap)

    def _end_part(self, operation: Operation, task_id: int, result: Any) -> None:
        with self._lock:
            found = self._parts.pop((operation, task_id), None)
        if found is None:
            return
        task, batch = found
        if operation == "store":
            done = set(batch) if result.is_successful() else set()
        else:
            done = {batch[position] for position in result.get_indices_list()}
        if operation == "load":
            done = {i for i in done if self._is_good(task.keys[i], task.objects[i])}
        with self._lock:
            if task.answered:
                if operation == "lookup" and self._inner is not None:
                    self._inner.submit_unlock([task.keys[index] for index in done])
                return
            task.done |= done
            task.parts -= 1
            if operation == "store":
                task.num_bytes += result.bytes_transferred()
            if not task.parts:
                self._end(task)
            if operation == "store" and result.is_successful():
                self._rebuild_pause = _FIRST_PAUSE
            elif operation == "store":
                self._rebuild("a store failed")

    def _is_good(self, key: ObjectKey, loaded: MemoryObj) -> bool:
        if self._config.serde_config is not None:
            return True  # encoded: an encoding that is damaged does not decode
        try:
            check_object(key, torch.frombuffer(loaded.byte_array, dtype=torch.uint8))
        except RefusedObject as refusal:
            logger.warning("VLCache: refused what %s had: %s", self._backend_name, refusal)
            self.counters.refused[refusal.reason] = self.counters.refused.get(refusal.reason, 0) + 1
            return False
        return True

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        with self._lock:
            waiting = list({id(task): task for task, _ in self._parts.values()}.values())
            for task in waiting:
                age = now - task.since
                is_overdue = task.operation == "lookup" and age > self._config.lookup_seconds
                if is_overdue and not task.answered:
                    self.counters.overdue += 1
                    task.done.clear()
                    self._end(task)
                if age > self._config.transfer_seconds:
                    self._rebuild(f"a {task.operation} took more than {age:.0f} s")
                    return

    # -- making the inner adapter ---------------------------------------------------------------

    def _rebuild(self, reason: str) -> None:
        """Close the inner adapter and make another; called by the guard's own thread, which may
        otherwise wait for what the inner adapter signals."""
        inner, parts = self._inner, self._parts
        if inner is None or self._config.reconnects or time.monotonic() < self._rebuild_at:
            return
        self._rebuild_at = time.monotonic() + self._rebuild_pause
        self._rebuild_pause = min(2 * self._rebuild_pause, _LONGEST_PAUSE)
        self._inner, self._parts, self._error = None, {}, reason
        self.counters.rebuilt += 1
        logger.warning("VLCache: %s is made anew: %s", self._backend_name, reason)
        self._start_making(inner, parts)

    def _start_making(
        self,
        old: L2AdapterInterface | None,
        parts: dict[tuple[Operation, int], tuple[_Task, Sequence[int]]],
    ) -> None:
        threading.Thread(
            target=self._make_inner, args=(old, parts), name="vlcache-guard-make", daemon=True
        ).start()

    def _make_inner(
        self,
        old: L2AdapterInterface | None,
        parts: dict[tuple[Operation, int], tuple[_Task, Sequence[int]]],
    ) -> None:
        if old is not None:
            _close_quietly(old)
        # Only now is nobody left who could write to their memory.
        with self._lock:
            for task, _ in parts.values():
                task.done.clear()
                self._end(task)
        pause = _FIRST_PAUSE
        while not self._closing.is_set():
            try:
                inner = self._make()
            except Exception as error:
                with self._lock:
                    if self._error != str(error):
                        logger.error("VLCache: an L2 adapter is left alone: %s", error)
                    self._error = str(error)
                self._made.set()
                self._closing.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            inner.register_listener(_Bridge(self))
            with self._lock:
                if not self._closing.is_set():
                    self._inner, self._error = inner, None
                    self._made.set()
                    self._wake.notify()
                    return
            _close_quietly(inner)

    def _notify_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        if self._config.eviction_config is not None:  # else nobody asks for it
            with self._lock:
                # A new inner adapter does not know what the old one had counted.
                sizes = [
                    0 if key in self._stored_bytes else size
                    for key, size in zip(keys, sizes, strict=True)
                ]
                for key, size in zip(keys, sizes, strict=True):
                    self._stored_bytes.setdefault(key, size)
        super()._notify_keys_stored(keys, sizes)


def _by_length(objects: Sequence[MemoryObj]) -> list[list[int]]:
    """Indices of the objects, those of one length together."""
    batches: dict[int, list[int]] = {}
    for index, obj in enumerate(objects):
        batches.setdefault(obj.get_size(), []).append(index)
    return list(batches.values())


def _event_fds(adapter: L2AdapterInterface) -> tuple[int, int, int]:
    return (
        adapter.get_store_event_fd(),
        adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    )


def _consume(fd: int) -> None:
    with contextlib.suppress(OSError):  # nothing to be read after all
        consume_fd(fd)


def _close_quietly(adapter: L2AdapterInterface) -> None:
    try:
        adapter.close()
    except Exception:
        logger.exception("VLCache: an L2 adapter could not be closed")


def _create(
    config: L2AdapterConfigBase, l1_memory_desc: L1MemoryDesc | None = None
) -> L2AdapterInterface:
    assert isinstance(config, GuardedConfig)
    config.tier.adapter = adapter = GuardedAdapter(config, l1_memory_desc)
    return adapter


register_l2_adapter_type("vlcache_guarded", GuardedConfig)
register_l2_adapter_factory("vlcache_guarded", _create)

"""An L2 adapter around any other of LMCache's, for what LMCache leaves open.

* Every object is checked before LMCache may show it: a damaged one is a miss, and never resident.
* A lookup is over in time: LMCache asks all adapters, and waits for the slowest.
* An adapter whose server is away at start is made in a thread, again and again. Until then it has
  nothing, and takes nothing.
* A batch is split by length of the objects, which some adapters take for granted.
* Only what is not there is stored, at its second sight if so configured; what could not be loaded
  from there is stored anew.
* The adapter is left alone while its tier says so: see `Tier` and `Opening`.

Loads and stores are never given up while the adapter may still touch their memory; how much memory
stores may hold at a time is bounded. An adapter that neither connects again by itself nor notices
that nobody answers is closed, which ends its threads, and made anew when a store fails or anything
takes too long.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import (
    L2AdapterConfigBase,
    register_l2_adapter_type,
)
from lmcache.v1.distributed.l2_adapters.factory import (
    create_l2_adapter_from_registry,
    register_l2_adapter_factory,
)
from lmcache.v1.platform import consume_fd, create_event_notifier

from vlcache_connector.storage.answers import AnsweringAdapter, Operation, TellsLookupErrors
from vlcache_connector.storage.codec import RefusedObject
from vlcache_connector.storage.layout import check_object
from vlcache_connector.storage.maker import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    AdapterMaker,
    close_quietly,
)
from vlcache_connector.storage.tasks import Part, Task, parts_of
from vlcache_connector.storage.tier import Tier

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
_CLOCK_MS = 20
_IDLE_MS = 1000
_MAX_USELESS = 4096
_MAX_SEEN = 1 << 16


class GuardedConfig(L2AdapterConfigBase):
    """Of a guarded adapter.

    Args:
        inner: the adapter's own.
        tier: what the guard records in, and goes by.
        reconnects: the adapter bounds its own calls and connects again by itself. If not, it has to
            end its threads when it is closed.
        lookup_seconds: a lookup that takes longer found nothing.
        transfer_seconds: after anything that takes longer, an adapter that does not reconnect is
            made anew; a store for which nothing could be written yet fails.
        max_store_bytes: objects of more bytes than that are not on their way to it.
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
        max_store_bytes: int = 1 << 30,
        start_seconds: float = 5.0,
    ) -> None:
        self.inner_config = inner  # the name under which LMCache looks for it
        self.tier = tier
        self.reconnects = reconnects
        self.lookup_seconds = tier.lookup_seconds = lookup_seconds
        self.transfer_seconds = transfer_seconds
        self.max_store_bytes = max_store_bytes
        self.start_seconds = start_seconds
        self.eviction_config = inner.eviction_config

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> GuardedConfig:
        """Not for users, whose adapters are guarded anyway."""
        raise ValueError("type 'vlcache_guarded' can't be configured by itself")

    @classmethod
    def help(cls) -> str:
        return "made by VLCache around each adapter"


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
    """See the module. Called from LMCache's threads; has one of its own, one while the inner
    adapter is made, and one while objects are deleted to be stored anew.
    """

    def __init__(self, config: GuardedConfig, l1_memory_desc: L1MemoryDesc | None) -> None:
        capacity = getattr(config.inner_config, "max_capacity_gb", 0)
        super().__init__(max_capacity_bytes=int(capacity * (1 << 30)))
        self._config = config
        self._tier = config.tier
        self._wake = create_event_notifier()
        self._inner: L2AdapterInterface | None = None
        self._parts: dict[tuple[str, int], Part] = {}
        """Of the present inner adapter, by kind and its task id."""
        self._rebuild_at = 0.0
        self._rebuild_pause = FIRST_PAUSE
        self._storing_bytes = 0
        self._useless: dict[ObjectKey, None] = {}
        """They are there, and could not be loaded; the oldest first."""
        self._seen: dict[ObjectKey, None] = {}
        """They were offered for the first time; the oldest first."""
        self._stored_bytes: dict[ObjectKey, int] = {}
        self._closing = threading.Event()
        self._maker = AdapterMaker(
            partial(create_l2_adapter_from_registry, config.inner_config, l1_memory_desc),
            self._use,
        )
        self._maker.start()
        self._maker.wait(config.start_seconds)
        self._thread = threading.Thread(target=self._run, name="vlcache-guard", daemon=True)
        self._thread.start()

    # -- LMCache's interface ------------------------------------------------------------------

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        return self._submit("store", keys, objects)

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        return self._submit("lookup", keys, layouts=group_layout_descs)

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        return self._submit("load", keys, objects)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        with self._lock:
            if self._inner is not None:
                self._inner.submit_unlock(keys)

    def delete(self, keys: list[ObjectKey]) -> None:
        if not self._tier.can_store:
            return
        with self._lock:
            inner = self._inner
        if inner is not None:
            inner.delete(keys)
        with self._lock:
            sizes = [self._stored_bytes.pop(key, 0) for key in keys]
        # Whether they were still there or not: what others removed is gone, too.
        self._notify_keys_deleted(keys, sizes)

    def set_backend_identity(self, name: str, shared: bool = False) -> None:
        super().set_backend_identity(self._tier.name, shared)

    def report_status(self) -> dict[str, Any]:
        with self._lock:
            inner = self._inner
        if inner is None:
            return {"is_healthy": False, "error": self._maker.error}
        return inner.report_status()

    def close(self) -> None:
        """End the threads. What the inner adapter is doing has a few seconds to end."""
        self._closing.set()
        self._maker.stop()
        self._wake.notify()
        self._thread.join()
        with self._lock:
            inner, self._inner, self._parts = self._inner, None, {}
        if inner is not None:
            closing = threading.Thread(target=close_quietly, args=(inner,), daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)
        with self._lock:
            self._wake.close()
            self._close_notifiers()

    # -- asking the inner adapter ---------------------------------------------------------------

    def _submit(
        self,
        operation: Operation,
        keys: Sequence[ObjectKey],
        objects: Sequence[MemoryObj] = (),
        layouts: Mapping[int, MemoryLayoutDesc] | None = None,
    ) -> int:
        # The lock is held until it is known whose parts there are: they may be done at once.
        with self._lock:
            task = Task(self._new_id(), operation, list(keys), list(objects), layouts or {})
            if self._lets_through(task):
                task.attempt = task.opening(self._tier).begin(operation)
                if operation == "store":
                    self._storing_bytes += task.num_bytes
                    self._begin_store(task)
                else:
                    self._ask(operation, task, range(len(keys)))
            if not task.num_parts:
                self._end(task)
        self._wake.notify()  # for its deadline
        return task.id

    def _lets_through(self, task: Task) -> bool:
        tier, operation = self._tier, task.operation
        if not tier.is_open or (operation == "store" and not tier.can_store):
            return False
        if operation == "load":
            return True  # as its lookup was
        if self._inner is not None:
            num_bytes = self._storing_bytes + task.num_bytes
            if operation == "store" and num_bytes > self._config.max_store_bytes:
                tier.count("store.queue_full")
                return False
            if task.opening(tier).admit():
                return True
        tier.count(f"{operation}.skipped")
        return False

    def _begin_store(self, task: Task) -> None:
        """Ask what is there, to store the rest; and delete what is there of no use."""
        if self._tier.store_at_sight > 1 and not self._have_been_seen(task.keys):
            task.done = set(range(len(task.keys)))
            return
        useless = [index for index, key in enumerate(task.keys) if key in self._useless]
        others = [index for index, key in enumerate(task.keys) if key not in self._useless]
        self._ask("lookup", task, others)
        if useless:
            part = self._parts["delete", task.id] = Part(task, "delete", useless)
            task.num_parts += 1
            # Adapters wait for their server to delete.
            threading.Thread(
                target=self._delete, args=(self._inner, part), name="vlcache-delete", daemon=True
            ).start()

    def _have_been_seen(self, keys: Sequence[ObjectKey]) -> bool:
        """Whether all of the objects were offered before; from now on they were."""
        unseen = [key for key in keys if key not in self._seen]
        self._seen.update(dict.fromkeys(unseen))
        while len(self._seen) > _MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        return not unseen

    def _delete(self, inner: L2AdapterInterface, part: Part) -> None:
        try:
            inner.delete(part.keys)
        except Exception as error:
            logger.warning("VLCache: objects of no use could not be deleted: %s", error)
        with self._lock:
            # Not if it was closed, or is made anew.
            if self._parts.pop(("delete", part.task.id), None) is not None:
                self._end_part(part, set())
                self._wake.notify()

    def _ask(self, kind: Operation, task: Task, indices: Sequence[int]) -> None:
        inner = self._inner
        if inner is None:
            task.error = self._maker.error
            return
        for part in parts_of(task, kind, indices):
            try:
                if kind == "lookup":
                    part_id = inner.submit_lookup_and_lock_task(part.keys, dict(task.layouts))
                elif kind == "load":
                    part_id = inner.submit_load_task(part.keys, part.objects)
                else:
                    part_id = inner.submit_store_task(part.keys, part.objects)
            except Exception as error:
                logger.warning("VLCache: a %s was not taken: %s", kind, error)
                task.error = str(error)
            else:
                self._parts[kind, part_id] = part
                task.num_parts += 1

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
                    now = time.monotonic()
                    self._collect(inner)
                    self._look_at_clock(now)
            except Exception:
                logger.exception("VLCache: the guard of an adapter failed")

    def _collect(self, inner: L2AdapterInterface) -> None:
        """Take what the inner adapter has done."""
        results: list[tuple[tuple[str, int], Any]] = []
        with self._lock:
            for part_id, result in inner.pop_completed_store_tasks().items():
                results.append((("store", part_id), result))
            waiting = list(self._parts)
        for kind, part_id in waiting:
            if kind == "lookup":
                results.append(((kind, part_id), inner.query_lookup_and_lock_result(part_id)))
            elif kind == "load":
                results.append(((kind, part_id), inner.query_load_result(part_id)))
        for name, result in results:
            if result is None:
                continue
            with self._lock:
                # A new adapter begins to count its tasks anew.
                part = self._parts.pop(name, None) if self._inner is inner else None
            if part is None:
                continue
            if part.kind == "lookup" and isinstance(inner, TellsLookupErrors):
                part.task.error = inner.pop_lookup_error(name[1])
            self._take(part, result)

    def _take(self, part: Part, result: Any) -> None:
        """What the inner adapter has done of a part."""
        if part.kind == "store":
            done = set(part.indices) if result.is_successful() else set()
        else:
            done = {part.indices[position] for position in result.get_indices_list()}
        if part.kind == "load":
            done = {index for index in done if self._is_good(part.task, index)}
        with self._lock:
            if part.touches_memory:
                self._note_useless(part, done)
            if part.kind == "store":
                part.task.written_bytes += result.bytes_transferred()
            self._end_part(part, done)
            if part.kind == "store" and done:
                self._rebuild_pause = FIRST_PAUSE
            elif part.kind == "store":
                self._rebuild("a store failed")

    def _is_good(self, task: Task, index: int) -> bool:
        memory = torch.frombuffer(task.objects[index].byte_array, dtype=torch.uint8)
        try:
            check_object(task.keys[index], memory)
        except RefusedObject as refusal:
            logger.warning("VLCache: refused what %s had: %s", self._tier.name, refusal)
            self._tier.count(f"refused.{refusal.reason}")
            task.num_refused += 1
            task.error = f"refused: {refusal}"
            return False
        return True

    def _note_useless(self, part: Part, done: set[int]) -> None:
        """A lookup finds what is damaged or cut short: without this it would stay as it is."""
        for index, key in zip(part.indices, part.keys, strict=True):
            if index in done:
                self._useless.pop(key, None)
            elif part.kind == "load":
                self._useless[key] = None
        while len(self._useless) > _MAX_USELESS:
            del self._useless[next(iter(self._useless))]

    def _end_part(self, part: Part, done: set[int]) -> None:
        task = part.task
        is_stores = task.operation == "store"
        task.num_parts -= 1
        if part.kind == "lookup" and done and (is_stores or task.answered):
            self.submit_unlock([task.keys[index] for index in done])
        if task.answered:
            return
        task.done |= done
        if is_stores and not part.touches_memory:
            self._ask("store", task, [index for index in part.indices if index not in done])
        if not task.num_parts:
            self._end(task)

    def _end(self, task: Task) -> None:
        """Answer LMCache, which may use the objects' memory from then on."""
        if task.answered:
            return
        task.answered = True
        task.record(self._tier)
        if task.operation == "store" and task.attempt is not None:
            self._storing_bytes -= task.num_bytes
        task.objects = ()
        self._answer(task.operation, task.id, task.answer())

    def _look_at_clock(self, now: float) -> None:
        """See to what had not ended at a time."""
        with self._lock:
            self._tier.reads.check()
            self._tier.stores.check()
            parts = list(self._parts.values())
            touching = {part.task for part in parts if part.touches_memory}
            for task in dict.fromkeys(part.task for part in parts):
                age = now - task.since
                is_lookup = task.operation == "lookup"
                seconds = (
                    self._config.lookup_seconds if is_lookup else self._config.transfer_seconds
                )
                if age > seconds and task not in touching and not task.answered:
                    if is_lookup:
                        self._tier.count("lookup.late")
                    task.done.clear()
                    task.error = f"no answer for {age:.1f} s"
                    self._end(task)
                if age > self._config.transfer_seconds:
                    self._rebuild(f"a {task.operation} took more than {age:.0f} s")

    # -- making the inner adapter ---------------------------------------------------------------

    def _use(self, inner: L2AdapterInterface) -> bool:
        inner.register_listener(_Bridge(self))
        with self._lock:
            if self._closing.is_set():
                return False
            self._inner = inner
            self._wake.notify()
            return True

    def _rebuild(self, reason: str) -> None:
        """Close the inner adapter and make another; called by the guard's own thread, which may
        otherwise wait for what the inner adapter signals."""
        inner, parts = self._inner, self._parts
        if inner is None or self._config.reconnects or time.monotonic() < self._rebuild_at:
            return
        self._rebuild_at = time.monotonic() + self._rebuild_pause
        self._rebuild_pause = min(2 * self._rebuild_pause, LONGEST_PAUSE)
        self._inner, self._parts, self._maker.error = None, {}, reason
        self._tier.count("rebuilt")
        logger.warning("VLCache: %s is made anew: %s", self._tier.name, reason)
        # Only when it is closed is nobody left who could touch their memory.
        self._maker.start(inner, lambda: self._fail(parts.values(), reason))

    def _fail(self, parts: Iterable[Part], reason: str) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            for part in parts:
                part.task.done.clear()
                part.task.error = reason
                self._end(part.task)

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


def _event_fds(adapter: L2AdapterInterface) -> tuple[int, int, int]:
    return (
        adapter.get_store_event_fd(),
        adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    )


def _consume(fd: int) -> None:
    with contextlib.suppress(OSError):  # nothing to be read after all
        consume_fd(fd)


def _create(
    config: L2AdapterConfigBase, l1_memory_desc: L1MemoryDesc | None = None
) -> L2AdapterInterface:
    assert isinstance(config, GuardedConfig)
    config.tier.adapter = adapter = GuardedAdapter(config, l1_memory_desc)
    return adapter


register_l2_adapter_type("vlcache_guarded", GuardedConfig)
register_l2_adapter_factory("vlcache_guarded", _create)

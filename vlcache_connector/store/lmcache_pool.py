"""LMCache's storage manager as a plain pool of pinned host memory.

LMCache is imported here and nowhere else, on first use: it takes seconds, reads its log level and
its usage-tracking switch from the environment, and changes the environment in turn.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.memory_management import MemoryObj
    from lmcache.v1.storage_backend.storage_manager import StorageManager

T = TypeVar("T")

PAGE_BYTES = 4096
"""Allocations take a multiple of it."""

_ENV_DEFAULTS = {
    "LMCACHE_TRACK_USAGE": "false",
    # A full pool is business as usual here, and LMCache warns about every failed allocation.
    "LMCACHE_LOG_LEVEL": "ERROR",
}
_PROMETHEUS_DIR = "PROMETHEUS_MULTIPROC_DIR"


class LMCachePool:
    """Objects of raw bytes in LMCache's local CPU tier, found by 64-bit ids.

    LMCache evicts only what nobody else refers to, so the pool refers to every object it stores.
    (LMCache's own pins do not do: a monitor thread, one for all engines of the process, breaks
    them after a timeout.)
    """

    def __init__(
        self,
        *,
        model_name: str,
        rank: int,
        world_size: int,
        pool_bytes: int,
        kv_shape: tuple[int, int, int, int, int],
        kv_dtype: torch.dtype,
    ) -> None:
        """Allocate and touch the whole pool, pinned if there is an accelerator.

        Args:
            model_name: label of LMCache's keys and metrics.
            rank: this worker's index.
            world_size: number of workers.
            pool_bytes: size of the pool in bytes.
            kv_shape: `(layers, 2, tokens, kv_heads, head_dim)`, for LMCache's own estimates.
            kv_dtype: dtype of KV, likewise.

        Raises:
            MemoryError: the pool cannot be allocated; names the setting `cpu_bytes`.
        """
        # "@" separates the parts of a key's text form, which LMCache's other tiers use.
        self._owner = (model_name.replace("@", "_"), world_size, rank)
        self._held: dict[int, MemoryObj] = {}
        self._open: StorageManager | None = _start(
            model_name, rank, world_size, pool_bytes, kv_shape, kv_dtype
        )

    @property
    def _manager(self) -> StorageManager:
        self.check_open()
        assert self._open is not None
        return self._open

    def check_open(self) -> None:
        """Raise RuntimeError once the pool is closed."""
        if self._open is None:
            raise RuntimeError("the segment store is closed")

    @property
    def allocated_bytes(self) -> int:
        """Bytes taken, alignment included."""
        allocator = self._manager.allocator_backend.get_memory_allocator()
        return allocator.pin_allocator.total_allocated_size

    def allocate(self, sizes: Sequence[int]) -> list[MemoryObj] | None:
        """One uint8 object of each size in bytes, or None and nothing if one does not fit.

        Evicts nothing and waits for nothing. The caller gets a reference to each object.
        """
        from lmcache.v1.memory_management import MemoryFormat

        objects: list[MemoryObj] = []
        for size in sizes:
            obj = self._manager.allocate(
                torch.Size([size]),
                torch.uint8,
                # A format with tokens in dimension 0: LMCache asks 1-D objects for their tokens.
                fmt=MemoryFormat.EC_TD,
                eviction=False,
                busy_loop=False,
            )
            if obj is None:
                release(objects)
                return None
            objects.append(obj)
        return objects

    def put(self, ids: Sequence[int], objects: Sequence[MemoryObj]) -> None:
        """Store objects under ids that are free; takes over the caller's references."""
        for obj in objects:
            obj.ref_count_up()  # the pool's own; `batched_put` consumes the caller's
        self._held.update(zip(ids, objects, strict=True))
        self._manager.batched_put([self._key(id_) for id_ in ids], list(objects))

    def get(self, id_: int) -> MemoryObj | None:
        """The object stored under the id, with a reference for the caller, or None."""
        # What the pool refers to LMCache has, too; asking it costs ten times as much.
        obj = self._held.get(id_)
        if obj is not None:
            obj.ref_count_up()
        return obj

    def contains(self, id_: int) -> bool:
        """Whether an object is stored under the id."""
        return self._manager.contains(self._key(id_)) is not None

    def remove(self, ids: Iterable[int]) -> None:
        """Forget stored objects; their memory is free once nobody refers to them."""
        for id_ in ids:
            self._manager.remove(self._key(id_))
            self._held.pop(id_).ref_count_down()

    def check_integrity(self, borrowed: Iterable[MemoryObj]) -> None:
        """Check the pool against LMCache's books.

        Args:
            borrowed: objects that callers hold references to, once for each reference.

        Raises:
            AssertionError: with what is wrong.
        """
        references = Counter(2 * list(self._held.values()))  # LMCache's and the pool's
        references.update(borrowed)
        backend = self._manager.local_cpu_backend
        stored = {self._key(id_) for id_ in self._held}
        require(set(backend.get_keys()) == stored, "LMCache's keys are not the pool's")
        for id_, obj in self._held.items():
            require(backend.hot_cache[self._key(id_)] is obj, f"another object under {id_:#x}")
        for obj, count in references.items():
            where = f"object at {obj.meta.address}"
            require(obj.is_valid(), f"{where} was freed while in use")
            actual = obj.get_ref_count()
            require(actual == count, f"{where} has {actual} references, not {count}")
        taken = sum(obj.get_physical_size() for obj in references)
        require(self.allocated_bytes == taken, f"{self.allocated_bytes} bytes taken, not {taken}")
        require(self._manager.memcheck(), "LMCache's allocator is inconsistent")

    def close(self) -> None:
        """Free the memory, whoever refers to it, and end LMCache's threads. Idempotent."""
        if self._open is not None:
            self.remove(list(self._held))
            self._open.close()
            self._open = None

    def _key(self, id_: int) -> CacheEngineKey:
        from lmcache.utils import CacheEngineKey

        return CacheEngineKey(*self._owner, chunk_hash=id_, dtype=torch.uint8, request_configs=None)


def release(objects: Iterable[MemoryObj]) -> None:
    """Give back one reference to each object."""
    for obj in objects:
        obj.ref_count_down()


def require(condition: bool, message: str) -> None:
    """Raise AssertionError, under `python -O` too."""
    if not condition:
        raise AssertionError(message)


def _start(
    model_name: str,
    rank: int,
    world_size: int,
    pool_bytes: int,
    kv_shape: tuple[int, int, int, int, int],
    kv_dtype: torch.dtype,
) -> StorageManager:
    """A storage manager of one tier: no disk, remote, controller or server; see `LMCachePool`."""
    for name, value in _ENV_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.event_manager import EventManager
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.storage_manager import StorageManager

    config = LMCacheEngineConfig.from_defaults(
        local_cpu=True,
        max_local_cpu_size=pool_bytes / 2**30,  # a division by 2**30 loses no bits
        cache_policy="FIFO",  # LMCache's LRU keeps a record of every key it ever saw
    )
    metadata = LMCacheMetadata(
        model_name=model_name,
        world_size=world_size,
        local_world_size=world_size,
        worker_id=rank,
        local_worker_id=rank,
        kv_dtype=kv_dtype,
        kv_shape=kv_shape,
        role="worker",
    )
    prometheus_dir = os.environ.get(_PROMETHEUS_DIR)
    try:
        return _in_daemon_thread(lambda: StorageManager(config, metadata, EventManager()))
    except (RuntimeError, MemoryError) as error:
        raise MemoryError(
            f"cpu_bytes: a host memory pool of {pool_bytes} bytes could not be allocated; choose "
            f"less than the machine has free ({error})"
        ) from error
    finally:
        # LMCache sets it, and vLLM would then serve its metrics from LMCache's empty directory.
        if prometheus_dir is None:
            os.environ.pop(_PROMETHEUS_DIR, None)


def _in_daemon_thread(build: Callable[[], T]) -> T:
    """Run `build` so that the threads it starts are daemons, as threads inherit that.

    LMCache's are not, so a process that ends without closing its storage manager would hang.
    """
    set_device = same_device()
    result: Future[T] = Future()

    def run() -> None:
        try:
            set_device()
            result.set_result(build())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="vlcache-store-start", daemon=True).start()
    return result.result()


def same_device() -> Callable[[], None]:
    """What a new thread has to call to use the device that this one uses.

    A thread's default is device 0, whatever this worker uses: its first call there would take
    memory of a context on it.
    """
    if not torch.accelerator.is_available():
        return lambda: None
    return functools.partial(
        torch.accelerator.set_device_index, torch.accelerator.current_device_index()
    )

"""One of LMCache's L2 adapters by itself, called and waited for: for commands, not for serving."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from torch import Tensor

from vlcache_connector.storage.answers import Patience, load_and_wait, store_and_wait, wait_for
from vlcache_connector.storage.memory import PAGE, aligned, memory_object

if TYPE_CHECKING:
    from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase


class BlockingAdapter:
    """An adapter, and the memory that it may read and write. A context manager.

    Every call raises TimeoutError where the answer takes too long; the adapter may be at the memory
    still, and is then only to be closed.

    Attributes:
        memory: uint8 `[num_bytes]`, page-aligned host memory; objects lie in it.
    """

    def __init__(self, config: L2AdapterConfigBase, num_bytes: int, seconds: float) -> None:
        """Make the adapter, which raises what it likes where that fails.

        Args:
            config: the adapter's own.
            num_bytes: of memory.
            seconds: longest that a call may take.
        """
        self.memory = aligned(num_bytes)
        self._seconds = seconds
        description = L1MemoryDesc(self.memory.data_ptr(), num_bytes, PAGE)
        self._adapter = create_l2_adapter_from_registry(config, description)

    def store(self, objects: Mapping[ObjectKey, Tensor]) -> bool:
        """Whether all of the objects, views of `memory`, are stored now."""
        memory = [memory_object(view) for view in objects.values()]
        result = store_and_wait(self._adapter, list(objects), memory, self._patience())
        return bool(result.is_successful())

    def look_up(self, keys: Sequence[ObjectKey]) -> bool:
        """Whether all of the objects are there."""
        adapter = self._adapter
        layout = MemoryLayoutDesc([torch.Size([1])], [torch.uint8])
        layouts = {key.object_group_id: layout for key in keys}
        task = adapter.submit_lookup_and_lock_task(list(keys), layouts)
        found = wait_for(
            adapter.get_lookup_and_lock_event_fd(),
            lambda: adapter.query_lookup_and_lock_result(task),
            self._patience(),
        ).get_indices_list()
        adapter.submit_unlock([keys[index] for index in found])
        return len(found) == len(keys)

    def load(self, objects: Mapping[ObjectKey, Tensor]) -> bool:
        """Read objects into views of `memory`; whether all of them came."""
        memory = [memory_object(view) for view in objects.values()]
        loaded = load_and_wait(self._adapter, list(objects), memory, self._patience())
        return len(loaded.get_indices_list()) == len(objects)

    def delete(self, keys: Sequence[ObjectKey]) -> None:
        """Remove objects, whether they are there or not."""
        self._adapter.delete(list(keys))

    def close(self) -> None:
        """End the adapter."""
        self._adapter.close()

    def __enter__(self) -> BlockingAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _patience(self) -> Patience:
        until = time.monotonic() + self._seconds

        def patience() -> float:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer within {self._seconds:.0f} s")
            return left

        return patience

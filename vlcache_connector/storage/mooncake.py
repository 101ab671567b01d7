"""Mooncake Store as an L2 adapter, over its Python client.

LMCache's own `mooncake_store` adapter needs a native module that its wheel does not have. This one
is loaded through LMCache's adapter type "plugin". Objects go from and to LMCache's host memory
without a copy, as all of it is registered with Mooncake.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import urlopen

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult

from vlcache_connector.storage.answers import AnsweringAdapter, Operation

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

logger = logging.getLogger(__name__)

_FOUND = 1
_PROBE_SECONDS = 2.0

_DEFAULTS: dict[str, Any] = {
    "local_hostname": "127.0.0.1",
    "metadata_server": None,
    "global_segment_size": 0,
    "local_buffer_size": 16 << 20,
    "protocol": "tcp",
    "rdma_devices": "",
    "master_server_address": None,
    "num_workers": 4,
}
"""Parameters, named as Mooncake names them; None: has to be given."""


class MooncakeAdapter(AnsweringAdapter):
    """An L2 adapter over a Mooncake client.

    Args:
        params: see `_DEFAULTS`; `global_segment_size` is how many bytes this node contributes.
        l1_memory_desc: LMCache's host memory.

    Raises:
        ValueError: a parameter is unknown or missing.
        RuntimeError: Mooncake refused.
    """

    def __init__(
        self, params: Mapping[str, Any], *, l1_memory_desc: L1MemoryDesc | None = None
    ) -> None:
        super().__init__()
        self._lookup_errors: dict[int, str] = {}
        values = _checked(params)
        from mooncake.store import MooncakeDistributedStore

        if l1_memory_desc is None:
            raise RuntimeError("Mooncake needs LMCache's host memory in one piece")
        # `setup` waits for both of them without an end, and stops all of Python meanwhile.
        for name in ("metadata_server", "master_server_address"):
            _require_answer(name, values[name])
        self._client = MooncakeDistributedStore()
        code = self._client.setup(
            values["local_hostname"],
            values["metadata_server"],
            values["global_segment_size"],
            values["local_buffer_size"],
            values["protocol"],
            values["rdma_devices"],
            values["master_server_address"],
        )
        if code:
            raise RuntimeError(f"Mooncake's setup failed with code {code}")
        code = self._client.register_buffer(l1_memory_desc.ptr, l1_memory_desc.size)
        if code:
            self._client.close()
            raise RuntimeError(f"Mooncake did not take host memory: code {code}")
        self._workers = ThreadPoolExecutor(values["num_workers"], "vlcache-mooncake")

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        def store() -> L2StoreResult:
            sizes = [obj.get_size() for obj in objects]
            codes = self._client.batch_put_from(_names(keys), _addresses(objects), sizes)
            stored = [index for index, code in enumerate(codes) if code == 0]
            stored_bytes = [sizes[index] for index in stored]
            if stored:
                self._notify_keys_stored([keys[index] for index in stored], stored_bytes)
            return L2StoreResult(len(stored) == len(keys), sum(stored_bytes))

        return self._submit("store", store, L2StoreResult(False, 0))

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        def look_up() -> Bitmap:
            codes = self._client.batch_is_exist(_names(keys))
            if min(codes) < 0:
                raise RuntimeError(f"Mooncake could not look it up: code {min(codes)}")
            return _bitmap([code == _FOUND for code in codes])

        return self._submit("lookup", look_up, Bitmap(len(keys)))

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        def load() -> Bitmap:
            sizes = [obj.get_size() for obj in objects]
            read = self._client.batch_get_into(_names(keys), _addresses(objects), sizes)
            return _bitmap([got == size for got, size in zip(read, sizes, strict=True)])

        return self._submit("load", load, Bitmap(len(keys)))

    def pop_lookup_error(self, task_id: int) -> str | None:
        return self._lookup_errors.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        pass  # Mooncake's own leases protect what was looked up

    def delete(self, keys: list[ObjectKey]) -> None:
        gone = [key for key in keys if self._client.remove(_name(key)) == 0]
        self._notify_keys_deleted(gone, [0] * len(gone))

    def report_status(self) -> dict[str, Any]:
        return {"is_healthy": self._client.health_check() == 0, "type": "mooncake"}

    def close(self) -> None:
        """Waits for what the client is doing, which has LMCache's memory until then."""
        self._workers.shutdown()
        self._client.close()
        self._close_notifiers()

    def _submit(self, operation: Operation, work: Callable[[], Any], failed: Any) -> int:
        task_id = self._new_id()

        def run() -> None:
            try:
                answer = work()
            except Exception as error:
                logger.warning("Mooncake: a %s failed: %s", operation, error)
                if operation == "lookup":
                    self._lookup_errors[task_id] = str(error)
                answer = failed
            self._answer(operation, task_id, answer)

        self._workers.submit(run)
        return task_id


def _checked(params: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in params.items():
        if name not in _DEFAULTS:
            allowed = ", ".join(_DEFAULTS)
            raise ValueError(f"adapter_params.{name}={value!r}: the parameters are {allowed}")
    values = {**_DEFAULTS, **params}
    for name, value in values.items():
        if value is None:
            raise ValueError(f"adapter_params.{name} is missing: Mooncake can't do without it")
    return values


def _require_answer(name: str, address: str) -> None:
    """Raise RuntimeError if nobody answers there."""
    try:
        if address.startswith("http"):
            with contextlib.suppress(HTTPError):  # an answer, too
                urlopen(address, timeout=_PROBE_SECONDS).close()
        else:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), _PROBE_SECONDS).close()
    except OSError as error:
        raise RuntimeError(f"{name}={address!r} does not answer: {error}") from error


def _name(key: ObjectKey) -> str:
    hashed, rank, group = key.chunk_hash.hex(), f"{key.kv_rank:08x}", f"{key.object_group_id:x}"
    return "@".join((key.model_name, rank, group, hashed, key.cache_salt))


def _names(keys: Sequence[ObjectKey]) -> list[str]:
    return [_name(key) for key in keys]


def _addresses(objects: Sequence[MemoryObj]) -> list[int]:
    return [obj.data_ptr for obj in objects]


def _bitmap(bits: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(bits))
    for index, bit in enumerate(bits):
        if bit:
            bitmap.set(index)
    return bitmap

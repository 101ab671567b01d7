"""Mooncake Store as an L2 adapter, over its Python client.

LMCache's own `mooncake_store` adapter needs a native module that its wheel does not have. This one
is registered as "mooncake". Objects go from and to LMCache's host memory without a copy, as all of
it is registered with Mooncake.

LMCache seam: `register_l2_adapter_type` and `register_l2_adapter_factory`
(`lmcache/v1/distributed/l2_adapters/config.py`, `factory.py`).
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError
from urllib.request import urlopen

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.config import (
    L2AdapterConfigBase,
    register_l2_adapter_type,
)
from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from vlcache_connector.config import Bytes
from vlcache_connector.storage.answers import AnsweringAdapter, Operation

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

logger = logging.getLogger(__name__)

_FOUND = 1
_PROBE_SECONDS = 2.0

_NO_SERVER = "P2PHANDSHAKE"
"""Mooncake's nodes then need no metadata server."""


@dataclass(config=ConfigDict(strict=True), kw_only=True)
class MooncakeConfig(L2AdapterConfigBase):
    """Keys of an adapter of type "mooncake", named as Mooncake names them.

    Attributes:
        metadata_server: `http://host:port/metadata`, or "P2PHANDSHAKE".
        master_server_addr: `host:port`.
        local_hostname: under which other nodes reach this one.
        global_segment_size: bytes that this node contributes.
        local_buffer_size: bytes of Mooncake's own, for what is no host memory of LMCache's.
        protocol: "tcp" or "rdma".
        rdma_devices: those that are used, with commas between them.
        num_workers: threads.
    """

    metadata_server: str = Field(pattern=f"^(https?://.+|{_NO_SERVER})$")
    master_server_addr: str = Field(pattern=r"^[^/@]+:[0-9]+$")
    local_hostname: str = Field(default="127.0.0.1", min_length=1)
    global_segment_size: Bytes = Field(default=0, ge=0)
    local_buffer_size: Bytes = Field(default=16 << 20, ge=0)
    protocol: Literal["tcp", "rdma"] = "tcp"
    rdma_devices: str = ""
    num_workers: int = Field(default=4, gt=0)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> MooncakeConfig:
        """Check the keys; those that all adapters have are not looked at.

        Raises:
            ValueError: a value is not allowed.
        """
        return cls(**{key: d[key] for key in d if key in cls.__annotations__})

    @classmethod
    def help(cls) -> str:
        return str(cls.__doc__)


class MooncakeAdapter(AnsweringAdapter):
    """An L2 adapter over a Mooncake client.

    Args:
        config: see there.
        l1_memory_desc: LMCache's host memory.

    Raises:
        RuntimeError: a server does not answer, or Mooncake refused.
    """

    def __init__(self, config: MooncakeConfig, l1_memory_desc: L1MemoryDesc | None) -> None:
        super().__init__()
        self._lookup_errors: dict[int, str] = {}
        from mooncake.store import MooncakeDistributedStore

        if l1_memory_desc is None:
            raise RuntimeError("Mooncake needs LMCache's host memory in one piece")
        # `setup` waits for both of them without an end, and stops all of Python meanwhile.
        for name in ("metadata_server", "master_server_addr"):
            _require_answer(name, getattr(config, name))
        self._client = MooncakeDistributedStore()
        code = self._client.setup(
            config.local_hostname,
            config.metadata_server,
            config.global_segment_size,
            config.local_buffer_size,
            config.protocol,
            config.rdma_devices,
            config.master_server_addr,
        )
        if code:
            raise RuntimeError(f"Mooncake's setup failed with code {code}")
        code = self._client.register_buffer(l1_memory_desc.ptr, l1_memory_desc.size)
        if code:
            self._client.close()
            raise RuntimeError(f"Mooncake did not take host memory: code {code}")
        self._workers = ThreadPoolExecutor(config.num_workers, "vlcache-mooncake")

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


def _require_answer(name: str, address: str) -> None:
    """Raise RuntimeError if nobody answers there."""
    if address == _NO_SERVER:
        return
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


def _create(
    config: L2AdapterConfigBase, l1_memory_desc: L1MemoryDesc | None = None
) -> MooncakeAdapter:
    assert isinstance(config, MooncakeConfig)
    return MooncakeAdapter(config, l1_memory_desc)


register_l2_adapter_type("mooncake", MooncakeConfig)
register_l2_adapter_factory("mooncake", _create)

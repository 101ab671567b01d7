"""Encryption at rest: an L2 adapter around any other, which stores objects as LMCache's `aesgcm`
serde encodes them.

It lies inside of the guard, which checks decrypted objects as it does all others: GCM's tag tells
damage, but not that an object lies under the name of another. LMCache's own wrapper lies outside,
takes its memory from the pool that segments are kept in, and stores nothing of a batch of objects
of several lengths.

Encoded objects lie in memory of their own: two buffers per adapter, one for loads and one for
stores, of which only as much is touched as the objects are long.

LMCache seam: `lmcache/v1/distributed/serde/aesgcm.py`.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase, register_l2_adapter_type
from lmcache.v1.distributed.l2_adapters.factory import (
    create_l2_adapter_from_registry,
    register_l2_adapter_factory,
)
from lmcache.v1.distributed.serde.aesgcm import AesGcmDeserializer, AesGcmSerializer
from lmcache.v1.distributed.serde.key_provider import HkdfKeyProvider

from vlcache_connector.config import ConfigError
from vlcache_connector.storage.answers import (
    AnsweringAdapter,
    TellsLookupErrors,
    load_and_wait,
    store_and_wait,
)
from vlcache_connector.storage.layout import LARGEST_OBJECT
from vlcache_connector.storage.memory import PAGE, aligned, memory_object

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.internal_api import L2AdapterListener
    from lmcache.v1.memory_management import MemoryObj

logger = logging.getLogger(__name__)

_MIN_KEY_BYTES = 32
_DERIVED_BYTES = 32  # AES-256
_PURPOSE = b"vlcache-l2-aesgcm-v1"
_BATCH_BYTES = 64 << 20
_CLOCK_SECONDS = 0.2


@dataclass(frozen=True)
class EncryptionKey:
    """What the keys that objects are encrypted with are derived from.

    Attributes:
        secret: content of the file.
    """

    secret: bytes = field(repr=False)

    @classmethod
    def read(cls, path: str) -> EncryptionKey:
        """Read `encryption_key_file`.

        Raises:
            ConfigError: it can't be read, or is too short.
        """
        where = f"kv_connector_extra_config: encryption_key_file={path!r}"
        remedy = f"make one: head -c {_MIN_KEY_BYTES} /dev/urandom > FILE"
        try:
            secret = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}; name a readable file") from None
        if len(secret) < _MIN_KEY_BYTES:
            raise ConfigError(
                f"{where}: the file has {len(secret)} bytes, at least {_MIN_KEY_BYTES} random ones "
                f"are needed; {remedy}"
            )
        return cls(secret)

    @property
    def id(self) -> str:
        """Tells it from others and gives nothing away; hexadecimal."""
        return hashlib.sha256(b"vlcache-key-id" + self.secret).hexdigest()


class EncryptedConfig(L2AdapterConfigBase):
    """Of an adapter that stores encrypted objects.

    Args:
        inner: of the adapter that they are stored by.
        key: for all of them.
    """

    def __init__(self, inner: L2AdapterConfigBase, key: EncryptionKey) -> None:
        self.inner_config = inner  # the name under which LMCache looks for it
        self.key = key
        self.eviction_config = inner.eviction_config
        self.max_capacity_gb = getattr(inner, "max_capacity_gb", 0)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> EncryptedConfig:
        """Not for users, who name the file of a key."""
        raise ValueError("type 'vlcache_encrypted' can't be configured by itself")

    @classmethod
    def help(cls) -> str:
        return "made by VLCache around each adapter where encryption_key_file is set"


class EncryptedAdapter(AnsweringAdapter):
    """See the module. One thread encrypts and stores, one loads and decrypts; lookups and the rest
    are the inner adapter's.
    """

    def __init__(self, config: EncryptedConfig) -> None:
        super().__init__()
        keys = HkdfKeyProvider(config.key.secret, _DERIVED_BYTES, _PURPOSE)
        self._serializer = AesGcmSerializer(keys)
        self._deserializer = AesGcmDeserializer(keys)
        buffer_bytes = self._encoded_bytes(LARGEST_OBJECT)
        memory = aligned(2 * buffer_bytes)
        self._load_buffer, self._store_buffer = memory.split(buffer_bytes)
        self._inner = create_l2_adapter_from_registry(
            config.inner_config, L1MemoryDesc(memory.data_ptr(), memory.numel(), PAGE)
        )
        self._closing = threading.Event()
        self._loader = ThreadPoolExecutor(1, "vlcache-decrypt")
        self._storer = ThreadPoolExecutor(1, "vlcache-encrypt")

    # -- the inner adapter's --------------------------------------------------------------------

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._inner.get_lookup_and_lock_event_fd()

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        return self._inner.submit_lookup_and_lock_task(keys, group_layout_descs)

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._inner.query_lookup_and_lock_result(task_id)

    def pop_lookup_error(self, task_id: int) -> str | None:
        if isinstance(self._inner, TellsLookupErrors):
            return self._inner.pop_lookup_error(task_id)
        return None

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        self._inner.submit_unlock(keys)

    def delete(self, keys: list[ObjectKey]) -> None:
        self._inner.delete(keys)

    def register_listener(self, listener: L2AdapterListener) -> None:
        self._inner.register_listener(listener)

    def report_status(self) -> dict[str, Any]:
        return self._inner.report_status()

    # -- encrypted ------------------------------------------------------------------------------

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        task_id = self._new_id()

        def store() -> None:
            num_bytes = 0
            is_whole = True
            try:
                for indices, views in self._batches(objects, self._store_buffer):
                    batch = [keys[index] for index in indices]
                    for index, view in zip(indices, views, strict=True):
                        self._serializer.serialize(objects[index], view, keys[index])
                    result = store_and_wait(self._inner, batch, views, self._patience)
                    num_bytes += result.bytes_transferred()
                    is_whole &= result.is_successful()
            except Exception as error:
                logger.warning("VLCache: encrypted objects were not stored: %s", error)
                is_whole = False
            self._answer("store", task_id, L2StoreResult(is_whole, num_bytes))

        self._storer.submit(store)
        return task_id

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        task_id = self._new_id()

        def load() -> None:
            bitmap = Bitmap(len(keys))
            try:
                for indices, views in self._batches(objects, self._load_buffer):
                    batch = [keys[index] for index in indices]
                    loaded = load_and_wait(self._inner, batch, views, self._patience)
                    for position in loaded.get_indices_list():
                        index = indices[position]
                        if self._decrypts(views[position], objects[index], keys[index]):
                            bitmap.set(index)
            except Exception as error:
                logger.warning("VLCache: encrypted objects were not loaded: %s", error)
            self._answer("load", task_id, bitmap)

        self._loader.submit(load)
        return task_id

    def close(self) -> None:
        """End the threads, which do not wait for the inner adapter any more, and then that."""
        self._closing.set()
        for executor in (self._storer, self._loader):
            executor.shutdown(cancel_futures=True)
        self._inner.close()
        self._close_notifiers()

    def _decrypts(self, source: MemoryObj, target: MemoryObj, key: ObjectKey) -> bool:
        try:
            self._deserializer.deserialize(source, target, key)
        except Exception as error:  # damaged: cryptography's InvalidTag says nothing
            logger.warning("VLCache: an encrypted object is refused: %s", error or "damaged")
            return False
        return True

    def _encoded_bytes(self, num_bytes: int) -> int:
        layout = MemoryLayoutDesc([torch.Size([num_bytes])], [torch.uint8])
        return self._serializer.estimate_serialized_size(layout)

    def _batches(
        self, objects: Sequence[MemoryObj], buffer: torch.Tensor
    ) -> Iterator[tuple[list[int], list[MemoryObj]]]:
        """Indices of objects, and where in the buffer they go encrypted: as many as are not too
        much at once, at least one."""
        indices: list[int] = []
        views: list[MemoryObj] = []
        used = 0
        for index, obj in enumerate(objects):
            num_bytes = self._encoded_bytes(obj.get_size())
            if indices and used + num_bytes > _BATCH_BYTES:
                yield indices, views
                indices, views, used = [], [], 0
            indices.append(index)
            views.append(memory_object(buffer[used : used + num_bytes]))
            used += -(-num_bytes // PAGE) * PAGE
        if indices:
            yield indices, views

    def _patience(self) -> float:
        if self._closing.is_set():
            raise RuntimeError("the adapter was closed")
        return _CLOCK_SECONDS


def _create(
    config: L2AdapterConfigBase, l1_memory_desc: L1MemoryDesc | None = None
) -> EncryptedAdapter:
    assert isinstance(config, EncryptedConfig)
    return EncryptedAdapter(config)


register_l2_adapter_type("vlcache_encrypted", EncryptedConfig)
register_l2_adapter_factory("vlcache_encrypted", _create)

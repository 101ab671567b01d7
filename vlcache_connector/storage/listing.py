"""What lies below host memory: segments listed, looked at, checked and removed.

LMCache's adapters list nothing, so files and keys are read from outside. Mooncake's can't be: its
clients are not told what there is. Nothing here knows a model: objects are checked against their
keys and what they say about themselves.
"""

from __future__ import annotations

import os
import stat
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import redis
import torch
from redis.backoff import NoBackoff
from redis.retry import Retry

from vlcache_connector.storage import codec
from vlcache_connector.storage.header import FORMAT_VERSION, ObjectHeader
from vlcache_connector.storage.layout import check_object
from vlcache_connector.storage.names import (
    RankSegment,
    StoredObject,
    read_file_name,
    read_key,
)
from vlcache_connector.storage.redis_url import Credentials, RedisAddress

_HEADER_BYTES = 1 << 16  # of most segments: 12 bytes a token, and a little more
_BATCH = 512
_CONNECT_SECONDS = 5.0
_CALL_SECONDS = 60.0


class ListedObject(NamedTuple):
    """A stored object.

    Attributes:
        name: its file's, or its key.
        stored: what the name says.
        num_bytes: its length.
        age_seconds: since it was written; None where that is not known.
        ttl_seconds: until it is dropped; None where that is not known, or never.
    """

    name: str
    stored: StoredObject
    num_bytes: int
    age_seconds: float | None
    ttl_seconds: float | None


@dataclass(frozen=True)
class ListedSegment:
    """The objects of a segment that one rank stored.

    Attributes:
        id: which segment.
        objects: in order; some may be missing.
    """

    id: RankSegment
    objects: tuple[ListedObject, ...]

    @property
    def num_bytes(self) -> int:
        """Of all objects."""
        return sum(each.num_bytes for each in self.objects)

    @property
    def age_seconds(self) -> float | None:
        """Of its oldest object; see `ListedObject`."""
        return max((o.age_seconds for o in self.objects if o.age_seconds is not None), default=None)

    @property
    def ttl_seconds(self) -> float | None:
        """Of the object that goes first; see `ListedObject`."""
        return min((o.ttl_seconds for o in self.objects if o.ttl_seconds is not None), default=None)


Verdict = Literal["sound", "incomplete", "gone"]
"""Of a segment that is not damaged; of an incomplete one some objects were dropped already, or are
still on their way."""


class Store(ABC):
    """A place that adapters store in. A context manager."""

    def segments(self) -> list[ListedSegment]:
        """All segments, of all deployments, models and versions."""
        found: dict[RankSegment, list[ListedObject]] = defaultdict(list)
        for each in self._objects():
            found[each.stored.segment].append(each)
        in_order = lambda each: each.stored.group  # noqa: E731
        return [ListedSegment(id_, tuple(sorted(f, key=in_order))) for id_, f in found.items()]

    def header(self, segment: ListedSegment) -> ObjectHeader | None:
        """What the segment's first object says about itself; None: it is gone.

        Raises:
            RefusedObject: it is damaged, or encrypted.
        """
        name = segment.objects[0].name
        beginning = self._read(name, _HEADER_BYTES)
        if beginning is None:
            return None
        needed = codec.header_bytes(memoryview(beginning))
        if needed > _HEADER_BYTES:
            beginning = self._read(name, needed)
        return None if beginning is None else codec.read_header(_tensor(beginning))

    def check(self, segment: ListedSegment) -> Verdict:
        """Read a segment of this version, every byte of it.

        Raises:
            RefusedObject: it is damaged, or encrypted.
        """
        for each in segment.objects:
            content = self._read(each.name, None)
            if content is None:
                return "gone"
            memory = _tensor(content)
            check_object(each.stored.key, memory)
            num_groups = codec.read_header(memory).num_groups
        groups = [each.stored.group for each in segment.objects]
        return "sound" if groups == list(range(num_groups)) else "incomplete"

    def remove(self, segments: Sequence[ListedSegment]) -> int:
        """Remove segments; how many were there."""
        return sum(self._remove([o.name for o in each.objects]) > 0 for each in segments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Give up what it takes to look there."""

    @abstractmethod
    def _objects(self) -> Iterator[ListedObject]: ...

    @abstractmethod
    def _read(self, name: str, num_bytes: int | None) -> bytearray | None:
        """An object, or its first bytes; None: it is gone."""

    @abstractmethod
    def _remove(self, names: Sequence[str]) -> int: ...


class Directory(Store):
    """Of `fs` and `fs_native`. Raises OSError. Objects that are being written are left out."""

    def __init__(self, path: str | Path) -> None:
        """`path` as in `disk_path`, or `base_path` of an adapter."""
        self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self._folder)

    def _objects(self) -> Iterator[ListedObject]:
        now = time.time()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                named = read_file_name(entry.name)
                if named is None or not named[1]:
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        age = max(0.0, now - status.st_mtime)
                        yield ListedObject(entry.name, named[0], status.st_size, age, None)

    def _read(self, name: str, num_bytes: int | None) -> bytearray | None:
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        with os.fdopen(file, "rb") as opened:
            before = os.fstat(file)
            content = bytearray(before.st_size if num_bytes is None else num_bytes)
            del content[opened.readinto(content) :]
            with suppress(OSError):  # of another user: then it counts as a use
                os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        return content

    def _remove(self, names: Sequence[str]) -> int:
        removed = 0
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._folder)
                removed += 1
        return removed


class KeySpace(Store):
    """Of `valkey` and `resp`: a Redis or Valkey. Raises RedisError."""

    def __init__(self, address: RedisAddress, tls_ca_file: str | None) -> None:
        """Connects at the first call, with the credentials of the environment.

        Args:
            address: of the server.
            tls_ca_file: certificates that it is checked against; None: the system's.

        Raises:
            ValueError: see `Credentials.from_environment`.
        """
        self.client = connect(address, Credentials.from_environment(), tls_ca_file)

    def close(self) -> None:
        self.client.close()

    def _objects(self) -> Iterator[ListedObject]:
        scanned = list(set(self.client.scan_iter(match="vlcache*", count=_BATCH)))
        for start in range(0, len(scanned), _BATCH):
            keys = scanned[start : start + _BATCH]
            found = {key: read_key(key.decode(errors="replace")) for key in keys}
            ours = [(key, stored) for key, stored in found.items() if stored is not None]
            pipeline = self.client.pipeline(transaction=False)
            for key, _ in ours:
                pipeline.strlen(key).pttl(key)
            answers = iter(pipeline.execute(raise_on_error=False))
            for key, stored in ours:
                size, ttl = next(answers), next(answers)
                for answer in (size, ttl):
                    if isinstance(answer, redis.exceptions.NoPermissionError):
                        raise answer
                if isinstance(size, int) and size:  # else it is gone, or no string
                    left = ttl / 1000 if ttl >= 0 else None
                    yield ListedObject(key.decode(), stored, size, None, left)

    def _read(self, name: str, num_bytes: int | None) -> bytearray | None:
        if num_bytes is None:
            content = self.client.get(name)
        else:
            content = self.client.getrange(name, 0, num_bytes - 1)
        return bytearray(content) if content else None

    def _remove(self, names: Sequence[str]) -> int:
        return sum(self.client.unlink(name) for name in names)


def connect(address: RedisAddress, credentials: Credentials, tls_ca_file: str | None) -> Any:
    """A client of redis-py, which connects at the first call."""
    options: dict[str, Any] = {
        "username": credentials.username,
        "password": credentials.password,
        "socket_connect_timeout": _CONNECT_SECONDS,
        "socket_timeout": _CALL_SECONDS,
        "retry": Retry(NoBackoff(), 1),
    }
    if address.topology == "unix":
        return redis.Redis(unix_socket_path=address.socket_path, db=address.database, **options)
    if address.tls:
        options |= {"ssl": True, "ssl_ca_certs": tls_ca_file}
    if address.topology == "cluster":
        nodes = [redis.cluster.ClusterNode(host, port) for host, port in address.hosts]
        return redis.RedisCluster(startup_nodes=nodes, **options)
    [(host, port)] = address.hosts
    return redis.Redis(host, port, db=address.database, **options)


def is_of_this_version(segment: ListedSegment) -> bool:
    """Whether this release of VLCache can read it."""
    return segment.id.namespace.format_version == FORMAT_VERSION


def _tensor(content: bytearray) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8))

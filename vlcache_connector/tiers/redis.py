"""A tier in Redis, shared by all processes that reach the server.

It talks through redis-py rather than through the connectors of LMCache 0.5.6. Those for servers,
sentinels and clusters write the URL into the log, password included, read a chunk in two round
trips, store it in two steps that a reader can get in between of, and set no expiry; calls have no
deadline, and only single servers TLS. The one for resp:// takes chunks of one fixed size only.

Keys, with the key in braces so that a segment lies on one node of a cluster::

    vlcache:<deployment>:<kind>:{<key>}:<rank>/<degree>:meta    msgpack: version, token, time, sizes
    vlcache:<deployment>:<kind>:{<key>}:<rank>/<degree>:<i>     object i, as it is
    vlcache:<deployment>:models                                 hash: fingerprint -> model name

A writer sets all keys of a segment in one transaction. A reader fetches the objects piece by piece
and looks at the token again after the last one: if it changed, it has read from two writers.
"""

# redis-py is typed in part.
# mypy: allow-untyped-calls

from __future__ import annotations

import itertools
import math
import re
import secrets
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast
from urllib.parse import quote, unquote

import msgpack
import numpy as np
import redis
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import ConnectionPool
from redis.credentials import UsernamePasswordCredentialProvider
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool
from typing_extensions import Buffer

from ..storage.header import Kind
from . import redis_connections as connections
from .base import (
    Deadline,
    Entry,
    Fault,
    Name,
    Tier,
    TierError,
    TierName,
    TierUsage,
    check_deployment,
)
from .redis_connections import current_call
from .redis_url import Credentials, RedisAddress

_META_VERSION = 1
_MAX_META_BYTES = 1 << 14
_MAX_OBJECTS = 512
_PIECE_BYTES = 1 << 20
_PIECES_PER_TRIP = 16
_SCAN_COUNT = 500


def pack_meta(lengths: Sequence[int]) -> bytes:
    """Describe a segment that is about to be written; no two descriptions are equal."""
    if len(lengths) > _MAX_OBJECTS:
        raise TierError("other", f"{len(lengths)} objects; at most {_MAX_OBJECTS} are allowed")
    wire = (_META_VERSION, secrets.token_bytes(8), time.time(), tuple(lengths))
    return cast(bytes, msgpack.packb(wire))


def unpack_meta(raw: bytes) -> tuple[float, tuple[int, ...]]:
    """Time of writing (seconds since the epoch) and the objects' lengths in bytes.

    Raises:
        TierError: "damaged".
    """
    try:
        wire = msgpack.unpackb(raw, use_list=False, max_array_len=_MAX_OBJECTS)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise TierError("damaged", "the description of a segment is not msgpack") from error
    if (
        type(wire) is not tuple
        or [type(item) for item in wire] != [int, bytes, float, tuple]
        or wire[0] != _META_VERSION
        or not math.isfinite(wire[2])
        or any(type(n) is not int or n < 0 for n in wire[3])
    ):
        raise TierError("damaged", "the description of a segment does not match the schema")
    return wire[2], wire[3]


class RedisTier(Tier):
    """Keeps segments in a Redis server, a primary that sentinels know, or a cluster.

    Nothing is connected before the first call, and nothing is tried again: a call that fails is
    over. Looking a host name up is beyond any deadline.
    """

    name: TierName = "redis"

    def __init__(
        self,
        url: str,
        deployment: str,
        ttl_seconds: float | None,
        *,
        tls_ca_file: str | None = None,
        max_connections: int = 4,
    ) -> None:
        """Credentials come from the environment, see `Credentials.from_environment`; sentinels
        are asked without any.

        Args:
            url: where the server is, see `RedisAddress`.
            deployment: name of the deployment, part of every key.
            ttl_seconds: time from writing until a segment is dropped; None: never.
            tls_ca_file: PEM file of the authorities that server certificates are accepted from,
                besides those that the system trusts.
            max_connections: calls at a time; further ones wait for their turn.

        Raises:
            ValueError: a setting is malformed; the message names it, and holds no secret.
        """
        self._address = RedisAddress.from_url(url)
        self._credentials = Credentials.from_environment()
        if tls_ca_file is not None:
            if not self._address.tls:
                raise ValueError(
                    f"tls_ca_file={tls_ca_file!r} without TLS; use a redis_url of a scheme that "
                    "begins with rediss"
                )
            try:
                ssl.create_default_context(cafile=tls_ca_file)
            except OSError as error:
                raise ValueError(
                    f"tls_ca_file={tls_ca_file!r}: {error.strerror or error}; name a readable file "
                    "of certificates in PEM form"
                ) from None
        self._prefix = f"vlcache:{check_deployment(deployment)}:"
        self._ttl_ms = None if ttl_seconds is None else max(1, round(1000 * ttl_seconds))
        self._turns = threading.BoundedSemaphore(max_connections)
        self._options: dict[str, Any] = {
            "protocol": 2,
            "driver_info": None,
            "max_connections": max_connections,
            "socket_read_size": 1 << 18,
        }
        if self._address.tls:
            self._options["ssl_ca_certs"] = tls_ca_file
        self._lock = threading.Lock()
        self._cluster: RedisCluster | None = None
        self._topology_is_stale = False
        self._client = None if self._address.topology == "cluster" else self._connect()

    def sizes(self, names: Sequence[Name], deadline: Deadline) -> list[int | None]:
        with self._calling(deadline):
            metas = self._metas(names)
        return [None if meta is None else sum(meta[1]) for meta in metas]

    def read(self, name: Name, max_bytes: int, deadline: Deadline) -> list[memoryview] | None:
        key = self._key(name)
        with self._calling(deadline):
            client = self._node(key)
            meta = cast(bytes, client.getrange(f"{key}:meta", 0, _MAX_META_BYTES))
            if not meta:
                return None
            _, lengths = unpack_meta(meta)
            if sum(lengths) > max_bytes:
                raise TierError("damaged", f"{sum(lengths)} bytes, at most {max_bytes} expected")
            objects = [np.empty(length, np.uint8).data for length in lengths]
            pieces = iter(
                (index, start)
                for index, length in enumerate(lengths)
                for start in range(0, length, _PIECE_BYTES)
            )
            while batch := list(itertools.islice(pieces, _PIECES_PER_TRIP)):
                pipe = client.pipeline(transaction=False)
                for index, start in batch:
                    pipe.getrange(f"{key}:{index}", start, start + _PIECE_BYTES - 1)
                pipe.getrange(f"{key}:meta", 0, _MAX_META_BYTES)
                *values, meta_now = pipe.execute()
                if meta_now != meta:
                    return None
                for (index, start), value in zip(batch, values, strict=True):
                    target = objects[index][start : start + _PIECE_BYTES]
                    if len(value) != len(target):
                        # Redis has evicted this object by itself: the others are of no use.
                        client.unlink(f"{key}:meta", *self._object_keys(key, len(lengths)))
                        return None
                    target[:] = value
        return objects

    def beginning(self, name: Name, num_bytes: int, deadline: Deadline) -> memoryview | None:
        key = self._key(name)
        with self._calling(deadline):
            found = cast(bytes, self._node(key).getrange(f"{key}:0", 0, num_bytes - 1))
        return memoryview(found) if found else None

    def write(self, name: Name, objects: Sequence[Buffer], deadline: Deadline) -> None:
        key = self._key(name)
        views = [memoryview(obj).cast("B") for obj in objects]
        meta = pack_meta([view.nbytes for view in views])
        with self._calling(deadline):
            (before,) = self._metas([name])
            left_over = self._object_keys(key, len(before[1]) if before else 0)[len(views) :]
            pipe = self._node(key).pipeline(transaction=True)
            for object_key, view in zip(self._object_keys(key, len(views)), views, strict=True):
                pipe.set(object_key, view, px=self._ttl_ms)
            if left_over:
                pipe.unlink(*left_over)
            pipe.set(f"{key}:meta", meta, px=self._ttl_ms)
            pipe.execute()

    def remove(self, names: Sequence[Name], deadline: Deadline) -> int:
        removed = 0
        with self._calling(deadline):
            metas = self._metas(names)
            for client, members in self._by_node(names):
                pipe = client.pipeline(transaction=False)
                for index in members:
                    key, meta = self._key(names[index]), metas[index]
                    pipe.unlink(f"{key}:meta")
                    pipe.unlink(*self._object_keys(key, len(meta[1]) if meta else 1))
                removed += sum(pipe.execute()[::2])
        return removed

    def entries(self, deadline: Deadline) -> Iterator[Entry]:
        with self._calling(deadline):
            clients = self._nodes()
        for client in clients:
            cursor = -1
            while cursor:
                with self._calling(deadline):
                    cursor, keys = client.scan(
                        max(cursor, 0), match=f"{self._prefix}*:meta", count=_SCAN_COUNT
                    )
                    pipe = client.pipeline(transaction=False)
                    for key in keys:
                        pipe.getrange(key, 0, _MAX_META_BYTES)
                        pipe.pttl(key)
                    answers = iter(pipe.execute(raise_on_error=False))
                now = time.time()
                for key, meta, left in zip(keys, answers, answers, strict=False):
                    name = self._name(cast(bytes, key))
                    try:
                        written_at, lengths = unpack_meta(meta)
                    except TierError:
                        continue
                    if name is not None:
                        age = max(0.0, now - written_at)
                        yield Entry(name, sum(lengths), age, None if left < 0 else left / 1000)

    def usage(self, deadline: Deadline) -> TierUsage:
        sizes = [entry.num_bytes for entry in self.entries(deadline)]
        return TierUsage(len(sizes), sum(sizes), None)

    def record_model(self, fingerprint: str, model_name: str, deadline: Deadline) -> None:
        key = f"{self._prefix}models"
        with self._calling(deadline):
            self._node(key).hset(key, fingerprint, model_name)

    def models(self, deadline: Deadline) -> Mapping[str, str]:
        key = f"{self._prefix}models"
        with self._calling(deadline):
            found = cast(dict[bytes, bytes], self._node(key).hgetall(key))
        return {k.decode(errors="replace"): v.decode(errors="replace") for k, v in found.items()}

    def memory_limit(self, deadline: Deadline) -> tuple[int, str]:
        """The server's `maxmemory` in bytes, 0 for none, and its `maxmemory-policy`."""
        with self._calling(deadline):
            info = cast(dict[str, Any], self._nodes()[0].info("memory"))
        return int(info["maxmemory"]), str(info["maxmemory_policy"])

    def close(self) -> None:
        if self._client is not None:
            self._client.connection_pool.disconnect()
        if self._cluster is not None:
            self._cluster.close()

    def _key(self, name: Name) -> str:
        tag = quote(name.key, safe="/")
        return f"{self._prefix}{name.kind}:{{{tag}}}:{name.rank}/{name.num_ranks}"

    def _object_keys(self, key: str, count: int) -> list[str]:
        return [f"{key}:{index}" for index in range(count)]

    def _name(self, meta_key: bytes) -> Name | None:
        match = re.fullmatch(
            re.escape(self._prefix) + r"(kv|encoder):\{([^{}]+)\}:(\d+)/(\d+):meta",
            meta_key.decode(errors="replace"),
        )
        if match is None:
            return None
        return Name(cast(Kind, match[1]), unquote(match[2]), int(match[3]), int(match[4]))

    def _metas(self, names: Sequence[Name]) -> list[tuple[float, tuple[int, ...]] | None]:
        """Times of writing and sizes, None for what is not there or is none of ours."""
        metas: list[tuple[float, tuple[int, ...]] | None] = [None] * len(names)
        for client, members in self._by_node(names):
            pipe = client.pipeline(transaction=False)
            for index in members:
                pipe.getrange(f"{self._key(names[index])}:meta", 0, _MAX_META_BYTES)
            answers = pipe.execute(raise_on_error=False)
            for index, answer in zip(members, answers, strict=True):
                if isinstance(answer, Exception) and _fault_of(answer) != "damaged":
                    raise answer
                with suppress(TierError):
                    metas[index] = unpack_meta(answer) if answer else None
        return metas

    def _by_node(self, names: Sequence[Name]) -> list[tuple[redis.Redis, list[int]]]:
        """Indices of names by the node that they lie on."""
        groups: dict[int, tuple[redis.Redis, list[int]]] = {}
        for index, name in enumerate(names):
            client = self._node(self._key(name))
            groups.setdefault(id(client), (client, []))[1].append(index)
        return list(groups.values())

    def _node(self, key: str) -> redis.Redis:
        if self._client is not None:
            return self._client
        cluster = self._current_cluster()
        node = cluster.get_node_from_key(key)
        return cluster.get_redis_connection(node)

    def _nodes(self) -> list[redis.Redis]:
        if self._client is not None:
            return [self._client]
        cluster = self._current_cluster()
        return [cluster.get_redis_connection(node) for node in cluster.get_primaries()]

    def _connect(self) -> redis.Redis:
        address, options = self._address, self._options | self._login()
        if address.topology == "sentinel":
            sentinel = Sentinel([])
            sentinel.sentinels = [
                redis.Redis(
                    connection_pool=ConnectionPool(
                        connections.TlsToSentinel if address.tls else connections.PlainToSentinel,
                        host=host,
                        port=port,
                        **self._options,
                    )
                )
                for host, port in address.hosts
            ]
            pool: ConnectionPool = SentinelConnectionPool(
                address.service,
                sentinel,
                connection_class=connections.TlsManaged
                if address.tls
                else connections.PlainManaged,
                db=address.database,
                **options,
            )
        elif address.topology == "unix":
            pool = ConnectionPool(connections.Unix, path=address.socket_path, **options)
        else:
            ((host, port),) = address.hosts
            pool = ConnectionPool(
                connections.Tls if address.tls else connections.Plain,
                host=host,
                port=port,
                db=address.database,
                **options,
            )
        return redis.Redis(connection_pool=pool)

    def _current_cluster(self) -> RedisCluster:
        """The cluster as it is now: asks it when it was never asked, or has changed since."""
        if not self._lock.acquire(timeout=current_call.seconds_left()):
            raise TimeoutError("another thread asked for the cluster's nodes until the deadline")
        try:
            if self._cluster is None:
                (host, port), *_ = self._address.hosts
                self._cluster = RedisCluster(
                    # Only with a URL does redis-py take a connection class for a cluster.
                    url=f"redis://{host}:{port}",
                    startup_nodes=[ClusterNode(*node) for node in self._address.hosts],
                    connection_class=connections.Tls if self._address.tls else connections.Plain,
                    retry=Retry(NoBackoff(), 0),
                    **(self._options | self._login()),
                )
            elif self._topology_is_stale:
                self._cluster.nodes_manager.initialize()
            self._topology_is_stale = False
            return self._cluster
        finally:
            self._lock.release()

    def _login(self) -> dict[str, Any]:
        """As a provider: redis-py shows the options of its pools and connections to anyone."""
        user, password = self._credentials.username, self._credentials.password
        if password is None:
            return {}
        return {"credential_provider": UsernamePasswordCredentialProvider(user, password)}

    @contextmanager
    def _calling(self, deadline: Deadline) -> Iterator[None]:
        """Give redis-py the deadline, and raise what it raises as a TierError."""
        deadline.check()
        if not self._turns.acquire(timeout=deadline.seconds_left):
            raise TierError("timeout", "other calls had all connections until the deadline")
        current_call.deadline = deadline
        try:
            yield
        except (errors.RedisError, errors.RedisClusterException, OSError) as error:
            fault = _fault_of(error)
            if fault in ("timeout", "connection"):
                self._topology_is_stale = True
                fault = "timeout" if deadline.seconds_left == 0.0 else fault
            text = self._credentials.redact(f"{type(error).__name__}: {error}")
            raise TierError(fault, text[:300]) from None
        finally:
            current_call.deadline = None
            self._turns.release()


def _fault_of(error: BaseException) -> Fault:
    """What kind of fault an exception of redis-py or a socket is."""
    if isinstance(error, errors.RedisClusterException) and error.__cause__ is not None:
        return _fault_of(error.__cause__)
    code = re.sub(r"^Command # .*? caused error: ", "", str(error)).split(" ", 1)[0]
    if isinstance(error, errors.OutOfMemoryError) or code == "OOM":
        return "full"
    refused = (
        errors.AuthenticationError,
        errors.AuthenticationWrongNumberOfArgsError,
        errors.AuthorizationError,
        errors.NoPermissionError,
    )
    if isinstance(error, refused) or code in ("NOAUTH", "WRONGPASS", "NOPERM"):
        return "auth"
    if code == "WRONGTYPE":
        return "damaged"
    if isinstance(error, errors.TimeoutError | TimeoutError):
        return "timeout"
    moved = (errors.AskError, errors.ClusterError, errors.TryAgainError, errors.ReadOnlyError)
    if isinstance(error, (errors.ConnectionError, errors.RedisClusterException, OSError, *moved)):
        return "connection"
    return "other"

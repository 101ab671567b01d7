"""LMCache's `valkey` adapter, for Redis and Valkey, with what LMCache 0.5.6 leaves out.

* User name and password reach the server (LMCache swaps them), come from the environment or a file,
  and are read again when the file changes: what a client keeps is tried for ever.
* A server's certificate is checked against a file of one's own.
* Times to live differ by up to 10 %, so that what was stored together does not go together.
* A server can be reached over a socket file.

LMCache seam: `ValkeyWorkerPool` (`lmcache/v1/storage_backend/valkey/worker_pool.py`), whose clients
and expiry are made here, and the name under which `ValkeyL2Adapter`
(`lmcache/v1/distributed/l2_adapters/valkey_l2_adapter.py`) finds it while it is made.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache.v1.distributed.l2_adapters import valkey_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import (
    L2AdapterConfigBase,
    register_l2_adapter_type,
)
from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory
from lmcache.v1.storage_backend.valkey.worker_pool import ValkeyWorkerPool
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from vlcache_connector.storage.redis_url import FILE_VARIABLE, LOGIN_HINT, Credentials, parse_hosts

if TYPE_CHECKING:
    from lmcache.v1.distributed.internal_api import L1MemoryDesc

logger = logging.getLogger(__name__)

_JITTER = 0.1
_LOGIN_PAUSE = 10.0
"""Seconds between two attempts to log in with what has changed while the old login may do."""
_WARM_UP_SECONDS = 2.0
"""More than a client's own patience, so that it is the client that says what is wrong."""
_LOCKED_OUT = ("NOAUTH", "WRONGPASS", "ERR AUTH")
_MADE_HERE = ("_get_client", "_build_expiry")
_constructing = threading.Lock()


@dataclass(config=ConfigDict(strict=True), kw_only=True)
class ValkeyConfig(L2AdapterConfigBase):
    """Keys of an adapter of type "valkey": LMCache's, without the secrets, and two of ours.

    Attributes:
        startup_nodes: `host:port`, or some nodes of a cluster with commas between them.
        unix_socket_path: socket file of the server; instead of `startup_nodes`.
        tls_ca_file: PEM file of the authorities that a server's certificate is accepted from; None:
            those of the system.
        num_workers: connections. Each keeps a copy of the largest object that went through it.
        request_timeout: seconds until an operation on one object fails.
        connection_timeout: seconds until an attempt to connect fails.
        ttl_seconds: about how long an object stays; None: until the server drops it.
    """

    startup_nodes: str | None = None
    unix_socket_path: str | None = None
    cluster_mode: bool = False
    tls_enable: bool = False
    tls_ca_file: str | None = None
    database_id: int | None = Field(default=None, ge=0)
    key_prefix: str = Field(default="", pattern="^[^@]*$")
    num_workers: int = Field(default=4, gt=0)
    request_timeout: float = Field(default=valkey_l2_adapter.DEFAULT_REQUEST_TIMEOUT_SECS, gt=0)
    connection_timeout: float = Field(default=2.0, gt=0)
    max_capacity_gb: float = Field(default=0.0, ge=0)
    ttl_seconds: int | None = Field(default=None, gt=0)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> ValkeyConfig:
        """Check the keys; those that all adapters have are not looked at.

        Raises:
            ValueError: a value is not allowed, or does not go with another one.
        """
        config = cls(**{key: d[key] for key in d if key in cls.__annotations__})
        if (config.startup_nodes is None) == (config.unix_socket_path is None):
            raise ValueError("one of startup_nodes and unix_socket_path is needed")
        if config.unix_socket_path is not None:
            if config.tls_enable or config.cluster_mode:
                raise ValueError("unix_socket_path goes with neither tls_enable nor cluster_mode")
        elif not config.cluster_mode and len(config.addresses) > 1:
            raise ValueError(f"startup_nodes={config.startup_nodes!r}: several need cluster_mode")
        if config.cluster_mode and config.database_id is not None:
            raise ValueError(f"database_id={config.database_id}: a cluster has only one database")
        if config.tls_ca_file is not None:
            if not config.tls_enable:
                raise ValueError(f"tls_ca_file={config.tls_ca_file!r}: needs TLS")
            config.authorities()
        return config

    @classmethod
    def help(cls) -> str:
        return str(cls.__doc__)

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each node.

        Raises:
            ValueError: `startup_nodes` is malformed.
        """
        if self.startup_nodes is None:
            return [("localhost", 1)]  # LMCache wants one; beside a socket file it is not used
        try:
            return parse_hosts(self.startup_nodes)
        except ValueError as error:
            raise ValueError(f"startup_nodes: {error}; 'host:port' is needed") from None

    @property
    def place(self) -> str:
        """Where the server is, for messages."""
        return self.unix_socket_path or ",".join(f"{host}:{port}" for host, port in self.addresses)

    def authorities(self) -> bytes | None:
        """Content of `tls_ca_file`.

        Raises:
            ValueError: it can't be read, or holds none.
        """
        if self.tls_ca_file is None:
            return None
        try:
            content = Path(self.tls_ca_file).read_bytes()
        except OSError as error:
            raise ValueError(
                f"tls_ca_file={self.tls_ca_file!r}: {error.strerror}; name a readable file"
            ) from None
        if b"BEGIN CERTIFICATE" not in content:
            raise ValueError(f"tls_ca_file={self.tls_ca_file!r}: no certificate in PEM form in it")
        return content


class _Login:
    """The credentials that hold now. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._credentials: Credentials | None = None

    def read(self) -> Credentials:
        """The same object until they change.

        Raises:
            ValueError: see `Credentials.from_environment`.
        """
        path = os.environ.get(FILE_VARIABLE)
        seen = None
        if path:
            with contextlib.suppress(OSError):  # reading it says so
                found = os.stat(path)
                seen = (found.st_mtime_ns, found.st_ino, found.st_size)
        with self._lock:
            if self._credentials is None or (path and (seen is None or seen != self._seen)):
                now = Credentials.from_environment(os.environ)
                self._seen = seen
                if now != self._credentials:
                    self._credentials = now
            assert self._credentials is not None
            return self._credentials


class _WorkerPool(ValkeyWorkerPool):
    """Workers with a client each, made here."""

    def __init__(self, config: ValkeyConfig) -> None:
        """Connects all of them.

        Raises:
            RuntimeError: the server can't be reached, or does not let us in.
            ValueError: there are no credentials, see `Credentials.from_environment`, or the file of
                the authorities is gone.
        """
        self._config = config
        self._login = _Login()
        self._accepted: Credentials | None = None
        try:
            super().__init__(
                addresses=config.addresses,
                num_workers=config.num_workers,
                request_timeout=config.request_timeout,
                connection_timeout=config.connection_timeout + _WARM_UP_SECONDS,
                tls_enable=config.tls_enable,
                cluster_mode=config.cluster_mode,
                database_id=config.database_id,
                ttl_seconds=config.ttl_seconds,
            )
        except BaseException:
            self.close()
            raise
        self._has_buffer_get = True

    def _get_client(self) -> Any:
        """The client of this thread."""
        local = self._local
        client = getattr(local, "client", None)
        try:
            login = self._login.read()
        except ValueError:
            if client is None:
                raise
            return client  # the file is being replaced
        if client is not None and (login is local.login or time.monotonic() < local.login_at):
            return client
        try:
            new = self._connect(login)
        except RuntimeError as error:
            # The server may learn of the change after us.
            if client is None:  # threads are started when they are needed
                if self._accepted is None or self._accepted is login:
                    raise
                client = self._connect(self._accepted)
                local.client, local.login = client, self._accepted
            logger.warning("VLCache: the changed credentials are not taken yet: %s", error)
            local.login_at = time.monotonic() + _LOGIN_PAUSE
            return client
        if client is not None:
            client.close()
        local.client, local.login, local.login_at = new, login, 0.0
        self._accepted = login
        return new

    def _connect(self, login: Credentials) -> Any:
        """Raises RuntimeError."""
        config = self._config
        try:
            return self._create(login)
        except Exception as error:
            said = login.redact(" ".join(str(error).split()))
            locked_out = any(code in said for code in _LOCKED_OUT)
            if not config.cluster_mode and not locked_out and "timed out" not in said:
                # It is a replica, which readers may use, or doesn't tell us what it is.
                with contextlib.suppress(Exception):
                    return self._create(login, asks=False)
            hint = ""
            if locked_out:
                hint = f"; {LOGIN_HINT}"
            elif config.tls_enable:
                hint = "; does it have a certificate that tls_ca_file or the system vouches for?"
            raise RuntimeError(f"{config.place} can't be used: {said}{hint}") from None

    def _create(self, login: Credentials, *, asks: bool = True) -> Any:
        """A client that is connected.

        Args:
            login: who we are.
            asks: whether the server is asked if it is a primary.
        """
        glide, config = _glide(), self._config
        kind = "GlideCluster" if config.cluster_mode else "Glide"
        advanced = getattr(glide, f"Advanced{kind}ClientConfiguration")
        options: dict[str, Any] = {}
        if not asks:
            options["node_discovery_mode"] = glide.NodeDiscoveryMode.STATIC
        if login.password:
            options["credentials"] = glide.ServerCredentials(
                password=login.password, username=login.username
            )
        if config.database_id is not None:
            options["database_id"] = config.database_id
        if config.unix_socket_path is not None:
            nodes = [glide.NodeAddress(unix_socket_path=config.unix_socket_path)]
        else:
            nodes = [glide.NodeAddress(host, port) for host, port in config.addresses]
        return getattr(glide, f"{kind}Client").create(
            getattr(glide, f"{kind}ClientConfiguration")(
                nodes,
                use_tls=config.tls_enable,
                request_timeout=round(1000 * config.request_timeout),
                advanced_config=advanced(
                    connection_timeout=round(1000 * config.connection_timeout),
                    tls_config=glide.TlsAdvancedConfiguration(
                        root_pem_cacerts=config.authorities()
                    ),
                ),
                **options,
            )
        )

    def _build_expiry(self) -> Any:
        """Of the object that is stored now."""
        glide = _glide()
        assert self._ttl_seconds is not None
        milliseconds = 1000 * self._ttl_seconds * random.uniform(1 - _JITTER, 1 + _JITTER)
        return glide.ExpirySet(glide.ExpiryType.MILLSEC, round(milliseconds))


@functools.cache
def _glide() -> Any:
    import glide_sync

    # A server that is slow or away is business as usual here.
    glide_sync.Logger.set_logger_config(glide_sync.LogLevel.OFF)
    return glide_sync


def _create(
    config: L2AdapterConfigBase, l1_memory_desc: L1MemoryDesc | None = None
) -> valkey_l2_adapter.ValkeyL2Adapter:
    assert isinstance(config, ValkeyConfig)
    _check_lmcache(*(name for name in _MADE_HERE if not hasattr(ValkeyWorkerPool, name)))
    theirs = valkey_l2_adapter.ValkeyL2AdapterConfig(
        startup_nodes=config.addresses,
        cluster_mode=config.cluster_mode,
        key_prefix=config.key_prefix,
        num_workers=config.num_workers,
        max_capacity_gb=config.max_capacity_gb,
    )
    pool = _WorkerPool(config)
    with _constructing:
        original = valkey_l2_adapter.ValkeyWorkerPool
        valkey_l2_adapter.ValkeyWorkerPool = lambda **_: pool
        try:
            adapter = valkey_l2_adapter.ValkeyL2Adapter(theirs)
        finally:
            valkey_l2_adapter.ValkeyWorkerPool = original
    if getattr(adapter, "_pool", None) is not pool:
        adapter.close()
        pool.close()
        _check_lmcache("ValkeyL2Adapter._pool")
    return adapter


def _check_lmcache(*missing: str) -> None:
    if missing:
        raise RuntimeError(
            f"LMCache {version('lmcache')} has no {', '.join(missing)} as 0.5.6 has, which "
            "adapters of type 'valkey' need; install lmcache==0.5.6"
        )


register_l2_adapter_type("vlcache_valkey", ValkeyConfig)
register_l2_adapter_factory("vlcache_valkey", _create)

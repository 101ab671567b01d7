"""LMCache's valkey adapter with logins, certificates and expiry of ours, against real servers."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import (
    DRAML1ManagerConfig,
    EvictionConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters import valkey_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase, L2AdaptersConfig
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.storage_manager import StorageManager
from local_redis import LocalRedis, find_valkey, free_port

from tests.helpers.proxy import Proxy, make_certificate
from vlcache_connector.config import ConfigError, VLCacheConfig
from vlcache_connector.storage.adapters import open_adapters, require_adapters

MIB = 1 << 20
SIZES = (1, 3 * MIB + 7, 20 * MIB)

StartServer = Callable[..., LocalRedis]
OpenPool = Callable[..., Any]


def inner_config(**options: Any) -> L2AdapterConfigBase:
    """Of the only adapter that the options ask for."""
    options = {"ttl_seconds": 1000} | options
    [config] = open_adapters(VLCacheConfig.from_extra_config(options), can_store=True)
    return config.inner_config


def adapter_of(server: LocalRedis, **keys: Any) -> dict[str, Any]:
    nodes = f"127.0.0.1:{server.port}"
    spec = {"type": "valkey", "startup_nodes": nodes, "num_workers": 2, "request_timeout": 1.0}
    return {"l2_adapters": [spec | keys]}


@pytest.fixture
def open_adapter() -> Iterator[Callable[..., Any]]:
    """Makes adapters by the connector's options, which are closed at the end."""
    with ExitStack() as stack:

        def make(**options: Any) -> Any:
            adapter = create_l2_adapter_from_registry(inner_config(**options))
            stack.callback(adapter.close)
            return adapter

        yield make


@pytest.fixture
def open_pool(open_adapter: Callable[..., Any]) -> OpenPool:
    """The workers of an adapter, which talk to the server."""
    return lambda **options: open_adapter(**options)._pool


@pytest.fixture
def open_manager() -> Iterator[Callable[..., StorageManager]]:
    with ExitStack() as stack:

        def make(*adapters: L2AdapterConfigBase) -> StorageManager:
            memory = L1MemoryManagerConfig(64 * MIB, use_lazy=False, shm_name="")
            manager = StorageManager(
                StorageManagerConfig(
                    l1_manager_config=DRAML1ManagerConfig(memory_config=memory),
                    eviction_config=EvictionConfig("noop"),
                    l2_adapter_config=L2AdaptersConfig(list(adapters)),
                    prefetch_policy="retain",
                )
            )
            stack.callback(manager.close)
            return manager

        yield make


def put(pool: Any, key: str = "k", value: bytes = b"value") -> None:
    pool.submit_set(key, value).result(20)


def get(pool: Any, key: str = "k", value: bytes = b"value") -> bool:
    buffer = bytearray(len(value))
    return pool.submit_get_into(key, buffer).result(20) == len(value) and buffer == value


def works(pool: Any) -> bool:
    try:
        put(pool)
        return get(pool)
    except Exception:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def object_key(number: int) -> ObjectKey:
    return ObjectKey(bytes([number]) * 32, "vlcache-test", 0, 0, "")


def content(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    size = (SIZES[number % len(SIZES)],)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def layout(number: int) -> MemoryLayoutDesc:
    return MemoryLayoutDesc([torch.Size([SIZES[number % len(SIZES)]])], [torch.uint8])


def store(manager: StorageManager, number: int) -> None:
    [key] = [object_key(number)]
    manager.reserve_write([key], layout(number))[key].tensor.view(-1).copy_(content(number))
    manager.finish_write([key])


def loads(manager: StorageManager, number: int) -> bool:
    """Whether an object that is not in host memory comes back, bit by bit."""
    key = object_key(number)
    manager.delete_l1_keys([key])
    group = GroupedObjectKeys([key], 0, layout(number), -1)
    handle = manager.submit_prefetch_task(PrefetchTaskSpec([group], fetching_policy="full"))
    assert manager.wait_prefetch_status(handle, 20)
    result = manager.query_prefetch_status(handle)
    if result is None or not result.hit_cells[0].test(0):
        return False
    _, [loaded] = manager.unsafe_read([key])
    is_equal = torch.equal(loaded.tensor.view(-1), content(number))
    manager.finish_read_prefetched([key])
    return is_equal


@pytest.fixture
def proxied(redis_server: StartServer, tmp_path: Path) -> Iterator[tuple[str, Path, LocalRedis]]:
    """A server behind TLS: URL, certificate, and itself."""
    pytest.importorskip("cryptography")
    server = redis_server()
    certificate, context = make_certificate(tmp_path)
    proxy = Proxy(server.port, context)
    yield f"rediss://127.0.0.1:{proxy.port}", certificate, server
    proxy.close()


@pytest.fixture
def cluster(redis_server: StartServer) -> list[LocalRedis]:
    """Two primaries that share the slots."""
    servers = [redis_server(cluster_enabled="yes", cluster_node_timeout=2000) for _ in range(2)]
    for server, slots in zip(servers, (range(8192), range(8192, 16384)), strict=True):
        server.client.execute_command("CLUSTER ADDSLOTS", *slots)
    servers[0].client.execute_command("CLUSTER MEET", "127.0.0.1", servers[1].port)

    def is_up(server: LocalRedis) -> bool:
        return server.client.execute_command("CLUSTER INFO")["cluster_state"] == "ok"

    assert eventually(lambda: all(map(is_up, servers)), 30), "the cluster does not come up"
    return servers


@pytest.mark.parametrize("kind", ["redis", "valkey", "socket", "tls", "database", "cluster"])
def test_objects_come_back_to_another_manager(
    redis_server: StartServer,
    open_manager: Callable[..., StorageManager],
    tmp_path: Path,
    kind: str,
    request: pytest.FixtureRequest,
) -> None:
    options: dict[str, Any] = {}
    if kind == "tls":
        url, certificate, _ = request.getfixturevalue("proxied")
        options = {"redis_tls_ca_file": str(certificate)}
    elif kind == "cluster":
        servers = request.getfixturevalue("cluster")
        url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{servers[0].port}"
    elif kind == "socket":
        redis_server(unixsocket=tmp_path / "a+b.sock")
        url = f"unix://{tmp_path}/a%2Bb.sock"
    else:
        command = find_valkey() if kind == "valkey" else None
        if kind == "valkey" and command is None:
            pytest.skip("no valkey-server")
        server = redis_server(command=command)
        url = server.url + ("/3" if kind == "database" else "")
    writer, reader = (open_manager(inner_config(redis_url=url, **options)) for _ in range(2))
    for number in range(6):
        store(writer, number)
    assert eventually(lambda: all(loads(reader, number) for number in range(6)))
    assert not loads(reader, 6)
    if kind == "cluster":
        assert all(server.client.dbsize() for server in servers)
    if kind == "database":
        assert list(server.client.info("keyspace")) == ["db3"]


def test_times_to_live_differ(redis_server: StartServer, open_pool: OpenPool) -> None:
    server = redis_server()
    pool = open_pool(redis_url=server.url)
    for number in range(200):
        put(pool, f"k{number}")
    seconds = [server.client.ttl(f"k{number}") for number in range(200)]
    assert min(seconds) >= 899
    assert max(seconds) <= 1100
    assert min(seconds) < 920 < 1080 < max(seconds)
    put(open_pool(**adapter_of(server, ttl_seconds=None)))
    assert server.client.ttl("k") == -1


@pytest.fixture
def login_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "login"
    monkeypatch.setenv("VLCACHE_REDIS_CREDENTIALS_FILE", str(path))
    return path


def add_user(server: LocalRedis, name: str, *passwords: str) -> None:
    """Let somebody in with any of the passwords, and with no other."""
    secrets = [f">{password}" for password in passwords]
    server.client.execute_command(
        "ACL", "SETUSER", name, "resetpass", "on", "~*", "+@all", *secrets
    )


def replace(path: Path, text: str) -> None:
    """As mounted secrets are: in one go."""
    other = path.with_suffix(".new")
    other.write_text(text)
    other.rename(path)


def users(server: LocalRedis) -> set[str]:
    """Names of who is connected, but for us."""
    return {client["user"] for client in server.client.client_list()} - {"default"}


def test_credentials_from_the_environment(
    redis_server: StartServer, open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = redis_server(requirepass="s3cret")
    remedy = "put who to log in as into VLCACHE_REDIS_USERNAME and VLCACHE_REDIS_PASSWORD"
    with pytest.raises(RuntimeError, match=f"127.0.0.1:{server.port} can't be used: .*{remedy}"):
        open_pool(redis_url=server.url)
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", "wr0ng")
    with pytest.raises(RuntimeError, match=f"WRONGPASS.*{remedy}"):
        open_pool(redis_url=server.url)
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", "s3cret")
    assert works(open_pool(redis_url=server.url))
    add_user(server, "guest", "gu:est")
    monkeypatch.setenv("VLCACHE_REDIS_USERNAME", "guest")
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", "gu:est")
    assert works(open_pool(redis_url=server.url))
    monkeypatch.delenv("VLCACHE_REDIS_PASSWORD")
    with pytest.raises(ValueError, match="VLCACHE_REDIS_USERNAME is set without"):
        open_pool(redis_url=server.url)


def test_a_login_that_changes_is_taken_without_a_restart(
    redis_server: StartServer, open_pool: OpenPool, login_file: Path
) -> None:
    server = redis_server()
    add_user(server, "one", "first")
    login_file.write_text("one:first\n")
    pool = open_pool(**adapter_of(server))
    assert works(pool)
    assert users(server) == {"one"}
    # Both passwords are good for a while; then only the new one, and connections are lost.
    add_user(server, "one", "first", "second")
    replace(login_file, "one:second\n")
    assert works(pool)
    add_user(server, "one", "second")
    server.client.client_kill_filter(_type="normal", skipme=True)
    assert eventually(lambda: works(pool), 10)
    # Another user, and the first one is gone.
    add_user(server, "two", "third")
    server.client.execute_command("ACL", "DELUSER", "one")
    replace(login_file, "two:third\n")
    assert all(works(pool) for _ in range(10))
    assert users(server) == {"two"}


def test_who_was_locked_out_comes_back_with_the_new_login(
    redis_server: StartServer, open_pool: OpenPool, login_file: Path
) -> None:
    server = redis_server()
    add_user(server, "one", "first")
    login_file.write_text("one:first\n")
    pool = open_pool(**adapter_of(server))
    add_user(server, "one", "second")
    server.client.client_kill_filter(_type="normal", skipme=True)
    assert not works(pool)
    login_file.unlink()
    assert not works(pool)
    replace(login_file, "one:second\n")
    assert works(pool)
    assert works(pool)


def test_a_login_that_the_server_does_not_know_yet_costs_nothing(
    redis_server: StartServer,
    open_pool: OpenPool,
    login_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlcache_connector.storage.valkey._LOGIN_PAUSE", 0.2)
    server = redis_server()
    add_user(server, "one", "first")
    login_file.write_text("one:first\n")
    pool = open_pool(**adapter_of(server))
    replace(login_file, "two:second\n")
    for waiting in [pool.submit_set(f"k{number}", b"x") for number in range(20)]:
        waiting.result(20)  # by threads, too, that have not had a connection before
    assert all(works(pool) for _ in range(10))
    assert users(server) == {"one"}
    add_user(server, "two", "second")
    assert eventually(lambda: works(pool) and users(server) == {"two"}, 10)


@pytest.mark.parametrize("password", ["S3CRET-in-place", "wrong-S3CRET"])
def test_no_secret_is_shown(
    redis_server: StartServer,
    open_adapter: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    password: str,
) -> None:
    server = redis_server(requirepass="S3CRET-in-place")
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", password)
    caplog.set_level(logging.DEBUG)
    logging.getLogger("lmcache").setLevel(logging.DEBUG)
    seen = []
    options = adapter_of(server)
    seen.append(repr(inner_config(**options)) + repr(vars(inner_config(**options))))
    try:
        adapter = open_adapter(**options)
        seen.append(repr(adapter.report_status()) + repr(vars(adapter._pool)))
        assert works(adapter._pool)
        server.kill()
        assert not works(adapter._pool)
    except RuntimeError as error:
        seen.append(repr(error))
    printed = capfd.readouterr()
    seen += [caplog.text, printed.out, printed.err]
    assert "S3CRET" not in "".join(seen)


def test_certificates(
    proxied: tuple[str, Path, LocalRedis], open_pool: OpenPool, tmp_path: Path
) -> None:
    url, certificate, _ = proxied
    assert works(open_pool(redis_url=url, redis_tls_ca_file=str(certificate)))
    (tmp_path / "other").mkdir()
    other = make_certificate(tmp_path / "other")[0]
    for options in ({}, {"redis_tls_ca_file": str(other)}):
        with pytest.raises(RuntimeError, match="a certificate that tls_ca_file or the system"):
            open_pool(redis_url=url, **options)


@pytest.mark.parametrize("fault", ["away", "stopped"])
def test_a_server_that_comes_late_is_used(
    redis_server: StartServer, open_manager: Callable[..., StorageManager], fault: str
) -> None:
    server = redis_server()
    server.pause() if fault == "stopped" else server.kill()
    options = {"redis_url": server.url, "require_tiers": True}
    config = VLCacheConfig.from_extra_config(options)
    began = time.monotonic()
    manager = open_manager(*open_adapters(config, can_store=True))
    assert time.monotonic() - began < 10
    adapters = [adapter for _, adapter in manager.l2_adapters()]
    with pytest.raises(ConfigError) as refused:
        require_adapters(config, adapters)
    message = str(refused.value)
    assert f"redis_url='{server.url}' (valkey) is not there, and require_tiers=true: " in message
    assert f"127.0.0.1:{server.port} can't be used: " in message
    assert "\n" not in message
    require_adapters(config.model_copy(update={"require_tiers": False}), adapters)
    server.resume() if fault == "stopped" else server.start()
    assert eventually(lambda: "error" not in adapters[0].report_status(), 40)
    require_adapters(config, adapters)
    store(manager, 0)
    assert eventually(lambda: bool(server.client.dbsize()))


def test_a_server_that_was_killed_is_used_again(
    redis_server: StartServer, open_pool: OpenPool
) -> None:
    server = redis_server()
    pool = open_pool(**adapter_of(server))
    assert works(pool)
    server.kill()
    began = time.monotonic()
    assert not works(pool)
    assert time.monotonic() - began < 5
    server.start()
    assert eventually(lambda: works(pool))


def test_a_replica_may_be_read(redis_server: StartServer, open_pool: OpenPool) -> None:
    primary = redis_server()
    replica = redis_server(replicaof=f"127.0.0.1 {primary.port}")
    put(open_pool(**adapter_of(primary)))
    pool = open_pool(**adapter_of(replica))
    assert eventually(lambda: get(pool))
    with pytest.raises(Exception, match="read only replica"):
        put(pool)


def test_nothing_is_left_of_attempts_that_failed(open_pool: OpenPool) -> None:
    options = {
        "l2_adapters": [
            {
                "type": "valkey",
                "startup_nodes": f"127.0.0.1:{free_port()}",
                "connection_timeout": 0.2,
            }
        ]
    }

    def attempt() -> None:
        with pytest.raises(RuntimeError, match="can't be used: "):
            open_pool(**options)

    attempt()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        attempt()
    # What other tests left may go meanwhile.
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= files


def test_adapters_that_are_made_at_once_have_their_own_servers(
    redis_server: StartServer, open_pool: OpenPool
) -> None:
    original = valkey_l2_adapter.ValkeyWorkerPool
    servers = [redis_server() for _ in range(4)]

    def use(number: int) -> None:
        put(open_pool(**adapter_of(servers[number])), f"k{number}")

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [server.client.keys() for server in servers] == [[b"k0"], [b"k1"], [b"k2"], [b"k3"]]
    assert valkey_l2_adapter.ValkeyWorkerPool is original


def test_another_lmcache_is_refused_by_what_it_lacks(
    redis_server: StartServer, open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = redis_server()

    class Renamed(valkey_l2_adapter.ValkeyL2Adapter):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self._workers = self.__dict__.pop("_pool")

        def close(self) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(valkey_l2_adapter, "ValkeyL2Adapter", Renamed)
        with pytest.raises(RuntimeError, match=r"has no ValkeyL2Adapter\._pool as 0\.5\.6"):
            open_pool(**adapter_of(server))
    monkeypatch.delattr(valkey_l2_adapter.ValkeyWorkerPool, "_build_expiry")
    with pytest.raises(RuntimeError, match=r"has no _build_expiry as 0\.5\.6"):
        open_pool(**adapter_of(server))

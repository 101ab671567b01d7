"""The Redis tier against real servers: contents, faults, deadlines, and no secret anywhere."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from local_redis import LocalRedis

from tests.helpers.proxy import Proxy, make_certificate
from vlcache_connector.tiers import Deadline, Name, RedisTier, TierError
from vlcache_connector.tiers.redis import pack_meta, unpack_meta

MIB = 1 << 20
NAME = Name("kv", "a1b2/3", 0, 2)
ENDED = 15.0
"""Seconds. A paused server never answers: what comes back by then was ended by its deadline."""

StartServer = Callable[..., LocalRedis]
MakeTier = Callable[..., RedisTier]


def soon() -> Deadline:
    return Deadline(20)


@pytest.fixture
def make_tier() -> Iterator[MakeTier]:
    tiers: list[RedisTier] = []

    def make(url: str, dep: str = "dep", ttl: float | None = 600.0, **options: object) -> RedisTier:
        tiers.append(RedisTier(url, dep, ttl, **options))  # type: ignore[arg-type]
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.close()


@pytest.fixture
def make_proxy() -> Iterator[Callable[..., Proxy]]:
    proxies: list[Proxy] = []

    def make(*args: object) -> Proxy:
        proxies.append(Proxy(*args))  # type: ignore[arg-type]
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


@pytest.fixture(scope="module")
def objects() -> list[bytes]:
    return [os.urandom(20 * MIB + 7), b"", os.urandom(3)]


def read(tier: RedisTier, name: Name = NAME, max_bytes: int = 64 * MIB) -> list[bytes] | None:
    found = tier.read(name, max_bytes, soon())
    return None if found is None else [bytes(obj) for obj in found]


def fault_of(call: Callable[[], object]) -> str:
    with pytest.raises(TierError) as caught:
        call()
    return caught.value.fault


def test_a_segment_comes_back_from_another_client(
    redis_server: StartServer, make_tier: MakeTier, objects: list[bytes], tmp_path: Path
) -> None:
    socket_path = tmp_path / "redis.sock"
    server = redis_server(unixsocket=socket_path)
    tier = make_tier(server.url)
    assert tier.sizes([NAME], soon()) == [None]
    assert read(tier) is None
    tier.write(NAME, [memoryview(objects[0]), bytearray(objects[1]), objects[2]], soon())
    size = sum(map(len, objects))
    for again in (tier, make_tier(server.url), make_tier(f"unix://{socket_path}")):
        assert again.sizes([Name("kv", "x", 0, 2), NAME], soon()) == [None, size]
        assert read(again) == objects
        (entry,) = again.entries(soon())
        assert (entry.name, entry.num_bytes) == (NAME, size)
        assert 0 <= entry.age_seconds < 60
        assert entry.ttl_seconds is not None
        assert 500 < entry.ttl_seconds <= 600
        usage = again.usage(soon())
        assert (usage.num_segments, usage.num_bytes, usage.budget_bytes) == (1, size, None)
    for num_bytes, expected in ((7, objects[0][:7]), (64 * MIB, objects[0])):
        beginning = tier.beginning(NAME, num_bytes, soon())
        assert beginning is not None
        assert bytes(beginning) == expected
    assert tier.beginning(Name("kv", "x", 0, 2), 7, soon()) is None
    found = tier.read(NAME, 64 * MIB, soon())
    assert found is not None
    found[0][:3] = b"new"  # writable, and nobody else's
    assert read(tier) == objects
    keys = sorted(server.client.keys())
    assert keys[0] == b"vlcache:dep:kv:{a1b2/3}:0/2:0"
    assert keys[-1] == b"vlcache:dep:kv:{a1b2/3}:0/2:meta"
    assert tier.remove([NAME, Name("kv", "x", 0, 2)], soon()) == 1
    assert server.client.keys() == []


@pytest.mark.parametrize(
    "other",
    [
        Name("encoder", NAME.key, 0, 2),
        Name("kv", "a1b2/4", 0, 2),
        Name("kv", NAME.key, 1, 2),
        Name("kv", NAME.key, 0, 4),
        Name("kv", "odd}:0/2:meta{*ä", 0, 2),
    ],
)
def test_names_do_not_meet(redis_server: StartServer, make_tier: MakeTier, other: Name) -> None:
    tier = make_tier(redis_server().url)
    tier.write(NAME, [b"mine"], soon())
    assert tier.sizes([other], soon()) == [None]
    tier.write(other, [b"other", b"two"], soon())
    assert (read(tier), read(tier, other)) == ([b"mine"], [b"other", b"two"])
    assert {entry.name for entry in tier.entries(soon())} == {NAME, other}
    assert tier.remove([other], soon()) == 1
    assert read(tier) == [b"mine"]


def test_deployments_and_databases_do_not_meet(
    redis_server: StartServer, make_tier: MakeTier
) -> None:
    server = redis_server()
    tier = make_tier(server.url)
    tier.write(NAME, [b"mine"], soon())
    tier.record_model("fp", "org/model", soon())
    for other in (make_tier(server.url, "dep2"), make_tier(server.url + "/3")):
        assert read(other) is None
        assert list(other.entries(soon())) == []
        assert other.models(soon()) == {}
    assert make_tier(server.url).models(soon()) == {"fp": "org/model"}
    with pytest.raises(ValueError, match="deployment="):
        make_tier(server.url, "a*")


def test_many_segments_are_listed(redis_server: StartServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server().url, ttl=None)
    names = [Name("kv", f"key{number}", 0, 1) for number in range(1200)]
    for name in names:
        tier.write(name, [b"x"], soon())
    entries = list(tier.entries(soon()))
    assert {entry.name for entry in entries} == set(names)
    assert {entry.ttl_seconds for entry in entries} == {None}
    assert tier.sizes(names, soon()) == [1] * 1200
    assert tier.remove(names, soon()) == 1200


def test_time_to_live(redis_server: StartServer, make_tier: MakeTier) -> None:
    server = redis_server()
    tier = make_tier(server.url, ttl=0.4)
    tier.write(NAME, [b"one", b"two"], soon())
    assert read(tier) == [b"one", b"two"]
    time.sleep(0.5)
    assert tier.sizes([NAME], soon()) == [None]
    assert read(tier) is None
    assert server.client.dbsize() == 0


def test_a_write_replaces_and_leaves_nothing_behind(
    redis_server: StartServer, make_tier: MakeTier
) -> None:
    server = redis_server()
    tier = make_tier(server.url)
    tier.write(NAME, [b"1", b"2", b"3"], soon())
    tier.write(NAME, [b"new"], soon())
    assert read(tier) == [b"new"]
    assert server.client.dbsize() == 2


def test_readers_never_mix_two_writers(redis_server: StartServer, make_tier: MakeTier) -> None:
    server = redis_server()
    versions = [[bytes([number]) * (20 * MIB), bytes([number])] for number in range(2)]
    make_tier(server.url).write(NAME, versions[0], soon())
    ended = threading.Event()
    failures: list[BaseException] = []

    def write(version: list[bytes]) -> None:
        tier = make_tier(server.url)
        try:
            while not ended.is_set():
                tier.write(NAME, version, soon())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    try:
        tier = make_tier(server.url)
        found = [read(tier) for _ in range(15)]
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert all(version is None or version in versions for version in found)
    assert None in found  # or else there was nothing to tell apart


def test_a_segment_that_lost_an_object_is_a_miss_and_goes(
    redis_server: StartServer, make_tier: MakeTier
) -> None:
    server = redis_server()
    tier = make_tier(server.url)
    tier.write(NAME, [b"one", b"two"], soon())
    server.client.delete("vlcache:dep:kv:{a1b2/3}:0/2:1")
    assert read(tier) is None
    assert server.client.dbsize() == 0


@pytest.mark.parametrize("foreign", [b"x", b"\x94\x01\xa1x\xcb", b"\xc1" * 100_000])
def test_foreign_values_are_damaged(
    redis_server: StartServer, make_tier: MakeTier, foreign: bytes
) -> None:
    server = redis_server()
    tier = make_tier(server.url)
    server.client.set("vlcache:dep:kv:{a1b2/3}:0/2:meta", foreign)
    assert tier.sizes([NAME], soon()) == [None]
    assert list(tier.entries(soon())) == []
    assert fault_of(lambda: read(tier)) == "damaged"
    assert tier.remove([NAME], soon()) == 1
    assert read(tier) is None


def test_a_foreign_type_is_damaged(redis_server: StartServer, make_tier: MakeTier) -> None:
    server = redis_server()
    tier = make_tier(server.url)
    server.client.rpush("vlcache:dep:kv:{a1b2/3}:0/2:meta", "x")
    assert tier.sizes([NAME], soon()) == [None]
    assert fault_of(lambda: read(tier)) == "damaged"
    assert list(tier.entries(soon())) == []
    tier.write(NAME, [b"new"], soon())
    assert read(tier) == [b"new"]


def test_more_than_expected_is_refused(redis_server: StartServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server().url)
    tier.write(NAME, [b"12345"], soon())
    assert read(tier, max_bytes=5) == [b"12345"]
    with pytest.raises(TierError, match="at most 4") as caught:
        read(tier, max_bytes=4)
    assert caught.value.fault == "damaged"


@given(st.binary(max_size=100) | st.lists(st.integers(-5, 1 << 70) | st.text(), max_size=5))
def test_unknown_descriptions_are_damaged(content: bytes | list[object]) -> None:
    import msgpack

    try:
        raw = content if isinstance(content, bytes) else msgpack.packb(content)
    except OverflowError:
        return
    with pytest.raises(TierError) as caught:
        unpack_meta(raw)
    assert caught.value.fault == "damaged"


@given(st.lists(st.integers(0, 1 << 40), max_size=100))
def test_descriptions_come_back(lengths: list[int]) -> None:
    raw = pack_meta(lengths)
    assert unpack_meta(raw)[1] == tuple(lengths)
    assert pack_meta(lengths) != raw


def test_a_full_server(redis_server: StartServer, make_tier: MakeTier) -> None:
    server = redis_server(maxmemory="16mb", maxmemory_policy="noeviction")
    tier = make_tier(server.url)
    tier.write(NAME, [bytes(MIB)], soon())
    with pytest.raises(TierError) as caught:
        tier.write(NAME, [bytes(5 * MIB)] * 3, soon())
    assert caught.value.fault == "full"
    assert read(tier) == [bytes(MIB)]


def test_credentials(
    redis_server: StartServer,
    make_tier: MakeTier,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    server = redis_server(requirepass="s3cret")
    assert fault_of(lambda: make_tier(server.url).sizes([NAME], soon())) == "auth"
    assert fault_of(lambda: make_tier(server.url).write(NAME, [b"x"], soon())) == "auth"
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", "wrong")
    assert fault_of(lambda: read(make_tier(server.url))) == "auth"
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", "s3cret")
    make_tier(server.url).write(NAME, [b"x"], soon())
    monkeypatch.delenv("VLCACHE_REDIS_PASSWORD")
    server.client.execute_command("ACL", "SETUSER", "guest", "on", ">gu:est", "~*", "+getrange")
    (tmp_path / "login").write_text("guest:gu:est\n")
    monkeypatch.setenv("VLCACHE_REDIS_CREDENTIALS_FILE", str(tmp_path / "login"))
    guest = make_tier(server.url)
    assert read(guest) == [b"x"]
    assert fault_of(lambda: guest.write(NAME, [b"y"], soon())) == "auth"
    assert fault_of(lambda: guest.models(soon())) == "auth"
    assert read(guest) == [b"x"]


@pytest.mark.parametrize("password", ["S3CRET-in-place", "wrong-S3CRET"])
def test_no_secret_is_shown(
    redis_server: StartServer,
    make_tier: MakeTier,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    password: str,
) -> None:
    server = redis_server(requirepass="S3CRET-in-place")
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", password)
    caplog.set_level(logging.DEBUG)
    tier = make_tier(server.url)
    unreachable = make_tier("redis://127.0.0.1:1")
    cluster = make_tier(server.url.replace("redis:", "redis+cluster:"))
    sentinel = make_tier(server.url.replace("redis:", "redis+sentinel:") + "/main")
    seen = [repr(vars(tier)), repr(tier), repr(tier._client.connection_pool)]  # type: ignore[union-attr]
    for each in (tier, unreachable, cluster, sentinel):
        for call in (
            lambda each=each: each.write(NAME, [b"x"], Deadline(2)),
            lambda each=each: each.read(NAME, 1, Deadline(2)),
            lambda each=each: list(each.entries(Deadline(2))),
        ):
            try:
                call()
            except TierError:
                seen.append(traceback.format_exc())
    server.kill()
    try:
        tier.sizes([NAME], Deadline(2))
    except TierError:
        seen.append(traceback.format_exc())
    printed = capfd.readouterr()
    seen += [caplog.text, printed.out, printed.err]
    assert len(seen) > 9
    assert "TierError" in "".join(seen)
    assert "S3CRET" not in "".join(seen)


def calls(tier: RedisTier, seconds: float) -> list[Callable[[], object]]:
    """Every operation, with a deadline that begins when it is called."""
    return [
        lambda: tier.sizes([NAME], Deadline(seconds)),
        lambda: tier.read(NAME, 64 * MIB, Deadline(seconds)),
        lambda: tier.write(NAME, [bytes(20 * MIB)], Deadline(seconds)),
        lambda: tier.remove([NAME], Deadline(seconds)),
        lambda: list(tier.entries(Deadline(seconds))),
        lambda: tier.record_model("fp", "model", Deadline(seconds)),
    ]


@pytest.mark.parametrize("connected", [True, False])
def test_a_server_that_hangs_costs_no_more_than_the_deadline(
    redis_server: StartServer, make_tier: MakeTier, connected: bool
) -> None:
    server = redis_server()
    tier = make_tier(server.url)
    if connected:
        tier.write(NAME, [b"x"], soon())
    server.pause()
    for call in calls(tier, 0.2):
        started = time.monotonic()
        assert fault_of(call) == "timeout"
        assert 0.15 < time.monotonic() - started < ENDED
    server.resume()
    tier.write(NAME, [b"y"], soon())
    assert read(tier) == [b"y"]


def test_a_server_that_hangs_amid_a_write_stores_nothing_of_it(
    redis_server: StartServer, make_tier: MakeTier
) -> None:
    server = redis_server()
    tier = make_tier(server.url)
    tier.write(NAME, [b"before"], soon())
    timer = threading.Timer(0.05, server.pause)
    timer.start()
    try:
        fault = fault_of(lambda: tier.write(NAME, [bytes(4 * MIB)] * 500, Deadline(0.5)))
    finally:
        timer.join()
        server.resume()
    assert fault == "timeout"
    assert read(tier) == [b"before"]
    assert server.client.dbsize() == 2


def test_answers_that_drip_do_not_outlast_the_deadline(
    redis_server: StartServer,
    make_tier: MakeTier,
    make_proxy: Callable[..., Proxy],
    objects: list[bytes],
) -> None:
    server = redis_server()
    make_tier(server.url).write(NAME, objects, soon())
    proxy = make_proxy(server.port)
    proxy.bytes_per_second = MIB
    tier = make_tier(f"redis://127.0.0.1:{proxy.port}")
    assert tier.sizes([NAME], soon()) != [None]
    started = time.monotonic()
    assert fault_of(lambda: tier.read(NAME, 64 * MIB, Deadline(0.4))) == "timeout"
    assert time.monotonic() - started < 10  # without a deadline 20
    proxy.bytes_per_second = None
    assert read(tier) == objects


def test_a_connection_cut_in_the_middle(
    redis_server: StartServer,
    make_tier: MakeTier,
    make_proxy: Callable[..., Proxy],
    objects: list[bytes],
) -> None:
    server = redis_server()
    make_tier(server.url).write(NAME, objects, soon())
    proxy = make_proxy(server.port)
    tier = make_tier(f"redis://127.0.0.1:{proxy.port}")
    proxy.cut_after = 5 * MIB
    assert fault_of(lambda: read(tier)) == "connection"
    proxy.cut_after = None
    assert read(tier) == objects


def test_connections_dropped_between_calls_are_made_anew(
    redis_server: StartServer, make_tier: MakeTier
) -> None:
    server = redis_server()
    tier = make_tier(server.url)
    tier.write(NAME, [b"x"], soon())
    server.client.client_kill_filter(_type="normal")
    assert read(tier) == [b"x"]


def test_a_killed_server(redis_server: StartServer, make_tier: MakeTier) -> None:
    server = redis_server()
    tier = make_tier(server.url)
    tier.write(NAME, [b"x"], soon())
    server.kill()
    for call in calls(tier, 60):
        started = time.monotonic()
        assert fault_of(call) == "connection"
        assert time.monotonic() - started < 30
    server.start()
    assert read(tier) is None
    tier.write(NAME, [b"y"], soon())
    assert read(tier) == [b"y"]


def test_connections_are_bounded_and_waiting_for_one_too(
    redis_server: StartServer, make_tier: MakeTier
) -> None:
    server = redis_server()
    tier = make_tier(server.url, max_connections=2)
    data = bytes(8 * MIB)  # large enough for the reads to meet
    tier.write(NAME, [data], soon())
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(read(tier))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[data]] * 16
    ours = [client for client in server.client.client_list() if client["cmd"] == "getrange"]
    assert 1 <= len(ours) <= 2

    server.pause()
    holders = [threading.Thread(target=lambda: tier.sizes([NAME], soon())) for _ in range(2)]
    for holder in holders:
        holder.start()
    time.sleep(0.1)
    started = time.monotonic()
    with pytest.raises(TierError, match="other calls had all connections") as caught:
        tier.sizes([NAME], Deadline(0.2))
    assert caught.value.fault == "timeout"
    assert time.monotonic() - started < ENDED
    server.resume()
    for holder in holders:
        holder.join()


def test_a_passed_deadline(redis_server: StartServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server().url)
    for call in calls(tier, 0):
        assert fault_of(call) == "timeout"


def test_tls(
    redis_server: StartServer,
    make_tier: MakeTier,
    make_proxy: Callable[..., Proxy],
    tmp_path: Path,
    objects: list[bytes],
) -> None:
    pytest.importorskip("cryptography")
    server = redis_server()
    certificate, context = make_certificate(tmp_path)
    proxy = make_proxy(server.port, context)
    url = f"rediss://127.0.0.1:{proxy.port}"
    tier = make_tier(url, tls_ca_file=str(certificate))
    tier.write(NAME, objects, soon())
    assert read(tier) == objects
    assert fault_of(lambda: read(make_tier(url))) == "connection"  # not trusted
    other = tmp_path / "other"
    other.mkdir()
    assert fault_of(lambda: read(make_tier(url, tls_ca_file=str(make_certificate(other)[0])))) == (
        "connection"
    )
    server.pause()
    for each in (tier, make_tier(url, tls_ca_file=str(certificate))):
        started = time.monotonic()
        assert fault_of(lambda each=each: each.sizes([NAME], Deadline(0.3))) == "timeout"
        assert time.monotonic() - started < ENDED
    server.resume()
    with pytest.raises(ValueError, match=r"tls_ca_file=.*begins with rediss"):
        make_tier(server.url, tls_ca_file=str(certificate))
    with pytest.raises(ValueError, match=r"tls_ca_file=.*missing"):
        make_tier(url, tls_ca_file=str(tmp_path / "missing"))


def test_sentinel(redis_server: StartServer, make_tier: MakeTier) -> None:
    primary = redis_server()
    sentinel = redis_server(sentinel=True, sentinel_monitor=f"main 127.0.0.1 {primary.port} 1")
    url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/main"
    tier = make_tier(url)
    tier.write(NAME, [b"x"], soon())
    assert read(tier) == [b"x"]
    assert read(make_tier(primary.url)) == [b"x"]
    assert fault_of(lambda: read(make_tier(url.replace("/main", "/other")))) == "connection"
    # One that hangs leaves time to ask the next one.
    second = redis_server(sentinel=True, sentinel_monitor=f"main 127.0.0.1 {primary.port} 1")
    sentinel.pause()
    patient = make_tier(f"redis+sentinel://127.0.0.1:{sentinel.port},127.0.0.1:{second.port}/main")
    started = time.monotonic()
    assert patient.sizes([NAME], Deadline(1.0)) == [1]
    assert time.monotonic() - started > 0.2
    # A sentinel that hangs, with none after it to ask.
    sentinel.pause()
    started = time.monotonic()
    assert fault_of(lambda: make_tier(url).sizes([NAME], Deadline(1.0))) in (
        "connection",
        "timeout",
    )
    assert time.monotonic() - started < ENDED
    assert read(tier) == [b"x"]  # known by now
    sentinel.resume()


@pytest.fixture
def cluster(redis_server: StartServer) -> list[LocalRedis]:
    """Two primaries that share the slots."""
    servers = [redis_server(cluster_enabled="yes", cluster_node_timeout=2000) for _ in range(2)]
    for server, slots in zip(servers, (range(8192), range(8192, 16384)), strict=True):
        server.client.execute_command("CLUSTER ADDSLOTS", *slots)
    servers[0].client.execute_command("CLUSTER MEET", "127.0.0.1", servers[1].port)
    until = time.monotonic() + 30
    while any(
        server.client.execute_command("CLUSTER INFO")["cluster_state"] != "ok" for server in servers
    ):
        assert time.monotonic() < until, "the cluster does not come up"
        time.sleep(0.1)
    return servers


def test_cluster(cluster: list[LocalRedis], make_tier: MakeTier, objects: list[bytes]) -> None:
    url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster[0].port}"
    tier = make_tier(url)
    names = [Name("kv", f"key{number}", 0, 1) for number in range(8)]
    for name in names:
        tier.write(name, [name.key.encode(), b"two"], soon())
    tier.write(NAME, objects, soon())
    assert all(server.client.dbsize() >= 3 for server in cluster)
    assert read(make_tier(url)) == objects
    assert [read(tier, name) for name in names] == [[n.key.encode(), b"two"] for n in names]
    assert tier.sizes([*names, Name("kv", "x", 0, 1)], soon()) == [7] * 8 + [None]
    assert {entry.name for entry in tier.entries(soon())} == {*names, NAME}
    tier.record_model("fp", "model", soon())
    assert tier.models(soon()) == {"fp": "model"}
    assert tier.remove(names, soon()) == 8
    assert tier.usage(soon()).num_segments == 1

    for server in cluster:
        server.pause()
    started = time.monotonic()
    assert fault_of(lambda: tier.sizes(names, Deadline(0.3))) == "timeout"
    assert fault_of(lambda: make_tier(url).sizes(names, Deadline(0.3))) == "timeout"
    assert time.monotonic() - started < ENDED
    for server in cluster:
        server.resume()
    assert read(tier) == objects


def test_a_cluster_whose_slots_move(cluster: list[LocalRedis], make_tier: MakeTier) -> None:
    tier = make_tier(f"redis+cluster://127.0.0.1:{cluster[0].port}")
    tier.write(NAME, [b"x"], soon())
    tier.remove([NAME], soon())
    slot = redis.crc.key_slot(NAME.key.encode())
    (source, target) = cluster if slot < 8192 else cluster[::-1]
    target_id = target.client.execute_command("CLUSTER MYID")
    for server in (target, source):
        server.client.execute_command("CLUSTER SETSLOT", slot, "NODE", target_id)
    assert fault_of(lambda: tier.write(NAME, [b"y"], soon())) == "connection"
    tier.write(NAME, [b"y"], soon())
    assert read(tier) == [b"y"]
    assert target.client.dbsize() == 2


def test_nothing_is_connected_before_the_first_call() -> None:
    for scheme, path in (("redis", ""), ("redis+cluster", ""), ("redis+sentinel", "/main")):
        tier = RedisTier(f"{scheme}://127.0.0.1:1{path}", "dep", 1.0)
        assert fault_of(lambda tier=tier: tier.sizes([NAME], Deadline(1))) == "connection"
        tier.close()
        tier.close()

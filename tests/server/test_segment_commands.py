"""`vlcache ls`, `stat`, `check` and `rm`, over what LMCache's own adapters stored."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter import _object_key_to_string
from local_redis import LocalRedis, free_port
from torch import Tensor

from tests.helpers.stored_objects import encoder_form, kv_form, sealed, store
from vlcache_connector import cli
from vlcache_connector.cli import console
from vlcache_connector.storage import listing
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.layout import Space
from vlcache_connector.storage.names import Namespace, read_file_name, read_key
from vlcache_connector.storage.redis_url import RedisAddress

# LMCache's logging sets off a deprecation inside OpenTelemetry.
pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")

KEYS = {"large": "a" * 63 + "1/0", "small": "a" * 63 + "2/0", "rows": "b" * 64, "other": "c" * 64}
MODEL, OTHER_MODEL = "1" * 64, "2" * 64
KINDS = ("fs", "fs_native", "valkey", "resp")
SECRET = "hunter2-secret"
Objects = dict[ObjectKey, Tensor]


def space(model: str = MODEL, deployment: str = "default", rank: int = 0) -> Space:
    namespace = str(Namespace(deployment, model))
    return Space(namespace, rank, num_ranks=2, max_object_bytes=1 << 14)


def objects_of(name: str, **where: Any) -> Objects:
    form = encoder_form(600) if name == "rows" else kv_form(80 if name == "large" else 20)
    if name == "other":
        where = {"model": OTHER_MODEL, "deployment": "second"}
    return sealed(space(**where), SegmentId(KEYS[name], form.kind), form, salt="5a17")


OBJECTS = {name: objects_of(name) for name in KEYS}
SIZES = {
    name: sum(value.numel() for value in objects.values()) for name, objects in OBJECTS.items()
}


@dataclass
class Place:
    """Where segments lie, and the options that lead a command there."""

    spec: dict[str, Any]
    options: tuple[str, ...]
    folder: Path | None = None
    server: LocalRedis | None = None

    def write(self, objects: Mapping[ObjectKey, Tensor]) -> None:
        store(self.spec, objects)

    def names(self) -> set[str]:
        if self.folder is not None:
            return {path.name for path in self.folder.iterdir()}
        assert self.server is not None
        return {key.decode() for key in self.server.client.scan_iter()}

    def hashes(self) -> set[bytes]:
        """Of the segments that lie there."""
        found = set()
        for name in self.names():
            if self.folder is not None:
                named = read_file_name(name)
                stored = named[0] if named is not None else None
            else:
                stored = read_key(name)
            assert stored is not None
            found.add(stored.key.chunk_hash)
        return found

    def change(self, key: ObjectKey, change: Callable[[bytes], bytes]) -> None:
        """Replace what lies under a key."""
        [name] = [name for name in self.names() if self._key(name) == key]
        if self.folder is not None:
            path = self.folder / name
            path.write_bytes(change(path.read_bytes()))
        else:
            assert self.server is not None
            value: Any = self.server.client.get(name)
            self.server.client.set(name, change(value))

    def remove(self, key: ObjectKey) -> None:
        [name] = [name for name in self.names() if self._key(name) == key]
        if self.folder is not None:
            (self.folder / name).unlink()
        else:
            assert self.server is not None
            self.server.client.delete(name)

    def _key(self, name: str) -> ObjectKey:
        named = read_file_name(name)
        stored = named[0] if named is not None else read_key(name)
        assert stored is not None
        return stored.key


def hash_of(name: str) -> bytes:
    return next(iter(OBJECTS[name])).chunk_hash


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, redis_server: Callable[..., LocalRedis]
) -> Place:
    """An empty one."""
    if request.param.startswith("fs"):
        folder = tmp_path / "segments"
        folder.mkdir()
        spec = {"type": request.param, "base_path": str(folder)}
        return Place(spec, ("--disk-path", str(folder)), folder=folder)
    server = redis_server()
    options = ("--redis-url", server.url)
    spec = {"type": request.param}
    if request.param == "valkey":
        spec |= {"startup_nodes": f"127.0.0.1:{server.port}", "ttl_seconds": 1000}
    else:
        spec |= {"host": "127.0.0.1", "port": server.port}
    return Place(spec, options, server=server)


@pytest.fixture
def filled(place: Place) -> Place:
    """With all segments, and the small one of another rank."""
    both = OBJECTS["small"] | objects_of("small", rank=1)
    place.write(both | OBJECTS["large"] | OBJECTS["rows"] | OBJECTS["other"])
    return place


Vlcache = Callable[..., Any]


@pytest.fixture
def vlcache(capsys: pytest.CaptureFixture[str]) -> Vlcache:
    """Runs a command with --json; returns what it prints, read back."""

    def run(command: str, *arguments: object, status: int = 0) -> Any:
        capsys.readouterr()
        assert cli.main([command, *map(str, arguments), "--json"]) == status
        return json.loads(capsys.readouterr().out)

    return run


# -- ls -----------------------------------------------------------------------------------------


def test_ls_describes_segments(filled: Place, vlcache: Vlcache) -> None:
    listed = vlcache("ls", *filled.options)
    assert listed["num_segments"] == len(listed["segments"]) == 5
    assert listed["num_bytes"] == sum(SIZES.values()) + SIZES["small"]
    by_name = {(row["key"], row["rank"]): row for row in listed["segments"]}
    row = by_name[KEYS["rows"], 0]
    assert (row["kind"], row["num_ranks"], row["salt"]) == ("encoder", 2, "5a17")
    assert (row["num_objects"], row["num_bytes"]) == (len(OBJECTS["rows"]), SIZES["rows"])
    assert (row["deployment"], row["fingerprint"]) == ("default", MODEL)
    other = by_name[KEYS["other"], 0]
    assert (other["deployment"], other["fingerprint"]) == ("second", OTHER_MODEL)
    assert by_name[KEYS["small"], 1]["kind"] == "kv"
    if filled.folder is not None:
        assert 0 <= row["age_seconds"] < 100
    if filled.spec["type"] == "valkey":
        assert 800 < row["ttl_seconds"] <= 1100
    else:
        assert row["ttl_seconds"] is None


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (("--kind", "encoder"), {"rows"}),
        (("--key", "aaaa"), {"large", "small"}),
        (("--key", "bb", "cc"), {"rows", "other"}),
        (("--model", MODEL), {"large", "small", "rows"}),
        (("--model", OTHER_MODEL[:8]), {"other"}),
        (("--deployment", "second"), {"other"}),
        (("--deployment", "default", "--kind", "kv"), {"large", "small"}),
        (("--deployment", "third"), set()),
    ],
)
@pytest.mark.parametrize("place", ["fs", "valkey"], indirect=True)
def test_ls_filters(
    filled: Place, filters: tuple[str, ...], names: set[str], vlcache: Vlcache
) -> None:
    listed = vlcache("ls", *filled.options, *filters)
    assert {row["key"] for row in listed["segments"]} == {KEYS[name] for name in names}


@pytest.mark.parametrize("place", ["fs"], indirect=True)
def test_ls_shows_the_youngest_first(filled: Place, vlcache: Vlcache) -> None:
    assert filled.folder is not None
    for path in filled.folder.iterdir():
        if hash_of("large").hex() in path.name:
            os.utime(path, (time.time() - 7200, time.time() - 7200))
    listed = vlcache("ls", *filled.options)["segments"]
    assert listed[-1]["key"] == KEYS["large"]
    limited = vlcache("ls", *filled.options, "--limit", 2)
    assert limited["segments"] == [
        {**row, "age_seconds": r["age_seconds"]}
        for row, r in zip(listed[:2], limited["segments"], strict=True)
    ]
    assert limited["num_segments"] == 5
    old = vlcache("ls", *filled.options, "--older-than", "1h")["segments"]
    assert [row["key"] for row in old] == [KEYS["large"]]


def test_ls_for_people(
    filled: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["ls", *filled.options, "--limit", "4"]) == 0
    assert "Shown are the first 4" in capsys.readouterr().out
    assert cli.main(["ls", *filled.options]) == 0
    shown = capsys.readouterr().out
    assert "Shown are" not in shown
    assert "a" * 12 + "…/0" in shown
    assert KEYS["large"] not in shown
    assert "222222222222…" in shown


def test_headers_of_any_length_have_the_key(
    filled: Place, vlcache: Vlcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(row["key"] for row in vlcache("ls", *filled.options)["segments"])
    monkeypatch.setattr(listing, "_HEADER_BYTES", 16)
    assert sorted(row["key"] for row in vlcache("ls", *filled.options)["segments"]) == before


def test_what_is_not_ours_is_not_seen(place: Place, vlcache: Vlcache) -> None:
    names = ("vlcache", "vlcache1-default-11@x", "meta-llama@01000100@0@" + "ab" * 32)
    for name in names:
        if place.folder is not None:
            (place.folder / f"{name}.data").write_text("precious")
        else:
            assert place.server is not None
            place.server.client.rpush(name, "precious")
    if place.server is not None:  # called like ours, and no string
        place.server.client.rpush("vlcache1-default-11@01000100@0@" + "ab" * 32, "precious")
    before = place.names()
    place.write(OBJECTS["small"])
    assert vlcache("ls", *place.options)["num_segments"] == 1
    assert vlcache("check", *place.options)["sound"] == 1
    assert vlcache("rm", *place.options, "--all", "--yes")["removed"] == 1
    assert place.names() == before


# -- stat ---------------------------------------------------------------------------------------


def test_stat_counts_by_owner_and_kind(filled: Place, vlcache: Vlcache) -> None:
    counted = vlcache("stat", *filled.options)
    assert counted["num_segments"] == 5
    assert counted["num_bytes"] == sum(SIZES.values()) + SIZES["small"]
    groups = {
        (group["deployment"], group["fingerprint"], group["kind"]): (
            group["num_segments"],
            group["num_bytes"],
        )
        for group in counted["groups"]
    }
    assert groups == {
        ("default", MODEL, "kv"): (3, SIZES["large"] + 2 * SIZES["small"]),
        ("default", MODEL, "encoder"): (1, SIZES["rows"]),
        ("second", OTHER_MODEL, "kv"): (1, SIZES["other"]),
    }


def test_stat_for_people(filled: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stat", *filled.options]) == 0
    assert "Segments: 5, " in capsys.readouterr().out


def test_stat_of_nothing(place: Place, vlcache: Vlcache) -> None:
    counted = vlcache("stat", *place.options)
    assert (counted["num_segments"], counted["groups"]) == (0, [])
    assert counted["oldest_seconds"] is None


# -- check --------------------------------------------------------------------------------------


def test_check_finds_nothing_wrong(
    filled: Place, vlcache: Vlcache, capsys: pytest.CaptureFixture[str]
) -> None:
    result = vlcache("check", *filled.options)
    assert (result["sound"], result["gone"], result["damaged"]) == (5, 0, [])
    assert cli.main(["check", *filled.options]) == 0
    assert "5 sound, 0 damaged\n" in capsys.readouterr().out


def turned_over(value: bytes) -> bytes:
    """One bit of the payload."""
    return value[:-1] + bytes([value[-1] ^ 1])


def test_check_finds_and_removes_what_is_damaged(
    filled: Place, vlcache: Vlcache, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = OBJECTS["large"]
    swapped = bytes(OBJECTS["large"][first].numpy())
    filled.change(list(OBJECTS["small"])[-1], turned_over)
    filled.change(second, lambda _: swapped)
    filled.change(list(OBJECTS["rows"])[-1], lambda _: b"nonsense")
    damaged = {("small", "checksum"), ("large", "identity"), ("rows", "format")}
    found = vlcache("check", *filled.options, status=1)
    assert (found["sound"], found["removed"]) == (2, 0)
    assert {(row["key"], row["rank"], row["reason"]) for row in found["damaged"]} == {
        (KEYS[name], 0, reason) for name, reason in damaged
    }
    assert cli.main(["check", *filled.options]) == 1
    assert "2 sound, 3 damaged\n" in capsys.readouterr().out
    assert filled.hashes() == {hash_of(name) for name in KEYS}
    found = vlcache("check", *filled.options, "--remove-damaged", status=1)
    assert found["removed"] == len(found["damaged"]) == 3
    assert vlcache("check", *filled.options)["sound"] == 2
    assert {(row["key"], row["rank"]) for row in vlcache("ls", *filled.options)["segments"]} == {
        (KEYS["small"], 1),
        (KEYS["other"], 0),
    }


@pytest.mark.parametrize("place", ["fs", "valkey"], indirect=True)
def test_what_can_be_explained_otherwise_is_not_removed(place: Place, vlcache: Vlcache) -> None:
    # A segment of which an object was dropped, or is still on its way.
    place.write(OBJECTS["large"])
    place.remove(list(OBJECTS["large"])[1])
    # All of a model: as LMCache's encryption leaves it.
    encrypted = objects_of("small", model="3" * 64)
    place.write(encrypted)
    for key in encrypted:
        place.change(key, lambda value: bytes(byte ^ 0x55 for byte in value))
    # Of a release to come.
    later = Space(str(Namespace("default", MODEL, 2)), 0, 2, 1 << 14)
    place.write(sealed(later, SegmentId(KEYS["small"], "kv"), kv_form(20)))
    before = place.names()
    found = vlcache("check", *place.options, "--remove-damaged")
    assert {
        name: found[name] for name in ("sound", "incomplete", "unreadable", "other_version")
    } == {"sound": 0, "incomplete": 1, "unreadable": 1, "other_version": 1}
    assert (found["damaged"], found["removed"]) == ([], 0)
    assert place.names() == before
    keys = {row["fingerprint"]: row["key"] for row in vlcache("ls", *place.options)["segments"]}
    assert keys["3" * 64] is None


def test_verify_is_of_a_model_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", "--disk-path", "x"])
    assert stop.value.code == 2
    assert "required: --model" in capsys.readouterr().err


# -- rm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        (("--key", "aaaa", "cccc"), {"rows"}),
        (("--model", MODEL), {"other"}),
        (("--deployment", "default", "--kind", "encoder"), {"large", "small", "other"}),
        (("--all",), set()),
    ],
)
def test_rm_removes_what_fits(
    filled: Place, filters: tuple[str, ...], left: set[str], vlcache: Vlcache
) -> None:
    planned = vlcache("rm", *filled.options, *filters, "--dry-run")
    assert (planned["removed"], planned["dry_run"]) == (0, True)
    assert filled.hashes() == {hash_of(name) for name in KEYS}
    removed = vlcache("rm", *filled.options, *filters, "--yes")
    assert filled.hashes() == {hash_of(name) for name in left}
    assert len(planned["segments"]) == removed["removed"] > 0


@pytest.mark.parametrize("place", ["fs"], indirect=True)
def test_rm_by_age(filled: Place, vlcache: Vlcache) -> None:
    assert filled.folder is not None
    assert vlcache("rm", *filled.options, "--older-than", "3d", "--yes")["removed"] == 0
    four_days_ago = time.time() - 4 * 86400
    for path in filled.folder.iterdir():
        if hash_of("large").hex() in path.name:
            os.utime(path, (four_days_ago, four_days_ago))
    assert vlcache("rm", *filled.options, "--older-than", "3d", "--yes")["removed"] == 1
    assert filled.hashes() == {hash_of(name) for name in KEYS if name != "large"}


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
@pytest.mark.parametrize("place", ["fs"], indirect=True)
def test_rm_asks(
    filled: Place,
    answer: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert cli.main(["rm", *filled.options, "--kind", "encoder"]) == status
    captured = capsys.readouterr()
    assert "Remove 1, " in captured.err
    assert (hash_of("rows") in filled.hashes()) == (status == 1)
    if status == 1:
        assert captured.out == ""
        assert captured.err.endswith("vlcache rm: nothing was removed\n")


@pytest.mark.parametrize("filters", [(), ("--all", "--kind", "kv")])
@pytest.mark.parametrize("place", ["fs"], indirect=True)
def test_rm_needs_to_know_what(
    filled: Place, filters: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rm", *filled.options, *filters, "--yes"]) == 2
    assert "either --all is needed, or some of --deployment" in capsys.readouterr().err
    assert filled.hashes() == {hash_of(name) for name in KEYS}


# -- bad input ----------------------------------------------------------------------------------

COMMANDS = [("ls",), ("stat",), ("check",), ("rm", "--all", "--yes")]


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert SECRET not in line
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_exactly_one_place_is_needed(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ((), ("--redis-url", "redis://127.0.0.1", "--disk-path", "x")):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, *options])
        assert stop.value.code == 2
        problem = "not allowed with" if options else "--disk-path --redis-url is required"
        assert problem in capsys.readouterr().err.splitlines()[-1]


def test_looking_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert cli.main(["ls", "--disk-path", str(missing)]) == 1
    assert f"--disk-path={missing}: No such file" in complaint(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_redis_that_is_not_there(
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", SECRET)
    url = f"redis://127.0.0.1:{free_port()}"
    assert cli.main([*command, "--redis-url", url]) == 1
    line = complaint(capsys)
    assert line.startswith(f"vlcache {command[0]}: {url}: ")
    assert "refused" in line


def test_a_redis_that_asks_for_a_password(
    redis_server: Callable[..., LocalRedis],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = redis_server(requirepass=SECRET)
    assert cli.main(["ls", "--redis-url", server.url]) == 1
    assert "VLCACHE_REDIS_PASSWORD" in complaint(capsys)
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", SECRET + "x")
    assert cli.main(["ls", "--redis-url", server.url]) == 1
    assert "VLCACHE_REDIS_PASSWORD" in complaint(capsys)
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", SECRET)
    assert cli.main(["ls", "--redis-url", server.url, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["segments"] == []
    assert SECRET not in captured.out + captured.err


def test_a_redis_user_that_may_not_look(
    redis_server: Callable[..., LocalRedis],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = redis_server()
    server.client.acl_setuser(
        "app", enabled=True, passwords=[f"+{SECRET}"], categories=["+@all"], keys=["other*"]
    )
    store({"type": "resp", "host": "127.0.0.1", "port": server.port}, OBJECTS["small"])
    monkeypatch.setenv("VLCACHE_REDIS_USERNAME", "app")
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", SECRET)
    assert cli.main(["stat", "--redis-url", server.url]) == 1
    assert "VLCACHE_REDIS_PASSWORD" in complaint(capsys)


def test_a_redis_that_dies_meanwhile(
    redis_server: Callable[..., LocalRedis],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = redis_server()
    store({"type": "resp", "host": "127.0.0.1", "port": server.port}, OBJECTS["small"])
    list_segments = listing.KeySpace.segments

    def list_then_stop(place: listing.KeySpace) -> Any:
        found = list_segments(place)
        server.kill()
        return found

    monkeypatch.setattr(listing.KeySpace, "segments", list_then_stop)
    assert cli.main(["check", "--redis-url", server.url, "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"vlcache check: {server.url}: ")


@pytest.mark.parametrize("kind", ["database", "socket", "cluster"])
def test_servers_of_all_kinds_are_looked_at(
    redis_server: Callable[..., LocalRedis], tmp_path: Path, kind: str, vlcache: Vlcache
) -> None:
    if kind == "database":
        url = f"{redis_server().url}/3"
    elif kind == "socket":
        redis_server(unixsocket=tmp_path / "a+b.sock")
        url = f"unix://{tmp_path}/a%2Bb.sock"
    else:
        nodes = [redis_server(cluster_enabled="yes", cluster_node_timeout=2000) for _ in range(2)]
        nodes[0].client.execute_command("CLUSTER ADDSLOTS", *range(8192))
        nodes[1].client.execute_command("CLUSTER ADDSLOTS", *range(8192, 16384))
        nodes[0].client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[1].port)
        until = time.monotonic() + 30
        while not all(
            node.client.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for node in nodes
        ):
            assert time.monotonic() < until
            time.sleep(0.1)
        url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
    with listing.KeySpace(RedisAddress.from_url(url), None) as place:
        for key, value in {**OBJECTS["large"], **OBJECTS["rows"], **OBJECTS["other"]}.items():
            place.client.set(_object_key_to_string(key), bytes(value.numpy()))
    assert vlcache("ls", "--redis-url", url)["num_segments"] == 3
    assert vlcache("check", "--redis-url", url)["sound"] == 3
    assert vlcache("rm", "--redis-url", url, "--kind", "kv", "--yes")["removed"] == 2
    assert vlcache("stat", "--redis-url", url)["num_segments"] == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--redis-url", f"redis://user:{SECRET}@127.0.0.1"), "has no place in a URL"),
        (("--redis-url", f"nonsense://{SECRET}@x?{SECRET}"), "redis_url="),
        (("--redis-url", "http://127.0.0.1"), "allowed are redis://host:port/db"),
        (("--redis-url", "redis://127.0.0.1", "--redis-tls-ca-file", "x"), "rediss:// URL"),
        (("--redis-url", "rediss://127.0.0.1", "--redis-tls-ca-file", "x"), "no such file"),
        (("--disk-path", "x", "--redis-tls-ca-file", "x"), "rediss:// URL"),
        (("--redis-url", "redis://127.0.0.1", "--older-than", "3d"), "goes with --disk-path"),
    ],
)
def test_settings_that_cannot_be_are_named(
    options: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ls", *options]) == 2
    assert problem in complaint(capsys)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--key", ""), "everything begins so"),
        (("--model", ""), "everything begins so"),
        (("--kind", "pixels"), "invalid choice: 'pixels'"),
        (("--older-than", "3"), "only a number with one of the units s, m, h, d, w"),
        (("--older-than", "-3d"), "--older-than"),
        (("--limit", "-1"), "only at least 0"),
        (("--older-than", "d"), "--older-than"),
    ],
)
def test_values_that_cannot_be_are_named(
    options: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["ls", "--disk-path", "x", *options])
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err


# -- texts --------------------------------------------------------------------------------------


def test_figures_for_people() -> None:
    sizes = [console.size_text(size) for size in (0, 1023, 1536, 3 << 30, 5 << 40)]
    assert sizes == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB", "5.0 TiB"]
    durations = [console.duration_text(seconds) for seconds in (None, 0.4, 61, 3600, 90061)]
    assert durations == ["-", "0s", "1m 1s", "1h 0m", "1d 1h"]
    assert [console.duration(text) for text in ("1.5h", "2w")] == [5400, 14 * 86400]

"""`vlcache ls`, `stat`, `verify` and `rm`, on a real disk tier and a real Redis."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from local_redis import LocalRedis, free_port

from tests.helpers.stored import put_kv
from vlcache_connector import cli
from vlcache_connector.cli import console, inspection
from vlcache_connector.storage.header import RefusedObject, SegmentId
from vlcache_connector.store import LMCacheSegmentStore
from vlcache_connector.store.objects import check_objects
from vlcache_connector.tiers import Deadline, DiskTier, Name, RedisTier, Tier

# LMCache's logging sets off a deprecation inside OpenTelemetry.
pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")

LAYERS, HEADS, DIM = 3, 2, 8
KEYS = {"large": "a" * 63 + "1/0", "small": "a" * 63 + "2/0", "rows": "b" * 64, "other": "c" * 64}
NOTED, UNKNOWN = "1" * 64, "2" * 64
MODEL = "/models/org/Some-[red]Model\x1b[31m"
SECRET = "hunter2-secret"
Objects = list[bytes]


def soon() -> Deadline:
    return Deadline(20)


@pytest.fixture(scope="module")
def encoded() -> Mapping[str, Objects]:
    """Segments as the store of a worker encodes them, by the names in `KEYS`."""
    made: dict[str, Objects] = {}

    def keep(store: LMCacheSegmentStore, name: str, kind: Any) -> None:
        segment = store.get_encoded(SegmentId(KEYS[name], kind))
        assert segment is not None
        made[name] = [bytes(part) for part in segment.objects]
        segment.release()

    def put(store: LMCacheSegmentStore, name: str, num_tokens: int) -> None:
        layers = [(kv[0], kv[1]) for kv in torch.randn(LAYERS, 2, num_tokens, HEADS, DIM)]
        assert put_kv(store, KEYS[name], torch.arange(num_tokens)[None], layers)
        keep(store, name, "kv")

    for fingerprint in (NOTED, UNKNOWN):
        store = LMCacheSegmentStore(
            "org/model",
            fingerprint,
            0,
            1,
            1 << 20,
            LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            kv_dtype=torch.float32,
            max_object_bytes=1 << 14,
        )
        try:
            if fingerprint == NOTED:
                put(store, "large", 80)
                put(store, "small", 20)
                assert store.put_encoder(KEYS["rows"], torch.randn(600, 16))
                keep(store, "rows", "encoder")
            else:
                put(store, "other", 20)
        finally:
            store.close()
    assert len(made["large"]) == 3
    assert len(made["rows"]) > 1
    return made


@dataclass
class Place:
    """A tier, and the options that lead a command to it."""

    tier: Tier
    options: tuple[str, ...]

    def write(self, name: str, objects: Sequence[bytes], rank: int = 0) -> Name:
        kind: Any = "encoder" if name == "rows" else "kv"
        self.tier.write(written := Name(kind, KEYS[name], rank, 2), objects, soon())
        return written

    def keys(self) -> set[str]:
        return {entry.name.key for entry in self.tier.entries(soon())}


@pytest.fixture(params=["disk", "redis"])
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    redis_server: Callable[..., LocalRedis],
) -> Iterator[Place]:
    """An empty tier that its server noted a model in."""
    tier: Tier
    if request.param == "disk":
        folder = tmp_path / "tier"
        tier = DiskTier(folder, "default", 1 << 30, None)
        options = ("--disk-path", str(folder))
    else:
        url = redis_server().url
        tier = RedisTier(url, "default", 1000)
        options = ("--redis-url", url)
    tier.record_model(NOTED, MODEL, soon())
    yield Place(tier, options)
    tier.close()


@pytest.fixture
def filled(place: Place, encoded: Mapping[str, Objects]) -> Place:
    """With all segments, and the small one of another rank."""
    for name, objects in encoded.items():
        place.write(name, objects)
    place.write("small", encoded["small"], rank=1)
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


def num_bytes(objects: Sequence[bytes]) -> int:
    return sum(map(len, objects))


def damaged(objects: Sequence[bytes]) -> Objects:
    """The same objects, one bit of the last payload turned over."""
    *others, last = objects
    return [*others, last[:-1] + bytes([last[-1] ^ 1])]


# -- checking without a store -------------------------------------------------------------------


def test_objects_are_checked_without_a_model(encoded: Mapping[str, Objects]) -> None:
    def check(key: str, kind: Any, objects: Sequence[bytes]) -> str:
        try:
            check_objects(SegmentId(key, kind), [memoryview(bytearray(part)) for part in objects])
        except RefusedObject as refusal:
            return refusal.reason
        return "sound"

    key, large, rows = KEYS["large"], encoded["large"], encoded["rows"]
    assert check(key, "kv", large) == "sound"
    assert check(KEYS["rows"], "encoder", rows) == "sound"
    assert check(key, "encoder", large) == "identity"
    assert check(KEYS["small"], "kv", large) == "identity"
    assert check(key, "kv", damaged(large)) == "checksum"
    assert check(key, "kv", large[:-1]) == "shape"
    assert check(key, "kv", [*large, large[-1]]) == "shape"
    assert check(key, "kv", [large[1], large[0], large[2]]) == "shape"
    assert check(key, "kv", []) == "shape"
    assert check(key, "kv", [b"", *large[1:]]) == "format"
    assert check(key, "kv", [b"\0" * 100]) == "format"
    # A part of another model's segment.
    assert check(KEYS["other"], "kv", [*encoded["other"][:-1], large[-1]]) == "identity"


# -- ls -----------------------------------------------------------------------------------------


def test_ls_describes_segments(
    filled: Place, encoded: Mapping[str, Objects], vlcache: Vlcache
) -> None:
    listed = vlcache("ls", *filled.options)
    assert listed["tier"] == filled.tier.name
    assert listed["deployment"] == "default"
    assert listed["num_segments"] == len(listed["segments"]) == 5
    by_name = {(row["key"], row["rank"]): row for row in listed["segments"]}
    row = by_name[KEYS["rows"], 0]
    assert row["kind"] == "encoder"
    assert row["num_ranks"] == 2
    assert row["num_bytes"] == num_bytes(encoded["rows"])
    assert 0 <= row["age_seconds"] < 100
    assert (row["fingerprint"], row["model"]) == (NOTED, MODEL)
    assert by_name[KEYS["other"], 0]["fingerprint"] == UNKNOWN
    assert by_name[KEYS["other"], 0]["model"] is None
    assert by_name[KEYS["small"], 1]["kind"] == "kv"
    if filled.tier.name == "redis":
        assert 900 < row["ttl_seconds"] <= 1000
    else:
        assert row["ttl_seconds"] is None


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (("--kind", "encoder"), {"rows"}),
        (("--key", "aaaa"), {"large", "small"}),
        (("--key", "bb", "cc"), {"rows", "other"}),
        (("--model", Path(MODEL).name), {"large", "small", "rows"}),
        (("--model", UNKNOWN[:8]), {"other"}),
        (("--model", MODEL, "--kind", "kv"), {"large", "small"}),
        (("--older-than", "1h"), set()),
        (("--older-than", "0s"), set(KEYS)),
    ],
)
def test_ls_filters(
    filled: Place, filters: tuple[str, ...], names: set[str], vlcache: Vlcache
) -> None:
    listed = vlcache("ls", *filled.options, *filters)
    assert {row["key"] for row in listed["segments"]} == {KEYS[name] for name in names}


def test_ls_sorts_and_limits(filled: Place, vlcache: Vlcache) -> None:
    listed = vlcache("ls", *filled.options, "--sort", "size", "--limit", 2)
    assert [row["key"] for row in listed["segments"]] == [KEYS["rows"], KEYS["large"]]
    assert listed["num_segments"] == 5
    ages = [row["age_seconds"] for row in vlcache("ls", *filled.options)["segments"]]
    assert ages == sorted(ages)


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
    assert "(222222222222…)" in shown or "[red]Model" in shown
    assert "\x1b[31m" not in shown


def test_a_noted_model_without_segments_is_no_mistake(place: Place, vlcache: Vlcache) -> None:
    assert vlcache("ls", *place.options)["segments"] == []
    assert vlcache("ls", *place.options, "--model", MODEL)["segments"] == []


# -- stat ---------------------------------------------------------------------------------------


def test_stat_counts_by_model_and_kind(
    filled: Place, encoded: Mapping[str, Objects], vlcache: Vlcache
) -> None:
    counted = vlcache("stat", *filled.options)
    sizes = {name: num_bytes(objects) for name, objects in encoded.items()}
    assert counted["num_segments"] == 5
    assert counted["num_bytes"] == sum(sizes.values()) + sizes["small"]
    assert counted["budget_bytes"] is None
    assert counted["oldest_seconds"] >= counted["newest_seconds"] >= 0
    groups = {
        (group["model"], group["kind"]): (group["num_segments"], group["num_bytes"])
        for group in counted["groups"]
    }
    assert groups == {
        (MODEL, "kv"): (3, sizes["large"] + 2 * sizes["small"]),
        (MODEL, "encoder"): (1, sizes["rows"]),
        (None, "kv"): (1, sizes["other"]),
    }


def test_headers_of_any_length_say_whose_a_segment_is(
    filled: Place, vlcache: Vlcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def owners() -> list[tuple[str, str]]:
        listed = vlcache("ls", *filled.options)["segments"]
        return sorted((row["key"], str(row["model"])) for row in listed)

    before = owners()
    assert {model for _, model in before} == {MODEL, "None"}
    monkeypatch.setattr(inspection, "_HEADER_BYTES", 16)
    assert owners() == before


def test_stat_shows_damage_and_an_empty_tier(place: Place, vlcache: Vlcache) -> None:
    assert vlcache("stat", *place.options)["oldest_seconds"] is None
    place.write("large", [b"nonsense"])
    [group] = vlcache("stat", *place.options)["groups"]
    assert (group["model"], group["fingerprint"], group["num_segments"]) == (None, None, 1)


def test_stat_for_people(filled: Place, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ("--disk-bytes", "1MiB") if filled.tier.name == "disk" else ()
    assert cli.main(["stat", *filled.options, *budget]) == 0
    shown = capsys.readouterr().out
    assert "Segments: 5, " in shown
    assert ("% of 1.0 MiB" if budget else "maxmemory") in shown


# -- verify -------------------------------------------------------------------------------------


def test_verify_finds_nothing_wrong(
    filled: Place, vlcache: Vlcache, capsys: pytest.CaptureFixture[str]
) -> None:
    result = vlcache("verify", *filled.options)
    assert (result["sound"], result["gone"], result["damaged"]) == (5, 0, [])
    assert cli.main(["verify", *filled.options]) == 0
    assert "5 sound, 0 damaged" in capsys.readouterr().out


def test_verify_finds_and_removes_what_is_damaged(
    filled: Place, encoded: Mapping[str, Objects], vlcache: Vlcache
) -> None:
    filled.write("small", damaged(encoded["small"]))
    filled.write("large", encoded["large"][:-1])
    filled.write("other", encoded["small"])
    found = vlcache("verify", *filled.options, status=1)
    assert found["sound"] == 2
    assert {(row["key"], row["rank"], row["reason"]) for row in found["damaged"]} == {
        (KEYS["small"], 0, "checksum"),
        (KEYS["large"], 0, "shape"),
        (KEYS["other"], 0, "identity"),
    }
    assert found["removed"] == 0
    assert filled.keys() == set(KEYS.values())
    found = vlcache("verify", *filled.options, "--remove-damaged", status=1)
    assert found["removed"] == len(found["damaged"]) == 3
    assert {(e.name.key, e.name.rank) for e in filled.tier.entries(soon())} == {
        (KEYS["small"], 1),
        (KEYS["rows"], 0),
    }
    assert vlcache("verify", *filled.options)["damaged"] == []


def test_verify_finds_a_damaged_frame(
    tmp_path: Path, encoded: Mapping[str, Objects], vlcache: Vlcache
) -> None:
    folder = tmp_path / "tier"
    place = Place(DiskTier(folder, "default", 1 << 30, None), ("--disk-path", str(folder)))
    place.write("small", encoded["small"])
    [path] = (folder / "default" / "kv").rglob("*of2")
    path.write_bytes(path.read_bytes() + b"x")
    [row] = vlcache("verify", *place.options, "--remove-damaged", status=1)["damaged"]
    assert row["reason"] == "format"
    assert not path.exists()


def test_verify_does_one_thing_at_a_time(filled: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", "--model", "x", *filled.options])
    assert stop.value.code == 2
    assert f"argument {filled.options[0]}: not allowed with argument --model" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify"])
    assert stop.value.code == 2
    assert "one of the arguments --model --redis-url --disk-path" in capsys.readouterr().err
    assert cli.main(["verify", *filled.options, "--max-kl", "1"]) == 2
    assert "--max-kl: goes with --model, not with --redis-url" in capsys.readouterr().err
    assert cli.main(["verify", "--model", "x", "--remove-damaged"]) == 2
    assert "--remove-damaged: goes with --redis-url or" in capsys.readouterr().err


# -- rm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        (("--key", "aaaa", "cccc"), {"rows"}),
        (("--model", MODEL), {"other"}),
        (("--model", MODEL, "--kind", "encoder"), {"large", "small", "other"}),
        (("--all",), set()),
        (("--older-than", "3d"), set(KEYS)),
    ],
)
def test_rm_removes_what_fits(
    filled: Place, filters: tuple[str, ...], left: set[str], vlcache: Vlcache
) -> None:
    before = len(list(filled.tier.entries(soon())))
    planned = vlcache("rm", *filled.options, *filters, "--dry-run")
    assert (planned["removed"], planned["dry_run"]) == (0, True)
    assert filled.keys() == set(KEYS.values())
    removed = vlcache("rm", *filled.options, *filters, "--yes")
    assert filled.keys() == {KEYS[name] for name in left}
    assert removed["removed"] == before - len(list(filled.tier.entries(soon())))
    assert len(planned["segments"]) == removed["removed"]


def test_rm_by_age(tmp_path: Path, encoded: Mapping[str, Objects], vlcache: Vlcache) -> None:
    folder = tmp_path / "tier"
    place = Place(DiskTier(folder, "default", 1 << 30, None), ("--disk-path", str(folder)))
    place.write("small", encoded["small"])
    [path] = (folder / "default" / "kv").rglob("*of2")
    place.write("large", encoded["large"])
    four_days_ago = time.time() - 4 * 86400
    os.utime(path, (four_days_ago, four_days_ago))
    assert vlcache("rm", *place.options, "--older-than", "3d", "--yes")["removed"] == 1
    assert place.keys() == {KEYS["large"]}


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
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
    left = filled.keys()
    assert (KEYS["rows"] in left) == (status == 1)
    if status == 1:
        assert captured.out == ""
        assert captured.err.endswith("vlcache rm: nothing was removed\n")


@pytest.mark.parametrize("filters", [(), ("--all", "--kind", "kv")])
def test_rm_needs_to_know_what(
    filled: Place, filters: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rm", *filled.options, *filters, "--yes"]) == 2
    assert "either --all is needed, or some of --key" in capsys.readouterr().err
    assert filled.keys() == set(KEYS.values())


# -- bad input ----------------------------------------------------------------------------------

COMMANDS = [("ls",), ("stat",), ("verify",), ("rm", "--all", "--yes")]


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert SECRET not in line
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_exactly_one_tier_is_needed(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ((), ("--redis-url", "redis://127.0.0.1", "--disk-path", "x")):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, *options])
        assert stop.value.code == 2
        problem = "not allowed with" if options else "--redis-url --disk-path is required"
        assert problem in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_deployment_is_named(
    filled: Place, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main([*command, *filled.options, "--deployment", "other", "--json"])
    line = complaint(capsys)
    assert status == 1
    assert line.startswith(f"vlcache {command[0]}: --deployment=other: nothing was ever stored")
    assert filled.keys() == set(KEYS.values())


def test_looking_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert cli.main(["ls", "--disk-path", str(missing)]) == 1
    assert f"--disk-path={missing}: no such folder" in complaint(capsys)
    assert cli.main(["ls", "--disk-path", str(tmp_path)]) == 1
    assert "--deployment=default" in complaint(capsys)
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
    assert line.startswith(f"vlcache {command[0]}: redis: ")
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
    server.client.hset("vlcache:default:models", NOTED, MODEL)
    assert cli.main(["ls", "--redis-url", server.url, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["segments"] == []
    assert SECRET not in captured.out + captured.err


def test_a_redis_that_dies_meanwhile(
    redis_server: Callable[..., LocalRedis],
    encoded: Mapping[str, Objects],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = redis_server()
    place = Place(RedisTier(server.url, "default", 1000), ("--redis-url", server.url))
    place.write("small", encoded["small"])
    place.tier.close()
    list_entries = RedisTier.entries

    def list_then_stop(tier: RedisTier, deadline: Deadline) -> Any:
        found = list(list_entries(tier, deadline))
        server.kill()
        return iter(found)

    monkeypatch.setattr(RedisTier, "entries", list_then_stop)
    assert cli.main(["verify", *place.options, "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("vlcache verify: redis: ")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--redis-url", f"redis://user:{SECRET}@127.0.0.1"), "has no place in a URL"),
        (("--redis-url", f"nonsense://{SECRET}@x?{SECRET}"), "redis_url="),
        (("--redis-url", "http://127.0.0.1"), "allowed are redis://host:port/db"),
        (("--redis-url", "redis://127.0.0.1", "--redis-tls-ca-file", "x"), "without TLS"),
        (("--redis-url", "rediss://127.0.0.1", "--redis-tls-ca-file", "x"), "tls_ca_file='x'"),
        (("--disk-path", "x", "--redis-tls-ca-file", "x"), "goes with --redis-url"),
        (("--disk-path", "x", "--deployment", "../x"), "deployment='../x'"),
        (("--redis-url", "redis://127.0.0.1", "--deployment", "*"), "deployment='*'"),
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
        (("--key", ""), "it is the beginning of every key"),
        (("--kind", "pixels"), "invalid choice: 'pixels'"),
        (("--older-than", "3"), "only a number with one of the units s, m, h, d, w"),
        (("--older-than", "-3d"), "--older-than"),
        (("--limit", "-1"), "only at least 0"),
        (("--older-than", "d"), "--older-than"),
        (("--sort", "name"), "invalid choice: 'name'"),
    ],
)
def test_values_that_cannot_be_are_named(
    options: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["ls", "--disk-path", "x", *options])
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err


def test_an_unknown_model_is_named(filled: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("ls",), ("rm", "--yes")):
        assert cli.main([*command, *filled.options, "--model", "Else"]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "--model=Else: no such model here; known are: /models/org/Some-" in captured.err
    assert filled.keys() == set(KEYS.values())


def test_a_budget_belongs_to_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stat", "--redis-url", "redis://127.0.0.1", "--disk-bytes", "1GiB"]) == 2
    assert "--disk-bytes: goes with --disk-path" in complaint(capsys)
    for size in ("0", "-1", "much"):
        with pytest.raises(SystemExit):
            cli.main(["stat", "--disk-path", "x", "--disk-bytes", size])
        assert "argument --disk-bytes: " in capsys.readouterr().err


# -- texts --------------------------------------------------------------------------------------


def test_figures_for_people() -> None:
    sizes = [console.size_text(size) for size in (0, 1023, 1536, 3 << 30, 5 << 40)]
    assert sizes == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB", "5.0 TiB"]
    durations = [console.duration_text(seconds) for seconds in (None, 0.4, 61, 3600, 90061)]
    assert durations == ["-", "0s", "1m 1s", "1h 0m", "1d 1h"]
    assert [console.duration(text) for text in ("1.5h", "2w")] == [5400, 14 * 86400]

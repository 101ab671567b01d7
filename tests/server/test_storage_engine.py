"""The storage engine over LMCache's own adapters: one contract, real servers, real faults."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from local_redis import LocalRedis, find_server, find_valkey, free_port

from tests.helpers.stored import MIB, adapters_of, fetch, holds_random, make_layout, put_random
from vlcache_connector.keys import encoder_key, segment_key, variant_key
from vlcache_connector.storage.engine import Loaded, Lookup, SegmentEngine
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.layout import SegmentLayout

SEGMENT, TOKENS = SegmentId("key", "kv"), 700
KINDS = ("fs", "fs_native", "resp", "valkey", "valkey-on-valkey")
REMOTE = KINDS[2:]


def layout(**options: Any) -> SegmentLayout:
    """Of segments whose objects are of two lengths, as 7 layers do not divide evenly."""
    options = {"max_object_bytes": 300_000, "encoder_width": 33, **options}
    return make_layout(7, 2, 16, torch.bfloat16, **options)


def forget(engine: SegmentEngine, segment: SegmentId = SEGMENT) -> None:
    """Empty host memory of what is stored below by now."""
    assert engine.flush(20)
    engine.remove(segment)
    assert engine.get(segment) is None


def finds(engine: SegmentEngine, segment: SegmentId, num_tokens: int, seed: int) -> bool:
    """Whether a segment is fetched, and equal to what `put_random` stored."""
    is_hit = fetch(engine, segment, num_tokens) == "hit"
    return is_hit and holds_random(engine, segment, num_tokens, seed)


def events(engine: SegmentEngine) -> Counter[str]:
    """What its tier did since the last call, without the tier's name."""
    taken = engine.take_events()
    return Counter({name.partition(".")[2]: number for name, number in taken.items()})


@dataclass
class Place:
    """Where segments lie below host memory."""

    spec: dict[str, Any]
    open: Callable[..., SegmentEngine]
    server: LocalRedis | None = None
    folder: Path | None = None

    def names(self) -> list[str]:
        """Of what it holds."""
        if self.folder is not None:
            return sorted(path.name for path in self.folder.iterdir())
        assert self.server is not None
        client: Any = self.server.client
        return [key.decode() for key in sorted(client.keys())]

    def values(self) -> dict[str, bytes]:
        """What it holds, by name."""
        if self.folder is not None:
            return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}
        assert self.server is not None
        client: Any = self.server.client
        return {key.decode(): client.get(key) for key in sorted(client.keys())}

    def replace(self, name: str, value: bytes) -> None:
        if self.folder is not None:
            (self.folder / name).write_bytes(value)
        else:
            assert self.server is not None
            self.server.client.set(name, value)

    def remove(self, name: str) -> None:
        if self.folder is not None:
            (self.folder / name).unlink()
        else:
            assert self.server is not None
            self.server.client.delete(name)


def spec_of(kind: str, folder: Path, port: int) -> dict[str, Any]:
    if kind.startswith("fs"):
        return {"type": kind, "base_path": str(folder)}
    if kind == "resp":
        return {"type": "resp", "host": "127.0.0.1", "port": port, "num_workers": 2}
    nodes = f"127.0.0.1:{port}"
    timeouts = {"request_timeout": 1.0, "connection_timeout": 2.0}
    return {"type": "valkey", "startup_nodes": nodes, "num_workers": 2, **timeouts}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """A place of a kind, and engines over it, which are closed at the end."""
    with ExitStack() as stack:

        def make(kind: str, *, starts: bool = True) -> Place:
            folder = tmp_path / "store"
            server = None
            if kind in REMOTE:
                command = find_valkey() if kind.endswith("on-valkey") else find_server()
                if command is None:
                    pytest.skip("no such server")
                server = LocalRedis(tmp_path, command=command, port=free_port())
                stack.callback(server.kill)
                if starts:
                    server.start()
            spec = spec_of(kind, folder, server.port if server else 0)
            if spec["type"] == "valkey":
                pytest.importorskip("glide_sync")

            def open_engine(
                *,
                key_file: str | None = None,
                quota: int | None = None,
                deadline: float = 4.0,
                **options: Any,
            ) -> SegmentEngine:
                adapters = adapters_of(
                    spec,
                    encryption_key_file=key_file,
                    salt_quota_bytes=quota,
                    fetch_deadline_seconds=deadline,
                )
                engine = SegmentEngine(
                    layout(**options), 64 * MIB, adapters, salt_quota_bytes=quota
                )
                stack.callback(engine.close)
                return engine

            return Place(spec, open_engine, server, None if server else folder)

        yield make


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read_back_by_another_engine(
    place: Callable[..., Place], kind: str
) -> None:
    below = place(kind)
    writer = below.open()
    cases = [
        (SEGMENT, TOKENS),
        (SegmentId("one token", "kv"), 1),
        (SegmentId("rows", "encoder"), 5000),
        (SegmentId("one row", "encoder"), 1),
    ]
    for seed, (segment, num_tokens) in enumerate(cases):
        assert put_random(writer, segment, num_tokens, seed)
    assert writer.flush(20)
    reader = below.open()
    for seed, (segment, num_tokens) in enumerate(cases):
        assert reader.get(segment) is None
        assert finds(reader, segment, num_tokens, seed)
        # From now on it is in host memory.
        reader.load(segment, num_tokens, 0.0)
        assert reader.take_loaded() == [Loaded(segment, is_here=True)]
    reader.check_integrity()


def test_one_lookup_answers_for_many_segments(place: Callable[..., Place]) -> None:
    below = place("valkey")
    assert below.server is not None
    engine = below.open()
    for name in ("b", "d"):
        assert put_random(engine, SegmentId(name, "kv"), TOKENS)
    assert engine.flush(20)
    lookups = [
        Lookup("first", [SegmentId(name, "kv") for name in "abc"], TOKENS),
        Lookup("second", [SegmentId("d", "kv")], TOKENS),
        Lookup("third", [SegmentId("d", "encoder")], TOKENS),
    ]
    engine.look_up(lookups)
    until = time.monotonic() + 10
    answers: list[Any] = []
    while not answers and time.monotonic() < until:
        answers = engine.take_looked_up()
    assert [answer.tiers for answer in answers] == [{"b": "valkey"}, {"d": "valkey"}, {}]
    engine.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_of_which_an_object_is_lost_is_not_loaded_and_holds_nothing(
    place: Callable[..., Place], kind: str
) -> None:
    below = place(kind)
    engine = below.open()
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    assert finds(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    below.remove(list(below.values())[1])
    assert fetch(engine, SEGMENT, TOKENS) in ("miss", "failed")
    engine.check_integrity()
    assert engine.bytes_used == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_object_is_never_seen(place: Callable[..., Place], kind: str) -> None:
    below = place(kind)
    engine = below.open()
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    values = below.values()
    name = list(values)[-1]
    middle = len(values[name]) // 2
    flipped = values[name][:middle] + bytes([values[name][middle] ^ 1]) + values[name][middle + 1 :]
    below.replace(name, flipped)
    assert fetch(engine, SEGMENT, TOKENS) == "failed"
    counted = events(engine)
    assert (counted["refused.checksum"], counted["load.failed"]) == (1, 0)
    assert engine.bytes_used == 0
    below.replace(name, values[name])
    assert finds(engine, SEGMENT, TOKENS, 1)
    engine.check_integrity()


@pytest.mark.parametrize("damage", ["flipped", "cut short"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_stored_anew(
    place: Callable[..., Place], kind: str, damage: str
) -> None:
    if (kind, damage) == ("resp", "cut short"):
        pytest.skip("it waits for the rest until it is made anew")
    below = place(kind)
    engine = below.open()
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    values = below.values()
    name = list(values)[-1]
    bad = values[name][:-1] + (b"" if damage == "cut short" else bytes([values[name][-1] ^ 1]))
    below.replace(name, bad)
    assert fetch(engine, SEGMENT, TOKENS) == "failed"
    events(engine)
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    assert below.values() == values
    assert finds(engine, SEGMENT, TOKENS, 1)
    # The others were there.
    assert events(engine)["write.bytes"] == len(values[name])


@pytest.mark.parametrize("kind", KINDS)
def test_objects_that_lie_under_the_name_of_others_are_refused(
    place: Callable[..., Place], kind: str
) -> None:
    below = place(kind)
    engines = [below.open(rank=rank, num_ranks=2) for rank in range(2)]
    for seed, engine in enumerate(engines):
        put_random(engine, SEGMENT, TOKENS, seed)
        forget(engine)
    for seed, engine in enumerate(engines):
        assert finds(engine, SEGMENT, TOKENS, seed)
        forget(engine)
    values = below.values()
    names = list(values)
    half = len(names) // 2
    for mine, others in zip(names, names[half:] + names[:half], strict=True):
        below.replace(mine, values[others])
    for engine in engines:
        events(engine)
        assert fetch(engine, SEGMENT, TOKENS) == "failed"
        assert {name for name in events(engine) if "refused" in name} == {"refused.identity"}
        engine.check_integrity()


@pytest.mark.parametrize("kind", ["fs", "valkey"])
def test_other_models_ranks_and_sizes_never_meet(place: Callable[..., Place], kind: str) -> None:
    below = place(kind)
    engine = below.open()
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    for other in ({"namespace": "other"}, {"rank": 1, "num_ranks": 2}, {"num_ranks": 2}):
        assert fetch(below.open(**other), SEGMENT, TOKENS) == "miss"
    assert fetch(engine, SEGMENT, TOKENS - 1) in ("miss", "failed")
    assert fetch(engine, SegmentId("key", "encoder"), TOKENS) == "miss"
    assert finds(engine, SEGMENT, TOKENS, 1)


@pytest.mark.parametrize("kind", ["fs", "valkey"])
def test_ranks_share_encoder_rows(place: Callable[..., Place], kind: str) -> None:
    below = place(kind)
    first, second = (below.open(rank=rank, num_ranks=2) for rank in range(2))
    rows = SegmentId("rows", "encoder")
    put_random(first, rows, 100, 1)
    assert first.flush(20)
    stored = len(below.values())
    assert finds(second, rows, 100, 1)
    put_random(second, rows, 100, 1)
    assert second.flush(20)
    assert len(below.values()) == stored


@pytest.mark.parametrize("kind", REMOTE)
def test_a_stopped_server_fails_lookups_in_time_and_gives_everything_back(
    place: Callable[..., Place], kind: str
) -> None:
    below = place(kind)
    assert below.server is not None
    engine = below.open()
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    put_random(engine, SegmentId("in memory", "kv"), TOKENS, 2)
    assert engine.flush(20)
    below.server.pause()
    began = time.monotonic()
    # What is in memory is not held up.
    engine.load(SegmentId("in memory", "kv"), TOKENS, began + 1)
    assert engine.take_loaded() == [Loaded(SegmentId("in memory", "kv"), is_here=True)]
    # `valkey` gives up by itself, and says that nothing is there.
    assert fetch(engine, SEGMENT, TOKENS) in ("failed", "miss")
    assert time.monotonic() - began < 3.0
    below.server.resume()
    until = time.monotonic() + 30
    while not (found := finds(engine, SEGMENT, TOKENS, 1)) and time.monotonic() < until:
        time.sleep(0.2)
    assert found
    engine.check_integrity()


@pytest.mark.parametrize("kind", REMOTE)
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_server_that_only_costs_is_left_alone(
    place: Callable[..., Place], kind: str, fault: str
) -> None:
    below = place(kind)
    assert below.server is not None
    engine = below.open(deadline=1.0)
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    below.server.kill() if fault == "killed" else below.server.pause()
    waits = []
    for _ in range(24):
        began = time.monotonic()
        assert fetch(engine, SEGMENT, TOKENS, 1.0) != "hit"
        waits.append(time.monotonic() - began)
    # `resp` says at once that nothing is there when it has lost its connection.
    is_quick = (kind, fault) == ("resp", "killed")
    [tier] = engine.tiers
    assert is_quick or tier.state().guard != "closed"
    assert sorted(waits[8:])[8] < 0.05


@pytest.mark.parametrize("kind", REMOTE)
def test_a_server_that_comes_late_or_again_is_used(place: Callable[..., Place], kind: str) -> None:
    below = place(kind, starts=False)
    assert below.server is not None
    engine = below.open()
    put_random(engine, SEGMENT, TOKENS, 1)
    assert engine.flush(20)
    for _ in range(2):  # it was away at the start, and is killed later
        engine.remove(SEGMENT)
        assert fetch(engine, SEGMENT, TOKENS) != "hit"
        below.server.start()
        until = time.monotonic() + 60
        found = False
        while not found and time.monotonic() < until:
            put_random(engine, SEGMENT, TOKENS, 1)
            forget(engine)
            found = finds(engine, SEGMENT, TOKENS, 1)
            time.sleep(0.2)
        assert found
        below.server.kill()
        assert engine.flush(20)
    engine.check_integrity()


def test_what_nobody_waits_for_any_more_is_not_loaded(place: Callable[..., Place]) -> None:
    below = place("valkey")
    assert below.server is not None
    engine = below.open()
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    below.server.client.config_resetstat()
    now = time.monotonic()
    for index in range(50):
        engine.load(SegmentId(f"gone {index}", "kv"), TOKENS, now - 1)
    engine.load(SEGMENT, TOKENS, now + 10)
    ended: list[Loaded] = []
    while len(ended) < 51 and time.monotonic() < now + 10:
        ended += engine.take_loaded()
    assert [loaded.is_here for loaded in ended] == [False] * 50 + [True]
    assert holds_random(engine, SEGMENT, TOKENS, 1)
    asked = below.server.client.info("commandstats")["cmdstat_exists"]["calls"]
    expected = engine._layout.expected(SEGMENT, TOKENS)
    assert expected is not None
    assert asked == len(expected.keys)


def test_what_is_removed_while_it_is_loaded_does_not_stay(place: Callable[..., Place]) -> None:
    engine = place("fs").open()
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    engine.load(SEGMENT, TOKENS, time.monotonic() + 10)
    assert engine.take_loaded() == []
    assert engine.open_kv("key", torch.arange(3 * TOKENS).view(3, TOKENS)) is None
    engine.remove(SEGMENT)
    until = time.monotonic() + 10
    while not (ended := engine.take_loaded()) and time.monotonic() < until:
        time.sleep(0.002)
    assert ended == [Loaded(SEGMENT, is_here=False)]
    engine.check_integrity()
    assert engine.bytes_used == 0


def test_what_is_asked_for_once_is_not_stored_if_so_configured(tmp_path: Path) -> None:
    spec = {"type": "fs", "base_path": str(tmp_path / "store")}
    engine = SegmentEngine(layout(), 64 * MIB, adapters_of(spec, store_at_sight=2))
    once, again, anew = (SegmentId(name, "kv") for name in ("once", "again", "anew"))
    for segment in (once, again, anew):
        assert put_random(engine, segment, TOKENS, 1)
    assert engine.flush(20)
    assert not list((tmp_path / "store").iterdir())
    assert holds_random(engine, again, TOKENS, 1)
    engine.remove(anew)
    assert put_random(engine, anew, TOKENS, 1)
    assert engine.flush(20)
    for segment, expected in ((once, "miss"), (again, "hit"), (anew, "hit")):
        engine.remove(segment)
        assert fetch(engine, segment, TOKENS) == expected
    assert events(engine)["store.failed"] == 0
    engine.close()


def test_what_comes_from_afar_is_kept_nearby(tmp_path: Path) -> None:
    far = {"type": "fs_native", "base_path": str(tmp_path / "far")}
    near = {"type": "fs", "base_path": str(tmp_path / "near")}
    other = SegmentEngine(layout(), 64 * MIB, adapters_of(far))
    put_random(other, SEGMENT, TOKENS, 1)
    assert other.flush(20)
    engine = SegmentEngine(layout(), 64 * MIB, adapters_of(near, far))
    assert finds(engine, SEGMENT, TOKENS, 1)
    assert engine.flush(20)
    assert len(list((tmp_path / "near").iterdir())) == len(list((tmp_path / "far").iterdir()))
    other.close()
    engine.close()


@pytest.fixture
def key_file(tmp_path: Path) -> Callable[[str], str]:
    """Files of keys, by name."""

    def make(name: str) -> str:
        path = tmp_path / name
        if not path.exists():
            path.write_bytes(os.urandom(32))
        return str(path)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_encrypted_segments_are_read_back_with_their_key_only(
    place: Callable[..., Place], kind: str, key_file: Callable[[str], str]
) -> None:
    below = place(kind)
    writer = below.open(key_file=key_file("one"))
    cases = [(SEGMENT, TOKENS), (SegmentId("rows", "encoder"), 5000), (SegmentId("1", "kv"), 1)]
    plain = set()
    for seed, (segment, num_tokens) in enumerate(cases):
        assert put_random(writer, segment, num_tokens, seed)
        with writer.get(segment) as found:  # type: ignore[union-attr]
            parts = found.rows() if segment.kind == "encoder" else [found.pair(0)]
            for part in parts:
                plain.add(part.contiguous().view(torch.uint8).numpy().tobytes()[:64])
    assert writer.flush(20)
    values = b"".join(below.values().values())
    assert len(values) > 700 * 7 * 2 * 2 * 16 * 2
    assert not any(part in values for part in (*plain, SEGMENT.key.encode() + b"\xa4", b"bfloat16"))

    reader = below.open(key_file=key_file("one"))
    for seed, (segment, num_tokens) in enumerate(cases):
        assert finds(reader, segment, num_tokens, seed)
    for other in (key_file("two"), None):
        stranger = below.open(key_file=other)
        for segment, num_tokens in cases:
            assert fetch(stranger, segment, num_tokens) in ("failed", "miss")
            assert stranger.get(segment) is None
        stranger.check_integrity()
        assert stranger.bytes_used == 0
    reader.check_integrity()


@pytest.mark.parametrize("position", [0, 5, -1])  # of version, nonce, tag
@pytest.mark.parametrize("kind", ["fs", "valkey"])
def test_encrypted_objects_that_were_tampered_with_are_refused_and_stored_anew(
    place: Callable[..., Place], kind: str, position: int, key_file: Callable[[str], str]
) -> None:
    below = place(kind)
    engine = below.open(key_file=key_file("one"))
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    values = below.values()
    name = list(values)[-1]
    value = bytearray(values[name])
    value[position] ^= 1
    below.replace(name, bytes(value))
    assert fetch(engine, SEGMENT, TOKENS) == "failed"
    assert events(engine)["load.failed"] == 1
    assert engine.bytes_used == 0
    put_random(engine, SEGMENT, TOKENS, 1)
    forget(engine)
    assert finds(engine, SEGMENT, TOKENS, 1)
    # The others were there.
    assert events(engine)["write.bytes"] == len(values[name])
    engine.check_integrity()


@pytest.mark.parametrize("kind", ["fs", "valkey"])
def test_encrypted_objects_under_the_name_of_others_are_refused(
    place: Callable[..., Place], kind: str, key_file: Callable[[str], str]
) -> None:
    below = place(kind)
    engine = below.open(key_file=key_file("one"))
    segments = [SegmentId("first", "kv"), SegmentId("other", "kv")]
    values: list[dict[str, bytes]] = []
    for seed, segment in enumerate(segments):
        before = below.values()
        put_random(engine, segment, TOKENS, seed)
        forget(engine, segment)
        values.append({k: v for k, v in below.values().items() if k not in before})
    first, second = (list(of) for of in values)
    for mine, others in zip(first, second, strict=True):
        below.replace(mine, values[1][others])
        below.replace(others, values[0][mine])
    events(engine)
    for segment in segments:
        assert fetch(engine, segment, TOKENS) == "failed"
        assert {name for name in events(engine) if "refused" in name} == {"refused.identity"}
    engine.check_integrity()


def key_of(identifier: str, salt: str | None) -> str:
    return segment_key(identifier, fingerprint="f", donor="d", salt=salt)


@pytest.mark.parametrize("kind", ["fs", "valkey"])
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_salt_over_its_quota_loses_what_is_its_own(
    place: Callable[..., Place], kind: str, encrypted: bool, key_file: Callable[[str], str]
) -> None:
    below = place(kind)
    engine = below.open(quota=4 * MIB, key_file=key_file("one") if encrypted else None)
    modest = [SegmentId(variant_key(key_of(str(n), "modest"), "0"), "kv") for n in range(4)]
    unsalted = [SegmentId(key_of(str(n), None), "kv") for n in range(4)]
    unsalted += [SegmentId(encoder_key(str(n), fingerprint="f"), "encoder") for n in range(60)]
    greedy = [SegmentId(variant_key(key_of(str(n), "greedy"), "0"), "kv") for n in range(24)]
    for seed, segment in enumerate([*modest, *unsalted, *greedy]):
        assert put_random(engine, segment, TOKENS, seed)
    assert engine.flush(30)

    def held(segments: list[SegmentId]) -> list[SegmentId]:
        names = below.names()
        objects = {segment: engine._layout.expected(segment, TOKENS) for segment in segments}
        return [
            segment
            for segment, expected in objects.items()
            if expected is not None
            and all(
                any(f"@{key.object_group_id:x}@{key.chunk_hash.hex()}" in name for name in names)
                for key in expected.keys
            )
        ]

    until = time.monotonic() + 20
    while len(held(greedy)) > 6 and time.monotonic() < until:  # 650 KB each
        time.sleep(0.2)
    time.sleep(2.5)  # nor is more evicted than has to be
    left = held(greedy)
    assert 2 <= len(left) <= 6
    assert left == greedy[-len(left) :]
    assert (held(modest), held(unsalted)) == (modest, unsalted)

    # The rest can be read, here and by others.
    for reader in (engine, below.open(key_file=key_file("one") if encrypted else None)):
        for segment in [*modest, *unsalted[:5], *left]:
            reader.remove(segment)
            seed = [*modest, *unsalted, *greedy].index(segment)
            assert finds(reader, segment, TOKENS, seed)
        assert fetch(reader, greedy[0], TOKENS) == "miss"
        reader.check_integrity()

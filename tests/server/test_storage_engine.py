"""The storage engine over LMCache's own adapters: one contract, real servers, real faults."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_redis import LocalRedis, find_server, find_valkey, free_port

from vlcache_connector.storage.adapters import guarded_configs
from vlcache_connector.storage.engine import SegmentEngine, Staged
from vlcache_connector.storage.guarded import GuardedAdapter
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.layout import Form, Space
from vlcache_connector.storage.tier import Tier

MIB = 1 << 20
LAYERS, HEADS, HEAD_DIM = 7, 2, 16
TRANSFER_SECONDS = 3.0
SPACE = Space("vlcache-model", rank=0, num_ranks=1, max_object_bytes=300_000)
SEGMENT = SegmentId("key", "kv")
KINDS = ("fs", "fs_native", "resp", "valkey", "valkey-on-valkey")
REMOTE = KINDS[2:]


def kv_form(num_tokens: int) -> Form:
    unit = (1, 2, num_tokens, HEADS, HEAD_DIM)
    return Form("kv", num_tokens, unit, LAYERS, "bfloat16", positions_rows=3)


def encoder_form(rows: int, width: int = 33) -> Form:
    return Form("encoder", rows, (1, width), rows, "float32", positions_rows=0)


FORM = kv_form(700)
"""Of objects of two lengths, as 7 layers do not divide evenly."""


def positions(form: Form, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (3, form.num_tokens), generator=generator)


def put(engine: SegmentEngine, segment: SegmentId, form: Form, seed: int, salt: str = "") -> None:
    rows = positions(form, seed) if form.positions_rows else None
    writer = engine.write(segment, form, rows, salt=salt)
    assert writer is not None
    generator = torch.Generator().manual_seed(seed)
    for part in writer.parts:
        part.copy_(torch.randn(part.shape, generator=generator))
    writer.finish()


def holds(staged: Staged, form: Form, seed: int) -> bool:
    """Whether it is what `put` wrote, bit by bit; releases it."""
    if staged.segment is None:
        return False
    with staged.segment as segment:
        generator = torch.Generator().manual_seed(seed)
        dtype = segment._parts[0].dtype
        is_equal = all(
            torch.equal(part, torch.randn(part.shape, generator=generator).to(dtype))
            for part in segment._parts
        )
        where = segment.info.positions
        return is_equal and (where is None or torch.equal(where, positions(form, seed)))


def stage(
    engine: SegmentEngine, segment: SegmentId, form: Form, seconds: float = 10.0, salt: str = ""
) -> Staged:
    engine.stage(segment, form, time.monotonic() + seconds, salt=salt)
    until = time.monotonic() + seconds + 5
    while time.monotonic() < until:
        for staged in engine.poll():
            return staged
        time.sleep(0.002)
    raise AssertionError("neither here nor late")


def forget(engine: SegmentEngine, segment: SegmentId, form: Form, salt: str = "") -> None:
    assert engine.flush(20)
    assert engine.remove(segment, form, salt=salt)


def tier(engine: SegmentEngine) -> Tier:
    [(_, adapter)] = engine._manager.l2_adapters()
    assert isinstance(adapter, GuardedAdapter)
    return adapter._tier


def events(engine: SegmentEngine) -> Counter[str]:
    """What its tier did since the last call, without the tier's name."""
    taken = tier(engine).take_events()
    return Counter({name.partition(".")[2]: number for name, number in taken.items()})


@dataclass
class Place:
    """Where segments lie below host memory."""

    spec: dict[str, Any]
    open: Callable[..., SegmentEngine]
    server: LocalRedis | None = None
    folder: Path | None = None

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

            def open_engine(space: Space = SPACE, num_bytes: int = 64 * MIB) -> SegmentEngine:
                configs = guarded_configs(
                    [spec], lookup_seconds=0.5, transfer_seconds=TRANSFER_SECONDS
                )
                engine = SegmentEngine(space, num_bytes, configs)
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
        (SEGMENT, FORM),
        (SegmentId("one token", "kv"), kv_form(1)),
        (SegmentId("key", "encoder"), encoder_form(5000)),
        (SegmentId("one row", "encoder"), encoder_form(1, 7)),
    ]
    for seed, (segment, form) in enumerate(cases):
        put(writer, segment, form, seed)
    assert writer.flush(20)
    reader = below.open()
    for seed, (segment, form) in enumerate(cases):
        assert reader.get(segment, form) is None
        staged = stage(reader, segment, form)
        assert staged.outcome == "hit"
        assert staged.num_loaded_bytes == sum(SPACE.sizes(segment, form))
        assert holds(staged, form, seed)
        # From now on it is in host memory.
        again = stage(reader, segment, form)
        assert again.num_loaded_bytes == 0
        assert holds(again, form, seed)
    reader.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_of_which_an_object_is_lost_is_a_miss_and_holds_nothing(
    place: Callable[..., Place], kind: str
) -> None:
    below = place(kind)
    engine = below.open()
    put(engine, SEGMENT, FORM, 1)
    forget(engine, SEGMENT, FORM)
    assert holds(stage(engine, SEGMENT, FORM), FORM, 1)
    forget(engine, SEGMENT, FORM)
    below.remove(list(below.values())[1])
    assert stage(engine, SEGMENT, FORM).outcome == "miss"
    engine.check_integrity()
    assert engine.bytes_used == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_object_is_never_seen(place: Callable[..., Place], kind: str) -> None:
    below = place(kind)
    engine = below.open()
    put(engine, SEGMENT, FORM, 1)
    forget(engine, SEGMENT, FORM)
    values = below.values()
    name = list(values)[-1]
    middle = len(values[name]) // 2
    flipped = values[name][:middle] + bytes([values[name][middle] ^ 1]) + values[name][middle + 1 :]
    below.replace(name, flipped)
    assert stage(engine, SEGMENT, FORM).outcome == "miss"
    counted = events(engine)
    assert (counted["refused.checksum"], counted["load.failed"]) == (1, 0)
    assert engine.bytes_used == 0
    below.replace(name, values[name])
    assert holds(stage(engine, SEGMENT, FORM), FORM, 1)
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
    put(engine, SEGMENT, FORM, 1)
    forget(engine, SEGMENT, FORM)
    values = below.values()
    name = list(values)[-1]
    bad = values[name][:-1] + (b"" if damage == "cut short" else bytes([values[name][-1] ^ 1]))
    below.replace(name, bad)
    assert stage(engine, SEGMENT, FORM).outcome == "miss"
    events(engine)
    put(engine, SEGMENT, FORM, 1)
    forget(engine, SEGMENT, FORM)
    assert below.values() == values
    assert holds(stage(engine, SEGMENT, FORM), FORM, 1)
    # The others were there.
    assert events(engine)["write.bytes"] == len(values[name])


@pytest.mark.parametrize("kind", KINDS)
def test_objects_that_lie_under_the_name_of_others_are_refused(
    place: Callable[..., Place], kind: str
) -> None:
    below = place(kind)
    ranks = [replace(SPACE, rank=rank, num_ranks=2) for rank in range(2)]
    engines = [below.open(space) for space in ranks]
    for seed, engine in enumerate(engines):
        put(engine, SEGMENT, FORM, seed)
        forget(engine, SEGMENT, FORM)
    for seed, engine in enumerate(engines):
        assert holds(stage(engine, SEGMENT, FORM), FORM, seed)
        forget(engine, SEGMENT, FORM)
    values = below.values()
    names = list(values)
    half = len(names) // 2
    for mine, others in zip(names, names[half:] + names[:half], strict=True):
        below.replace(mine, values[others])
    for engine in engines:
        assert stage(engine, SEGMENT, FORM).outcome == "miss"
        assert {name for name in events(engine) if "refused" in name} == {"refused.identity"}
        engine.check_integrity()


@pytest.mark.parametrize("kind", ["fs", "valkey"])
def test_other_models_ranks_salts_and_sizes_never_meet(
    place: Callable[..., Place], kind: str
) -> None:
    below = place(kind)
    engine = below.open()
    put(engine, SEGMENT, FORM, 1, salt="a")
    forget(engine, SEGMENT, FORM, salt="a")
    for space in (replace(SPACE, namespace="other"), replace(SPACE, rank=1, num_ranks=2)):
        assert stage(below.open(space), SEGMENT, FORM, salt="a").outcome == "miss"
    assert stage(engine, SEGMENT, FORM, salt="b").outcome == "miss"
    assert stage(engine, SEGMENT, kv_form(699), salt="a").outcome == "miss"
    assert stage(engine, SegmentId("key", "encoder"), encoder_form(700), salt="a").outcome == "miss"
    assert holds(stage(engine, SEGMENT, FORM, salt="a"), FORM, 1)


@pytest.mark.parametrize("kind", REMOTE)
def test_a_stopped_server_makes_segments_late_and_gives_everything_back(
    place: Callable[..., Place], kind: str
) -> None:
    below = place(kind)
    assert below.server is not None
    engine = below.open()
    put(engine, SEGMENT, FORM, 1)
    forget(engine, SEGMENT, FORM)
    put(engine, SegmentId("in memory", "kv"), FORM, 2)
    assert engine.flush(20)
    below.server.pause()
    began = time.monotonic()
    assert stage(engine, SEGMENT, FORM, 0.2).outcome == "late"
    assert time.monotonic() - began < 0.4
    # What is in memory is not held up; and who waits long enough learns that there is nothing.
    assert holds(stage(engine, SegmentId("in memory", "kv"), FORM, 0.2), FORM, 2)
    assert stage(engine, SEGMENT, FORM, 5).outcome == "miss"
    assert time.monotonic() - began < TRANSFER_SECONDS
    below.server.resume()
    until = time.monotonic() + 20
    while not (found := holds(stage(engine, SEGMENT, FORM), FORM, 1)) and time.monotonic() < until:
        time.sleep(0.2)
    assert found
    assert engine.flush(20)
    engine.check_integrity()


@pytest.mark.parametrize("kind", REMOTE)
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_server_that_only_costs_is_left_alone(
    place: Callable[..., Place], kind: str, fault: str
) -> None:
    below = place(kind)
    assert below.server is not None
    engine = below.open()
    put(engine, SEGMENT, FORM, 1)
    forget(engine, SEGMENT, FORM)
    below.server.kill() if fault == "killed" else below.server.pause()
    waits = []
    for _ in range(24):
        began = time.monotonic()
        assert stage(engine, SEGMENT, FORM, 1.0).outcome in ("miss", "late")
        waits.append(time.monotonic() - began)
    # `resp` says at once that nothing is there when it has lost its connection.
    is_quick = (kind, fault) == ("resp", "killed")
    assert is_quick or tier(engine).state().breaker != "closed"
    assert sorted(waits[8:])[8] < 0.05


@pytest.mark.parametrize("kind", REMOTE)
def test_a_server_that_comes_late_or_again_is_used(place: Callable[..., Place], kind: str) -> None:
    below = place(kind, starts=False)
    assert below.server is not None
    engine = below.open()
    put(engine, SEGMENT, FORM, 1)
    assert engine.flush(20)
    for _ in range(2):  # it was away at the start, and is killed later
        assert engine.remove(SEGMENT, FORM)
        assert stage(engine, SEGMENT, FORM).outcome == "miss"
        below.server.start()
        until = time.monotonic() + 30
        found = False
        while not found and time.monotonic() < until:
            put(engine, SEGMENT, FORM, 1)
            forget(engine, SEGMENT, FORM)
            found = holds(stage(engine, SEGMENT, FORM), FORM, 1)
            time.sleep(0.2)
        assert found
        below.server.kill()
        assert engine.flush(20)
    engine.check_integrity()


def test_what_nobody_waits_for_any_more_is_not_looked_for(place: Callable[..., Place]) -> None:
    below = place("resp")
    assert below.server is not None
    engine = below.open()
    put(engine, SEGMENT, FORM, 1)
    forget(engine, SEGMENT, FORM)
    below.server.client.config_resetstat()
    now = time.monotonic()
    for index in range(50):
        engine.stage(SegmentId(f"gone {index}", "kv"), FORM, now - 1)
    engine.stage(SEGMENT, FORM, now + 10)
    ended: list[Staged] = []
    while len(ended) < 51 and time.monotonic() < now + 10:
        ended += engine.poll()
    assert [staged.outcome for staged in ended[:-1]] == ["late"] * 50
    assert holds(ended[-1], FORM, 1)
    asked = below.server.client.info("commandstats")["cmdstat_exists"]["calls"]
    assert asked == len(SPACE.sizes(SEGMENT, FORM))


def test_a_full_memory_refuses_and_a_reader_keeps_its_segment() -> None:
    engine = SegmentEngine(SPACE, 2 * MIB)
    num_bytes = sum(SPACE.sizes(SEGMENT, FORM))
    names = [SegmentId(str(index), "kv") for index in range(2 * MIB // num_bytes)]
    for seed, name in enumerate(names):
        put(engine, name, FORM, seed)
    used = engine.bytes_used
    assert engine.write(SEGMENT, FORM, positions(FORM, 0)) is None
    assert engine.bytes_used == used  # nothing of it is left
    segment = engine.get(names[0], FORM)
    assert segment is not None
    assert not engine.remove(names[0], FORM)
    segment.release()
    assert engine.remove(names[0], FORM)
    writer = engine.write(SEGMENT, FORM, positions(FORM, 0))
    assert writer is not None
    writer.abandon()
    assert engine.get(SEGMENT, FORM) is None
    assert engine.bytes_used < used
    engine.check_integrity()
    engine.close()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"type": "tape"}, "l2_adapters[0].type='tape': one of fs, "),
        ({}, "l2_adapters[0].type=None: one of fs, "),
        ({"type": "fs", "base_path": "x", "size": 1}, "l2_adapters[0].size=1: adapters of type"),
        ({"type": "fs"}, "base_path must be a non-empty string"),
        ({"type": "valkey", "startup_nodes": "nowhere"}, "must be 'host:port'"),
    ],
)
def test_bad_adapters_are_refused_by_name(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="l2") as refused:
        guarded_configs([spec], lookup_seconds=1, transfer_seconds=1)
    assert says in str(refused.value)

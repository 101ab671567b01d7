"""Tests of scripts/fault_matrix.py, scripts/redis_proxy.py and scripts/stress.py."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fault_matrix as matrix
import numpy as np
import pytest
import redis_proxy
import stress
import torch
from local_mooncake import find_master
from local_redis import LocalRedis, find_server
from redis_proxy import RedisProxy
from stress import Ask, Result

from tests.helpers.stored import (
    MIB,
    adapters_of,
    fetch,
    holds_random,
    make_layout,
    put_random,
    wait_for,
)
from vlcache_connector.storage import codec, header
from vlcache_connector.storage.engine import Lookup, SegmentEngine
from vlcache_connector.storage.header import SegmentId

needs_redis = pytest.mark.skipif(find_server() is None, reason="no redis-server")
needs_mooncake = pytest.mark.skipif(find_master() is None, reason="no mooncake_master")
TOKENS = 100


# -- the proxy ----------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[LocalRedis]:
    with LocalRedis(tmp_path) as server:
        yield server


@pytest.fixture
def proxy(redis: LocalRedis) -> Iterator[RedisProxy]:
    with RedisProxy(redis.port) as proxy:
        yield proxy


@pytest.fixture
def engine(proxy: RedisProxy) -> Iterator[SegmentEngine]:
    """With an adapter over the proxy."""
    spec = {"type": "valkey", "startup_nodes": f"127.0.0.1:{proxy.port}", "request_timeout": 0.5}
    engine = SegmentEngine(
        make_layout(4, 2, 16), 8 * MIB, adapters_of(spec, fetch_deadline_seconds=4.0)
    )
    yield engine
    engine.close()


def store(engine: SegmentEngine, segment: SegmentId) -> bool:
    """Whether a segment was written below host memory."""
    engine.take_events()
    assert put_random(engine, segment, TOKENS)
    until = time.monotonic() + 20
    [counts] = wait_for(lambda: ended(engine), until)
    engine.remove(segment)
    while engine.bytes_used and time.monotonic() < until:  # LMCache may still hold it
        engine.settle()
        time.sleep(0.002)
    return counts["valkey.write.bytes"] > 0 and not counts["valkey.store.failed"]


def ended(engine: SegmentEngine) -> list[Counter[str]]:
    """What has become of a store, if it has ended."""
    events = engine.take_events()
    return [events] if any(".store." in e or ".write." in e for e in events) else []


def look_up(engine: SegmentEngine, segment: SegmentId) -> bool:
    """Whether a segment is found below host memory."""
    engine.look_up([Lookup("", [segment], TOKENS)])
    [answer] = wait_for(engine.take_looked_up, time.monotonic() + 5)
    return segment.key in answer.tiers


def load(engine: SegmentEngine, segment: SegmentId) -> bool:
    """Whether a segment is loaded, as it was."""
    engine.load(segment, TOKENS, time.monotonic() + 5)
    [answer] = wait_for(engine.take_loaded, time.monotonic() + 10)
    is_same = answer.is_here and holds_random(engine, segment, TOKENS)
    engine.remove(segment)
    return is_same


def stored_object() -> bytes:
    """A segment's object, as the store writes it."""
    of = header.ObjectHeader(
        **{"format_version": 1, "kind": "encoder", "key": "image", "fingerprint": "model"},
        **{"group": 0, "num_groups": 1, "first_layer": 0, "shape": (16, 256), "dtype": "float32"},
        **{"positions": b"", "positions_rows": 0, "num_tokens": 16},
    )
    buffer = torch.empty(codec.encoded_size(of), dtype=torch.uint8)
    codec.encode_into(buffer, of, torch.randn(16, 256))
    return buffer.numpy().tobytes()


@needs_redis
def test_the_proxy_tells_operations_apart(proxy: RedisProxy, engine: SegmentEngine) -> None:
    seen: list[Any] = []

    def spy(command: redis_proxy.Command, forward: redis_proxy.Forward) -> bytes:
        seen.append(command.operation)
        return forward(command.arguments)

    proxy.fault = spy
    segment = SegmentId("image", "kv")
    assert not look_up(engine, segment)
    assert set(seen) == {"lookup"}
    seen.clear()
    assert store(engine, segment)
    assert seen[-1] == "store"
    seen.clear()
    assert look_up(engine, segment)
    assert set(seen) == {"lookup"}
    seen.clear()
    assert load(engine, segment)
    assert set(seen) == {"lookup", "load"}


def test_replies_of_both_protocols_are_read_whole() -> None:
    replies = [
        *(b"+OK\r\n", b":1\r\n", b"$3\r\na\r\n\r\n", b"$-1\r\n", b"_\r\n", b"#t\r\n"),
        *(b"*2\r\n$1\r\na\r\n*1\r\n:1\r\n", b"%1\r\n+a\r\n~1\r\n:1\r\n", b"*-1\r\n"),
        *(b"=7\r\ntxt:abc\r\n", b">2\r\n+a\r\n+b\r\n", b"-ERR no\r\n", b"*0\r\n"),
    ]
    reader: Any = io.BufferedReader(io.BytesIO(b"".join(replies)))
    assert [redis_proxy.read_reply(reader) for _ in replies] == replies
    with pytest.raises(ConnectionError):
        redis_proxy.read_reply(reader)


@needs_redis
@pytest.mark.parametrize(("name", "operation"), matrix.RedisStore.cells)
def test_a_fault_strikes_its_operation_and_nothing_else_and_is_lifted(
    name: str,
    operation: redis_proxy.Operation,
    redis: LocalRedis,
    proxy: RedisProxy,
    engine: SegmentEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matrix, "LATENCY_SECONDS", 0.6)
    known = SegmentId("known", "kv")
    assert store(engine, known)
    calls = {"lookup": look_up, "load": load, "store": store}
    strike = proxy.fault = matrix.Strike(name, operation, redis)
    for this, call in calls.items():
        # A load looks for its objects first, and so does a store.
        if this == operation:
            break
        if operation != "lookup":
            assert call(engine, known)
            assert strike.count == 0
    before = redis.dump()
    attempts = [SegmentId(f"new {n}", "kv") if operation == "store" else known for n in range(8)]
    attempts = attempts if name == "dropped" else attempts[:1]
    succeeded = [calls[operation](engine, segment) for segment in attempts]
    assert strike.count > 0
    if operation == "store" and name in ("flipped", "version"):
        proxy.fault = None
        assert fetch(engine, attempts[0], TOKENS) == "failed"  # what was written is refused
        events = engine.take_events()
        assert any(event.startswith("valkey.refused.") for event in events), events
    elif name == "memory" and operation == "lookup":
        assert redis.dump() == {}
    elif name != "dropped":
        assert not any(succeeded)
    proxy.fault = None
    strike.lift()
    redis.load(before)
    until = time.monotonic() + 20  # connections are made anew; the guard may have opened
    while fetch(engine, known, TOKENS) != "hit":
        assert time.monotonic() < until
        time.sleep(0.2)
    assert holds_random(engine, known, TOKENS)


def test_another_version_has_a_valid_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    value = matrix.another_version(stored_object())

    def read() -> Any:
        buffer = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        expected = {"expect_key": "image", "expect_fingerprint": "model"}
        return codec.decode(buffer, **expected, verify=True)

    with pytest.raises(codec.RefusedObject, match="version"):
        read()
    monkeypatch.setattr(header, "FORMAT_VERSION", 2)
    read()


# -- the load, and what is wrong with an answer --------------------------------------------------


def test_no_image_of_the_load_is_known_from_elsewhere() -> None:
    load = matrix.make_load(200)
    asks = [*load.asks, load.probe]
    of_asks = [image for ask in asks for image in ask.images]
    assert len(of_asks) == len(set(of_asks))
    of_donors = {image for donor in load.donors for image in donor.images}
    known = [image for ask in asks for donor in ask.donors for image in donor.images]
    assert set(known) <= of_donors
    assert {image for ask in load.asks if not ask.donors for image in ask.images}.isdisjoint(known)
    for ask in load.again:
        assert ask.donors[0].images == ask.images
        assert not ask.donors[0].donors


def answer(*tokens: int, reused: int = 0, shift: float = 0.0, tier: str | None = None) -> Result:
    logprobs = np.full((len(tokens), 8), -3.0, np.float32) + np.float32(shift)
    figures = {"reused_tokens": reused, "tier": tier}
    return Result("done", tokens, logprobs, figures, ttft=0.01)


def test_an_answer_that_is_none_of_those_allowed_is_found() -> None:
    allowed = [answer(1, 2, 3), answer(1, 5, 6, reused=20, shift=0.1)]
    assert stress.deviation(answer(1, 2, 3, shift=5e-4), allowed) is None
    assert stress.deviation(answer(1, 5, 6, reused=20, shift=0.1), allowed) is None
    # What it says of itself has to be true.
    assert stress.deviation(answer(1, 2, 3, reused=20), allowed) is not None
    assert stress.deviation(answer(1, 2, 3, reused=10), allowed) is not None
    assert stress.deviation(answer(1, 2, 3, shift=2e-3), allowed) is not None
    assert stress.deviation(answer(1, 2), allowed) is not None
    assert stress.deviation(answer(), allowed) is not None
    # Two tokens that are equally likely: what follows is another answer.
    tied = answer(1, 4, 3)
    tied.logprobs[2] += 1
    assert stress.deviation(tied, allowed) is None
    late = answer(1, 2, 3)
    late.logprobs[2, 7] += 0.01
    assert stress.deviation(late, allowed) is not None


# -- the command, without an engine --------------------------------------------------------------


class FakeEngine:
    """Answers as `stress.EngineProcess` does; known images always come from Redis."""

    spoil: Callable[[list[Result]], list[Result]] | None = None
    calls = 0
    recovers = True
    opens = True
    leaks: Sequence[str] = ()

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def call(self, function: Any, *arguments: Any, on_progress: Any = None) -> Any:
        if function is stress.references:
            return [
                [
                    answer(1, reused=10 * choice, tier="valkey")
                    for choice in range(1 + bool(a.donors))
                ]
                for a in arguments[0]
            ]
        if function is stress.serve:
            results = [
                answer(1, reused=10 * bool(ask.donors), tier="valkey" if ask.donors else None)
                for ask in arguments[0]
            ]
            if on_progress is not None:
                on_progress(len(results))
                type(self).calls += 1
                if self.calls > 2 and self.spoil is not None:
                    return self.spoil(results)
            return results
        if function is matrix.recover:
            return (0.1 if self.recovers else None), [answer(1, reused=10, tier="valkey")]
        counts = {"valkey.lookup.late": self.calls, "valkey.guard.open": self.opens * self.calls}
        return {stress.happened: counts}.get(
            function, list(self.leaks) if function is stress.violations else None
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    made = type("Fake", (FakeEngine,), {})
    monkeypatch.setattr(matrix, "EngineProcess", made)
    monkeypatch.setattr(matrix, "make_tiny_model", lambda path: path)
    # Nothing passes through the proxy here.
    monkeypatch.setattr(matrix.Strike, "count", 1, raising=False)
    original = matrix.Strike.__init__

    def make(self: matrix.Strike, *arguments: Any) -> None:
        original(self, *arguments)
        self.count = 1

    monkeypatch.setattr(matrix.Strike, "__init__", make)
    return made


def arguments(folder: Path, *more: str) -> list[str]:
    paths = ["--output", str(folder / "results" / "matrix"), "--cache-dir", str(folder / "cache")]
    return [*paths, "--requests", "20", "--stores", "redis", "--faults", "killed", "auth", *more]


def cells_of(folder: Path) -> list[dict[str, Any]]:
    document = json.loads((folder / "results" / "matrix.json").read_text())
    cells: list[dict[str, Any]] = document["cells"]
    return cells


@needs_redis
def test_all_cells_are_measured_and_shown(
    fake: type[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matrix.main(arguments(tmp_path)) == 0
    cells = cells_of(tmp_path)
    assert [(cell["fault"], cell["at"]) for cell in cells] == [
        ("none", ""),
        *((fault, at) for fault in ("killed", "auth") for at in redis_proxy.OPERATIONS),
    ]
    assert {cell["requests"] for cell in cells} == {20 + 2 + 1}
    shown = capsys.readouterr().out
    assert shown.count("killed") == 3
    text = (tmp_path / "results" / "matrix.md").read_text()
    assert "**7 of 7 cells passed.**" in text
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def wrong_answer(results: list[Result]) -> list[Result]:
    return [*results[:7], answer(2, reused=results[7].reused, shift=0.01), *results[8:]]


def hung_request(results: list[Result]) -> list[Result]:
    return [*results[:3], Result("hung"), *results[4:]]


def waiting_requests(results: list[Result]) -> list[Result]:
    waited = {"ttft_part_seconds": {"staging": 1.0}}
    return [dataclasses.replace(r, figures={**r.figures, **waited}) for r in results]


def failed_request(results: list[Result]) -> list[Result]:
    return [*results[:3], dataclasses.replace(results[3], status="failed"), *results[4:]]


def slow_requests(results: list[Result]) -> list[Result]:
    return [dataclasses.replace(result, ttft=2.5) for result in results]


def crash(results: list[Result]) -> list[Result]:
    raise stress.EngineCrashedError("Traceback\nValueError: of the engine")


def hang(results: list[Result]) -> list[Result]:
    raise stress.EngineHungError("nothing was heard")


@needs_redis
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"spoil": staticmethod(wrong_answer)}, "1 answers differ"),
        ({"spoil": staticmethod(hung_request)}, "1 requests hung"),
        ({"spoil": staticmethod(failed_request)}, "1 requests failed"),
        ({"spoil": staticmethod(slow_requests)}, "2.49 s were added at p95"),
        (
            {"spoil": staticmethod(waiting_requests)},
            "requests waited 1.00 s longer, at the median, once the guard had seen enough",
        ),
        ({"opens": False}, "all reads failed, and the guard did not open"),
        ({"spoil": staticmethod(crash)}, "the engine crashed: ValueError: of the engine"),
        ({"spoil": staticmethod(hang)}, "22 requests hung"),
    ],
    ids=[
        *("wrong answer", "hung request", "failed request", "slow", "waits", "no guard", "crash"),
        "hung engine",
    ],
)
def test_a_violation_fails_its_cell(
    fake: type[FakeEngine],
    tmp_path: Path,
    change: dict[str, Any],
    expected: str,
) -> None:
    for name, value in change.items():
        setattr(fake, name, value)
    assert matrix.main(arguments(tmp_path, "--at", "lookup")) == 1
    for cell in cells_of(tmp_path):
        if fake.opens or cell["fault"] != matrix.NO_FAULT:
            assert expected in cell["problems"]
    assert f"- {expected}" in (tmp_path / "results" / "matrix.md").read_text()


@needs_redis
def test_an_engine_that_is_wrong_without_a_fault_ends_the_run(
    fake: type[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.leaks = ["read handles: 1 held"]
    assert matrix.main(arguments(tmp_path)) == 1
    assert "without a fault: read handles: 1 held" in capsys.readouterr().err
    fake.leaks, fake.recovers = (), False
    assert matrix.main(arguments(tmp_path)) == 1
    assert "nothing was loaded" in capsys.readouterr().err


@needs_redis
def test_an_interrupted_run_continues(fake: type[FakeEngine], tmp_path: Path) -> None:
    def interrupt(results: list[Result]) -> list[Result]:
        if fake.calls == 5:
            raise KeyboardInterrupt
        return results

    fake.spoil = staticmethod(interrupt)
    assert matrix.main(arguments(tmp_path)) == 130
    fake.calls, fake.spoil = 0, None
    assert matrix.main(arguments(tmp_path)) == 0
    assert fake.calls == 2 + 7 - 2
    assert len(cells_of(tmp_path)) == 7


def test_wrong_command_lines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        *(["--requests", "5"], ["--faults", "fire"]),
        *(["--at", "eviction"], ["--stores", "s3"]),
    ):
        with pytest.raises(SystemExit) as ended:
            matrix.main(words)
        assert ended.value.code == 2
        assert words[0] in capsys.readouterr().err


# -- the command, with one -----------------------------------------------------------------------


@needs_redis
def test_a_real_engine_stands_a_few_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A twentieth of it is for lookups, which take long where others compute, too.
    monkeypatch.setattr(matrix, "DEADLINE_SECONDS", 6.0)
    monkeypatch.setitem(matrix.CONNECTOR, "fetch_deadline_seconds", 6.0)
    words = arguments(tmp_path, "--at", "load")
    words[words.index("--requests") + 1] = "60"
    assert matrix.main([*words, "--faults", "stopped", "version"]) == 0
    cells = {(cell["fault"], cell["at"]): cell for cell in cells_of(tmp_path)}
    assert len(cells) == 3
    for cell in cells.values():
        assert cell["requests"] == 60 + 6 + 1
        assert cell["aborted"] > 0
    # Something was struck, and something came through all the same.
    assert cells["none", ""]["reused"] > cells["version", "load"]["reused"] > 0
    assert cells["version", "load"]["counters"]["valkey.refused.version"] > 0
    assert cells["stopped", "load"]["opened"] > 0
    assert cells["none", ""]["opened"] == 0


@needs_mooncake
def test_a_real_engine_stands_a_node_that_is_killed(tmp_path: Path) -> None:
    words = ["--stores", "mooncake", "--faults", "killed", "--at", "node", "--requests", "60"]
    paths = ["--output", str(tmp_path / "results" / "matrix"), "--cache-dir", str(tmp_path / "c")]
    assert matrix.main([*words, *paths]) == 0
    none, killed = cells_of(tmp_path)
    assert none["reused"] > killed["reused"]
    assert killed["opened"] > 0


def answer_wrongly(llm: Any, tell: stress.Tell) -> None:
    """From now on, reused keys are not what they should be."""
    from vlcache_connector.worker import injection

    original = injection.write_kv

    def write(layer: Any, key: torch.Tensor, *arguments: Any) -> None:
        original(layer, key * 1.01, *arguments)

    injection.write_kv = write


def test_a_real_engine_that_answers_wrongly_is_found(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    donor = Ask(f"donor of {stress.IMAGE}", ((1, 224),), max_tokens=1)
    asks = [
        Ask(f"look at {stress.IMAGE} again", donor.images, (donor,)),
        Ask("no image at all"),
        Ask(f"aborted {stress.IMAGE}", ((2, 224),), abort_after=0),
    ]
    with stress.EngineProcess(tiny_model(), stress.AMPLE, tmp_path / "log") as engine:
        allowed = engine.call(stress.references, asks)
        engine.call(stress.serve, [donor])
        right = engine.call(stress.serve, asks)
        assert [result.status for result in right] == ["done", "done", "aborted"]
        assert [stress.deviation(r, a) for r, a in zip(right[:2], allowed, strict=False)] == [
            None
        ] * 2
        engine.call(stress.forget)
        engine.call(answer_wrongly)
        engine.call(stress.serve, [donor])
        wrong = engine.call(stress.serve, asks[:2])
        assert stress.deviation(wrong[0], allowed[0]) is not None
        assert stress.deviation(wrong[1], allowed[1]) is None

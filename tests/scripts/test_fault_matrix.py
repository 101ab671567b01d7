"""Tests of scripts/fault_matrix.py, scripts/redis_proxy.py and scripts/stress.py."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fault_matrix as matrix
import numpy as np
import pytest
import redis_proxy
import stress
import torch
from local_redis import LocalRedis, find_server
from redis_proxy import RedisProxy
from stress import Ask, Result

from vlcache_connector.storage import codec, header
from vlcache_connector.tiers import Deadline, Name, RedisTier, TierError

needs_redis = pytest.mark.skipif(find_server() is None, reason="no redis-server")
VARIANTS = [Name("kv", f"image/{ordinal}", 0, 1) for ordinal in range(4)]
ROWS = Name("encoder", "image", 0, 1)


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
def tier(proxy: RedisProxy) -> Iterator[RedisTier]:
    tier = RedisTier(proxy.url, "default", 1000)
    yield tier
    tier.close()


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
def test_the_proxy_tells_operations_apart(proxy: RedisProxy, tier: RedisTier) -> None:
    seen: list[Any] = []

    def spy(command: redis_proxy.Command, forward: redis_proxy.Forward) -> bytes:
        seen.append(command.operation)
        return forward(command.arguments)

    def seen_in(call: Callable[..., Any], *arguments: Any) -> Any:
        seen.clear()
        call(*arguments, Deadline(5))
        [operation] = set(seen)
        return operation

    proxy.fault = spy
    value = bytes(3 << 20)  # fetched in pieces
    for name, candidates in ((VARIANTS[0], VARIANTS), (ROWS, [ROWS])):
        assert seen_in(tier.sizes, candidates) == "lookup"
        assert seen_in(tier.write, name, [value, b"small"]) == "store"
        assert seen_in(tier.sizes, candidates) == "lookup"
        assert seen_in(tier.read, name, 4 << 20) == "prefetch"
    proxy.forget()
    assert seen_in(tier.sizes, [ROWS]) == "lookup"


OUTCOMES = {
    "killed": "connection",
    "stopped": "timeout",
    "latency": "timeout",
    "dropped": "connection",
    "auth": "auth",
}
"""What the tier says of faults that end the call."""


@needs_redis
@pytest.mark.parametrize("operation", redis_proxy.OPERATIONS)
@pytest.mark.parametrize("name", matrix.FAULTS)
def test_a_fault_strikes_its_operation_and_nothing_else_and_is_lifted(
    name: str,
    operation: redis_proxy.Operation,
    redis: LocalRedis,
    proxy: RedisProxy,
    tier: RedisTier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matrix, "LATENCY_SECONDS", 0.6)
    value = stored_object()
    tier.write(ROWS, [value], Deadline(5))
    proxy.forget()
    other = Name("encoder", "another", 0, 1)

    def lookup() -> bool:
        return tier.sizes([ROWS], Deadline(0.4)) == [len(value)]

    def prefetch() -> bool:
        return tier.read(ROWS, 1 << 20, Deadline(0.4)) == [value]

    def store() -> bool:
        tier.write(other, [value], Deadline(0.4))
        [read] = tier.read(other, 1 << 20, Deadline(0.4)) or [b""]
        return read == value

    calls = {"lookup": lookup, "prefetch": prefetch, "store": store}
    strike = proxy.fault = matrix.Strike(name, operation, redis)
    for this, call in calls.items():
        if this == "store":
            tier.sizes([other], Deadline(0.4))  # as whoever stores has asked before
        if this == operation:
            break
        if operation != "lookup":
            assert call()
            assert strike.count == 0
    before = redis.dump()
    failed = []
    for _ in range(20 if name == "dropped" else 1):
        try:
            if not calls[operation]():
                failed.append("other bytes")
        except TierError as error:
            failed.append(error.fault)
    assert strike.count > 0
    if name in OUTCOMES:
        assert OUTCOMES[name] in failed
    elif name == "memory":
        assert failed == (["full"] if operation == "store" else failed)
        assert failed
    elif operation != "lookup":
        assert failed  # of a segment's description, only a change that shows is damage
    proxy.fault = None
    strike.lift()
    redis.load(before)
    proxy.forget()
    recovered = []
    for _ in range(6):  # connections that were cut are noticed when they are used
        with contextlib.suppress(TierError):
            tier.write(other, [value], Deadline(2))
            recovered.append(tier.read(other, 1 << 20, Deadline(2)) == [value])
    assert recovered.count(True) >= 2


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
                    answer(1, reused=10 * choice, tier="redis")
                    for choice in range(1 + bool(a.donors))
                ]
                for a in arguments[0]
            ]
        if function is stress.serve:
            results = [
                answer(1, reused=10 * bool(ask.donors), tier="redis" if ask.donors else None)
                for ask in arguments[0]
            ]
            if on_progress is not None:
                on_progress(len(results))
                type(self).calls += 1
                if self.calls > 2 and self.spoil is not None:
                    return self.spoil(results)
            return results
        if function is matrix.recover:
            return (0.1 if self.recovers else None), [answer(1, reused=10, tier="redis")]
        return {stress.happened: {"redis.sizes.timeout": self.calls}}.get(
            function, list(self.leaks) if function is stress.violations else None
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    fake = type("Fake", (FakeEngine,), {})
    monkeypatch.setattr(matrix, "EngineProcess", fake)
    monkeypatch.setattr(matrix, "make_tiny_model", lambda path: path)
    # Nothing passes through the proxy here.
    monkeypatch.setattr(matrix.Strike, "count", 1, raising=False)
    original = matrix.Strike.__init__

    def make(self: matrix.Strike, *arguments: Any) -> None:
        original(self, *arguments)
        self.count = 1

    monkeypatch.setattr(matrix.Strike, "__init__", make)
    return fake


def arguments(folder: Path, *more: str) -> list[str]:
    paths = ["--output", str(folder / "results" / "matrix"), "--cache-dir", str(folder / "cache")]
    return [*paths, "--requests", "20", "--faults", "killed", "auth", *more]


def cells_of(folder: Path) -> list[dict[str, Any]]:
    document = json.loads((folder / "results" / "matrix.json").read_text())
    cells: list[dict[str, Any]] = document["cells"]
    return cells


@needs_redis
def test_all_cells_are_measured_and_shown(
    engine: type[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matrix.main(arguments(tmp_path)) == 0
    cells = cells_of(tmp_path)
    assert [(cell["fault"], cell["operation"]) for cell in cells] == [
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


def slow_requests(results: list[Result]) -> list[Result]:
    return [dataclasses.replace(result, ttft=1.5) for result in results]


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
        ({"spoil": staticmethod(slow_requests)}, "1.49 s were added at p95"),
        ({"spoil": staticmethod(crash)}, "the engine crashed: ValueError: of the engine"),
        ({"spoil": staticmethod(hang)}, "22 requests hung"),
    ],
    ids=["wrong answer", "hung request", "slow", "crash", "hung engine"],
)
def test_a_violation_fails_its_cell(
    engine: type[FakeEngine],
    tmp_path: Path,
    change: dict[str, Any],
    expected: str,
) -> None:
    engine.spoil = change["spoil"]
    assert matrix.main(arguments(tmp_path, "--operations", "lookup")) == 1
    for cell in cells_of(tmp_path):
        assert expected in cell["problems"]
    assert f"- {expected}" in (tmp_path / "results" / "matrix.md").read_text()


@needs_redis
def test_an_engine_that_is_wrong_without_a_fault_ends_the_run(
    engine: type[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.leaks = ["read handles: 1 held"]
    assert matrix.main(arguments(tmp_path)) == 1
    assert "without a fault: read handles: 1 held" in capsys.readouterr().err
    engine.leaks, engine.recovers = (), False
    assert matrix.main(arguments(tmp_path)) == 1
    assert "nothing came from Redis" in capsys.readouterr().err


@needs_redis
def test_an_interrupted_run_continues(engine: type[FakeEngine], tmp_path: Path) -> None:
    def interrupt(results: list[Result]) -> list[Result]:
        if engine.calls == 5:
            raise KeyboardInterrupt
        return results

    engine.spoil = staticmethod(interrupt)
    assert matrix.main(arguments(tmp_path)) == 130
    engine.calls, engine.spoil = 0, None
    assert matrix.main(arguments(tmp_path)) == 0
    assert engine.calls == 2 + 7 - 2
    assert len(cells_of(tmp_path)) == 7


def test_wrong_command_lines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--requests", "5"], ["--faults", "fire"], ["--operations", "eviction"]):
        with pytest.raises(SystemExit) as ended:
            matrix.main(words)
        assert ended.value.code == 2
        assert words[0] in capsys.readouterr().err


# -- the command, with one -----------------------------------------------------------------------


@needs_redis
def test_a_real_engine_stands_a_few_cells(tmp_path: Path) -> None:
    words = arguments(tmp_path, "--operations", "prefetch", "store")
    words[words.index("--requests") + 1] = "40"
    assert matrix.main([*words, "--faults", "stopped", "version"]) == 0
    cells = {(cell["fault"], cell["operation"]): cell for cell in cells_of(tmp_path)}
    assert len(cells) == 5
    for cell in cells.values():
        assert cell["requests"] == 40 + 4 + 1
        assert cell["aborted"] > 0
    # Something was struck, and something came through all the same.
    assert cells["none", ""]["reused"] > cells["version", "prefetch"]["reused"] > 0
    for operation in ("prefetch", "store"):
        assert cells["version", operation]["counters"]["redis.read.refused_version"] > 0


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

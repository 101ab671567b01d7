"""Whatever fails in VLCache ends in the output of a full recompute, a counter and a log line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import IMAGE, Answer, Ask, Engine, EngineError

A, B = (71, 224), (72, 336, 224)
DONOR = Ask(f"see {IMAGE} and {IMAGE}", (A, B))
TARGET = Ask(f"the same two, moved: {IMAGE} and {IMAGE} compare", (B, A), max_tokens=4)


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[..., Path]) -> Answer:
    plain = Engine(tiny_model(), None)
    try:
        return plain.ask(TARGET)[0]
    finally:
        plain.close()


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    engine = Engine(tiny_model(), {"min_recompute_tokens": 0, "recompute_ratio": 0.0})
    engine.ask(DONOR)
    yield engine
    engine.close()


def sides(llm: Any) -> tuple[Any, Any]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    return scheduler, get_kv_transfer_group()._worker


def lose_a_segment(llm: Any) -> None:
    _, worker = sides(llm)
    key = next(key for key, kind in worker._store._resident if kind == "kv")
    worker._store.remove(key, "kv")


def store_another_shape(llm: Any) -> None:
    """Replace a segment by one that is a token short."""
    _, worker = sides(llm)
    key = next(key for key, kind in worker._store._resident if kind == "kv")
    with worker._store.get(key, "kv") as segment:
        layers = [
            tuple(part[:-1].clone() for part in segment.layer(i))
            for i in range(len(worker._model.layer_names))
        ]
        positions = segment.info.positions[:, :-1].clone()
    assert worker._store.put_kv(key, positions, layers) > 0


def break_injection(llm: Any) -> None:
    """The first layer that is written raises, in the middle of the sparse prefill."""
    from vlcache_connector.worker import injection

    original = injection.write_kv

    def broken(*args: Any) -> None:
        injection.write_kv = original
        raise RuntimeError("injected fault")

    injection.write_kv = broken


def break_planning(llm: Any) -> None:
    scheduler, _ = sides(llm)

    def broken(*args: Any) -> Any:
        raise RuntimeError("injected fault")

    scheduler._plan = broken


def break_the_store(llm: Any) -> None:
    _, worker = sides(llm)

    def broken(*args: Any) -> Any:
        raise RuntimeError("injected fault")

    worker._store.put_kv = broken
    worker._store.get = broken


def break_capture(llm: Any) -> None:
    _, worker = sides(llm)

    def broken(*args: Any) -> None:
        raise RuntimeError("injected fault")

    worker._capture.on_kv_write = broken


def failures(llm: Any) -> dict[str, int]:
    scheduler, _ = sides(llm)
    return dict(scheduler.failures)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [lose_a_segment, store_another_shape, break_injection, break_planning]
)
def test_output_is_that_of_a_full_recompute(
    engine: Engine, expected: Answer, fault: Callable[[Any], None]
) -> None:
    # Both images are lost to this request only where the fault hits both.
    engine.call(fault)
    [answer] = engine.ask(TARGET)
    assert answer.figures is not None
    if fault in (break_injection, break_planning):
        assert answer.figures["reused_tokens"] == 0
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-4)
        assert sum(engine.call(failures).values()) > 0
    else:
        assert answer.figures["fallback"] == "segment lost"
        assert 0 < answer.figures["reused_tokens"] < 160
    # The engine goes on, and what was lost is stored again.
    [again] = engine.ask(Ask("and " + TARGET.text, TARGET.images, max_tokens=4))
    assert again.finish_reason == "length"


@pytest.mark.slow
def test_failing_capture_is_not_noticed(engine: Engine, expected: Answer) -> None:
    engine.call(break_capture)
    cold = Ask(f"never seen {IMAGE}", ((79, 224),), max_tokens=4)
    [answer] = engine.ask(cold)
    assert answer.finish_reason == "length"
    assert engine.call(failures)["capture"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_broken_store_follows_vllms_policy(
    tiny_model: Callable[..., Path], expected: Answer, policy: str
) -> None:
    engine = Engine(
        tiny_model(),
        None,
        kv_transfer_config={
            "kv_connector": "VLCacheConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"cpu_bytes": "64MiB", "encoder_cpu_bytes": "64MiB"},
        },
    )
    try:
        engine.ask(DONOR)
        engine.call(break_the_store)
        [answer] = engine.ask(TARGET)
        if policy == "recompute":
            assert answer.tokens == expected.tokens
            np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-4)
        [text] = engine.ask(Ask("text goes on", max_tokens=2))
        assert text.finish_reason == "length"
    finally:
        engine.close()


@pytest.mark.slow
def test_bad_options_end_the_start(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(
        EngineError, match=r"recompute_ratio=1\.5 is refused: .* less than or equal"
    ):
        Engine(tiny_model(), {"recompute_ratio": 1.5})


@pytest.mark.parametrize(
    "options",
    [{"recompute_ratio": 1.5}, {"recompute_ratio": "a"}, {"unknown": 1}, "not an object"],
    ids=str,
)
def test_bad_request_options_are_ignored(engines: Callable[..., Engine], options: Any) -> None:
    [answer] = engines({}).ask(Ask(f"bad options {IMAGE}", ((78, 224),), vlcache=options))
    assert answer.finish_reason == "length"

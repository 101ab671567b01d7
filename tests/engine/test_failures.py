"""Whatever fails in VLCache ends in the output of a full recompute, a counter and a log line."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Answer, Ask, Engine, EngineError
from tests.helpers.stored import put_kv
from vlcache_connector.storage.header import SegmentId

A, B = (71, 224), (72, 336, 224)
_donors = itertools.count()
DONOR = Ask(f"see {IMAGE} and {IMAGE}", (A, B))


def moved(name: str) -> Ask:
    """Both images at other places; no two names share a prefix that vLLM could have cached."""
    text = f"{name}: the same two, moved {IMAGE} and {IMAGE} compare"
    return Ask(text, (B, A), max_tokens=4, vlcache={"recompute_ratio": 0.0})


def assert_fully_recomputed(actual: Answer, engines: Callable[..., Engine], name: str) -> None:
    [expected] = engines(None).ask(moved(name))
    assert actual.figures is not None
    assert actual.figures["reused_tokens"] == 0
    assert actual.tokens == expected.tokens
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=1e-4)


@pytest.fixture
def engine(engines: Callable[..., Engine]) -> Engine:
    """An engine that knows both images."""
    engine = engines({})
    # A new text each time: what an earlier test lost must be computed, and so stored, again.
    engine.ask(replace(DONOR, text=f"donor {next(_donors)} {DONOR.text}"))
    return engine


def sides(llm: Any) -> tuple[Any, Any]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    return scheduler, get_kv_transfer_group()._worker


def lose_a_segment(llm: Any) -> None:
    """The worker's store loses all that the scheduler side believes to be there."""
    _, worker = sides(llm)
    for key, kind in list(worker._storage.engine._resident):
        if kind == "kv":
            worker._storage.engine.remove(SegmentId(key, "kv"))


def store_another_shape(llm: Any) -> None:
    """Replace all segments by ones that are a token short."""
    _, worker = sides(llm)
    for key, kind in list(worker._storage.engine._resident):
        if kind != "kv":
            continue
        with worker._storage.get(SegmentId(key, "kv")) as segment:
            layers = [
                tuple(part[:-1].clone() for part in segment.layer(i))
                for i in range(len(worker._model.layer_names))
            ]
            positions = segment.info.positions[:, :-1].clone()
        assert put_kv(worker._storage.engine, key, positions, layers) > 0


def raise_fault(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("injected fault")


def ask_with_broken(llm: Any, part: str, ask: Ask) -> tuple[Answer, dict[str, int]]:
    """Run `ask` while a part of VLCache raises; the answer, and the failures counted meanwhile."""
    from tests.helpers.engine import run
    from vlcache_connector.worker import injection

    scheduler, worker = sides(llm)
    owner, name = {
        "injection": (injection, "write_kv"),
        "planning": (scheduler, "_plan"),
        "capture": (worker._capture, "on_kv_write"),
        "making room": (worker._storage, "open_kv"),
        "store": (worker._storage, "keep_kv"),
    }[part]
    original = getattr(owner, name)
    before = scheduler.statistics.events.copy()
    setattr(owner, name, raise_fault)
    try:
        [answer] = run(llm, [ask])
    finally:
        setattr(owner, name, original)
    events = scheduler.statistics.events - before
    return answer, {event: count for event, count in events.items() if event.startswith("failed.")}


@pytest.mark.parametrize("part", ["injection", "planning"])
def test_output_is_that_of_a_full_recompute(
    engines: Callable[..., Engine], engine: Engine, part: str
) -> None:
    answer, failures = engine.call(ask_with_broken, part, moved(part))
    assert sum(failures.values()) == 1
    assert_fully_recomputed(answer, engines, part)


@pytest.mark.parametrize("part", ["capture", "making room", "store"])
def test_what_cannot_be_stored_is_not_noticed(engine: Engine, part: str) -> None:
    cold = Ask(f"never seen, {part} {IMAGE}", ((75 + len(part), 224),), max_tokens=4)
    answer, failures = engine.call(ask_with_broken, part, cold)
    assert answer.finish_reason == "length"
    assert sum(failures.values()) > 0
    [again] = engine.ask(replace(cold, text=f"still unknown {cold.text}"))
    assert again.figures is not None
    assert again.figures["reused_tokens"] == 0


@pytest.mark.parametrize("fault", [lose_a_segment, store_another_shape])
def test_a_lost_segment_is_computed_instead(
    engines: Callable[..., Engine], engine: Engine, fault: Callable[[Any], None]
) -> None:
    engine.call(fault)
    [answer] = engine.ask(moved(fault.__name__))
    assert answer.figures is not None
    assert answer.figures["fallback"] == "segment lost"
    assert_fully_recomputed(answer, engines, fault.__name__)


def lose_everything(llm: Any) -> None:
    """The worker's store loses all segments and encoder rows, unknown to the scheduler side."""
    _, worker = sides(llm)
    for segment in list(worker._storage.engine._resident):
        worker._storage.engine.remove(SegmentId(*segment))


def test_lost_encoder_rows_are_computed_in_the_same_step(
    engines: Callable[..., Engine], engine: Engine
) -> None:
    engine.call(lose_everything)
    [answer] = engine.ask(moved("everything lost"))
    assert answer.figures is not None
    assert answer.figures["fallback"] == "segment lost"
    assert_fully_recomputed(answer, engines, "everything lost")


def ask_without(llm: Any, path: str, ask: Ask) -> Answer:
    """Run `ask` while a method of the worker side, at `path`, raises always."""
    from tests.helpers.engine import run

    _, worker = sides(llm)
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, worker)
    setattr(owner, name, raise_fault)
    try:
        [answer] = run(llm, [ask])
        return answer
    finally:
        delattr(owner, name)


@pytest.mark.parametrize("path", ["_storage.get", "_loader.fetch", "_loader.stage"])
def test_a_store_that_can_not_be_read_costs_nothing_but_time(
    engines: Callable[..., Engine], engine: Engine, path: str
) -> None:
    answer = engine.call(ask_without, path, moved(path))
    assert answer.finish_reason == "length"
    if path == "_loader.stage":
        assert answer.figures is not None
        assert answer.figures["reused_tokens"] > 0
    else:
        assert_fully_recomputed(answer, engines, path)


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_model_that_can_not_compute_follows_vllms_policy(
    engines: Callable[..., Engine], tiny_model: Callable[..., Path], policy: str
) -> None:
    """Nothing but forwards that fail again and again ends in a failed request."""
    engine = Engine(
        tiny_model(),
        None,
        kv_transfer_config={
            "kv_connector": "VLCacheConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {
                "cpu_bytes": "64MiB",
                "encoder_cpu_bytes": "64MiB",
                "gate": "off",
            },
        },
    )
    try:
        engine.ask(DONOR)
        answer = engine.call(ask_without, "_model.forward", moved(policy))
        if policy == "recompute":
            answer = replace(answer, figures={"reused_tokens": 0})
            assert_fully_recomputed(answer, engines, policy)
        else:
            assert answer.finish_reason == "error"
        [text] = engine.ask(Ask("text goes on", max_tokens=2))
        assert text.finish_reason == "length"
    finally:
        engine.close()


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

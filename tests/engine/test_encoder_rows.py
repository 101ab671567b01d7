"""Encoder rows are where the scheduler believes them to be, whatever a step brings together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.encoder import count_encoder_runs, forget_vllms_encoder_cache
from tests.helpers.engine import IMAGE, Answer, Ask, Engine
from vlcache_connector.storage.header import SegmentId

A, B = (301, 224), (302, 336, 224)


def misplaced_rows(llm: Any) -> dict[str, set[str]]:
    """Keys that only the scheduler or only the worker takes to be stored, by which."""
    from vllm.distributed.ec_transfer import get_ec_transfer

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    index = scheduler.ec_connector._rows.index
    index.check_integrity()
    host = get_ec_transfer()._rank.storage.engine
    ready = {key for key in index._entries if index.is_ready(key)}
    # What was evicted since the last step's plan is dropped in the next one.
    known = ready | set(index._evicted)
    stored = {key for key, kind in host._resident if kind == "encoder"}
    found = {
        "ready, not stored": ready - stored,
        "evicted, not stored": known - ready - stored,
        "stored, not known": stored - known,
    }
    return {what: keys for what, keys in found.items() if keys}


def reset_prefix_cache(llm: Any) -> None:
    assert llm.reset_prefix_cache(reset_connector=True)


def reset_encoder_cache(llm: Any) -> None:
    llm.llm_engine.reset_encoder_cache()


def reset_prefix_then_encoder_cache(llm: Any) -> None:
    reset_prefix_cache(llm)
    reset_encoder_cache(llm)


def reset_encoder_then_prefix_cache(llm: Any) -> None:
    reset_encoder_cache(llm)
    reset_prefix_cache(llm)


def reset_as_pausing_does(llm: Any) -> None:
    llm.llm_engine.engine_core.engine_core._reset_caches()
    llm.llm_engine.reset_mm_cache()


RESETS = [
    reset_prefix_cache,
    reset_encoder_cache,
    reset_prefix_then_encoder_cache,
    reset_encoder_then_prefix_cache,
    reset_as_pausing_does,
]


def assert_plain(actual: Answer, ask: Ask, engines: Callable[..., Engine]) -> None:
    [expected] = engines(None).ask(replace(ask, vlcache=None))
    assert actual.finish_reason == "length"
    assert actual.tokens == expected.tokens
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"runner": "V2"}], ids=["runner V1", "runner V2"])
@pytest.mark.parametrize("reset", RESETS, ids=lambda reset: reset.__name__)
def test_images_are_served_after_every_kind_of_reset(
    engines: Callable[..., Engine], reset: Callable[[Any], None], settings: dict[str, Any]
) -> None:
    engine, name = engines({}, **settings), reset.__name__
    engine.ask(Ask(f"before {name} {IMAGE} then {IMAGE}", (A, B)))
    engine.call(reset)
    for number in range(2):
        # In a single step each, so that nothing is dropped by one in between.
        ask = Ask(f"{name} {number} {IMAGE} and {IMAGE}", (B, A), vlcache={"recompute_ratio": 1.0})
        [answer] = engine.ask(ask)
        assert_plain(answer, ask, engines)
        assert engine.call(misplaced_rows) == {}
        engine.call(forget_vllms_encoder_cache)
    again = Ask(f"{name}, once more {IMAGE} and {IMAGE}", (A, B))
    assert engine.call(count_encoder_runs, again) == 0


def ask_while_nothing_can_be_kept(llm: Any, ask: Ask) -> Answer:
    """`ask`, while encoder rows find no room in host memory."""
    from vllm.distributed.ec_transfer import get_ec_transfer

    from tests.helpers.engine import run

    host = get_ec_transfer()._rank.storage.engine
    original = host.put_encoder
    host.put_encoder = lambda key, rows: 0
    try:
        [answer] = run(llm, [ask])
    finally:
        host.put_encoder = original
    return answer


def test_rows_that_were_lost_are_kept_when_they_are_encoded_again(
    engines: Callable[..., Engine],
) -> None:
    engine, new = engines({}), (303, 224)
    first = Ask(f"rows are lost {IMAGE}", (new,))
    assert engine.call(ask_while_nothing_can_be_kept, first).finish_reason == "length"
    for text in ("encoded again", "and loaded"):
        engine.call(forget_vllms_encoder_cache)
        ask = Ask(f"{text} {IMAGE}", (new,), vlcache={"recompute_ratio": 1.0})
        [answer] = engine.ask(ask)
        assert_plain(answer, ask, engines)
        assert engine.call(misplaced_rows) == {}
    engine.call(forget_vllms_encoder_cache)
    assert engine.call(count_encoder_runs, Ask(f"known {IMAGE}", (new,))) == 0


def ask_around(llm: Any, rounds: int) -> tuple[list[str | None], set[str], int]:
    """Ask for more images than there is room for, over and over, several in each step.

    Returns:
        How the requests ended, what is misplaced in the end, and how often rows were evicted.
    """
    from tests.helpers.engine import run

    images = [(310 + number, 224) for number in range(5)]
    ends: list[str | None] = []
    misplaced: dict[str, set[str]] = {}
    for number in range(rounds):
        x, y, z = (images[(number * step) % 5] for step in (1, 2, 3))
        asks = [
            Ask(f"round {number} asks for {IMAGE}", (x,)),
            Ask(f"round {number} compares {IMAGE} and {IMAGE}", (y, x)),
            Ask(f"round {number} computes {IMAGE}", (z,), vlcache={"enabled": False}),
            Ask(f"round {number} sees {IMAGE} again", (y,), vlcache={"recompute_ratio": 1.0}),
        ]
        forget_vllms_encoder_cache(llm)
        ends += [answer.finish_reason for answer in run(llm, asks)]
        misplaced |= misplaced_rows(llm)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return ends, misplaced, scheduler.ec_connector._rows.index._events["evicted"]


def row_bytes(llm: Any) -> int:
    return llm.llm_engine.engine_core.engine_core.scheduler.ec_connector._rows.num_bytes(1)


def test_rows_are_kept_and_evicted_in_turn_under_a_small_budget(
    tiny_model: Callable[..., Path], engines: Callable[..., Engine]
) -> None:
    budget = 2 * 64 * engines({}).call(row_bytes) + 1
    engine = Engine(tiny_model(), {"encoder_cpu_bytes": budget})
    try:
        ends, misplaced, _ = engine.call(ask_around, 30)
        assert set(ends) == {"length"}
        assert misplaced == {}
    finally:
        engine.close()


def test_the_encoder_half_alone_keeps_storing(
    tiny_model: Callable[..., Path], engines: Callable[..., Engine]
) -> None:
    budget = 2 * 64 * engines({}).call(row_bytes) + 1
    engine = Engine(
        tiny_model(),
        None,
        ec_transfer_config={
            "ec_connector": "VLCacheEncoderConnector",
            "ec_role": "ec_both",
            "ec_connector_extra_config": {"cpu_bytes": "16MiB", "encoder_cpu_bytes": budget},
        },
    )
    try:
        images = [(320 + number, 224) for number in range(4)]
        for image in images:
            runs = []
            for text in ("first", "then known"):
                engine.call(forget_vllms_encoder_cache)
                ask = Ask(f"{text} {IMAGE}", (image,), max_tokens=3)
                runs.append(engine.call(count_encoder_runs, ask))
            assert runs == [1, 0]
            assert engine.call(misplaced_rows) == {}
        ends, misplaced, evicted = engine.call(ask_around, 10)
        assert set(ends) == {"length"}
        assert misplaced == {}
        assert evicted > 0
    finally:
        engine.close()


def lose_rows(llm: Any) -> None:
    """The worker's store loses all encoder rows, and vLLM's own cache is emptied."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    host = get_kv_transfer_group()._worker._storage.engine
    for key, kind in list(host._resident):
        if kind == "encoder":
            host.remove(SegmentId(key, kind))
    reset_encoder_cache(llm)


def test_promised_rows_that_are_not_there_are_encoded_again(
    engines: Callable[..., Engine],
) -> None:
    """For a request that reuses no KV, and so leaves its image to vLLM's own forward."""
    engine, image = engines({}), (997, 224)
    engine.ask(Ask(f"to be lost {IMAGE}", (image,)))
    engine.call(lose_rows)
    ask = Ask(f"lost by now {IMAGE} what", (image,), max_tokens=2, vlcache={"enabled": False})
    [answer] = engine.ask(ask)
    assert answer.finish_reason == "length"
    assert_plain(answer, ask, engines)

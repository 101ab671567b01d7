"""Many different requests at once give, each, what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, VIDEO, Answer, Ask, Engine, answer_of, request_of

KNOWN = [(61, 224), (62, 336, 224), (63, 224), (64, 280)]
CLIP = (65, 112, 4)
MAX_TOKENS = 12


def mixed_requests() -> list[Ask]:
    """32 requests: warm, cold, mixed, text-only, with a video, at several ratios."""
    asks = []
    for i in range(32):
        first, second = KNOWN[i % 4], KNOWN[(i + 1) % 4]
        new = (700 + i, 224)
        asks.append(
            [
                Ask(f"request {i} asks about {IMAGE} and {IMAGE} here", (first, second)),
                Ask(f"request {i} is cold {IMAGE}", (new,)),
                Ask(f"request {i} has a new {IMAGE} before an old {IMAGE} one", (new, first)),
                Ask(f"request {i} is only text " * (1 + i % 7)),
                Ask(f"request {i} watches {VIDEO} and {IMAGE}", (second,), (CLIP,)),
            ][i % 5]
        )
    ratios = (0.0, 0.05, 0.3, 1.0)
    return [
        replace(ask, max_tokens=MAX_TOKENS, vlcache={"recompute_ratio": ratios[i % 4]})
        for i, ask in enumerate(asks)
    ]


def run_together(
    llm: Any, asks: list[Ask], aborted: dict[int, int]
) -> tuple[dict[int, Answer], int]:
    """Run `asks` at once, aborting some after a number of steps; answers and preemptions."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preemptions = 0
    original = Scheduler._preempt_request

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal preemptions
        preemptions += 1
        original(self, *args, **kwargs)

    Scheduler._preempt_request = counting
    engine, answers = llm.llm_engine, {}
    try:
        for i, ask in enumerate(asks):
            prompt, params = request_of(ask)
            engine.add_request(str(i), prompt, params)
        step = 0
        while engine.has_unfinished_requests():
            for i, last in aborted.items():
                if last == step:
                    engine.abort_request([str(i)])
            for output in engine.step():
                if output.finished:
                    answers[int(output.request_id)] = answer_of(output)
            step += 1
    finally:
        Scheduler._preempt_request = original
    return answers, preemptions


def state(llm: Any) -> dict[str, int]:
    """What both sides still hold."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    worker = get_kv_transfer_group()._worker
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    scheduler._segments.check_integrity()
    scheduler._encoder_rows.index.check_integrity()
    worker._storage.engine.check_integrity()
    resident = [key for key, kind in worker._storage.engine._resident if kind == "kv"]
    return {
        "requests": len(scheduler._requests) + len(scheduler._live),
        "captures": len(worker._capture),
        "worker requests": len(worker._requests),
        "not in the index": sum(key not in scheduler._segments for key in resident),
        "not ready": sum(not scheduler._segments.is_ready(key) for key in resident),
        "failures": sum(
            n for event, n in scheduler.statistics.events.items() if event.startswith("failed.")
        ),
    }


ABORTED = {3: 2, 10: 3, 17: 1, 22: 5}


DONORS = [Ask(f"donor {IMAGE}", (image,)) for image in KNOWN]
DONORS.append(Ask(f"donor {VIDEO}", (), (CLIP,)))
ARGUMENTS = {"max_num_batched_tokens": 512, "max_model_len": 1024, "block_size": 32}


def engine_with_donors(model: Path, **arguments: Any) -> Engine:
    engine = Engine(model, {}, **ARGUMENTS, **arguments)
    for donor in DONORS:
        engine.ask(donor)
    return engine


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[..., Path]) -> list[Answer]:
    """The answers one by one; an image that is new in a request occurs in no other."""
    engine = engine_with_donors(tiny_model())
    try:
        return [engine.ask(ask)[0] for ask in mixed_requests()]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("blocks", "async_scheduling"),
    [(None, False), (40, True)],
    ids=["ample KV cache", "small KV cache, async scheduling"],
)
def test_mixed_requests_give_what_they_give_alone(
    tiny_model: Callable[..., Path],
    alone: list[Answer],
    blocks: int | None,
    async_scheduling: bool,
) -> None:
    engine = engine_with_donors(
        tiny_model(), num_gpu_blocks_override=blocks, async_scheduling=async_scheduling
    )
    try:
        answers, preemptions = engine.call(run_together, mixed_requests(), ABORTED)
        assert (preemptions > 0) == (blocks is not None)
        finished = {i: a for i, a in answers.items() if a.finish_reason != "abort"}
        assert set(range(len(alone))) - set(finished) == set(ABORTED)
        for i, answer in finished.items():
            assert answer.tokens == alone[i].tokens, f"request {i}"
            np.testing.assert_allclose(
                answer.logprobs, alone[i].logprobs, rtol=0, atol=1e-3, err_msg=f"request {i}"
            )
        # One more step lets the workers forget the last finished requests.
        engine.ask(Ask("after the storm"))
        assert set(engine.call(state).values()) == {0}
    finally:
        engine.close()

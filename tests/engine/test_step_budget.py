"""A claim makes no step longer than vLLM's own budgets allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Ask, Engine

BUDGET = 512
SMALL = BUDGET // 8
SETTINGS = {"max_num_batched_tokens": BUDGET}
KNOWN = (401, 672)
LITTLE = (402, 224)


@dataclass(frozen=True)
class Step:
    """What one of the engine's steps took.

    Attributes:
        seconds: of the engine's thread on a core, whatever else the machine does.
        scheduled: tokens of vLLM's own forward.
        sparse: tokens of sparse prefills.
    """

    seconds: float
    scheduled: int
    sparse: int


def run_beside_a_decoding_neighbour(llm: Any, asks: list[Ask]) -> tuple[list[Step], list[Any]]:
    """Run `asks` together, while another request decodes; the steps and the answers."""
    import time

    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    from tests.helpers.engine import answer_of, request_of

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule
    tokens = {"scheduled": 0, "sparse": 0}
    model = get_kv_transfer_group()._worker._model if has_kv_transfer_group() else None

    def counting_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        tokens["scheduled"] += output.total_num_scheduled_tokens
        return output

    forward = model.forward if model is not None else None

    def counting_forward(token_ids: Any, *args: Any) -> Any:
        tokens["sparse"] += len(token_ids)
        return forward(token_ids, *args)

    scheduler.schedule = counting_schedule
    if model is not None:
        model.forward = counting_forward
    steps, answers = [], {}
    try:
        neighbour = Ask("a neighbour that decodes", max_tokens=200, sampling={"logprobs": None})
        engine.add_request("neighbour", *request_of(neighbour))
        for _ in range(3):
            engine.step()
        names = [
            engine.add_request(str(i), *request_of(ask)) or str(i) for i, ask in enumerate(asks)
        ]
        while len(answers) < len(names):
            tokens.update(scheduled=0, sparse=0)
            start = time.thread_time()
            outputs = engine.step()
            steps.append(Step(time.thread_time() - start, **tokens))
            answers |= {
                output.request_id: answer_of(output)
                for output in outputs
                if output.finished and output.request_id != "neighbour"
            }
        engine.abort_request(["neighbour"])
        while engine.has_unfinished_requests():
            engine.step()
    finally:
        del scheduler.schedule
        if model is not None:
            del model.forward
    return steps, [answers[str(i)] for i in range(len(asks))]


@pytest.fixture
def engine(engines: Callable[..., Engine]) -> Engine:
    engine = engines({}, **SETTINGS)
    for image in (KNOWN, LITTLE):
        engine.ask(Ask(f"known {IMAGE}", (image,)))
    return engine


def new_images(seed: int, count: int = 4, side: int = 672) -> tuple[tuple[int, int], ...]:
    return tuple((10_000 + 10 * seed + number, side) for number in range(count))


def test_unknown_images_in_front_of_a_known_one_take_no_longer_steps_than_in_plain_vllm(
    engine: Engine, engines: Callable[..., Engine]
) -> None:
    plain, seconds = engines(None, **SETTINGS), {"plain": [], "cached": []}
    for seed in range(4):
        images = (*new_images(seed), KNOWN)
        ask = Ask(f"compare {seed} " + f"{IMAGE} " * len(images), images)
        for name, one in (("plain", plain), ("cached", engine)):
            steps, [answer] = one.call(run_beside_a_decoding_neighbour, [ask])
            assert answer.finish_reason == "length"
            assert max(step.scheduled + step.sparse for step in steps) <= BUDGET
            if seed:  # the first time, memory is taken
                seconds[name].append([step.seconds for step in steps])
    # All runs are cut into the same steps: each is taken where it was disturbed the least. Those
    # with unknown images are equally long.
    longest = {
        name: np.sort(np.array(runs).min(axis=0))[-3:].mean() for name, runs in seconds.items()
    }
    assert longest["cached"] <= 2 * longest["plain"]  # it was 3.5 times as long


def test_a_step_computes_no_more_than_its_budget_whoever_asks(engine: Engine) -> None:
    asks = []
    for number in range(16):
        new = new_images(50 + number, 1, 224)
        asks.append(
            [
                Ask(f"{number} has a new {IMAGE} and a known {IMAGE}", (*new, LITTLE)),
                Ask(f"{number} is cold {IMAGE}", new),
                Ask(f"{number} is warm {IMAGE} and asks", (KNOWN,)),
                Ask(f"{number} is text " * (20 + 10 * number)),
            ][number % 4]
        )
    steps, answers = engine.call(run_beside_a_decoding_neighbour, asks)
    assert {answer.finish_reason for answer in answers} == {"length"}
    for step in steps:
        assert step.scheduled + step.sparse <= BUDGET or step.sparse <= SMALL
    assert sum(step.sparse for step in steps) > 4 * 64
    # All four warm requests and the four behind a new image have reused what is known.
    reused = [(a.figures or {"reused_tokens": 0})["reused_tokens"] for a in answers]
    assert all(count > 0 for count in reused[0::4] + reused[2::4])


def test_what_is_behind_too_much_that_is_new_is_computed(
    engine: Engine, engines: Callable[..., Engine]
) -> None:
    new = new_images(90, 2, 448)
    images = (LITTLE, *new, KNOWN)
    ask = Ask(f"one known {IMAGE} then {IMAGE} {IMAGE} and {IMAGE}", images, max_tokens=4)
    steps, [answer] = engine.call(run_beside_a_decoding_neighbour, [ask])
    assert max(step.scheduled + step.sparse for step in steps) <= BUDGET + SMALL
    assert answer.figures is not None
    # The first image is reused, the last one is not.
    assert 0 < answer.figures["reused_tokens"] <= 64
    assert answer.figures["fallback"] == "budget"
    full = Ask(ask.text, ask.images, max_tokens=4, vlcache={"recompute_ratio": 1.0})
    [exact], [expected] = engine.ask(full), engines(None, **SETTINGS).ask(full)
    assert exact.tokens == expected.tokens
    np.testing.assert_allclose(exact.logprobs, expected.logprobs, rtol=0, atol=1e-3)

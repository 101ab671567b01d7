"""vLLM's exact prefix cache stays exact: approximate KV is served to nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import IMAGE, Answer, Ask, Engine, answer_of, request_of

A, B = (51, 336), (52, 336)
LONG = "a shared system prompt that fills blocks " * 8
OFF = {"enabled": False}
BLIND = {"recompute_ratio": 0.0}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model()


@pytest.fixture
def fresh(model: Path) -> Iterator[Callable[..., Engine]]:
    """Engines that start with empty caches."""
    made: list[Engine] = []

    def make(connector: dict[str, Any] | None, **arguments: Any) -> Engine:
        made.append(Engine(model, connector, **arguments))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def local_hits(llm: Any, ask: Ask) -> tuple[Answer, int]:
    """Run `ask`; the answer, and how many prompt tokens vLLM's own prefix cache served."""
    prompt, params = request_of(ask)
    [output] = llm.generate([prompt], [params], use_tqdm=False)
    return answer_of(output), output.num_cached_tokens


def interleaved(llm: Any, first: Ask, second: Ask, delay_steps: int) -> list[Answer]:
    """Start `second` `delay_steps` engine steps after `first`, while that one still runs."""
    engine, done = llm.llm_engine, {}

    def step() -> None:
        for output in engine.step():
            if output.finished:
                done[output.request_id] = answer_of(output)

    for name, ask in (("first", first), ("second", second)):
        prompt, params = request_of(ask)
        engine.add_request(name, prompt, params)
        for _ in range(delay_steps):
            step()
    while engine.has_unfinished_requests():
        step()
    return [done[key] for key in sorted(done)]


TARGET = Ask(f"{LONG} a question about {IMAGE} and {IMAGE} in the end", (B, A), max_tokens=8)
DONORS = (Ask(f"see {IMAGE} now", (A,)), Ask(f"look {IMAGE}", (B,)))


def test_exact_request_after_approximate_one_equals_a_fresh_engine(
    fresh: Callable[..., Engine],
) -> None:
    cached = fresh({"min_recompute_tokens": 0})
    for donor in DONORS:
        cached.ask(donor)
    [approximate] = cached.ask(replace(TARGET, vlcache=BLIND))
    assert approximate.figures is not None
    assert approximate.figures["reused_tokens"] == 288
    exact, hits = cached.call(local_hits, replace(TARGET, vlcache=OFF))
    # The blocks in front of the first image are exact and may be shared.
    assert 0 < hits < exact.prompt.index(max(set(exact.prompt), key=exact.prompt.count)) + 1
    [expected] = fresh(None).ask(TARGET)
    assert np.abs(approximate.logprobs[0] - expected.logprobs[0]).max() > 1e-3
    assert exact.tokens == expected.tokens
    np.testing.assert_allclose(exact.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_two_exact_requests_share_blocks(fresh: Callable[..., Engine]) -> None:
    cached = fresh({})
    off = replace(TARGET, vlcache=OFF)
    first, cold_hits = cached.call(local_hits, off)
    second, warm_hits = cached.call(local_hits, off)
    assert cold_hits == 0
    assert warm_hits > len(first.prompt) // 2
    assert second.tokens == first.tokens


def test_exact_request_during_an_approximate_one(fresh: Callable[..., Engine]) -> None:
    cached = fresh({"min_recompute_tokens": 0})
    for donor in DONORS:
        cached.ask(donor)
    approximate, exact = cached.call(
        interleaved,
        replace(TARGET, vlcache=BLIND, max_tokens=24),
        replace(TARGET, vlcache=OFF),
        3,
    )
    assert approximate.figures is not None
    assert approximate.figures["reused_tokens"] == 288
    [expected] = fresh(None).ask(TARGET)
    assert exact.tokens == expected.tokens
    np.testing.assert_allclose(exact.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def preempted(llm: Any, asks: list[Ask]) -> tuple[list[Answer], int]:
    """Run `asks` together; the answers, and how often vLLM preempted a request."""
    from vllm.v1.core.sched.scheduler import Scheduler

    count = 0
    original = Scheduler._preempt_request

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        original(self, *args, **kwargs)

    Scheduler._preempt_request = counting
    try:
        from engine import run

        return run(llm, asks), count
    finally:
        Scheduler._preempt_request = original


@pytest.mark.slow
def test_exact_requests_stay_exact_under_preemption(fresh: Callable[..., Engine]) -> None:
    long = replace(TARGET, max_tokens=200)
    [expected] = fresh(None).ask(long)
    # Room for two and a half of these requests: decoding forces preemptions.
    tokens = len(expected.prompt) + long.max_tokens
    cached = fresh(
        {"min_recompute_tokens": 0},
        max_model_len=tokens,
        block_size=32,
        num_gpu_blocks_override=5 * tokens // (2 * 32),
    )
    for donor in DONORS:
        cached.ask(donor)
    asks = [replace(long, vlcache=BLIND), replace(long, vlcache=OFF), replace(long, vlcache=BLIND)]
    answers, preemptions = cached.call(preempted, asks)
    assert preemptions > 0
    [blind_alone] = cached.ask(asks[0])
    assert answers[1].tokens == expected.tokens
    np.testing.assert_allclose(answers[1].logprobs, expected.logprobs, rtol=0, atol=1e-3)
    for answer in (answers[0], answers[2]):
        assert answer.tokens == blind_alone.tokens
    [exact_after] = cached.ask(replace(TARGET, vlcache=OFF))
    np.testing.assert_allclose(exact_after.logprobs, expected.logprobs[:8], rtol=0, atol=1e-4)

"""vLLM's exact prefix cache stays exact: approximate KV is served to nobody else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Answer, Ask, Engine, answer_of, request_of

A, B = (51, 336), (52, 336)
LONG = "a shared system prompt that fills blocks " * 8
OFF = {"enabled": False}
BLIND = {"recompute_ratio": 0.0}


@pytest.fixture
def cached(engines: Callable[..., Engine]) -> Engine:
    """An engine that knows the donors and nothing else."""
    engine = engines({})
    engine.call(forget_everything)
    for donor in DONORS:
        engine.ask(donor)
    return engine


def forget_everything(llm: Any) -> None:
    """Empty vLLM's prefix cache and VLCache."""
    assert llm.reset_prefix_cache(reset_connector=True)


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


def test_exact_request_after_approximate_one(
    engines: Callable[..., Engine], cached: Engine
) -> None:
    [approximate] = cached.ask(replace(TARGET, vlcache=BLIND))
    assert approximate.figures is not None
    assert approximate.figures["reused_tokens"] == 288
    exact, hits = cached.call(local_hits, replace(TARGET, vlcache=OFF))
    # The blocks in front of the first image are exact and may be shared.
    assert 0 < hits < exact.prompt.index(max(set(exact.prompt), key=exact.prompt.count)) + 1
    [expected] = engines(None).ask(TARGET)
    assert np.abs(approximate.logprobs[0] - expected.logprobs[0]).max() > 1e-3
    assert exact.tokens == expected.tokens
    np.testing.assert_allclose(exact.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_two_exact_requests_share_blocks(cached: Engine) -> None:
    off = replace(TARGET, vlcache=OFF)
    first, cold_hits = cached.call(local_hits, off)
    second, warm_hits = cached.call(local_hits, off)
    assert cold_hits == 0
    assert warm_hits > len(first.prompt) // 2
    assert second.tokens == first.tokens


def test_exact_request_during_an_approximate_one(
    engines: Callable[..., Engine], cached: Engine
) -> None:
    approximate, exact = cached.call(
        interleaved,
        replace(TARGET, vlcache=BLIND, max_tokens=24),
        replace(TARGET, vlcache=OFF),
        3,
    )
    assert approximate.figures is not None
    assert approximate.figures["reused_tokens"] == 288
    [expected] = engines(None).ask(TARGET)
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
        from tests.helpers.engine import run

        return run(llm, asks), count
    finally:
        Scheduler._preempt_request = original


def test_exact_requests_stay_exact_under_preemption(engines: Callable[..., Engine]) -> None:
    long = replace(TARGET, max_tokens=200)
    [expected] = engines(None).ask(long)
    # Two prompts fit, their answers do not: decoding forces preemptions.
    prompt_blocks = len(expected.prompt) // 32 + 1
    small = engines(
        {},
        max_model_len=len(expected.prompt) + 256,
        block_size=32,
        num_gpu_blocks_override=2 * prompt_blocks + 6,
    )
    for donor in DONORS:
        small.ask(donor)
    # Before any exact request leaves blocks that would make a blind one more exact.
    blind = replace(long, vlcache=BLIND)
    other = replace(blind, text=f"another {LONG} question about {IMAGE} and {IMAGE} then")
    alone = [small.ask(blind)[0], small.ask(other)[0]]
    answers, preemptions = small.call(preempted, [blind, replace(long, vlcache=OFF), other])
    assert preemptions > 0
    assert answers[1].tokens == expected.tokens
    np.testing.assert_allclose(answers[1].logprobs, expected.logprobs, rtol=0, atol=1e-3)
    assert answers[0].tokens == alone[0].tokens
    assert answers[2].tokens == alone[1].tokens
    [exact_after] = small.ask(replace(TARGET, vlcache=OFF))
    np.testing.assert_allclose(exact_after.logprobs, expected.logprobs[:8], rtol=0, atol=1e-4)


def test_blocks_that_a_client_weakened_are_its_own_even_where_others_are_shared(
    engines: Callable[..., Engine],
) -> None:
    engine = engines({"share_approximate_prefix": True})
    for donor in DONORS:
        engine.ask(donor)
    first_image = 0
    for vlcache, is_shared in ((BLIND, False), (None, True)):
        [approximate] = engine.ask(replace(TARGET, vlcache=vlcache))
        assert approximate.figures is not None
        assert approximate.figures["reused_tokens"] > 0
        tokens = approximate.prompt
        first_image = tokens.index(max(set(tokens), key=tokens.count))
        _, hits = engine.call(local_hits, replace(TARGET, vlcache=OFF))
        assert (hits > first_image + 16) == is_shared
        engine.call(forget_vllms_prefix_cache)


def forget_vllms_prefix_cache(llm: Any) -> None:
    assert llm.reset_prefix_cache()


def test_what_a_client_weakened_is_stored_for_nobody(engines: Callable[..., Engine]) -> None:
    engine = engines({})
    known, new = (53, 336), (54, 336)
    engine.ask(Ask(f"a donor {IMAGE}", (known,)))
    reused = []
    for number, vlcache in enumerate((BLIND, None, None)):
        text = f"{number} compares {IMAGE} with the new {IMAGE}"
        [answer] = engine.ask(Ask(text, (known, new), vlcache=vlcache))
        assert answer.figures is not None
        reused.append(answer.figures["reused_tokens"])
    # The second request computes the new image again, and stores it for the third.
    assert reused[0] == 144
    assert 0 < reused[1] < 144
    assert reused[2] > 144

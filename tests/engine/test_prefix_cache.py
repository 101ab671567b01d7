"""vLLM's exact prefix cache stays exact, and approximate KV has one of its own.

That one serves those who would compute the same KV, and nobody else.
"""

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


def aborted(llm: Any, ask: Ask, steps: int) -> None:
    """Start `ask`, and abort it after so many of the engine's steps."""
    engine = llm.llm_engine
    engine.add_request("aborted", *request_of(ask))
    for _ in range(steps):
        engine.step()
    engine.abort_request(["aborted"], internal=False)
    while engine.has_unfinished_requests():
        engine.step()


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_exact_request_after_an_aborted_approximate_one(
    engines: Callable[..., Engine], cached: Engine, steps: int
) -> None:
    cached.call(aborted, replace(TARGET, vlcache=BLIND, max_tokens=24), steps)
    # Those who recompute alike go on where it was left.
    [approximate] = cached.ask(replace(TARGET, vlcache=BLIND))
    assert approximate.figures is not None
    assert approximate.figures["approximate_prefix_tokens"] > 0
    [expected] = engines(None).ask(TARGET)
    [exact] = cached.ask(replace(TARGET, vlcache=OFF))
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
    long = replace(TARGET, max_tokens=110)
    [expected] = engines(None).ask(long)
    # Two prompts fit, as they share their first blocks; their answers do not: decoding preempts.
    prompt_blocks = len(expected.prompt) // 32 + 1
    small = engines(
        {},
        max_model_len=len(expected.prompt) + 256,
        block_size=32,
        num_gpu_blocks_override=2 * prompt_blocks - 1,
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


@pytest.mark.parametrize(
    ("vlcache", "is_shared"),
    [(BLIND, True), ({**BLIND, "selector": "first_k"}, True), (None, False), (OFF, False)],
    ids=["equal", "equal in effect", "the server's own", "exact"],
)
def test_approximate_blocks_are_shared_by_those_who_recompute_alike(
    cached: Engine, vlcache: dict[str, Any] | None, is_shared: bool
) -> None:
    cached.ask(replace(TARGET, vlcache=BLIND))
    # vLLM reports what VLCache reuses as cached, too: without its segments, only blocks are left.
    answer, hits = cached.call(hits_without_segments, replace(TARGET, vlcache=vlcache))
    first_image = answer.prompt.index(max(set(answer.prompt), key=answer.prompt.count))
    assert (hits > first_image + 16) == is_shared
    if answer.figures is not None:
        assert (answer.figures["approximate_prefix_tokens"] > 0) == is_shared


def hits_without_segments(llm: Any, ask: Ask) -> tuple[Answer, int]:
    """As `local_hits`, when every donor has been evicted."""
    llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler.reset()
    return local_hits(llm, ask)


def test_another_salt_is_served_no_approximate_block(cached: Engine) -> None:
    salted = replace(TARGET, vlcache=BLIND, cache_salt="ann")
    cached.ask(*(replace(donor, cache_salt="ann") for donor in DONORS))
    [approximate] = cached.ask(salted)
    assert approximate.figures is not None
    assert approximate.figures["reused_tokens"] == 288
    assert cached.call(hits_without_segments, replace(salted, cache_salt="bob"))[1] == 0
    assert cached.call(hits_without_segments, salted)[1] > 288


TURNS = 8
WORDS = {"allowed_token_ids": list(range(60, 160)), "logprobs": None}
"""Of answers: no special tokens."""


def chat(llm: Any, first: Ask, evict: bool) -> list[tuple[int, list[int]]]:
    """Turns about the images of `first`, text only from the second on.

    Args:
        evict: all that VLCache stores, between the turns.

    Returns:
        By turn, the prompt tokens found cached, and the prompt.
    """
    prompt, params = request_of(first)
    tokenizer = llm.get_tokenizer()
    tokens, turns = tokenizer.encode(prompt.pop("prompt")), []
    for turn in range(TURNS):
        [output] = llm.generate([{**prompt, "prompt_token_ids": tokens}], [params], use_tqdm=False)
        turns.append((output.num_cached_tokens, list(output.prompt_token_ids)))
        tokens = [*tokens, *output.outputs[0].token_ids]
        tokens += tokenizer.encode(f" and now question {turn}: what else is there to see " * 8)
        if evict:
            hits_without_segments(llm, Ask("no image"))
    return turns


@pytest.mark.parametrize(
    ("vlcache", "evict"), [(None, False), (BLIND, True)], ids=["donors kept", "donors evicted"]
)
def test_a_chat_finds_as_much_cached_as_with_plain_vllm(
    engines: Callable[..., Engine], vlcache: dict[str, Any] | None, evict: bool
) -> None:
    # As small as a block may be on a CPU, and so much text that every turn fills some.
    settings: dict[str, Any] = {"block_size": 32}
    cached = engines({}, **settings)
    cached.call(forget_everything)
    for donor in DONORS:
        cached.ask(donor)
    first = replace(TARGET, max_tokens=33, vlcache=vlcache, sampling=WORDS)
    plain = engines(None, **settings)
    plain.call(forget_vllms_prefix_cache)
    plain_turns = plain.call(chat, first, False)
    turns = cached.call(chat, first, evict)
    assert turns[0][0] > plain_turns[0][0]  # the known images
    for (hits, prompt), (plain_hits, plain_prompt) in zip(turns, plain_turns, strict=True):
        assert len(prompt) == len(plain_prompt)
        assert hits >= plain_hits
    assert all(hits > last for (hits, _), (last, _) in zip(turns[2:], turns[1:], strict=False))
    # And all the while, an exact request is served nothing approximate.
    exact = replace(TARGET, vlcache=OFF)
    [expected] = plain.ask(exact)
    [actual] = cached.ask(exact)
    assert actual.tokens == expected.tokens
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def most_blocks(llm: Any, ask: Ask, beams: int | None) -> int:
    """Blocks of vLLM's KV cache in use at most while `ask` runs."""
    from vllm.sampling_params import BeamSearchParams

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    schedule, used = scheduler.schedule, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        used.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        return output

    prompt, params = request_of(ask)
    scheduler.schedule = counting
    try:
        if beams is None:
            llm.generate([prompt], [params], use_tqdm=False)
        else:
            llm.beam_search([prompt], BeamSearchParams(beams, max_tokens=ask.max_tokens))
        return max(used)
    finally:
        del scheduler.schedule


@pytest.mark.parametrize("beams", [None, 4], ids=["n=8", "beam search"])
def test_the_sequences_of_a_request_share_its_blocks(
    engines: Callable[..., Engine], beams: int | None
) -> None:
    settings: dict[str, Any] = {"block_size": 32}
    plain, cached = engines(None, **settings), engines({}, **settings)
    plain.call(forget_vllms_prefix_cache)
    cached.call(forget_everything)
    for donor in DONORS:
        cached.ask(donor)
    sampling = {} if beams else {"n": 8, "temperature": 1.0, "logprobs": None}
    ask = replace(TARGET, max_tokens=8, sampling=sampling)
    sequences = beams or 8
    expected = plain.call(most_blocks, ask, beams)
    actual = cached.call(most_blocks, ask, beams)
    assert actual <= expected + sequences


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

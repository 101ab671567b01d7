"""Reuse together with other features of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Ask, Engine, EngineError, answer_of, request_of

A, B = (81, 224), (82, 336, 224)
DONOR = Ask(f"seen before {IMAGE} and {IMAGE}", (A, B))
TARGET = Ask(f"both again, moved {IMAGE} and {IMAGE} ok", (B, A), max_tokens=6)


@pytest.fixture
def engine(engines: Callable[..., Engine]) -> Engine:
    engine = engines({})
    engine.ask(DONOR)
    return engine


def several_completions(llm: Any, ask: Ask, n: int) -> list[Any]:
    sampled = replace(ask, sampling={"n": n, "temperature": 1.0, "seed": 1})
    prompt, params = request_of(sampled)
    [output] = llm.generate([prompt], [params], use_tqdm=False)
    return [answer_of(output, i) for i in range(n)]


def test_several_completions_of_one_prompt(engine: Engine) -> None:
    [single] = engine.ask(TARGET)
    answers = engine.call(several_completions, TARGET, 3)
    assert len({tuple(answer.tokens) for answer in answers}) > 1
    for answer in answers:
        np.testing.assert_allclose(answer.logprobs[0], single.logprobs[0], rtol=0, atol=1e-4)


def test_cold_and_warm_deepstack_requests_in_one_step(engines: Callable[..., Engine]) -> None:
    """The main batch's deepstack features survive the sparse prefill that runs before it."""
    engine = engines({}, "qwen3_vl")
    engine.ask(DONOR)
    cold = Ask(f"a cold one {IMAGE} here", ((88, 224),), max_tokens=3)
    [expected] = engines(None, "qwen3_vl").ask(cold)
    warm = replace(TARGET, text="together " + TARGET.text)
    actual, together = engine.ask(cold, warm)
    assert together.figures is not None
    assert together.figures["reused_tokens"] > 0
    assert actual.tokens == expected.tokens
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def structured(llm: Any, ask: Ask) -> str:
    from vllm.sampling_params import StructuredOutputsParams

    prompt, params = request_of(
        replace(ask, sampling={"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])})
    )
    params.ignore_eos = False
    [output] = llm.generate([prompt], [params], use_tqdm=False)
    assert output.kv_transfer_params["vlcache"]["reused_tokens"] > 0
    return output.outputs[0].text


def test_speculative_decoding(engines: Callable[..., Engine]) -> None:
    """vLLM then asks for a step's report before it says that the step is over."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    engine = engines({}, speculative_config=ngram | {"prompt_lookup_min": 1})
    words = "the cat sat on the mat, " * 3
    exact = {"recompute_ratio": 1.0}
    donor = Ask(f"{words} {IMAGE} {IMAGE}", (A, B), max_tokens=8)
    target = Ask(f"{words} and {IMAGE} {IMAGE} the", (B, A), max_tokens=12, vlcache=exact)
    [cold], [warm] = engine.ask(donor), engine.ask(target)
    [moved] = engine.ask(replace(target, text=f"so {target.text}", vlcache=None))
    [expected_cold] = engines(None).ask(donor)
    [expected_warm] = engines(None).ask(replace(target, vlcache=None))
    assert (cold.tokens, warm.tokens) == (expected_cold.tokens, expected_warm.tokens)
    assert warm.figures is not None
    assert warm.figures["recomputed_tokens"] > 0
    assert moved.figures is not None
    assert moved.figures["reused_tokens"] > 0


def test_structured_output(engine: Engine) -> None:
    ask = Ask(f"answer yes or no about {IMAGE} please", (A,), max_tokens=16)
    assert engine.call(structured, ask) in ("yes", "no")


def test_salts_do_not_share_segments(engine: Engine) -> None:
    def reused(text: str, salt: str | None) -> int:
        [answer] = engine.ask(Ask(text, (A,), cache_salt=salt))
        assert answer.figures is not None
        return answer.figures["reused_tokens"]

    assert reused(f"salted one {IMAGE}", "tenant one") == 0
    assert reused(f"salted one, moved {IMAGE}", "tenant one") > 0
    assert reused(f"salted two {IMAGE}", "tenant two") == 0
    assert reused(f"not salted {IMAGE}", None) > 0


def test_consumers_store_nothing(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    engine = Engine(
        tiny_model(),
        None,
        kv_transfer_config={
            "kv_connector": "VLCacheConnector",
            "kv_connector_module_path": "vlcache_connector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {
                "cpu_bytes": "64MiB",
                "encoder_cpu_bytes": "64MiB",
                "write_queue_bytes": "64MiB",
                "disk_path": str(tmp_path),
            },
        },
    )
    try:
        engine.ask(DONOR)
        [answer] = engine.ask(TARGET)
        assert answer.figures is not None
        assert answer.figures["reused_tokens"] == 0
        assert engine.call(num_segments) == 0
        assert not list(tmp_path.rglob("*.r0of1"))
    finally:
        engine.close()


def num_segments(llm: Any) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return len(scheduler.connector._scheduler._segments)


def test_eviction_keeps_the_budget_and_answers(tiny_model: Callable[..., Path]) -> None:
    """A budget of about three images: others come and go, in every order."""
    engine = Engine(tiny_model(), {"cpu_bytes": "1MiB", "encoder_cpu_bytes": "1MiB"})
    try:
        images = [(90 + i, 224) for i in range(8)]
        reused = 0
        for round_ in range(3):
            for i, image in enumerate(images):
                [answer] = engine.ask(Ask(f"round {round_} image {i} {IMAGE} end", (image,)))
                again = Ask(f"at once again, round {round_} image {i} {IMAGE} end", (image,))
                [warm] = engine.ask(again)
                assert answer.finish_reason == warm.finish_reason == "length"
                assert warm.figures is not None
                reused += warm.figures["reused_tokens"] > 0
        assert reused == 3 * len(images)
        assert engine.call(num_segments) <= 4
    finally:
        engine.close()


def test_unsupported_options_end_the_start(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match=r"video_pruning_rate=0\.5: pruning changes positions"):
        Engine(tiny_model(), {}, video_pruning_rate=0.5)

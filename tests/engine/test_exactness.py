"""Where nothing is approximate: ratio 1.0, the donor's own context, cold and text-only requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform

from tests.helpers.engine import IMAGE, VIDEO, Answer, Ask, Engine
from vlcache_connector.storage.header import SegmentId

FULL = {"recompute_ratio": 1.0}
A, B, C = (11, 224), (12, 336, 224), (13, 224)
LARGE = (15, 560)
CLIP = (14, 112, 4)

DONORS = [
    Ask(f"first seen {IMAGE} here", (A,)),
    Ask(f"and {IMAGE} there, then {IMAGE}", (B, C)),
    Ask(f"a clip {VIDEO} with {IMAGE}", (A,), (CLIP,)),
    Ask(f"a large one {IMAGE} here", (LARGE,)),
]
TARGETS = {
    "one image": Ask(f"moved behind a longer text {IMAGE} describe it", (A,), max_tokens=32),
    "three images permuted": Ask(
        f"now {IMAGE} with {IMAGE} or {IMAGE} which one", (C, A, B), max_tokens=32
    ),
    "an image twice": Ask(f"twice {IMAGE} and again {IMAGE} same", (A, A), max_tokens=32),
    "unknown in front of known": Ask(
        f"new {IMAGE} then old {IMAGE} compare", ((99, 224), B), max_tokens=32
    ),
    "larger than a chunk": Ask(f"the large one {IMAGE} and {IMAGE}", (LARGE, A), max_tokens=32),
    "video": Ask(f"what happens in {VIDEO} now", (), (CLIP,), max_tokens=32),
    "video behind an image": Ask(
        f"see {IMAGE} and watch {VIDEO} then answer", (C,), (CLIP,), max_tokens=32
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "chunks of 256 tokens": {"max_num_batched_tokens": 256, "max_num_seqs": 8},
    "no prefix caching": {"enable_prefix_caching": False},
    "model runner V2": {"runner": "V2"},
}

QUANTISED = {"kv_cache_dtype": "fp8"}
needs_avx512 = pytest.mark.skipif(
    current_platform.is_cpu() and not torch.cpu._is_avx512_supported(),
    reason="vLLM's CPU backend quantises KV with AVX-512 only",
)


def assert_same(actual: Answer, expected: Answer, tolerance: float = 1e-4) -> None:
    assert actual.prompt == expected.prompt
    assert actual.tokens == expected.tokens
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=tolerance)


def assert_ratio_one_is_exact(plain: Engine, cached: Engine, target: Ask) -> None:
    for donor in DONORS:
        cached.ask(donor)
    [expected] = plain.ask(target)
    [actual] = cached.ask(replace(target, vlcache=FULL))
    assert actual.figures is not None
    assert actual.figures["recomputed_tokens"] > 0
    assert actual.figures["reused_tokens"] == 0
    assert actual.figures["fallback"] is None
    assert_same(actual, expected)


CASES = [pytest.param(name, "default", marks=pytest.mark.fast) for name in TARGETS] + [
    pytest.param(name, setting)
    for setting in SETTINGS
    if setting != "default"
    for name in ("three images permuted", "larger than a chunk", "video behind an image")
    # There, recomputing the large image is more than a step may compute.
    if (name, setting) != ("larger than a chunk", "chunks of 256 tokens")
]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_ratio_one_equals_plain_vllm(
    engines: Callable[..., Engine], name: str, setting: str
) -> None:
    assert_ratio_one_is_exact(engines(None), engines({}, **SETTINGS[setting]), TARGETS[name])


@needs_avx512
@pytest.mark.parametrize("name", ["three images permuted", "larger than a chunk"])
def test_ratio_one_equals_plain_vllm_with_a_quantised_kv_cache(
    engines: Callable[..., Engine], name: str
) -> None:
    plain, cached = engines(None, **QUANTISED), engines({}, **QUANTISED)
    assert_ratio_one_is_exact(plain, cached, replace(TARGETS[name], max_tokens=4))


def test_chunked_prefill_stores_and_reuses_the_same_kv(engines: Callable[..., Engine]) -> None:
    """A chunk ends inside the image in the donor's prefill, and inside one behind the claim."""
    target = Ask(f"moved, known {IMAGE} in front of {IMAGE} ok", (LARGE, (16, 560)), max_tokens=4)
    answers = []
    for setting in ("default", "chunks of 256 tokens"):
        cached = engines({}, **SETTINGS[setting])
        cached.ask(DONORS[-1])
        answers += cached.ask(target)
    whole, chunked = answers
    assert whole.figures is not None
    assert chunked.figures is not None
    assert chunked.figures["reused_tokens"] == whole.figures["reused_tokens"] == 380
    assert_same(chunked, whole)


def test_an_image_larger_than_a_chunk_is_computed_by_vllm_at_ratio_one(
    engines: Callable[..., Engine],
) -> None:
    cached = engines({}, **SETTINGS["chunks of 256 tokens"])
    cached.ask(DONORS[-1])
    [expected] = engines(None).ask(TARGETS["larger than a chunk"])
    [actual] = cached.ask(replace(TARGETS["larger than a chunk"], vlcache=FULL))
    assert actual.figures is not None
    assert actual.figures["recomputed_tokens"] == actual.figures["reused_tokens"] == 0
    assert actual.figures["fallback"] == "budget"
    assert_same(actual, expected)


def test_ratio_one_equals_plain_vllm_with_two_tensor_parallel_ranks(
    engines: Callable[..., Engine],
) -> None:
    cached = engines(
        {},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert_ratio_one_is_exact(engines(None), cached, TARGETS["three images permuted"])


def test_ratio_one_equals_plain_vllm_when_compiled(engines: Callable[..., Engine]) -> None:
    cached = engines({}, enforce_eager=False)
    assert_ratio_one_is_exact(engines(None), cached, TARGETS["three images permuted"])


def cold_then_warm(llm: Any, ask: Ask) -> tuple[list[Answer], np.ndarray, np.ndarray]:
    """Run `ask` twice; the answers, its image's KV as stored, and as written by the second run."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from tests.helpers.engine import run
    from vlcache_connector.worker import injection

    worker = get_kv_transfer_group()._worker
    known = set(worker._storage.engine._resident)
    written: dict[str, Any] = {}
    original = injection.write_kv

    def spy(layer: Any, key: Any, value: Any, slots: Any) -> None:
        written[layer.layer_name] = np.stack([key.numpy(), value.numpy()])
        original(layer, key, value, slots)

    [cold] = run(llm, [ask])
    [key] = [key for key, kind in set(worker._storage.engine._resident) - known if kind == "kv"]
    injection.write_kv = spy
    try:
        [warm] = run(llm, [ask])
    finally:
        injection.write_kv = original
    with worker._storage.get(SegmentId(key, "kv")) as segment:
        stored = [np.stack([part.numpy() for part in segment.layer(i)]) for i in range(4)]
        return [cold, warm], np.stack(stored), np.stack(list(written.values()))


@pytest.mark.parametrize("cache", [{}, pytest.param(QUANTISED, marks=needs_avx512)])
def test_donors_own_context_is_bit_equal(
    engines: Callable[..., Engine], cache: dict[str, Any]
) -> None:
    engine = engines({}, **SETTINGS["no prefix caching"], **cache)
    ask = Ask(f"the very same {IMAGE} prompt", ((19, 224),), vlcache={"recompute_ratio": 0.0})
    [cold, warm], stored, written = engine.call(cold_then_warm, ask)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(written, stored)
    assert warm.figures is not None
    assert warm.figures["reused_tokens"] == 64
    assert_same(warm, cold)


@pytest.mark.fast
@pytest.mark.parametrize(
    "ask",
    [
        Ask("no image at all, only text", max_tokens=16),
        Ask("text " * 150 + "end", max_tokens=8),
        Ask(f"a cold {IMAGE} and {IMAGE}", ((31, 224), (32, 336, 224)), max_tokens=8),
        Ask(f"a cold clip {VIDEO}", (), ((33, 112, 4),), max_tokens=8),
    ],
    ids=["text", "long text", "cold images", "cold video"],
)
def test_text_only_and_cold_requests_are_bit_equal(
    engines: Callable[..., Engine], ask: Ask
) -> None:
    plain, cached = engines(None), engines({})
    [expected], [actual] = plain.ask(ask), cached.ask(ask)
    assert actual.tokens == expected.tokens
    np.testing.assert_array_equal(actual.logprobs, expected.logprobs)


def test_disabled_requests_are_bit_equal(engines: Callable[..., Engine]) -> None:
    plain, cached = engines(None), engines({})
    target = Ask(f"switched off for {IMAGE} here", (A,), max_tokens=4)
    for donor in DONORS:
        cached.ask(donor)
    [expected] = plain.ask(target)
    [actual] = cached.ask(replace(target, vlcache={"enabled": False}))
    assert actual.figures is not None
    assert actual.figures["computed_tokens"] == 0
    np.testing.assert_array_equal(actual.logprobs, expected.logprobs)

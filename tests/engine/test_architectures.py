"""Exactness, parity, encoder runs and chunked prefill of an architecture, on one engine each.

`test_exactness.py` and `test_reference_parity.py` go deeper with those that they name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_architectures import ARCHITECTURES

from tests.helpers.encoder import count_encoder_runs, forget_vllms_encoder_cache
from tests.helpers.engine import Ask, Engine
from tests.helpers.quick_start import KV_BLOCKS
from tests.helpers.reference import KV, Prompt, Reference
from vlcache_connector.support import SUPPORTED_ARCHITECTURES

STEP_TOKENS = {
    "qwen3_vl_moe": 512,
    "llava": 512,
    "llava_next": 2048,
    "internvl": 512,
    "mistral3": 512,
    "glm4v": 512,
    "glm4v_moe": 512,
    "glm_ocr": 512,
}
"""What a step may compute, by architecture: all three images at once, as ratio 1.0 takes."""

RATIOS = (0.0, 0.02, 0.1, 0.5)
TOLERANCE = 1e-4
A, B, C = (51, 224), (52, 336, 224), (53, 280)


def selected(num_tokens: int, ratio: float) -> list[int]:
    """The documented rule of `first_k` without a minimum."""
    return list(range(math.ceil(round(ratio * num_tokens, 6))))


@dataclass(frozen=True)
class Served:
    """An engine that knows three images from two requests.

    Attributes:
        step_tokens: what a step computes at most.
        image: prompt text that stands for one image.
        donors: what the reference says to the two requests, by image: KV, prompt, item.
    """

    engine: Engine
    step_tokens: int
    reference: Reference
    image: str
    donors: dict[tuple[int, ...], tuple[KV, Prompt, int]]

    def prompt(self, token_ids: list[int], ask: Ask) -> Prompt:
        """The reference's view of a prompt that vLLM has processed."""
        return self.reference.prompt_from_ids(token_ids, pictures(*ask.images))

    def target(self, text: str, vlcache: dict[str, Any]) -> Ask:
        """All three images in another order and at other places, behind a text of its own."""
        one = self.image
        return Ask(f"{text}: {one} and {one} and {one} now", (C, A, B), vlcache=vlcache)

    def assert_equals_the_reference(
        self, ask: Ask, selected: Callable[[int], list[Any]], differs_from_full: bool
    ) -> None:
        """Ask for what `selected` chooses of an image with so many tokens to be recomputed."""
        [actual] = self.engine.ask(ask)
        target = self.prompt(actual.prompt, ask)
        recompute = {i: selected(end - start) for i, (start, end) in enumerate(target.spans)}
        reused = {item: self.donors[spec] for item, spec in enumerate(ask.images)}
        expected = self.reference.reuse(target, reused, recompute).logprobs[0]
        np.testing.assert_allclose(actual.logprobs[0], expected.numpy(), rtol=0, atol=TOLERANCE)
        assert actual.figures is not None
        assert actual.figures["reused_tokens"] > 0
        assert actual.figures["fallback"] is None
        if differs_from_full:
            full = self.reference.full(target).logprobs[0]
            assert np.abs(full.numpy() - actual.logprobs[0]).max() > 1e-3, "nothing to compare"


def pictures(*specs: tuple[int, ...]) -> list[Image.Image]:
    return [Image.fromarray(array) for array in Ask("", specs).image_arrays()]


@pytest.fixture(scope="module", params=STEP_TOKENS)
def served(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Served]:
    arch, step_tokens = request.param, STEP_TOKENS[request.param]
    model, image = tiny_model(arch), ARCHITECTURES[arch].image
    reference, both = Reference(model), f" {image} then {image} both"
    start, end = reference.prompt(both, pictures(B, C)).spans[1]
    words = step_tokens - (start + end) // 2
    asks = [Ask(f"first {image} seen", (A,)), Ask(" the" * words + both, (B, C))]
    engine = Engine(
        model, {}, max_num_batched_tokens=step_tokens, num_gpu_blocks_override=KV_BLOCKS
    )
    try:
        served = Served(engine, step_tokens, reference, image, {})
        for ask in asks:
            [answer] = engine.ask(ask)
            prompt = served.prompt(answer.prompt, ask)
            kv = served.reference.full(prompt).kv
            served.donors.update({spec: (kv, prompt, i) for i, spec in enumerate(ask.images)})
        yield served
    finally:
        engine.close()


def test_its_class_is_supported(served: Served) -> None:
    assert set(served.reference.model.config.architectures) <= SUPPORTED_ARCHITECTURES


def test_a_prefill_that_stores_an_image_ends_a_step_inside_it(served: Served) -> None:
    _, prompt, item = served.donors[C]
    start, end = prompt.spans[item]
    assert start < served.step_tokens < end


@pytest.mark.parametrize("ratio", RATIOS)
def test_first_k_equals_the_reference(served: Served, ratio: float) -> None:
    ask = served.target(f"recomputing {ratio}", {"recompute_ratio": ratio})
    served.assert_equals_the_reference(ask, lambda n: selected(n, ratio), ratio < 0.5)


def test_a_layer_aware_schedule_equals_the_reference(served: Served) -> None:
    last = len(served.reference.layers) - 1
    shares = [0.4 * (last - layer) / last for layer in range(last + 1)]
    ask = served.target("layer by layer", {"layer_ratios": shares})
    served.assert_equals_the_reference(ask, lambda n: [selected(n, s) for s in shares], True)


def test_ratio_one_equals_plain_vllm(served: Served) -> None:
    """Requests that have VLCache switched off are bit-equal to plain vLLM's."""
    ask = replace(served.target("all of it", {"recompute_ratio": 1.0}), max_tokens=4)
    [actual] = served.engine.ask(ask)
    assert actual.figures is not None
    assert actual.figures["recomputed_tokens"] > 0
    assert actual.figures["reused_tokens"] == 0
    assert actual.figures["fallback"] is None
    [plain] = served.engine.ask(replace(ask, vlcache={"enabled": False}, cache_salt="plain"))
    assert plain.figures is not None
    assert plain.figures["computed_tokens"] == 0
    assert actual.tokens == plain.tokens
    np.testing.assert_allclose(actual.logprobs, plain.logprobs, rtol=0, atol=TOLERANCE)


def test_a_warm_request_runs_no_encoder(served: Served) -> None:
    served.engine.call(forget_vllms_encoder_cache)
    warm = served.target("without the encoder", {"recompute_ratio": 0.2})
    assert served.engine.call(count_encoder_runs, warm) == 0
    cold = Ask(f"never seen {served.image}", ((59, 224),))
    assert served.engine.call(count_encoder_runs, cold) == 1

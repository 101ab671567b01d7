"""Every architecture, on one engine each: exactness, parity with the independent reference, encoder
runs and chunked prefill.

`test_exactness.py` goes deeper, with one architecture.
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

LARGE_IMAGES = ("llava_next", "llava_onevision")
"""Architectures with some 500 tokens for an image; the others have up to 162."""

RATIOS = (0.0, 0.02, 0.1, 0.5)
TOLERANCE = 1e-4
A, B, C = (51, 224), (52, 336, 224), (53, 280)
CLIP = (54, 112, 4)


def selected(num_tokens: int, ratio: float) -> list[int]:
    """The documented rule of `first_k` without a minimum."""
    return list(range(math.ceil(round(ratio * num_tokens, 6))))


@dataclass(frozen=True)
class Served:
    """An engine that knows three images from two requests.

    Attributes:
        step_tokens: what a step computes at most.
        image: prompt text that stands for one image.
        video: prompt text that stands for one video, empty where the model takes none.
        donors: what the reference says to the two requests, by image: KV, prompt, item.
    """

    engine: Engine
    step_tokens: int
    reference: Reference
    image: str
    video: str
    donors: dict[tuple[int, ...], tuple[KV, Prompt, int]]

    def prompt(self, token_ids: list[int], ask: Ask) -> Prompt:
        """The reference's view of a prompt that vLLM has processed."""
        return self.reference.prompt_from_ids(token_ids, pictures(*ask.images))

    def target(self, text: str, vlcache: dict[str, Any]) -> Ask:
        """All three images in another order and at other places, behind a text of its own."""
        one = self.image
        return Ask(f"{text}: {one} and {one} and {one} now", (C, A, B), vlcache=vlcache)

    def assert_equals_the_reference(
        self, ask: Ask, recompute: Callable[[Prompt], dict[int, list[Any]]], differs: bool = True
    ) -> None:
        """Ask for it, with what `recompute` says for its prompt, in the words of the reference.

        Args:
            differs: whether a full prefill's log-probs have to be others.
        """
        [actual] = self.engine.ask(ask)
        target = self.prompt(actual.prompt, ask)
        chosen = recompute(target)
        expected = self.reference.reuse(target, self.reused(ask), chosen).logprobs[0]
        np.testing.assert_allclose(actual.logprobs[0], expected.numpy(), rtol=0, atol=TOLERANCE)
        assert actual.figures is not None
        assert actual.figures["fallback"] is None
        layers = len(self.reference.layers)
        text = target.spans[-1][1] - sum(lengths(target))
        again = sum(
            sum(map(len, each)) if each and isinstance(each[0], list) else layers * len(each)
            for each in chosen.values()
        )
        assert actual.figures["computed_token_layers"] == layers * text + again
        if differs:
            full = self.reference.full(target).logprobs[0]
            assert np.abs(full.numpy() - actual.logprobs[0]).max() > 1e-3, "nothing to compare"

    def reused(self, ask: Ask) -> dict[int, tuple[KV, Prompt, int]]:
        """Where the images of `ask` come from, for `Reference.reuse`."""
        return {item: self.donors[spec] for item, spec in enumerate(ask.images)}


def lengths(prompt: Prompt) -> list[int]:
    return [end - start for start, end in prompt.spans]


def pictures(*specs: tuple[int, ...]) -> list[Image.Image]:
    return [Image.fromarray(array) for array in Ask("", specs).image_arrays()]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Served]:
    arch = request.param
    step_tokens = 2048 if arch in LARGE_IMAGES else 512  # all three images, as ratio 1.0 takes
    model, image = tiny_model(arch), ARCHITECTURES[arch].image
    reference, both = Reference(model), f" {image} then {image} both"
    start, end = reference.prompt(both, pictures(B, C)).spans[1]
    words = step_tokens - (start + end) // 2
    asks = [Ask(f"first {image} seen", (A,)), Ask(" the" * words + both, (B, C))]
    engine = Engine(
        model, {}, max_num_batched_tokens=step_tokens, num_gpu_blocks_override=KV_BLOCKS
    )
    try:
        served = Served(engine, step_tokens, reference, image, ARCHITECTURES[arch].video, {})
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
    served.assert_equals_the_reference(
        served.target(f"recomputing {ratio}", {"recompute_ratio": ratio}),
        lambda target: {i: selected(n, ratio) for i, n in enumerate(lengths(target))},
        differs=ratio < 0.5,
    )


def test_a_layer_aware_schedule_equals_the_reference(served: Served) -> None:
    """Shares that fall from layer to layer to nothing."""
    last = len(served.reference.layers) - 1
    shares = [0.4 * (last - layer) / last for layer in range(last + 1)]
    served.assert_equals_the_reference(
        served.target("layer by layer", {"layer_ratios": shares}),
        lambda target: {
            i: [selected(n, share) for share in shares] for i, n in enumerate(lengths(target))
        },
    )


def test_cacheblend_equals_the_reference(served: Served) -> None:
    ratio, check_layer = 0.15, 1
    reference, num_layers = served.reference, len(served.reference.layers)
    ask = served.target("by distance", {"selector": "cacheblend", "recompute_ratio": ratio})

    def recompute(target: Prompt) -> dict[int, list[Any]]:
        everything = {
            i: [list(range(n)) if layer <= check_layer else [] for layer in range(num_layers)]
            for i, n in enumerate(lengths(target))
        }
        # Everything is fresh up to the check layer; behind it nothing matters for the choice.
        fresh = reference.reuse(target, served.reused(ask), everything).kv.k[check_layer]
        for i, (kv, prompt, item) in served.reused(ask).items():
            here, there = slice(*target.spans[i]), slice(*prompt.spans[item])
            difference = target.positions[:, here] - prompt.positions[:, there]
            donor = reference.move_keys(kv.k[check_layer : check_layer + 1, there], difference)[0]
            distance = (fresh[here] - donor).square().sum(dim=(1, 2))
            chosen = distance.topk(len(selected(lengths(target)[i], ratio))).indices.tolist()
            everything[i][check_layer + 1 :] = [sorted(chosen)] * (num_layers - check_layer - 1)
        return everything

    served.assert_equals_the_reference(ask, recompute)


def assert_ratio_one_is_exact(engine: Engine, ask: Ask) -> None:
    """Requests that have VLCache switched off are bit-equal to plain vLLM's."""
    ask = replace(ask, max_tokens=4)
    [actual] = engine.ask(replace(ask, vlcache={"recompute_ratio": 1.0}))
    assert actual.figures is not None
    assert actual.figures["recomputed_tokens"] > 0
    assert actual.figures["reused_tokens"] == 0
    assert actual.figures["fallback"] is None
    [plain] = engine.ask(replace(ask, vlcache={"enabled": False}, cache_salt="plain"))
    assert plain.figures is not None
    assert plain.figures["computed_tokens"] == 0
    assert actual.tokens == plain.tokens
    np.testing.assert_allclose(actual.logprobs, plain.logprobs, rtol=0, atol=TOLERANCE)


def test_ratio_one_equals_plain_vllm(served: Served) -> None:
    assert_ratio_one_is_exact(served.engine, served.target("all of it", {}))


def test_ratio_one_equals_plain_vllm_with_a_video(served: Served) -> None:
    if not served.video:
        pytest.skip("takes no videos")
    served.engine.ask(Ask(f"a clip {served.video} first", (), (CLIP,)))
    again = Ask(f"what happens behind {served.image} in {served.video} then", (A,), (CLIP,))
    assert_ratio_one_is_exact(served.engine, again)


def test_a_warm_request_runs_no_encoder(served: Served) -> None:
    served.engine.call(forget_vllms_encoder_cache)
    warm = served.target("without the encoder", {"recompute_ratio": 0.2})
    assert served.engine.call(count_encoder_runs, warm) == 0
    cold = Ask(f"never seen {served.image}", ((59, 224),))
    assert served.engine.call(count_encoder_runs, cold) == 1

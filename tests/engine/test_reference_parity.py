"""At any ratio, logprobs equal those of the independent reference (`tests/reference.py`)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.engine import Answer, Ask, Engine
from tests.helpers.reference import KV, Prompt, Reference

RATIOS = (0.0, 0.02, 0.1, 0.5)
ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_onevision")
A, B, C = (21, 224), (22, 336, 224), (23, 280)


def selected(num_tokens: int, ratio: float) -> range:
    """The documented rule of `first_k` without a minimum."""
    return range(math.ceil(round(ratio * num_tokens, 6)))


@pytest.fixture(scope="module")
def references(tiny_model: Callable[..., Path]) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def get(arch: str) -> Reference:
        if arch not in made:
            made[arch] = Reference(tiny_model(arch))
        return made[arch]

    return get


def pictures(ask: Ask) -> list[Image.Image]:
    return [Image.fromarray(array) for array in ask.image_arrays()]


@dataclass(frozen=True)
class Case:
    """A target whose three images were computed by two donor requests, at other places.

    Attributes:
        reused: what `Reference.reuse` takes.
    """

    reference: Reference
    actual: Answer
    target: Prompt
    reused: dict[int, tuple[KV, Prompt, int]]

    def lengths(self) -> list[int]:
        return [end - start for start, end in self.target.spans]

    def assert_equals_the_reference(self, recompute: dict[int, Any]) -> None:
        expected = self.reference.reuse(self.target, self.reused, recompute)
        np.testing.assert_allclose(
            self.actual.logprobs[0], np.asarray(expected.logprobs[0]), rtol=0, atol=1e-4
        )

    def assert_differs_from_a_full_prefill(self) -> None:
        full = np.asarray(self.reference.full(self.target).logprobs[0])
        assert np.abs(full - self.actual.logprobs[0]).max() > 1e-3, "nothing to compare"


@pytest.fixture
def make_case(
    engines: Callable[..., Engine],
    references: Callable[[str], Reference],
    image_placeholder: Callable[[str], str],
) -> Callable[[str, dict[str, Any]], Case]:
    def make(arch: str, vlcache: dict[str, Any], **arguments: Any) -> Case:
        engine, reference = engines({}, arch, **arguments), references(arch)
        image = image_placeholder(arch)
        # Salts make donors of one case invisible to the others.
        salt = f"{arch}-{vlcache}"
        donor_asks = [
            Ask(f"first {image} seen", (A,), cache_salt=salt),
            Ask(f"another {image} then {image} both", (B, C), cache_salt=salt),
        ]
        donors = [engine.ask(ask)[0] for ask in donor_asks]
        target_ask = Ask(
            f"a new question about {image} and {image} and {image} now",
            (C, A, B),
            vlcache=vlcache,
            cache_salt=salt,
        )
        [actual] = engine.ask(target_ask)
        prompts = [
            reference.prompt_from_ids(answer.prompt, pictures(ask))
            for answer, ask in zip(donors, donor_asks, strict=True)
        ]
        alone, both = (reference.full(prompt).kv for prompt in prompts)
        target = reference.prompt_from_ids(actual.prompt, pictures(target_ask))
        reused = {
            0: (both, prompts[1], 1),
            1: (alone, prompts[0], 0),
            2: (both, prompts[1], 0),
        }
        return Case(reference, actual, target, reused)

    return make


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_first_k_equals_the_reference(
    make_case: Callable[..., Case], arch: str, ratio: float
) -> None:
    case = make_case(arch, {"recompute_ratio": ratio})
    recompute = {index: list(selected(n, ratio)) for index, n in enumerate(case.lengths())}
    case.assert_equals_the_reference(recompute)
    assert case.actual.figures is not None
    assert case.actual.figures["recomputed_tokens"] == sum(map(len, recompute.values()))
    if ratio < 0.5:
        case.assert_differs_from_a_full_prefill()


def test_model_runner_v2_equals_the_reference_with_deepstack(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("qwen3_vl", {"recompute_ratio": 0.1}, runner="V2")
    case.assert_equals_the_reference(
        {index: list(selected(n, 0.1)) for index, n in enumerate(case.lengths())}
    )
    case.assert_differs_from_a_full_prefill()


def tapered(num_layers: int) -> list[float]:
    """Shares that fall from layer to layer to nothing."""
    return [0.4 * (num_layers - 1 - layer) / (num_layers - 1) for layer in range(num_layers)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_layer_aware_schedule_equals_the_reference(
    make_case: Callable[..., Case], references: Callable[[str], Reference], arch: str
) -> None:
    num_layers = len(references(arch).layers)
    shares = tapered(num_layers)
    case = make_case(arch, {"layer_ratios": shares})
    recompute = {
        index: [list(selected(n, share)) for share in shares]
        for index, n in enumerate(case.lengths())
    }
    case.assert_equals_the_reference(recompute)
    case.assert_differs_from_a_full_prefill()
    assert case.actual.figures is not None
    text = case.target.spans[-1][1] - sum(case.lengths())
    again = sum(len(chosen) for layers in recompute.values() for chosen in layers)
    assert case.actual.figures["computed_token_layers"] == num_layers * text + again


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cacheblend_equals_the_reference(make_case: Callable[..., Case], arch: str) -> None:
    ratio, check_layer = 0.15, 1
    case = make_case(arch, {"selector": "cacheblend", "recompute_ratio": ratio})
    reference, num_layers = case.reference, len(case.reference.layers)
    lengths = case.lengths()
    # Everything is fresh up to the check layer; behind it nothing matters for the choice.
    fresh = reference.reuse(
        case.target,
        case.reused,
        {
            index: [list(range(n)) if layer <= check_layer else [] for layer in range(num_layers)]
            for index, n in enumerate(lengths)
        },
    ).kv.k[check_layer]
    recompute = {}
    for index, (kv, prompt, item) in case.reused.items():
        here, there = slice(*case.target.spans[index]), slice(*prompt.spans[item])
        difference = case.target.positions[:, here] - prompt.positions[:, there]
        donor = reference.move_keys(kv.k[check_layer : check_layer + 1, there], difference)[0]
        distance = (fresh[here] - donor).square().sum(dim=(1, 2))
        n = lengths[index]
        chosen = sorted(distance.topk(len(selected(n, ratio))).indices.tolist())
        recompute[index] = [
            list(range(n)) if layer <= check_layer else chosen for layer in range(num_layers)
        ]
    case.assert_equals_the_reference(recompute)
    case.assert_differs_from_a_full_prefill()


def test_random_tokens_equal_the_reference(make_case: Callable[..., Case]) -> None:
    case = make_case("qwen2_5_vl", {"selector": "random_k", "recompute_ratio": 0.1})
    recompute = {
        index: sorted(random.Random(n).sample(range(n), len(selected(n, 0.1))))
        for index, n in enumerate(case.lengths())
    }
    case.assert_equals_the_reference(recompute)
    case.assert_differs_from_a_full_prefill()

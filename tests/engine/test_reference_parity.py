"""Parity with the independent reference beyond `test_architectures.py`: other settings."""

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


def test_model_runner_v2_equals_the_reference_with_deepstack(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("qwen3_vl", {"recompute_ratio": 0.1}, runner="V2")
    case.assert_equals_the_reference(
        {index: list(selected(n, 0.1)) for index, n in enumerate(case.lengths())}
    )
    case.assert_differs_from_a_full_prefill()


def test_random_tokens_equal_the_reference(make_case: Callable[..., Case]) -> None:
    case = make_case("qwen2_5_vl", {"selector": "random_k", "recompute_ratio": 0.1})
    recompute = {
        index: sorted(random.Random(n).sample(range(n), len(selected(n, 0.1))))
        for index, n in enumerate(case.lengths())
    }
    case.assert_equals_the_reference(recompute)
    case.assert_differs_from_a_full_prefill()

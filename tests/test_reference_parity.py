"""At any ratio, logprobs equal those of the independent reference (`tests/reference.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine import Ask, Engine
from PIL import Image
from reference import Reference

RATIOS = (0.0, 0.02, 0.1, 0.5)
ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_onevision")
A, B, C = (21, 224), (22, 336, 224), (23, 280)


def selected(num_tokens: int, ratio: float) -> range:
    """The documented rule of `first_k` without a minimum."""
    return range(math.ceil(ratio * num_tokens))


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


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_first_token_equals_the_reference(
    engines: Callable[..., Engine],
    references: Callable[[str], Reference],
    image_placeholder: Callable[[str], str],
    arch: str,
    ratio: float,
) -> None:
    engine = engines({}, arch)
    reference = references(arch)
    image = image_placeholder(arch)
    # Salts make donors of one ratio invisible to the others.
    salt = f"{arch}-{ratio}"
    donor_asks = [
        Ask(f"first {image} seen", (A,), cache_salt=salt),
        Ask(f"another {image} then {image} both", (B, C), cache_salt=salt),
    ]
    donors = [engine.ask(ask)[0] for ask in donor_asks]
    target_ask = Ask(
        f"a new question about {image} and {image} and {image} now",
        (C, A, B),
        vlcache={"recompute_ratio": ratio},
        cache_salt=salt,
    )
    [actual] = engine.ask(target_ask)

    donor_prompts = [
        reference.prompt_from_ids(answer.prompt, pictures(ask))
        for answer, ask in zip(donors, donor_asks, strict=True)
    ]
    results = [reference.full(prompt) for prompt in donor_prompts]
    target = reference.prompt_from_ids(actual.prompt, pictures(target_ask))
    reused = {
        0: (results[1], donor_prompts[1], 1),
        1: (results[0], donor_prompts[0], 0),
        2: (results[1], donor_prompts[1], 0),
    }
    recompute = {
        index: list(selected(end - start, ratio)) for index, (start, end) in enumerate(target.spans)
    }
    expected = reference.reuse(target, reused, recompute)
    assert actual.figures is not None
    assert actual.figures["recomputed_tokens"] == sum(map(len, recompute.values()))
    np.testing.assert_allclose(
        actual.logprobs[0], np.asarray(expected.logprobs[0]), rtol=0, atol=1e-4
    )
    if ratio < 0.5:
        full = np.asarray(reference.full(target).logprobs[0])
        assert np.abs(full - actual.logprobs[0]).max() > 1e-3, "reuse changed nothing to compare"

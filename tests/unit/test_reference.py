"""The reference against transformers' own forward passes, before anything is measured by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_architectures import ARCHITECTURES
from torch import Tensor
from transformers import DynamicCache

from tests.helpers.reference import KV, Prompt, Reference, Result

VIDEO_ARCHS = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision")
MROPE_ARCHS = (*VIDEO_ARCHS[:4], "glm4v", "glm4v_moe", "glm_ocr")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Work in one thread: on models this small, several mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


WIDE, TALL = picture(1, 168, 84), picture(2, 84, 140)


@dataclass(frozen=True)
class Case:
    """The same two images in another order behind other text, and what both prompts give."""

    ref: Reference
    donor: Prompt
    target: Prompt
    donor_result: Result
    full: Result  # of the target, 3 tokens

    def reused(self, *items: int) -> dict[int, tuple[Result, Prompt, int]]:
        return {item: (self.donor_result, self.donor, 1 - item) for item in items}


def make_case(arch: str, ref: Reference) -> Case:
    one = ARCHITECTURES[arch].image
    donor = ref.prompt(f"What is the colour of {one} and {one}? Say", [WIDE, TALL])
    target = ref.prompt(
        f"Here are two pictures, look at them: {one} is one, {one} the other. And", [TALL, WIDE]
    )
    return Case(ref, donor, target, ref.full(donor), ref.full(target, n_tokens=3))


@pytest.fixture(scope="module")
def cases(tiny_model: Callable[[str], Path]) -> Callable[[str], Case]:
    return cache(lambda arch: make_case(arch, Reference(tiny_model(arch))))


@pytest.fixture(params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture(params=MROPE_ARCHS)
def mrope_case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def length(prompt: Prompt, item: int) -> int:
    start, end = prompt.spans[item]
    return end - start


def error(a: Result, b: Result) -> float:
    return float((a.logprobs - b.logprobs).abs().max())


def transformers_logprobs(ref: Reference, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """Log-probs at the last prompt token and at all but the last of `tokens`, in one HF pass."""
    ids = torch.cat((prompt.input_ids, torch.tensor(tokens[:-1], dtype=torch.int64)))
    inputs = {
        key: value
        for key, value in prompt.inputs.items()
        if isinstance(value, Tensor) and key not in ("attention_mask", "second_per_grid_ts")
    }
    inputs["input_ids"] = ids[None]
    if "mm_token_type_ids" in inputs:
        padding = len(ids) - len(prompt.input_ids)
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(
            inputs["mm_token_type_ids"], (0, padding)
        )
    if "video_grid_thw" in inputs:
        extra = torch.arange(len(tokens) - 1) + prompt.positions.max() + 1
        positions = torch.cat((prompt.positions, extra.expand(ref.axes, -1)), dim=1)
        inputs["position_ids"] = positions[:, None]
    ref.model.model.rope_deltas = None
    with torch.no_grad():
        logits = ref.model(**inputs).logits[0, -len(tokens) :]
    return logits.log_softmax(-1)


def transformers_mixed(
    ref: Reference, target: Prompt, reused_kv: dict[int, KV], computed: Tensor
) -> Tensor:
    """Log-probs of the last prompt token by transformers' own layers and cache.

    The prompt is gone through from left to right: runs of computed tokens through the text model
    with a `DynamicCache`, reused stretches by appending to that cache.
    """
    n, kv_cache = len(target.input_ids), DynamicCache(config=ref.model.config.text_config)
    source = torch.full((n,), -1)
    for item in reused_kv:
        start, end = target.spans[item]
        source[start:end] = item
    visual = target.input_ids == ref.processor.image_token_id
    hidden = torch.empty(0)
    for _, group in groupby(range(n), key=lambda i: -1 if computed[i] else int(source[i])):
        run = torch.tensor(list(group))
        if computed[run[0]]:
            positions = target.positions[:, None, run]
            kwargs: dict[str, Any] = {}
            if len(target.deepstack):
                mask = visual[run]
                kwargs["visual_pos_masks"] = mask[None]
                kwargs["deepstack_visual_embeds"] = [x[run][mask] for x in target.deepstack]
            out = ref.text_model(
                inputs_embeds=target.embeds[run][None],
                position_ids=positions if ref.axes == 3 else positions[0],
                past_key_values=kv_cache,
                use_cache=True,
                **kwargs,
            )
            hidden = out.last_hidden_state[0, -1]
            continue
        item = int(source[run[0]])
        kv, offsets = reused_kv[item], run - target.spans[item][0]
        for number in range(len(ref.layers)):
            kv_cache.update(
                kv.k[number, offsets].transpose(0, 1)[None],
                kv.v[number, offsets].transpose(0, 1)[None],
                number,
            )
    return ref.model.lm_head(hidden).log_softmax(-1)


def test_full_equals_transformers(case: Case) -> None:
    theirs = transformers_logprobs(case.ref, case.target, case.full.tokens)
    torch.testing.assert_close(case.full.logprobs, theirs, atol=TOLERANCE, rtol=0)
    assert case.full.tokens == theirs.argmax(-1).tolist()


def test_forced_continuation(case: Case) -> None:
    forced = [3, 5, 8]
    result = case.ref.full(case.target, n_tokens=3, forced=forced)
    theirs = transformers_logprobs(case.ref, case.target, forced)
    assert result.tokens == forced
    torch.testing.assert_close(result.logprobs, theirs, atol=TOLERANCE, rtol=0)


def test_positions_equal_transformers(mrope_case: Case) -> None:
    target = mrope_case.target
    theirs, _ = mrope_case.ref.model.model.get_rope_index(
        target.input_ids[None],
        mm_token_type_ids=target.inputs["mm_token_type_ids"],
        image_grid_thw=target.inputs["image_grid_thw"],
    )
    assert torch.equal(target.positions, theirs[:, 0])


def test_prompt_from_ids_is_the_same_prompt(case: Case) -> None:
    target = case.target
    again = case.ref.prompt_from_ids(target.input_ids.tolist(), [TALL, WIDE])
    assert again.spans == target.spans
    for name in ("input_ids", "positions", "embeds", "deepstack"):
        assert torch.equal(getattr(again, name), getattr(target, name)), name


def test_recomputing_all_tokens_equals_full(case: Case) -> None:
    everything = {item: range(length(case.target, item)) for item in (0, 1)}
    result = case.ref.reuse(case.target, case.reused(0, 1), everything, n_tokens=3)
    assert error(result, case.full) < TOLERANCE


def test_own_kv_equals_full(case: Case) -> None:
    target, full = case.target, case.full
    own = {item: (full, target, item) for item in (0, 1)}
    result = case.ref.reuse(target, own, {}, n_tokens=3)
    assert error(result, full) < TOLERANCE
    for start, end in target.spans:
        assert torch.equal(result.kv.k[:, start:end], full.kv.k[:, start:end])
        assert torch.equal(result.kv.v[:, start:end], full.kv.v[:, start:end])


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_mixed_kv_equals_transformers_cache(case: Case, share: float) -> None:
    """Foreign KV, part of it recomputed, against transformers' layers over a spliced cache."""
    ref, donor, target = case.ref, case.donor, case.target
    recompute = {item: range(round(share * length(target, item))) for item in (0, 1)}
    result = ref.reuse(target, case.reused(0, 1), recompute)
    computed = torch.ones(len(target.input_ids), dtype=torch.bool)
    moved: dict[int, KV] = {}
    for item, (donor_result, _, donor_item) in case.reused(0, 1).items():
        (start, end), (at, to) = target.spans[item], donor.spans[donor_item]
        computed[start + len(recompute[item]) : end] = False
        difference = target.positions[:, start:end] - donor.positions[:, at:to]
        kv = donor_result.kv
        moved[item] = KV(ref.move_keys(kv.k[:, at:to], difference), kv.v[:, at:to])
    with torch.no_grad():
        theirs = transformers_mixed(ref, target, moved, computed)
    torch.testing.assert_close(result.logprobs[0], theirs, atol=TOLERANCE, rtol=0)
    # Were foreign KV as good as one's own, these tests would show little.
    assert (result.logprobs[0] - case.full.logprobs[0]).abs().max() > 100 * TOLERANCE


def test_an_item_not_reused_is_computed(case: Case) -> None:
    some = case.ref.reuse(case.target, case.reused(1), {})
    recompute = {0: range(length(case.target, 0))}
    both = case.ref.reuse(case.target, case.reused(0, 1), recompute)
    assert error(some, both) < TOLERANCE


def test_position_shift_per_axis_is_undone(mrope_case: Case) -> None:
    """Attention sees relative positions only, so shifting each axis by a constant changes
    no hidden state: a donor that is the target, shifted, must give the full result back."""
    ref, target = mrope_case.ref, mrope_case.target
    shift = torch.tensor([[7], [23], [58]])
    donor = replace(target, positions=target.positions + shift)
    shifted, full = ref.full(donor), ref.full(target)
    assert error(shifted, full) < TOLERANCE
    reused = {item: (shifted, donor, item) for item in (0, 1)}
    assert error(ref.reuse(target, reused, {}), full) < TOLERANCE
    # The test has teeth: with the axes mixed up, or no rotation, it fails.
    for wrong in (shift[[0, 2, 1]], shift[[1, 2, 0]], shift[[0, 0, 0]], 0 * shift):
        mistaken = replace(donor, positions=target.positions + wrong)
        reused = {item: (shifted, mistaken, item) for item in (0, 1)}
        assert error(ref.reuse(target, reused, {}), full) > 100 * TOLERANCE


def test_random_positions_per_token_and_axis(mrope_case: Case) -> None:
    """Layer 0 keys depend on nothing but a token and its positions, whatever these are."""
    ref, target = mrope_case.ref, mrope_case.target
    random = torch.randint(0, 300, target.positions.shape, generator=torch.manual_seed(3))
    donor_keys = ref.full(replace(target, positions=random)).kv.k[:1]
    target_keys = ref.full(target).kv.k[:1]
    difference = target.positions - random
    moved = ref.move_keys(donor_keys, difference)
    torch.testing.assert_close(moved, target_keys, atol=TOLERANCE, rtol=0)
    wrong = ref.move_keys(donor_keys, difference[[0, 2, 1]])
    assert (wrong - target_keys).abs().max() > 0.1


def test_offsets_per_layer(case: Case) -> None:
    ref, target, reused = case.ref, case.target, case.reused(1)
    deeper = len(ref.layers) - 1
    flat = ref.reuse(target, reused, {1: [0, 1, 5]})
    same = ref.reuse(target, reused, {1: [[0, 1, 5]] * (deeper + 1)})
    assert error(flat, same) == 0
    narrowing = ref.reuse(target, reused, {1: [[0, 1, 5], *[[0]] * deeper]})
    none = ref.reuse(target, reused, {})
    start = target.spans[1][0]
    item = slice(start, start + 6)
    assert torch.equal(narrowing.kv.k[0, item], flat.kv.k[0, item])
    from_donor = (narrowing.kv.k == none.kv.k).flatten(2).all(-1)[:, item]
    assert from_donor[1:].tolist() == [[False, True, True, True, True, True]] * deeper
    with pytest.raises(ValueError, match="after it was not"):
        ref.reuse(target, reused, {1: [[0], *[[0, 1]] * deeper]})


def test_refuses_what_makes_no_sense(case: Case) -> None:
    ref, target = case.ref, case.target
    with pytest.raises(ValueError, match="differs from the donor"):
        ref.reuse(target, {0: (case.donor_result, case.donor, 0)}, {})
    with pytest.raises(ValueError, match="not reused"):
        ref.reuse(target, {}, {0: [0]})
    with pytest.raises(IndexError):
        ref.reuse(target, case.reused(0), {0: [length(target, 0)]})
    with pytest.raises(ValueError, match="0 image tokens"):
        ref.prompt_from_ids([1, 2, 3], [WIDE])
    up_to_item = target.input_ids[: target.spans[1][1]].tolist()
    cut = ref.prompt_from_ids(up_to_item, [TALL, WIDE])
    with pytest.raises(ValueError, match="last prompt token"):
        ref.reuse(cut, case.reused(1), {})


@pytest.mark.parametrize("arch", VIDEO_ARCHS)
def test_video(cases: Callable[[str], Case], arch: str) -> None:
    """With M-RoPE frames make the axes differ within an item; all holds as for images."""
    ref = cases(arch).ref
    frames = np.random.default_rng(5).integers(0, 256, (8, 84, 112, 3), dtype=np.uint8)
    metadata = {"fps": 2.0, "duration": 4.0, "total_num_frames": 8, "frames_indices": [*range(8)]}
    image, video = ARCHITECTURES[arch].image, ARCHITECTURES[arch].video
    donor = ref.prompt(f"Film: {video}. What happens?", videos=[(frames, metadata)])
    target = ref.prompt(f"{image} and then {video}. So", [WIDE], [(frames, metadata)])
    start, end = target.spans[1]
    assert int(target.positions[:, end].min()) == int(target.positions[:, :end].max()) + 1
    full = ref.full(target, n_tokens=2)
    theirs = transformers_logprobs(ref, target, full.tokens)
    torch.testing.assert_close(full.logprobs, theirs, atol=TOLERANCE, rtol=0)
    kv = ref.full(donor)
    everything = ref.reuse(target, {1: (kv, donor, 0)}, {1: range(end - start)}, n_tokens=2)
    assert error(everything, full) < TOLERANCE
    assert error(ref.reuse(target, {1: (full, target, 1)}, {}, n_tokens=2), full) < TOLERANCE

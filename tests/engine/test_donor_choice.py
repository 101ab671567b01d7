"""Where stored KV comes from: canonical donors, variants by ordinal, no accumulation of error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.engine import IMAGE, Answer, Ask, Engine
from tests.helpers.reference import Reference
from vlcache_connector.calibration import (
    Calibration,
    ModelIdentity,
    RelationResult,
    Sample,
    Thresholds,
    Verification,
)
from vlcache_connector.config import VLCacheConfig

A, B, C = (71, 224), (72, 224), (73, 224)
BLIND = {"recompute_ratio": 0.0}
OFF = {"enabled": False}


def divergence(exact: Answer, other: Answer) -> float:
    """KL(exact || other) of the first token, in nats."""
    p, q = exact.logprobs[0], other.logprobs[0]
    return float(np.sum(np.exp(p) * (p - q)))


def store_state(llm: Any) -> tuple[set[str], int]:
    """Keys of the stored segments, and the bytes that the store uses."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    store = get_kv_transfer_group()._worker._storage.engine
    store.check_integrity()
    return {key for key, kind in store._resident if kind == "kv"}, store.bytes_used


def test_reuse_at_fifty_places_has_a_flat_error_and_stores_nothing(
    engines: Callable[..., Engine],
) -> None:
    engine = engines({})
    engine.ask(Ask(f"the donor of all {IMAGE}", (A,), cache_salt="fifty"))
    before = engine.call(store_state)
    asks = [
        Ask(" ".join(["word"] * n) + f" {IMAGE} and?", (A,), vlcache=BLIND, cache_salt="fifty")
        for n in range(1, 51)
    ]
    reused = [engine.ask(ask)[0] for ask in asks]
    exact = [engine.ask(Ask(ask.text, ask.images, vlcache=OFF))[0] for ask in asks]
    assert all((answer.figures or {})["reused_tokens"] == 64 for answer in reused)
    assert engine.call(store_state) == before
    errors = [divergence(p, q) for p, q in zip(exact, reused, strict=True)]
    first, last = float(np.median(errors[:15])), float(np.median(errors[-15:]))
    assert 0 < last < 2 * first
    # The same request as at first gives what it gave at first.
    [again] = engine.ask(asks[0])
    np.testing.assert_allclose(again.logprobs, reused[0].logprobs, rtol=0, atol=1e-5)


def answers_in_order(engine: Engine, salt: str, texts: list[str]) -> Answer:
    """Show A in `texts` one after the other, then ask about it."""
    for text in texts:
        engine.ask(Ask(f"{text} {IMAGE}", (A,), cache_salt=salt, max_tokens=3))
    target = Ask(f"what about {IMAGE} now", (A,), vlcache=BLIND, cache_salt=salt)
    [answer] = engine.ask(target)
    assert answer.figures is not None
    assert answer.figures["reused_tokens"] == 64
    return answer


TEXTS = ["a short one", "quite another and much longer text in front of the picture"]


@pytest.fixture
def canonical(engines: Callable[..., Engine]) -> Engine:
    return engines({"donor": "canonical"})


def test_canonical_donors_do_not_depend_on_who_came_first(
    engines: Callable[..., Engine], canonical: Engine
) -> None:
    one = answers_in_order(canonical, "one", TEXTS)
    two = answers_in_order(canonical, "two", TEXTS[::-1])
    np.testing.assert_array_equal(one.logprobs, two.logprobs)
    # The first one's context does matter where its KV is what is stored.
    first_seen = engines({})
    one = answers_in_order(first_seen, "one", TEXTS)
    two = answers_in_order(first_seen, "two", TEXTS[::-1])
    assert np.abs(one.logprobs - two.logprobs).max() > 1e-4


def test_a_canonical_donor_is_the_image_alone_behind_the_models_opening(
    canonical: Engine, tiny_model: Callable[..., Path]
) -> None:
    reference = Reference(tiny_model())
    actual = answers_in_order(canonical, "parity", ["first seen behind this"])
    picture = Image.fromarray(Ask("", (A,)).image_arrays()[0])
    message = {"role": "user", "content": [{"type": "image"}]}
    text = reference.processor.apply_chat_template([message])
    donor = reference.prompt(text, [picture])
    target = reference.prompt_from_ids(actual.prompt, [picture])
    expected = reference.reuse(target, {0: (reference.full(donor).kv, donor, 0)}, {})
    np.testing.assert_allclose(
        actual.logprobs[0], np.asarray(expected.logprobs[0]), rtol=0, atol=1e-4
    )


def free_blocks(llm: Any) -> int:
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    return int(manager.block_pool.get_num_free_blocks())


def test_canonical_donors_give_their_blocks_back_and_change_no_running_answer(
    canonical: Engine, engines: Callable[..., Engine]
) -> None:
    before = canonical.call(free_blocks)
    ask = Ask(f"two new ones {IMAGE} and {IMAGE} here", (B, C), max_tokens=12)
    [plain] = engines(None).ask(ask)
    [answer] = canonical.ask(ask)
    assert answer.tokens == plain.tokens
    np.testing.assert_array_equal(answer.logprobs, plain.logprobs)
    assert canonical.call(free_blocks) == before
    [warm] = canonical.ask(Ask(f"again {IMAGE} and {IMAGE}", (C, B)))
    assert warm.figures is not None
    assert warm.figures["reused_tokens"] > 0


def test_an_image_of_one_token_requests_is_computed_all_the_same(canonical: Engine) -> None:
    new = (74, 224)
    # No step but prefills: the canonical computation has to force its way in.
    for number in range(20):
        canonical.ask(Ask(f"number {number} of {IMAGE}", (new,)))
    [warm] = canonical.ask(Ask(f"known by now {IMAGE} it is", (new,)))
    assert warm.figures is not None
    assert warm.figures["reused_tokens"] > 0


def fingerprint(llm: Any) -> str:
    from vlcache_connector.identity import weights_fingerprint

    return weights_fingerprint(llm.llm_engine.vllm_config)


@pytest.fixture
def gated(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Engine]:
    """Engines whose model has passed under some relations, with gate=require."""

    def make(verdict: Any) -> Engine:
        passed = {
            "same_ordinal": {"single_image", "same_ordinal"},
            "single_image": {"single_image"},
            "none": set(),
        }[verdict]
        sample = Sample(images="synthetic", requests=1, seed=0)
        path = tmp_path_factory.getbasetemp() / f"{verdict}.yaml"
        calibration = Calibration(
            model=ModelIdentity(
                name="tiny", fingerprint=engines({}).call(fingerprint), num_layers=4
            ),
            verification=Verification(
                selector="first_k",
                recompute_ratio=0.05,
                sample=sample,
                thresholds=Thresholds(kl=0.05, flip_rate=0.02),
                relations={
                    relation: RelationResult(
                        requests=1, kl=0.0, flip_rate=0.0, passed=relation in passed
                    )
                    for relation in ("single_image", "same_ordinal", "other_ordinal")
                },
                verdict=verdict,
            ),
        )
        calibration.save(path)
        return engines({"gate": "require", "calibration": str(path)})

    return make


def test_a_forbidden_relation_is_computed_in_full_and_becomes_a_variant(
    gated: Callable[[str], Engine],
) -> None:
    engine = gated("same_ordinal")
    engine.ask(Ask(f"first {IMAGE} then {IMAGE}", (A, B)))
    [swapped] = engine.ask(Ask(f"now {IMAGE} before {IMAGE}", (B, A)))
    assert swapped.figures is not None
    assert swapped.figures["reused_tokens"] == 0
    assert swapped.figures["fallback"] == "gate"
    # Both images are known at both places by now.
    for order in ((A, B), (B, A)):
        [answer] = engine.ask(Ask(f"once more {IMAGE} and {IMAGE}", order))
        assert answer.figures is not None
        assert answer.figures["reused_tokens"] == 120
        assert answer.figures["fallback"] is None


def test_only_images_behind_text_alone_are_reused_where_nothing_else_passed(
    gated: Callable[[str], Engine],
) -> None:
    engine = gated("single_image")
    engine.ask(Ask(f"first {IMAGE} then {IMAGE}", (A, B)))
    [answer] = engine.ask(Ask(f"again {IMAGE} then {IMAGE}", (A, B)))
    assert answer.figures is not None
    assert answer.figures["reused_tokens"] == 60
    # The second one could never be reused there, so it is not kept either.
    assert len(engine.call(store_state)[0]) == 1


def test_without_a_verdict_only_images_at_places_alike_are_reused(
    engines: Callable[..., Engine],
) -> None:
    engine = engines({"gate": VLCacheConfig().gate})
    engine.ask(Ask(f"first {IMAGE} then {IMAGE}", (A, B)))
    [swapped] = engine.ask(Ask(f"the other way round {IMAGE} then {IMAGE}", (B, A)))
    [alike] = engine.ask(Ask(f"once more, as at first {IMAGE} then {IMAGE}", (A, B)))
    assert swapped.figures is not None
    assert swapped.figures["reused_tokens"] == 0
    assert swapped.figures["fallback"] == "gate"
    assert alike.figures is not None
    assert alike.figures["reused_tokens"] > 64


def test_a_request_can_not_ask_for_less_than_was_verified(gated: Callable[[str], Engine]) -> None:
    engine = gated("same_ordinal")
    engine.ask(Ask(f"shown {IMAGE} first", (C,)))
    for options in (BLIND, {"selector": "none"}, {"layer_ratios": [0.0] * 4}):
        [answer] = engine.ask(Ask(f"with {options} of {IMAGE}", (C,), vlcache=options))
        assert answer.figures is not None
        assert answer.figures["reused_tokens"] == 60


def refused(llm: Any) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return int(scheduler.connector._scheduler.statistics.events["refused.gate"])


def test_a_model_without_verification_is_served_without_reuse_where_it_is_required(
    engines: Callable[..., Engine],
) -> None:
    engine = engines({"gate": "require"})
    plain = engines(None)
    ask = Ask(f"not verified {IMAGE} at all", (A,), max_tokens=4)
    for _ in range(2):
        [answer] = engine.ask(ask)
        [expected] = plain.ask(ask)
        assert answer.figures is not None
        assert answer.figures["reused_tokens"] == 0
        assert answer.figures["fallback"] == "gate"
        np.testing.assert_array_equal(answer.logprobs, expected.logprobs)
    assert engine.call(refused) == 2
    assert engine.call(store_state)[0] == set()

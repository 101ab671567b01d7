"""What a warm request runs, counted inside the engine: no vision encoder, few tokens.

And what the parts of requests' times to first token are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

from tests.helpers.encoder import count_encoder_runs, forget_vllms_encoder_cache
from tests.helpers.engine import IMAGE, VIDEO, Ask, Engine

A, B = (41, 224), (42, 336, 224)


def count(llm: Any, asks: Sequence[Ask]) -> dict[str, int]:
    """Run `asks`, counting vision encoder calls and tokens of sparse passes."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from tests.helpers.engine import run

    adapter = get_kv_transfer_group()._worker._model
    model = adapter._model
    counts = {"encoder": 0, "sparse_tokens": 0, "sparse_passes": 0}
    encode, forward = model.embed_multimodal, adapter.forward

    def counting_encode(**kwargs: Any) -> Any:
        counts["encoder"] += 1
        return encode(**kwargs)

    def counting_forward(token_ids: Any, *args: Any) -> Any:
        counts["sparse_tokens"] += len(token_ids)
        counts["sparse_passes"] += 1
        return forward(token_ids, *args)

    model.embed_multimodal, adapter.forward = counting_encode, counting_forward
    try:
        answers = run(llm, asks)
    finally:
        del model.embed_multimodal, adapter.forward
    counts["reported"] = sum((a.figures or {}).get("computed_tokens", 0) for a in answers)
    return counts


def forget_segments(llm: Any) -> None:
    """Evict all KV segments, but no encoder rows."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.connector._scheduler._segments.clear()


@pytest.fixture
def engine(engines: Callable[..., Engine]) -> Engine:
    engine = engines({})
    engine.ask(Ask(f"donor {IMAGE} and {IMAGE}", (A, B)))
    engine.call(forget_vllms_encoder_cache)
    return engine


def test_cold_images_run_the_encoder(engine: Engine) -> None:
    counts = engine.call(count, [Ask(f"never seen {IMAGE}", ((49, 224),))])
    assert counts["encoder"] == 1
    assert counts["sparse_tokens"] == 0


def test_warm_request_runs_no_encoder_and_only_text_and_recompute_sets(engine: Engine) -> None:
    ratio = {"recompute_ratio": 0.1}
    ask = Ask(f"a question {IMAGE} between {IMAGE} and an end", (B, A), vlcache=ratio)
    [answer] = engine.ask(ask)
    tokens = len(answer.prompt)
    # Tokens in front of, between and (recompute sets) in the images, none behind the last one.
    engine.call(forget_vllms_encoder_cache)
    counts = engine.call(
        count, [Ask(f"Another one {IMAGE} between {IMAGE} and", (B, A), vlcache=ratio)]
    )
    assert counts["encoder"] == 0
    assert counts["sparse_passes"] == 1
    assert counts["sparse_tokens"] == counts["reported"]
    assert answer.figures is not None
    figures = answer.figures
    image_tokens = 64 + 96
    assert figures["recomputed_tokens"] == 7 + 10
    assert figures["reused_tokens"] == image_tokens - 17
    behind_last_image = tokens - max(
        i + 1 for i, token in enumerate(answer.prompt) if answer.prompt.count(token) == image_tokens
    )
    text = tokens - image_tokens - behind_last_image
    assert figures["computed_tokens"] == text + figures["recomputed_tokens"]


def test_model_runner_v2_runs_no_encoder_for_a_warm_request(
    engines: Callable[..., Engine],
) -> None:
    engine = engines({}, runner="V2")
    engine.ask(Ask(f"donor {IMAGE} and {IMAGE}", (A, B)))
    engine.call(forget_vllms_encoder_cache)
    counts = engine.call(count, [Ask(f"both again {IMAGE} and {IMAGE} moved", (B, A))])
    assert counts["encoder"] == 0
    assert counts["sparse_passes"] == 1
    assert counts["sparse_tokens"] == counts["reported"]


def test_known_image_without_kv_still_runs_no_encoder(engine: Engine) -> None:
    engine.call(forget_segments)
    counts = engine.call(count, [Ask(f"KV gone {IMAGE} rows kept", (A,))])
    assert counts["encoder"] == 0
    assert counts["sparse_tokens"] == 0


def test_unknown_image_in_front_runs_the_encoder_once_and_is_stored(engine: Engine) -> None:
    new = (48, 224)
    counts = engine.call(count, [Ask(f"new {IMAGE} then known {IMAGE}", (new, A))])
    assert counts["encoder"] == 1
    engine.call(forget_vllms_encoder_cache)
    counts = engine.call(count, [Ask(f"now the new one is known {IMAGE} too", (new,))])
    assert counts["encoder"] == 0
    assert counts["sparse_tokens"] > 0


def test_video_is_reused_like_an_image(engine: Engine) -> None:
    clip = (47, 112, 4)
    engine.ask(Ask(f"a clip {VIDEO} first", (), (clip,)))
    engine.call(forget_vllms_encoder_cache)
    counts = engine.call(count, [Ask(f"the clip again, moved {VIDEO}", (), (clip,))])
    assert counts["encoder"] == 0
    assert counts["sparse_tokens"] > 0


def test_encoder_half_works_alone(tiny_model: Callable[..., Any]) -> None:
    engine = Engine(
        tiny_model(),
        None,
        ec_transfer_config={
            "ec_connector": "VLCacheEncoderConnector",
            "ec_role": "ec_both",
            "ec_connector_extra_config": {"cpu_bytes": "16MiB", "encoder_cpu_bytes": "64MiB"},
        },
    )
    try:
        [cold] = engine.ask(Ask(f"once {IMAGE}", (A,)))
        engine.call(forget_vllms_encoder_cache)
        runs = engine.call(count_encoder_runs, Ask(f"again, moved {IMAGE}", (A,)))
        assert runs == 0
        assert cold.figures is None
    finally:
        engine.close()


def unfinished(llm: Any) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    return len(scheduler._finishing) + len(scheduler._requests) + len(scheduler._live)


def test_requests_that_ended_are_forgotten_without_news_from_the_workers(engine: Engine) -> None:
    for number in range(3):
        engine.ask(Ask(f"off {number} {IMAGE}", ((160 + number, 224),), vlcache={"enabled": False}))
    assert engine.call(unfinished) == 0


# -- parts of the time to first token -----------------------------------------------------------


def first_tokens(llm: Any, asks: Sequence[Ask]) -> list[tuple[float, Any]]:
    """Run `asks` together; of each, the seconds to its first token, and its figures."""
    from tests.helpers.engine import answer_of, request_of

    engine, arrived, ttft, figures = llm.llm_engine, {}, {}, {}
    for number, ask in enumerate(asks):
        prompt, params = request_of(ask)
        arrived[str(number)] = time.monotonic()
        [rendered] = engine.renderer.render_cmpl([prompt])
        engine.add_request(str(number), rendered, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = time.monotonic()
            ttft.setdefault(output.request_id, now - arrived[output.request_id])
            figures[output.request_id] = answer_of(output).figures
    return [(ttft[req_id], figures[req_id]) for req_id in arrived]


EVERY = {"queue", "processor", "forward"}
"""Known of every request with images; these here are not fetched, and there is no disk."""
REUSING = EVERY | {"load", "sparse_prefill"}


@pytest.mark.parametrize("runner", [None, "V2"])
def test_parts_of_the_time_to_first_token(
    engines: Callable[..., Engine], runner: Literal["V2"] | None
) -> None:
    engine = engines({}) if runner is None else engines({}, runner=runner)
    donors = ((61, 224), (62, 224))
    engine.ask(*(Ask(f"parts, donor {IMAGE}", (donor,)) for donor in donors))
    tokens = {"max_tokens": 4}
    asks = {
        "cold": Ask(f"parts, never seen {IMAGE}", ((63, 224),), **tokens),
        "warm": Ask(f"parts, seen {IMAGE} before", donors[:1], **tokens),
        "text": Ask("parts, no image at all", **tokens),
        "other": Ask(f"parts, another one {IMAGE} seen before", donors[1:], **tokens),
        "off": Ask(f"parts, exact {IMAGE}", donors[:1], vlcache={"enabled": False}, **tokens),
    }
    together = engine.call(first_tokens, list(asks.values()))
    [alone] = engine.call(first_tokens, [Ask(f"parts, alone {IMAGE}", donors[:1])])
    answers = {**dict(zip(asks, together, strict=True)), "alone": alone}
    _, without = answers.pop("text")
    assert without is None
    parts = {name: figures["ttft_part_seconds"] for name, (_, figures) in answers.items()}
    for name, (ttft, figures) in answers.items():
        reuses = name in ("warm", "other", "alone")
        assert (figures["reused_tokens"] > 0) == reuses
        assert set(parts[name]) == (REUSING if reuses else EVERY), name
        assert min(parts[name].values()) > 0, name
        assert sum(parts[name].values()) <= ttft, name
    # Each has come at a time of its own.
    assert len({parts[name]["queue"] for name in ("cold", "warm", "other")}) == 3

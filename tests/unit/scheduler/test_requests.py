"""What the scheduler side tracks of a request, and what it leaves to plain vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm import PoolingParams, SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.request import Request

from tests.helpers.made_requests import feature, request
from vlcache_connector.config import ConfigError, RequestOptions, VLCacheConfig
from vlcache_connector.protocol import Item, PrefillFigures, ReusePlan, Span, TTFTPart
from vlcache_connector.scheduler.requests import (
    Claimed,
    Lookup,
    Staged,
    TrackedRequest,
    refusal_of,
)

GATED = Lookup(Item(0, Span(0, 9), 0, "key", "rows"), "skipped", held_back="gate")
PLAN = ReusePlan(Span(0, 9), (), "r", (0,))


def track(made: Request) -> TrackedRequest:
    assert refusal_of(made, VLCacheConfig()) is None
    return TrackedRequest.of(made, VLCacheConfig(), "model", RequestOptions.from_params)


def tracked_one() -> TrackedRequest:
    return track(request(feature("a", 10, 20)))


def with_params(params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})


def test_items_are_in_prompt_order_with_keys_by_content_and_salt() -> None:
    tracked = track(request(feature("b", 50, 20), feature("a", 10, 20)))
    assert [item.span.start for item in tracked.items] == [10, 50]
    assert tracked.item(0).span.start == 50
    salted = track(request(feature("a", 0, 20), cache_salt="x"))
    assert salted.item(0).key != tracked.item(1).key
    assert salted.item(0).encoder_key == tracked.item(1).encoder_key


def test_context_carries_grids_but_no_pixels() -> None:
    tracked = track(request(feature("a", 10, 20)))
    [spec] = tracked.context().position_features
    assert set(spec.data) == {"image_grid_thw"}


@pytest.mark.parametrize(
    "features",
    [
        pytest.param((feature("a", 90, 20),), id="behind the prompt's end"),
        pytest.param((feature("a", 10, 20), feature("b", 25, 20)), id="overlapping"),
    ],
)
def test_placeholders_that_disagree_with_the_prompt_are_left_to_vllm(
    features: tuple[MultiModalFeatureSpec, ...],
) -> None:
    assert refusal_of(request(*features), VLCacheConfig()) == "unsupported"


@pytest.mark.parametrize(
    "arguments",
    [
        {"pooling_params": PoolingParams(), "sampling_params": None},
        {"resumable": True},
        {"prompt_embeds": torch.zeros(100, 8), "prompt_token_ids": None},
    ],
    ids=["pooling", "streaming input", "prompt embeddings"],
)
def test_requests_that_cannot_be_served_are_left_to_vllm(arguments: dict[str, Any]) -> None:
    made = request(feature("a", 10, 20), **arguments)
    assert refusal_of(made, VLCacheConfig()) == "unsupported"


def test_requests_without_a_salt_are_refused_where_they_are_not_to_share() -> None:
    config = VLCacheConfig(share_unsalted=False)
    assert refusal_of(request(feature("a", 10, 20)), config) == "unsalted"
    assert refusal_of(request(feature("a", 10, 20), cache_salt="x"), config) is None


@pytest.mark.parametrize("identifier", ["client-chosen:20:20:holiday.png", "8c1f:0d", ":8c1f0d"])
def test_images_that_were_not_hashed_here_are_refused(identifier: str) -> None:
    made = request(feature("a", 10, 20), feature(identifier, 40, 20))
    assert refusal_of(made, VLCacheConfig()) == "client_uuid"


def test_names_are_taken_where_the_operator_trusts_them_but_no_unknown_hashes() -> None:
    trusting = VLCacheConfig(trust_client_names=True)
    named = feature("client-chosen:20:20:holiday.png", 40, 20)
    assert refusal_of(request(feature("a", 10, 20), named), trusting) is None
    assert refusal_of(request(feature("8c1f:0d", 10, 20)), trusting) == "client_uuid"


def test_text_inside_an_item_is_part_of_its_key() -> None:
    """A video's timestamps are tokens between its frames."""
    inside = torch.tensor([True] * 5 + [False] + [True] * 14)

    def key(timestamp: int, frame: int) -> str:
        video = feature("v", 10, 20)
        video.mm_position = replace(video.mm_position, is_embed=inside)
        tokens = list(range(100))
        tokens[15], tokens[12] = timestamp, frame
        return track(request(video, prompt_token_ids=tokens)).item(0).key

    assert key(900, 1) != key(901, 1)
    assert key(900, 1) == key(900, 2)  # what stands where encoder rows go does not matter


def test_an_ordinal_counts_the_items_in_front_whatever_their_index() -> None:
    tracked = track(request(feature("c", 60, 20), feature("a", 0, 5), feature("b", 30, 9)))
    assert [item.ordinal for item in tracked.items] == [0, 1, 2]
    assert [item.index for item in tracked.items] == [1, 2, 0]
    assert tracked.item(0).ordinal == 2


def test_equal_images_have_the_same_key_at_any_ordinal() -> None:
    tracked = track(request(feature("a", 0, 20), feature("a", 50, 20)))
    first, second = tracked.items
    assert first.key == second.key
    assert first.encoder_key == second.encoder_key
    assert first.ordinal != second.ordinal


def test_bad_options_are_ignored() -> None:
    tracked = track(
        request(
            feature("a", 10, 20), sampling_params=with_params({"vlcache": {"recompute_ratio": 7}})
        )
    )
    assert tracked.options == RequestOptions()


def test_options_are_read_by_whoever_knows_the_model() -> None:
    seen = []

    def read(params: Mapping[str, Any] | None) -> RequestOptions:
        seen.append(params)
        return RequestOptions(selector="none")

    params = {"vlcache": {"selector": "full"}, "other": 1}
    made = request(feature("a", 10, 20), sampling_params=with_params(params))
    tracked = TrackedRequest.of(made, VLCacheConfig(), "model", read)
    assert tracked.options == RequestOptions(selector="none")
    assert seen == [params]


def test_options_that_the_model_does_not_fit_are_ignored() -> None:
    def read(params: Mapping[str, Any] | None) -> RequestOptions:
        raise ConfigError("layer_ratios has 3 entries")

    tracked = TrackedRequest.of(request(feature("a", 10, 20)), VLCacheConfig(), "model", read)
    assert tracked.options == RequestOptions()


def test_other_errors_of_reading_options_are_not_swallowed() -> None:
    def read(params: Mapping[str, Any] | None) -> RequestOptions:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        TrackedRequest.of(request(feature("a", 10, 20)), VLCacheConfig(), "model", read)


def test_a_report_has_the_tokens_of_the_widest_layer_and_the_sum_over_layers() -> None:
    tracked = tracked_one()
    tracked.staged = Staged(())
    tracked.seconds = {"queue": 0.1234567, "load": 0.25}
    claimed = Claimed(PLAN, {0: "cpu", 1: "cpu"}, tracked.staged)
    tracked.claimed = claimed.loaded(PrefillFigures({0: 60, 1: 30}, 10, (30, 30, 24, 20)))
    assert tracked.report() == {
        "reused_tokens": 90,
        "recomputed_tokens": 10,
        "computed_tokens": 30,
        "computed_token_layers": 104,
        "approximate_prefix_tokens": 0,
        "tier": "cpu",
        "ttft_part_seconds": {"queue": 0.123457, "load": 0.25},
        "fallback": None,
    }


def test_a_report_without_reuse_is_empty_but_for_the_refusal() -> None:
    tracked = tracked_one()
    tracked.staged = Staged((GATED,))
    report = tracked.report()
    assert report.pop("fallback") == "gate"
    assert not any(report.values())


def arrived(
    frontend: dict[TTFTPart, float] | None = None, at: float = 100.0, **fields: Any
) -> TrackedRequest:
    """A request that arrived at a time."""
    extra = None if frontend is None else {"vlcache_seconds": frontend}
    params = SamplingParams(max_tokens=1, extra_args=extra)
    made = request(feature("a", 10, 20), sampling_params=params, arrival_time=at)
    for name, value in fields.items():
        setattr(made, name, value)
    return track(made)


def test_the_queue_is_what_is_left_of_the_way_to_the_first_step() -> None:
    tracked = arrived({"media": 0.5, "processor": 0.25})
    tracked.admitted(102.0, 1.0)
    assert tracked.seconds == {"media": 0.5, "processor": 0.25, "staging": 1.0, "queue": 0.25}


def test_what_is_not_known_is_absent() -> None:
    tracked = arrived()
    tracked.admitted(100.5, None)
    assert tracked.seconds == {"queue": 0.5}
    other_clock = arrived()
    other_clock.admitted(99.0, 0.25)
    assert other_clock.seconds == {"staging": 0.25}


def test_a_request_that_is_preempted_was_queued_once() -> None:
    tracked = arrived()
    tracked.admitted(101.0, None)
    tracked.request.num_preemptions = 1
    tracked.admitted(109.0, None)
    assert tracked.seconds == {"queue": 1.0}


def test_the_steps_of_a_prefill_add_up_and_a_neighbours_claim_is_none_of_it() -> None:
    tracked = arrived()
    step: dict[TTFTPart, float] = {"load": 0.25, "sparse_prefill": 0.5, "forward": 1.0}
    tracked.took(step, has_claim=True)
    tracked.took(step, has_claim=False)
    tracked.took({}, has_claim=True)
    assert tracked.seconds == {"load": 0.25, "sparse_prefill": 0.5, "forward": 2.0}


@pytest.mark.parametrize(
    ("computed", "tokens", "expected"),
    [(0, 0, True), (99, 0, True), (100, 0, False), (100, 1, False), (0, 1, False)],
    ids=["new", "chunked", "its token is on the way", "decoding", "preempted behind its prefill"],
)
def test_a_prefill_ends_with_the_prompt(computed: int, tokens: int, expected: bool) -> None:
    tracked = arrived(num_computed_tokens=computed)
    if tokens:
        tracked.request.append_output_token_ids([1] * tokens)
    assert tracked.is_prefilling == expected


def test_a_fallback_is_told_before_a_refusal() -> None:
    tracked = tracked_one()
    tracked.staged = Staged((GATED,))
    claimed = Claimed(PLAN, {0: "cpu"}, tracked.staged)
    tracked.claimed = claimed.loaded(PrefillFigures(fallback="segment lost"))
    assert tracked.report()["fallback"] == "segment lost"

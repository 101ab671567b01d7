"""What the scheduler side tracks of a request, and what it leaves to plain vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import PoolingParams, SamplingParams
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.v1.request import Request

from vlcache_connector.scheduler.requests import TrackedRequest


def feature(identifier: str, offset: int, length: int) -> MultiModalFeatureSpec:
    def field(data: torch.Tensor) -> MultiModalFieldElem:
        return MultiModalFieldElem(data=data, field=MultiModalBatchedField())

    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem(
            {
                "pixel_values": field(torch.zeros(4 * length, 1176)),
                "image_grid_thw": field(torch.tensor([1, 2, 2 * length])),
            }
        ),
        modality="image",
        identifier=identifier,
        mm_position=PlaceholderRange(offset=offset, length=length),
    )


def request(*features: MultiModalFeatureSpec, **arguments: Any) -> Request:
    defaults: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": list(range(100)),
        "sampling_params": SamplingParams(max_tokens=1),
        "pooling_params": None,
        "mm_features": list(features),
    }
    return Request(**{**defaults, **arguments})


def test_items_are_in_prompt_order_with_keys_by_content_and_salt() -> None:
    tracked = TrackedRequest.of(request(feature("b", 50, 20), feature("a", 10, 20)), "model")
    assert tracked is not None
    assert [item.span.start for item in tracked.items] == [10, 50]
    assert tracked.item(0).span.start == 50
    salted = TrackedRequest.of(request(feature("a", 0, 20), cache_salt="x"), "model")
    assert salted is not None
    assert salted.item(0).key != tracked.item(1).key
    assert salted.item(0).encoder_key == tracked.item(1).encoder_key


def test_context_carries_grids_but_no_pixels() -> None:
    tracked = TrackedRequest.of(request(feature("a", 10, 20)), "model")
    assert tracked is not None
    [spec] = tracked.context().position_features
    assert set(spec.data) == {"image_grid_thw"}


@pytest.mark.parametrize(
    "features",
    [
        pytest.param((feature("a", 90, 20),), id="behind the prompt's end"),
        pytest.param((feature("a", 10, 20), feature("b", 25, 20)), id="overlapping"),
        pytest.param((), id="no image"),
    ],
)
def test_placeholders_that_disagree_with_the_prompt_are_left_to_vllm(
    features: tuple[MultiModalFeatureSpec, ...],
) -> None:
    assert TrackedRequest.of(request(*features), "model") is None


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
    assert TrackedRequest.of(request(feature("a", 10, 20), **arguments), "model") is None


def test_bad_options_are_ignored() -> None:
    params = SamplingParams(
        max_tokens=1, extra_args={"kv_transfer_params": {"vlcache": {"recompute_ratio": 7}}}
    )
    tracked = TrackedRequest.of(request(feature("a", 10, 20), sampling_params=params), "model")
    assert tracked is not None
    assert tracked.options.enabled
    assert tracked.options.recompute_ratio is None

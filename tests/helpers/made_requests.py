"""Requests as vLLM makes them, for tests of the scheduler side."""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.v1.request import Request


def content(name: str) -> str:
    """The identifier of an item that was hashed where the request was made."""
    return f"vlcache-content:{name}"


def feature(name: str, offset: int, length: int) -> MultiModalFeatureSpec:
    """An image.

    Args:
        name: of its content; with a colon in it, the identifier as it is.
    """

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
        identifier=name if ":" in name else content(name),
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

"""Puts segments below host memory, sealed as an engine does it, through LMCache's own adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lmcache.v1.distributed.api import ObjectKey
from torch import Tensor

from tests.helpers.stored import adapters_of
from vlcache_connector.storage import codec
from vlcache_connector.storage.blocking import BlockingAdapter
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.layout import Form, Space

LAYERS, HEADS, HEAD_DIM = 3, 2, 8
SECONDS = 20.0


def kv_form(num_tokens: int) -> Form:
    unit = (1, 2, num_tokens, HEADS, HEAD_DIM)
    return Form("kv", num_tokens, unit, LAYERS, "bfloat16", positions_rows=3)


def encoder_form(rows: int, width: int = 16) -> Form:
    return Form("encoder", rows, (1, width), rows, "float32", positions_rows=0)


def sealed(
    space: Space, segment: SegmentId, form: Form, *, seed: int = 0, salt: str = ""
) -> dict[ObjectKey, Tensor]:
    """A segment's objects of random numbers, uint8 [bytes] each, in order."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 99, (form.positions_rows, form.num_tokens), generator=generator)
    packed = positions.to(torch.int32).numpy().tobytes()
    headers = space.headers(segment, form, packed)
    objects = {}
    for key, header in zip(space.object_keys(segment, len(headers), salt), headers, strict=True):
        buffer = torch.zeros(codec.encoded_size(header), dtype=torch.uint8)
        payload = codec.payload_view(buffer, header)
        payload.copy_(torch.randn(payload.shape, generator=generator))
        codec.seal(buffer, header)
        objects[key] = buffer
    return objects


def store(spec: Mapping[str, Any], objects: Mapping[ObjectKey, Tensor]) -> None:
    """Write objects as the adapter of a configuration does."""
    [config] = adapters_of(spec)
    num_bytes = sum(value.numel() for value in objects.values())
    with BlockingAdapter(config.inner_config, num_bytes, SECONDS) as adapter:
        views = adapter.memory.split([value.numel() for value in objects.values()])
        for view, value in zip(views, objects.values(), strict=True):
            view.copy_(value)
        placed = dict(zip(objects, views, strict=True))
        # Some adapters ask for objects of one length in a batch.
        assert all(adapter.store({key: view}) for key, view in placed.items())

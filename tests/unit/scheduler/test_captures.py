"""Which new items are captured, however the prompt is cut into steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.v1.request import Request

from tests.helpers.made_requests import feature, request
from vlcache_connector.calibration import RELATIONS
from vlcache_connector.config import RequestOptions, VLCacheConfig
from vlcache_connector.protocol import Layout, Span
from vlcache_connector.scheduler.captures import CapturePlanner
from vlcache_connector.scheduler.donors import Donors
from vlcache_connector.scheduler.index import ResidencyIndex
from vlcache_connector.scheduler.requests import TrackedRequest
from vlcache_connector.support import KVShape

SHAPE = KVShape(num_layers=2, num_kv_heads=1, head_dim=4, dtype=torch.float32, block_size=16)
BLOCKS = tuple(range(7))


def track(made: Request, **options: Any) -> TrackedRequest:
    def read(_: Any) -> RequestOptions:
        return RequestOptions(**options)

    return TrackedRequest.of(made, VLCacheConfig(), "model", read)


@pytest.fixture
def segments() -> ResidencyIndex:
    return ResidencyIndex(1 << 20, num_ranks=1)


@pytest.fixture
def approximate() -> dict[str, int]:
    """First approximate tokens, by request."""
    return {}


@pytest.fixture
def captures(segments: ResidencyIndex, approximate: dict[str, int]) -> CapturePlanner:
    donors = Donors(segments, allowed=frozenset(RELATIONS), max_variants=3)
    return CapturePlanner(
        SHAPE,
        segments,
        donors,
        None,
        min_tokens=16,
        is_below_default=lambda o: o.selector == "none",
        first_approximate=approximate.get,
    )


@pytest.mark.parametrize("step", [1, 7, 16, 100])
def test_every_token_of_a_new_item_is_captured_once(captures: CapturePlanner, step: int) -> None:
    tracked = track(request(feature("a", 10, 20), feature("small", 40, 8), feature("b", 50, 30)))
    seen: dict[int, list[int]] = {}
    for start in range(0, 100, step):
        tracked.request.num_computed_tokens = start
        for plan in captures.in_step(tracked, min(step, 100 - start), BLOCKS):
            seen.setdefault(plan.item, []).extend(range(plan.span.start, plan.span.end))
            assert len(plan.block_ids) * SHAPE.block_size >= plan.span.end
    assert seen == {0: list(range(10, 30)), 2: list(range(50, 80))}
    assert not tracked.capturing


def test_an_item_whose_first_tokens_were_cached_is_not_captured(captures: CapturePlanner) -> None:
    tracked = track(request(feature("a", 10, 20)))
    tracked.request.num_computed_tokens = 16
    assert captures.in_step(tracked, 84, BLOCKS) == []


def test_what_is_given_up_can_be_captured_again(
    captures: CapturePlanner, segments: ResidencyIndex
) -> None:
    tracked = track(request(feature("a", 10, 20)))
    [first] = captures.in_step(tracked, 15, BLOCKS)
    assert segments.used_bytes == 20 * SHAPE.bytes_per_token
    captures.give_up(tracked)
    assert (segments.used_bytes, tracked.capturing) == (0, {})
    [again] = captures.in_step(tracked, 15, BLOCKS)
    assert again == first


def test_a_claim_captures_the_new_items_that_lie_inside(captures: CapturePlanner) -> None:
    tracked = track(request(feature("a", 10, 20), feature("b", 50, 30)))
    plan = Layout(Span(0, 60), ())
    assert list(captures.in_claim(tracked, plan)) == [0]


@pytest.mark.parametrize(
    ("options", "first", "expected"),
    [
        ({}, 20, [0, 1]),
        ({"selector": "none"}, None, [0, 1]),
        ({"selector": "none"}, 20, [0]),
    ],
    ids=["the server's options", "nothing reused", "the client's own"],
)
def test_what_a_client_weakened_is_not_stored_for_others(
    captures: CapturePlanner,
    approximate: dict[str, int],
    options: dict[str, Any],
    first: int | None,
    expected: list[int],
) -> None:
    tracked = track(request(feature("a", 0, 20), feature("b", 50, 30)), **options)
    if first is not None:
        approximate["r"] = first
    assert list(captures.in_claim(tracked, Layout(Span(0, 80), ()))) == expected
    captures.give_up(tracked)


def test_what_a_client_weakened_is_not_stored_behind_the_claim_either(
    captures: CapturePlanner, approximate: dict[str, int]
) -> None:
    tracked = track(request(feature("known", 0, 20), feature("b", 50, 30)), selector="none")
    approximate["r"] = 5
    tracked.request.num_computed_tokens = 20
    assert captures.in_step(tracked, 80, BLOCKS) == []

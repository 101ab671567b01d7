"""Canonical donors: when an image is computed alone, and what that takes of vLLM's KV cache."""

from __future__ import annotations

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.block_pool import BlockPool

from vlcache_connector.protocol import Item, Span
from vlcache_connector.scheduler.canonical import CanonicalDonors
from vlcache_connector.scheduler.index import ResidencyIndex

BLOCK = 16
OPENING = [1, 2, 3]
TOKENS = 64


class World:
    """One image that waits, and a KV cache of 40 blocks."""

    def __init__(self, num_blocks: int = 40) -> None:
        self.encoder_rows = ResidencyIndex(1 << 20, 1)
        self.given_up: list[str] = []
        self.donors = CanonicalDonors(
            OPENING, self.encoder_rows, block_size=BLOCK, give_up=self.given_up.append
        )
        self.pool = BlockPool(num_gpu_blocks=num_blocks, enable_caching=True, hash_block_size=BLOCK)
        item = Item(0, Span(10, 10 + TOKENS), 0, "item", "rows")
        place = PlaceholderRange(offset=10, length=TOKENS)
        feature = MultiModalFeatureSpec(
            data=None, modality="image", identifier="id", mm_position=place
        )
        self.donors.add(item, "segment", [7] * TOKENS, feature)

    def rows_arrive(self) -> None:
        assert self.encoder_rows.reserve("rows", 100)
        self.encoder_rows.stored("rows", 1)


def test_a_new_image_is_computed_alone_behind_the_opening_tokens() -> None:
    world = World()
    assert world.donors.next_plan(world.pool, is_quiet=True) is None
    world.rows_arrive()
    assert world.donors.next_plan(world.pool, is_quiet=False) is None
    plan = world.donors.next_plan(world.pool, is_quiet=True)
    assert plan is not None
    assert plan.context.prompt_token_ids == OPENING + [7] * TOKENS
    assert plan.plan.claim == Span(0, len(OPENING) + TOKENS)
    assert plan.plan.captures == {0: "segment"}
    assert len(set(plan.plan.block_ids)) == -(-(len(OPENING) + TOKENS) // BLOCK)
    assert world.donors.next_plan(world.pool, is_quiet=True) is None
    assert world.given_up == []


def test_no_block_is_outstanding_once_a_step_is_planned() -> None:
    """vLLM's `reset_prefix_cache(reset_running_requests=True)` raises while one is."""
    world = World()
    world.rows_arrive()
    before = world.pool.get_num_free_blocks()
    assert world.donors.next_plan(world.pool, is_quiet=True) is not None
    assert world.pool.get_num_free_blocks() == before
    assert world.pool.reset_prefix_cache()


@pytest.mark.parametrize(("num_blocks", "is_room"), [(2, False), (10, False), (11, True)])
def test_requests_need_the_kv_cache_more(num_blocks: int, is_room: bool) -> None:
    world = World(num_blocks)
    world.rows_arrive()
    plans = [world.donors.next_plan(world.pool, is_quiet=True) for _ in range(100)]
    assert (plans[0] is not None) == is_room
    assert world.given_up == ([] if is_room else ["segment"])
    assert world.pool.get_num_free_blocks() == num_blocks - 1

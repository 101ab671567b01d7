"""Fences on real requests, and on vLLM's real KV cache manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vlcache_connector.scheduler.fence import PrefixFence, self_test

BLOCK = 4
NUM_BLOCKS = 10
PROMPT = list(range(100, 100 + BLOCK * NUM_BLOCKS + 1))
"""Ten full blocks and one token more, which vLLM always computes itself."""
FENCED_BLOCKS = [0, 4, 9]
LAST = BLOCK * NUM_BLOCKS
"""The token of the block that is not full yet."""


@pytest.fixture(scope="module", autouse=True)
def hash_seed() -> Iterator[None]:
    """Block hashes start from a global that engines set."""
    before = getattr(kv_cache_utils, "NONE_HASH", None)
    init_none_hash(sha256)
    yield
    if before is not None:
        kv_cache_utils.NONE_HASH = before


def make_request(req_id: str, tokens: list[int] | None = None) -> Request:
    return Request(
        request_id=req_id,
        prompt_token_ids=list(PROMPT if tokens is None else tokens),
        sampling_params=SamplingParams(max_tokens=64),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def exact_hashes(tokens: list[int]) -> list[BlockHash]:
    return list(make_request("plain", tokens).block_hashes)


def make_manager() -> KVCacheManager:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return KVCacheManager(
        KVCacheConfig(
            num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["attn"], spec)]
        ),
        max_model_len=1024,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
    )


def hits(manager: KVCacheManager, tokens: list[int] | None = None) -> int:
    """Blocks that vLLM's prefix cache would serve to a request that did not ask for reuse."""
    _, num_computed, _ = manager.get_computed_blocks(make_request("probe", tokens))
    return num_computed // BLOCK


def prefill(
    manager: KVCacheManager,
    request: Request,
    num_external: int = 0,
    ask: Callable[[int], None] | None = None,
) -> int:
    """Allocate as vLLM's scheduler does, `num_external` tokens from a connector.

    Args:
        ask: called with the local hit before anything is allocated, as a connector is.

    Returns:
        The local hit in tokens.
    """
    blocks, num_local, _ = manager.get_computed_blocks(request)
    if ask is not None:
        ask(num_local)
    assert manager.allocate_slots(
        request,
        request.num_tokens - num_local - num_external,
        num_new_computed_tokens=num_local,
        new_computed_blocks=blocks,
        num_external_computed_tokens=num_external,
    )
    request.num_computed_tokens = request.num_tokens
    return num_local


def decode(manager: KVCacheManager, request: Request, tokens: list[int]) -> None:
    for token in tokens:
        request.append_output_token_ids(token)
        assert manager.allocate_slots(request, 1)
        request.num_computed_tokens += 1


def preempt(manager: KVCacheManager, request: Request) -> None:
    manager.free(request)
    request.status = RequestStatus.PREEMPTED
    request.num_computed_tokens = 0


def test_vllm_still_behaves_as_fences_need() -> None:
    self_test()


def test_the_self_test_leaves_the_seed_of_live_engines_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every chain of block hashes of the process starts from it."""
    chosen = BlockHash(b"chosen by an engine")
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", chosen, raising=False)
    self_test()
    assert chosen == kv_cache_utils.NONE_HASH


def test_two_requests_with_the_same_prompt_share_all_hashes_without_fences() -> None:
    assert make_request("a").block_hashes == make_request("b").block_hashes
    assert len(make_request("a").block_hashes) == NUM_BLOCKS


@pytest.mark.parametrize("token", [0, 1, 3, 4, 17, 39, LAST])
def test_hashes_before_a_fence_are_shared_and_none_behind_it(token: int) -> None:
    fence, a, b = PrefixFence(BLOCK), make_request("a"), make_request("b")
    exact, block = list(a.block_hashes), token // BLOCK
    fence.raise_at(a, token)
    fence.raise_at(b, token)
    assert a.block_hashes[:block] == b.block_hashes[:block] == exact[:block]
    behind = [set(hashes[block:]) for hashes in (a.block_hashes, b.block_hashes, exact)]
    assert not behind[0] & behind[1]
    assert not (behind[0] | behind[1]) & behind[2]


@pytest.mark.parametrize("token", [0, 17, 39])
def test_a_fence_keeps_one_hash_for_each_full_block(token: int) -> None:
    fence, request = PrefixFence(BLOCK), make_request("a")
    fence.raise_at(request, token)
    assert len(request.block_hashes) == len(set(request.block_hashes)) == NUM_BLOCKS


def test_a_fence_in_the_last_partial_block_holds_once_it_is_full() -> None:
    fence, request = PrefixFence(BLOCK), make_request("a")
    fence.raise_at(request, LAST)
    outputs = list(range(2 * BLOCK))
    request.append_output_token_ids(outputs)
    exact = exact_hashes(PROMPT + outputs)
    assert len(request.block_hashes) == len(exact) == NUM_BLOCKS + 2
    assert request.block_hashes[:NUM_BLOCKS] == exact[:NUM_BLOCKS]
    assert not set(request.block_hashes[NUM_BLOCKS:]) & set(exact)


def test_output_tokens_are_chained_behind_the_fence() -> None:
    fence, request = PrefixFence(BLOCK), make_request("a")
    fence.raise_at(request, 17)
    fenced = list(request.block_hashes)
    outputs = list(range(3 * BLOCK))
    for token in outputs:
        request.append_output_token_ids(token)
    assert request.block_hashes[:NUM_BLOCKS] == fenced
    assert len(request.block_hashes) == NUM_BLOCKS + 3
    assert not set(request.block_hashes[4:]) & set(exact_hashes(PROMPT + outputs))


@settings(max_examples=30)
@given(
    num_tokens=st.integers(1, 30),
    fences=st.lists(st.integers(0, 29), min_size=1, max_size=3),
    before=st.integers(0, 9),
    after=st.integers(0, 9),
)
def test_lifting_restores_exactly_what_there_would_be_without_fences(
    num_tokens: int, fences: list[int], before: int, after: int
) -> None:
    fence, tokens = PrefixFence(BLOCK), list(range(num_tokens))
    request = make_request("a", tokens)
    for token in fences:
        fence.raise_at(request, min(token, num_tokens - 1))
    request.append_output_token_ids([7] * before)
    fence.lift(request)
    assert request.block_hashes == exact_hashes(tokens + [7] * before)
    request.append_output_token_ids([8] * after)
    assert request.block_hashes == exact_hashes(tokens + [7] * before + [8] * after)


@pytest.mark.parametrize("again", [17, 16, 19, 30, LAST])
def test_raising_again_at_or_behind_a_fence_changes_nothing(again: int) -> None:
    fence, request = PrefixFence(BLOCK), make_request("a")
    fence.raise_at(request, 17)
    fenced = list(request.block_hashes)
    fence.raise_at(request, again)
    assert request.block_hashes == fenced


def test_raising_again_before_a_fence_moves_it_there() -> None:
    fence, request = PrefixFence(BLOCK), make_request("a")
    exact = list(request.block_hashes)
    fence.raise_at(request, 33)
    higher = list(request.block_hashes)
    fence.raise_at(request, 9)
    assert request.block_hashes[:2] == exact[:2]
    assert len(request.block_hashes) == NUM_BLOCKS
    assert not set(request.block_hashes[2:]) & {*exact, *higher[8:]}
    fence.raise_at(request, 33)
    fence.lift(request)
    assert request.block_hashes == exact


def test_lifting_twice_or_without_a_fence_changes_nothing() -> None:
    fence, request = PrefixFence(BLOCK), make_request("a")
    exact = list(request.block_hashes)
    fence.lift(request)
    assert request.block_hashes == exact
    fence.raise_at(request, 5)
    fence.lift(request)
    fence.lift(request)
    assert request.block_hashes == exact


def test_every_fence_has_a_nonce_of_its_own() -> None:
    fence, request = PrefixFence(BLOCK), make_request("a")
    fence.raise_at(request, 17)
    first = list(request.block_hashes)
    fence.lift(request)
    fence.raise_at(request, 17)
    assert not set(first[4:]) & set(request.block_hashes)


def test_requests_have_fences_of_their_own() -> None:
    fence, a, b = PrefixFence(BLOCK), make_request("a"), make_request("b")
    exact = list(a.block_hashes)
    fence.raise_at(a, 17)
    fence.raise_at(b, 33)
    fence.lift(a)
    assert a.block_hashes == exact
    assert b.block_hashes[:8] == exact[:8]
    assert not set(b.block_hashes[8:]) & set(exact)


def test_a_forgotten_request_keeps_its_hashes_as_they_are() -> None:
    fence, request = PrefixFence(BLOCK), make_request("a")
    fence.raise_at(request, 17)
    fenced = list(request.block_hashes)
    fence.forget("a")
    fence.forget("unknown")
    fence.lift(request)
    assert request.block_hashes == fenced


@pytest.mark.parametrize(
    ("num_computed", "stays"), [(0, False), (12, False), (16, False), (20, True)]
)
def test_a_fence_stays_when_blocks_behind_it_are_found_again(
    num_computed: int, stays: bool
) -> None:
    fence, request = PrefixFence(BLOCK), make_request("a")
    exact = list(request.block_hashes)
    fence.raise_at(request, 17)
    fenced = list(request.block_hashes)
    fence.lift(request, num_computed)
    assert request.block_hashes == (fenced if stays else exact)
    fence.lift(request)
    assert request.block_hashes == exact


def test_without_a_fence_another_request_is_served_every_block() -> None:
    manager = make_manager()
    assert prefill(manager, make_request("a")) == 0
    assert hits(manager) == NUM_BLOCKS


@pytest.mark.parametrize("num_external", [0, 24, 40])
@pytest.mark.parametrize("block", FENCED_BLOCKS)
def test_other_requests_are_served_the_blocks_before_the_fence_and_no_others(
    block: int, num_external: int
) -> None:
    manager, fence, request = make_manager(), PrefixFence(BLOCK), make_request("a")
    fence.raise_at(request, block * BLOCK + 1)
    prefill(manager, request, num_external)
    assert hits(manager) == block


@pytest.mark.parametrize("block", FENCED_BLOCKS)
def test_neither_decoding_nor_the_end_of_a_request_opens_its_fence(block: int) -> None:
    manager, fence, request = make_manager(), PrefixFence(BLOCK), make_request("a")
    outputs = list(range(3 * BLOCK))
    fence.raise_at(request, block * BLOCK)
    prefill(manager, request)
    decode(manager, request, outputs)
    assert hits(manager, PROMPT + outputs) == block
    fence.forget("a")
    manager.free(request)
    assert hits(manager, PROMPT + outputs) == block


def test_without_a_fence_decoded_blocks_are_served_too() -> None:
    manager, request = make_manager(), make_request("a")
    outputs = list(range(3 * BLOCK))
    prefill(manager, request)
    decode(manager, request, outputs)
    assert hits(manager, PROMPT + outputs) == NUM_BLOCKS + 3
    manager.free(request)
    assert hits(manager, PROMPT + outputs) == NUM_BLOCKS + 3


def test_a_fence_in_the_last_partial_block_hides_it_once_it_is_full() -> None:
    manager, fence, request = make_manager(), PrefixFence(BLOCK), make_request("a")
    outputs = list(range(2 * BLOCK))
    fence.raise_at(request, LAST)
    prefill(manager, request)
    decode(manager, request, outputs)
    assert hits(manager, PROMPT + outputs) == NUM_BLOCKS


def test_two_fenced_requests_do_not_serve_each_other() -> None:
    manager, fence = make_manager(), PrefixFence(BLOCK)
    a, b = make_request("a"), make_request("b")
    fence.raise_at(a, 17)
    prefill(manager, a)
    fence.raise_at(b, 17)
    assert prefill(manager, b) == 4 * BLOCK


def test_exact_blocks_of_one_request_are_served_beside_fenced_ones_of_another() -> None:
    manager, fence, approximate = make_manager(), PrefixFence(BLOCK), make_request("a")
    fence.raise_at(approximate, 17)
    prefill(manager, approximate)
    exact = make_request("b")
    assert prefill(manager, exact) == 4 * BLOCK
    probe = make_request("probe")
    blocks, num_computed, _ = manager.get_computed_blocks(probe)
    assert num_computed == LAST
    assert blocks.get_block_ids()[0] == manager.get_block_ids("b")[0][:NUM_BLOCKS]


def test_a_preempted_request_that_resumes_on_its_own_blocks_still_hides_them() -> None:
    """Another request has all exact blocks of the prompt, so only the fence hides the outputs."""
    manager, fence, request = make_manager(), PrefixFence(BLOCK), make_request("a")
    outputs = list(range(2 * BLOCK))
    fence.raise_at(request, 17)
    prefill(manager, request)
    prefill(manager, make_request("exact"))
    decode(manager, request, outputs[:2])
    preempt(manager, request)
    assert prefill(manager, request, ask=lambda num_local: fence.lift(request, num_local)) == LAST
    decode(manager, request, outputs[2:])
    assert hits(manager, PROMPT + outputs) == NUM_BLOCKS


def test_a_lifted_fence_makes_a_request_like_any_other() -> None:
    manager, fence, request = make_manager(), PrefixFence(BLOCK), make_request("a")
    fence.raise_at(request, 17)
    fence.lift(request)
    prefill(manager, request)
    assert hits(manager) == NUM_BLOCKS

"""Fences on real requests, and on vLLM's real KV cache manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    get_request_block_hasher,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vlcache_connector.scheduler.fence import PrefixFences, self_test

BLOCK = 4
NUM_BLOCKS = 10
PROMPT = list(range(100, 100 + BLOCK * NUM_BLOCKS + 1))
"""Ten full blocks and one token more, which vLLM always computes itself."""
FENCED_BLOCKS = [0, 4, 9]
POLICY, OTHER = "5 %", "nothing"
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


def make_manager(*, announces: bool = False) -> KVCacheManager:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return KVCacheManager(
        KVCacheConfig(
            num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["attn"], spec)]
        ),
        max_model_len=1024,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_kv_cache_events=announces,
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
def test_hashes_behind_a_fence_are_those_of_requests_that_recompute_alike(token: int) -> None:
    fence, a, b, c = PrefixFences(BLOCK), *map(make_request, "abc")
    exact, block = list(a.block_hashes), token // BLOCK
    fence.raise_at(a, token, POLICY)
    fence.raise_at(b, token, POLICY)
    fence.raise_at(c, token, OTHER)
    assert a.block_hashes[:block] == c.block_hashes[:block] == exact[:block]
    assert a.block_hashes == b.block_hashes
    behind = [set(hashes[block:]) for hashes in (a.block_hashes, c.block_hashes, exact)]
    assert not behind[0] & behind[1]
    assert not (behind[0] | behind[1]) & behind[2]


def test_no_other_process_can_name_what_is_behind_a_fence() -> None:
    a, b = make_request("a"), make_request("b")
    PrefixFences(BLOCK).raise_at(a, 17, POLICY)
    PrefixFences(BLOCK).raise_at(b, 17, POLICY)
    assert not set(a.block_hashes[4:]) & set(b.block_hashes)


@pytest.mark.parametrize("token", [0, 17, 39])
def test_a_fence_keeps_one_hash_for_each_full_block(token: int) -> None:
    fence, request = PrefixFences(BLOCK), make_request("a")
    fence.raise_at(request, token, POLICY)
    assert len(request.block_hashes) == len(set(request.block_hashes)) == NUM_BLOCKS


def test_a_fence_in_the_last_partial_block_holds_once_it_is_full() -> None:
    fence, request = PrefixFences(BLOCK), make_request("a")
    fence.raise_at(request, LAST, POLICY)
    outputs = list(range(2 * BLOCK))
    request.append_output_token_ids(outputs)
    exact = exact_hashes(PROMPT + outputs)
    assert len(request.block_hashes) == len(exact) == NUM_BLOCKS + 2
    assert request.block_hashes[:NUM_BLOCKS] == exact[:NUM_BLOCKS]
    assert not set(request.block_hashes[NUM_BLOCKS:]) & set(exact)


def test_output_tokens_are_chained_behind_the_fence() -> None:
    fence, request = PrefixFences(BLOCK), make_request("a")
    fence.raise_at(request, 17, POLICY)
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
    fence, tokens = PrefixFences(BLOCK), list(range(num_tokens))
    request = make_request("a", tokens)
    for token in fences:
        fence.raise_at(request, min(token, num_tokens - 1), POLICY)
    request.append_output_token_ids([7] * before)
    fence.lift(request)
    assert request.block_hashes == exact_hashes(tokens + [7] * before)
    request.append_output_token_ids([8] * after)
    assert request.block_hashes == exact_hashes(tokens + [7] * before + [8] * after)


@pytest.mark.parametrize("again", [17, 16, 19, 30, LAST])
def test_raising_again_at_or_behind_a_fence_changes_nothing(again: int) -> None:
    fence, request = PrefixFences(BLOCK), make_request("a")
    fence.raise_at(request, 17, POLICY)
    fenced = list(request.block_hashes)
    fence.raise_at(request, again, POLICY)
    assert request.block_hashes == fenced


def test_raising_again_before_a_fence_moves_it_there() -> None:
    fence, request = PrefixFences(BLOCK), make_request("a")
    exact = list(request.block_hashes)
    fence.raise_at(request, 33, POLICY)
    higher = list(request.block_hashes)
    fence.raise_at(request, 9, POLICY)
    assert request.block_hashes[:2] == exact[:2]
    assert len(request.block_hashes) == NUM_BLOCKS
    assert not set(request.block_hashes[2:]) & set(exact)
    assert request.block_hashes[8:] == higher[8:]
    fence.raise_at(request, 33, POLICY)
    fence.lift(request)
    assert request.block_hashes == exact


def test_lifting_twice_or_without_a_fence_changes_nothing() -> None:
    fence, request = PrefixFences(BLOCK), make_request("a")
    exact = list(request.block_hashes)
    fence.lift(request)
    assert request.block_hashes == exact
    fence.raise_at(request, 5, POLICY)
    fence.lift(request)
    fence.lift(request)
    assert request.block_hashes == exact


def test_the_first_approximate_token_is_known_while_the_fence_stands() -> None:
    fence, request = PrefixFences(BLOCK), make_request("a")
    assert fence.first_approximate("a") is None
    fence.raise_at(request, 17, POLICY)
    assert fence.first_approximate("a") == 17
    fence.lift(request)
    assert fence.first_approximate("a") is None


def test_requests_have_fences_of_their_own() -> None:
    fence, a, b = PrefixFences(BLOCK), make_request("a"), make_request("b")
    exact = list(a.block_hashes)
    fence.raise_at(a, 17, POLICY)
    fence.raise_at(b, 33, POLICY)
    fence.lift(a)
    assert a.block_hashes == exact
    assert b.block_hashes[:8] == exact[:8]
    assert not set(b.block_hashes[8:]) & set(exact)


def test_a_forgotten_request_keeps_its_hashes_as_they_are() -> None:
    fence, request = PrefixFences(BLOCK), make_request("a")
    fence.raise_at(request, 17, POLICY)
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
    fence, request = PrefixFences(BLOCK), make_request("a")
    exact = list(request.block_hashes)
    fence.raise_at(request, 17, POLICY)
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
    manager, fence, request = make_manager(), PrefixFences(BLOCK), make_request("a")
    fence.raise_at(request, block * BLOCK + 1, POLICY)
    prefill(manager, request, num_external)
    assert hits(manager) == block


@pytest.mark.parametrize("block", FENCED_BLOCKS)
def test_neither_decoding_nor_the_end_of_a_request_opens_its_fence(block: int) -> None:
    manager, fence, request = make_manager(), PrefixFences(BLOCK), make_request("a")
    outputs = list(range(3 * BLOCK))
    fence.raise_at(request, block * BLOCK, POLICY)
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
    manager, fence, request = make_manager(), PrefixFences(BLOCK), make_request("a")
    outputs = list(range(2 * BLOCK))
    fence.raise_at(request, LAST, POLICY)
    prefill(manager, request)
    decode(manager, request, outputs)
    assert hits(manager, PROMPT + outputs) == NUM_BLOCKS


@pytest.mark.parametrize(("policy", "expected"), [(POLICY, LAST), (OTHER, 4 * BLOCK)])
def test_requests_that_recompute_alike_serve_each_other_and_nobody_else(
    policy: str, expected: int
) -> None:
    manager, fence = make_manager(), PrefixFences(BLOCK)
    a, b = make_request("a"), make_request("b")
    fence.raise_at(a, 17, POLICY)
    prefill(manager, a)
    assert fence.find(b, policy, manager) == (policy == POLICY)
    fence.raise_at(b, 17, policy)
    assert prefill(manager, b) == expected
    assert hits(manager) == 4


def test_the_next_turn_of_a_chat_finds_prompt_and_answer() -> None:
    manager, fence, turn = make_manager(), PrefixFences(BLOCK), make_request("first")
    answer, question = [5] * 7, [6] * 9
    fence.raise_at(turn, 17, POLICY)
    prefill(manager, turn)
    decode(manager, turn, answer)
    fence.forget("first")
    manager.free(turn)
    following = make_request("next", PROMPT + answer + question)
    assert fence.find(following, POLICY, manager)
    assert prefill(manager, following) == BLOCK * (NUM_BLOCKS + 2)
    assert fence.first_approximate("next") == 4 * BLOCK
    assert hits(manager, PROMPT + answer + question) == 4


def test_a_block_that_became_full_after_its_fence_is_found() -> None:
    """An image in a prompt's last block, which only the answer fills."""
    manager, fence, turn = make_manager(), PrefixFences(BLOCK), make_request("a", PROMPT[:6])
    fence.raise_at(turn, 5, POLICY)
    prefill(manager, turn)
    decode(manager, turn, [7] * 8)
    following = make_request("b", PROMPT[:6] + [7] * 9)
    assert fence.find(following, POLICY, manager)
    assert prefill(manager, following) == 3 * BLOCK


def test_approximate_blocks_go_on_where_exact_ones_end() -> None:
    """Also behind a longer exact prefix than that which they were computed behind."""
    manager, fence = make_manager(), PrefixFences(BLOCK)
    approximate, exact = make_request("a"), make_request("b", PROMPT[:27])
    fence.raise_at(approximate, 9, POLICY)
    prefill(manager, approximate)
    prefill(manager, exact)
    assert hits(manager) == 6
    request = make_request("c")
    assert fence.find(request, POLICY, manager)
    assert prefill(manager, request) == LAST
    assert fence.first_approximate("c") == 6 * BLOCK


def test_a_longer_exact_prefix_is_preferred() -> None:
    manager, fence = make_manager(), PrefixFences(BLOCK)
    approximate = make_request("a", PROMPT[:27])
    fence.raise_at(approximate, 9, POLICY)
    prefill(manager, approximate)
    prefill(manager, make_request("b"))
    request = make_request("c")
    assert not fence.find(request, POLICY, manager)
    assert fence.first_approximate("c") is None
    assert prefill(manager, request) == LAST


def test_what_was_found_once_is_not_found_again() -> None:
    """A scheduler that looks again and is told the same does not wait for ever."""
    manager, fence = make_manager(), PrefixFences(BLOCK)
    first, second = make_request("a"), make_request("b")
    fence.raise_at(first, 17, POLICY)
    prefill(manager, first)
    assert fence.find(second, POLICY, manager)
    assert not fence.find(second, POLICY, manager)


def test_evicted_blocks_are_not_found() -> None:
    manager, fence = make_manager(), PrefixFences(BLOCK)
    first, second = make_request("a"), make_request("b")
    fence.raise_at(first, 17, POLICY)
    prefill(manager, first)
    manager.free(first)
    assert manager.reset_prefix_cache()
    assert not fence.find(second, POLICY, manager)
    assert prefill(manager, second) == 0


def test_exact_blocks_of_one_request_are_served_beside_fenced_ones_of_another() -> None:
    manager, fence, approximate = make_manager(), PrefixFences(BLOCK), make_request("a")
    fence.raise_at(approximate, 17, POLICY)
    prefill(manager, approximate)
    exact = make_request("b")
    assert prefill(manager, exact) == 4 * BLOCK
    probe = make_request("probe")
    blocks, num_computed, _ = manager.get_computed_blocks(probe)
    assert num_computed == LAST
    assert blocks.get_block_ids()[0] == manager.get_block_ids("b")[0][:NUM_BLOCKS]


def test_a_preempted_request_that_resumes_on_its_own_blocks_still_hides_them() -> None:
    """Another request has all exact blocks of the prompt, so only the fence hides the outputs."""
    manager, fence, request = make_manager(), PrefixFences(BLOCK), make_request("a")
    outputs = list(range(2 * BLOCK))
    fence.raise_at(request, 17, POLICY)
    prefill(manager, request)
    prefill(manager, make_request("exact"))
    decode(manager, request, outputs[:2])
    preempt(manager, request)
    assert prefill(manager, request, ask=lambda num_local: fence.lift(request, num_local)) == LAST
    decode(manager, request, outputs[2:])
    assert hits(manager, PROMPT + outputs) == NUM_BLOCKS


def test_a_lifted_fence_makes_a_request_like_any_other() -> None:
    manager, fence, request = make_manager(), PrefixFences(BLOCK), make_request("a")
    fence.raise_at(request, 17, POLICY)
    fence.lift(request)
    prefill(manager, request)
    assert hits(manager) == NUM_BLOCKS


@pytest.mark.parametrize("as_int", ["0", "1"])
@pytest.mark.parametrize("block", FENCED_BLOCKS)
def test_only_exact_blocks_are_announced(
    monkeypatch: pytest.MonkeyPatch, block: int, as_int: str
) -> None:
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", as_int)
    manager, fences = make_manager(announces=True), PrefixFences(BLOCK, has_events=True)
    request = make_request("fenced")
    fences.raise_at(request, block * BLOCK + 1, POLICY)
    prefill(manager, request)
    decode(manager, request, list(range(2 * BLOCK)))
    assert fences.silence(manager.block_pool) is False
    stored = [event for event in manager.take_events() if isinstance(event, BlockStored)]
    assert [token for event in stored for token in event.token_ids] == PROMPT[: block * BLOCK]
    names = [name for event in stored for name in event.block_hashes]
    assert names == list(map(maybe_convert_block_hash, exact_hashes(PROMPT)[:block]))
    assert all(len(event.extra_keys or ()) == len(event.block_hashes) for event in stored)

    # As they make room: of what was not announced nothing is said.
    manager.free(request)
    manager.block_pool.evict_blocks(set(range(1, 100)))
    fences.silence(manager.block_pool)
    removed = [event for event in manager.take_events() if isinstance(event, BlockRemoved)]
    assert sorted(map(str, names)) == sorted(
        str(name) for event in removed for name in event.block_hashes
    )

    # Exact ones, all of them, and what is not about blocks.
    prefill(manager, make_request("plain"))
    assert manager.reset_prefix_cache() is False
    manager.block_pool.kv_event_queue.append(AllBlocksCleared())
    assert fences.silence(manager.block_pool) is True
    events = manager.take_events()
    assert isinstance(events[-1], AllBlocksCleared)
    stored = [event for event in events if isinstance(event, BlockStored)]
    assert sum(len(event.block_hashes) for event in stored) == NUM_BLOCKS

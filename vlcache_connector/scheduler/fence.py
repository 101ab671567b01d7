"""Approximate KV has a prefix cache of its own, inside vLLM's.

vLLM commits every block that it computes or takes from a connector under `Request.block_hashes`,
and finds it again by them. From the first block on that holds approximate KV, a fence puts keyed
hashes in the place of the exact ones. A keyed hash is made of the exact hash, which stands for all
tokens, images and the salt up to there; of how much of an image is recomputed; and of a secret. So
requests that recompute alike share approximate blocks (the turns of a chat, the sequences of one
request, the beams of a search), and no other request can name them.

Nor are they announced: vLLM's KV events give each block's tokens, which routers take for exact.

vLLM seams: `Request.block_hashes`, `Request._block_hasher` and `Request.update_block_hashes()`
(`vllm/v1/request.py`), hashes chained by `get_request_block_hasher`
(`vllm/v1/core/kv_cache_utils.py`); `KVCacheCoordinator.find_longest_cache_hit`
(`vllm/v1/core/kv_cache_coordinator.py`); `BlockPool.kv_event_queue`
(`vllm/v1/core/block_pool.py`) and the events in it (`vllm/distributed/kv_events.py`). The fields
are not a public interface, hence `self_test`, which the scheduler side runs at start-up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import BlockHash, get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import ExternalBlockHash

_SECRET_BYTES = 32
_HASH_BYTES = 32
_TAG_BYTES = 4
"""At the end of a keyed hash that is announced: a digest of as many bytes in front of it. KV events
may have no more than the last 8 bytes of a hash."""


class PrefixFences:
    """Fences of the live requests; all methods are idempotent.

    Args:
        hash_block_size: tokens per block hash.
        has_events: blocks are announced; `silence` needs to tell the approximate ones then.
    """

    def __init__(self, hash_block_size: int, *, has_events: bool = False) -> None:
        self._block_size = hash_block_size
        self._has_events = has_events
        self._secret = os.urandom(_SECRET_BYTES)
        self._fences: dict[str, _Fence] = {}

    def raise_at(self, request: Request, first_approximate_token: int, policy: str) -> None:
        """Hide every block from the one that holds `first_approximate_token` on.

        Args:
            policy: what the request recomputes; those with an equal one share the blocks.
        """
        fence = self._fences.get(request.request_id)
        if fence is not None:
            if fence.block * self._block_size <= first_approximate_token:
                return
            self.lift(request)
        key = self._key(policy)
        block = first_approximate_token // self._block_size
        exact = list(request.block_hashes)
        fence = _Fence(first_approximate_token, block, exact, request._block_hasher, key)
        self._fences[request.request_id] = fence
        request.block_hashes[block:] = map(key, exact[block:])
        if fence.hasher is not None:
            request._block_hasher = fence.hash_new_blocks

    def find(self, request: Request, policy: str, manager: KVCacheManager) -> bool:
        """Raise a fence where the exact prefix ends, if approximate blocks that the request may
        have go on from there.

        Returns:
            Whether vLLM would find more blocks now than before.
        """
        fence = self._fences.get(request.request_id)
        exact = request.block_hashes if fence is None else fence.exact
        last = request.num_tokens - 1  # vLLM computes at least one token
        _, num_exact, _ = manager.coordinator.find_longest_cache_hit(exact, last)
        block = num_exact // self._block_size
        if (fence is not None and fence.block == block) or block >= len(exact):
            return False
        key, look_up = self._key(policy), manager.coordinator.find_longest_cache_hit
        # Most requests find nothing, and one hash tells.
        if look_up([*exact[:block], key(exact[block])], last)[1] <= num_exact:
            return False
        self.lift(request)
        self.raise_at(request, block * self._block_size, policy)
        return True

    def lift(self, request: Request, num_computed: int = 0) -> None:
        """Give back the exact hashes: the request turned out to reuse nothing.

        A fence below `num_computed` stays: the request has found approximate blocks behind it, and
        all that it computes from there on is approximate too.
        """
        fence = self._fences.get(request.request_id)
        if fence is None or num_computed > fence.block * self._block_size:
            return
        del self._fences[request.request_id]
        request.block_hashes[fence.block :] = fence.exact[fence.block :]
        request._block_hasher = fence.hasher

    def first_approximate(self, req_id: str) -> int | None:
        """The first token of a request whose KV may be approximate; None: all is exact."""
        fence = self._fences.get(req_id)
        return None if fence is None else fence.first_token

    def num_hidden(self, request: Request, num_computed: int) -> int:
        """How many of a request's first `num_computed` tokens are behind its fence."""
        fence = self._fences.get(request.request_id)
        return 0 if fence is None else max(0, num_computed - fence.block * self._block_size)

    def silence(self, pool: BlockPool) -> bool:
        """Take out of vLLM's KV events what they say of approximate blocks.

        To be called behind everything that allocates, before vLLM takes the events.

        Returns:
            Whether vLLM announces that all blocks are gone.
        """
        queue = pool.kv_event_queue
        queue[:] = [shown for event in queue if (shown := self._shown(event)) is not None]
        return any(isinstance(event, AllBlocksCleared) for event in queue)

    def _shown(self, event: KVCacheEvent) -> KVCacheEvent | None:
        if isinstance(event, BlockRemoved):
            exact = [name for name in event.block_hashes if not self._is_keyed(name)]
            return msgspec.structs.replace(event, block_hashes=exact) if exact else None
        if isinstance(event, BlockStored):
            is_keyed = map(self._is_keyed, event.block_hashes)
            count = next((index for index, keyed in enumerate(is_keyed) if keyed), None)
            if count is not None:  # behind the first one all are
                if not count:
                    return None
                return msgspec.structs.replace(
                    event,
                    block_hashes=event.block_hashes[:count],
                    token_ids=event.token_ids[: count * event.block_size],
                    extra_keys=event.extra_keys and event.extra_keys[:count],
                )
        return event

    def _is_keyed(self, name: ExternalBlockHash) -> bool:
        """Whether a block's hash, as KV events show it, is one for approximate KV; one of 2**32
        exact ones is taken for that, too."""
        length = 2 * _TAG_BYTES
        end = name[-length:] if isinstance(name, bytes) else name.to_bytes(length, "big")
        return self._tag(end[:_TAG_BYTES]) == end[_TAG_BYTES:]

    def _tag(self, end: bytes) -> bytes:
        return hashlib.blake2b(
            end, digest_size=_TAG_BYTES, key=self._secret, person=b"vlcache-tag"
        ).digest()

    def forget(self, req_id: str) -> None:
        """The request is gone."""
        self._fences.pop(req_id, None)

    def _key(self, policy: str) -> Callable[[BlockHash], BlockHash]:
        size = _HASH_BYTES - _TAG_BYTES if self._has_events else _HASH_BYTES
        started = hashlib.blake2b(policy.encode(), digest_size=size, key=self._secret)

        def key(exact: BlockHash) -> BlockHash:
            keyed = started.copy()
            keyed.update(exact)
            return BlockHash(keyed.digest())

        def tagged_key(exact: BlockHash) -> BlockHash:
            body = key(exact)
            return BlockHash(body + self._tag(body[-_TAG_BYTES:]))

        return tagged_key if self._has_events else key


@dataclass
class _Fence:
    """One request's.

    Attributes:
        first_token: the first one that may be approximate.
        block: the block it is in.
        exact: the exact hash of every full block.
        hasher: vLLM's; None: there is no prefix cache.
        key: from an exact hash to the one for approximate KV.
    """

    first_token: int
    block: int
    exact: list[BlockHash]
    hasher: Callable[[Request], list[BlockHash]] | None
    key: Callable[[BlockHash], BlockHash]

    def hash_new_blocks(self, request: Request) -> list[BlockHash]:
        """Hash the blocks that became full, in the place of vLLM's hasher."""
        assert self.hasher is not None
        shown = request.block_hashes
        # vLLM's hasher goes on from the request's last hash.
        request.block_hashes = self.exact
        try:
            new = self.hasher(request)
        finally:
            request.block_hashes = shown
        first = len(self.exact)
        self.exact += new
        return [
            self.key(exact) if number >= self.block else exact
            for number, exact in enumerate(new, first)
        ]


def self_test() -> None:
    """Check on requests of its own that vLLM still chains block hashes the way a fence needs.

    Raises:
        RuntimeError: a field or its behaviour changed; approximate KV must not be served.
    """
    block_size = 4
    # The hash that all chains start from is one for the process; a live engine may have chosen it.
    seed = vars(kv_cache_utils).get("NONE_HASH")

    def made(name: str) -> Request:
        return Request(
            request_id=f"vlcache-fence-self-test-{name}",
            prompt_token_ids=list(range(4 * block_size + 1)),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            block_hasher=get_request_block_hasher(block_size, sha256),
        )

    try:
        init_none_hash(sha256)
        request, plain = made("fenced"), made("plain")
        fences = PrefixFences(block_size)
        fences.raise_at(request, block_size + 1, "")
        fenced = list(request.block_hashes)
        for each in (request, plain):
            each.append_output_token_ids(list(range(block_size)))
        grown = list(request.block_hashes)
        fences.lift(request)
        restored = list(request.block_hashes)
    except Exception as error:
        raise RuntimeError(f"vLLM's block hashes can't be fenced: {error!r}") from error
    finally:
        vars(kv_cache_utils).pop("NONE_HASH", None)
        if seed is not None:
            kv_cache_utils.NONE_HASH = seed
    exact = plain.block_hashes
    ok = (
        len(exact) == len(set(exact)) == 5
        and len(fenced) == 4
        and len(set(grown)) == 5
        and fenced[:1] == exact[:1]
        and not set(grown[1:]) & set(exact)
        and grown[:4] == fenced
        and restored == exact
    )
    if not ok:
        raise RuntimeError("vLLM's Request.block_hashes no longer behave as a fence needs")

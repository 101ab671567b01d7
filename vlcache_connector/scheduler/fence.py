"""Keeps approximate KV out of vLLM's exact prefix cache.

vLLM seam: `Request.block_hashes` and `Request.update_block_hashes()` (`vllm/v1/request.py`,
hashes chained by `vllm/v1/core/kv_cache_utils.py:get_request_block_hasher`). Every block that vLLM
computes or takes from a connector is committed under these hashes. A fence cuts a request's list
at its first approximate block and puts a secret nonce there: vLLM chains all later hashes from
it, so that no other request can ever ask for them. The field is not a public interface, hence
`self_test`, which the scheduler side runs at start-up.
"""

from __future__ import annotations

import os

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import BlockHash, get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

_HASH_BYTES = 32


class PrefixFence:
    """Fences of the live requests; all methods are idempotent."""

    def __init__(self, hash_block_size: int) -> None:
        self._block_size = hash_block_size
        self._exact: dict[str, tuple[int, list[BlockHash]]] = {}

    def raise_at(self, request: Request, first_approximate_token: int) -> None:
        """Hide every block from the one that holds `first_approximate_token` on."""
        block = first_approximate_token // self._block_size
        fenced = self._exact.get(request.request_id)
        if fenced is not None:
            if fenced[0] <= block:
                return
            self.lift(request)
        self._exact[request.request_id] = (block, list(request.block_hashes[block:]))
        # A block that is not full yet has no hash; the nonce then stands in its place already.
        request.block_hashes[block:] = [BlockHash(os.urandom(_HASH_BYTES))]
        request.update_block_hashes()

    def lift(self, request: Request, num_computed: int = 0) -> None:
        """Give back the exact hashes: the request turned out to reuse nothing.

        A fence below `num_computed` stays: a resumed request may find its own approximate blocks
        behind it again, and all that it computes from there on is approximate too.
        """
        block, hashes = self._exact.get(request.request_id, (None, None))
        if block is None or hashes is None or num_computed > block * self._block_size:
            return
        del self._exact[request.request_id]
        request.block_hashes[block:] = hashes
        request.update_block_hashes()

    def forget(self, req_id: str) -> None:
        """The request is gone."""
        self._exact.pop(req_id, None)


def self_test() -> None:
    """Check on a request of its own that vLLM still chains block hashes the way a fence needs.

    Raises:
        RuntimeError: a field or its behaviour changed; approximate KV must not be served.
    """
    block_size = 4
    # The hash that all chains start from is one for the process; a live engine may have chosen it.
    seed = vars(kv_cache_utils).get("NONE_HASH")
    try:
        init_none_hash(sha256)
        request = Request(
            request_id="vlcache-fence-self-test",
            prompt_token_ids=list(range(4 * block_size + 1)),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            block_hasher=get_request_block_hasher(block_size, sha256),
        )
        exact = list(request.block_hashes)
        fence = PrefixFence(block_size)
        fence.raise_at(request, block_size + 1)
        fenced = list(request.block_hashes)
        request.append_output_token_ids(list(range(block_size)))
        grown = list(request.block_hashes)
        fence.lift(request)
        restored = list(request.block_hashes)
    except Exception as error:
        raise RuntimeError(f"vLLM's block hashes can't be fenced: {error!r}") from error
    finally:
        vars(kv_cache_utils).pop("NONE_HASH", None)
        if seed is not None:
            kv_cache_utils.NONE_HASH = seed
    ok = (
        len(exact) == 4
        and fenced[:1] == exact[:1]
        and len(fenced) == 4
        and not set(fenced[1:]) & set(exact)
        and grown[:4] == fenced
        and len(grown) == 5
        and restored[:4] == exact
        and len(restored) == 5
    )
    if not ok:
        raise RuntimeError("vLLM's Request.block_hashes no longer behave as a fence needs")

"""Which segments this node holds, for who subscribes to vLLM's KV events.

They are announced as vLLM announces blocks on other media, without tokens: a segment is reused
wherever its item stands, so routers that match prefixes have nothing to do with it. What the item
is stands where vLLM has it, in `extra_keys`.

vLLM seams: the events (`vllm/distributed/kv_events.py`) and the form of hashes in them
(`maybe_convert_block_hash` in `vllm/v1/core/kv_cache_utils.py`).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_utils import ExternalBlockHash

    from ..protocol import Item

MEDIUM = "VLCACHE"


class SegmentEvents:
    """News of KV segments since vLLM asked last."""

    def __init__(self) -> None:
        self._announced: dict[str, Item] = {}
        self._news: list[KVCacheEvent] = []
        self._is_cleared = False

    def stored(self, key: str, item: Item) -> None:
        """A segment may be reused from now on.

        Args:
            key: content key.
            item: which it is of.
        """
        self._announced[key] = item
        self._announce(key)

    def removed(self, key: str) -> None:
        """A segment is gone, or was never stored."""
        if self._announced.pop(key, None) is not None:
            self._news.append(BlockRemoved(block_hashes=[_name(key)], medium=MEDIUM))

    def repeat(self) -> None:
        """Announce all that is here when vLLM asks next: it tells that nothing is."""
        self._is_cleared = True

    def take(self) -> list[KVCacheEvent]:
        """For vLLM."""
        if self._is_cleared:
            self._news, self._is_cleared = [], False
            for key in self._announced:
                self._announce(key)
        news, self._news = self._news, []
        return news

    def _announce(self, key: str) -> None:
        item = self._announced[key]
        extra = ((item.identifier, 0), *((item.salt,) if item.salt is not None else ()))
        self._news.append(
            BlockStored(
                block_hashes=[_name(key)],
                parent_block_hash=None,
                token_ids=[],
                block_size=0,
                lora_id=None,
                medium=MEDIUM,
                lora_name=None,
                extra_keys=[extra],
            )
        )


def _name(key: str) -> ExternalBlockHash:
    return maybe_convert_block_hash(BlockHash(hashlib.sha256(key.encode()).digest()))

"""Which new items are stored, and which of their tokens a step captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..config import RequestOptions
from ..protocol import CapturePlan, Item, Layout
from ..support import KVShape
from .canonical import CanonicalDonors
from .donors import Donors
from .index import ResidencyIndex
from .requests import CapturedItem, TrackedRequest


class CapturePlanner:
    """Plans the capture of new items, or of their canonical donors.

    Args:
        shape: of one token's KV on one rank.
        segments: index of the stored KV segments.
        donors: segments by image and ordinal.
        canonical: computes donors of their own; None stores what requests compute.
        min_tokens: smaller items are not stored.
        is_below_default: whether a request's own options recompute less than the server's. What it
            computes behind reused tokens is then not stored for others.
        first_approximate: a request's first token whose KV may be approximate, by its id.
    """

    def __init__(
        self,
        shape: KVShape,
        segments: ResidencyIndex,
        donors: Donors,
        canonical: CanonicalDonors | None,
        min_tokens: int,
        is_below_default: Callable[[RequestOptions], bool],
        first_approximate: Callable[[str], int | None],
    ) -> None:
        self._shape = shape
        self._segments = segments
        self._donors = donors
        self._canonical = canonical
        self._min_tokens = min_tokens
        self._is_below_default = is_below_default
        self._first_approximate = first_approximate

    def in_claim(self, tracked: TrackedRequest, layout: Layout) -> dict[int, str]:
        """Keys of unknown items that the sparse prefill computes from first to last token, by
        their indices."""
        reused = {reuse.item for reuse in layout.reused}
        captures = {}
        for item in tracked.items:
            inside = layout.claim.start <= item.span.start and item.span.end <= layout.claim.end
            if inside and item.index not in reused:
                key = self._reserve(tracked, item)
                if key is not None:
                    captures[item.index] = key
        return captures

    def in_step(
        self, tracked: TrackedRequest, num_scheduled: int, block_ids: tuple[int, ...]
    ) -> list[CapturePlan]:
        """Items that vLLM's own forward computes, in whole or in part, in this step.

        Args:
            num_scheduled: tokens of the request that the forward computes.
            block_ids: of the request.
        """
        start = tracked.request.num_computed_tokens
        end = start + num_scheduled
        captures = []
        for item in tracked.items:
            part = item.span.clip(start, end)
            if not part:
                continue
            if part.start == item.span.start:
                key = self._reserve(tracked, item)
                if key is None:
                    continue
                tracked.capturing[item.index] = CapturedItem(key, part.start)
            captured = tracked.capturing.get(item.index)
            if captured is None or captured.next_token != part.start:
                continue
            captured.next_token = part.end
            if part.end == item.span.end:
                del tracked.capturing[item.index]
            last_block = -(-part.end // self._shape.block_size)
            captures.append(
                CapturePlan(
                    tracked.request.request_id,
                    item.index,
                    captured.key,
                    part,
                    block_ids[:last_block],
                )
            )
        return captures

    def give_up(self, tracked: TrackedRequest) -> None:
        """Store nothing of what is half captured."""
        for captured in tracked.capturing.values():
            self._segments.discard(captured.key)
        tracked.capturing.clear()

    def _reserve(self, tracked: TrackedRequest, item: Item) -> str | None:
        """Key to capture a new item under, None when it is not to be captured."""
        if len(item.span) < self._min_tokens:
            return None
        num_bytes = len(item.span) * self._shape.bytes_per_token
        if self._canonical is None:
            first = self._first_approximate(tracked.request.request_id)
            is_behind = first is not None and first < item.span.start
            if is_behind and self._is_below_default(tracked.options):
                return None
            return self._donors.reserve(item, num_bytes)
        if not self._canonical.is_full:
            key = self._donors.reserve(replace(item, ordinal=0), num_bytes)
            if key is not None:
                context = tracked.context()
                token_ids = context.prompt_token_ids[item.span.start : item.span.end]
                self._canonical.add(item, key, token_ids, context.position_features[item.index])
        return None

"""Which stored segment of an item a request may reuse, and which new one is worth storing.

An image's KV depends on what stood in front of it, other images above all. So segments of one
image are told apart by their ordinal: how many items were in front of it when they were computed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..calibration import RELATIONS, Relation, relation_of
from ..keys import split_variant, variant_key
from ..protocol import Item
from .events import SegmentEvents
from .index import ResidencyIndex

_LIKELY_ORDINALS = 4
"""Variants with fewer images in front are looked for elsewhere, wherever the target's place is."""


class Donors:
    """The variants of every stored item.

    Args:
        segments: index of the stored segments; tells what it forgets.
        allowed: relations of donor and target under which KV may be reused.
        max_variants: most segments kept of one item.
        events: tells others what is stored and what is gone; None: nobody asks.
    """

    def __init__(
        self,
        segments: ResidencyIndex,
        *,
        allowed: frozenset[Relation],
        max_variants: int,
        events: SegmentEvents | None = None,
    ) -> None:
        self._segments = segments
        self._allowed = allowed
        self._max_variants = max_variants
        self._ordinals: dict[str, dict[int, str]] = {}
        """Item's key -> ordinal -> segment's key, least recently stored first."""
        segments.on_forgotten = self._forget
        self._events = events
        self._items: dict[str, Item] = {}
        """Those with segments, by their key, where events are asked for."""
        if events is not None:
            segments.on_ready = self._announce

    def find(self, item: Item) -> str | None:
        """The ready segment whose donor is nearest to the item's place, of those allowed."""
        nearest_first = self._nearest_first(item, self._ordinals.get(item.key, ()))
        keys = (self._ordinals[item.key][ordinal] for ordinal in nearest_first)
        return next(filter(self._segments.is_ready, keys), None)

    def candidates(self, item: Item) -> dict[str, int | None]:
        """Variants to look for elsewhere, content key -> ordinal, nearest first; none while one
        is known that may be reused."""
        if self._nearest_first(item, self._ordinals.get(item.key, ())):
            return {}
        likely = {item.ordinal, *range(_LIKELY_ORDINALS)}
        return {variant_key(item.key, str(n)): n for n in self._nearest_first(item, likely)}

    def _nearest_first(self, item: Item, ordinals: Iterable[int]) -> list[int]:
        """Those of the donor ordinals that may be reused at the item's place."""

        def nearness(ordinal: int) -> tuple[int, int, int]:
            relation = relation_of(ordinal, item.ordinal)
            return RELATIONS.index(relation), abs(ordinal - item.ordinal), ordinal

        allowed = (n for n in ordinals if relation_of(n, item.ordinal) in self._allowed)
        return sorted(allowed, key=nearness)

    def is_forbidden(self, item: Item) -> bool:
        """Whether segments of the item are stored, but none that it may reuse."""
        known = self._ordinals.get(item.key)
        return known is not None and not self._nearest_first(item, known)

    def reserve(self, item: Item, num_bytes: int) -> str | None:
        """Key to store the item's KV under, as computed at its place in this request.

        Where the item has as many variants as it may have, the oldest goes.

        Returns:
            None when a variant that may be reused here is known, or there is no room.
        """
        known = self._nearest_first(item, self._ordinals.get(item.key, ()))
        if known or not self._is_useful(item.ordinal):
            return None
        return self.adopt(item, item.ordinal, num_bytes)

    def adopt(self, item: Item, ordinal: int, num_bytes: int) -> str | None:
        """As `reserve`, for KV that was computed behind `ordinal` other items elsewhere."""
        key = variant_key(item.key, str(ordinal))
        if not self._segments.reserve(key, num_bytes):
            return None
        variants = self._ordinals.setdefault(item.key, {})
        older = list(variants.values())
        variants[ordinal] = key
        if self._events is not None:
            self._items[item.key] = item
        if len(variants) > self._max_variants and not any(map(self._segments.evict, older)):
            self._segments.discard(key)
            return None
        return key

    def _is_useful(self, ordinal: int) -> bool:
        """Whether any target may reuse a donor of this ordinal."""
        return any(
            relation_of(ordinal, target) in self._allowed for target in (0, ordinal, ordinal + 1)
        )

    def _announce(self, key: str) -> None:
        assert self._events is not None
        self._events.stored(key, self._items[split_variant(key)[0]])

    def _forget(self, key: str) -> None:
        if self._events is not None:
            self._events.removed(key)
        item, ordinal = split_variant(key)
        variants = self._ordinals.get(item, {})
        variants.pop(int(ordinal), None)
        if not variants:
            self._ordinals.pop(item, None)
            self._items.pop(item, None)

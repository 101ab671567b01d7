"""Brings what requests will need into host memory, before anything is promised to them.

vLLM takes what was claimed for granted: a load must not fail afterwards. So only what the workers
hold in memory is claimed. What may lie below is looked for first, by one lookup over all images of
a request. What all ranks have found, and what pays, gets room in host memory, and all ranks load
it. The request is asked again until that has ended, or its deadline has passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..protocol import TIERS, Found, Item, Loaded, LoadPlan, LookupPlan, Outcome, slowest
from ..storage.header import Kind
from .donors import Donors
from .index import ResidencyIndex
from .requests import Lookup

_TRY_AGAIN_AFTER = 20
"""Loads that are skipped as too slow before one is made anyway: speeds change."""

Worth = Callable[[str, int, int], bool]
"""Whether loading so many bytes from a tier takes less time than computing so many tokens."""


@dataclass
class _Fetch:
    """A segment that is looked for, and loaded if it is found.

    Attributes:
        candidates: content key -> the ordinal of that variant; None for encoder rows.
        until: when the last request stops waiting for it.
        found: by the ranks that have answered.
        key: of the candidate that is being loaded.
        tier: that it is loaded from.
        loaded: by the ranks on which that has ended.
    """

    item: Item
    kind: Kind
    num_bytes: int
    saved_tokens: int
    candidates: dict[str, int | None]
    until: float
    found: Found | None = None
    key: str | None = None
    tier: str | None = None
    loaded: Loaded | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens, or encoder rows."""
        return len(self.item.span) if self.kind == "kv" else self.item.num_embeds


@dataclass(frozen=True)
class _Ended:
    """What became of a fetch."""

    outcome: Outcome
    tier: str | None = None


@dataclass
class Ticket:
    """What one request waits for.

    Attributes:
        since: time (monotonic) when it began to wait.
        running: names of fetches that have not ended.
        kv: names of the fetches of its items' KV, by the items' indices.
        ended: fetches, by name, as they ended.
        tier: slowest tier that something was loaded from.
        waited_seconds: how long it waited, once it waits no longer.
    """

    since: float
    running: set[str] = field(default_factory=set)
    kv: dict[int, str] = field(default_factory=dict)
    ended: dict[str, _Ended] = field(default_factory=dict)
    tier: str | None = None
    waited_seconds: float | None = None


class Staging:
    """Fetches of all requests; two requests that need the same segment share a fetch.

    Args:
        segments: index of the KV segments in host memory.
        encoder_rows: index of the encoder rows in host memory.
        donors: variants of the stored items.
        num_ranks: tensor-parallel ranks, all of which must have found the same segment.
        deadline_seconds: longest that a request waits.
        is_worth: what is loaded.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        segments: ResidencyIndex,
        encoder_rows: ResidencyIndex,
        donors: Donors,
        *,
        num_ranks: int,
        deadline_seconds: float,
        is_worth: Worth,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._segments = segments
        self._encoder_rows = encoder_rows
        self._donors = donors
        self._num_ranks = num_ranks
        self._deadline_seconds = deadline_seconds
        self._is_worth = is_worth
        self._clock = clock
        self._running: dict[str, _Fetch] = {}
        self._loading: dict[str, str] = {}
        """Content key -> name of the fetch that loads it."""
        self._num_skipped = 0
        self._tickets: dict[str, Ticket] = {}
        """Request -> what it waits for; kept until the request ends, so that it asks once."""
        self._lookups: list[LookupPlan] = []
        self._loads: list[str] = []
        """Names of fetches whose segments are to be loaded."""

    def is_pending(
        self,
        req_id: str,
        items: Sequence[Item],
        segment_bytes: Callable[[Item], int],
        encoder_bytes: Callable[[Item], int],
        saved_tokens: Callable[[Item], int],
    ) -> bool:
        """Whether a request should be asked again later; begins its fetches the first time.

        Args:
            items: those that vLLM has no KV of.
            segment_bytes: of an item's KV on one rank.
            encoder_bytes: of an item's encoder rows.
            saved_tokens: tokens of an item that are not computed if it is reused.
        """
        ticket = self._tickets.get(req_id)
        if ticket is None:
            now = self._clock()
            ticket = self._tickets[req_id] = Ticket(now)
            until = now + self._deadline_seconds
            for item in items:
                variants, saved = self._donors.candidates(item), saved_tokens(item)
                if variants and saved > 0:
                    fetch = _Fetch(item, "kv", segment_bytes(item), saved, variants, until)
                    ticket.kv[item.index] = self._begin(ticket, fetch)
                # Of an item whose KV is reused as it is, no token needs its rows.
                needs_rows = saved < len(item.span) or self._donors.find(item) is None
                if needs_rows and item.encoder_key not in self._encoder_rows:
                    rows: dict[str, int | None] = {item.encoder_key: None}
                    self._begin(
                        ticket, _Fetch(item, "encoder", encoder_bytes(item), 0, rows, until)
                    )
        waited = self._clock() - ticket.since
        if ticket.running and waited < self._deadline_seconds:
            return True
        if ticket.waited_seconds is None:
            ticket.waited_seconds = waited
        return False

    def _begin(self, ticket: Ticket, fetch: _Fetch) -> str:
        name = next(iter(fetch.candidates))
        ticket.running.add(name)
        running = self._running.get(name)
        if running is not None:
            running.until = fetch.until
        else:
            self._running[name] = fetch
            self._lookups.append(LookupPlan(tuple(fetch.candidates), fetch.kind, fetch.num_tokens))
        return name

    def update(self, found: dict[str, Found], loaded: dict[str, Loaded]) -> None:
        """Take in the lookups and loads that ended on some ranks."""
        for name, part in found.items():
            fetch = self._running.get(name)
            if fetch is None or fetch.key is not None:
                continue  # of before a reset
            fetch.found = part if fetch.found is None else fetch.found.merge(part)
            if fetch.found.ranks >= self._num_ranks:
                self._decide(name, fetch, fetch.found)
        for key, end in loaded.items():
            name = self._loading.get(key, "")
            fetch = self._running.get(name)
            if fetch is None:
                # Of before a reset: if nobody has stored it anew, it is to go.
                self._segments.stored(key, 0)
                self._encoder_rows.stored(key, 0)
                continue
            fetch.loaded = end if fetch.loaded is None else fetch.loaded.merge(end)
            if fetch.loaded.ranks >= self._num_ranks:
                self._settle(name, fetch, fetch.loaded)

    def _decide(self, name: str, fetch: _Fetch, found: Found) -> None:
        """All ranks have looked: load the best candidate of the nearest tier, if that pays."""
        key = min(
            (key for key in fetch.candidates if key in found.tiers),
            key=lambda key: TIERS.index(found.tiers[key]),
            default=None,
        )
        if key is None:
            self._end(name, _Ended(found.no_answer or "miss"))
        elif fetch.until <= self._clock():
            self._end(name, _Ended("late", found.tiers[key]))
        elif not self._pays(fetch, found.tiers[key]) or not self._reserve(fetch, key):
            self._end(name, _Ended("skipped", found.tiers[key]))
        else:
            fetch.key, fetch.tier = key, found.tiers[key]
            self._loading[key] = name
            self._loads.append(name)

    def _pays(self, fetch: _Fetch, tier: str) -> bool:
        if not fetch.saved_tokens or self._is_worth(tier, fetch.num_bytes, fetch.saved_tokens):
            return True
        self._num_skipped += 1
        return self._num_skipped % _TRY_AGAIN_AFTER == 0

    def _reserve(self, fetch: _Fetch, key: str) -> bool:
        ordinal = fetch.candidates[key]
        if ordinal is None:
            return self._encoder_rows.reserve(key, fetch.num_bytes)
        return self._donors.adopt(fetch.item, ordinal, fetch.num_bytes) is not None

    def _settle(self, name: str, fetch: _Fetch, loaded: Loaded) -> None:
        """All ranks have loaded the segment, or some could not."""
        assert fetch.key is not None
        index = self._segments if fetch.kind == "kv" else self._encoder_rows
        if not loaded.is_here:
            index.lost(fetch.key)
            self._end(name, _Ended("failed", fetch.tier))
            return
        index.stored(fetch.key, self._num_ranks)
        index.promise(fetch.key)  # until those who wait for it have been asked again
        self._end(name, _Ended("hit", fetch.tier))

    def _end(self, name: str, ended: _Ended) -> None:
        fetch = self._running.pop(name)
        if fetch.key is not None:
            self._loading.pop(fetch.key, None)
        for ticket in self._tickets.values():
            if name in ticket.running:
                ticket.running.discard(name)
                ticket.ended[name] = ended
                if ended.outcome == "hit":
                    ticket.tier = slowest(ticket.tier, ended.tier)

    def tier_of(self, req_id: str) -> str | None:
        """Slowest tier that anything was loaded from for a request; None: nothing was."""
        ticket = self._tickets.get(req_id)
        return None if ticket is None else ticket.tier

    def waited_seconds(self, req_id: str) -> float | None:
        """How long a request waited for its fetches; None: it still does, or never asked."""
        ticket = self._tickets.get(req_id)
        return None if ticket is None else ticket.waited_seconds

    def lookup(self, req_id: str, item: Item) -> Lookup:
        """What became of looking for an item's KV below host memory."""
        ticket = self._tickets.get(req_id)
        name = None if ticket is None else ticket.kv.get(item.index)
        if ticket is None or name is None:
            return Lookup(item, "miss")
        ended = ticket.ended.get(name)
        return Lookup(item, "late") if ended is None else Lookup(item, ended.outcome, ended.tier)

    def reset(self) -> None:
        """Forget what is fetched; requests that still wait ask anew."""
        self._running, self._loading, self._tickets = {}, {}, {}
        self._lookups, self._loads = [], []

    def forget(self, req_id: str) -> None:
        """A request has ended."""
        self._tickets.pop(req_id, None)

    def take_plans(self) -> tuple[list[LookupPlan], list[LoadPlan]]:
        """Lookups and loads to begin, since the last call."""
        now = self._clock()
        lookups, self._lookups = self._lookups, []
        names, self._loads = self._loads, []
        loads = []
        for name in names:
            fetch = self._running[name]
            assert fetch.key is not None
            left = max(0.0, fetch.until - now)
            loads.append(LoadPlan(fetch.key, fetch.kind, fetch.num_tokens, left))
        return lookups, loads

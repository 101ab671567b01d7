"""Brings what requests will need into host memory, before anything is promised to them.

vLLM takes what was claimed for granted: a load must not fail afterwards. So only what the workers
hold in memory is claimed. What may lie in a tier below is fetched first, and the request is asked
again until the fetch has ended, or its deadline has passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..protocol import Fetched, FetchPlan, Item, Outcome, slowest
from ..storage.header import Kind
from .donors import Donors
from .index import ResidencyIndex
from .requests import Lookup

_LARGER = 1.05
_HEADERS = 1 << 20
"""A stored value may be so much larger than the KV in it."""


@dataclass
class _Fetch:
    item: Item
    kind: Kind
    num_bytes: int
    saved_tokens: int
    candidates: dict[str, int | None]
    """Content key -> the ordinal of that variant; None for encoder rows."""
    ended: Fetched | None = None
    is_stale: bool = False
    """The weights may have changed since it began."""


@dataclass
class Ticket:
    """What one request waits for.

    Attributes:
        since: time (monotonic) when it began to wait.
        wanted: fetches, by name, that there was no room for yet.
        running: names of fetches that are not settled.
        kv: names of the fetches of its items' KV, by the items' indices.
        ended: fetches, by name, as they ended.
        tier: slowest tier that something was fetched from.
        waited_seconds: how long it waited, once it waits no longer.
    """

    since: float
    wanted: dict[str, _Fetch] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    kv: dict[int, str] = field(default_factory=dict)
    ended: dict[str, Fetched] = field(default_factory=dict)
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
        max_bytes: most bytes, per rank, that are fetched and not yet settled.
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
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._segments = segments
        self._encoder_rows = encoder_rows
        self._donors = donors
        self._num_ranks = num_ranks
        self._deadline_seconds = deadline_seconds
        self._max_bytes = max_bytes
        self._clock = clock
        self._running: dict[str, _Fetch] = {}
        self._tickets: dict[str, Ticket] = {}
        """Request -> what it waits for; kept until the request ends, so that it asks once."""
        self._fetches: list[FetchPlan] = []
        self._admitted: list[str] = []
        self._unwanted: list[str] = []

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
            ticket = self._tickets[req_id] = Ticket(self._clock())
            for item in items:
                variants, saved = self._donors.candidates(item), saved_tokens(item)
                if variants and saved > 0:
                    fetch = _Fetch(item, "kv", segment_bytes(item), saved, variants)
                    ticket.kv[item.index] = self._want(ticket, fetch)
                if item.encoder_key not in self._encoder_rows:
                    rows: dict[str, int | None] = {item.encoder_key: None}
                    self._want(ticket, _Fetch(item, "encoder", encoder_bytes(item), 0, rows))
        ticket.running = {name for name in ticket.running if not self._is_over(name)}
        for name in list(ticket.wanted):
            if self._begin(name, ticket.wanted[name]):
                del ticket.wanted[name]
                ticket.running.add(name)
        waited = self._clock() - ticket.since
        if (ticket.running or ticket.wanted) and waited < self._deadline_seconds:
            return True
        if ticket.waited_seconds is None:
            ticket.waited_seconds = waited
        return False

    @staticmethod
    def _want(ticket: Ticket, fetch: _Fetch) -> str:
        name = next(iter(fetch.candidates))
        ticket.wanted[name] = fetch
        return name

    def _begin(self, name: str, fetch: _Fetch) -> bool:
        if name in self._running:
            return True
        in_flight = sum(running.num_bytes for running in self._running.values())
        if in_flight and in_flight + fetch.num_bytes > self._max_bytes:
            return False
        self._running[name] = fetch
        most = int(fetch.num_bytes * _LARGER) + _HEADERS
        num_tokens = len(fetch.item.span) if fetch.kind == "kv" else fetch.item.num_embeds
        plan = FetchPlan(tuple(fetch.candidates), fetch.kind, most, fetch.saved_tokens, num_tokens)
        self._fetches.append(plan)
        return True

    def update(self, fetched: dict[str, Fetched]) -> None:
        """Take in the fetches that ended on some ranks."""
        for name, part in fetched.items():
            fetch = self._running[name]
            fetch.ended = part if fetch.ended is None else fetch.ended.merge(part)
            if fetch.ended.ranks >= self._num_ranks:
                self._settle(name, fetch, fetch.ended)

    def _settle(self, name: str, fetch: _Fetch, ended: Fetched) -> None:
        if fetch.is_stale:
            ended = replace(ended, key=None, no_answer="skipped")
        for ticket in self._tickets.values():
            if name in ticket.running:
                ticket.ended[name] = ended
        if ended.key is None or not self._reserve(fetch, ended.key):
            del self._running[name]
            if ended.num_bytes:
                self._unwanted.append(name)
            return
        self._admitted.append(name)
        for ticket in self._tickets.values():
            if name in ticket.running:
                ticket.tier = slowest(ticket.tier, ended.tier)
        if fetch.kind == "kv":
            # Workers admit it before they load anything in the step that is being planned. Should
            # there be no room after all, it is computed instead.
            del self._running[name]
            self._segments.stored(ended.key, self._num_ranks)
            self._segments.promise(ended.key)  # until the workers have admitted it

    def _reserve(self, fetch: _Fetch, key: str) -> bool:
        ordinal = fetch.candidates[key]
        if ordinal is None:
            return self._encoder_rows.reserve(key, fetch.num_bytes)
        return self._donors.adopt(fetch.item, ordinal, fetch.num_bytes) is not None

    def _is_over(self, name: str) -> bool:
        """Whether encoder rows that were found are ready, or lost.

        vLLM ends the engine where promised encoder outputs are not there, so all ranks have to
        say first that they hold them.
        """
        fetch = self._running.get(name)
        if fetch is None:
            return True
        found = fetch.ended is not None and fetch.ended.ranks >= self._num_ranks
        key = fetch.item.encoder_key
        if not found or (key in self._encoder_rows and not self._encoder_rows.is_ready(key)):
            return False
        del self._running[name]
        return True

    def tier_of(self, req_id: str) -> str | None:
        """Slowest tier that anything was fetched from for a request; None: nothing was."""
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
        if ended is None:
            return Lookup(item, "late")
        outcome: Outcome = "hit" if ended.key is not None else ended.no_answer or "miss"
        return Lookup(item, outcome, ended.tier)

    def reset(self) -> None:
        """Forget what was fetched; requests that still wait ask anew."""
        begun = {plan.keys[0] for plan in self._fetches}
        self._running = {
            name: replace(fetch, is_stale=True)
            for name, fetch in self._running.items()
            if name not in begun and (fetch.ended is None or fetch.ended.ranks < self._num_ranks)
        }
        self._unwanted += self._admitted
        self._tickets, self._fetches, self._admitted = {}, [], []

    def forget(self, req_id: str) -> None:
        """A request has ended."""
        self._tickets.pop(req_id, None)

    def take_plans(self) -> tuple[list[FetchPlan], list[str], list[str]]:
        """Fetches to begin, and names of those to admit and to throw away, since the last call."""
        for name in list(self._running):
            self._is_over(name)  # also of requests that ended
        plans = self._fetches, self._admitted, self._unwanted
        self._fetches, self._admitted, self._unwanted = [], [], []
        return plans

"""What crosses between the scheduler side and the worker side.

The two sides live in different processes and know each other only through these types:
`StepPlan` travels with every scheduler step to all workers, `StepReport` comes back from each
worker and is merged over the tensor-parallel ranks.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, zip_longest
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorMetadata,
    ECConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from .config import ADAPTER_TYPES
from .storage.header import Kind


@dataclass(frozen=True)
class Span:
    """Half-open range of token indices of one request."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __bool__(self) -> bool:
        return self.end > self.start

    def clip(self, start: int, end: int) -> Span:
        """Part inside [start, end); empty spans have `end == start`."""
        low = min(max(self.start, start), end)
        return Span(low, max(low, min(self.end, end)))


def uncovered(whole: Span, covered: Sequence[Span]) -> list[Span]:
    """Maximal stretches of `whole` outside `covered` (sorted, disjoint, inside `whole`)."""
    gaps, position = [], whole.start
    for span in covered:
        if span.start > position:
            gaps.append(Span(position, span.start))
        position = span.end
    if position < whole.end:
        gaps.append(Span(position, whole.end))
    return gaps


class HasSpan(Protocol):
    """An item, or what is done with one."""

    @property
    def span(self) -> Span:
        """Its tokens."""


T = TypeVar("T", bound=HasSpan)


def inside(entries: Sequence[T], span: Span) -> Sequence[T]:
    """Those of `entries` (in order, disjoint) that have tokens in `span`."""
    first = bisect_right(entries, span.start, key=lambda entry: entry.span.end)
    return entries[first : bisect_left(entries, span.end, key=lambda entry: entry.span.start)]


def of_runs(entries: Sequence[T], runs: Sequence[Span]) -> list[T]:
    """Those of `entries` (in order, disjoint) that have tokens in some run, in order."""
    found = (entry for run in runs for entry in inside(entries, run))
    return list({id(entry): entry for entry in found}.values())


def stretches_of(mask: np.ndarray) -> list[Span]:
    """Maximal stretches of set entries of a bool [n]."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [Span(start, end) for start, end in edges.reshape(-1, 2).tolist()]


@dataclass(frozen=True)
class Item:
    """One multimodal item (image or video) of a prompt."""

    index: int
    """Index in the request's `mm_features`."""
    span: Span
    """Its placeholder tokens."""
    ordinal: int
    """Items in front of it in the prompt."""
    key: str
    """Content key of the item's KV (`keys.segment_key`)."""
    encoder_key: str
    """Content key of its encoder rows (`keys.encoder_key`)."""
    embeds: tuple[Span, ...] | None = None
    """Offsets of the placeholder tokens that take encoder rows, in order; None: all of them do."""
    identifier: str = ""
    """What vLLM calls its content (`MultiModalFeatureSpec.identifier`)."""
    salt: str | None = None
    """The request's `cache_salt`."""

    @property
    def num_embeds(self) -> int:
        """Encoder rows of the item."""
        return self.rows_before(len(self.span))

    def rows_before(self, offset: int) -> int:
        """Encoder rows of the placeholder tokens in front of `offset`."""
        if self.embeds is None:
            return offset
        part = bisect_left(self.embeds, offset, key=lambda embeds: embeds.end)
        within = offset - self.embeds[part].start if part < len(self.embeds) else 0
        return self._rows_before[part] + max(0, within)

    @cached_property
    def _rows_before(self) -> Sequence[int]:
        """Of each of `embeds`, the rows in front of it."""
        return list(accumulate(map(len, self.embeds or ()), initial=0))


@dataclass(frozen=True)
class RequestContext:
    """What a worker needs to know once about a request with multimodal items."""

    req_id: str
    prompt_token_ids: list[int]
    """vLLM's own list: what it sends of a new request has it, too, and one pickle holds it once."""
    items: tuple[Item, ...]
    position_features: list[Any]
    """vLLM's `MultiModalFeatureSpec`s without their pixels: enough to compute M-RoPE positions."""


@dataclass(frozen=True)
class Stage:
    """Tokens of a reused item that are computed anew from one decoder layer on."""

    first_layer: int
    tokens: tuple[Span, ...]
    """In order, disjoint, not empty; a subset of the stage before."""


@dataclass(frozen=True)
class Blend:
    """A choice that is made while the prefill runs, by how far fresh keys are from the donor's."""

    check_layer: int
    """All tokens of the item are computed up to this layer; those that stay are chosen by it."""
    share: Fraction
    """Of the item's tokens, how many stay."""

    def count(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens stay."""
        return math.ceil(num_tokens * self.share)


@dataclass(frozen=True)
class ItemReuse:
    """How the KV of one known item is put together."""

    item: int
    donor: str
    """Content key of the stored segment."""
    span: Span
    """The item's tokens inside the claim."""
    stages: tuple[Stage, ...]
    """The first one begins at layer 0."""
    blend: Blend | None = None

    def computed_at(self, layer: int) -> tuple[Span, ...]:
        """Tokens that decoder layer `layer` computes, before any choice by `blend`."""
        return next(s.tokens for s in reversed(self.stages) if s.first_layer <= layer)

    def reused_at(self, layer: int) -> list[Span]:
        """Tokens whose KV of decoder layer `layer` is the donor's."""
        return uncovered(self.span, self.computed_at(layer))

    @property
    def num_recomputed(self) -> int:
        """Tokens that the first layer computes."""
        return sum(map(len, self.stages[0].tokens))

    @property
    def num_reused(self) -> int:
        """Tokens whose KV is the donor's in the last layer."""
        left = sum(map(len, self.stages[-1].tokens))
        return len(self.span) - (left if self.blend is None else self.blend.count(left))

    @property
    def first_reused(self) -> int | None:
        """First token whose KV may be the donor's in any layer; None: there is none."""
        if self.blend is not None and self.span:
            return self.span.start
        # The last stage computes the fewest tokens.
        reused = uncovered(self.span, self.stages[-1].tokens)
        return reused[0].start if reused else None


@dataclass(frozen=True)
class Layout:
    """Which tokens of a claim are reused and which are computed."""

    claim: Span
    """Tokens that vLLM takes as externally computed."""
    reused: tuple[ItemReuse, ...]
    """The known items, in prompt order; all other tokens of the claim are computed."""

    def runs_at(self, layer: int) -> list[Span]:
        """Maximal stretches of the claim that decoder layer `layer` computes, in order."""
        return uncovered(self.claim, [span for r in self.reused for span in r.reused_at(layer)])

    def most_rows(self, span: Span) -> int:
        """The most stretches that the computed ones of `span`'s tokens can form in any layer.

        Args:
            span: tokens that the first layer computes.
        """
        reused = inside(self.reused, span)
        layers = {stage.first_layer for reuse in reused for stage in reuse.stages[1:]}
        kept = 0
        for reuse in reused:
            if reuse.blend is not None:
                kept += reuse.blend.count(len(reuse.span.clip(span.start, span.end)))
                layers.add(0)
        most = 1
        for layer in layers:
            gone = [
                part.clip(span.start, span.end)
                for reuse in reused
                for part in ([reuse.span] if reuse.blend else reuse.reused_at(layer))
            ]
            most = max(most, len(uncovered(span, [part for part in gone if part])) + kept)
        return most

    @cached_property
    def num_computed(self) -> int:
        """Tokens that enter the sparse prefill."""
        return sum(map(len, self.runs_at(0)))

    @property
    def num_recomputed(self) -> int:
        """Tokens of known items that enter the sparse prefill."""
        return sum(reuse.num_recomputed for reuse in self.reused)

    @property
    def num_reused(self) -> int:
        """Tokens whose KV is a donor's in the last layer."""
        return sum(reuse.num_reused for reuse in self.reused)

    @property
    def first_reused(self) -> int | None:
        """The first token whose KV may be a donor's in any layer; None: there is none."""
        firsts = (reuse.first_reused for reuse in self.reused)
        return min((first for first in firsts if first is not None), default=None)

    @property
    def tokens_before_last(self) -> int:
        """Tokens between the last known item and the one before it, or the start of the claim."""
        ends = [self.claim.start, *(reuse.span.end for reuse in self.reused)]
        return self.reused[-1].span.start - ends[-2]

    def shorter(self) -> Layout | None:
        """The same up to the known item before the last one; None: there is none."""
        if len(self.reused) < 2:
            return None
        reused = self.reused[:-1]
        return replace(self, claim=Span(self.claim.start, reused[-1].span.end), reused=reused)


@dataclass(frozen=True)
class ReusePlan(Layout):
    """What the sparse prefill has to do for one request: fill the KV of its claim."""

    req_id: str
    block_ids: tuple[int, ...]
    """The request's KV blocks, from its first token on, covering the claim."""
    captures: dict[int, str] = field(default_factory=dict)
    """Item -> content key, of items that are computed completely inside the claim and stored."""
    encoder_inputs: dict[int, tuple[str, Any]] = field(default_factory=dict)
    """Item -> (modality, processed inputs), of all items in the claim: what is missing on a worker,
    although it was promised, is computed there. Plain vLLM would send them, too."""

    @cached_property
    def blocks(self) -> np.ndarray:
        """`block_ids` as int64."""
        return np.array(self.block_ids, dtype=np.int64)

    def without(self, item: int) -> ReusePlan:
        """The same plan with all of `item`'s tokens computed instead of reused."""
        return replace(self, reused=tuple(r for r in self.reused if r.item != item))


@dataclass(frozen=True)
class CapturePlan:
    """Tokens of an item whose KV vLLM's own forward writes in this step."""

    req_id: str
    item: int
    key: str
    span: Span
    block_ids: tuple[int, ...]
    """The request's KV blocks, from its first token on, covering `span`."""


@dataclass(frozen=True)
class CanonicalPlan:
    """An image to compute in a clean context and to store; no request waits for it."""

    context: RequestContext
    plan: ReusePlan
    """Computes all of its claim, in blocks that belong to nobody else."""


@dataclass(frozen=True)
class LookupPlan:
    """A segment that a request waits for, to be looked for in the tiers below host memory."""

    keys: tuple[str, ...]
    """Content keys that would do, best first. The first one also names the fetch."""
    kind: Kind
    num_tokens: int
    """Tokens, or encoder rows, that it must have."""


@dataclass(frozen=True)
class LoadPlan:
    """A segment that all ranks have found, to be brought to host memory."""

    key: str
    kind: Kind
    num_tokens: int
    """Tokens, or encoder rows, that it must have."""
    seconds_left: float
    """Until nobody waits for it any more."""


TTFTPart = Literal["queue", "media", "processor", "staging", "load", "sparse_prefill", "forward"]
"""A part of a request's time to first token; no two of them overlap."""

Outcome = Literal["hit", "miss", "late", "skipped", "failed"]
"""What became of looking for the KV of an item."""

TIERS = ("device", "cpu", *ADAPTER_TYPES)
"""Where segments may be, fastest first."""

NoAnswer = Literal["skipped", "failed"]
"""Why a tier did not say whether it has a segment: nobody asked it, or it did not answer."""


def slowest(*tiers: str | None) -> str | None:
    """The last of some tiers in `TIERS`; None where there is none."""
    return max((tier for tier in tiers if tier is not None), key=TIERS.index, default=None)


@dataclass(frozen=True)
class Found:
    """What a lookup found."""

    ranks: int
    """Ranks that this speaks for."""
    tiers: dict[str, str]
    """Content key of a segment that all of them found -> the slowest tier it is in."""
    no_answer: NoAnswer | None = None
    """Why they may have missed one; "failed" before "skipped"."""

    def merge(self, other: Found) -> Found:
        """The same lookup on further ranks."""
        both = self.tiers.keys() & other.tiers.keys()
        return Found(
            ranks=self.ranks + other.ranks,
            tiers={key: max(self.tiers[key], other.tiers[key], key=TIERS.index) for key in both},
            no_answer=_worse(self.no_answer, other.no_answer),
        )


@dataclass(frozen=True)
class Loaded:
    """How a load ended."""

    ranks: int
    """Ranks that this speaks for."""
    is_here: bool
    """All of them have the segment in host memory."""

    def merge(self, other: Loaded) -> Loaded:
        """The same load on further ranks."""
        return Loaded(self.ranks + other.ranks, self.is_here and other.is_here)


def _worse(a: NoAnswer | None, b: NoAnswer | None) -> NoAnswer | None:
    """The one that says less about what is stored."""
    return "failed" if "failed" in (a, b) else a or b


@dataclass(frozen=True)
class EncoderPlan(ECConnectorMetadata):
    """What a step does with encoder rows; scheduler side -> worker side.

    Both halves bring it, and it is carried out when the first of them does: what is dropped goes
    before anything is stored or loaded.
    """

    step: int = 0
    """Counts the plans; 0: nothing is to be done."""
    generation: int = 0
    """Of the weights, see `weights.generation`; it rises only with steps for which they are in
    place."""
    dropped: list[str] = field(default_factory=list)
    """Content keys of evicted rows."""
    loads: dict[str, str] = field(default_factory=dict)
    """vLLM's item identifier -> content key of the rows to load into its encoder cache."""
    inputs: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """vLLM's item identifier -> (modality, processed inputs) of the rows in `loads`: what turns out
    to be missing on a worker is computed there."""
    saves: dict[str, str] = field(default_factory=dict)
    """vLLM's item identifier -> content key to store its rows under, once they are computed."""


@dataclass
class StepPlan(KVConnectorMetadata):
    """Scheduler side -> worker side, for one step."""

    contexts: list[RequestContext] = field(default_factory=list)
    reuse: list[ReusePlan] = field(default_factory=list)
    captures: list[CapturePlan] = field(default_factory=list)
    canonical: list[CanonicalPlan] = field(default_factory=list)
    """To be done after vLLM's own forward."""
    cancelled: list[str] = field(default_factory=list)
    """Requests whose unfinished captures are given up (preempted)."""
    finished: list[str] = field(default_factory=list)
    lookups: list[LookupPlan] = field(default_factory=list)
    loads: list[LoadPlan] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens that vLLM's own forward computes in this step."""
    prefilling: tuple[str, ...] = ()
    """Requests of the step whose first token has not come out yet."""
    dropped_segments: list[str] = field(default_factory=list)
    """Content keys of evicted KV segments."""
    encoder: EncoderPlan = field(default_factory=EncoderPlan)


@dataclass
class PrefillFigures:
    """What the sparse prefill of one request did."""

    reused: dict[int, int] = field(default_factory=dict)
    """Item that was reused -> tokens whose KV is a donor's in the last layer."""
    recomputed_tokens: int = 0
    """Tokens of known items that the first layer computed anew."""
    computed_by_layer: tuple[int, ...] = ()
    """Tokens that each decoder layer computed, text included."""
    on_device: frozenset[int] = frozenset()
    """Reused items whose segments were in device memory already."""
    fallback: str | None = None
    """Why less was reused than planned, if so."""

    @property
    def reused_tokens(self) -> int:
        """Tokens whose KV is a donor's in the last layer."""
        return sum(self.reused.values())

    @property
    def computed_tokens(self) -> int:
        """Tokens that entered the sparse prefill."""
        return max(self.computed_by_layer, default=0)

    def merge(self, other: PrefillFigures) -> PrefillFigures:
        """Figures of two ranks: the least that was reused, the most that was computed."""
        return PrefillFigures(
            reused={
                item: min(self.reused[item], other.reused[item])
                for item in self.reused.keys() & other.reused.keys()
            },
            recomputed_tokens=max(self.recomputed_tokens, other.recomputed_tokens),
            computed_by_layer=tuple(
                map(max, zip_longest(self.computed_by_layer, other.computed_by_layer, fillvalue=0))
            ),
            on_device=self.on_device & other.on_device,
            fallback=self.fallback or other.fallback,
        )


class Laps(Protocol):
    """What parts of a step took."""

    def seconds(self) -> dict[TTFTPart, float]:
        """By part; nothing while the device is not through with all of them."""


@dataclass(frozen=True)
class TierState:
    """What one rank makes of a tier below host memory."""

    guard: str
    """Whether it is left alone because it only costs: "closed" (it is not), "half_open", "open"."""
    latency_seconds: float | None
    bytes_per_second: float | None
    """Of reading, as far as they are known."""


@dataclass(frozen=True)
class WorkerState:
    """What one rank weighs loads by."""

    tokens_per_second: float | None
    """Of vLLM's own prefill; None: not known yet."""
    tiers: dict[str, TierState]


@dataclass
class EncoderReport(ECConnectorWorkerMetadata):
    """What became of encoder rows in a step; worker side -> scheduler side.

    Part of the KV half's report; the encoder half's own where it runs alone.
    """

    stored: dict[str, int] = field(default_factory=dict)
    """Content key -> number of ranks that stored the rows."""
    lost: set[str] = field(default_factory=set)
    """Rows that could not be stored, or were missing at load, on some rank."""

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.stored or self.lost)

    def aggregate(self, other: ECConnectorWorkerMetadata) -> EncoderReport:
        """Merge the report of another rank."""
        assert isinstance(other, EncoderReport)
        return EncoderReport(_add_counts(self.stored, other.stored), self.lost | other.lost)


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Worker side -> scheduler side, for one step."""

    stored: dict[str, int] = field(default_factory=dict)
    """Content key of a KV segment -> number of ranks that stored it."""
    lost: set[str] = field(default_factory=set)
    """KV segments that could not be stored, or were missing or refused at load, on some rank."""
    encoder: EncoderReport = field(default_factory=EncoderReport)
    found: dict[str, Found] = field(default_factory=dict)
    """Lookups that ended, by name."""
    loaded: dict[str, Loaded] = field(default_factory=dict)
    """Loads that ended, by content key."""
    figures: dict[str, PrefillFigures] = field(default_factory=dict)
    """Request -> what its sparse prefill did."""
    prefilling: tuple[str, ...] = ()
    """As in the step's plan."""
    seconds: dict[TTFTPart, float] = field(default_factory=dict)
    """What the step's parts took; all claims of a step share its load and its sparse prefill."""
    laps: Laps | None = None
    """The same on a device that may not be through with it yet; see `settle`."""
    events: dict[str, int] = field(default_factory=dict)
    """What went wrong, and what happened in the tiers below host memory, by kind."""
    states: dict[int, WorkerState] = field(default_factory=dict)
    """By rank, from those that have anything else to tell."""

    def failed(self, what: str) -> None:
        """Count something that went wrong."""
        event = f"failed.{what}"
        self.events[event] = self.events.get(event, 0) + 1

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (
            self.stored
            or self.lost
            or not self.encoder.is_empty()
            or self.found
            or self.loaded
            or self.figures
            or self.prefilling
            or self.events
        )

    def settle(self) -> None:
        """Read what the step took, as far as it is known by now.

        A report leaves its worker when the step's tokens are on the host: the device is through.
        """
        laps, self.laps = self.laps, None
        try:
            self.seconds = laps.seconds() if laps is not None else self.seconds
        except Exception:  # they are only figures
            self.failed("pace")

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return vars(self)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        """Merge the report of another rank."""
        assert isinstance(other, StepReport)
        figures = dict(self.figures)
        for req_id, figure in other.figures.items():
            figures[req_id] = figures[req_id].merge(figure) if req_id in figures else figure
        found = dict(self.found)
        for name, part in other.found.items():
            found[name] = found[name].merge(part) if name in found else part
        loaded = dict(self.loaded)
        for key, end in other.loaded.items():
            loaded[key] = loaded[key].merge(end) if key in loaded else end
        return StepReport(
            found=found,
            loaded=loaded,
            stored=_add_counts(self.stored, other.stored),
            lost=self.lost | other.lost,
            encoder=self.encoder.aggregate(other.encoder),
            figures=figures,
            prefilling=self.prefilling or other.prefilling,
            seconds={
                part: max(own.get(part, 0.0) for own in (self.seconds, other.seconds))
                for part in self.seconds | other.seconds
            },
            events=_add_counts(self.events, other.events),
            states=self.states | other.states,
        )


def _add_counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in a.keys() | b.keys()}

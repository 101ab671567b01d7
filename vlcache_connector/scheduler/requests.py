"""The scheduler side's record of a live request with multimodal items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem

from ..config import ConfigError, RequestOptions, VLCacheConfig
from ..content import frontend_seconds, may_be_kept
from ..keys import encoder_key, segment_key
from ..protocol import (
    Item,
    Layout,
    Outcome,
    PrefillFigures,
    RequestContext,
    ReusePlan,
    Span,
    TTFTPart,
    slowest,
    stretches_of,
    uncovered,
)

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger(__name__)

_POSITION_FIELD_ENTRIES = 4096
"""Processor outputs up to this many entries (grids, timestamps) travel with a context; pixels
do not."""

_MODALITIES = ("image", "video")


Refusal = Literal["unsupported", "unsalted", "client_uuid"]
"""Why a request with images is left to plain vLLM."""


def refusal_of(request: Request, config: VLCacheConfig) -> Refusal | None:
    """Why `request`, which has images, is left to plain vLLM; None: it is not."""
    if (
        request.prompt_token_ids is None
        or request.lora_request is not None
        or request.prompt_embeds is not None
        or request.pooling_params is not None
        or request.resumable
        or any(feature.modality not in _MODALITIES for feature in request.mm_features)
    ):
        # Other weights, no token ids, all hidden states wanted, a prompt that still grows, or items
        # that no encoder takes (embeddings as a part of the prompt) or that nobody has tried.
        return "unsupported"
    if request.cache_salt is None and not config.share_unsalted:
        return "unsalted"
    if not all(may_be_kept(feature.identifier, config) for feature in request.mm_features):
        # What a client says an image is, is not what it is.
        return "client_uuid"
    previous_end = 0
    places = [feature.mm_position for feature in request.mm_features]
    for place in sorted(places, key=lambda place: place.offset):
        end = place.offset + place.length
        if place.offset < previous_end or end > len(request.prompt_token_ids):
            logger.warning(
                "VLCache: request %s has overlapping or overlong image placeholders; "
                "it is left to plain vLLM",
                request.request_id,
            )
            return "unsupported"
        previous_end = end
    return None


@dataclass
class CapturedItem:
    """An item whose KV is captured as vLLM's own forward computes it."""

    key: str
    """It will be stored under this key."""
    next_token: int


HeldBack = Literal["gate", "budget", "break_even"]
"""What keeps known items from being reused."""


@dataclass(frozen=True)
class Lookup:
    """The answer to where the KV of an item is."""

    item: Item
    outcome: Outcome
    tier: str | None = None
    """That it is in, or that gave no answer."""
    donor: str | None = None
    """Content key of the segment to reuse: with a hit."""
    held_back: HeldBack | None = None
    """Why what is known is not reused."""


@dataclass(frozen=True)
class Staged:
    """What a request may claim: all of it is in host memory, or on its way there in this step."""

    lookups: tuple[Lookup, ...]
    """Of the items that vLLM's prefix cache does not hold."""
    fetched_from: str | None = None
    """The slowest tier that anything was fetched from, encoder rows included."""
    layout: Layout | None = None
    """None: nothing is claimed."""
    encoded: tuple[int, ...] = ()
    """Items that the claim computes and that have no stored encoder rows."""

    def without_last(self, layout: Layout, held_back: HeldBack) -> Staged:
        """The last item of a layout is not reused."""
        last = layout.reused[-1].item
        lookups = (
            replace(look, outcome="skipped", held_back=held_back)
            if look.item.index == last
            else look
            for look in self.lookups
        )
        return replace(self, lookups=tuple(lookups))

    @property
    def held_back(self) -> HeldBack | None:
        """What keeps known items from being reused, if so."""
        return next((look.held_back for look in self.lookups if look.held_back), None)


@dataclass(frozen=True)
class Claimed:
    """What vLLM has allocated, for the workers to fill."""

    plan: ReusePlan
    tiers: dict[int, str]
    """Of the reused items' KV."""
    staged: Staged

    @property
    def tier(self) -> str | None:
        """The slowest tier that anything was found in."""
        return slowest(self.staged.fetched_from, *self.tiers.values())

    def loaded(self, figures: PrefillFigures) -> Loaded:
        """The workers have filled the claim."""
        tiers = {
            item: "device" if tier == "cpu" and item in figures.on_device else tier
            for item, tier in self.tiers.items()
        }
        return Loaded(self.plan, tiers, self.staged, figures)


@dataclass(frozen=True)
class Loaded(Claimed):
    """What the workers have filled, or computed instead."""

    figures: PrefillFigures


@dataclass
class TrackedRequest:
    """State of one request between its arrival and its end."""

    request: Request
    items: tuple[Item, ...]
    options: RequestOptions
    staged: Staged | None = None
    """What vLLM was told when it asked last."""
    claimed: Claimed | None = None
    """What it took last; once the workers have reported, a `Loaded`."""
    capturing: dict[int, CapturedItem] = field(default_factory=dict)
    """Items under capture."""
    approximate_prefix_tokens: int = 0
    """That vLLM's prefix cache had of the prompt, behind the first one whose KV is approximate."""
    context_sent: bool = False
    seconds: dict[TTFTPart, float] = field(default_factory=dict)
    """What its time to first token went into, so far and as far as it can be known."""

    @classmethod
    def of(
        cls,
        request: Request,
        config: VLCacheConfig,
        fingerprint: str,
        read_options: Callable[[Mapping[str, Any] | None], RequestOptions],
    ) -> TrackedRequest:
        """Track `request`, which has images and is not refused.

        Args:
            fingerprint: `identity.model_fingerprint`.
            read_options: reads `kv_transfer_params`; raises ConfigError where they are not valid.
        """
        features = sorted(
            enumerate(request.mm_features), key=lambda entry: entry[1].mm_position.offset
        )
        items, tokens = [], request.prompt_token_ids
        assert tokens is not None  # or it was refused
        for ordinal, (index, feature) in enumerate(features):
            position, identifier = feature.mm_position, feature.identifier
            embeds, text = None, []
            if position.is_embed is not None:
                embeds = tuple(stretches_of(position.is_embed.numpy()))
                text = uncovered(Span(0, position.length), embeds)
            items.append(
                Item(
                    index=index,
                    ordinal=ordinal,
                    span=Span(position.offset, position.offset + position.length),
                    key=segment_key(
                        identifier,
                        fingerprint=fingerprint,
                        donor=config.donor,
                        salt=request.cache_salt,
                        text=[
                            (offset, tokens[position.offset + offset])
                            for part in text
                            for offset in range(part.start, part.end)
                        ],
                    ),
                    encoder_key=encoder_key(identifier, fingerprint=fingerprint),
                    embeds=embeds,
                    identifier=identifier,
                    salt=request.cache_salt,
                )
            )
        try:
            options = read_options(request.kv_transfer_params)
        except ConfigError as error:
            logger.warning("VLCache: request %s: %s; ignored", request.request_id, error)
            options = RequestOptions()
        return cls(
            request=request,
            items=tuple(items),
            options=options,
            seconds=frontend_seconds(request),
        )

    @property
    def is_prefilling(self) -> bool:
        """Its first token has not come out, and takes more of the prompt than is computed."""
        request = self.request
        is_short = request.num_computed_tokens < request.num_prompt_tokens
        return is_short and request.num_output_tokens == 0

    def admitted(self, now: float, staging: float | None) -> None:
        """It is scheduled, for the first time if it was never preempted.

        Args:
            now: seconds since the epoch, as vLLM stamps arrivals.
            staging: seconds that it waited for what is staged; None: it had nothing to wait for.
        """
        if self.request.num_preemptions:
            return
        if staging is not None:
            self.seconds["staging"] = staging
        queue = now - self.request.arrival_time - sum(self.seconds.values())
        if queue >= 0:  # or the clocks of frontend and engine differ
            self.seconds["queue"] = queue

    def took(self, seconds: Mapping[TTFTPart, float], *, has_claim: bool) -> None:
        """A step of its prefill took so long.

        Args:
            seconds: of the step's parts, as far as they are known.
            has_claim: whether a claim of its own was filled in the step.
        """
        for part, more in seconds.items():
            if has_claim or part == "forward":
                self.seconds[part] = self.seconds.get(part, 0.0) + more

    @property
    def is_past_items(self) -> bool:
        """All items are computed."""
        return self.request.num_computed_tokens >= self.items[-1].span.end

    def item(self, index: int) -> Item:
        """The item at `index` of the request's `mm_features`."""
        return next(item for item in self.items if item.index == index)

    def context(self) -> RequestContext:
        """What workers need to know once."""
        assert self.request.prompt_token_ids is not None
        return RequestContext(
            req_id=self.request.request_id,
            prompt_token_ids=self.request.prompt_token_ids,
            items=self.items,
            position_features=[_without_pixels(f) for f in self.request.mm_features],
        )

    @property
    def tier(self) -> str | None:
        """The slowest tier that anything it reuses was found in."""
        return self.claimed.tier if self.claimed is not None else None

    def report(self) -> dict[str, Any]:
        """Figures for the client (`kv_transfer_params.vlcache` of the response)."""
        figures = PrefillFigures()
        if isinstance(self.claimed, Loaded):
            figures = self.claimed.figures
        return {
            "reused_tokens": figures.reused_tokens,
            "recomputed_tokens": figures.recomputed_tokens,
            "computed_tokens": figures.computed_tokens,
            "approximate_prefix_tokens": self.approximate_prefix_tokens,
            "computed_token_layers": sum(figures.computed_by_layer),
            "tier": self.tier,
            "ttft_part_seconds": {part: round(took, 6) for part, took in self.seconds.items()},
            "fallback": figures.fallback or (self.staged.held_back if self.staged else None),
        }


def _without_pixels(feature: MultiModalFeatureSpec) -> MultiModalFeatureSpec:
    data = None
    if feature.data is not None:
        data = MultiModalKwargsItem(
            {
                name: element
                for name, element in feature.data.items()
                if not isinstance(element.data, torch.Tensor)
                or element.data.numel() <= _POSITION_FIELD_ENTRIES
            }
        )
    return MultiModalFeatureSpec(
        data=data,
        modality=feature.modality,
        identifier=feature.identifier,
        mm_position=feature.mm_position,
    )

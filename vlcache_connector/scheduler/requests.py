"""The scheduler side's record of a live request with multimodal items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem

from ..config import ConfigError, RequestOptions, VLCacheConfig
from ..frontend import is_content_hash
from ..keys import encoder_key, segment_key
from ..protocol import Item, PrefillFigures, RequestContext, ReusePlan, Span

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
    if not all(is_content_hash(feature.identifier) for feature in request.mm_features):
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


@dataclass
class TrackedRequest:
    """State of one request between its arrival and its end."""

    request: Request
    items: tuple[Item, ...]
    options: RequestOptions
    wanted: list[Item] = field(default_factory=list)
    """Items whose KV is looked for: vLLM's prefix cache does not hold all of it."""
    pending: ReusePlan | None = None
    """Planned in `get_num_new_matched_tokens`, not yet allocated."""
    loading: ReusePlan | None = None
    """Allocated, and carried out by the workers."""
    capturing: dict[int, CapturedItem] = field(default_factory=dict)
    """Items under capture."""
    context_sent: bool = False
    tiers: dict[int, str] = field(default_factory=dict)
    """Tiers that the KV of the items under `loading` was found in."""
    tier: str | None = None
    """Slowest tier that anything was found in, encoder rows included."""
    fetch_seconds: float = 0.0
    """How long it waited for disk and Redis."""
    figures: PrefillFigures | None = None
    is_gated: bool = False
    """The gate kept known images from being reused."""

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
            fingerprint: `support.model_fingerprint`.
            read_options: reads `kv_transfer_params`; raises ConfigError where they are not valid.
        """
        features = sorted(
            enumerate(request.mm_features), key=lambda entry: entry[1].mm_position.offset
        )
        items = []
        for ordinal, (index, feature) in enumerate(features):
            position, identifier = feature.mm_position, feature.identifier
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
                    ),
                    encoder_key=encoder_key(identifier, fingerprint=fingerprint),
                    is_embed=None
                    if position.is_embed is None
                    else tuple(position.is_embed.tolist()),
                )
            )
        try:
            options = read_options(request.kv_transfer_params)
        except ConfigError as error:
            logger.warning("VLCache: request %s: %s; ignored", request.request_id, error)
            options = RequestOptions()
        return cls(request=request, items=tuple(items), options=options)

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
            prompt_token_ids=list(self.request.prompt_token_ids),
            items=self.items,
            position_features=[_without_pixels(f) for f in self.request.mm_features],
        )

    def report(self) -> dict[str, Any]:
        """Figures for the client (`kv_transfer_params.vlcache` of the response)."""
        figures = self.figures or PrefillFigures()
        return {
            "reused_tokens": figures.reused_tokens,
            "recomputed_tokens": figures.recomputed_tokens,
            "computed_tokens": figures.computed_tokens,
            "computed_token_layers": sum(figures.computed_by_layer),
            "tier": self.tier,
            "fetch_seconds": round(self.fetch_seconds, 6),
            "load_seconds": round(figures.load_seconds, 6),
            "sparse_prefill_seconds": round(figures.sparse_prefill_seconds, 6),
            "fallback": figures.fallback or ("gate" if self.is_gated else None),
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

"""Canonical donors: an image's stored KV computed once in a clean context, off the critical path.

The image stands alone behind the model's usual opening tokens, so its KV depends on the image only:
not on which request showed it first, and on no text of another request.

vLLM seams: `BlockPool.get_new_blocks` and `free_blocks` (`vllm/v1/core/block_pool.py`) for the
blocks that the computation needs. They are free again at once: it runs behind the step's own
forward, and whoever gets them next writes to them in a later step, on the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.multimodal.inputs import PlaceholderRange
from vllm.tokenizers import cached_tokenizer_from_config

from ..protocol import CanonicalPlan, Item, RequestContext, ReusePlan, Span
from .index import ResidencyIndex

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

logger = init_logger(__name__)

_MAX_PENDING = 64
_PATIENCE_STEPS = 16
"""Steps that a new image waits for one in which no request is waiting for its first token."""
_MAX_POOL_SHARE = 0.5
"""Of the free blocks of the KV cache, how many may be taken for a step."""


def opening_tokens(model_config: ModelConfig) -> list[int]:
    """Tokens of the model's chat template in front of a prompt's first image."""
    config = model_config.hf_config
    image_token = getattr(config, "image_token_id", None) or getattr(
        config, "image_token_index", None
    )
    message = {"role": "user", "content": [{"type": "image"}]}
    try:
        tokens = cached_tokenizer_from_config(model_config).apply_chat_template(
            [message], tokenize=True, return_dict=False
        )
        return list(tokens[: tokens.index(image_token)])
    except Exception as error:
        logger.warning("VLCache: no opening tokens for canonical donors (%s)", error)
        start = getattr(config, "vision_start_token_id", None)
        return [] if start is None else [start]


@dataclass
class _Pending:
    item: Item
    context: RequestContext
    key: str
    steps: int = 0


class CanonicalDonors:
    """New images that wait for their canonical computation.

    Args:
        opening: token ids in front of the image.
        encoder_rows: an image is computed only while its encoder rows are stored.
        give_up: told the key of a segment that will not be stored.
    """

    def __init__(
        self,
        opening: Sequence[int],
        encoder_rows: ResidencyIndex,
        *,
        block_size: int,
        give_up: Callable[[str], None],
    ) -> None:
        self._opening = list(opening)
        self._encoder_rows = encoder_rows
        self._block_size = block_size
        self._give_up = give_up
        self._pending: dict[str, _Pending] = {}

    @property
    def is_full(self) -> bool:
        """Whether no further image can wait."""
        return len(self._pending) >= _MAX_PENDING

    def add(
        self, item: Item, key: str, token_ids: Sequence[int], feature: MultiModalFeatureSpec
    ) -> None:
        """Compute `item` later, and store its KV under the reserved `key`.

        Args:
            token_ids: the item's placeholder tokens.
            feature: without pixels.
        """
        start = len(self._opening)
        alone = replace(item, index=0, ordinal=0, span=Span(start, start + len(item.span)))
        place = PlaceholderRange(
            offset=start, length=len(item.span), is_embed=feature.mm_position.is_embed
        )
        context = RequestContext(
            req_id=f"vlcache-canonical-{key}",
            prompt_token_ids=[*self._opening, *token_ids],
            items=(alone,),
            position_features=[replace(feature, mm_position=place)],
        )
        self._pending[key] = _Pending(alone, context, key)

    def next_plan(self, pool: BlockPool, *, is_quiet: bool) -> CanonicalPlan | None:
        """One image to compute in this step, after vLLM's own forward.

        Args:
            is_quiet: no request waits for its first token in this step.
        """
        for pending in list(self._pending.values()):
            pending.steps += 1
            if not self._encoder_rows.is_ready(pending.item.encoder_key):
                # The rows of a new image arrive with the report of the step that computed them.
                if pending.steps > _PATIENCE_STEPS:
                    self._drop(pending)
                continue
            if not (is_quiet or pending.steps > _PATIENCE_STEPS):
                continue
            needed = -(-pending.item.span.end // self._block_size)
            if needed > _MAX_POOL_SHARE * pool.get_num_free_blocks():
                if pending.steps > 4 * _PATIENCE_STEPS:
                    self._drop(pending)
                continue
            blocks = pool.get_new_blocks(needed)
            pool.free_blocks(reversed(blocks))
            return self._start(pending, blocks)
        return None

    def _start(self, pending: _Pending, blocks: list[KVCacheBlock]) -> CanonicalPlan:
        del self._pending[pending.key]
        self._encoder_rows.promise(pending.item.encoder_key)
        plan = ReusePlan(
            req_id=pending.context.req_id,
            claim=Span(0, pending.item.span.end),
            reused=(),
            captures={0: pending.key},
            block_ids=tuple(block.block_id for block in blocks),
        )
        return CanonicalPlan(pending.context, plan)

    def _drop(self, pending: _Pending) -> None:
        del self._pending[pending.key]
        self._give_up(pending.key)

    def clear(self) -> None:
        """Forget what has not begun."""
        for pending in list(self._pending.values()):
            self._drop(pending)

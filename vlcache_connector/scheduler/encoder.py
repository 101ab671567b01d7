"""The encoder half's scheduler side: which encoder outputs are loaded and which are kept.

vLLM seams: the scheduler-side methods of `ECConnectorBase`
(`vllm/distributed/ec_transfer/ec_connector/base.py`), called by `vllm/v1/core/sched/scheduler.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import VLCacheConfig
from ..content import may_be_kept
from ..keys import encoder_key
from ..protocol import EncoderStepPlan, EncoderStepReport
from .index import ResidencyIndex

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class EncoderSchedulerSide:
    """Answers vLLM's encoder scheduling from the index of stored encoder rows.

    Args:
        config: VLCache's options.
        fingerprint: `identity.model_fingerprint`.
        row_bytes: bytes of one encoder output row.
        index: of the stored encoder rows, shared with the KV half.
        num_ranks: tensor-parallel ranks.
        can_store: whether new rows may be stored.
    """

    def __init__(
        self,
        config: VLCacheConfig,
        *,
        fingerprint: str,
        row_bytes: int,
        index: ResidencyIndex,
        num_ranks: int,
        can_store: bool,
    ) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._row_bytes = row_bytes
        self._index = index
        self._num_ranks = num_ranks
        self._can_store = can_store
        self._requests: dict[str, Request] = {}
        self._loads: dict[str, str] = {}

    def _key(self, identifier: str) -> str:
        return encoder_key(identifier, fingerprint=self._fingerprint)

    def has_cache_item(self, identifier: str) -> bool:
        """Whether all ranks hold the rows; they stay until the step that was asked for is over."""
        key = self._key(identifier)
        if not may_be_kept(identifier, self._config) or not self._index.is_ready(key):
            return False
        self._index.promise(key)
        return True

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """vLLM made room for an item's encoder output, computed in this step or loaded."""
        self._requests[request.request_id] = request
        identifier = request.mm_features[index].identifier
        key = self._key(identifier)
        if self._index.is_ready(key):
            self._index.promise(key)
            self._loads[identifier] = key

    def build_step_plan(self, output: SchedulerOutput) -> EncoderStepPlan:
        """What the workers load and store in this step."""
        saves = {}
        for req_id, indices in output.scheduled_encoder_inputs.items():
            for index in indices:
                feature = self._requests[req_id].mm_features[index]
                key = self._key(feature.identifier)
                num_bytes = feature.mm_position.get_num_embeds() * self._row_bytes
                self._loads.pop(feature.identifier, None)
                is_kept = self._can_store and may_be_kept(feature.identifier, self._config)
                if is_kept and self._index.reserve(key, num_bytes):
                    saves[feature.identifier] = key
        plan = EncoderStepPlan(loads=self._loads, saves=saves, dropped=self._index.take_evicted())
        self._loads, self._requests = {}, {}
        return plan

    def update_from_report(self, report: EncoderStepReport) -> None:
        """Take in what the workers stored."""
        for key in report.stored:
            self._index.stored(key, self._num_ranks)
        for key in report.lost:
            self._index.lost(key)

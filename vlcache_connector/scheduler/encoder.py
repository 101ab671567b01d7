"""Which encoder rows the workers hold: one owner for the encoder half and the KV half.

vLLM seams: the scheduler-side methods of `ECConnectorBase`
(`vllm/distributed/ec_transfer/ec_connector/base.py`), called by `vllm/v1/core/sched/scheduler.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import weights
from ..config import VLCacheConfig
from ..content import may_be_kept
from ..halves import OnePerEngine
from ..identity import model_fingerprint
from ..keys import encoder_key
from ..protocol import EncoderPlan, EncoderReport
from ..support import can_store, config_of, encoder_width, model_dtype
from .index import ResidencyIndex

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class EncoderRows:
    """Answers vLLM's encoder scheduling, and plans what a step does with encoder rows.

    Args:
        config: VLCache's options.
        fingerprint: `identity.model_fingerprint`.
        row_bytes: bytes of one encoder output row.
        index: of the rows.
        can_store: whether new rows may be stored.
    """

    def __init__(
        self,
        config: VLCacheConfig,
        *,
        fingerprint: str,
        row_bytes: int,
        index: ResidencyIndex,
        can_store: bool,
    ) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._row_bytes = row_bytes
        self._can_store = can_store
        self.index = index
        self._loads: dict[str, str] = {}
        self._inputs: dict[str, tuple[str, Any]] = {}
        self._saves: dict[str, str] = {}
        self.num_encoded = 0
        """Rows that vLLM's own encoder computes in the step that is being scheduled."""
        self._step = 0
        self._generation = weights.generation()
        self._planned: tuple[SchedulerOutput | None, EncoderPlan] = (None, EncoderPlan())

    def num_bytes(self, num_embeds: int) -> int:
        """Bytes of so many rows."""
        return num_embeds * self._row_bytes

    def has_cache_item(self, identifier: str) -> bool:
        """Whether all ranks hold the rows; they stay until the step that was asked for is over."""
        return self._may_be_kept(identifier) and self.promise(self._key(identifier))

    def is_ready(self, identifier: str) -> bool:
        """Whether all ranks hold the rows."""
        return self._may_be_kept(identifier) and self.index.is_ready(self._key(identifier))

    def promise(self, key: str) -> bool:
        """Whether all ranks hold the rows; they stay until the step that is planned is over."""
        if not self.index.is_ready(key):
            return False
        self.index.promise(key)
        return True

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """vLLM made room for an item's encoder output, computed in this step or loaded."""
        feature = request.mm_features[index]
        if self.has_cache_item(feature.identifier):
            self._loads[feature.identifier] = self._key(feature.identifier)
            self._inputs[feature.identifier] = (feature.modality, feature.data)
        else:
            self.num_encoded += feature.mm_position.get_num_embeds()
            self.keep(feature)

    def keep(self, feature: MultiModalFeatureSpec) -> None:
        """An item is encoded in this step: have its rows stored, if there is room for them."""
        key = self._key(feature.identifier)
        num_bytes = self.num_bytes(feature.mm_position.get_num_embeds())
        is_kept = self._can_store and self._may_be_kept(feature.identifier)
        if is_kept and self.index.reserve(key, num_bytes):
            self._saves[feature.identifier] = key

    def reset(self) -> None:
        """Forget all rows; those of the step that is being scheduled as well."""
        self.index.clear()
        self._loads, self._saves = {}, {}

    def plan(self, output: SchedulerOutput, *, fetches: bool = False) -> EncoderPlan:
        """What the workers do with encoder rows in this step; the same plan for both halves.

        Args:
            output: of the step; tells it from others.
            fetches: something is looked for below host memory in this step.
        """
        if self._planned[0] is not output:
            self.index.settle()
            self._step += 1
            if fetches or output.total_num_scheduled_tokens:
                self._generation = weights.generation()
            plan = EncoderPlan(
                self._step,
                self._generation,
                dropped=self.index.take_evicted(),
                loads=self._loads,
                inputs=self._inputs,
                saves=self._saves,
            )
            self._loads, self._inputs, self._saves, self.num_encoded = {}, {}, {}, 0
            self._planned = output, plan
        return self._planned[1]

    def update_from_report(self, report: EncoderReport) -> None:
        """Take in what the workers stored and lost."""
        for key, ranks in report.stored.items():
            self.index.stored(key, ranks)
        for key in report.lost:
            self.index.lost(key)

    def _may_be_kept(self, identifier: str) -> bool:
        return may_be_kept(identifier, self._config)

    def _key(self, identifier: str) -> str:
        return encoder_key(identifier, fingerprint=self._fingerprint)


def _make(vllm_config: VllmConfig) -> EncoderRows:
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    return EncoderRows(
        config_of(vllm_config),
        fingerprint=model_fingerprint(vllm_config),
        row_bytes=encoder_width(vllm_config) * model_dtype(vllm_config).itemsize,
        index=ResidencyIndex(
            config_of(vllm_config).encoder_cpu_bytes, num_ranks, "encoder_cpu_bytes"
        ),
        can_store=can_store(vllm_config),
    )


ENCODER_ROWS = OnePerEngine(_make)

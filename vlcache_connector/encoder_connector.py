"""`VLCacheEncoderConnector`: the encoder half, a thin face over the encoder rows' two sides.

vLLM seam: `ECConnectorBase` (`vllm/distributed/ec_transfer/ec_connector/base.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform

from . import weights
from .protocol import EncoderPlan, EncoderReport
from .scheduler.encoder import ENCODER_ROWS, EncoderRows
from .support import can_store, no_content_hashes, own_transfer
from .worker.loaded import loaded_model
from .worker.model import encode
from .worker.rank import RANK, Rank, close_rank

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ECConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)


class VLCacheEncoderConnector(ECConnectorBase):
    """Encoder outputs cached by content: a known image costs no vision encoder pass.

    `VLCacheConnector` turns it on by itself. Alone, without KV reuse: `--ec-transfer-config
    '{"ec_connector": "VLCacheEncoderConnector", "ec_role": "ec_both"}'`.
    """

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self._rows: EncoderRows | None = None
        if role == ECConnectorRole.SCHEDULER:
            if own_transfer(vllm_config) is None and (reason := no_content_hashes(vllm_config)):
                logger.warning("VLCache keeps no encoder outputs: %s", reason)
            self._rows = ENCODER_ROWS.get(vllm_config)
            weights.listen(self._rows.reset)

    @property
    def is_producer(self) -> bool:
        """Whether vLLM hands over new rows."""
        return can_store(self._vllm_config)

    def shutdown(self) -> None:
        """Give back memory and threads."""
        if self._rows is not None:
            ENCODER_ROWS.take(self._vllm_config)
        else:
            close_rank(self._vllm_config)

    # -- worker side ------------------------------------------------------------------------

    @property
    def _rank(self) -> Rank:
        """Asked for when it is needed, which is after the model is loaded."""
        return RANK.get(self._vllm_config)

    def bind_connector_metadata(self, connector_metadata: ECConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, EncoderPlan)
        self._rank.encoder_rows.begin_step(connector_metadata)

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Bring back the encoder outputs that this step needs."""
        self._rank.encoder_rows.load(self._plan, encoder_cache, self._encode)

    def _encode(self, modality: str, data: Any) -> torch.Tensor:
        device = torch.device(current_platform.device_type)
        return encode(loaded_model(self._vllm_config), modality, data, device)

    def save_caches(
        self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any
    ) -> None:
        """Keep a new encoder output."""
        key = self._plan.saves.get(mm_hash)
        if key is not None:
            self._rank.encoder_rows.put(key, encoder_cache[mm_hash])

    @property
    def _plan(self) -> EncoderPlan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, EncoderPlan)
        return plan

    def build_connector_worker_meta(self) -> EncoderReport | None:
        """What this rank stored and lost; where the KV half runs, its report says so."""
        if self._rank.has_kv_half:
            return None
        report = self._rank.encoder_rows.take_report()
        return None if report.is_empty() else report

    # -- scheduler side ---------------------------------------------------------------------

    def has_cache_item(self, identifier: str) -> bool:
        """Whether vLLM may skip the encoder for an item."""
        return self._rows is not None and self._rows.has_cache_item(identifier)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """vLLM made room for an item's encoder output."""
        if self._rows is not None:
            self._rows.update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> EncoderPlan:
        """The step's plan for the workers.

        A step that computes nothing has none: model runner V1 does not show it to this half. What
        has changed waits for the next one, unless the KV half tells the workers.
        """
        if self._rows is None or scheduler_output.total_num_scheduled_tokens == 0:
            return EncoderPlan()
        return self._rows.plan(scheduler_output)

    def update_connector_output(self, connector_output: ECConnectorOutput) -> None:
        """Reports of the workers."""
        report = connector_output.ec_connector_worker_meta
        if self._rows is not None and isinstance(report, EncoderReport):
            self._rows.update_from_report(report)

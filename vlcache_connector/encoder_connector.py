"""`VLCacheEncoderConnector`: the encoder half, a thin face over its two sides.

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
from vllm.platforms import current_platform

from .protocol import EncoderStepPlan, EncoderStepReport
from .scheduler import indices
from .scheduler.encoder import EncoderSchedulerSide
from .support import model_fingerprint
from .worker.encoder import EncoderWorkerSide
from .worker.storage import close_storage, get_storage

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ECConnectorOutput
    from vllm.v1.request import Request


class VLCacheEncoderConnector(ECConnectorBase):
    """Encoder outputs cached by content: a known image costs no vision encoder pass.

    `VLCacheConnector` turns it on by itself. Alone, without KV reuse: `--ec-transfer-config
    '{"ec_connector": "VLCacheEncoderConnector", "ec_role": "ec_both"}'`.
    """

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self._scheduler: EncoderSchedulerSide | None = None
        self._worker: EncoderWorkerSide | None = None
        if role == ECConnectorRole.SCHEDULER:
            _, encoder_rows = indices.get_indices(vllm_config)
            self._scheduler = EncoderSchedulerSide(
                fingerprint=model_fingerprint(vllm_config),
                row_bytes=indices.encoder_row_bytes(vllm_config),
                index=encoder_rows,
                num_ranks=vllm_config.parallel_config.tensor_parallel_size,
                can_store=self.is_producer,
            )
        else:
            self._worker = EncoderWorkerSide(
                lambda: get_storage(vllm_config), torch.device(current_platform.device_type)
            )

    @property
    def is_producer(self) -> bool:
        """Whether new rows are stored: beside the KV half, its `kv_role` decides."""
        kv = self._vllm_config.kv_transfer_config
        if kv is not None and kv.kv_connector == "VLCacheConnector":
            return bool(kv.is_kv_producer)
        return super().is_producer

    def shutdown(self) -> None:
        """Give back memory and threads."""
        if self._worker is not None:
            close_storage(self._vllm_config)
        else:
            indices.drop_indices(self._vllm_config)

    # -- worker side ------------------------------------------------------------------------

    def bind_connector_metadata(self, connector_metadata: ECConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            assert isinstance(connector_metadata, EncoderStepPlan)
            self._worker.begin_step(connector_metadata)

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Bring back the encoder outputs that this step needs."""
        if self._worker is not None:
            self._worker.load(encoder_cache)

    def save_caches(
        self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any
    ) -> None:
        """Keep a new encoder output."""
        if self._worker is not None:
            self._worker.save(mm_hash, encoder_cache[mm_hash])

    def build_connector_worker_meta(self) -> EncoderStepReport | None:
        """What the ranks stored."""
        return None if self._worker is None else self._worker.take_report()

    # -- scheduler side ---------------------------------------------------------------------

    def has_cache_item(self, identifier: str) -> bool:
        """Whether vLLM may skip the encoder for an item."""
        return self._scheduler is not None and self._scheduler.has_cache_item(identifier)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """vLLM made room for an item's encoder output."""
        if self._scheduler is not None:
            self._scheduler.update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> EncoderStepPlan:
        """The step's plan for the workers."""
        if self._scheduler is None:
            return EncoderStepPlan()
        return self._scheduler.build_step_plan(scheduler_output)

    def update_connector_output(self, connector_output: ECConnectorOutput) -> None:
        """Reports of the workers."""
        report = connector_output.ec_connector_worker_meta
        if self._scheduler is not None and isinstance(report, EncoderStepReport):
            self._scheduler.update_from_report(report)

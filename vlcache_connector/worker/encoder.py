"""The encoder half's worker side: keeps encoder outputs and brings them back.

vLLM seams: the worker-side methods of `ECConnectorBase`
(`vllm/distributed/ec_transfer/ec_connector/base.py`), called by the model runners.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.logger import init_logger

from ..protocol import EncoderStepPlan, EncoderStepReport
from .ranks import all_ranks_have
from .storage import Storage

logger = init_logger(__name__)


class EncoderWorkerSide:
    """Stores and loads encoder rows on one rank.

    Args:
        storage: gives this rank's storage; asked for when it is first needed, which is after
            the model is loaded.
        device: of the model.
    """

    def __init__(self, storage: Callable[[], Storage], device: torch.device) -> None:
        self._get_storage = storage
        self._device = device
        self._plan = EncoderStepPlan()
        self._saved: dict[str, bool] = {}

    def begin_step(self, plan: EncoderStepPlan) -> None:
        """Take in the step's plan and drop what was evicted."""
        self._plan = plan
        self._saved = dict.fromkeys(plan.saves.values(), False)
        for key in plan.dropped:
            self._get_storage().remove(key, "encoder")

    def load(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Put the promised rows into vLLM's encoder cache (identifier -> rows [n, width])."""
        for identifier, key in self._plan.loads.items():
            if identifier in encoder_cache:
                continue
            segment = self._get_storage().get(key, "encoder")
            if segment is None:
                # vLLM ends the step with "Encoder cache miss" when it needs these rows.
                logger.error("VLCache: promised encoder rows %s are not there", key[:16])
                continue
            encoder_cache[identifier] = segment.rows().to(
                self._device, non_blocking=True, copy=True
            )
            self._get_storage().leaving.add(segment.release)

    def save(self, identifier: str, rows: torch.Tensor) -> None:
        """Keep a new encoder output, rows [n, width]."""
        key = self._plan.saves.get(identifier)
        if key is not None:
            self._saved[key] = self._get_storage().put_encoder(key, rows)

    def take_report(self) -> EncoderStepReport | None:
        """What all ranks stored in this step; vLLM hands on the first rank's report only."""
        saved, self._saved = self._saved, {}
        if not saved:
            return None
        agreed = dict(zip(saved, all_ranks_have(list(saved.values())), strict=True))
        return EncoderStepReport(
            stored={key for key, ok in agreed.items() if ok},
            lost={key for key, ok in agreed.items() if not ok},
        )

"""The encoder rows of one rank: kept, given back to vLLM and to the sparse prefill, removed.

vLLM seams: the worker-side methods of `ECConnectorBase`
(`vllm/distributed/ec_transfer/ec_connector/base.py`), called by the model runners.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from ..protocol import EncoderPlan, EncoderReport
from ..storage.header import SegmentId
from ..storage.segment import Segment
from .ranks import all_ranks_have, in_lockstep
from .storage import Storage

logger = init_logger(__name__)

Encode = Callable[[str, Any], torch.Tensor]
"""Runs the vision encoder on one item, by modality and processed inputs: rows [n, width]."""


class EncoderRows:
    """Carries out the plans for encoder rows, for the encoder half and the KV half.

    Args:
        storage: of this rank.
        device: of the model.
    """

    def __init__(self, storage: Storage, device: torch.device) -> None:
        self._storage = storage
        self._device = device
        self._step = 0
        self._awaited: set[str] = set()
        """Content keys that are to be stored in this step."""
        self._report = EncoderReport()

    def begin_step(self, plan: EncoderPlan) -> None:
        """Remove what was evicted, before anything is stored; nothing for the half that is second.

        vLLM calls the encoder half first in steps that compute something, and the KV half first,
        or alone, in others.
        """
        if plan.step <= self._step:
            return
        self._step = plan.step
        self._storage.follow(plan.generation)
        self._awaited = set(plan.saves.values())
        for key in plan.dropped:
            try:
                self._storage.remove(SegmentId(key, "encoder"))
            except Exception:
                logger.exception("VLCache: encoder rows %s could not be removed", key[:16])

    def load(
        self, plan: EncoderPlan, encoder_cache: dict[str, torch.Tensor], encode: Encode
    ) -> None:
        """Put the promised rows into vLLM's encoder cache (identifier -> rows [n, width]).

        Rows that are missing on any rank are computed on all of them.
        """
        wanted = [name for name in plan.loads if name not in encoder_cache]
        with in_lockstep():
            found: dict[str, torch.Tensor] = {}
            for name in wanted:
                try:
                    found[name] = self._on_device(plan.loads[name])
                except Exception:
                    logger.exception("VLCache: promised encoder rows are not there; computing them")
                    self.settled(plan.loads[name], is_stored=False)
            everywhere = all_ranks_have([name in found for name in wanted])
            for name, ok in zip(wanted, everywhere, strict=True):
                encoder_cache[name] = found[name] if ok else encode(*plan.inputs[name])

    def _on_device(self, key: str) -> torch.Tensor:
        segment = self._storage.get(SegmentId(key, "encoder"))
        if segment is None:
            raise KeyError(key)
        parts = segment.rows()
        shape = (segment.info.num_tokens, parts[0].shape[1])
        rows = torch.empty(shape, dtype=parts[0].dtype, device=self._device)
        for target, part in zip(rows.split([len(part) for part in parts]), parts, strict=True):
            target.copy_(part, non_blocking=True)
        self._storage.leaving.add(segment.release)
        return rows

    def get(self, key: str, num_rows: int) -> Segment | None:
        """Open stored rows, so many of them; the caller has to release them."""
        segment = self._storage.get(SegmentId(key, "encoder"))
        if segment is not None and segment.info.num_tokens == num_rows:
            return segment
        if segment is not None:
            segment.release()
        if key not in self._awaited:
            self.settled(key, is_stored=False)
        return None

    def put(self, key: str, rows: torch.Tensor) -> None:
        """Keep new rows [n, width], if they are to be kept."""
        if key not in self._awaited:
            return
        self._awaited.remove(key)
        try:
            is_stored = self._storage.put_encoder(key, rows)
        except Exception:
            logger.exception("VLCache: encoder rows %s could not be stored", key[:16])
            is_stored = False
        self.settled(key, is_stored=is_stored)

    def settled(self, key: str, *, is_stored: bool) -> None:
        """Rows are in host memory now, or are not and will not be."""
        if is_stored:
            self._report.stored[key] = 1
        else:
            self._report.lost.add(key)

    def take_report(self) -> EncoderReport:
        """What was stored and lost; at the end of a step, with nothing left to be stored in it."""
        report, self._report = self._report, EncoderReport()
        report.lost |= self._awaited
        self._awaited = set()
        return report

"""Fetches what reuse plans need from the store, and settles what is done when it is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from vllm.logger import init_logger

from ..attention.metadata import slots_of
from ..protocol import Item, ReusePlan, StepReport
from ..store import Segment, SegmentStore
from ..support import KVShape
from .injection import Injection, ReusedRows, rotation
from .model import SparsePrefillModel
from .ranks import all_ranks_have
from .sparse_prefill import PrefillJob, RequestInputs

logger = init_logger(__name__)


@dataclass
class LoadedPlan:
    """A plan and the donors it reuses; both shrink when something can't be had.

    Attributes:
        segments: item -> read handle of its segment.
        encoder_rows: read handles of the encoder rows that the jobs use.
        fallback: why less is reused than was planned.
    """

    plan: ReusePlan
    inputs: RequestInputs
    segments: dict[int, Segment] = field(default_factory=dict)
    encoder_rows: list[Segment] = field(default_factory=list)
    fallback: str | None = None

    def compute_instead(self, items: Sequence[int], why: str) -> None:
        """Compute all tokens of `items` instead of reusing their KV."""
        for index in items:
            self.plan = self.plan.without(index)
            segment = self.segments.pop(index, None)
            if segment is not None:
                segment.release()
        self.fallback = self.fallback or why

    def compute_everything(self, why: str) -> None:
        """Reuse nothing."""
        self.compute_instead(list(self.segments), why)

    def release(self) -> None:
        """Give the segments back to the store."""
        for segment in (*self.segments.values(), *self.encoder_rows):
            segment.release()


class Loader:
    """Turns reuse plans into jobs and injections on one rank."""

    def __init__(
        self, store: SegmentStore, model: SparsePrefillModel, shape: KVShape, device: torch.device
    ) -> None:
        self._store = store
        self._model = model
        self._shape = shape
        self._device = device

    def fetch(
        self,
        plans: Sequence[ReusePlan],
        requests: Mapping[str, RequestInputs],
        report: StepReport,
    ) -> list[LoadedPlan]:
        """Open the segments of `plans`; items without one on every rank are to be computed."""
        loaded = [LoadedPlan(plan, requests[plan.req_id]) for plan in plans]
        wanted = [
            (entry, entry.inputs.items[index])
            for entry in loaded
            for index in dict.fromkeys(part.item for part in entry.plan.reused)
        ]
        found = [self._store.get(item.key, "kv") for _, item in wanted]
        usable = all_ranks_have(
            [
                segment is not None and self._fits(segment, item)
                for segment, (_, item) in zip(found, wanted, strict=True)
            ]
        )
        for segment, ok, (entry, item) in zip(found, usable, wanted, strict=True):
            if segment is not None:
                entry.segments[item.index] = segment
            if not ok:
                logger.warning(
                    "VLCache: segment %s of request %s is missing or of another shape; recomputing",
                    item.key[:16],
                    entry.plan.req_id,
                )
                report.lost.add(item.key)
                entry.compute_instead([item.index], "segment lost")
        return loaded

    def _fits(self, segment: Segment, item: Item) -> bool:
        shape, positions = self._shape, segment.info.positions
        key, _ = segment.layer(0)
        axes = 1 if self._model.rotary.mrope_section is None else 3
        return (
            key.shape == (len(item.span), shape.num_kv_heads, shape.head_dim)
            and key.dtype == shape.dtype
            and positions is not None
            and positions.shape == (axes, len(item.span))
        )

    def job(self, entry: LoadedPlan, report: StepReport) -> PrefillJob | None:
        """The sparse prefill of a plan; None when tokens of an item can't be computed either."""
        rows: dict[int, torch.Tensor] = {}
        for item in entry.inputs.items.values():
            if not any(item.span.clip(run.start, run.end) for run in entry.plan.runs):
                continue
            stored = self._stored_rows(item)
            everywhere = all_ranks_have([stored is not None])[0]
            if stored is not None and everywhere:
                entry.encoder_rows.append(stored)
                rows[item.index] = stored.rows()
            elif item.index in entry.plan.encoder_inputs:
                rows[item.index] = self._encode(entry.plan, item, report)
            else:
                report.encoder_lost.add(item.encoder_key)
                return None
        return PrefillJob(entry.plan, entry.inputs, rows)

    def _stored_rows(self, item: Item) -> Segment | None:
        segment = self._store.get(item.encoder_key, "encoder")
        if segment is not None and segment.info.num_tokens != item.num_embeds:
            segment.release()
            return None
        return segment

    def _encode(self, plan: ReusePlan, item: Item, report: StepReport) -> torch.Tensor:
        rows = self._model.encode(*plan.encoder_inputs[item.index])
        if self._store.put_encoder(item.encoder_key, rows):
            report.encoder_stored[item.encoder_key] = 1
        else:
            report.encoder_lost.add(item.encoder_key)
        return rows

    def injection(self, loaded: Sequence[LoadedPlan]) -> Injection:
        """The reused rows of all plans, with the rotation from donor to target positions."""
        parts = []
        for entry in loaded:
            for reused in entry.plan.reused:
                item, segment = entry.inputs.items[reused.item], entry.segments[reused.item]
                first = reused.span.start - item.span.start
                base = segment.info.positions
                assert base is not None
                target = entry.inputs.positions[:, reused.span.start : reused.span.end]
                angles = rotation(
                    self._model.rotary, target, base[:, first : first + len(reused.span)]
                )
                slots = slots_of(reused.span, entry.plan.block_ids, self._shape.block_size)
                parts.append(
                    ReusedRows(
                        segment=segment,
                        first=first,
                        slots=torch.from_numpy(slots).to(self._device, non_blocking=True),
                        angles=None if angles is None else angles.to(self._device),
                    )
                )
        return Injection(self._model.rotary, parts, self._device)

"""Fetches what reuse plans need from the store, and settles what is done when it is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from vllm.logger import init_logger

from ..attention.metadata import slots_of
from ..protocol import Item, ReusePlan, Span, StepReport
from ..store import Segment, SegmentId
from ..streams import Ring, Staged, StagedSegment, upload
from ..support import KVShape
from .encoder import EncoderRows
from .injection import Injection, PlacedSegment, ReusedRows, Rows, WriteRows, rotation
from .model import SparsePrefillModel
from .ranks import all_ranks_have
from .sparse_prefill import PrefillJob, RequestInputs
from .storage import Storage

logger = init_logger(__name__)


@dataclass
class LoadedPlan:
    """A plan and the donors it reuses; both shrink when something can't be had.

    Attributes:
        segments: item -> read handle of its donor's segment.
        placed: item -> the same segment at its place in the request.
        encoder_rows: read handles of the encoder rows that the jobs use.
        dropped: read handles of segments that are not reused after all.
        on_device: items whose segments need not be copied from host memory.
        fallback: why less is reused than was planned.
    """

    plan: ReusePlan
    inputs: RequestInputs
    segments: dict[int, Segment] = field(default_factory=dict)
    placed: dict[int, PlacedSegment] = field(default_factory=dict)
    encoder_rows: list[Segment] = field(default_factory=list)
    dropped: list[Segment] = field(default_factory=list)
    on_device: set[int] = field(default_factory=set)
    fallback: str | None = None

    def compute_instead(self, items: Sequence[int], why: str) -> None:
        """Compute all tokens of `items` instead of reusing their KV."""
        for index in items:
            self.plan = self.plan.without(index)
            self.placed.pop(index, None)
            segment = self.segments.pop(index, None)
            if segment is not None:
                self.dropped.append(segment)
        self.fallback = self.fallback or why

    def compute_everything(self, why: str) -> None:
        """Reuse nothing."""
        self.compute_instead(list(self.segments), why)

    def release(self) -> None:
        """Give the segments back to the store."""
        for segment in (*self.segments.values(), *self.encoder_rows, *self.dropped):
            segment.release()


class Loader:
    """Turns reuse plans into jobs and injections on one rank."""

    def __init__(
        self,
        storage: Storage,
        encoder_rows: EncoderRows,
        model: SparsePrefillModel,
        shape: KVShape,
        device: torch.device,
        write: WriteRows,
    ) -> None:
        self._write = write
        self._storage = storage
        self._encoder_rows = encoder_rows
        self._model = model
        self._shape = shape
        self._device = device
        self._ring = Ring(storage.side, device) if storage.side is not None else None
        self._staged: Staged | None = None

    def fetch(
        self,
        plans: Sequence[ReusePlan],
        requests: Mapping[str, RequestInputs],
        report: StepReport,
    ) -> list[LoadedPlan]:
        """Open the segments of `plans`; items without one on every rank are to be computed."""
        loaded = [LoadedPlan(plan, requests[plan.req_id]) for plan in plans]
        wanted = [(entry, reuse) for entry in loaded for reuse in entry.plan.reused]
        for entry, reuse in wanted:
            if self._storage.is_on_device(reuse.donor):
                entry.on_device.add(reuse.item)
        found = [self._storage.get(SegmentId(reuse.donor, "kv")) for _, reuse in wanted]
        usable = all_ranks_have(
            [
                segment is not None and self._fits(segment, entry.inputs.items[reuse.item])
                for segment, (entry, reuse) in zip(found, wanted, strict=True)
            ]
        )
        for segment, ok, (entry, reuse) in zip(found, usable, wanted, strict=True):
            if segment is not None:
                entry.segments[reuse.item] = segment
            if ok:
                assert segment is not None
                entry.placed[reuse.item] = self._place(entry, reuse.item, segment)
            else:
                logger.warning(
                    "VLCache: segment %s of request %s is missing or of another shape; recomputing",
                    reuse.donor[:16],
                    entry.plan.req_id,
                )
                report.lost.add(reuse.donor)
                entry.compute_instead([reuse.item], "segment lost")
        self._stage(loaded)
        return loaded

    def _stage(self, loaded: Sequence[LoadedPlan]) -> None:
        """Let what is reused from host memory begin to come to the device."""
        if self._ring is None:
            return
        # A segment may have come to the device tier just now. One look at a layer that is still
        # arriving there makes the model's stream wait for it.
        coming = [
            (entry, item, entry.segments[item])
            for entry in loaded
            for item in entry.placed
            if item not in entry.on_device and entry.segments[item].pair(0).is_cpu
        ]
        if not coming:
            return
        layers = range(self._shape.num_layers)
        sources = [[segment.pair(layer) for layer in layers] for _, _, segment in coming]
        try:
            self._staged = staged = self._ring.start(sources)
        except torch.OutOfMemoryError:
            logger.warning(
                "VLCache: no device memory for copying KV ahead of its layers; loads are slower. "
                "Lower --gpu-memory-utilization"
            )
            self._ring = None
            return
        for index, (entry, item, segment) in enumerate(coming):
            source = StagedSegment(staged, index, segment)
            entry.placed[item] = replace(entry.placed[item], segment=source)

    def finish(self, loaded: Sequence[LoadedPlan]) -> None:
        """Nothing more is queued that reads these plans' segments: release them in time."""
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.close()
        for entry in loaded:
            self._storage.leaving.add(entry.release)

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

    def job(self, entry: LoadedPlan) -> PrefillJob | None:
        """The sparse prefill of a plan; None when tokens of an item can't be computed either."""
        rows: dict[int, torch.Tensor] = {}
        runs = entry.plan.runs_at(0)
        for item in entry.inputs.items.values():
            if not any(item.span.clip(run.start, run.end) for run in runs):
                continue
            stored = self._encoder_rows.get(item.encoder_key, item.num_embeds)
            everywhere = all_ranks_have([stored is not None])[0]
            if stored is not None and everywhere:
                entry.encoder_rows.append(stored)
                rows[item.index] = stored.rows()
            elif item.index in entry.plan.encoder_inputs:
                rows[item.index] = self._encode(entry.plan, item)
            else:
                self._encoder_rows.settled(item.encoder_key, is_stored=False)
                return None
        return PrefillJob(entry.plan, entry.inputs, rows, entry.placed)

    def _encode(self, plan: ReusePlan, item: Item) -> torch.Tensor:
        rows = self._model.encode(*plan.encoder_inputs[item.index])
        self._encoder_rows.put(item.encoder_key, rows)
        return rows

    def _place(self, entry: LoadedPlan, index: int, segment: Segment) -> PlacedSegment:
        item, base = entry.inputs.items[index], segment.info.positions
        assert base is not None
        target = entry.inputs.positions[:, item.span.start : item.span.end]
        angles = rotation(self._model.rotary, target, base)
        # A claim may end inside the item; tokens behind it have no slot that anyone writes to.
        end = min(item.span.end, entry.plan.claim.end)
        slots = slots_of(Span(item.span.start, end), entry.plan.block_ids, self._shape.block_size)
        return PlacedSegment(
            segment=segment,
            spec=self._model.rotary,
            slots=upload(torch.from_numpy(slots), self._device),
            angles=None if angles is None else upload(angles, self._device),
        )

    def injection(self, loaded: Sequence[LoadedPlan]) -> Injection:
        """The reused rows of all plans, as far as they are known before the prefill runs."""
        num_layers = self._shape.num_layers
        parts = []
        for entry in loaded:
            for reuse in entry.plan.reused:
                first = entry.inputs.items[reuse.item].span.start
                ends = [stage.first_layer for stage in reuse.stages[1:]] + [num_layers]
                for stage, end in zip(reuse.stages, ends, strict=True):
                    spans = reuse.reused_at(stage.first_layer)
                    if spans:
                        layers = range(stage.first_layer, end)
                        rows = self._rows(spans, first)
                        parts.append(ReusedRows(entry.placed[reuse.item], rows, layers))
        return Injection(num_layers, parts, self._write, self._staged)

    def _rows(self, spans: Sequence[Span], first: int) -> Rows:
        if len(spans) == 1:
            return slice(spans[0].start - first, spans[0].end - first)
        offsets = [torch.arange(span.start - first, span.end - first) for span in spans]
        return torch.cat(offsets)

"""Opens what reuse plans need, and settles what is done when it is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from vllm.logger import init_logger

from ..attention.metadata import slots_of
from ..protocol import Item, ReusePlan, Span, of_runs
from ..storage.header import SegmentId
from ..storage.segment import Segment
from ..streams import Ring, Staged, StagedSegment, upload
from ..support import KVShape
from .encoder import EncoderRows
from .injection import Injection, PlacedSegment, ReusedRows, Rows, WriteRows, rotation
from .model import SparsePrefillModel
from .sparse_prefill import PrefillJob, RequestInputs
from .stopwatch import Stopwatch
from .storage import Storage

logger = init_logger(__name__)


@dataclass
class LoadedPlan:
    """A plan and the donors it reuses; both shrink when something can't be had.

    Attributes:
        segments: item -> read handle of its donor's segment.
        placed: item -> the same segment at its place in the request.
        encoder_rows: item -> rows in order, [n, width] each on any device; those that are known.
        opened: read handles of stored encoder rows.
        dropped: read handles of segments that are not reused after all.
        on_device: items whose segments need not be copied from host memory.
        uses_store: whether stored encoder rows are looked for.
        fallback: why less is reused than was planned.
    """

    plan: ReusePlan
    segments: dict[int, Segment] = field(default_factory=dict)
    placed: dict[int, PlacedSegment] = field(default_factory=dict)
    encoder_rows: dict[int, Sequence[torch.Tensor]] = field(default_factory=dict)
    opened: list[Segment] = field(default_factory=list)
    dropped: list[Segment] = field(default_factory=list)
    on_device: set[int] = field(default_factory=set)
    uses_store: bool = True
    fallback: str | None = None

    def compute_instead(self, item: int, why: str) -> None:
        """Compute all tokens of `item` instead of reusing their KV."""
        self.plan = self.plan.without(item)
        self.placed.pop(item, None)
        segment = self.segments.pop(item, None)
        if segment is not None:
            self.dropped.append(segment)
        self.fallback = self.fallback or why

    def compute_everything(self, why: str) -> None:
        """Reuse nothing that is stored, KV or encoder rows."""
        for reuse in self.plan.reused:
            self.compute_instead(reuse.item, why)
        self.encoder_rows.clear()
        self.uses_store = False
        self.fallback = self.fallback or why

    def release(self) -> None:
        """Give the segments back."""
        for segment in (*self.segments.values(), *self.opened, *self.dropped):
            segment.release()


InputsOf = Callable[[str], RequestInputs]
"""A request's prompt, by its id."""


class Loader:
    """Turns reuse plans into jobs and injections on one rank, without asking the others.

    Args:
        inputs_of: may raise, where a prompt's positions can't be computed.
    """

    def __init__(
        self,
        storage: Storage,
        encoder_rows: EncoderRows,
        model: SparsePrefillModel,
        shape: KVShape,
        device: torch.device,
        write: WriteRows,
        inputs_of: InputsOf,
    ) -> None:
        self._write = write
        self._storage = storage
        self._encoder_rows = encoder_rows
        self._model = model
        self._shape = shape
        self._device = device
        self._inputs_of = inputs_of
        self._ring = Ring(storage.side, device) if storage.side is not None else None
        self._staged: Staged | None = None

    def fetch(self, entry: LoadedPlan) -> None:
        """Open and place the segments of a plan, as far as they are here and of the right shape."""
        inputs = self._inputs_of(entry.plan.req_id)
        for reuse in entry.plan.reused:
            if self._storage.is_on_device(reuse.donor):
                entry.on_device.add(reuse.item)
            segment = self._storage.get(SegmentId(reuse.donor, "kv"))
            if segment is None:
                continue
            entry.segments[reuse.item] = segment
            if self._fits(segment, inputs.items[reuse.item]):
                entry.placed[reuse.item] = self._place(entry.plan, inputs, reuse.item, segment)

    def stage(self, loaded: Sequence[LoadedPlan]) -> None:
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

    def open_rows(self, entry: LoadedPlan) -> list[Item]:
        """Open the stored encoder rows of the tokens that a plan computes.

        Returns:
            The items in question, whose rows are in `entry.encoder_rows` or are not here.
        """
        inputs = self._inputs_of(entry.plan.req_id)
        items = of_runs(inputs.in_order, entry.plan.runs_at(0))
        for item in items:
            if item.index in entry.encoder_rows or not entry.uses_store:
                continue
            segment = self._encoder_rows.get(item.encoder_key, item.num_embeds)
            if segment is not None:
                entry.opened.append(segment)
                entry.encoder_rows[item.index] = segment.rows()
        return items

    def job(self, entry: LoadedPlan) -> PrefillJob:
        """The sparse prefill of a plan all of whose encoder rows are there."""
        inputs = self._inputs_of(entry.plan.req_id)
        return PrefillJob(entry.plan, inputs, dict(entry.encoder_rows), dict(entry.placed))

    def _place(
        self, plan: ReusePlan, inputs: RequestInputs, index: int, segment: Segment
    ) -> PlacedSegment:
        item, base = inputs.items[index], segment.info.positions
        assert base is not None
        target = inputs.positions[:, item.span.start : item.span.end]
        angles = rotation(self._model.rotary, target, base)
        # A claim may end inside the item; tokens behind it have no slot that anyone writes to.
        end = min(item.span.end, plan.claim.end)
        slots = slots_of(Span(item.span.start, end), plan.blocks, self._shape.block_size)
        return PlacedSegment(
            segment=segment,
            spec=self._model.rotary,
            slots=upload(torch.from_numpy(slots), self._device),
            angles=None if angles is None else upload(angles, self._device),
        )

    def injection(self, jobs: Sequence[PrefillJob], stopwatch: Stopwatch) -> Injection:
        """The reused rows of all jobs, as far as they are known before the prefill runs."""
        num_layers = self._shape.num_layers
        parts = []
        for job in jobs:
            for reuse in job.plan.reused:
                first = job.inputs.items[reuse.item].span.start
                ends = [stage.first_layer for stage in reuse.stages[1:]] + [num_layers]
                for stage, end in zip(reuse.stages, ends, strict=True):
                    spans = reuse.reused_at(stage.first_layer)
                    if spans:
                        layers = range(stage.first_layer, end)
                        rows = self._rows(spans, first)
                        parts.append(ReusedRows(job.placed[reuse.item], rows, layers))
        return Injection(num_layers, parts, self._write, self._staged, stopwatch)

    def _rows(self, spans: Sequence[Span], first: int) -> Rows:
        if len(spans) == 1:
            return slice(spans[0].start - first, spans[0].end - first)
        offsets = [torch.arange(span.start - first, span.end - first) for span in spans]
        return torch.cat(offsets)

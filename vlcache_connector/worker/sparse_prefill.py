"""The sparse prefill: one or few forwards over scattered runs of several requests.

It computes the tokens of a reuse plan that have no stored KV, attending over computed and reused
KV alike, through the very same model object that vLLM runs. Several requests go into one pass;
a pass never exceeds `max_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..attention.metadata import MetadataFactory, Row, slots_of
from ..protocol import Item, ReusePlan, Span
from .capture import SegmentCapture
from .model import SparsePrefillModel


@dataclass(frozen=True)
class RequestInputs:
    """A request's prompt as a worker knows it.

    Attributes:
        token_ids: int64 [n].
        positions: int64 [3, n] or [1, n].
        items: its multimodal items by index.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    items: dict[int, Item]


@dataclass(frozen=True)
class PrefillJob:
    """One request of a sparse prefill.

    Attributes:
        plan: what is computed.
        inputs: the request's prompt.
        encoder_rows: item -> rows [n_embeds, width] on any device, for items inside runs.
    """

    plan: ReusePlan
    inputs: RequestInputs
    encoder_rows: dict[int, torch.Tensor]


class SparsePrefill:
    """Runs jobs through the model.

    Args:
        max_tokens: most tokens of a pass (`max_num_batched_tokens`).
        block_size: tokens of a KV cache block.
    """

    def __init__(
        self,
        model: SparsePrefillModel,
        metadata: MetadataFactory,
        capture: SegmentCapture,
        *,
        max_tokens: int,
        block_size: int,
    ) -> None:
        self._model = model
        self._metadata = metadata
        self._capture = capture
        self._max_tokens = max_tokens
        self._block_size = block_size

    def run(self, jobs: Sequence[PrefillJob]) -> None:
        """Compute all runs of `jobs`; later jobs may rest on blocks that earlier ones fill."""
        for batch in self._passes(jobs):
            self._forward(batch)

    def _passes(self, jobs: Sequence[PrefillJob]) -> Iterator[list[tuple[PrefillJob, Span]]]:
        batch: list[tuple[PrefillJob, Span]] = []
        room = self._max_tokens
        for job in jobs:
            for run in job.plan.runs:
                start = run.start
                while start < run.end:
                    part = Span(start, min(run.end, start + room))
                    batch.append((job, part))
                    start, room = part.end, room - len(part)
                    if room == 0:
                        yield batch
                        batch, room = [], self._max_tokens
        if batch:
            yield batch

    def _forward(self, batch: Sequence[tuple[PrefillJob, Span]]) -> None:
        token_ids, positions, is_embed, rows = [], [], [], []
        for job, run in batch:
            token_ids.append(job.inputs.token_ids[run.start : run.end])
            positions.append(job.inputs.positions[:, run.start : run.end])
            mask = torch.zeros(len(run), dtype=torch.bool)
            for item in job.inputs.items.values():
                part = item.span.clip(run.start, run.end)
                if part:
                    embedded, item_rows = _rows_of(item, part, job.encoder_rows[item.index])
                    mask[part.start - run.start : part.end - run.start] = embedded
                    if len(item_rows):
                        rows.append(item_rows)
                    self._expect_capture(job, item, part)
            is_embed.append(mask)
        metadata, slot_mapping = self._metadata.build(
            [Row(run, job.plan.block_ids) for job, run in batch]
        )
        try:
            self._model.forward(
                torch.cat(token_ids),
                torch.cat(positions, dim=1),
                rows,
                torch.cat(is_embed),
                metadata,
                slot_mapping,
            )
        finally:
            self._capture.end_pass()

    def _expect_capture(self, job: PrefillJob, item: Item, part: Span) -> None:
        if item.index in job.plan.captures:
            self._capture.expect(
                job.plan.req_id,
                item.index,
                num_tokens=len(item.span),
                offset=part.start - item.span.start,
                slots=torch.from_numpy(slots_of(part, job.plan.block_ids, self._block_size)),
            )


def _rows_of(
    item: Item, part: Span, encoder_rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of `part` take encoder rows (bool [len(part)]), and these rows in order."""
    first, last = part.start - item.span.start, part.end - item.span.start
    if item.is_embed is None:
        return torch.ones(len(part), dtype=torch.bool), encoder_rows[first:last]
    counts = np.concatenate([[0], np.cumsum(item.is_embed)])
    mask = torch.tensor(item.is_embed[first:last], dtype=torch.bool)
    return mask, encoder_rows[counts[first] : counts[last]]

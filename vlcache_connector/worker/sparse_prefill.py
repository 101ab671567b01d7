"""The sparse prefill: one or few forwards over scattered runs of several requests.

It computes the tokens of a reuse plan that have no stored KV, attending over computed and reused
KV alike, through the very same model object that vLLM runs. Several requests go into one pass;
a pass exceeds neither `max_tokens` nor the rows that the
attention backend takes. Where a plan's recompute sets shrink from layer to layer, the
rows that are no longer needed leave the pass, and with them their attention and MLP.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..attention.metadata import MetadataFactory, Row, slots_of
from ..protocol import Item, ItemReuse, ReusePlan, Span, inside, stretches_of
from .blend import distances, farthest
from .capture import SegmentCapture
from .injection import Injection, PlacedSegment, ReusedRows
from .model import NestedPass, SparsePrefillModel, Stretch
from .ranks import agreed, in_lockstep, sum_over_ranks


@dataclass(frozen=True)
class RequestInputs:
    """A request's prompt as a worker knows it.

    Attributes:
        token_ids: n of them.
        positions: int64 [3, n] or [1, n].
        items: its multimodal items by index.
    """

    token_ids: Sequence[int]
    positions: torch.Tensor
    items: dict[int, Item]

    @cached_property
    def in_order(self) -> Sequence[Item]:
        """The items in prompt order."""
        return sorted(self.items.values(), key=lambda item: item.span.start)

    def positions_of(self, item: Item) -> torch.Tensor:
        """An item's own positions, int64 [3 or 1, n]."""
        return self.positions[:, item.span.start : item.span.end]


@dataclass(frozen=True)
class PrefillJob:
    """One request of a sparse prefill.

    Attributes:
        plan: what is computed.
        inputs: the request's prompt.
        encoder_rows: item -> rows in order, [n, width] each on any device, for items inside runs.
        placed: item -> its donor's segment, for the items that `plan` reuses.
    """

    plan: ReusePlan
    inputs: RequestInputs
    encoder_rows: dict[int, Sequence[torch.Tensor]]
    placed: dict[int, PlacedSegment]


@dataclass(frozen=True)
class _Part:
    """A stretch of one job's tokens in a pass, and the pass's row it begins at."""

    job: PrefillJob
    span: Span
    row: int

    def rows_of(self, span: Span) -> slice:
        """The pass's rows of those tokens of `span` that are in this part."""
        own = span.clip(self.span.start, self.span.end)
        return slice(self.row + own.start - self.span.start, self.row + own.end - self.span.start)

    @cached_property
    def reused(self) -> Sequence[ItemReuse]:
        """The known items that have tokens in this part."""
        return inside(self.job.plan.reused, self.span)


@dataclass(frozen=True)
class _Pass:
    """The tokens of one forward, which are its rows, and which of them each layer computes."""

    parts: Sequence[_Part]

    @property
    def num_rows(self) -> int:
        last = self.parts[-1]
        return last.row + len(last.span)

    def computed_at(self, layer: int) -> np.ndarray:
        """bool [num_rows], before any choice while the pass runs."""
        computed = np.ones(self.num_rows, dtype=bool)
        for part in self.parts if layer else ():  # what enters, the first layer computes
            for reuse in part.reused:
                for span in reuse.reused_at(layer):
                    computed[part.rows_of(span)] = False
        return computed

    def blends_behind(self, layer: int) -> list[tuple[_Part, ItemReuse]]:
        """Items of which rows are chosen by the keys of `layer`."""
        return [
            (part, reuse)
            for part in self.parts
            for reuse in part.reused
            if reuse.blend is not None and reuse.blend.check_layer == layer
        ]

    def stretches(self, num_layers: int) -> list[range]:
        """The layers, cut where rows leave."""
        starts = {0}
        for part in self.parts:
            for reuse in part.reused:
                starts |= {stage.first_layer for stage in reuse.stages}
                if reuse.blend is not None:
                    starts.add(reuse.blend.check_layer + 1)
        cuts, computed = [0], self.computed_at(0)
        for start in sorted(start for start in starts if 0 < start < num_layers):
            left = self.computed_at(start)
            if (left != computed).any() or self.blends_behind(start - 1):
                cuts.append(start)
            computed = left
        return [range(*cut) for cut in pairwise([*cuts, num_layers])]

    def metadata_rows(self, alive: np.ndarray) -> list[Row]:
        """A row of attention metadata for every stretch of consecutive `alive` tokens."""
        if alive.all():
            return [Row(part.span, part.job.plan.blocks) for part in self.parts]
        rows = []
        for part in self.parts:
            first = part.span.start
            for left in stretches_of(alive[part.row : part.row + len(part.span)]):
                span = Span(first + left.start, first + left.end)
                rows.append(Row(span, part.job.plan.blocks))
        return rows


class SparsePrefill:
    """Runs jobs through the model.

    Args:
        capturing: around all calls of `capture`; a failure there ends in there.
        max_tokens: most tokens of a pass (`max_num_batched_tokens`).
        block_size: tokens of a KV cache block.
    """

    def __init__(
        self,
        model: SparsePrefillModel,
        metadata: MetadataFactory,
        capture: SegmentCapture,
        *,
        capturing: Callable[[], AbstractContextManager[None]],
        max_tokens: int,
        block_size: int,
    ) -> None:
        self._model = model
        self._metadata = metadata
        self._capture = capture
        self._capturing = capturing
        self._max_tokens = max_tokens
        self._block_size = block_size
        self._num_layers = len(model.layer_names)
        self._injection: Injection | None = None
        """Of the jobs that run; None: none do."""
        self._fault: Exception | None = None
        """What went wrong between two layers of the pass."""
        self._check_layer: int | None = None
        self._check_keys: torch.Tensor | None = None

    def run(self, jobs: Sequence[PrefillJob], injection: Injection) -> list[tuple[int, ...]]:
        """Compute all runs of `jobs`; later jobs may rest on blocks that earlier ones fill.

        Args:
            injection: the rows that are reused; takes those, too, that turn out to be while the
                prefill runs.

        Returns:
            Per job, the tokens that each layer computed.

        Raises:
            AgreedError: what this rank or another one does for itself failed, on all ranks; the
                jobs may be run again.
        """
        computed = {id(job): np.zeros(self._num_layers, dtype=np.int64) for job in jobs}
        self._injection = injection
        try:
            with in_lockstep():
                for parts in self._passes(jobs):
                    self._forward(_Pass(parts), injection, computed)
                with agreed():
                    # What no forward's layers have asked for.
                    for index, layer in enumerate(self._model.layers.values()):
                        injection.write_layer(index, layer)
        finally:
            self._injection = None
        return [tuple(computed[id(job)].tolist()) for job in jobs]

    def before_layer(self, index: int, layer: Any) -> None:
        """vLLM comes to attention layer `index`: write the reused KV of a pass that runs."""
        if self._injection is None:
            return
        try:
            self._injection.write_layer(index, layer)
        except Exception as error:
            # In the middle of a forward, where ranks meet: it goes on, and fails when it is over.
            self._fault = self._fault or error

    def on_kv_write(self, layer: int, key: torch.Tensor) -> None:
        """Keep the fresh keys [num_tokens, kv_heads, head_dim] of a layer that is checked."""
        if layer == self._check_layer:
            self._check_keys = key

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _passes(self, jobs: Sequence[PrefillJob]) -> Iterator[list[_Part]]:
        parts: list[_Part] = []
        used = used_rows = 0
        for job in jobs:
            for run in job.plan.runs_at(0):
                start = run.start
                while start < run.end:
                    rest = Span(start, min(run.end, start + self._max_tokens - used))
                    span = self._within_rows(job.plan, rest, used_rows)
                    if span:
                        parts.append(_Part(job, span, used))
                        start, used = span.end, used + len(span)
                        used_rows += job.plan.most_rows(span)
                    if start < run.end or used == self._max_tokens:
                        yield parts
                        parts, used, used_rows = [], 0, 0
        if parts:
            yield parts

    def _within_rows(self, plan: ReusePlan, span: Span, used: int) -> Span:
        """As much of `span`, from its start, as there are rows of metadata left for."""
        most = self._metadata.max_rows
        if most is None or used + plan.most_rows(span) <= most:
            return span
        lengths = range(1, len(span))
        fitting = bisect_right(
            lengths,
            most - used,
            key=lambda length: plan.most_rows(Span(span.start, span.start + length)),
        )
        return Span(span.start, span.start + fitting)

    def _forward(
        self, this_pass: _Pass, injection: Injection, computed: dict[int, np.ndarray]
    ) -> None:
        try:
            with agreed():
                token_ids, positions, rows, is_embed = self._inputs_of(this_pass)
            for part in this_pass.parts:
                self._expect_captures(part)
            with self._model.forward(token_ids, positions, rows, is_embed) as nested:
                self._run_layers(nested, this_pass, injection, computed)
            with agreed():
                self._raise_fault()
        finally:
            self._fault = self._check_layer = self._check_keys = None
            with self._capturing():
                self._capture.end_pass()

    @staticmethod
    def _inputs_of(
        this_pass: _Pass,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Token ids, positions, encoder rows and `is_embed`, as `SparsePrefillModel` takes them."""
        token_ids: list[int] = []
        positions, is_embed, rows = [], [], []
        for part in this_pass.parts:
            job, span = part.job, part.span
            token_ids += job.inputs.token_ids[span.start : span.end]
            positions.append(job.inputs.positions[:, span.start : span.end])
            mask = torch.zeros(len(span), dtype=torch.bool)
            for item in inside(job.inputs.in_order, span):
                own = item.span.clip(span.start, span.end)
                within = mask[own.start - span.start : own.end - span.start]
                rows += _take_rows(item, own, job.encoder_rows[item.index], within)
            is_embed.append(mask)
        return (
            torch.tensor(token_ids, dtype=torch.int64),
            torch.cat(positions, dim=1),
            rows,
            torch.cat(is_embed),
        )

    def _run_layers(
        self,
        nested: NestedPass,
        this_pass: _Pass,
        injection: Injection,
        computed: dict[int, np.ndarray],
    ) -> None:
        """Run the layers in stretches with the same rows."""
        alive = np.ones(this_pass.num_rows, dtype=bool)
        for layers in this_pass.stretches(self._num_layers):
            before = alive
            alive = before & this_pass.computed_at(layers.start)
            blends = this_pass.blends_behind(layers.start - 1)
            if blends:
                with agreed():
                    self._raise_fault()
                    own = [self._distances(part, reuse, before) for part, reuse in blends]
                far = [sum_over_ranks(distance) for distance in own]
            with agreed():
                for index, (part, reuse) in enumerate(blends):
                    self._blend(part, reuse, far[index], alive, injection)
                self._check_layer = layers[-1] if this_pass.blends_behind(layers[-1]) else None
                self._check_keys = None
                for part in this_pass.parts:
                    left = alive[part.row : part.row + len(part.span)]
                    computed[id(part.job)][layers.start : layers.stop] += int(left.sum())
                if alive.any():
                    metadata, slot_mapping = self._metadata.build(this_pass.metadata_rows(alive))
                    rows = alive[before]
                    stays = None if rows.all() else torch.from_numpy(np.flatnonzero(rows))
            if not alive.any():
                return
            with self._capturing():
                self._capture.rows_change()
            nested.run(Stretch(layers, stays, metadata, slot_mapping))

    def _distances(self, part: _Part, reuse: ItemReuse, before: np.ndarray) -> torch.Tensor:
        """How far the fresh keys of an item's tokens in this part are from the donor's.

        Args:
            before: bool [num_rows], the rows that the check layer computed.
        """
        assert reuse.blend is not None
        if self._check_keys is None:
            raise RuntimeError(f"layer {reuse.blend.check_layer} wrote no keys")
        places = (np.cumsum(before) - 1)[part.rows_of(reuse.span)]
        fresh = self._check_keys[int(places[0]) : int(places[-1]) + 1]
        own = reuse.span.clip(part.span.start, part.span.end)
        start = part.job.inputs.items[reuse.item].span.start
        placed = part.job.placed[reuse.item]
        donor, _ = placed.kv(reuse.blend.check_layer, slice(own.start - start, own.end - start))
        return distances(fresh, donor)

    def _blend(
        self,
        part: _Part,
        reuse: ItemReuse,
        distance: torch.Tensor,
        alive: np.ndarray,
        injection: Injection,
    ) -> None:
        """Let the tokens of an item go whose fresh keys are closest to the donor's.

        Args:
            distance: of the tokens in this part, over all ranks.
            alive: bool [num_rows], changed in place.
        """
        assert reuse.blend is not None
        own = reuse.span.clip(part.span.start, part.span.end)
        # Summed up over the passes that share an item, the counts are those of the whole item.
        stay = reuse.blend.count(own.end - reuse.span.start)
        stay -= reuse.blend.count(own.start - reuse.span.start)
        chosen = farthest(distance, stay).numpy()
        alive[part.rows_of(reuse.span)] &= chosen
        layers = range(reuse.blend.check_layer + 1, self._num_layers)
        start = part.job.inputs.items[reuse.item].span.start
        offsets = torch.from_numpy(np.flatnonzero(~chosen)) + own.start - start
        injection.add(ReusedRows(part.job.placed[reuse.item], offsets, layers))

    def _expect_captures(self, part: _Part) -> None:
        job, span = part.job, part.span
        for index, key in job.plan.captures.items():
            item = job.inputs.items[index]
            own = item.span.clip(span.start, span.end)
            if not own:
                continue
            with self._capturing():
                self._capture.expect(
                    job.plan.req_id,
                    index,
                    key,
                    job.inputs.positions_of(item),
                    offset=own.start - item.span.start,
                    slots=torch.from_numpy(slots_of(own, job.plan.blocks, self._block_size)),
                )


def _take_rows(
    item: Item, part: Span, encoder_rows: Sequence[torch.Tensor], mask: torch.Tensor
) -> list[torch.Tensor]:
    """Set those of `mask`, bool [len(part)], that take encoder rows: these rows, in order."""
    start, end = part.start - item.span.start, part.end - item.span.start
    embeds = (Span(0, len(item.span)),) if item.embeds is None else item.embeds
    for own in embeds[bisect_right(embeds, start, key=lambda own: own.end) :]:
        if own.start >= end:
            break
        mask[max(0, own.start - start) : own.end - start] = True
    return _between(encoder_rows, item.rows_before(start), item.rows_before(end))


def _between(parts: Sequence[torch.Tensor], first: int, last: int) -> list[torch.Tensor]:
    """Rows `first` to `last` of tensors [n, width] that follow each other: views."""
    found, behind = [], 0
    for rows in parts:
        own = Span(behind, behind + len(rows)).clip(first, last)
        if own:
            found.append(rows[own.start - behind : own.end - behind])
        behind += len(rows)
    return found

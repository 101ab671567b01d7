"""The sparse prefill's passes against a token-by-token account, with a model that only notes.

The stand-in for the model runs stretches, keeps rows and writes KV as a real one does; what it
writes says which layer and token it is. The paged cache refuses a second write of the same slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_connector.attention.hook import KVWriteHook
from vlcache_connector.attention.metadata import Row, slots_of
from vlcache_connector.protocol import Blend, Item, ItemReuse, ReusePlan, Span, Stage
from vlcache_connector.rope import RotarySpec
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.segment import KVWriter, Segment, SegmentInfo
from vlcache_connector.support import KVShape
from vlcache_connector.worker.capture import SegmentCapture
from vlcache_connector.worker.injection import Injection, PlacedSegment, ReusedRows
from vlcache_connector.worker.model import Stretch
from vlcache_connector.worker.ranks import AgreedError
from vlcache_connector.worker.sparse_prefill import (
    PrefillJob,
    RequestInputs,
    SparsePrefill,
    _Part,
    _Pass,
)

NUM_LAYERS, BLOCK, HEADS, DIM = 5, 4, 1, 2
NAMES = [f"layers.{index}.attn" for index in range(NUM_LAYERS)]
SHAPE = KVShape(NUM_LAYERS, HEADS, DIM, torch.float32, BLOCK)
SPEC = RotarySpec(torch.tensor([1.0]), DIM, DIM, is_neox=True)
TOKEN_IDS_PER_REQUEST = 1000

ITEM = Item(0, Span(0, 6), 0, "kv", "rows")

property_test = settings(max_examples=40)


# -- plans ----------------------------------------------------------------------------------


def tokens(*parts: Span) -> list[int]:
    return [token for part in parts for token in range(part.start, part.end)]


def spans_of(chosen: Sequence[int]) -> tuple[Span, ...]:
    """Maximal spans of consecutive tokens."""
    cuts = [i for i, (a, b) in enumerate(pairwise(chosen), 1) if b != a + 1]
    edges = [0, *cuts, len(chosen)] if chosen else []
    return tuple(Span(chosen[a], chosen[b - 1] + 1) for a, b in pairwise(edges))


@st.composite
def reuses(draw: st.DrawFn, item: int, span: Span, may_blend: bool) -> ItemReuse:
    chosen = tokens(span)
    if may_blend and draw(st.booleans()):
        share = Fraction(draw(st.integers(1, len(span))), len(span))
        blend = Blend(draw(st.integers(1, NUM_LAYERS - 2)), share)
        return ItemReuse(item, f"donor {item}", span, (Stage(0, (span,)),), blend)
    stages = []
    for first_layer in (0, *sorted(draw(st.sets(st.integers(1, NUM_LAYERS - 1), max_size=3)))):
        kept = draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
        # Often nothing changes from one stage to the next.
        if not stages or draw(st.booleans()):
            chosen = [token for token, keep in zip(chosen, kept, strict=True) if keep]
        stages.append(Stage(first_layer, spans_of(chosen)))
    return ItemReuse(item, f"donor {item}", span, tuple(stages))


@st.composite
def jobs_of(draw: st.DrawFn, number: int, may_blend: bool) -> PrefillJob:
    """A request with up to three items: reused, captured, or begun in front of the claim."""
    start = position = draw(st.integers(0, 6))
    items, reused, captures = [], [], {}
    for index in range(draw(st.integers(0, 3))):
        position += draw(st.integers(0, 3))
        in_front = min(position, draw(st.integers(0, 2))) if position == start else 0
        end = position + draw(st.integers(1, 7))
        items.append(Item(index, Span(position - in_front, end), index, f"kv {index}", "rows"))
        if draw(st.booleans()):
            reused.append(draw(reuses(index, Span(position, end), may_blend)))
        elif not in_front:
            captures[index] = f"{number}/{index}"
        position = end
    claim = Span(start, max(position, start + 1) + draw(st.integers(0, 2)))
    blocks = tuple(range(100 * number, 100 * number + -(-claim.end // BLOCK)))[::-1]
    plan = ReusePlan(claim, tuple(reused), f"request {number}", blocks, captures)
    return make_job(number, plan, items)


def make_job(number: int, plan: ReusePlan, items: Sequence[Item]) -> PrefillJob:
    """Token ids and positions tell request and token, encoder rows item and row."""
    end = plan.claim.end + 1
    ids = torch.arange(end) + TOKEN_IDS_PER_REQUEST * number
    by_index = {item.index: item for item in items}
    rows = {
        item.index: (torch.arange(item.num_embeds)[:, None] + 100.0 * item.index).split(3)
        for item in items
    }
    placed = {reuse.item: place(plan, by_index[reuse.item]) for reuse in plan.reused}
    return PrefillJob(plan, RequestInputs(ids.tolist(), ids[None] * 2, by_index), rows, placed)


def place(plan: ReusePlan, item: Item) -> PlacedSegment:
    n = len(item.span)
    generator = torch.Generator().manual_seed(100 * n + item.index)
    kv = torch.randn(NUM_LAYERS, 2, n, HEADS, DIM, generator=generator)
    span = Span(item.span.start, min(item.span.end, plan.claim.end))
    slots = torch.from_numpy(slots_of(span, plan.block_ids, BLOCK))
    made = Segment(SegmentInfo(SegmentId(item.key, "kv"), n, None), [kv], lambda _: None)
    return PlacedSegment(made, SPEC, slots, None)


def all_jobs(*, may_blend: bool = True) -> st.SearchStrategy[list[PrefillJob]]:
    return st.integers(1, 3).flatmap(
        lambda count: st.tuples(*(jobs_of(number, may_blend) for number in range(count))).map(list)
    )


# -- the stand-ins --------------------------------------------------------------------------


class _Cache:
    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: dict[int, Tensor], slots: Tensor
    ) -> None:
        for row, slot in enumerate(slots.tolist()):
            assert slot not in kv_cache, "written twice"
            kv_cache[slot] = torch.stack([key[row], value[row]])


class _Impl(KVWriteHook, _Cache):
    """Wrapped as vLLM's backends are."""


def fresh_kv(layer: int, ids: Tensor) -> Tensor:
    """K and V [2, n, heads, dim] as the model computes them for these tokens."""
    phase = 0.37 * ids.double() + 11.3 * layer
    return torch.stack([phase.sin(), phase.cos()]).float()[..., None, None].expand(-1, -1, 1, DIM)


@dataclass
class Forward:
    """What one pass was called with."""

    token_ids: Tensor
    positions: Tensor
    encoder_rows: list[Tensor]
    is_embed: Tensor
    stretches: list[tuple[range, list[int], list[Row]]] = field(default_factory=list)
    """Layers, the ids of the tokens they compute, the rows of their metadata."""


class Engine:
    """Model, metadata and paged cache."""

    def __init__(self, *, max_tokens: int = 100, max_rows: int | None = None) -> None:
        self.max_rows = max_rows
        self.layer_names = NAMES
        self.layers: dict[str, Any] = {
            name: SimpleNamespace(impl=_Impl(), kv_cache={}) for name in NAMES
        }
        self.captured: dict[str, Tensor] = {}
        """KV that is being captured, by key: [num_layers, 2, n, kv_heads, head_dim]."""
        self.capture = SegmentCapture(NAMES, SHAPE, torch.device("cpu"), self.open_segment)
        self.forwards: list[Forward] = []
        self.injection = Injection(NUM_LAYERS)
        self.writes_keys = True
        model: Any = self
        self.prefill = SparsePrefill(
            model,
            model,
            self.capture,
            capturing=nullcontext,
            max_tokens=max_tokens,
            block_size=BLOCK,
        )

    def open_segment(self, key: str, positions: Tensor) -> KVWriter:
        kv = torch.full((NUM_LAYERS, 2, positions.shape[1], HEADS, DIM), torch.nan)
        self.captured[key] = kv
        return KVWriter(key, list(kv), lambda valid: kv.nbytes, lambda: None)

    def build(self, rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        slots = [slots_of(row.span, row.block_ids, BLOCK) for row in rows]
        mapping = torch.from_numpy(np.concatenate(slots))
        return dict.fromkeys(NAMES, tuple(rows)), dict.fromkeys(NAMES, mapping)

    @contextmanager
    def forward(
        self, token_ids: Tensor, positions: Tensor, encoder_rows: list[Tensor], is_embed: Tensor
    ) -> Iterator[SimpleNamespace]:
        made = Forward(token_ids, positions, encoder_rows, is_embed)
        self.forwards.append(made)
        ids = token_ids

        def run(stretch: Stretch) -> None:
            nonlocal ids
            if stretch.stays is not None:
                ids = ids[stretch.stays]
            rows = [
                Row(row.span, tuple(np.asarray(row.block_ids).tolist()))
                for row in stretch.metadata[NAMES[0]]
            ]
            made.stretches.append((stretch.layers, ids.tolist(), rows))
            for index in stretch.layers:
                layer, slots = self.layers[NAMES[index]], stretch.slot_mapping[NAMES[index]]
                self.prefill.before_layer(index, layer)
                key, value = fresh_kv(index, ids)
                _Cache().do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
                if self.writes_keys:
                    self.prefill.on_kv_write(index, key)
                self.capture.on_kv_write(NAMES[index], key, value, slots)

        yield SimpleNamespace(run=run)

    def run(self, jobs: Sequence[PrefillJob]) -> list[tuple[int, ...]]:
        """As a worker does it: what is known to be reused is injected along with the forwards."""
        for job in jobs:
            for reuse in job.plan.reused:
                first = job.inputs.items[reuse.item].span.start
                for layer in range(NUM_LAYERS):
                    rows = torch.tensor(tokens(*reuse.reused_at(layer)), dtype=torch.int64) - first
                    part = ReusedRows(job.placed[reuse.item], rows, range(layer, layer + 1))
                    self.injection.add(part)
        return self.prefill.run(jobs, self.injection)


# -- the account ----------------------------------------------------------------------------


def token_ids(job: PrefillJob, chosen: Sequence[int]) -> list[int]:
    return [job.inputs.token_ids[token] for token in chosen]


def passes_of(jobs: Sequence[PrefillJob], max_tokens: int) -> list[list[tuple[int, int]]]:
    """(job, token) pairs that enter, cut every `max_tokens`."""
    entering = [
        (number, token) for number, job in enumerate(jobs) for token in tokens(*job.plan.runs_at(0))
    ]
    return [entering[at : at + max_tokens] for at in range(0, len(entering), max_tokens)]


def chosen_by_blend(job: PrefillJob, reuse: ItemReuse, inside: Sequence[int]) -> set[int]:
    """Of the item's tokens that are in one pass, those whose fresh keys are farthest."""
    assert reuse.blend is not None
    layer, first = reuse.blend.check_layer, job.inputs.items[reuse.item].span.start
    fresh = fresh_kv(layer, torch.tensor(job.inputs.token_ids)[inside])[0]
    donor = job.placed[reuse.item].segment.layer(layer)[0][[token - first for token in inside]]
    far = (fresh - donor).square().sum(dim=(1, 2)).tolist()
    order = sorted(range(len(inside)), key=far.__getitem__)
    # Summed up over the passes, as many stay as would in one.
    begin = inside[0] - reuse.span.start
    stay = reuse.blend.count(begin + len(inside)) - reuse.blend.count(begin)
    return {inside[row] for row in order[len(inside) - stay :]}


def computed_at(jobs: Sequence[PrefillJob], entering: list[tuple[int, int]], layer: int) -> list:
    """Those (job, token) pairs of a pass that a layer computes, choices by keys included."""
    left = []
    for number, job in enumerate(jobs):
        own = [token for owner, token in entering if owner == number]
        gone: set[int] = set()
        for reuse in job.plan.reused:
            gone |= set(tokens(*reuse.reused_at(layer)))
            inside = [token for token in own if reuse.span.start <= token < reuse.span.end]
            if reuse.blend is not None and layer > reuse.blend.check_layer and inside:
                gone |= set(inside) - chosen_by_blend(job, reuse, inside)
        left += [(number, token) for token in own if token not in gone]
    return left


# -- passes ---------------------------------------------------------------------------------


@property_test
@given(jobs=all_jobs(), max_tokens=st.integers(1, 30))
def test_passes_cover_all_runs_in_order_and_are_as_full_as_they_may_be(
    jobs: list[PrefillJob], max_tokens: int
) -> None:
    engine = Engine(max_tokens=max_tokens)
    engine.run(jobs)
    assert [forward.token_ids.tolist() for forward in engine.forwards] == [
        [token_ids(jobs[number], [token])[0] for number, token in entering]
        for entering in passes_of(jobs, max_tokens)
    ]
    for forward in engine.forwards:
        assert forward.positions.tolist() == [(forward.token_ids * 2).tolist()]


@property_test
@given(jobs=all_jobs(), max_tokens=st.integers(1, 30), max_rows=st.integers(1, 6))
def test_no_layer_has_more_rows_than_the_backend_takes(
    jobs: list[PrefillJob], max_tokens: int, max_rows: int
) -> None:
    engine = Engine(max_tokens=max_tokens, max_rows=max_rows)
    engine.run(jobs)
    for forward in engine.forwards:
        assert 0 < len(forward.token_ids) <= max_tokens
        for _, ids, rows in forward.stretches:
            assert len(rows) <= max_rows
            assert sum(len(row.span) for row in rows) == len(ids)
    entering = [ids for forward in engine.forwards for ids in forward.token_ids.tolist()]
    assert entering == [
        token for job in jobs for token in token_ids(job, tokens(*job.plan.runs_at(0)))
    ]


def test_rows_of_several_requests_share_a_pass_up_to_the_limit() -> None:
    spans = (Span(0, 1), Span(2, 3), Span(4, 5))
    scattered = ItemReuse(0, "donor", Span(0, 6), (Stage(0, spans),))
    jobs = [
        make_job(
            number,
            ReusePlan(Span(0, 6), (scattered,), f"{number}", (2 * number, 2 * number + 1)),
            [ITEM],
        )
        for number in range(2)
    ]
    sizes = {}
    for most in (None, 6, 4, 1):
        engine = Engine(max_rows=most)
        engine.run(jobs)
        sizes[most] = [len(forward.token_ids) for forward in engine.forwards]
    assert sizes == {None: [6], 6: [6], 4: [4, 2], 1: [1] * 6}


@property_test
@given(jobs=all_jobs(), max_tokens=st.integers(1, 30))
def test_each_layer_computes_the_tokens_that_stay(jobs: list[PrefillJob], max_tokens: int) -> None:
    engine = Engine(max_tokens=max_tokens)
    engine.run(jobs)
    for forward, entering in zip(engine.forwards, passes_of(jobs, max_tokens), strict=True):
        by_layer = {layer: ids for layers, ids, _ in forward.stretches for layer in layers}
        for layer in range(NUM_LAYERS):
            expected = computed_at(jobs, entering, layer)
            assert by_layer.get(layer, []) == [
                token_ids(jobs[number], [token])[0] for number, token in expected
            ]


@property_test
@given(jobs=all_jobs(), max_tokens=st.integers(1, 30))
def test_computed_tokens_are_counted_per_request_and_layer(
    jobs: list[PrefillJob], max_tokens: int
) -> None:
    counts = Engine(max_tokens=max_tokens).run(jobs)
    passes = passes_of(jobs, max_tokens)
    for number, own in enumerate(counts):
        assert own == tuple(
            sum(
                owner == number
                for entering in passes
                for owner, _ in computed_at(jobs, entering, layer)
            )
            for layer in range(NUM_LAYERS)
        )


@property_test
@given(jobs=all_jobs(may_blend=False), max_tokens=st.integers(1, 30))
def test_plans_say_how_much_each_layer_computes(jobs: list[PrefillJob], max_tokens: int) -> None:
    counts = Engine(max_tokens=max_tokens).run(jobs)
    for job, own in zip(jobs, counts, strict=True):
        assert own == tuple(len(tokens(*job.plan.runs_at(layer))) for layer in range(NUM_LAYERS))
        assert own[0] == job.plan.num_computed
        assert own[-1] == len(job.plan.claim) - job.plan.num_reused


@property_test
@given(jobs=all_jobs(), max_tokens=st.integers(1, 30))
def test_every_token_of_the_claims_gets_its_kv_exactly_once_in_every_layer(
    jobs: list[PrefillJob], max_tokens: int
) -> None:
    engine = Engine(max_tokens=max_tokens)
    engine.run(jobs)
    passes = passes_of(jobs, max_tokens)
    for index, layer in enumerate(engine.layers.values()):
        written = dict(layer.kv_cache)
        fresh = {pair for entering in passes for pair in computed_at(jobs, entering, index)}
        for number, job in enumerate(jobs):
            plan = job.plan
            slots = slots_of(plan.claim, plan.block_ids, BLOCK).tolist()
            for token, slot in zip(tokens(plan.claim), slots, strict=True):
                kv = written.pop(slot)
                if (number, token) in fresh:
                    expected = fresh_kv(index, torch.tensor([job.inputs.token_ids[token]]))[:, 0]
                else:
                    [reuse] = [r for r in plan.reused if r.span.start <= token < r.span.end]
                    offset = token - job.inputs.items[reuse.item].span.start
                    stored = job.placed[reuse.item].segment.layer(index)
                    expected = torch.stack([side[offset] for side in stored])
                assert torch.equal(kv, expected)
        assert not written


@property_test
@given(jobs=all_jobs(), max_tokens=st.integers(1, 30))
def test_metadata_rows_are_the_stretches_of_consecutive_tokens(
    jobs: list[PrefillJob], max_tokens: int
) -> None:
    engine = Engine(max_tokens=max_tokens)
    engine.run(jobs)
    by_blocks = {job.plan.block_ids: job for job in jobs}
    for forward in engine.forwards:
        for _, ids, rows in forward.stretches:
            assert ids == [
                number
                for row in rows
                for number in token_ids(by_blocks[row.block_ids], tokens(row.span))
            ]
            assert all(row.span for row in rows)
            assert all(
                a.block_ids != b.block_ids or a.span.end < b.span.start for a, b in pairwise(rows)
            )


@property_test
@given(jobs=all_jobs(), max_tokens=st.integers(1, 30))
def test_items_that_are_computed_completely_are_captured(
    jobs: list[PrefillJob], max_tokens: int
) -> None:
    engine = Engine(max_tokens=max_tokens)
    engine.run(jobs)
    assert not engine.capture.is_armed
    for job in jobs:
        for index in job.plan.captures:
            captured = engine.capture.finish(job.plan.req_id, index)
            span = job.inputs.items[index].span
            assert captured is not None
            assert captured.valid
            assert captured.writer.key == job.plan.captures[index]
            for layer, kv in enumerate(engine.captured[captured.writer.key]):
                expected = fresh_kv(
                    layer, torch.tensor(job.inputs.token_ids[span.start : span.end])
                )
                assert torch.equal(kv, expected)
    assert len(engine.capture) == 0


@property_test
@given(jobs=all_jobs(), max_tokens=st.integers(1, 30))
def test_tokens_of_items_that_enter_get_their_encoder_rows(
    jobs: list[PrefillJob], max_tokens: int
) -> None:
    engine = Engine(max_tokens=max_tokens)
    engine.run(jobs)
    for forward, entering in zip(engine.forwards, passes_of(jobs, max_tokens), strict=True):
        expected: list[float | None] = []
        for number, token in entering:
            own = [
                100.0 * item.index + token - item.span.start
                for item in jobs[number].inputs.items.values()
                if item.span.start <= token < item.span.end
            ]
            expected += own or [None]
        rows = [row for part in forward.encoder_rows for row in part.flatten().tolist()]
        assert rows == [row for row in expected if row is not None]
        assert forward.is_embed.tolist() == [row is not None for row in expected]


# -- stretches ------------------------------------------------------------------------------


def whole_pass(jobs: Sequence[PrefillJob]) -> _Pass:
    parts, row = [], 0
    for job in jobs:
        for run in job.plan.runs_at(0):
            parts.append(_Part(job, run, row))
            row += len(run)
    return _Pass(parts)


@property_test
@given(jobs=all_jobs(may_blend=False))
def test_layers_are_cut_exactly_where_rows_leave(jobs: list[PrefillJob]) -> None:
    this_pass = whole_pass(jobs)
    if not this_pass.parts:
        return
    account = [computed_at(jobs, passes_of(jobs, 10**6)[0], layer) for layer in range(NUM_LAYERS)]
    starts = [layer for layer in range(1, NUM_LAYERS) if account[layer] != account[layer - 1]]
    expected = [range(*cut) for cut in pairwise([0, *starts, NUM_LAYERS])]
    assert this_pass.stretches(NUM_LAYERS) == expected
    assert this_pass.num_rows == len(account[0])
    for layer in range(NUM_LAYERS):
        rows = np.flatnonzero(this_pass.computed_at(layer)).tolist()
        assert [passes_of(jobs, 10**6)[0][row] for row in rows] == account[layer]


@property_test
@given(jobs=all_jobs())
def test_layers_are_cut_behind_every_check(jobs: list[PrefillJob]) -> None:
    this_pass = whole_pass(jobs)
    if not this_pass.parts:
        return
    stretches = this_pass.stretches(NUM_LAYERS)
    assert [layer for stretch in stretches for layer in stretch] == list(range(NUM_LAYERS))
    checks = {r.blend.check_layer for job in jobs for r in job.plan.reused if r.blend is not None}
    assert checks <= {stretch[-1] for stretch in stretches}
    for layer in range(NUM_LAYERS):
        assert [reuse for _, reuse in this_pass.blends_behind(layer)] == [
            reuse
            for job in jobs
            for part in this_pass.parts
            if part.job is job
            for reuse in job.plan.reused
            if reuse.blend is not None
            and reuse.blend.check_layer == layer
            and reuse.span.clip(part.span.start, part.span.end)
        ]


def example(
    *reuse: ItemReuse, end: int = 20, block_ids: tuple[int, ...] = tuple(range(9))
) -> PrefillJob:
    """A request of `end` tokens; its reused items are exactly their spans."""
    items = [Item(r.item, r.span, r.item, "kv", "rows") for r in reuse]
    return make_job(0, ReusePlan(Span(0, end), reuse, "request", block_ids), items)


LAYERED = ItemReuse(
    0, "donor", Span(2, 12), (Stage(0, (Span(2, 8),)), Stage(2, (Span(2, 4), Span(6, 7))))
)


def test_stretches_by_example() -> None:
    engine = Engine()
    assert engine.run([example(LAYERED)]) == [(16, 16, 13, 13, 13)]
    [forward] = engine.forwards
    blocks = tuple(range(9))
    assert forward.stretches == [
        (
            range(0, 2),
            [*range(8), *range(12, 20)],
            [Row(Span(0, 8), blocks), Row(Span(12, 20), blocks)],
        ),
        (
            range(2, 5),
            [0, 1, 2, 3, 6, *range(12, 20)],
            [Row(Span(0, 4), blocks), Row(Span(6, 7), blocks), Row(Span(12, 20), blocks)],
        ),
    ]


def test_metadata_rows_of_an_alive_mask_by_example() -> None:
    this_pass = whole_pass([example(LAYERED, block_ids=(4, 3, 2, 1, 0))])
    alive = np.ones(16, dtype=bool)
    alive[[0, 3, 4, 8]] = False  # row 8 is token 12, the first one behind the item
    rows = this_pass.metadata_rows(alive)
    assert [row.span for row in rows] == [Span(1, 3), Span(5, 8), Span(13, 20)]
    assert all(row.block_ids.tolist() == [4, 3, 2, 1, 0] for row in rows)
    assert this_pass.metadata_rows(np.zeros(16, dtype=bool)) == []


def test_a_pass_without_reuse_is_one_stretch_of_all_layers() -> None:
    engine = Engine()
    assert engine.run([example(end=7)]) == [(7,) * NUM_LAYERS]
    [forward] = engine.forwards
    assert [layers for layers, _, _ in forward.stretches] == [range(NUM_LAYERS)]


def test_stages_that_change_nothing_cut_nothing() -> None:
    stages = (Stage(0, (Span(2, 4),)), Stage(1, (Span(2, 4),)), Stage(3, (Span(2, 4),)))
    engine = Engine()
    engine.run([example(ItemReuse(0, "donor", Span(2, 12), stages))])
    assert [layers for layers, _, _ in engine.forwards[0].stretches] == [range(NUM_LAYERS)]


def test_layers_behind_the_last_row_are_left_out() -> None:
    stages = (Stage(0, (Span(0, 4),)), Stage(2, ()))
    engine = Engine()
    job = example(ItemReuse(0, "donor", Span(0, 4), stages), end=4)
    assert engine.run([job]) == [(4, 4, 0, 0, 0)]
    assert [layers for layers, _, _ in engine.forwards[0].stretches] == [range(0, 2)]
    assert all(len(layer.kv_cache) == 4 for layer in engine.layers.values())


def test_a_plan_that_computes_nothing_needs_no_pass() -> None:
    engine = Engine()
    job = example(ItemReuse(0, "donor", Span(0, 4), (Stage(0, ()),)), end=4)
    assert engine.run([job]) == [(0,) * NUM_LAYERS]
    assert engine.forwards == []
    assert all(len(layer.kv_cache) == 4 for layer in engine.layers.values())


def test_a_check_whose_tokens_all_stay_goes_on_with_the_same_rows() -> None:
    reuse = ItemReuse(0, "donor", Span(2, 6), (Stage(0, (Span(2, 6),)),), Blend(1, Fraction(1)))
    engine = Engine()
    assert engine.run([example(reuse, end=8)]) == [(8,) * NUM_LAYERS]
    assert [layers for layers, _, _ in engine.forwards[0].stretches] == [range(0, 2), range(2, 5)]


BLENDED = ItemReuse(0, "donor", Span(2, 12), (Stage(0, (Span(2, 12),)),), Blend(1, Fraction(3, 10)))


def test_tokens_far_from_the_donor_stay_behind_the_check() -> None:
    engine = Engine()
    job = example(BLENDED, end=14)
    assert engine.run([job]) == [(14, 14, 7, 7, 7)]
    chosen = chosen_by_blend(job, BLENDED, tokens(BLENDED.span))
    [_, (_, ids, _)] = engine.forwards[0].stretches
    assert ids == [0, 1, *sorted(chosen), 12, 13]


@pytest.mark.parametrize("max_tokens", [14, 7, 5, 4, 3, 1])
def test_as_many_tokens_of_a_blend_are_reused_as_its_plan_says(max_tokens: int) -> None:
    """However the item falls apart into passes."""
    job = example(BLENDED, end=14)
    [by_layer] = Engine(max_tokens=max_tokens).run([job])
    assert len(job.plan.claim) - by_layer[-1] == job.plan.num_reused


def test_a_check_without_keys_fails_and_leaves_nothing_behind() -> None:
    engine = Engine()
    engine.writes_keys = False
    with pytest.raises(AgreedError) as raised:
        engine.run([example(BLENDED)])
    assert str(raised.value.__cause__) == "layer 1 wrote no keys"
    assert engine.prefill._check_layer is None
    assert engine.prefill._check_keys is None
    assert not engine.capture.is_armed


def test_keys_of_layers_that_are_not_checked_are_not_kept() -> None:
    engine = Engine()
    engine.prefill.on_kv_write(0, torch.zeros(1, HEADS, DIM))
    assert engine.prefill._check_keys is None
    engine.run([example(BLENDED)])
    assert engine.prefill._check_keys is None


def test_encoder_rows_follow_the_mask_of_their_item() -> None:
    embeds = (Span(0, 1), Span(2, 4), Span(5, 6))
    item = Item(0, Span(1, 7), 0, "kv", "rows", embeds)
    job = make_job(0, ReusePlan(Span(0, 8), (), "request", (0, 1)), [item])
    engine = Engine(max_tokens=3)
    engine.run([job])
    rows = [[part.flatten().tolist() for part in f.encoder_rows] for f in engine.forwards]
    assert rows == [[[0.0]], [[1.0, 2.0]], [[3.0]]]
    assert [forward.is_embed.tolist() for forward in engine.forwards] == [
        [False, True, False],
        [True, True, False],
        [True, False],
    ]


def test_a_part_of_an_item_without_any_row_adds_none() -> None:
    item = Item(0, Span(0, 4), 0, "kv", "rows", (Span(2, 4),))
    job = make_job(0, ReusePlan(Span(0, 4), (), "request", (0,)), [item])
    engine = Engine(max_tokens=2)
    engine.run([job])
    assert [len(forward.encoder_rows) for forward in engine.forwards] == [0, 1]

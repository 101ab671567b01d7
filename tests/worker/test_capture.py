"""Segment capture against writes of which the test keeps its own account."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_connector.protocol import Span
from vlcache_connector.support import KVShape
from vlcache_connector.worker.capture import SegmentCapture

LAYERS = ["layers.0.attn", "layers.1.attn", "layers.2.attn"]
SHAPE = KVShape(
    num_layers=len(LAYERS), num_kv_heads=2, head_dim=4, dtype=torch.float32, block_size=4
)


def make_capture(shape: KVShape = SHAPE) -> SegmentCapture:
    return SegmentCapture(LAYERS, shape, torch.device("cpu"))


def values_of(layer: int, name: int, tokens: list[int], shape: KVShape = SHAPE) -> Tensor:
    """K and V [2, n, kv_heads, head_dim] that tell layer, request, token, head and entry apart."""
    size = shape.num_kv_heads * shape.head_dim
    base = torch.tensor(tokens, dtype=torch.float64).view(-1, 1) + 1000 * name + 100_000 * layer
    keys = base + torch.arange(size, dtype=torch.float64) / (2 * size)
    return (
        torch.stack([keys, -keys]).view(2, -1, shape.num_kv_heads, shape.head_dim).to(shape.dtype)
    )


@dataclass
class Pass:
    """What one forward writes: (request, token, slot) rows, in the order of the batch."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, name: int, span: Span, slots: list[int]) -> None:
        self.rows += [(name, span.start + i, slot) for i, slot in enumerate(slots)]

    def write(self, capture: SegmentCapture, shape: KVShape = SHAPE) -> None:
        slots = torch.tensor([slot for _, _, slot in self.rows], dtype=torch.int64)
        for index, layer in enumerate(LAYERS):
            rows = [values_of(index, name, [token], shape) for name, token, _ in self.rows]
            key, value = torch.cat(rows, dim=1)
            capture.on_kv_write(layer, key, value, slots)
        capture.end_pass()


def assert_captured(
    capture: SegmentCapture, name: int, item: int, span: Span, shape: KVShape = SHAPE
) -> None:
    layers = capture.finish(str(name), item)
    assert len(layers) == len(LAYERS)
    for index, (key, value) in enumerate(layers):
        expected = values_of(index, name, list(range(span.start, span.end)), shape)
        assert torch.equal(key, expected[0])
        assert torch.equal(value, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_segment_that_is_written_at_once_is_captured_bit_by_bit(dtype: torch.dtype) -> None:
    shape = KVShape(3, 2, 4, dtype, block_size=4)
    capture, written = make_capture(shape), Pass()
    slots = [9, 10, 11, 4, 5]
    capture.expect("7", 0, num_tokens=5, offset=0, slots=torch.tensor(slots))
    written.add(7, Span(30, 35), slots)
    written.write(capture, shape)
    assert_captured(capture, 7, 0, Span(30, 35), shape)
    assert len(capture) == 0


@dataclass(frozen=True)
class Step:
    """A pass of a random schedule: which tokens of which request it writes, and what besides."""

    parts: tuple[tuple[int, Span], ...]
    padding: int


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[tuple[int, int], Span], list[Step], random.Random]:
    """Items of several requests, written chunk by chunk together with the text between them."""
    items: dict[tuple[int, int], Span] = {}
    chunks: list[list[tuple[int, Span]]] = []
    for name in range(draw(st.integers(1, 3))):
        position = 0
        for index in range(draw(st.integers(0, 3))):
            start = position + draw(st.integers(0, 3))
            position = start + draw(st.integers(1, 8))
            items[name, index] = Span(start, position)
        end = position + draw(st.integers(1, 3))
        cuts = sorted({0, end, *draw(st.lists(st.integers(0, end), max_size=3))})
        chunks.append([(name, Span(*pair)) for pair in pairwise(cuts)])
    steps = []
    for number in range(max(len(own) for own in chunks)):
        parts = [own[number] for own in chunks if number < len(own)]
        steps.append(Step(tuple(draw(st.permutations(parts))), draw(st.integers(0, 4))))
    return items, steps, draw(st.randoms(use_true_random=False))


@settings(deadline=None, max_examples=40)
@given(schedule=schedules())
def test_rows_scattered_over_passes_and_requests_come_together(
    schedule: tuple[dict[tuple[int, int], Span], list[Step], random.Random],
) -> None:
    items, steps, rng = schedule
    capture = make_capture()
    slots = list(range(200))
    rng.shuffle(slots)
    for step in steps:
        written = Pass()
        for name, chunk in step.parts:
            own = {token: slots.pop() for token in range(chunk.start, chunk.end)}
            written.add(name, chunk, list(own.values()))
            for (owner, index), span in items.items():
                part = span.clip(chunk.start, chunk.end)
                if owner == name and part:
                    wanted = [own[token] for token in range(part.start, part.end)]
                    capture.expect(
                        str(name),
                        index,
                        num_tokens=len(span),
                        offset=part.start - span.start,
                        slots=torch.tensor(wanted),
                    )
        written.rows += [(99, 0, -1)] * step.padding
        rng.shuffle(written.rows)
        written.write(capture)
    assert len(capture) == len(items)
    for (name, index), span in items.items():
        assert_captured(capture, name, index, span)


def test_padding_and_slots_that_are_written_twice_do_no_harm() -> None:
    capture, written = make_capture(), Pass()
    capture.expect("1", 0, num_tokens=3, offset=0, slots=torch.tensor([6, 2, 7]))
    written.add(5, Span(0, 3), [3, 3, -1])
    written.add(1, Span(10, 13), [6, 2, 7])
    written.add(5, Span(3, 7), [-1, 3, 0, -1])
    written.write(capture)
    assert_captured(capture, 1, 0, Span(10, 13))


def test_rows_behind_the_slots_are_padding() -> None:
    capture = make_capture()
    capture.expect("1", 0, num_tokens=2, offset=0, slots=torch.tensor([5, 4]))
    for index, layer in enumerate(LAYERS):
        key, value = values_of(index, 1, [0, 1, 2, 3])
        capture.on_kv_write(layer, key, value, torch.tensor([4, 5]))
    capture.end_pass()
    for index, (key, value) in enumerate(capture.finish("1", 0)):
        assert torch.equal(torch.stack([key, value]), values_of(index, 1, [1, 0]))


def test_an_item_in_two_parts_of_one_pass_comes_together() -> None:
    capture, written = make_capture(), Pass()
    capture.expect("1", 2, num_tokens=4, offset=2, slots=torch.tensor([1, 0]))
    capture.expect("1", 2, num_tokens=4, offset=0, slots=torch.tensor([8, 9]))
    written.add(1, Span(20, 24), [8, 9, 1, 0])
    written.write(capture)
    assert_captured(capture, 1, 2, Span(20, 24))


def test_keys_that_are_views_with_gaps_are_captured() -> None:
    capture = make_capture()
    capture.expect("1", 0, num_tokens=2, offset=0, slots=torch.tensor([4, 5]))
    for index, layer in enumerate(LAYERS):
        fused = torch.cat(list(values_of(index, 1, [0, 1])), dim=-1)
        key, value = fused.chunk(2, dim=-1)
        assert not key.is_contiguous()
        capture.on_kv_write(layer, key, value, torch.tensor([4, 5]))
    capture.end_pass()
    assert_captured(capture, 1, 0, Span(0, 2))


def test_a_capture_is_armed_from_expect_until_the_pass_ends() -> None:
    capture = make_capture()
    assert not capture.is_armed
    capture.expect("1", 0, num_tokens=2, offset=0, slots=torch.tensor([0]))
    assert capture.is_armed
    capture.end_pass()
    assert not capture.is_armed


def test_writes_that_nobody_expects_are_ignored() -> None:
    capture, written = make_capture(), Pass()
    written.add(1, Span(0, 4), [0, 1, 2, 3])
    written.write(capture)
    assert len(capture) == 0


def test_writes_of_other_layers_are_ignored() -> None:
    capture, written = make_capture(), Pass()
    capture.expect("1", 0, num_tokens=2, offset=0, slots=torch.tensor([0, 1]))
    capture.on_kv_write(
        "draft.attn", torch.ones(2, 2, 4), torch.ones(2, 2, 4), torch.tensor([0, 1])
    )
    written.add(1, Span(3, 5), [0, 1])
    written.write(capture)
    assert_captured(capture, 1, 0, Span(3, 5))


def test_slots_that_are_used_again_in_a_later_pass_are_not_taken_again() -> None:
    capture = make_capture()
    capture.expect("1", 0, num_tokens=4, offset=0, slots=torch.tensor([0, 1]))
    first, second = Pass(), Pass()
    first.add(1, Span(0, 2), [0, 1])
    first.write(capture)
    capture.expect("1", 0, num_tokens=4, offset=2, slots=torch.tensor([2, 3]))
    second.add(1, Span(2, 4), [2, 3])
    second.add(8, Span(0, 2), [0, 1])
    second.write(capture)
    assert_captured(capture, 1, 0, Span(0, 4))


def test_a_captured_segment_is_a_copy() -> None:
    capture = make_capture()
    capture.expect("1", 0, num_tokens=1, offset=0, slots=torch.tensor([3]))
    key, value = values_of(0, 1, [0])
    written = key.clone()
    for layer in LAYERS:
        capture.on_kv_write(layer, key, value, torch.tensor([3]))
    key.zero_()
    assert torch.equal(capture.finish("1", 0)[0][0], written)


def test_cancelling_a_request_gives_up_all_its_items_and_no_others() -> None:
    capture, written = make_capture(), Pass()
    for name, item, slot in (("1", 0, 0), ("1", 1, 1), ("11", 0, 2)):
        capture.expect(name, item, num_tokens=1, offset=0, slots=torch.tensor([slot]))
    capture.cancel("1")
    assert len(capture) == 1
    written.add(1, Span(0, 2), [0, 1])
    written.add(11, Span(5, 6), [2])
    written.write(capture)
    assert_captured(capture, 11, 0, Span(5, 6))
    with pytest.raises(KeyError):
        capture.finish("1", 0)


def test_a_cancelled_item_can_be_captured_anew() -> None:
    capture, first, second = make_capture(), Pass(), Pass()
    capture.expect("1", 0, num_tokens=3, offset=0, slots=torch.tensor([0, 1]))
    first.add(1, Span(100, 102), [0, 1])
    first.write(capture)
    capture.cancel("1")
    capture.expect("1", 0, num_tokens=3, offset=0, slots=torch.tensor([5, 6, 7]))
    second.add(1, Span(0, 3), [5, 6, 7])
    second.write(capture)
    assert_captured(capture, 1, 0, Span(0, 3))


def test_cancelling_an_unknown_request_does_nothing() -> None:
    capture = make_capture()
    capture.cancel("nobody")
    assert len(capture) == 0

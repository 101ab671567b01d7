"""Injection: which rows reach the paged cache, when, and rotated how."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_connector.attention.hook import KVWriteHook, observe_kv_writes
from vlcache_connector.rope import RotarySpec, delta_angles, rotate, shift_keys
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.segment import Segment, SegmentInfo
from vlcache_connector.worker.injection import (
    Injection,
    PlacedSegment,
    ReusedRows,
    Rows,
    rotation,
)
from vlcache_connector.worker.stopwatch import Stopwatch

NUM_LAYERS, N, HEADS, DIM = 3, 12, 2, 8
PLAIN = RotarySpec(torch.tensor([1.0, 0.3, 0.1, 0.03]), DIM, DIM, is_neox=True)
MROPE = RotarySpec(
    torch.tensor([1.0, 0.3, 0.1, 0.03]), DIM, DIM, is_neox=True, mrope_section=(1, 1, 2)
)


class _Cache:
    """Stands for a backend: notes every row that is written."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: dict[int, Any], slots: Tensor
    ) -> None:
        assert len(key) == len(value) == len(slots)
        for row, slot in enumerate(slots.tolist()):
            assert slot not in kv_cache, "written twice"
            kv_cache[slot] = (key[row].clone(), value[row].clone())


class _Impl(KVWriteHook, _Cache):
    """Wrapped as vLLM's backends are."""


def make_layer() -> Any:
    return SimpleNamespace(impl=_Impl(), kv_cache={}, layer_name="layer")


def segment(seed: int = 0, num_layers: int = NUM_LAYERS, n: int = N) -> Segment:
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(num_layers, 2, n, HEADS, DIM, generator=generator)
    return Segment(SegmentInfo(SegmentId("key", "kv"), n, None), [kv[:1], kv[1:]], lambda _: None)


def place(
    angles: Tensor | None = None, spec: RotarySpec = PLAIN, first_slot: int = 100
) -> PlacedSegment:
    # Slots go backwards, so that rows and slots can't be mixed up unnoticed.
    slots = torch.arange(first_slot + N, first_slot, -1)
    return PlacedSegment(segment(first_slot), spec, slots, angles)


def angles_per_token(spec: RotarySpec = PLAIN) -> Tensor:
    return delta_angles(spec, torch.arange(N) * 5 - 20)


ANGLES: dict[str, Callable[[], Tensor | None]] = {
    "copied": lambda: None,
    "moved alike": lambda: delta_angles(PLAIN, torch.tensor([17])),
    "moved apart": angles_per_token,
}
all_angles = pytest.mark.parametrize("angles", ANGLES.values(), ids=ANGLES)


# -- rotation -------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 3])
def test_what_does_not_move_is_not_rotated(axes: int) -> None:
    positions = torch.randint(0, 1000, (axes, N), generator=torch.Generator().manual_seed(0))
    assert rotation(PLAIN if axes == 1 else MROPE, positions, positions.clone()) is None


@pytest.mark.parametrize(("spec", "axes"), [(PLAIN, 1), (MROPE, 3)], ids=["rope", "mrope"])
def test_tokens_that_move_alike_share_one_row_of_angles(spec: RotarySpec, axes: int) -> None:
    base = torch.randint(0, 1000, (axes, N), generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([[7], [-3], [0]])[:axes]
    angles = rotation(spec, base + shift, base)
    assert angles is not None
    assert angles.shape == (1, DIM // 2)
    assert torch.equal(angles, delta_angles(spec, shift if axes == 3 else shift[0]))


@pytest.mark.parametrize(("spec", "axes"), [(PLAIN, 1), (MROPE, 3)], ids=["rope", "mrope"])
def test_tokens_that_move_apart_have_angles_of_their_own(spec: RotarySpec, axes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    target, base = torch.randint(0, 1000, (2, axes, N), generator=generator)
    angles = rotation(spec, target, base)
    assert angles is not None
    assert angles.shape == (N, DIM // 2)
    keys = torch.randn(N, HEADS, DIM, generator=generator)
    delta = target - base
    expected = shift_keys(spec, keys, delta if axes == 3 else delta[0])
    assert torch.equal(rotate(spec, keys, angles), expected)


def test_a_single_token_that_moves_is_enough() -> None:
    base = torch.arange(N)[None]
    target = base.clone()
    target[0, 4] += 1
    angles = rotation(PLAIN, target, base)
    assert angles is not None
    assert [bool(row.any()) for row in angles] == [token == 4 for token in range(N)]


# -- placed segments ------------------------------------------------------------------------


@all_angles
def test_all_rows_are_the_donors_keys_rotated_and_its_values_as_they_are(
    angles: Callable[[], Tensor | None],
) -> None:
    placed = place(angles())
    for layer in range(NUM_LAYERS):
        stored_key, stored_value = placed.segment.layer(layer)
        key, value = placed.kv(layer, slice(0, N))
        by_row = angles()
        expected = stored_key if by_row is None else rotate(PLAIN, stored_key, by_row)
        assert torch.equal(key, expected)
        assert torch.equal(value, stored_value)


@all_angles
@settings(max_examples=25)
@given(start=st.integers(0, N), length=st.integers(0, N), layer=st.integers(0, NUM_LAYERS - 1))
def test_slices_and_index_tensors_of_the_same_rows_give_the_same_kv(
    angles: Callable[[], Tensor | None], start: int, length: int, layer: int
) -> None:
    placed, end = place(angles()), min(N, start + length)
    by_slice = placed.kv(layer, slice(start, end))
    by_index = placed.kv(layer, torch.arange(start, end))
    assert all(torch.equal(a, b) for a, b in zip(by_slice, by_index, strict=True))


@all_angles
@settings(max_examples=25)
@given(rows=st.lists(st.integers(0, N - 1), unique=True), layer=st.integers(0, NUM_LAYERS - 1))
def test_the_rotation_of_some_rows_is_some_rows_of_the_rotation(
    angles: Callable[[], Tensor | None], rows: list[int], layer: int
) -> None:
    placed = place(angles())
    chosen = torch.tensor(rows, dtype=torch.int64)
    whole = placed.kv(layer, slice(0, N))
    part = placed.kv(layer, chosen)
    assert all(torch.equal(a, b[chosen]) for a, b in zip(part, whole, strict=True))


def test_reading_leaves_the_donors_keys_alone() -> None:
    placed = place(angles_per_token())
    before = placed.segment.layer(0)[0].clone()
    placed.kv(0, slice(0, N))
    placed.kv(0, torch.tensor([1, 5]))
    assert torch.equal(placed.segment.layer(0)[0], before)


# -- writing --------------------------------------------------------------------------------


def offsets_of(rows: Rows) -> list[int]:
    return torch.arange(N)[rows].tolist()


@all_angles
@pytest.mark.parametrize("rows", [slice(3, 9), torch.tensor([0, 3, 4, 11])], ids=["slice", "index"])
def test_rows_go_to_the_slots_of_their_tokens(
    angles: Callable[[], Tensor | None], rows: Rows
) -> None:
    placed = place(angles())
    injection = Injection(NUM_LAYERS, [ReusedRows(placed, rows, range(NUM_LAYERS))])
    for index in range(NUM_LAYERS):
        layer = make_layer()
        injection.write_layer(index, layer)
        key, value = placed.kv(index, slice(0, N))
        expected = {100 + N - offset: offset for offset in offsets_of(rows)}
        assert layer.kv_cache.keys() == expected.keys()
        for slot, (own_key, own_value) in layer.kv_cache.items():
            assert torch.equal(own_key, key[expected[slot]])
            assert torch.equal(own_value, value[expected[slot]])


def test_a_layer_is_written_once_however_often_it_is_asked_for() -> None:
    layers = [make_layer() for _ in range(NUM_LAYERS)]
    injection = Injection(NUM_LAYERS, [ReusedRows(place(), slice(0, N), range(NUM_LAYERS))])
    for index in (0, 0, 1, 0, 2, 1, 2):
        injection.write_layer(index, layers[index])
    assert all(len(layer.kv_cache) == N for layer in layers)


@settings(max_examples=40)
@given(
    parts=st.lists(
        st.tuples(
            st.sets(st.integers(0, N - 1)), st.integers(0, NUM_LAYERS), st.integers(0, NUM_LAYERS)
        ),
        max_size=4,
    ),
    late=st.integers(0, 4),
)
def test_each_layer_gets_its_own_rows_of_every_part(
    parts: list[tuple[set[int], int, int]], late: int
) -> None:
    placed = [place(first_slot=100 * number) for number in range(1, len(parts) + 1)]
    made = [
        ReusedRows(own, torch.tensor(sorted(rows), dtype=torch.int64), range(start, end))
        for own, (rows, start, end) in zip(placed, parts, strict=True)
    ]
    injection = Injection(NUM_LAYERS, made[:late])
    for part in made[late:]:
        injection.add(part)
    for index in range(NUM_LAYERS):
        layer = make_layer()
        injection.write_layer(index, layer)
        assert set(layer.kv_cache) == {
            100 * number + N - offset
            for number, (rows, start, end) in enumerate(parts, 1)
            for offset in rows
            if start <= index < end
        }


def test_rows_that_are_added_while_the_layers_run_reach_those_that_come() -> None:
    layers = [make_layer() for _ in range(NUM_LAYERS)]
    placed = place()
    injection = Injection(NUM_LAYERS, [ReusedRows(placed, slice(0, 4), range(NUM_LAYERS))])
    injection.write_layer(0, layers[0])
    injection.add(ReusedRows(placed, torch.tensor([6, 9]), range(1, NUM_LAYERS)))
    for index in (1, 2):
        injection.write_layer(index, layers[index])
    assert [len(layer.kv_cache) for layer in layers] == [4, 6, 6]


def test_a_claim_that_ends_inside_the_segment_has_slots_for_its_part_only() -> None:
    whole = place()
    placed = PlacedSegment(whole.segment, PLAIN, whole.slots[:7], angles_per_token())
    injection = Injection(NUM_LAYERS, [ReusedRows(placed, slice(2, 7), range(1))])
    layer = make_layer()
    injection.write_layer(0, layer)
    assert set(layer.kv_cache) == {112 - offset for offset in range(2, 7)}


def test_reused_kv_is_not_observed() -> None:
    class Fail:
        def on_kv_write(self, *_: Any) -> None:
            raise AssertionError("reused KV must never be stored again")

    observe_kv_writes(Fail())
    try:
        injection = Injection(NUM_LAYERS, [ReusedRows(place(), slice(0, N), range(1))])
        injection.write_layer(0, make_layer())
    finally:
        observe_kv_writes(None)


def test_writing_is_timed_and_the_sparse_prefill_around_it() -> None:
    instants = iter([1.0, 2.0, 3.5, 6.0])
    stopwatch = Stopwatch(lambda: next(instants))
    parts = [ReusedRows(place(), slice(0, N), range(1))]
    injection = Injection(NUM_LAYERS, parts, stopwatch=stopwatch)
    stopwatch.start("sparse_prefill")
    injection.write_layer(0, make_layer())
    injection.write_layer(1, make_layer())  # nothing is to be written
    stopwatch.start("forward")
    assert stopwatch.laps.seconds() == {"load": 1.5, "sparse_prefill": 3.5}

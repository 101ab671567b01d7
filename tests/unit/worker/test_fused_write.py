"""Reused KV by the kernel: the same bits in the same slots as by vLLM's own write."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.triton_device import DEVICE, needs_triton
from vlcache_connector.attention.hook import KVWriteHook, observe_kv_writes
from vlcache_connector.rope import RotarySpec, delta_angles
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.segment import Segment, SegmentInfo
from vlcache_connector.worker import fused_write
from vlcache_connector.worker.fused_write import choose_write, obstacle, write_fused
from vlcache_connector.worker.injection import (
    Injection,
    PlacedSegment,
    ReusedRows,
    Rows,
    write_by_vllm,
)

NUM_LAYERS, N, HEADS, DIM, BLOCK_SIZE, BLOCKS = 3, 20, 2, 16, 16, 4
SPEC = RotarySpec(0.5 ** torch.arange(8, dtype=torch.float32), DIM, DIM, is_neox=True)
ANGLES = {
    "copied": None,
    "moved alike": delta_angles(SPEC, torch.tensor([17])),
    "moved apart": delta_angles(SPEC, torch.arange(N) * 5 - 20),
}
all_angles = pytest.mark.parametrize("angles", ANGLES.values(), ids=ANGLES)


class _Backend:
    """Writes as FLASH_ATTN does, in torch."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        key_cache, value_cache = kv_cache.transpose(1, 2).split(DIM, dim=-1)
        key_cache[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = key
        value_cache[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = value


class _Impl(KVWriteHook, _Backend):
    """Wrapped as vLLM's backends are."""


def make_layer(backend: str = "FLASH_ATTN") -> Any:
    return SimpleNamespace(
        impl=_Impl(),
        layer_name="layer",
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
        num_kv_heads=HEADS,
        kv_cache_dtype="auto",
        kv_cache=torch.zeros(BLOCKS, HEADS, BLOCK_SIZE, 2 * DIM, device=DEVICE).bfloat16(),
        _k_scale=torch.ones((), device=DEVICE),
        _v_scale=torch.ones((), device=DEVICE),
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend),
    )


def place(angles: Tensor | None, num_slots: int = N) -> PlacedSegment:
    kv = torch.randn(
        NUM_LAYERS, 2, N, HEADS, DIM, generator=torch.Generator().manual_seed(0)
    ).bfloat16()
    info = SegmentInfo(SegmentId("key", "kv"), N, None)
    segment = Segment(info, [kv[:1], kv[1:]], lambda _: None)
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(1))
    return PlacedSegment(
        segment,
        SPEC,
        slots[:num_slots].to(DEVICE),
        None if angles is None else angles.to(DEVICE),
    )


def assert_same(placed: PlacedSegment, rows: Rows) -> None:
    for index in range(NUM_LAYERS):
        part = ReusedRows(placed, rows, range(NUM_LAYERS))
        fused, by_vllm = make_layer(), make_layer()
        write_fused(index, fused, part)
        write_by_vllm(index, by_vllm, part)
        assert torch.equal(fused.kv_cache, by_vllm.kv_cache)


@needs_triton
@all_angles
@pytest.mark.parametrize(
    "rows",
    [slice(0, N), slice(3, 9), slice(4, 4), torch.tensor([2, 3, 7, 18]), torch.tensor([5])],
    ids=["all", "slice", "empty slice", "index", "one"],
)
def test_both_writes_give_the_same_bits(angles: Tensor | None, rows: Rows) -> None:
    assert_same(place(angles), rows)


@needs_triton
@all_angles
def test_no_rows(angles: Tensor | None) -> None:
    assert_same(place(angles), torch.tensor([], dtype=torch.int64))


@needs_triton
@all_angles
def test_a_claim_that_ends_inside_the_segment(angles: Tensor | None) -> None:
    assert_same(place(angles, num_slots=7), slice(2, 7))
    assert_same(place(angles, num_slots=7), torch.tensor([1, 4, 6]))


@given(rows=st.lists(st.integers(0, N - 1), unique=True))
def test_a_window_holds_its_rows_and_no_other(rows: list[int]) -> None:
    placed = place(None)
    chosen = torch.tensor(sorted(rows), dtype=torch.int64)
    stretch, slots = ReusedRows(placed, chosen, range(1)).window
    assert len(slots) == stretch.stop - stretch.start
    written = {stretch.start + int(offset) for offset in (slots >= 0).nonzero()}
    assert written == set(rows)
    assert slots[slots >= 0].tolist() == placed.slots[chosen.to(DEVICE)].tolist()


@needs_triton
def test_reused_kv_is_not_observed() -> None:
    class Fail:
        def on_kv_write(self, *_: Any) -> None:
            raise AssertionError("reused KV must never be stored again")

    observe_kv_writes(Fail())
    try:
        part = ReusedRows(place(None), slice(0, N), range(1))
        layer = make_layer()
        Injection(NUM_LAYERS, [part], write_fused).write_layer(0, layer)
    finally:
        observe_kv_writes(None)
    assert bool(layer.kv_cache.any())


# -- the choice -----------------------------------------------------------------------------


def chosen(
    caplog: pytest.LogCaptureFixture, layers: list[Any], device: str
) -> tuple[Any, list[tuple[int, str]]]:
    """What is chosen, and what was logged at which level."""
    logger = fused_write.__name__
    with caplog.at_level(logging.INFO, logger=logger):
        write = choose_write(layers, SPEC, torch.bfloat16, torch.device(device))
    return write, [(r.levelno, r.getMessage()) for r in caplog.records if r.name == logger]


@needs_triton
def test_the_kernel_is_chosen_where_it_works(caplog: pytest.LogCaptureFixture) -> None:
    layers = [make_layer() for _ in range(NUM_LAYERS)]
    write, [(level, _)] = chosen(caplog, layers, "cuda")
    assert (write, level) == (write_fused, logging.INFO)
    assert not any(bool(layer.kv_cache.any()) for layer in layers)


def test_one_layer_that_is_not_covered_is_one_line_and_no_kernel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layers = [make_layer(), make_layer("FLEX_ATTENTION"), make_layer("FLEX_ATTENTION")]
    write, [(level, message)] = chosen(caplog, layers, "cuda")
    assert (write, level) == (write_by_vllm, logging.WARNING)
    assert message.endswith("without the Triton kernel: attention backend FLEX_ATTENTION")


def test_on_a_cpu_nothing_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(caplog, [make_layer()], "cpu") == (write_by_vllm, [])


@needs_triton
def test_a_kernel_that_fails_is_not_chosen(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("PTX of another time\nand more of it")

    monkeypatch.setattr("vlcache_connector.kernels.delta_rope.scatter", fail)
    write, [(_, message)] = chosen(caplog, [make_layer()], "cuda")
    assert write is write_by_vllm
    assert message.endswith(": RuntimeError: PTX of another time")
    assert obstacle([make_layer()], SPEC, torch.bfloat16) is not None

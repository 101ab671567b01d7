"""The kernel against float64, and bit by bit against torch."""

from __future__ import annotations

import cmath
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.triton_device import DEVICE, needs_triton
from vlcache_connector.kernels.delta_rope import scatter
from vlcache_connector.kernels.paged import (
    FLOAT8_DTYPES,
    PLAIN_DTYPES,
    PagedKV,
    scatter_reference,
    turns_of,
)
from vlcache_connector.rope import RotarySpec, delta_angles, shift_keys

pytestmark = needs_triton

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
ORDERS = {"NHD": (0, 1, 2, 3), "HND": (0, 2, 1, 3), "heads outermost": (2, 0, 1, 3)}
"""Dimensions (block, place, head, element) from outermost to innermost."""
FILL = 7.0


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def make_spec(head_dim: int, rotary_dim: int, is_neox: bool, mrope: bool = False) -> RotarySpec:
    pairs = rotary_dim // 2
    inv_freq = (10_000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)).to(torch.float32)
    section = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3) if mrope else None
    return RotarySpec(inv_freq, head_dim, rotary_dim, is_neox, section)


@dataclass
class Case:
    """What is written, on the CPU, and a cache to write to."""

    spec: RotarySpec
    key: Tensor
    value: Tensor
    slots: Tensor
    angles: Tensor | None
    cache_dtype: torch.dtype
    block_size: int = 16
    num_blocks: int = 4
    order: tuple[int, ...] = ORDERS["NHD"]
    packed: bool = True

    def paged(self) -> PagedKV:
        heads, dim = self.key.shape[1:]
        shape = (self.num_blocks, self.block_size, heads, 2 * dim)
        inverse = [self.order.index(axis) for axis in range(4)]
        cache = torch.full([shape[axis] for axis in self.order], FILL)
        cache = cache.to(DEVICE, self.cache_dtype).permute(inverse)
        key, value = cache.split(dim, dim=-1)
        if not self.packed:
            # V alone, and denser.
            value = value.contiguous()
        # Powers of two and others, to see each divide its own side.
        return PagedKV(
            key, value, torch.tensor(0.3, device=DEVICE), torch.tensor([1.7], device=DEVICE)
        )

    def run(self) -> tuple[Tensor, Tensor]:
        """The caches' content after the kernel, on the CPU."""
        paged = self.paged()
        turns = None if self.angles is None else turns_of(self.angles.to(DEVICE))
        scatter(
            paged,
            self.spec,
            self.key.to(DEVICE),
            self.value.to(DEVICE),
            self.slots.to(DEVICE),
            turns,
        )
        return paged.key.cpu(), paged.value.cpu()

    def by_torch(self) -> tuple[Tensor, Tensor]:
        paged = self.paged()
        scatter_reference(
            paged,
            self.spec,
            self.key.to(DEVICE),
            self.value.to(DEVICE),
            self.slots.to(DEVICE),
            None if self.angles is None else self.angles.to(DEVICE),
        )
        return paged.key.cpu(), paged.value.cpu()

    def exact_keys(self) -> Tensor:
        """float64 [n, heads, dim], pair by pair."""
        spec, out = self.spec, self.key.to(torch.float64)
        if self.angles is None:
            return out
        angles = self.angles.to(torch.float64).expand(len(self.key), -1)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        half = spec.rotary_dim // 2
        firsts = torch.arange(half) * (1 if spec.is_neox else 2)
        seconds = firsts + (half if spec.is_neox else 1)
        turned = torch.complex(out[..., firsts], out[..., seconds]) * turn
        out[..., firsts], out[..., seconds] = turned.real, turned.imag
        return out


def random_case(
    *,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    heads: int = 2,
    n: int = 20,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    is_neox: bool = True,
    angles: str = "one",
    block_size: int = 16,
    order: str = "NHD",
    packed: bool = True,
    skipped: int = 3,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = n // block_size + 2
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:n]
    skip = torch.randperm(n, generator=generator)[:skipped]
    slots[skip] = -1 - skip
    spec = make_spec(head_dim, rotary_dim or head_dim, is_neox)
    moves = torch.randint(-5000, 5000, (n,), generator=generator)
    # Each with strides of its own.
    key = (torch.randn(n, heads + 1, head_dim, generator=generator) * 3).to(dtype)[:, :heads]
    value = torch.randn(n, heads, head_dim, generator=generator).to(dtype)
    return Case(
        spec,
        key,
        value,
        slots,
        {
            "none": None,
            "one": delta_angles(spec, moves[:1]) if n else delta_angles(spec, torch.tensor([9])),
            "per token": delta_angles(spec, moves),
        }[angles],
        cache_dtype or dtype,
        block_size,
        num_blocks,
        ORDERS[order],
        packed,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    head_dim = draw(st.sampled_from([64, 80, 96, 128, 256]))
    n = draw(st.integers(0, 24))
    return random_case(
        head_dim=head_dim,
        rotary_dim=draw(st.sampled_from([head_dim, head_dim // 2, 10])),
        heads=draw(st.integers(1, 4)),
        n=n,
        dtype=draw(st.sampled_from(PLAIN_DTYPES)),
        cache_dtype=draw(st.sampled_from([None, None, *FLOAT8_DTYPES])),
        is_neox=draw(st.booleans()),
        angles=draw(st.sampled_from(["none", "one", "per token"])),
        block_size=draw(st.sampled_from([1, 8, 16, 48])),
        order=draw(st.sampled_from(sorted(ORDERS))),
        packed=draw(st.booleans()),
        skipped=draw(st.integers(0, n)),
        seed=draw(st.integers(0, 999)),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_row_is_in_its_slot_and_nothing_else_has_changed(case: Case) -> None:
    key, value = case.run()
    by_torch = case.by_torch()
    assert torch.equal(bits(key), bits(by_torch[0]))
    assert torch.equal(bits(value), bits(by_torch[1]))
    if case.cache_dtype in FLOAT8_DTYPES:
        return

    exact = case.exact_keys()
    # Rounded once; before that, a few roundings of float32 relative to the rotated pair.
    size = case.key.to(torch.float64).abs().amax(dim=-1, keepdim=True)
    bound = torch.finfo(case.cache_dtype).eps / 2 * exact.abs() + 2**-21 * size
    left = torch.ones(case.num_blocks, case.block_size, dtype=torch.bool)
    for token, slot in enumerate(case.slots.tolist()):
        if slot < 0:
            continue
        block, place = divmod(slot, case.block_size)
        left[block, place] = False
        error = (key[block, place].to(torch.float64) - exact[token]).abs()
        assert bool((error <= bound[token]).all())
        assert torch.equal(bits(value[block, place]), bits(case.value[token]))
        tail = slice(case.spec.rotary_dim, None)
        assert torch.equal(bits(key[block, place, :, tail]), bits(case.key[token, :, tail]))
        if case.angles is None:
            assert torch.equal(bits(key[block, place]), bits(case.key[token]))
    assert bool((key[left] == FILL).all())
    assert bool((value[left] == FILL).all())


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
@pytest.mark.parametrize("angles", ["none", "per token"])
def test_what_does_not_move_is_copied_bit_by_bit(dtype: torch.dtype, angles: str) -> None:
    case = random_case(dtype=dtype, angles=angles, skipped=0, is_neox=False)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40])
    case.key[:, :, :6] = special.to(dtype)
    case.value[:, :, :6] = special.to(dtype)
    moved = torch.arange(len(case.key)) % 2 == 1
    if case.angles is None:
        moved[:] = False
    else:
        case.angles[~moved] = 0.0
    key, value = case.run()
    for token, slot in enumerate(case.slots.tolist()):
        block, place = divmod(slot, case.block_size)
        is_copy = torch.equal(bits(key[block, place]), bits(case.key[token]))
        assert is_copy == (not moved[token])
        assert torch.equal(bits(value[block, place]), bits(case.value[token]))


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
def test_one_known_pair(is_neox: bool) -> None:
    """By hand: a quarter turn takes (first, second) to (-second, first)."""
    spec = make_spec(4, 4, is_neox)
    key = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4)
    angles = torch.tensor([[cmath.pi / 2, 0.0]])
    case = Case(spec, key, key, torch.tensor([17]), angles, torch.float32, num_blocks=2)
    written = case.run()[0][1, 1, 0]
    expected = [-3.0, 2.0, 1.0, 4.0] if is_neox else [-2.0, 1.0, 3.0, 4.0]
    assert torch.allclose(written, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_axes_that_move_apart(is_interleaved: bool) -> None:
    case = random_case(head_dim=128, n=16, skipped=0)
    spec = replace(make_spec(128, 128, True, mrope=True), mrope_interleaved=is_interleaved)
    delta = torch.randint(-900, 900, (3, 16), generator=torch.Generator().manual_seed(1))
    case.spec, case.angles = spec, delta_angles(spec, delta)
    expected = shift_keys(spec, case.key, delta)
    written = case.run()[0].flatten(0, 1)[case.slots]
    assert torch.equal(bits(written), bits(expected))


@pytest.mark.parametrize("cache_dtype", FLOAT8_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_float8_of_every_bfloat16(cache_dtype: torch.dtype, scale: float) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    value = every.view(torch.bfloat16).view(64, 4, 256)
    case = random_case(head_dim=256, heads=4, n=64, angles="none", skipped=0, seed=2)
    paged = replace(case, cache_dtype=cache_dtype, value=value, key=value).paged()
    one = torch.full((), scale, device=DEVICE)
    paged = replace(paged, key_scale=one, value_scale=one)
    rows = value.to(DEVICE)
    scatter(paged, case.spec, rows, rows, case.slots.to(DEVICE), None)
    largest = torch.finfo(cache_dtype).max
    expected = (value.float() / scale).clamp(-largest, largest).to(cache_dtype)
    for cache in (paged.key, paged.value):
        stored = cache.cpu().reshape(-1, 4, 256).view(torch.uint8)[case.slots]
        differs = stored != expected.view(torch.uint8)
        # Any sign of what is no number will do.
        assert bool(value[differs].isnan().all())
        assert bool(stored[differs].view(cache_dtype).float().isnan().all())


@pytest.mark.parametrize("n", [0, 5])
def test_without_slots_nothing_is_written(n: int) -> None:
    case = random_case(n=n, skipped=n)
    key, value = case.run()
    assert bool((key == FILL).all())
    assert bool((value == FILL).all())


def test_a_cache_that_needs_64_bits_to_count() -> None:
    if DEVICE.type != "cpu":
        pytest.skip("takes memory that only a CPU lends without having it")
    # Pages that nobody touches take no memory.
    num_blocks, block_size, heads, dim = 270_000, 16, 2, 128
    cache = torch.empty(num_blocks, block_size, heads, 2 * dim, dtype=torch.bfloat16)
    key_cache, value_cache = cache.split(dim, dim=-1)
    case = random_case(head_dim=dim, n=2, skipped=0, angles="none")
    case.slots[:] = torch.tensor([num_blocks * block_size - 1, num_blocks * block_size // 2 + 5])
    scale = torch.ones(())
    scatter(
        PagedKV(key_cache, value_cache, scale, scale),
        case.spec,
        case.key,
        case.value,
        case.slots,
        None,
    )
    assert cache.numel() > 2**31
    for token, slot in enumerate(case.slots.tolist()):
        block, place = divmod(slot, block_size)
        assert torch.equal(key_cache[block, place], case.key[token])
        assert torch.equal(value_cache[block, place], case.value[token])


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = random_case()
    slots, turns = case.slots.to(DEVICE), turns_of(delta_angles(case.spec, torch.arange(20)))
    key, value = case.key.to(DEVICE), case.value.to(DEVICE)
    for arguments, message in (
        ((key, value[:-1], slots, None), "K and V must be"),
        ((key, value, slots[:-1], None), "slots must be"),
        ((key, value, slots, turns[:3].to(DEVICE)), "turns must be"),
        ((key[:, :1], value[:, :1], slots, None), "does not take rows"),
    ):
        with pytest.raises(ValueError, match=message):
            scatter(case.paged(), case.spec, *arguments)
    wide = make_spec(128, 64, True)
    with pytest.raises(ValueError, match="K and V must be"):
        scatter(case.paged(), wide, key, value, slots, None)

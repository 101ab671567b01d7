"""Delta-RoPE against a naive float64 rotation written with complex numbers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_connector.rope import RotarySpec, delta_angles, rotate, shift_keys

KV_HEADS = 2
MAX_SHIFT = 128 * 1024
PAIRS = 8


def make_spec(
    *,
    is_neox: bool = True,
    head_dim: int = 2 * PAIRS,
    section: tuple[int, ...] | None = None,
    interleaved: bool = False,
) -> RotarySpec:
    exponents = torch.arange(PAIRS, dtype=torch.float64) / PAIRS
    return RotarySpec(
        inv_freq=(10_000.0**-exponents).to(torch.float32),
        head_dim=head_dim,
        rotary_dim=2 * PAIRS,
        is_neox=is_neox,
        mrope_section=section,
        mrope_interleaved=interleaved,
    )


# Per layout: the axis of every pair, written out, and the spec that should produce it.
LAYOUTS = {
    "neox": ("tttttttt", make_spec()),
    "gptj": ("tttttttt", make_spec(is_neox=False)),
    "partial": ("tttttttt", make_spec(head_dim=2 * PAIRS + 6)),
    "partial-gptj": ("tttttttt", make_spec(head_dim=2 * PAIRS + 6, is_neox=False)),
    "mrope-chunked": ("tthhhwww", make_spec(section=(2, 3, 3))),
    "mrope-chunked-gptj": ("thhhhwww", make_spec(section=(1, 4, 3), is_neox=False)),
    "mrope-interleaved": ("thwthwth", make_spec(section=(3, 3, 2), interleaved=True)),
    "mrope-interleaved-tail": ("thwthwtt", make_spec(section=(4, 2, 2), interleaved=True)),
    "mrope-interleaved-partial": (
        "thwthttt",
        make_spec(section=(5, 2, 1), interleaved=True, head_dim=2 * PAIRS + 4),
    ),
}
layouts = pytest.mark.parametrize(("axes", "spec"), LAYOUTS.values(), ids=LAYOUTS)


def naive_rotate(spec: RotarySpec, axes: str, keys: Tensor, positions: Tensor) -> Tensor:
    """Rotates unrotated keys to positions [3, n], pair by pair, in float64."""
    frequencies = spec.inv_freq.tolist()
    out = keys.tolist()
    for heads, place in zip(out, positions.T.tolist(), strict=True):
        for pair, (axis, frequency) in enumerate(zip(axes, frequencies, strict=True)):
            i, j = (pair, pair + PAIRS) if spec.is_neox else (2 * pair, 2 * pair + 1)
            angle = place["thw".index(axis)] * frequency
            turn = complex(math.cos(angle), math.sin(angle))
            for head in heads:
                turned = complex(head[i], head[j]) * turn
                head[i], head[j] = turned.real, turned.imag
    return torch.tensor(out, dtype=torch.float64)


def random_keys(spec: RotarySpec, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, KV_HEADS, spec.head_dim, generator=generator)


def as_positions(spec: RotarySpec, rows: list[tuple[int, int, int]]) -> Tensor:
    positions = torch.tensor(rows, dtype=torch.int64).T
    return positions if spec.mrope_section else positions[:1].expand(3, -1)


def rel_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error of a key relative to that key's norm."""
    error = (actual.to(torch.float64) - expected.to(torch.float64)).norm(dim=-1)
    return float((error / expected.to(torch.float64).norm(dim=-1)).max())


seeds = st.integers(0, 2**31)
steps = st.integers(-MAX_SHIFT, MAX_SHIFT)
triples = st.tuples(steps, steps, steps)
places = st.integers(0, MAX_SHIFT)
moves = st.tuples(st.tuples(places, places, places), st.tuples(places, places, places))
property_test = settings(max_examples=12)


@layouts
@property_test
@given(pairs=st.lists(moves, min_size=1, max_size=4), seed=seeds)
def test_moved_key_equals_key_computed_at_new_position(axes, spec, pairs, seed):
    old = as_positions(spec, [pair[0] for pair in pairs])
    new = as_positions(spec, [pair[1] for pair in pairs])
    keys = random_keys(spec, len(pairs), seed)
    at_old = naive_rotate(spec, axes, keys, old).to(torch.float32)
    at_new = naive_rotate(spec, axes, keys, new)

    moved = shift_keys(spec, at_old, new - old)

    assert moved.dtype == torch.float32
    assert rel_error(moved, at_new) < 1e-5
    assert torch.equal(moved[..., spec.rotary_dim :], keys[..., spec.rotary_dim :])


@layouts
@property_test
@given(shifts=st.lists(st.tuples(triples, triples), min_size=1, max_size=6), seed=seeds)
def test_shifts_add_up(axes, spec, shifts, seed):
    a = as_positions(spec, [shift[0] for shift in shifts])
    b = as_positions(spec, [shift[1] for shift in shifts])
    keys = random_keys(spec, len(shifts), seed)

    twice = shift_keys(spec, shift_keys(spec, keys, a), b)

    assert rel_error(twice, shift_keys(spec, keys, a + b)) < 1e-5


@layouts
@property_test
@given(shifts=st.lists(triples, min_size=1, max_size=6), seed=seeds)
def test_norm_is_preserved(axes, spec, shifts, seed):
    keys = random_keys(spec, len(shifts), seed)
    moved = shift_keys(spec, keys, as_positions(spec, shifts))
    assert torch.allclose(moved.norm(dim=-1), keys.norm(dim=-1), rtol=1e-6)


@layouts
@property_test
@given(shifts=st.lists(triples, min_size=1, max_size=4), seed=seeds)
def test_bf16_is_rounded_once(axes, spec, shifts, seed):
    delta = as_positions(spec, shifts)
    keys = random_keys(spec, len(shifts), seed).to(torch.bfloat16)

    moved = shift_keys(spec, keys, delta)

    expected = naive_rotate(spec, axes, keys, delta)
    scale = expected.norm(dim=-1, keepdim=True)
    assert moved.dtype == torch.bfloat16
    assert (
        (moved.to(torch.float64) - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * scale
    ).all()


@layouts
@property_test
@given(shift=triples, n=st.integers(1, 9), seed=seeds)
def test_one_angle_row_equals_per_token_form(axes, spec, shift, n, seed):
    delta = as_positions(spec, [shift] * n)
    keys = random_keys(spec, n, seed)
    general = rotate(spec, keys, delta_angles(spec, delta))
    torch.testing.assert_close(shift_keys(spec, keys, delta), general, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("uniform", [True, False])
def test_angle_rows_follow_delta(monkeypatch, uniform):
    used = []

    def record(spec: RotarySpec, keys: Tensor, angles: Tensor) -> Tensor:
        used.append(angles.shape[0])
        return rotate(spec, keys, angles)

    monkeypatch.setattr("vlcache_connector.rope.rotate", record)
    _, spec = LAYOUTS["mrope-chunked"]
    delta = torch.full((3, 5), 7)
    if not uniform:
        delta[1, 4] = 8
    shift_keys(spec, random_keys(spec, 5, 0), delta)
    assert used == [1 if uniform else 5]


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_zero_delta_returns_the_keys_themselves(axes, spec, dtype, shape):
    keys = random_keys(spec, 5, 0).to(dtype)
    assert shift_keys(spec, keys, torch.zeros(shape, dtype=torch.int64)) is keys


@layouts
def test_delta_of_one_row_counts_for_all_axes(axes, spec):
    delta = torch.tensor([3, 100_000, -4096])
    assert torch.equal(delta_angles(spec, delta), delta_angles(spec, delta.expand(3, -1)))


def test_no_tokens():
    spec = make_spec()
    keys = random_keys(spec, 0, 0)
    assert shift_keys(spec, keys, torch.zeros(3, 0, dtype=torch.int64)) is keys
    assert rotate(spec, keys, torch.zeros(1, PAIRS)).shape == keys.shape


def test_keys_are_left_alone_and_may_be_strided():
    spec = make_spec()
    paged = torch.randn(4, 2 * KV_HEADS, spec.head_dim)
    before = paged.clone()
    delta = torch.tensor([1, 2, 3, 4])
    strided = shift_keys(spec, paged[:, ::2], delta)
    assert torch.equal(strided, shift_keys(spec, paged[:, ::2].contiguous(), delta))
    assert torch.equal(paged, before)


@property_test
@given(delta=st.integers(-(2**40), 2**40))
def test_angles_keep_their_precision_at_any_distance(delta):
    spec = make_spec()
    angles = delta_angles(spec, torch.tensor([delta]))
    assert angles.dtype == torch.float32
    assert angles.shape == (1, PAIRS)
    assert angles.abs().max() <= 3.1415930
    for angle, frequency in zip(angles[0].tolist(), spec.inv_freq.tolist(), strict=True):
        exact = delta * frequency
        slack = 5e-7 + 4e-16 * abs(exact)
        assert math.cos(angle - exact) >= 1 - slack
        assert abs(math.sin(angle - exact)) <= slack


def test_rows_must_agree_without_mrope():
    spec = make_spec()
    keys = random_keys(spec, 2, 0)
    delta = torch.tensor([[1, 2], [1, 2], [1, 3]])
    with pytest.raises(ValueError, match="no M-RoPE"):
        shift_keys(spec, keys, delta)
    assert torch.equal(
        shift_keys(spec, keys, delta[:1].expand(3, -1)), shift_keys(spec, keys, delta[0])
    )


@pytest.mark.parametrize("shape", [(4,), (2, 5), (3, 4), (3, 5, 1), ()])
def test_delta_shape_is_checked(shape):
    spec = make_spec()
    with pytest.raises(ValueError, match=r"delta must be \[5\] or \[3, 5\]"):
        shift_keys(spec, random_keys(spec, 5, 0), torch.ones(shape, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2, 5), (3, 5, 1), ()])
def test_delta_shape_of_angles_is_checked(shape):
    with pytest.raises(ValueError, match=r"delta must be \[n\] or \[3, n\]"):
        delta_angles(make_spec(), torch.ones(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_delta_must_be_integer(dtype):
    with pytest.raises(ValueError, match="integers"):
        delta_angles(make_spec(), torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("shape", [(5, 16), (5, 2, 15), (1, 5, 2, 16)])
def test_keys_shape_is_checked(shape):
    with pytest.raises(ValueError, match=r"keys must be \[n, kv_heads, 16\], got \[.*5"):
        shift_keys(make_spec(), torch.zeros(shape), torch.ones(5, dtype=torch.int64))


def test_raw_bytes_are_refused():
    keys = torch.zeros(5, KV_HEADS, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="floating point"):
        shift_keys(make_spec(), keys, torch.ones(5, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(4, PAIRS), (5, PAIRS + 1), (PAIRS,)])
def test_angles_shape_is_checked(shape):
    spec = make_spec()
    with pytest.raises(ValueError, match=r"angles must be \[5 or 1, 8\]"):
        rotate(spec, random_keys(spec, 5, 0), torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 15}, "rotary_dim"),
        ({"rotary_dim": 0}, "rotary_dim"),
        ({"head_dim": 14}, "rotary_dim"),
        ({"inv_freq": torch.ones(7)}, "inv_freq"),
        ({"inv_freq": torch.ones(8, dtype=torch.float64)}, "inv_freq"),
        ({"mrope_section": (2, 3, 4)}, "mrope_section"),
        ({"mrope_section": (4, 4)}, "mrope_section"),
        ({"mrope_section": (9, -2, 1)}, "mrope_section"),
        ({"mrope_interleaved": True}, "mrope_section"),
    ],
)
def test_contradicting_specs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(make_spec(), **change)


def test_fingerprint_is_stable_and_covers_every_field():
    spec = make_spec(head_dim=18, section=(2, 3, 3))
    assert spec.fingerprint() == replace(spec, inv_freq=spec.inv_freq.clone()).fingerprint()
    nudged = spec.inv_freq.clone()
    nudged[3] = torch.nextafter(nudged[3], torch.tensor(1.0))
    variants = [
        spec,
        replace(spec, inv_freq=nudged),
        replace(spec, head_dim=20),
        replace(spec, rotary_dim=14, inv_freq=spec.inv_freq[:7], mrope_section=(2, 3, 2)),
        replace(spec, is_neox=False),
        replace(spec, mrope_section=(3, 2, 3)),
        replace(spec, mrope_section=None),
        replace(spec, mrope_interleaved=True),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)


def test_fingerprint_does_not_depend_on_process_or_platform():
    spec = RotarySpec(torch.tensor([1.0, 0.5]), head_dim=4, rotary_dim=4, is_neox=True)
    assert spec.fingerprint() == "f3a0cc5c719758bdb05953db1eff3b369501a6897118f549494eb1055a247eb2"

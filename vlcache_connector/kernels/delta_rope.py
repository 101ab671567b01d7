"""Delta-RoPE and the write into the paged cache in one pass: a Triton kernel.

Every row of K and V is read once and written once, wherever it belongs; no rotated copy of K is
made. Importing this module imports Triton.

The kernel handles bfloat16 and float8 as integers and rounds by itself. So it gives the same bits
on GPUs without such types and in Triton's interpreter, whose own conversions truncate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rope import RotarySpec
from .paged import PagedKV

_TILE = 2048
"""Elements of K, and of V, per program."""
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
_FLOAT8 = {torch.float8_e4m3fn: (3, 7, 448.0), torch.float8_e5m2: (2, 15, 57344.0)}
"""Mantissa bits, exponent bias, largest number."""


def scatter(
    paged: PagedKV,
    spec: RotarySpec,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    turns: Tensor | None,
) -> None:
    """Rotate K and write K and V to their slots.

    K is rotated in float32 and rounded once to its own dtype. Elements from rotary_dim on, pairs
    whose angle is zero, and V are copied bit by bit. For a float8 cache the result is then divided
    by the scale, rounded to nearest even and kept within the largest number, as vLLM does it.

    Args:
        paged: where to; elements of a head lie side by side. Nothing else of it is touched.
        spec: how the model rotates.
        key: bfloat16, float16 or float32 [n, kv_heads, head_dim], on the cache's device. Elements
            of a head lie side by side.
        value: the same for V.
        slots: int64 [n], contiguous, each at most once; tokens with a negative one are skipped.
            A slot behind the last block is not noticed.
        turns: float32 [n or 1, 2, rotary_dim // 2], contiguous, see `paged.turns_of`; a single row
            serves all tokens. None rotates nothing.

    Raises:
        ValueError: a shape does not match.
    """
    num_tokens, kv_heads, head_dim = key.shape
    _check_shapes(paged, spec, key, value, slots, turns)
    if not num_tokens:
        return
    mantissa, bias, largest = _FLOAT8.get(paged.key.dtype, (0, 0, 0.0))
    is_bfloat16 = key.dtype == torch.bfloat16
    key, value = (_bits(rows) for rows in (key, value))
    key_cache, value_cache = _bits(paged.key), _bits(paged.value)
    head_dim_padded = triton.next_power_of_2(head_dim)
    tokens = max(1, _TILE // head_dim_padded)
    _scatter_kernel[(triton.cdiv(num_tokens, tokens), kv_heads)](
        key,
        value,
        slots,
        # Never read without ROTATES; Triton wants a pointer.
        slots if turns is None else turns,
        key_cache,
        value_cache,
        paged.key_scale,
        paged.value_scale,
        num_tokens,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        BLOCK_SIZE=key_cache.shape[1],
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=head_dim_padded,
        ROTARY_DIM=spec.rotary_dim,
        TOKENS=tokens,
        ROTATES=turns is not None,
        PER_TOKEN=turns is not None and len(turns) > 1,
        IS_NEOX=spec.is_neox,
        IS_BFLOAT16=is_bfloat16,
        MANTISSA=mantissa,
        BIAS=bias,
        LARGEST=largest,
        # Rounds every product, as torch does: both ways give the same bits.
        enable_fp_fusion=False,
    )


def _bits(tensor: Tensor) -> Tensor:
    dtype = _BITS.get(tensor.dtype)
    return tensor if dtype is None else tensor.view(dtype)


def _check_shapes(
    paged: PagedKV,
    spec: RotarySpec,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    turns: Tensor | None,
) -> None:
    num_tokens = len(key)
    if key.shape != value.shape or key.shape[2] != spec.head_dim:
        raise ValueError(
            f"K and V must be [n, kv_heads, {spec.head_dim}], got {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    if slots.shape != (num_tokens,):
        raise ValueError(f"slots must be [{num_tokens}], got {list(slots.shape)}")
    if turns is not None and turns.shape not in (
        (num_tokens, 2, spec.num_pairs),
        (1, 2, spec.num_pairs),
    ):
        raise ValueError(
            f"turns must be [{num_tokens} or 1, 2, {spec.num_pairs}], got {list(turns.shape)}"
        )
    for cache in (paged.key, paged.value):
        if cache.shape[1:] != (paged.key.shape[1], *key.shape[1:]):
            raise ValueError(
                f"a cache of {list(cache.shape)} does not take rows of {list(key.shape[1:])}"
            )


# Slots and turns may begin anywhere; none of these is worth a compilation of its own.
@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["slots_ptr", "turns_ptr", "key_scale_ptr", "value_scale_ptr"],
)
def _scatter_kernel(
    key_ptr,
    value_ptr,
    slots_ptr,
    turns_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scale_ptr,
    value_scale_ptr,
    num_tokens,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    key_cache_block_stride,
    key_cache_place_stride,
    key_cache_head_stride,
    value_cache_block_stride,
    value_cache_place_stride,
    value_cache_head_stride,
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    HEAD_DIM_PADDED: tl.constexpr,  # noqa: N803
    ROTARY_DIM: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    ROTATES: tl.constexpr,  # noqa: N803
    PER_TOKEN: tl.constexpr,  # noqa: N803
    IS_NEOX: tl.constexpr,  # noqa: N803
    IS_BFLOAT16: tl.constexpr,  # noqa: N803
    MANTISSA: tl.constexpr,  # noqa: N803
    BIAS: tl.constexpr,  # noqa: N803
    LARGEST: tl.constexpr,  # noqa: N803
):
    """One program: one head of `TOKENS` tokens. MANTISSA 0: the cache has the dtype of K."""
    # Everything is 64 bits wide: caches are larger than what 32 bits count.
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    slots = tl.load(slots_ptr + tokens, mask=tokens < num_tokens, other=-1)
    is_written = (slots >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    block = slots // BLOCK_SIZE
    place = slots % BLOCK_SIZE

    key_rows = key_ptr + tokens[:, None] * key_token_stride + head * key_head_stride
    key = tl.load(key_rows + dims[None, :], mask=is_written)
    if ROTATES:
        half: tl.constexpr = ROTARY_DIM // 2
        if IS_NEOX:
            is_first = dims < half
            pair = tl.where(is_first, dims, dims - half)
            partner = tl.where(is_first, dims + half, dims - half)
        else:
            is_first = dims % 2 == 0
            pair = dims // 2
            partner = dims ^ 1
        is_rotated = is_written & (dims < ROTARY_DIM)[None, :]
        if PER_TOKEN:
            turns = turns_ptr + tokens[:, None] * ROTARY_DIM + pair[None, :]
            cosine = tl.load(turns, mask=is_rotated, other=1.0)
            sine = tl.load(turns + half, mask=is_rotated, other=0.0)
        else:
            cosine = tl.load(turns_ptr + pair, mask=dims < ROTARY_DIM, other=1.0)[None, :]
            sine = tl.load(turns_ptr + half + pair, mask=dims < ROTARY_DIM, other=0.0)[None, :]
        # Of the line that `key` came from: nothing is read from memory twice.
        other = tl.load(key_rows + partner[None, :], mask=is_rotated)
        sine = tl.where(is_first[None, :], -sine, sine)
        turned = _widen(key, IS_BFLOAT16) * cosine + _widen(other, IS_BFLOAT16) * sine
        # By zero is a copy, of zeros with a sign and of numbers that are none, too.
        key = tl.where(sine == 0.0, key, _narrow(turned, key, IS_BFLOAT16))
    if MANTISSA:
        scale = tl.load(key_scale_ptr)
        key = _to_float8(tl.div_rn(_widen(key, IS_BFLOAT16), scale), MANTISSA, BIAS, LARGEST)
    tl.store(
        key_cache_ptr
        + (block * key_cache_block_stride + place * key_cache_place_stride)[:, None]
        + head * key_cache_head_stride
        + dims[None, :],
        key,
        mask=is_written,
    )

    value_rows = value_ptr + tokens[:, None] * value_token_stride + head * value_head_stride
    value = tl.load(value_rows + dims[None, :], mask=is_written)
    if MANTISSA:
        scale = tl.load(value_scale_ptr)
        value = _to_float8(tl.div_rn(_widen(value, IS_BFLOAT16), scale), MANTISSA, BIAS, LARGEST)
    tl.store(
        value_cache_ptr
        + (block * value_cache_block_stride + place * value_cache_place_stride)[:, None]
        + head * value_cache_head_stride
        + dims[None, :],
        value,
        mask=is_written,
    )


@triton.jit
def _widen(raw, IS_BFLOAT16: tl.constexpr):  # noqa: N803
    """To float32, exactly; bfloat16 comes as its bits."""
    if IS_BFLOAT16:
        wide = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = raw.to(tl.float32)
    return wide


@triton.jit
def _narrow(x, like, IS_BFLOAT16: tl.constexpr):  # noqa: N803
    """From float32 to nearest even; to bits for bfloat16, else to the dtype of `like`."""
    if IS_BFLOAT16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # What is no number could be carried over into one.
        narrow = tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
    else:
        narrow = x.to(like.dtype)
    return narrow


@triton.jit
def _to_float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):  # noqa: N803
    """Bits of the nearest float8 (ties to even) to float32, no larger than `LARGEST`."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.abs(x)
    size = tl.where(size > LARGEST, LARGEST, size)
    bits = size.to(tl.int32, bitcast=True)
    drop: tl.constexpr = 23 - MANTISSA
    normal = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    normal -= (127 - BIAS) << MANTISSA
    # The last bit of this number counts as much as the last one of a subnormal float8, so that
    # adding it rounds.
    anchor: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    anchor_bits: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    subnormal = (size + anchor).to(tl.int32, bitcast=True) - anchor_bits
    result = tl.where(size < 2.0 ** (1 - BIAS), subnormal, normal)
    return tl.where(x == x, result | sign, 0x7F).to(tl.uint8)

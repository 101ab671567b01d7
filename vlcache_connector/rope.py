"""Delta-RoPE: moving rotated keys from one position to another.

Rotary embeddings (RoFormer, arXiv 2104.09864) rotate pair j of a key at position p by the angle
p * inv_freq[j]. Rotations of one pair add up, so a key that was rotated at p is brought to q by
rotating it once more by (q - p) * inv_freq[j]. With M-RoPE (Qwen2-VL, arXiv 2409.12191) a token has
three positions (t, h, w), and every pair belongs to one of these axes.

The rotation has unit modulus. Some models scale their cos/sin cache by an attention factor (YaRN,
arXiv 2309.00071); a stored key carries that factor already and must not get it a second time.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_NUM_AXES = 3


@dataclass(frozen=True, eq=False)
class RotarySpec:
    """How a model rotates its keys.

    Specs are compared by `fingerprint()`.

    Attributes:
        inv_freq: float32 [rotary_dim // 2], angle per position step of each pair. Linear, NTK, YaRN
            or Llama-3 scaling is already in it, an attention factor (mscale) is not.
        head_dim: elements of a key per KV head.
        rotary_dim: leading elements of a head that are rotated, even, <= head_dim (partial rotary).
        is_neox: pair j is elements (j, j + rotary_dim // 2) if true (GPT-NeoX), else (2j, 2j + 1)
            (GPT-J).
        mrope_section: number of pairs of the axes (t, h, w), summing to rotary_dim // 2; None for a
            rotation by one position.
        mrope_interleaved: the pairs are dealt to the axes in turn (Qwen3-VL) instead of as three
            contiguous parts (Qwen2-VL, Qwen2.5-VL).

    Raises:
        ValueError: the values contradict each other.
    """

    inv_freq: Tensor
    head_dim: int
    rotary_dim: int
    is_neox: bool
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False

    def __post_init__(self) -> None:
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim must be even and in (0, head_dim], got rotary_dim={self.rotary_dim}, "
                f"head_dim={self.head_dim}"
            )
        if self.inv_freq.shape != (self.num_pairs,) or self.inv_freq.dtype != torch.float32:
            raise ValueError(
                f"inv_freq must be float32 [{self.num_pairs}], got {self.inv_freq.dtype} "
                f"{list(self.inv_freq.shape)}"
            )
        if self.mrope_section is None:
            if self.mrope_interleaved:
                raise ValueError("mrope_interleaved needs an mrope_section")
        elif (
            len(self.mrope_section) != _NUM_AXES
            or min(self.mrope_section) < 0
            or sum(self.mrope_section) != self.num_pairs
        ):
            raise ValueError(
                f"mrope_section must be {_NUM_AXES} numbers that sum to {self.num_pairs}, got "
                f"{self.mrope_section}"
            )

    @property
    def num_pairs(self) -> int:
        """Number of rotated pairs of a head, rotary_dim // 2."""
        return self.rotary_dim // 2

    @cached_property
    def turns_per_step(self) -> Tensor:
        """Share of a full turn that a position step is for every pair: float64."""
        return self.inv_freq.to(torch.float64) / (2 * math.pi)

    @cached_property
    def pair_axes(self) -> Tensor:
        """Position axis of every pair: int64 [rotary_dim // 2], 0 = t, 1 = h, 2 = w.

        Source: `MRotaryEmbedding.forward_native` and `apply_interleaved_rope` in vLLM's
        `model_executor/layers/rotary_embedding/mrope.py`. All zero without M-RoPE.
        """
        axes = torch.zeros(self.num_pairs, dtype=torch.int64)
        if self.mrope_section is None:
            return axes
        if self.mrope_interleaved:
            # t takes whatever h and w leave over, including everything behind their last turn.
            for axis in (1, 2):
                axes[axis : 3 * self.mrope_section[axis] : 3] = axis
            return axes
        return torch.arange(_NUM_AXES).repeat_interleave(torch.tensor(self.mrope_section))

    def fingerprint(self) -> str:
        """Hex digest of everything that decides how keys are rotated.

        Equal for equal specs on every platform and in every process; inv_freq counts bit by bit.
        """
        header = json.dumps(
            [
                self.head_dim,
                self.rotary_dim,
                bool(self.is_neox),
                None if self.mrope_section is None else list(self.mrope_section),
                bool(self.mrope_interleaved),
            ]
        )
        frequencies = struct.pack(f"<{self.num_pairs}f", *self.inv_freq.tolist())
        return hashlib.sha256(header.encode() + b"\0" + frequencies).hexdigest()


def delta_angles(spec: RotarySpec, delta: Tensor) -> Tensor:
    """Angles that move keys by `delta` positions.

    The product is taken in float64 and reduced to [-pi, pi] before it is rounded, so the error of
    an angle does not grow with the distance. (In float32 it would be 4e-3 at 128k positions.)

    Args:
        spec: how the model rotates.
        delta: integer [n], or [3, n] with the rows (t, h, w): new position minus old position.
            [n] means the same on all axes. Without M-RoPE the rows of [3, n] must be equal.

    Returns:
        float32 [n, rotary_dim // 2] on delta's device.

    Raises:
        ValueError: delta has another shape or is no integer tensor, or its rows differ although the
            model has one position per token.
    """
    if delta.dim() not in (1, 2) or (delta.dim() == 2 and delta.shape[0] != _NUM_AXES):
        raise ValueError(f"delta must be [n] or [{_NUM_AXES}, n], got {list(delta.shape)}")
    if delta.is_floating_point() or delta.is_complex() or delta.dtype == torch.bool:
        raise ValueError(f"delta must hold integers, got {delta.dtype}")
    if delta.dim() == 2 and spec.mrope_section is None:
        if not torch.equal(delta, delta[:1].expand_as(delta)):
            raise ValueError(
                f"delta {list(delta.shape)} differs between its rows, but the model has no M-RoPE"
            )
        delta = delta[0]
    steps = delta[spec.pair_axes.to(delta.device)].T if delta.dim() == 2 else delta[:, None]
    turns = steps.to(torch.float64) * spec.turns_per_step.to(delta.device)
    return ((turns - turns.round()) * (2 * math.pi)).to(torch.float32)


def rotate(spec: RotarySpec, keys: Tensor, angles: Tensor) -> Tensor:
    """Rotates keys by the given angles, in float32 and with unit modulus.

    Args:
        spec: how the model rotates.
        keys: floating point [n, kv_heads, head_dim].
        angles: [n or 1, rotary_dim // 2]; a single row serves all tokens.

    Returns:
        A new tensor [n, kv_heads, head_dim] in keys.dtype, rounded once. Elements from rotary_dim
        on are copied bit by bit.

    Raises:
        ValueError: a shape does not match, or keys are not floating point.
    """
    _check_keys(spec, keys)
    if angles.shape not in ((keys.shape[0], spec.num_pairs), (1, spec.num_pairs)):
        raise ValueError(
            f"angles must be [{keys.shape[0]} or 1, {spec.num_pairs}] for keys "
            f"{list(keys.shape)}, got {list(angles.shape)}"
        )
    angles = angles.to(keys.device, torch.float32)[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    rotated = torch.empty_like(keys)
    first, second = (part.to(torch.float32) for part in _pairs(spec, keys))
    rotated_first, rotated_second = _pairs(spec, rotated)
    rotated_first.copy_(first * cos - second * sin)
    rotated_second.copy_(second * cos + first * sin)
    rotated[..., spec.rotary_dim :] = keys[..., spec.rotary_dim :]
    return rotated


def shift_keys(spec: RotarySpec, keys: Tensor, delta: Tensor) -> Tensor:
    """Moves rotated keys by `delta` positions.

    A delta of zero everywhere returns `keys` itself, so what did not move stays bit-exact. If all
    tokens move alike, as those of a still image do, one row of angles serves all of them; the
    result is that of the per-token form.

    Args:
        spec: how the model rotates.
        keys: floating point [n, kv_heads, head_dim], as written to the KV cache (post-RoPE).
        delta: integer [n] or [3, n], see `delta_angles`. Its values decide the path, so a delta on
            an accelerator costs a synchronisation; keep it on the CPU.

    Returns:
        [n, kv_heads, head_dim] in keys.dtype: `keys` itself or a new tensor.

    Raises:
        ValueError: a shape or dtype does not match, see `delta_angles` and `rotate`.
    """
    _check_keys(spec, keys)
    if delta.shape not in ((keys.shape[0],), (_NUM_AXES, keys.shape[0])):
        raise ValueError(
            f"delta must be [{keys.shape[0]}] or [{_NUM_AXES}, {keys.shape[0]}] for keys "
            f"{list(keys.shape)}, got {list(delta.shape)}"
        )
    if not delta.any():
        return keys
    first_token = delta[..., :1]
    if torch.equal(delta, first_token.expand_as(delta)):
        delta = first_token
    return rotate(spec, keys, delta_angles(spec, delta))


def _check_keys(spec: RotarySpec, keys: Tensor) -> None:
    if keys.dim() != 3 or keys.shape[-1] != spec.head_dim:
        raise ValueError(f"keys must be [n, kv_heads, {spec.head_dim}], got {list(keys.shape)}")
    if not keys.is_floating_point():
        # Quantised caches hold raw bytes; rotating those would yield plausible-looking garbage.
        raise ValueError(f"keys must be floating point, got {keys.dtype}")


def _pairs(spec: RotarySpec, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Views [n, kv_heads, rotary_dim // 2] of the first and the second elements of all pairs."""
    rotary = keys[..., : spec.rotary_dim]
    if spec.is_neox:
        return rotary[..., : spec.num_pairs], rotary[..., spec.num_pairs :]
    return rotary[..., 0::2], rotary[..., 1::2]

"""Writes reused KV into the paged cache, layer by layer, rotated to its new position."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.hook import write_kv
from ..rope import RotarySpec, delta_angles, rotate
from ..store.base import Segment

Rows = slice | torch.Tensor
"""Offsets within a segment: a contiguous stretch, or int64 [n]."""


def rotation(spec: RotarySpec, target: torch.Tensor, base: torch.Tensor) -> torch.Tensor | None:
    """Angles that move K from `base` to `target` positions, each int64 [1 or 3, n].

    Returns:
        None when nothing moves: K is then copied, not rotated by zero. One row when all tokens
        move alike, as those of a still image do.
    """
    delta = target - base
    if not delta.any():
        return None
    if (delta == delta[:, :1]).all():
        delta = delta[:, :1]
    return delta_angles(spec, delta if delta.shape[0] == 3 else delta[0])


@dataclass(frozen=True)
class PlacedSegment:
    """A donor's segment at its place in a target request.

    Attributes:
        segment: the donor's KV, n tokens.
        slots: int64 [n] of the paged KV cache, on the device.
        angles: float32 [1 or n, rotary_dim // 2] rotation of K, None for a bit-exact copy.
    """

    segment: Segment
    spec: RotarySpec
    slots: torch.Tensor
    angles: torch.Tensor | None

    def kv(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """K at its new position and V of `rows`, each [len(rows), kv_heads, head_dim]."""
        device = self.slots.device
        key, value = (
            side[rows].to(device, non_blocking=True) for side in self.segment.layer(layer)
        )
        if self.angles is not None:
            angles = self.angles if len(self.angles) == 1 else self.angles[rows]
            key = rotate(self.spec, key, angles)
        return key, value


@dataclass(frozen=True)
class ReusedRows:
    """Tokens of a segment whose KV of some layers is the donor's."""

    placed: PlacedSegment
    rows: Rows
    layers: range


class Injection:
    """The reused rows of one sparse prefill.

    Attributes:
        seconds: host time spent in `write_layer`.
    """

    def __init__(self, num_layers: int, parts: Iterable[ReusedRows] = ()) -> None:
        self._pending: list[list[ReusedRows]] = [[] for _ in range(num_layers)]
        self.seconds = 0.0
        for part in parts:
            self.add(part)

    def add(self, part: ReusedRows) -> None:
        """More rows, of layers that have not run yet."""
        for layer in part.layers:
            self._pending[layer].append(part)

    def write_layer(self, index: int, layer: Any) -> None:
        """Write the reused rows of decoder layer `index`, each once."""
        start = time.perf_counter()
        parts, self._pending[index] = self._pending[index], []
        for part in parts:
            key, value = part.placed.kv(index, part.rows)
            write_kv(layer, key, value, part.placed.slots[part.rows])
        self.seconds += time.perf_counter() - start

"""Writes reused KV into the paged cache, layer by layer, rotated to its new position."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..attention.hook import write_kv
from ..kernels.paged import turns_of
from ..rope import RotarySpec, delta_angles, rotate
from ..streams import LayerSource, Staged, upload
from .stopwatch import Stopwatch

Rows = slice | torch.Tensor
"""Offsets within a segment: a contiguous stretch, or int64 [n]."""


def rotation(spec: RotarySpec, target: torch.Tensor, base: torch.Tensor) -> torch.Tensor | None:
    """Angles that move K from `base` to `target` positions, each int64 [1 or 3, n].

    Returns:
        None when nothing moves: K is then copied, not rotated by zero. One row when all tokens
        move alike, as those of a still image do.
    """
    delta = target - base
    first = delta[:, :1]
    if torch.equal(delta, first.expand_as(delta)):
        if not first.any():
            return None
        delta = first
    return delta_angles(spec, delta if delta.shape[0] == 3 else delta[0])


@dataclass(frozen=True)
class PlacedSegment:
    """A donor's segment at its place in a target request.

    Attributes:
        segment: the donor's KV, n tokens.
        slots: int64 [n] of the paged KV cache, on the device.
        angles: float32 [1 or n, rotary_dim // 2] rotation of K, None for a bit-exact copy.
    """

    segment: LayerSource
    spec: RotarySpec
    slots: torch.Tensor
    angles: torch.Tensor | None

    @cached_property
    def turns(self) -> torch.Tensor | None:
        """Cosines and sines of `angles`: float32 [1 or n, 2, rotary_dim // 2]."""
        return None if self.angles is None else turns_of(self.angles)

    def staged(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The donor's K and V of `rows` on the device, each [len(rows), kv_heads, head_dim]."""
        device = self.slots.device
        key, value = self.segment.layer(layer)
        return (
            key[rows].to(device, non_blocking=True),
            value[rows].to(device, non_blocking=True),
        )

    def kv(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """K at its new position and V of `rows`, each [len(rows), kv_heads, head_dim]."""
        key, value = self.staged(layer, rows)
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

    @cached_property
    def window(self) -> tuple[slice, torch.Tensor]:
        """The stretch from the first of the rows to the last, and its slots: int64, negative for
        tokens that are not among the rows.

        Scattered rows are picked on the device, not one by one from host memory.
        """
        if isinstance(self.rows, slice):
            return self.rows, self.placed.slots[self.rows]
        if not len(self.rows):
            return slice(0, 0), self.placed.slots[:0]
        start, end = int(self.rows.min()), int(self.rows.max()) + 1
        slots = torch.full_like(self.placed.slots[start:end], -1)
        rows = upload(self.rows, slots.device)
        slots[rows - start] = self.placed.slots[rows]
        return slice(start, end), slots


WriteRows = Callable[[int, Any, ReusedRows], None]
"""Takes a decoder layer's index and vLLM's attention layer, and writes rows to its cache."""


def write_by_vllm(index: int, layer: Any, part: ReusedRows) -> None:
    """Write a part's rows of decoder layer `index`: rotated first, then by vLLM's own write."""
    key, value = part.placed.kv(index, part.rows)
    write_kv(layer, key, value, part.placed.slots[part.rows])


class Injection:
    """The reused rows of one sparse prefill.

    Args:
        write: how rows get into the paged cache.
        staged: told what has been read of the segments, if these come through a ring.
        stopwatch: told when rows are written, and when the sparse prefill goes on.
    """

    def __init__(
        self,
        num_layers: int,
        parts: Iterable[ReusedRows] = (),
        write: WriteRows = write_by_vllm,
        staged: Staged | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self._write = write
        self._staged = staged
        self._stopwatch = stopwatch
        self._pending: list[list[ReusedRows]] = [[] for _ in range(num_layers)]
        for part in parts:
            self.add(part)

    def add(self, part: ReusedRows) -> None:
        """More rows, of layers that have not run yet."""
        for layer in part.layers:
            self._pending[layer].append(part)

    def write_layer(self, index: int, layer: Any) -> None:
        """Write the reused rows of decoder layer `index`, each once."""
        parts, self._pending[index] = self._pending[index], []
        stopwatch = self._stopwatch if parts else None
        if stopwatch is not None:
            stopwatch.start("load")
        for part in parts:
            self._write(index, layer, part)
        if self._staged is not None:
            self._staged.written(index)
        if stopwatch is not None:
            stopwatch.start("sparse_prefill")

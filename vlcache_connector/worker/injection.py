"""Writes reused KV into the paged cache, layer by layer, rotated to its new position."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.hook import write_kv
from ..rope import RotarySpec, delta_angles, rotate
from ..store.base import Segment


@dataclass(frozen=True)
class ReusedRows:
    """Part of a stored segment and where it goes.

    Attributes:
        segment: the donor's KV.
        first: offset of the first reused token within the segment.
        slots: int64 [n], on the device.
        angles: float32 [1 or n, rotary_dim // 2] rotation of K, None for a bit-exact copy.
    """

    segment: Segment
    first: int
    slots: torch.Tensor
    angles: torch.Tensor | None


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


class Injection:
    """The reused rows of one sparse prefill.

    Attributes:
        seconds: host time spent in `write_layer`.
    """

    def __init__(self, spec: RotarySpec, parts: Sequence[ReusedRows], device: torch.device) -> None:
        self._spec = spec
        self._parts = parts
        self._device = device
        self._done: set[int] = set()
        self.seconds = 0.0

    def write_layer(self, index: int, layer: Any) -> None:
        """Write the reused rows of decoder layer `index`; does nothing the second time."""
        if index in self._done:
            return
        start = time.perf_counter()
        self._done.add(index)
        for part in self._parts:
            end = part.first + len(part.slots)
            key, value = part.segment.layer(index)
            key = key[part.first : end].to(self._device, non_blocking=True)
            value = value[part.first : end].to(self._device, non_blocking=True)
            if part.angles is not None:
                key = rotate(self._spec, key, part.angles)
            write_kv(layer, key, value, part.slots)
        self.seconds += time.perf_counter() - start

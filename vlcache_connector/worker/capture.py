"""Collects the KV of segments while vLLM writes it, over one or more steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..streams import upload
from ..support import KVShape


@dataclass
class _Capture:
    kv: torch.Tensor
    """[num_layers, 2, n, kv_heads, head_dim]"""
    tokens: int = 0
    """Tokens whose KV was written in all layers."""
    found: list[torch.Tensor] = field(default_factory=list)
    """Per pass, whether all expected slots were written: bool [] on the device."""


@dataclass(frozen=True)
class _Wanted:
    """Rows of the current pass that belong to a segment."""

    capture: _Capture
    offset: int
    """Of the first row within the segment."""
    slots: torch.Tensor
    """int64 [rows]"""


@dataclass(frozen=True)
class Captured:
    """A segment's KV.

    Attributes:
        layers: K and V per layer, each [n, kv_heads, head_dim].
        valid: bool [] on the device, whether all expected slots were written.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    valid: torch.Tensor


class SegmentCapture:
    """Copies the KV of expected slots as it is written.

    `expect` says, before a forward, which slots belong to which segment; `on_kv_write` copies
    those rows; `finish` hands over the complete segment.
    """

    def __init__(self, layer_names: Sequence[str], shape: KVShape, device: torch.device) -> None:
        self._layer_index = {name: index for index, name in enumerate(layer_names)}
        self._shape = shape
        self._device = device
        self._captures: dict[tuple[str, int], _Capture] = {}
        self._wanted: list[_Wanted] = []
        self._rows: torch.Tensor | None = None
        self._layers_written = 0

    def expect(
        self, req_id: str, item: int, *, num_tokens: int, offset: int, slots: torch.Tensor
    ) -> None:
        """The next forward writes tokens `offset...` of an item of `num_tokens` to `slots`."""
        capture = self._captures.get((req_id, item))
        if capture is None:
            shape = self._shape
            kv = torch.empty(
                (shape.num_layers, 2, num_tokens, shape.num_kv_heads, shape.head_dim),
                dtype=shape.dtype,
                device=self._device,
            )
            capture = self._captures[req_id, item] = _Capture(kv)
        self._wanted.append(_Wanted(capture, offset, upload(slots, self._device)))

    def on_kv_write(
        self, layer_name: str, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """K and V [num_tokens, kv_heads, head_dim] go to `slots` [num_tokens]: copy what is
        expected."""
        index = self._layer_index.get(layer_name)
        if not self._wanted or index is None:
            return
        if key.shape[1:] != (self._shape.num_kv_heads, self._shape.head_dim):
            raise ValueError(f"K of shape {list(key.shape)} was written, not of {self._shape}")
        if self._rows is None:
            # The same rows in all layers of a pass. Sorting finds them without a device sync.
            order = torch.argsort(slots)
            wanted = torch.cat([part.slots for part in self._wanted])
            ordered = slots[order]
            places = torch.searchsorted(ordered, wanted).clamp_(max=len(slots) - 1)
            self._rows = order[places]
            found = (ordered[places] == wanted).all()
            for part in self._wanted:
                part.capture.found.append(found)
        start = 0
        for part in self._wanted:
            count = len(part.slots)
            rows = self._rows[start : start + count]
            target = part.capture.kv[index, :, part.offset : part.offset + count]
            torch.index_select(key, 0, rows, out=target[0])
            torch.index_select(value, 0, rows, out=target[1])
            start += count
        self._layers_written += 1

    def rows_change(self) -> None:
        """The layers that come next write other rows than those before."""
        self._rows = None

    @property
    def is_armed(self) -> bool:
        """Whether the next forward writes anything that is expected."""
        return bool(self._wanted)

    def end_pass(self) -> None:
        """The forward is over, or has failed; nothing is expected any more."""
        if self._layers_written == len(self._layer_index):
            for part in self._wanted:
                part.capture.tokens += len(part.slots)
        self._wanted.clear()
        self._rows = None
        self._layers_written = 0

    def finish(self, req_id: str, item: int) -> Captured | None:
        """A segment all of whose tokens were computed; None when any of it was missed."""
        capture = self._captures.pop((req_id, item), None)
        if capture is None or capture.tokens != capture.kv.shape[2]:
            return None
        layers = [(layer[0], layer[1]) for layer in capture.kv]
        return Captured(layers, torch.stack(capture.found).all())

    def cancel(self, req_id: str) -> None:
        """Give up all of a request's captures."""
        for key in [key for key in self._captures if key[0] == req_id]:
            del self._captures[key]

    def __len__(self) -> int:
        return len(self._captures)

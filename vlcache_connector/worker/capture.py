"""Copies the KV of segments to host memory while vLLM writes it, over one or more steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from vllm.logger import init_logger

from ..storage.segment import KVWriter
from ..streams import Outbox, Side, upload
from ..support import KVShape

logger = init_logger(__name__)


@dataclass
class _Capture:
    writer: KVWriter | None
    """Where it goes; None if there is no room."""
    num_tokens: int
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
    """A segment all of whose tokens were computed.

    Attributes:
        writer: to be finished or abandoned.
        valid: bool [] on the device, whether all expected slots were written.
    """

    writer: KVWriter
    valid: torch.Tensor


class SegmentCapture:
    """Copies the KV of expected slots as it is written.

    `expect` says, before a forward, which slots belong to which segment; `on_kv_write` copies
    those rows; `finish` hands over the complete segment.

    Args:
        layer_names: vLLM's, in order.
        shape: of one token's KV.
        device: of the model.
        open_segment: where a segment of a key, at these positions [1 or 3, n], goes.
        side: a stream for copies beside the model's own, if there is one.
    """

    def __init__(
        self,
        layer_names: Sequence[str],
        shape: KVShape,
        device: torch.device,
        open_segment: Callable[[str, torch.Tensor], KVWriter | None],
        side: Side | None = None,
    ) -> None:
        self._layer_index = {name: index for index, name in enumerate(layer_names)}
        self._shape = shape
        self._device = device
        self._open_segment = open_segment
        self._outbox = Outbox(side, device) if side is not None else None
        self._captures: dict[tuple[str, int], _Capture] = {}
        self._wanted: list[_Wanted] = []
        self._rows: torch.Tensor | None = None
        self._layers_written = 0
        self._has_warned = False

    def expect(
        self,
        req_id: str,
        item: int,
        key: str,
        positions: torch.Tensor,
        *,
        offset: int,
        slots: torch.Tensor,
    ) -> None:
        """The next forward writes tokens `offset...` of an item to `slots`.

        Args:
            key: to store the item under.
            positions: of all its tokens, [1 or 3, n].
        """
        capture = self._captures.get((req_id, item))
        if capture is None:
            writer = self._open_segment(key, positions)
            capture = self._captures[req_id, item] = _Capture(writer, positions.shape[1])
        if capture.writer is None:
            return
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
            assert part.capture.writer is not None
            target = part.capture.writer.layer(index)[:, part.offset : part.offset + count]
            self._copy(target, key, value, rows)
            start += count
        self._layers_written += 1

    def _copy(
        self, target: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Copy `rows` to `target` [2, n, kv_heads, head_dim] on the host."""
        if self._outbox is not None:

            def gather(view: torch.Tensor, part: slice) -> None:
                torch.index_select(key, 0, rows[part], out=view[0])
                torch.index_select(value, 0, rows[part], out=view[1])

            self._outbox.send(target, gather)
        elif key.device == target.device:
            torch.index_select(key, 0, rows, out=target[0])
            torch.index_select(value, 0, rows, out=target[1])
        else:
            target[0].copy_(key.index_select(0, rows))
            target[1].copy_(value.index_select(0, rows))

    def rows_change(self) -> None:
        """The layers that come next write other rows than those before."""
        self._rows = None

    @property
    def is_armed(self) -> bool:
        """Whether the next forward writes anything that is expected."""
        return bool(self._wanted)

    def end_pass(self) -> None:
        """The forward is over, or has failed; nothing is expected any more."""
        try:
            if self._outbox is not None:
                self._outbox.flush()
            if self._layers_written == len(self._layer_index):
                for part in self._wanted:
                    part.capture.tokens += len(part.slots)
            elif self._wanted and not self._layers_written and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "VLCache saw nothing of the KV that a step wrote for images: CUDA graphs or "
                    "fused kernels hide it. Images in such steps are not stored"
                )
        finally:
            self._wanted.clear()
            self._rows = None
            self._layers_written = 0

    def finish(self, req_id: str, item: int) -> Captured | None:
        """A segment all of whose tokens were computed; None when any of it was missed."""
        capture = self._captures.pop((req_id, item), None)
        if capture is None or capture.writer is None:
            return None
        if capture.tokens != capture.num_tokens:
            capture.writer.abandon()
            return None
        return Captured(capture.writer, torch.stack(capture.found).all())

    def cancel(self, req_id: str) -> None:
        """Give up all of a request's captures, between two passes or before one."""
        for name in [name for name in self._captures if name[0] == req_id]:
            capture = self._captures.pop(name)
            self._wanted = [part for part in self._wanted if part.capture is not capture]
            if capture.writer is not None:
                capture.writer.abandon()

    def __len__(self) -> int:
        return len(self._captures)

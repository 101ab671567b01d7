"""The tier above host memory: copies of the KV segments used last, in device memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.logger import init_logger

from ..storage.segment import Segment, SegmentInfo
from ..streams import Leaving, Mark, Side

logger = init_logger(__name__)


@dataclass(frozen=True)
class _Copy:
    """A segment's KV in device memory.

    Attributes:
        kv: [layers, 2, n, kv_heads, head_dim].
        side: the stream that brings it, if it was not here at once.
        arrived: says for each layer that it is here.
    """

    kv: Tensor
    side: Side | None = None
    arrived: Sequence[Mark] = ()


class _ArrivingSegment(Segment):
    """A copy as a segment; layers that are still arriving are waited for on the device."""

    def __init__(self, info: SegmentInfo, copy: _Copy) -> None:
        super().__init__(info, [copy.kv], lambda _: None)
        self._copy = copy

    def pair(self, layer: int) -> Tensor:
        pair = super().pair(layer)
        if self._copy.side is not None:
            self._copy.side.wait(self._copy.arrived[layer])
        return pair


class DeviceSegments:
    """An LRU of whole segments with a byte budget.

    Everything in it is in host memory, too, so that what is dropped here is lost nowhere. Whoever
    reads a segment keeps its memory until then.

    Args:
        budget_bytes: most bytes of device memory.
        device: of the model.
        side: a stream for the copies, if there is one.
        leaving: takes what the copies read.
    """

    def __init__(
        self, budget_bytes: int, device: torch.device, side: Side | None, leaving: Leaving
    ) -> None:
        self._budget = budget_bytes
        self._side = side
        self._leaving = leaving
        self._device = device
        self._segments: OrderedDict[str, tuple[SegmentInfo, _Copy]] = OrderedDict()
        self._used = 0

    def get(self, key: str) -> Segment | None:
        """A segment in device memory, now the one used last."""
        if key not in self._segments:
            return None
        self._segments.move_to_end(key)
        return _ArrivingSegment(*self._segments[key])

    def promote(self, segment: Segment, num_layers: int) -> Segment:
        """Copy a segment from host memory, and release it there when that is done.

        Returns:
            The copy, which may still be arriving; the segment itself where it is larger than the
            budget, or than the memory that is left.
        """
        layers = [segment.pair(layer) for layer in range(num_layers)]
        num_bytes = sum(layer.nbytes for layer in layers)
        if num_bytes > self._budget:
            return segment
        while self._used + num_bytes > self._budget:
            self.remove(next(iter(self._segments)))
        shape, dtype = (num_layers, *layers[0].shape), layers[0].dtype
        try:
            kv = torch.empty(shape, dtype=dtype, device=self._device)
        except torch.OutOfMemoryError:
            logger.warning(
                "VLCache: device_bytes=%d: no room on the device for %d more; they are read from "
                "host memory. Lower it, or --gpu-memory-utilization",
                self._budget,
                num_bytes,
            )
            return segment
        if self._side is None:
            for target, source in zip(kv, layers, strict=True):
                target.copy_(source)
            copy = _Copy(kv)
        else:
            # The memory may have been another tensor's, which the model's stream still uses.
            start = self._side.mark()
            self._side.hold(kv)
            arrived = [self._side.copy([pair], start) for pair in zip(kv, layers, strict=True)]
            copy = _Copy(kv, self._side, arrived)
        self._segments[segment.info.id.key] = segment.info, copy
        self._used += num_bytes
        info = segment.info
        self._leaving.add(segment.release)
        return _ArrivingSegment(info, copy)

    def remove(self, key: str) -> None:
        """Forget a segment, if it is here."""
        entry = self._segments.pop(key, None)
        if entry is not None:
            self._used -= entry[1].kv.nbytes

    def clear(self) -> None:
        """Forget all segments."""
        self._segments.clear()
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Device memory of all segments."""
        return self._used

    def __contains__(self, key: str) -> bool:
        return key in self._segments

    def __len__(self) -> int:
        return len(self._segments)

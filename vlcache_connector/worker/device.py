"""The tier above host memory: copies of the KV segments used last, in device memory."""

from __future__ import annotations

from collections import OrderedDict

import torch

from ..store import Segment, SegmentInfo


class DeviceSegments:
    """An LRU of whole segments with a byte budget.

    Everything in it is in host memory, too, so that what is dropped here is lost nowhere. Whoever
    reads a segment keeps its memory until then.

    Args:
        budget_bytes: most bytes of device memory.
        device: of the model.
    """

    def __init__(self, budget_bytes: int, device: torch.device) -> None:
        self._budget = budget_bytes
        self._device = device
        self._segments: OrderedDict[str, tuple[SegmentInfo, torch.Tensor]] = OrderedDict()
        self._used = 0

    def get(self, key: str) -> Segment | None:
        """A segment in device memory, now the one used last."""
        if key not in self._segments:
            return None
        self._segments.move_to_end(key)
        info, kv = self._segments[key]
        return Segment(info, [kv], lambda _: None)

    def promote(self, segment: Segment, num_layers: int) -> Segment:
        """Copy a segment from host memory, and release it there.

        Returns:
            The copy; the segment itself where it is larger than the budget.
        """
        layers = [segment.layer(layer) for layer in range(num_layers)]
        num_bytes = sum(part.nbytes for layer in layers for part in layer)
        if num_bytes > self._budget:
            return segment
        while self._used + num_bytes > self._budget:
            self.remove(next(iter(self._segments)))
        kv = torch.empty(
            (num_layers, 2, *layers[0][0].shape), dtype=layers[0][0].dtype, device=self._device
        )
        for target, (k, v) in zip(kv, layers, strict=True):
            target[0].copy_(k, non_blocking=True)
            target[1].copy_(v, non_blocking=True)
        if self._device.type != "cpu":
            # The host's memory may be used anew as soon as it is released.
            torch.accelerator.current_stream().synchronize()
        self._segments[segment.info.key] = segment.info, kv
        self._used += num_bytes
        info = segment.info
        segment.release()
        return Segment(info, [kv], lambda _: None)

    def remove(self, key: str) -> None:
        """Forget a segment, if it is here."""
        entry = self._segments.pop(key, None)
        if entry is not None:
            self._used -= entry[1].nbytes

    @property
    def used_bytes(self) -> int:
        """Device memory of all segments."""
        return self._used

    def __contains__(self, key: str) -> bool:
        return key in self._segments

    def __len__(self) -> int:
        return len(self._segments)

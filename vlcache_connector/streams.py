"""Copies between host and device beside the model's own stream, so that nothing waits for them.

On a CUDA device copies run on a stream of their own. Order is kept by events on the device: the
side stream waits for what the model's stream was given before a copy was asked for, the model's
stream waits for a copy where it reads the result. The host waits for nothing; memory that a copy
reads is given back when an event says that it is over. On a CPU a copy is over when it returns.

The model's stream is torch's current one wherever these are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Target and source of a copy."""

RING_BYTES = 256 << 20
"""Device memory that segments pass through on their way into the paged cache."""
OUTBOX_BYTES = 64 << 20
"""Device memory that segments pass through on their way out of the model."""
_OUTBOX_SLOTS = 4
_GROUP_BYTES = 8 << 20
"""Layers are copied in groups of at least as much: copies of less cost more to queue than to do."""
_ALIGNMENT = 256


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the host on the device, without waiting for what the device does.

    From pageable memory, a copy would wait for the stream.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Mark(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Side(Protocol):
    """A stream beside the model's own."""

    def mark(self) -> Mark:
        """What the model's stream has been given so far."""

    def copy(self, pairs: Iterable[Pair], after: Mark | None = None) -> Mark:
        """Queue copies on the side stream, behind `after`; the result tells when they are done."""

    def wait(self, mark: Mark) -> None:
        """Let all that the model's stream is given from now on run behind `mark`."""

    def hold(self, tensor: Tensor) -> None:
        """Copies use `tensor`: once nobody refers to it, its memory has to wait for them."""


class CudaSide:
    """A side stream of a CUDA device; see `Side`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> Mark:
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event

    def copy(self, pairs: Iterable[Pair], after: Mark | None = None) -> Mark:
        event = torch.cuda.Event(blocking=True)
        if after is not None:
            assert isinstance(after, torch.cuda.Event)
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event.record(self._stream)
        return event

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream().wait_event(mark)

    def hold(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)


def make_side(device: torch.device) -> Side | None:
    """A side stream; None where a copy is over when it returns, or streams are not CUDA's."""
    return CudaSide(device) if device.type == "cuda" else None


class Leaving:
    """What is given back once the device is done with it.

    Args:
        side: the side stream, if there is one.
        device: whose copies read what is given back.
    """

    def __init__(self, side: Side | None, device: torch.device) -> None:
        self._side = side
        self._waits = side is None and device.type != "cpu"
        self._entries: list[tuple[Sequence[Mark], Callable[[], None]]] = []

    def add(self, release: Callable[[], None]) -> None:
        """Call `release` when both streams are through with what they have been given."""
        if self._side is None:
            if self._waits:
                torch.accelerator.synchronize()
            release()
            return
        self._entries.append(((self._side.mark(), self._side.copy(())), release))

    def poll(self) -> None:
        """Give back what can be; waits for nothing."""
        waiting = []
        for marks, release in self._entries:
            if all(mark.query() for mark in marks):
                release()
            else:
                waiting.append((marks, release))
        self._entries = waiting

    def close(self) -> None:
        """Give back everything, when the device is done with it."""
        for marks, release in self._entries:
            for mark in marks:
                mark.synchronize()
            release()
        self._entries.clear()


class LayerSource(Protocol):
    """Where K and V of a segment's layers come from."""

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [n, kv_heads, head_dim], on the host or on the device."""


class Ring:
    """Device memory that layers of segments are copied to ahead of their turn.

    It bounds how far copies run ahead: a layer's memory is taken for a later one as soon as the
    model's stream has read it, which the side stream waits for on the device.

    Args:
        device: of the paged cache.
        num_bytes: of the ring, taken when it is first used.
    """

    def __init__(self, side: Side, device: torch.device, num_bytes: int = RING_BYTES) -> None:
        self._side = side
        self._device = device
        self._num_bytes = num_bytes
        self._memory: Tensor | None = None
        self._free: Mark | None = None
        """What the model's stream reads of the ring comes before this."""

    def start(self, sources: Sequence[Sequence[Tensor]]) -> Staged:
        """Begin to copy segments, layer by layer; `close` of the result ends it.

        Args:
            sources: for each segment its layers, each [2, n, kv_heads, head_dim] in pinned memory,
                as many for all of them.

        Raises:
            torch.OutOfMemoryError: there is no room for the ring.
        """
        if self._memory is None:
            self._memory = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
            self._side.hold(self._memory)
            self._free = self._side.mark()
        return Staged(self._side, self._memory, sources, self._free, self._ended)

    def _ended(self) -> None:
        self._free = self._side.mark()


class Staged:
    """Segments on their way through a ring, in the order of their layers; made by `Ring`."""

    def __init__(
        self,
        side: Side,
        memory: Tensor,
        sources: Sequence[Sequence[Tensor]],
        free: Mark | None,
        on_close: Callable[[], None],
    ) -> None:
        self._side = side
        self._memory = memory
        self._on_close = on_close
        self._num_layers = len(sources[0]) if sources else 0
        # Two groups have to fit: one is read while the next one arrives.
        self._segments: dict[int, Sequence[Tensor]] = {}
        layer_bytes = 0
        for index, layers in enumerate(sources):
            own = max(map(_aligned, layers))
            if 2 * (layer_bytes + own) <= len(memory):
                self._segments[index] = layers
                layer_bytes += own
        if not self._segments:
            self._num_layers = 0
            layer_bytes = 1
        self._group = min(max(1, -(-_GROUP_BYTES // layer_bytes)), len(memory) // (2 * layer_bytes))
        self._group_bytes = self._group * layer_bytes
        self._num_slots = len(memory) // self._group_bytes
        self._read: list[Mark | None] = [free] * self._num_slots
        """Per slot, what comes behind the last reading of it."""
        self._arrived: dict[int, Mark] = {}
        self._views: dict[tuple[int, int], Tensor] = {}
        """(segment, layer) -> its place in the ring, of the groups that are in it."""
        self._queued = 0
        """Groups that are in the ring, or were."""
        self._done = 0
        """Groups that nobody reads any more."""
        while self._queued < self._num_slots and self._queue():
            pass

    def _queue(self) -> bool:
        """Copy the next group into its slot; False if there is none."""
        first = self._queued * self._group
        layers = range(first, min(first + self._group, self._num_layers))
        if not layers:
            return False
        slot = self._queued % self._num_slots
        offset = slot * self._group_bytes
        pairs = []
        for layer in layers:
            for index, sources in self._segments.items():
                source = sources[layer]
                raw = self._memory[offset : offset + source.nbytes]
                target = raw.view(source.dtype).view(source.shape)
                pairs.append((target, source))
                self._views[index, layer] = target
                offset += _aligned(source)
        self._arrived[self._queued] = self._side.copy(pairs, self._read[slot])
        self._queued += 1
        return True

    def get(self, segment: int, layer: int) -> Tensor | None:
        """A layer of a segment in the ring, [2, n, kv_heads, head_dim], for the model's stream.

        Returns:
            None if it is not in the ring, or no longer.
        """
        view = self._views.get((segment, layer))
        if view is not None:
            self._side.wait(self._arrived[layer // self._group])
        return view

    def written(self, layer: int) -> None:
        """All that is read of layers up to `layer` has been queued on the model's stream."""
        while self._done < self._queued:
            last = min((self._done + 1) * self._group, self._num_layers) - 1
            if layer < last:
                return
            for gone in range(self._done * self._group, last + 1):
                for index in self._segments:
                    del self._views[index, gone]
            self._read[self._done % self._num_slots] = self._side.mark()
            self._done += 1
            self._queue()

    def close(self) -> None:
        """Nothing is read any more, whether all of it was or not."""
        self._views.clear()
        self._done = self._queued
        self._num_layers = 0
        self._on_close()


class Outbox:
    """Device memory that rows pass through on their way to host memory.

    It bounds how much of them waits on the device: a slot's memory is written again as soon as the
    side stream has copied it, which the model's stream waits for on the device.

    Args:
        device: of the rows.
        num_bytes: of all slots, taken when they are first used.
    """

    def __init__(self, side: Side, device: torch.device, num_bytes: int = OUTBOX_BYTES) -> None:
        self._side = side
        self._device = device
        self._slot_bytes = num_bytes // _OUTBOX_SLOTS // _ALIGNMENT * _ALIGNMENT
        self._slots: Sequence[Tensor] = ()
        self._sent: list[Mark | None] = [None] * _OUTBOX_SLOTS
        """Per slot, the end of the last copy out of it."""
        self._current = 0
        self._used = 0
        """Bytes of the current slot."""
        self._pairs: list[Pair] = []
        """Copies out of the current slot, not yet queued."""

    def send(self, target: Tensor, fill: Callable[[Tensor, slice], None]) -> None:
        """Copy rows to the host, now or with those that come next; see `flush`.

        Args:
            target: [2, n, ...] in pinned memory.
            fill: queues on the model's stream what writes a range of the n rows, for K and V, to
                device memory like `target[:, range]`.

        Raises:
            torch.OutOfMemoryError: there is no room for the slots.
        """
        if not self._slots:
            memory = torch.empty(
                _OUTBOX_SLOTS * self._slot_bytes, dtype=torch.uint8, device=self._device
            )
            self._side.hold(memory)
            self._slots = memory.chunk(_OUTBOX_SLOTS)
        num_rows = target.shape[1]
        row_bytes = target[:, :1].nbytes
        start = 0
        while start < num_rows:
            count = min(num_rows - start, (self._slot_bytes - self._used) // row_bytes)
            if count == 0:
                if not self._used:
                    raise ValueError(f"a row of {row_bytes} bytes; slots have {self._slot_bytes}")
                self.flush()
                continue
            rows = slice(start, start + count)
            sent = self._sent[self._current]
            if not self._used and sent is not None:
                self._side.wait(sent)
            raw = self._slots[self._current][self._used : self._used + count * row_bytes]
            view = raw.view(target.dtype).view(target[:, rows].shape)
            fill(view, rows)
            self._pairs += [(target[side, rows], view[side]) for side in (0, 1)]
            self._used = min(self._used + _aligned(raw), self._slot_bytes)
            start += count

    def flush(self) -> None:
        """Queue the copies of all that was sent."""
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return
        self._sent[self._current] = self._side.copy(pairs, self._side.mark())
        self._current = (self._current + 1) % _OUTBOX_SLOTS
        self._used = 0


class StagedSegment:
    """A segment whose layers are read from a ring while they are there, else from the host."""

    def __init__(self, staged: Staged, index: int, segment: LayerSource) -> None:
        self._staged = staged
        self._index = index
        self._segment = segment

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `LayerSource`."""
        pair = self._staged.get(self._index, layer)
        return self._segment.layer(layer) if pair is None else (pair[0], pair[1])


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

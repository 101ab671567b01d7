"""The contract of a segment store: what a worker process can keep and get back.

A store is used from one thread. It decides nothing about what is kept: an entry stays until
`remove` or `clear`, and its budget is the caller's to manage (`put_*` says what it took).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vlcache_connector.store.header import REFUSAL_REASONS, Kind, RefusalReason, SegmentId


@dataclass(frozen=True)
class SegmentInfo:
    """What a stored segment says about itself.

    Attributes:
        id: what it is stored under.
        num_tokens: tokens of the segment ("encoder": rows).
        positions: the donor's base RoPE positions, int64 `[rows, num_tokens]` with 1 (RoPE) or 3
            (M-RoPE) rows; None for "encoder".
    """

    id: SegmentId
    num_tokens: int
    positions: Tensor | None


class Segment:
    """A read handle: its memory is neither freed nor reused before `release`.

    A context manager. Views that were handed out are valid until `release`, or until the store is
    closed; copies to a device that read from them have to be complete by then.
    """

    def __init__(
        self, info: SegmentInfo, parts: Sequence[Tensor], on_release: Callable[[Segment], None]
    ) -> None:
        """Made by stores.

        Args:
            info: what the segment is.
            parts: "kv": tensors `[layers, 2, n, kv_heads, head_dim]` that hold consecutive layers
                from layer 0 on; "encoder": tensors `[rows, width]` that hold consecutive rows.
            on_release: called once, by the first `release`.
        """
        self.info = info
        self._parts = parts
        self._on_release: Callable[[Segment], None] | None = on_release

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one model layer, each `[n, kv_heads, head_dim]`, views into host memory.

        Raises:
            IndexError: there is no such layer.
            RuntimeError: the handle was released, or is no "kv" segment.
        """
        key, value = self.pair(layer)
        return key, value

    def pair(self, layer: int) -> Tensor:
        """K and V of one model layer as they lie in memory, `[2, n, kv_heads, head_dim]`; raises
        as `layer`.
        """
        self._require("kv")
        index = layer
        for part in self._parts if layer >= 0 else ():
            if index < part.shape[0]:
                return part[index]
            index -= part.shape[0]
        raise IndexError(f"segment {self.info.id.key!r} has no layer {layer}")

    def rows(self) -> Sequence[Tensor]:
        """The encoder's output in order, as it lies in memory: `[rows, width]` each, views.

        Raises:
            RuntimeError: the handle was released, or is no "encoder" segment.
        """
        self._require("encoder")
        return self._parts

    def release(self) -> None:
        """Give the memory back to the store. Does nothing the second time."""
        on_release, self._on_release = self._on_release, None
        self._parts = ()
        if on_release is not None:
            on_release(self)

    def _require(self, kind: Kind) -> None:
        if self._on_release is None:
            raise RuntimeError(f"segment {self.info.id.key!r} was released")
        if self.info.id.kind != kind:
            raise RuntimeError(f"segment {self.info.id.key!r} is of kind {self.info.id.kind!r}")

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class KVWriter:
    """A KV segment that is being written. Its memory is the store's: `finish` or `abandon` it.

    Attributes:
        key: content key.
    """

    def __init__(
        self,
        key: str,
        layers: Sequence[Tensor],
        on_finish: Callable[[Tensor | None], int],
        on_abandon: Callable[[], None],
    ) -> None:
        """Made by stores; one of the two is called, once."""
        self.key = key
        self._layers: Sequence[Tensor] | None = layers
        self._on_finish = on_finish
        self._on_abandon = on_abandon

    def layer(self, layer: int) -> Tensor:
        """Where K and V of a layer go: `[2, n, kv_heads, head_dim]` of the store's dtype in host
        memory, pinned if there is an accelerator.

        Copies on the store's side stream may still be on their way when `finish` or `abandon` is
        called.
        """
        if self._layers is None:
            raise RuntimeError(f"segment {self.key!r} is written")
        return self._layers[layer]

    def finish(self, valid: Tensor | None = None) -> int:
        """Store what was written. It can be opened at once, which waits for it to arrive.

        Args:
            valid: bool [], any device: whether it is what it should be. If not, which may turn out
                later, nothing is stored.

        Returns:
            Bytes taken; 0 if it could not be stored.
        """
        if self._layers is None:
            return 0
        self._layers = None
        return self._on_finish(valid)

    def abandon(self) -> None:
        """Store nothing. Does nothing behind `finish`, or the second time."""
        if self._layers is not None:
            self._layers = None
            self._on_abandon()


class EncodedSegment:
    """A read handle on a segment's encoded objects, for copying them elsewhere from any thread.

    `release` belongs to the store's own thread; until then the memory is neither freed nor reused.

    Attributes:
        id: what the segment is stored under.
        objects: the segment's objects in order, as `codec` wrote them.
    """

    def __init__(
        self, segment: SegmentId, objects: Sequence[memoryview], on_release: Callable[[], None]
    ) -> None:
        """Made by stores; `on_release` is called once."""
        self.id = segment
        self.objects = objects
        self._on_release: Callable[[], None] | None = on_release

    @property
    def num_bytes(self) -> int:
        """Length of all objects."""
        return sum(len(part) for part in self.objects)

    def release(self) -> None:
        """Give the memory back to the store. Does nothing the second time."""
        on_release, self._on_release = self._on_release, None
        self.objects = ()
        if on_release is not None:
            on_release()


@dataclass(frozen=True)
class StoreUsage:
    """Memory of a store, in bytes as they are really taken (alignment included).

    Attributes:
        bytes_used: stored segments, and removed ones that are still being read.
        bytes_budget: what `bytes_used` never exceeds.
        num_segments: stored segments.
    """

    bytes_used: int
    bytes_budget: int
    num_segments: int


@dataclass
class StoreCounters:
    """What went wrong since the store was made.

    Attributes:
        refused: segments that `get` refused, by reason (see `RefusedObject`).
        put_failed: segments that `put_*` could not store.
    """

    refused: dict[RefusalReason, int] = field(
        default_factory=lambda: dict.fromkeys(REFUSAL_REASONS, 0)
    )
    put_failed: int = 0


class SegmentStore(ABC):
    """Keeps segments by content key and kind. Once closed, it is empty, and `open_kv`, `put_*`,
    `get`, `usage` and `check_integrity` raise RuntimeError.
    """

    counters: StoreCounters

    @abstractmethod
    def open_kv(self, key: str, positions: Tensor) -> KVWriter | None:
        """Begin to store a segment's post-RoPE KV; it replaces a segment of this key and kind.

        Args:
            key: content key.
            positions: the donor's base RoPE positions, any integer dtype, `[rows, n]` with 1 or 3
                rows.

        Returns:
            None if it can't be stored: no room, or too large for the store.

        Raises:
            ValueError: `positions` are not of the described form.
        """

    @abstractmethod
    def put_encoder(self, key: str, rows: Tensor) -> int:
        """Store the encoder's output for a segment; it replaces one of this key and kind.

        The copying may go on after it returns; the segment can be opened all the same, which waits
        for it. The tensor is not to be changed any more.

        Args:
            key: content key.
            rows: `[n, width]`, any device and strides.

        Returns:
            Bytes taken; 0 if it could not be stored (no room, or too large for the store), and
            then nothing is stored under the key.

        Raises:
            ValueError: a tensor is not of the described form.
        """

    @abstractmethod
    def settle(self, *, waits: bool = False) -> list[tuple[SegmentId, bool]]:
        """What `KVWriter.finish` and `put_encoder` have taken and has now been copied, and
        whether it is stored.

        Args:
            waits: for all that is still being copied.
        """

    @abstractmethod
    def put_encoded(self, segment: SegmentId, objects: Sequence[memoryview]) -> int:
        """Store a segment that comes encoded, after `check_encoded`.

        Replaces and returns as `put_encoder`.
        """

    @abstractmethod
    def check_encoded(
        self, segment: SegmentId, objects: Sequence[memoryview], num_tokens: int
    ) -> None:
        """Check objects of unknown content, every byte of them; may be called from any thread.

        Args:
            num_tokens: tokens, or encoder rows, that the segment must have.

        Raises:
            RefusedObject: they are not this segment, or not one that this store could hold.
        """

    @abstractmethod
    def get_encoded(self, segment: SegmentId) -> EncodedSegment | None:
        """A segment's objects as they are stored, None if it is not; the caller has to release
        them.
        """

    @abstractmethod
    def get(self, segment: SegmentId) -> Segment | None:
        """Open a segment for reading; the caller has to release it.

        Returns:
            None if it is not stored, or was refused (logged and counted by reason). A refused
            segment stays where it is until `remove`.
        """

    @abstractmethod
    def contains(self, segment: SegmentId) -> bool:
        """Whether the segment is stored. Does not read it: `get` may still refuse it."""

    @abstractmethod
    def remove(self, segment: SegmentId) -> None:
        """Forget the segment, if it is stored. Open handles stay valid and keep their memory."""

    @abstractmethod
    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes `open_kv` takes at most for a segment of this many tokens if the store's free
        memory is not fragmented, with keys of up to 256 ASCII characters.
        """

    @abstractmethod
    def usage(self) -> StoreUsage:
        """Memory in use, for the caller's accounting."""

    @abstractmethod
    def clear(self) -> None:
        """Remove every segment."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Check every invariant and every stored byte; slow.

        Raises:
            AssertionError: with what is wrong.
        """

    @abstractmethod
    def close(self) -> None:
        """Release all memory and threads. Open handles are released. Idempotent."""

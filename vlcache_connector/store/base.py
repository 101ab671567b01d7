"""The contract of a segment store: what a worker process can keep and get back.

A store is used from one thread. It decides nothing about what is kept: an entry stays until
`remove` or `clear`, and its budget is the caller's to manage (`put_*` says what it took).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vlcache_connector.storage.header import REFUSAL_REASONS, RefusalReason, SegmentId
from vlcache_connector.storage.segment import KVWriter, Segment


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

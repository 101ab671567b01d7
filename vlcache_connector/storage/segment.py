"""A segment as it is read and written, wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vlcache_connector.storage.header import Kind, SegmentId


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

    A context manager. Views that were handed out are valid until `release`, or until the engine
    is closed; copies to a device that read from them have to be complete by then.
    """

    def __init__(
        self, info: SegmentInfo, parts: Sequence[Tensor], on_release: Callable[[Segment], None]
    ) -> None:
        """Made by the engine.

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
        """Give the memory back. Does nothing the second time."""
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
    """A KV segment that is being written. Its memory is the engine's: `finish` or `abandon` it.

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
        """Made by the engine; one of the two is called, once."""
        self.key = key
        self._layers: Sequence[Tensor] | None = layers
        self._on_finish = on_finish
        self._on_abandon = on_abandon

    def layer(self, layer: int) -> Tensor:
        """Where K and V of a layer go: `[2, n, kv_heads, head_dim]` of the layout's dtype in host
        memory, pinned if there is an accelerator.

        Copies on the engine's side stream may still be on their way when `finish` or `abandon` is
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

"""A known image is not decoded: its bytes go to vLLM's processor cache, which has what it needs.

vLLM decodes every image that a request brings, and only then looks whether its processor cache has
the image, by a hash of the bytes that were sent. Here the order is turned round. Known is an image
whose bytes this process has decoded and put through the processor before, with the same options of
decoding, and whose processor output is still in the cache. It enters as an image that has a size
and a mode, and decodes itself, as vLLM would have, when anyone asks for more. All others are
decoded on arrival, by vLLM's own code with its limits (formats, pixels, damaged files).

What a client gains by sending bytes that are known: its request takes less time. So it can tell
that this process was sent the same bytes, all of which it needs to have, not long ago, whatever
the `cache_salt`. It can with plain vLLM, by its processor cache; decoding adds to the difference.
No limit is passed by: the same bytes stood it, in this process. Bytes are recognised by a seeded
128-bit xxHash. Were two images ever to share one, vLLM's own hash would still tell them apart, miss
in its cache, and have the second one decoded, with all limits, and refused if it is bad.

What is kept of an image takes less than 1 KiB: no pixels, no bytes. An image enters only after the
processor has taken it, and there are at most `MOST_IMAGES`. Each API server has its own record, as
it has its own processor cache.

vLLM seams: `MEDIA_CONNECTOR_REGISTRY` and `MediaConnector` (`vllm/multimodal/media/connector.py`),
which takes the place of vLLM's own connector, named "http"; who sets `VLLM_MEDIA_CONNECTOR` to
another one keeps it. `ImageMediaIO` (`vllm/multimodal/media/image.py`), `MediaWithBytes`.
`_get_image_id_bytes` (`vllm/multimodal/hasher.py`), patched: it would decode an image to look for a
name that only images made in memory can have.
"""

from __future__ import annotations

import secrets
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash
from PIL import Image
from vllm.logger import init_logger
from vllm.multimodal import hasher
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    ImageMediaIO,
    MediaConnector,
    MediaIO,
    MediaWithBytes,
)

from . import metrics

if TYPE_CHECKING:
    from vllm.multimodal.cache import BaseMultiModalProcessorCache

logger = init_logger(__name__)

MOST_IMAGES = 1 << 14
"""How many images are remembered; those used longest ago are forgotten."""

_STATE = frozenset(vars(Image.Image()))
"""The attributes of a decoded image."""

_get_image_id_bytes = hasher._get_image_id_bytes

Key = tuple[bytes, str | None, tuple[int, ...]]
"""Digest of an image's bytes, and the options it is decoded with."""


def skip_decoding_known_images() -> None:
    """Put our media connector in the place of vLLM's own, once per process."""
    hasher._get_image_id_bytes = image_id
    if MEDIA_CONNECTOR_REGISTRY.name2class.get("http") is MediaConnector:
        MEDIA_CONNECTOR_REGISTRY.register("http")(KnownImagesConnector)


def image_id(image: Image.Image) -> bytes | None:
    """The name that an image brings along, as vLLM finds it; known images have none."""
    return None if isinstance(image, KnownImage) else _get_image_id_bytes(image)


class KnownImage(Image.Image):
    """An image that is not decoded before it has to be; then it turns into the decoded one.

    Args:
        size: width and height in pixels.
        mode: Pillow's name of the pixels' format.
        decode: gives the decoded image; called for anything but size and mode. What it raises
            is raised by the access.
    """

    def __init__(self, size: tuple[int, int], mode: str, decode: Callable[[], Image.Image]) -> None:
        # Not the inherited one: attributes that are missing lead to `__getattr__`.
        self._size = size
        self._mode = mode
        self._decode = decode

    def __getattr__(self, name: str) -> Any:
        """Decode the image, if that is what is missing."""
        if name not in _STATE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        decoded = self._decode()
        vars(self).update(vars(decoded))
        self.__class__ = type(decoded)  # type: ignore[assignment]
        return getattr(self, name)


@dataclass
class ArrivedImage(MediaWithBytes[Image.Image]):
    """An image in vLLM's wrapping.

    Attributes:
        key: to remember it by.
        loading: when fetching and decoding it began and ended (`time.perf_counter`).
    """

    key: Key | None = None
    loading: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is remembered of an image.

    Attributes:
        size: width and height in pixels, once decoded.
        mode: of the decoded image.
        is_converted: whether decoding changed the mode that the file has.
        item_hash: under which the processor's output is cached.
        cache: where.
    """

    size: tuple[int, int]
    mode: str
    is_converted: bool
    item_hash: str
    cache: weakref.ref[BaseMultiModalProcessorCache]


class SeenImages:
    """The images that went through the processor of this process, those used last.

    Used by the threads that load media and the one that runs the processor.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[Key, _Seen] = OrderedDict()
        self._lock = threading.Lock()
        # A seed of our own: nobody can prepare two images with the same digest.
        self._seed = secrets.randbits(64)

    def __len__(self) -> int:
        return len(self._seen)

    def key(self, data: bytes, image_mode: str | None, background: tuple[int, ...]) -> Key:
        """The key of an image in a file, decoded with these options of `ImageMediaIO`."""
        return xxhash.xxh3_128_digest(data, self._seed), image_mode, background

    def find(self, key: Key) -> _Seen | None:
        """What is remembered of an image that needs no pixels; None: decode it."""
        with self._lock:
            seen = self._seen.pop(key, None)
            if seen is None:
                return None
            cache = seen.cache()
            if cache is None or not cache.is_cached_item(seen.item_hash):
                return None
            self._seen[key] = seen
            return seen

    def add(
        self,
        image: MediaWithBytes[Image.Image],
        item_hash: str,
        cache: BaseMultiModalProcessorCache,
    ) -> None:
        """Remember an image whose processor output is in the cache under its content's hash."""
        key = image.key if isinstance(image, ArrivedImage) else None
        # What is still of its file format's own class is damaged, and only just got through.
        if key is None or type(image.media) not in (Image.Image, KnownImage):
            return
        with self._lock:
            self._seen[key] = _Seen(
                image.media.size,
                image.media.mode,
                bool(image.io_config),
                item_hash,
                weakref.ref(cache),
            )
            self._seen.move_to_end(key)
            if len(self._seen) > MOST_IMAGES:
                self._seen.popitem(last=False)


SEEN = SeenImages()
"""Those of this process."""


def remember(item: object, item_hash: str, cache: BaseMultiModalProcessorCache | None) -> None:
    """Remember an image that the processor has taken.

    Args:
        item: what the processor was given; other things than images are left alone.
        item_hash: its content's, under which the processor's output was cached.
        cache: the processor's; None: it has none, and needs the pixels of every image.
    """
    if cache is None or not isinstance(item, MediaWithBytes):
        return
    try:
        SEEN.add(item, item_hash, cache)
    except Exception:
        _give_up("remembered")


class KnownImagesIO(ImageMediaIO):
    """Decodes images that are not known."""

    def load_bytes(  # type: ignore[override]  # as vLLM's own
        self, data: bytes
    ) -> MediaWithBytes[Image.Image]:
        """An image; decoded, unless it is known.

        Raises:
            ValueError: the image is not known, and vLLM refuses it.
        """
        key = seen = None
        try:
            # Other modes than names come from requests, and are vLLM's to refuse.
            if self.image_mode is None or isinstance(self.image_mode, str):
                key = SEEN.key(data, self.image_mode, self.rgba_background_color)
                seen = SEEN.find(key)
        except Exception:
            _give_up("looked up")
        if seen is None:
            decoded = super().load_bytes(data)
            metrics.count(metrics.IMAGES, "decoded")
            return ArrivedImage(decoded.media, data, decoded.io_config, key)
        metrics.count(metrics.IMAGES, "known")
        io_config = {
            "image_mode": self.image_mode,
            "rgba_background_color": self.rgba_background_color,
        }
        image = KnownImage(seen.size, seen.mode, lambda: self._decode_late(data))
        return ArrivedImage(image, data, io_config if seen.is_converted else None, key)

    def _decode_late(self, data: bytes) -> Image.Image:
        metrics.count(metrics.IMAGES, "late")
        return super().load_bytes(data).media


class KnownImagesConnector(MediaConnector):
    """vLLM's media connector, but that known images are not decoded."""

    def load_from_url(
        self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
    ) -> Any:
        """Load media from a data, http(s) or file URL."""
        start = time.perf_counter()
        media = super().load_from_url(url, _ours(media_io), fetch_timeout=fetch_timeout)
        return _loaded(media, start)

    async def load_from_url_async(
        self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
    ) -> Any:
        """As `load_from_url`; decoding and reading of files happen in vLLM's threads for that."""
        start = time.perf_counter()
        media = await super().load_from_url_async(url, _ours(media_io), fetch_timeout=fetch_timeout)
        return _loaded(media, start)


def _ours(media_io: MediaIO[Any]) -> MediaIO[Any]:
    if type(media_io) is not ImageMediaIO:
        return media_io
    return KnownImagesIO(media_io.image_mode, **media_io.kwargs)


def _loaded(media: Any, start: float) -> Any:
    if isinstance(media, ArrivedImage):
        media.loading = (start, time.perf_counter())
    return media


def _give_up(what: str) -> None:
    logger.exception("VLCache: an image could not be %s; it is decoded, as without VLCache", what)
    metrics.count(metrics.FELL_BACK, "media")

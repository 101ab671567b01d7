"""Images in files: good ones, damaged ones, and such as vLLM refuses."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image


def photo(seed: int, width: int = 168, height: int = 112) -> Image.Image:
    """Colours that change slowly; the same for the same seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def encoded(
    image: Image.Image, image_format: str, *, orientation: int | None = None, **options: Any
) -> bytes:
    """The file of an image.

    Args:
        orientation: EXIF tag.
        options: of Pillow's `save`.
    """
    if orientation is not None:
        exif = Image.Exif()
        exif[Image.ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def damaged_png() -> bytes:
    """A PNG in whose middle some bytes are others; vLLM takes it, with some pixels wrong."""
    data = encoded(photo(10), "PNG")
    middle = len(data) // 2
    damaged = bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
    return data[:middle] + damaged + data[middle + 64 :]


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _png(width: int, height: int, pixels: bytes) -> bytes:
    """A greyscale PNG that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, content)
        for kind, content in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def _bomb() -> bytes:
    """40,000 x 40,000 px in few bytes."""
    return _png(40_000, 40_000, zlib.compress(bytes(1 << 20), 9))


def _animated_bomb() -> bytes:
    """A GIF whose frames are many small ones, and whose canvas is 60,000 px wide and high."""
    frames = [photo(seed, 28, 28) for seed in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    return data[:6] + struct.pack("<HH", 60_000, 60_000) + data[10:]


def _animated(first: Image.Image, image_format: str) -> bytes:
    return encoded(first, image_format, save_all=True, append_images=[photo(8)])


GOOD_IMAGES: Mapping[str, Callable[[], bytes]] = {
    "RGB PNG": lambda: encoded(photo(1), "PNG"),
    "RGBA PNG": lambda: encoded(photo(2).convert("RGBA"), "PNG"),
    "see-through PNG": lambda: encoded(photo(2).convert("P"), "PNG", transparency=3),
    "grey PNG": lambda: encoded(photo(3).convert("L"), "PNG"),
    "JPEG": lambda: encoded(photo(4), "JPEG"),
    "turned JPEG": lambda: encoded(photo(5), "JPEG", orientation=6),
    "WebP": lambda: encoded(photo(6), "WEBP"),
    "animated WebP": lambda: _animated(photo(7), "WEBP"),
    "animated GIF": lambda: _animated(photo(9), "GIF"),
    "PNG header and noise": lambda: _png(112, 112, bytes(range(256)) * 4),
}
"""What vLLM takes, by name."""

BAD_IMAGES: Mapping[str, Callable[[], bytes]] = {
    "truncated PNG": lambda: encoded(photo(1), "PNG")[:-600],
    "truncated JPEG": lambda: encoded(photo(1), "JPEG")[:-600],
    "truncated WebP": lambda: encoded(photo(1), "WEBP")[:-600],
    "truncated animated WebP": lambda: _animated(photo(1), "WEBP")[:200],
    "decompression bomb": _bomb,
    "animated decompression bomb": _animated_bomb,
    "PNG header only": lambda: _png(112, 112, b""),
    "JPEG header only": lambda: encoded(photo(1), "JPEG")[:300],
    "text": lambda: b"not an image, but a text of some length",
    "nothing": lambda: b"",
    "format that is not allowed": lambda: encoded(photo(1), "EPS"),
}
"""What vLLM refuses, by name."""

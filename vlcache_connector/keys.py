"""Content keys: under which name a segment is stored, and who may find it again.

A KV segment depends on the image, the weights and how they are run, and, through the donor's
context, on the tenant. A key therefore is a digest over all of them: equal content in different
models, dtypes, rotary settings, tensor-parallel layouts or salts never meets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

FORMAT_VERSION = 2
"""Version of what is stored under a key; a change makes every older entry a clean miss."""

_SALT_DIGITS = 16
"""Enough to account by; names of files are limited."""


def digest(parts: Mapping[str, Any]) -> str:
    """Hex SHA-256 over a JSON form of `parts` with sorted keys."""
    text = json.dumps(parts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def segment_key(
    identifier: str,
    *,
    fingerprint: str,
    donor: str,
    salt: str | None,
    text: Sequence[tuple[int, int]] = (),
) -> str:
    """Key of an item's KV segment.

    Args:
        identifier: the item's, see `content.py`.
        fingerprint: digest of the model as it is run (`identity.model_fingerprint`).
        donor: in which kind of context KV is computed (`VLCacheConfig.donor`).
        salt: the request's `cache_salt`; None is a namespace of its own.
        text: offsets and ids of those of its tokens that take no encoder rows.
    """
    hashed = digest(
        {
            "v": FORMAT_VERSION,
            "id": identifier,
            "model": fingerprint,
            "donor": donor,
            "salt": salt,
            "text": text,
        }
    )
    return hashed if salt is None else f"{hashed}.{digest({'salt': salt})[:_SALT_DIGITS]}"


def salt_of(key: str) -> str:
    """Digest of the salt that a content key is made with, hexadecimal; "": without one."""
    return key.partition("/")[0].partition(".")[2]


def encoder_key(identifier: str, *, fingerprint: str) -> str:
    """Key of an item's encoder rows, which depend on the item and the weights only."""
    return digest({"v": FORMAT_VERSION, "encoder": identifier, "model": fingerprint})


def variant_key(key: str, variant: str) -> str:
    """Key of one of several segments of the same item, which differ in their donor's place."""
    return f"{key}/{variant}"


def split_variant(key: str) -> tuple[str, str]:
    """The item's key and the variant, from `variant_key`."""
    item, _, variant = key.rpartition("/")
    return item, variant

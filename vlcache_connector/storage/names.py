"""Names that LMCache's adapters give to objects, read back: whose they are, of which segment.

Keys of `valkey` and `resp` are `<namespace>@<rank>@<group>@<hash>[@<salt>]`. Files of `fs` and
`fs_native` are called the same, with `0x` before the rank, and end with `.data`, or with `.tmp`
while they are written.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from vlcache_connector.storage.header import FORMAT_VERSION, Kind, RefusedObject
from vlcache_connector.storage.layout import kind_and_group

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import ObjectKey

_NAMESPACE = r"vlcache([1-9][0-9]{0,8})-([A-Za-z0-9._-]{1,64})-([0-9a-f]+)"
_KEY = re.compile(
    rf"{_NAMESPACE}@([0-9a-f]{{8}})@([0-9a-f]{{1,8}})@([0-9a-f]{{64}})(?:@([^@/\\\0]{{1,128}}))?"
)


class Namespace(NamedTuple):
    """Whose objects these are. Another deployment, model or version never meets them.

    Attributes:
        deployment: as in the configuration.
        fingerprint: of the model, hexadecimal.
        format_version: of the writer.
    """

    deployment: str
    fingerprint: str
    format_version: int = FORMAT_VERSION

    def __str__(self) -> str:
        """As it stands in keys of LMCache."""
        return f"vlcache{self.format_version}-{self.deployment}-{self.fingerprint}"


class RankSegment(NamedTuple):
    """The objects that one rank stored of one segment: one of them is worth nothing alone.

    Attributes:
        namespace: whose they are.
        kv_rank: rank and degree as LMCache packs them.
        kind: "kv" or "encoder".
        chunk_hash: digest of kind and content key.
        salt: whose they are, as LMCache accounts for them.
    """

    namespace: Namespace
    kv_rank: int
    kind: Kind
    chunk_hash: bytes
    salt: str

    @property
    def num_ranks(self) -> int:
        """Tensor-parallel degree."""
        return self.kv_rank >> 24

    @property
    def rank(self) -> int:
        """Tensor-parallel rank."""
        return self.kv_rank >> 16 & 0xFF


class StoredObject(NamedTuple):
    """One of a segment's objects.

    Attributes:
        segment: which it belongs to.
        group: its index among the segment's objects.
        key: LMCache's.
    """

    segment: RankSegment
    group: int
    key: ObjectKey


def read_key(name: str) -> StoredObject | None:
    """What a key of `valkey` or `resp` stands for; None: it is not one of ours."""
    from lmcache.v1.distributed.api import ObjectKey

    match = _KEY.fullmatch(name)
    if match is None:
        return None
    version, deployment, fingerprint, rank, group, digest, salt = match.groups(default="")
    namespace = Namespace(deployment, fingerprint, int(version))
    key = ObjectKey(bytes.fromhex(digest), str(namespace), int(rank, 16), int(group, 16), salt)
    try:
        kind, index = kind_and_group(key)
    except RefusedObject:
        return None
    segment = RankSegment(namespace, key.kv_rank, kind, key.chunk_hash, salt)
    return StoredObject(segment, index, key)


def read_file_name(name: str) -> tuple[StoredObject, bool] | None:
    """What a file of `fs` or `fs_native` is, and whether it is complete; None: it is not ours."""
    stem, _, extension = name.rpartition(".")
    before, separator, behind = stem.partition("@0x")
    if extension not in ("data", "tmp") or not separator:
        return None
    stored = read_key(f"{before}@{behind}")
    return None if stored is None else (stored, extension == "data")

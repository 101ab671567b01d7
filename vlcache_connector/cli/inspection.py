"""A tier below host memory as the commands see it: all its segments, whose they are, and whether
they are sound.

Nothing here knows a model: a segment is checked against what it says about itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import ConfigError
from ..storage import codec
from ..storage.header import RefusalReason, RefusedObject
from ..store.objects import as_buffers, check_objects
from ..tiers import Deadline, DiskTier, Entry, Fault, RedisTier, Tier, TierError, TierName
from ..tiers.base import check_deployment
from ..tiers.redis_url import LOGIN_HINT
from .console import CommandError, in_parallel, progress

_CONNECT_SECONDS = 5.0
_LIST_SECONDS = 300.0
_CALL_SECONDS = 60.0
_READERS = 4
_NAMES_PER_CALL = 256
_UNLIMITED_BYTES = 1 << 62  # of the disk tier, which is given nothing to write here
_MAX_SEGMENT_BYTES = 64 << 30
_HEADER_BYTES = 1 << 16  # of most segments: 12 bytes a token, and a little more
_SHORTEST_BEGINNING = 8

_HINTS: Mapping[Fault, str] = {"auth": f"; {LOGIN_HINT}"}


@dataclass(frozen=True)
class Owned:
    """A segment and whose it is.

    Attributes:
        entry: as the tier lists it.
        fingerprint: of the model; None where the segment is damaged.
        model: the model's name; None where nobody noted it.
    """

    entry: Entry
    fingerprint: str | None
    model: str | None

    def is_of(self, model: str) -> bool:
        """Whether it is of this model: by its name, or the beginning of its fingerprint."""
        by_fingerprint = (self.fingerprint or "").startswith(model)
        return _is_called(self.model, model) or (
            by_fingerprint and len(model) >= _SHORTEST_BEGINNING
        )


@dataclass(frozen=True)
class Damage:
    """Why a segment must not be used.

    Attributes:
        entry: as the tier lists it.
        reason: what kind of damage.
        problem: what was found.
    """

    entry: Entry
    reason: RefusalReason
    problem: str


@dataclass(frozen=True)
class CheckResult:
    """What came of checking segments.

    Attributes:
        sound: how many are in order.
        gone: how many were no longer there.
        damaged: all others.
    """

    sound: int
    gone: int
    damaged: list[Damage]


class Inspector:
    """Looks at an open tier. What the tier can't do is raised as TierError."""

    def __init__(self, tier: Tier, deployment: str) -> None:
        """`tier` stays the caller's."""
        self._tier = tier
        self._deployment = deployment
        self.models: Mapping[str, str] = tier.models(Deadline(_CONNECT_SECONDS))
        """Fingerprint -> model name, as noted by those who wrote."""

    @property
    def tier_name(self) -> TierName:
        """Of the tier."""
        return self._tier.name

    def entries(self) -> list[Entry]:
        """All segments.

        Raises:
            CommandError: nobody ever used the deployment.
        """
        found = list(self._tier.entries(Deadline(_LIST_SECONDS)))
        if not found and not self.models:
            raise _unknown(self._deployment)
        return found

    def knows(self, model: str) -> bool:
        """Whether somebody noted a model of this name."""
        return any(_is_called(name, model) for name in self.models.values())

    def identify(self, entries: Sequence[Entry]) -> list[Owned]:
        """Segments with their models, without those that are gone by now.

        Only a segment itself says whose it is, in the header of its first object.
        """

        def identify(entry: Entry) -> Owned | None:
            try:
                fingerprint = self._fingerprint(entry)
            except RefusedObject:
                return Owned(entry, None, None)
            if fingerprint is None:
                return None
            return Owned(entry, fingerprint, self.models.get(fingerprint))

        found = in_parallel("reading", identify, entries, _READERS)
        return [owned for owned in found if owned is not None]

    def check(self, entries: Sequence[Entry]) -> CheckResult:
        """Read segments, every byte of them."""

        def check(entry: Entry) -> Damage | Literal["sound", "gone"]:
            try:
                objects = self._read(entry)
                if objects is None:
                    return "gone"
                check_objects(entry.name.id, objects)
            except RefusedObject as refusal:
                return Damage(entry, refusal.reason, str(refusal))
            return "sound"

        found = in_parallel("checking", check, entries, _READERS)
        damaged = [result for result in found if isinstance(result, Damage)]
        return CheckResult(found.count("sound"), found.count("gone"), damaged)

    def remove(self, entries: Sequence[Entry]) -> int:
        """Remove segments; how many there were."""
        removed = 0
        with progress(removing=len(entries)) as advance:
            for start in range(0, len(entries), _NAMES_PER_CALL):
                names = [entry.name for entry in entries[start : start + _NAMES_PER_CALL]]
                removed += self._tier.remove(names, Deadline(_CALL_SECONDS))
                for _ in names:
                    advance("removing")
        return removed

    def _fingerprint(self, entry: Entry) -> str | None:
        with _refusing():
            beginning = self._tier.beginning(entry.name, _HEADER_BYTES, Deadline(_CALL_SECONDS))
            if beginning is None:
                return None
            needed = codec.header_bytes(beginning)
            if needed > len(beginning):
                beginning = self._tier.beginning(entry.name, needed, Deadline(_CALL_SECONDS))
                if beginning is None:
                    return None
        [buffer] = as_buffers([memoryview(bytearray(beginning))])  # torch asks for writable memory
        return codec.read_header(buffer).fingerprint

    def _read(self, entry: Entry) -> list[memoryview] | None:
        with _refusing():
            return self._tier.read(entry.name, _MAX_SEGMENT_BYTES, Deadline(_CALL_SECONDS))


@contextmanager
def inspecting(
    *, redis_url: str | None, disk_path: str | None, tls_ca_file: str | None, deployment: str
) -> Iterator[Inspector]:
    """Open the one tier that is given, and close it in the end.

    Raises:
        ConfigError: a setting is malformed.
        CommandError: nothing is there, or the tier failed at something. No secret is shown.
    """
    if tls_ca_file is not None and redis_url is None:
        raise ConfigError("--redis-tls-ca-file: goes with --redis-url, not with --disk-path")
    try:
        check_deployment(deployment)
        tier: Tier
        if redis_url is not None:
            tier = RedisTier(
                redis_url,
                deployment,
                None,
                tls_ca_file=tls_ca_file,
                max_connections=_READERS,
            )
        else:
            assert disk_path is not None
            _check_folder(Path(disk_path), deployment)
            # Without a time to live nothing expires while it is looked at.
            tier = DiskTier(disk_path, deployment, _UNLIMITED_BYTES, None)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        yield Inspector(tier, deployment)
    except TierError as error:
        raise CommandError(f"{tier.name}: {error}{_HINTS.get(error.fault, '')}") from None
    finally:
        tier.close()


def _check_folder(path: Path, deployment: str) -> None:
    """The disk tier makes the folders that it does not find; here, nothing is to be made."""
    if not path.is_dir():
        raise CommandError(f"--disk-path={path}: no such folder")
    if not (path / deployment).is_dir():
        raise _unknown(deployment)


def _is_called(name: str | None, wanted: str) -> bool:
    """Models are served by a path or a hub id; people use the last part of either."""
    return name is not None and wanted in (name, Path(name).name)


def _unknown(deployment: str) -> CommandError:
    return CommandError(f"--deployment={deployment}: nothing was ever stored under this name here")


@contextmanager
def _refusing() -> Iterator[None]:
    """A segment that the tier finds damaged is refused like one that we find damaged."""
    try:
        yield
    except TierError as error:
        if error.fault == "damaged":
            raise RefusedObject("format", str(error)) from None
        raise

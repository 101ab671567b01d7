"""The contract of a tier below host memory: segments as encoded objects, by name.

A tier knows nothing of KV: it keeps the objects that `store.codec` wrote, and gives back whatever
bytes it has. Whoever reads them verifies them. Calls block; they are made from transfer threads,
several at a time, never from vLLM's own.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from typing_extensions import Buffer

from ..storage.header import Kind, SegmentId

TierName = Literal["disk", "redis"]
TIER_NAMES: tuple[TierName, ...] = get_args(TierName)
Fault = Literal["timeout", "connection", "auth", "full", "damaged", "other"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
NoAnswer = Literal["skipped", "failed"]
"""Why a tier did not say whether it has a segment: nobody asked it, or asking failed."""


class TierError(Exception):
    """A tier could not do what was asked; never a missing segment.

    Attributes:
        fault: "timeout" (not done by the deadline), "connection" (refused, reset, unreachable),
            "auth" (credentials refused), "full" (no room), "damaged" (the stored frame is not one
            of ours), "other".
    """

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault: Fault = fault


@dataclass(frozen=True)
class Name:
    """What a segment of one rank is stored under.

    Attributes:
        kind: "kv" or "encoder".
        key: content key.
        rank: tensor-parallel rank that it belongs to.
        num_ranks: tensor-parallel degree of the deployment that wrote it; part of the name, so
            that another degree never finds it.
    """

    kind: Kind
    key: str
    rank: int
    num_ranks: int

    @property
    def id(self) -> SegmentId:
        """Of the segment, on whatever rank."""
        return SegmentId(self.key, self.kind)


@dataclass(frozen=True)
class Entry:
    """A stored segment, as listed.

    Attributes:
        name: what it is stored under.
        num_bytes: bytes of its objects.
        age_seconds: time since it was written.
        ttl_seconds: time until it is dropped; None: never.
    """

    name: Name
    num_bytes: int
    age_seconds: float
    ttl_seconds: float | None


@dataclass(frozen=True)
class TierUsage:
    """What a tier holds of this deployment.

    Attributes:
        num_segments: stored segments.
        num_bytes: bytes of their objects.
        budget_bytes: most bytes, None where the tier limits itself (Redis' `maxmemory`).
    """

    num_segments: int
    num_bytes: int
    budget_bytes: int | None


class Deadline:
    """A point in time by which a call has to be over."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Never below zero."""
        return max(0.0, self._at - time.monotonic())

    def check(self) -> None:
        """Raise TierError("timeout") when it has passed."""
        if self.seconds_left == 0.0:
            raise TierError("timeout", "the deadline has passed")


def check_deployment(deployment: str) -> str:
    """The name that a deployment's segments are stored under, as it is.

    Raises:
        ValueError: it could not be part of file names, keys and patterns alike.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", deployment):
        raise ValueError(
            f"deployment={deployment!r}: 1 to 64 letters, digits, '.', '_' or '-' are allowed, "
            "beginning with a letter or digit"
        )
    return deployment


class Tier(ABC):
    """Keeps segments outside of the process. Every method may be called from any thread, and
    raises TierError (secrets left out of its message) when it can't answer.
    """

    name: TierName

    @abstractmethod
    def sizes(self, names: Sequence[Name], deadline: Deadline) -> list[int | None]:
        """Bytes of each segment's objects, None where it is not stored; one round trip."""

    @abstractmethod
    def read(self, name: Name, max_bytes: int, deadline: Deadline) -> list[memoryview] | None:
        """The objects of a segment, in order.

        Args:
            max_bytes: more is refused as "damaged" before memory is taken for it.

        Returns:
            Writable memory that nobody else refers to; None when it is not stored.
        """

    @abstractmethod
    def beginning(self, name: Name, num_bytes: int, deadline: Deadline) -> memoryview | None:
        """The first bytes of a segment's first object, all of it if it is shorter; None when the
        segment is not stored. Does not count as a use, as far as the tier can tell.
        """

    @abstractmethod
    def write(self, name: Name, objects: Sequence[Buffer], deadline: Deadline) -> None:
        """Store a segment, all of it or nothing; a segment that is there already is replaced."""

    @abstractmethod
    def remove(self, names: Sequence[Name], deadline: Deadline) -> int:
        """Forget segments; how many there were."""

    @abstractmethod
    def entries(self, deadline: Deadline) -> Iterator[Entry]:
        """All segments of the deployment, in no order; what comes and goes meanwhile may be
        missed."""

    @abstractmethod
    def usage(self, deadline: Deadline) -> TierUsage:
        """What is stored."""

    @abstractmethod
    def record_model(self, fingerprint: str, model_name: str, deadline: Deadline) -> None:
        """Note which model a fingerprint stands for, for people who look at the tier."""

    @abstractmethod
    def models(self, deadline: Deadline) -> Mapping[str, str]:
        """Fingerprint -> model name, as recorded."""

    @abstractmethod
    def close(self) -> None:
        """End connections and threads. Idempotent."""

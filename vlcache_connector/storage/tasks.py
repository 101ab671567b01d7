"""What LMCache asks an adapter for, what that is made of, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult

from vlcache_connector.storage.answers import Operation

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.memory_management import MemoryObj

    from vlcache_connector.storage.opening import Attempt, Opening
    from vlcache_connector.storage.tier import Tier


@dataclass(eq=False)
class Task:
    """A lookup, load or store of some objects.

    Attributes:
        objects: memory that is read or written; empty for a lookup, and once it was answered.
        layouts: of a lookup, as LMCache gives them.
        since: monotonic seconds.
        attempt: None: it was not let through.
        num_parts: parts on their way.
        done: indices of the keys that were found, loaded, or are stored.
        num_refused: objects that were loaded and refused.
        written_bytes: of a store.
        error: what went wrong last.
        answered: LMCache has its answer.
    """

    id: int
    operation: Operation
    keys: Sequence[ObjectKey]
    objects: Sequence[MemoryObj]
    layouts: Mapping[int, MemoryLayoutDesc]
    since: float = field(default_factory=time.monotonic)
    attempt: Attempt | None = None
    num_parts: int = 0
    done: set[int] = field(default_factory=set)
    num_refused: int = 0
    written_bytes: int = 0
    error: str | None = None
    answered: bool = False

    @property
    def is_whole(self) -> bool:
        """All of it was done."""
        return len(self.done) == len(self.keys)

    @property
    def num_bytes(self) -> int:
        """Of its objects."""
        return _num_bytes(self.objects)

    def opening(self, tier: Tier) -> Opening:
        """What lets it through and judges it."""
        return tier.stores if self.operation == "store" else tier.reads

    def answer(self) -> Any:
        """For LMCache."""
        if self.operation == "store":
            return L2StoreResult(self.is_whole, self.written_bytes)
        bitmap = Bitmap(len(self.keys))
        for index in self.done:
            bitmap.set(index)
        return bitmap

    def record(self, tier: Tier) -> None:
        """Record what came of it, if it was let through."""
        if self.attempt is None:
            return
        error = self.error
        num_lost = len(self.keys) - len(self.done)
        if self.operation == "load":
            num_bytes = _num_bytes(self.objects[index] for index in self.done)
            tier.count("read.bytes", num_bytes)
            tier.count("load.failed", num_lost - self.num_refused)
            if self.is_whole and num_bytes:
                tier.read_time.observe(num_bytes, time.monotonic() - self.since)
        elif self.operation == "store":
            tier.count("write.bytes", self.written_bytes)
            tier.count("store.failed", int(not self.is_whole))
        if self.operation != "lookup":
            lost = f"{num_lost} of {len(self.keys)} objects failed"
            error = (error or lost) if num_lost else None
        self.opening(tier).end(self.attempt, error)


@dataclass(frozen=True, eq=False)
class Part:
    """What the inner adapter does for a task; a store has lookups and deletions, too.

    Attributes:
        indices: of the task's keys.
    """

    task: Task
    kind: Operation | Literal["delete"]
    indices: Sequence[int]

    @property
    def touches_memory(self) -> bool:
        """Whether it reads or writes the objects' memory."""
        return self.kind in ("load", "store")

    @property
    def keys(self) -> list[ObjectKey]:
        """Keys of its objects."""
        return [self.task.keys[index] for index in self.indices]

    @property
    def objects(self) -> list[MemoryObj]:
        """Its objects' memory."""
        return [self.task.objects[index] for index in self.indices]


def parts_of(task: Task, kind: Operation, indices: Sequence[int]) -> list[Part]:
    """Parts for some of a task's keys: of objects of one length each, if it is about objects."""
    batches: dict[int, list[int]] = {}
    for index in indices:
        length = task.objects[index].get_size() if kind != "lookup" else 0
        batches.setdefault(length, []).append(index)
    return [Part(task, kind, batch) for batch in batches.values()]


def _num_bytes(objects: Iterable[MemoryObj]) -> int:
    return sum(obj.get_size() for obj in objects)

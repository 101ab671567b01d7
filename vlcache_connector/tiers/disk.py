"""A tier of files: one per segment and rank, so that a restarted process finds them all.

A file is a frame, then the segment's objects as they are::

    0        4 bytes  magic "VLCT"
    4        u32 LE   version of the frame
    8        u32 LE   length of the list in bytes
    12       list     msgpack array of the objects' lengths in bytes
    ...      zeros    up to 4096
    objects  one after the other, to the file's end

The frame has one size, so that a file's own size says how many bytes its objects have. The time of
its modification says when it was written, the time of its access when it was used last; both are
set by hand, so mount options do not matter. Nothing is synced: what a power failure damages, the
checksums of the objects tell.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote
from zlib import crc32

import msgpack
import numpy as np
from typing_extensions import Buffer

from ..storage.header import Kind
from .base import Deadline, Entry, Name, Tier, TierError, TierName, TierUsage, check_deployment

FRAME_BYTES = 4096
_MAGIC = b"VLCT"
_VERSION = 1
_PREFIX = struct.Struct("<4sII")
_MAX_LIST_BYTES = FRAME_BYTES - _PREFIX.size
_MAX_OBJECTS = 512

_PIECE_BYTES = 8 << 20  # between two looks at the deadline
_STALE_SECONDS = 600.0  # a temporary file this old has no writer
_SCAN_SECONDS = 10.0
_RESERVE_SHARE = 0.01  # of the file system, which others use, too
_FILE_NAME = re.compile(r"(?P<key>.+)\.r(?P<rank>\d+)of(?P<num_ranks>\d+)")
_KINDS: tuple[Kind, ...] = ("kv", "encoder")


def pack_frame(lengths: Sequence[int]) -> bytes:
    """The frame of a segment whose objects have these lengths in bytes.

    Raises:
        ValueError: they are too many.
    """
    packed: bytes = msgpack.packb(list(lengths))
    if len(packed) > _MAX_LIST_BYTES or len(lengths) > _MAX_OBJECTS:
        raise ValueError(f"a segment of {len(lengths)} objects; at most {_MAX_OBJECTS} are allowed")
    prefix = _PREFIX.pack(_MAGIC, _VERSION, len(packed))
    return b"".join((prefix, packed)).ljust(FRAME_BYTES, b"\0")


def unpack_frame(frame: bytes, file_bytes: int) -> list[int]:
    """The objects' lengths, from the first bytes of a file of unknown content.

    Raises:
        TierError: "damaged"; what is returned adds up to the bytes that the file really has.
    """
    if len(frame) != FRAME_BYTES:
        raise TierError("damaged", f"a file of {file_bytes} bytes is too short")
    magic, version, length = _PREFIX.unpack_from(frame)
    if (magic, version) != (_MAGIC, _VERSION) or length > _MAX_LIST_BYTES:
        raise TierError("damaged", f"no frame of version {_VERSION}")
    try:
        lengths = msgpack.unpackb(
            frame[_PREFIX.size : _PREFIX.size + length], max_array_len=_MAX_OBJECTS
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise TierError("damaged", "the list of lengths is not msgpack") from error
    if type(lengths) is not list or any(type(n) is not int or n < 0 for n in lengths):
        raise TierError("damaged", "the list of lengths is not a list of lengths")
    if sum(lengths) != file_bytes - FRAME_BYTES or pack_frame(lengths) != frame:
        raise TierError("damaged", f"a frame that does not fit a file of {file_bytes} bytes")
    return cast(list[int], lengths)


class DiskTier(Tier):
    """Keeps segments below `<path>/<deployment>`, those used last within a budget.

    Where the file system has less room than the budget, those used last within that room.
    Processes may share the directory, each with its own budget: one process sees at the latest
    after 10 seconds, or a twentieth of its budget written, what another one adds. A file system
    that hangs is beyond any deadline.
    """

    name: TierName = "disk"

    def __init__(
        self, path: str | Path, deployment: str, budget_bytes: int, ttl_seconds: float | None
    ) -> None:
        """Make the directory, or take over what is in it.

        Args:
            path: directory for all deployments; made if its parent exists.
            deployment: name of the deployment, part of the path.
            budget_bytes: most bytes of files.
            ttl_seconds: time from writing until a segment is dropped; None: never.

        Raises:
            ValueError: nothing can be written there, or a setting is out of its range.
        """
        if budget_bytes <= 0:
            raise ValueError(f"disk_bytes={budget_bytes!r}: a positive number of bytes is needed")
        self._root = Path(path) / check_deployment(deployment)
        try:
            Path(path).mkdir(exist_ok=True)
            self._root.mkdir(mode=0o700, exist_ok=True)  # segments show what users sent
            probe = self._root / f"probe.{secrets.token_hex(8)}.tmp"
            try:
                probe.write_bytes(bytes(FRAME_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"disk_path={str(path)!r}: {error.strerror}; name a directory that this process "
                "can write to, with room in it, or leave the disk tier out"
            ) from error
        self._budget = budget_bytes
        self._ttl = ttl_seconds
        # The index exists to find what to evict: sizes by path, the least recently used first.
        # Files are its only truth; a lookup or a read asks them.
        self._lock = threading.Lock()
        self._index: dict[Path, tuple[int, int]] = {}
        self._index_bytes = 0
        self._writing: dict[Path, int] = {}
        self._scanned_at = float("-inf")
        self._written_since_scan = 0

    def sizes(self, names: Sequence[Name], deadline: Deadline) -> list[int | None]:
        found: list[int | None] = []
        for name in names:
            deadline.check()
            with _faults(self._root):
                try:
                    stat = self._path(name).stat()
                except FileNotFoundError:
                    found.append(None)
                    continue
            usable = stat.st_size >= FRAME_BYTES and not self._expired(stat)
            found.append(stat.st_size - FRAME_BYTES if usable else None)
        return found

    def read(self, name: Name, max_bytes: int, deadline: Deadline) -> list[memoryview] | None:
        path = self._path(name)
        with _faults(path):
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115 -- closed below
            except FileNotFoundError:
                return None
            with file:
                stat = os.fstat(file.fileno())
                if self._expired(stat):
                    self.remove([name], deadline)
                    return None
                lengths = unpack_frame(os.pread(file.fileno(), FRAME_BYTES, 0), stat.st_size)
                if sum(lengths) > max_bytes:
                    raise TierError(
                        "damaged", f"{sum(lengths)} bytes, at most {max_bytes} expected"
                    )
                file.seek(FRAME_BYTES)
                objects = []
                for length in lengths:
                    view = np.empty(length, np.uint8).data
                    for start in range(0, length, _PIECE_BYTES):
                        deadline.check()
                        _read_all(file, view[start : start + _PIECE_BYTES])
                    objects.append(view)
                with suppress(OSError):  # of another user: then its order of use is not kept
                    os.utime(file.fileno(), ns=(time.time_ns(), stat.st_mtime_ns))
        return objects

    def beginning(self, name: Name, num_bytes: int, deadline: Deadline) -> memoryview | None:
        path = self._path(name)
        deadline.check()
        with _faults(path):
            try:
                with open(path, "rb", buffering=0) as file:
                    stat = os.fstat(file.fileno())
                    if self._expired(stat):
                        return None
                    lengths = unpack_frame(os.pread(file.fileno(), FRAME_BYTES, 0), stat.st_size)
                    wanted = min(num_bytes, lengths[0] if lengths else 0)
                    beginning = os.pread(file.fileno(), wanted, FRAME_BYTES)
                    with suppress(OSError):  # of another user: then it counts as a use
                        os.utime(file.fileno(), ns=(stat.st_atime_ns, stat.st_mtime_ns))
                    return memoryview(beginning)
            except FileNotFoundError:
                return None

    def write(self, name: Name, objects: Sequence[Buffer], deadline: Deadline) -> None:
        views = [memoryview(obj).cast("B") for obj in objects]
        path = self._path(name)
        self._publish(path, [pack_frame([view.nbytes for view in views]), *views], deadline)

    def remove(self, names: Sequence[Name], deadline: Deadline) -> int:
        removed = 0
        for name in names:
            deadline.check()
            path = self._path(name)
            with _faults(path):
                try:
                    path.unlink()
                    removed += 1
                except FileNotFoundError:
                    pass
            with self._locked(deadline):
                self._forget(path)
        return removed

    def entries(self, deadline: Deadline) -> Iterator[Entry]:
        now = time.time()
        for name, _, stat in self._scan(deadline):
            age = max(0.0, now - stat.st_mtime)
            left = None if self._ttl is None else max(0.0, self._ttl - age)
            yield Entry(name, stat.st_size - FRAME_BYTES, age, left)

    def usage(self, deadline: Deadline) -> TierUsage:
        sizes = [entry.num_bytes for entry in self.entries(deadline)]
        return TierUsage(len(sizes), sum(sizes), self._budget)

    def record_model(self, fingerprint: str, model_name: str, deadline: Deadline) -> None:
        path = self._root / "models" / quote(fingerprint, safe="")
        self._publish(path, [memoryview(model_name.encode())], deadline)

    def models(self, deadline: Deadline) -> Mapping[str, str]:
        folder = self._root / "models"
        deadline.check()
        with _faults(folder):
            files = [path for path in folder.glob("*") if path.suffix != ".tmp"]
            return {unquote(path.name): path.read_text(errors="replace") for path in files}

    def close(self) -> None:
        pass

    def _path(self, name: Name) -> Path:
        key = quote(name.key, safe="")
        folder = f"{crc32(name.key.encode()) & 0xFF:02x}"
        return self._root / name.kind / folder / f"{key}.r{name.rank}of{name.num_ranks}"

    def _expired(self, stat: os.stat_result) -> bool:
        return self._ttl is not None and time.time() - stat.st_mtime >= self._ttl

    def _publish(self, path: Path, parts: Sequence[Buffer], deadline: Deadline) -> None:
        """Write a file: other readers see all of it or what was there before."""
        num_bytes = sum(memoryview(part).nbytes for part in parts)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        self._make_room(temporary, num_bytes, deadline)
        try:
            with _faults(path):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(temporary, "xb", buffering=0) as file:
                        for part in parts:
                            view = memoryview(part)
                            while view:
                                deadline.check()
                                view = view[file.write(view[:_PIECE_BYTES]) :]
                    os.replace(temporary, path)
                except BaseException:
                    with suppress(OSError):
                        temporary.unlink()
                    raise
            with self._lock:
                self._forget(path)
                self._index[path] = (num_bytes, time.time_ns())
                self._index_bytes += num_bytes
                self._written_since_scan += num_bytes
        finally:
            with self._lock:
                del self._writing[temporary]

    def _make_room(self, temporary: Path, num_bytes: int, deadline: Deadline) -> None:
        """Evict until a file fits, and count it as `_writing`."""
        if num_bytes > self._budget:
            raise TierError("full", f"{num_bytes} bytes; the budget is {self._budget}")
        with self._locked(deadline), _faults(self._root):
            if (
                time.monotonic() - self._scanned_at > _SCAN_SECONDS
                or self._written_since_scan > self._budget // 20
            ):
                self._rebuild_index(deadline)
            # What does not fit even then should evict nothing.
            if self._bytes_left(num_bytes) + self._index_bytes < 0:
                raise TierError("full", f"{num_bytes} bytes; others take the room")
            refreshed: set[Path] = set()
            while self._bytes_left(num_bytes) < 0:
                deadline.check()
                if not self._index:
                    raise TierError("full", "the room is taken by writes that are going on")
                path, (size, used_at) = next(iter(self._index.items()))
                with suppress(FileNotFoundError):
                    now_used_at = path.stat().st_atime_ns
                    if now_used_at > used_at and path not in refreshed:
                        refreshed.add(path)
                        del self._index[path]
                        self._index[path] = (size, now_used_at)
                        continue
                    path.unlink()
                self._forget(path)
            self._writing[temporary] = num_bytes

    def _bytes_left(self, num_bytes: int) -> int:
        """Of the budget or of the file system, behind a write; below zero if it does not fit."""
        used = self._index_bytes + sum(self._writing.values())
        system = shutil.disk_usage(self._root)
        free = system.free - int(_RESERVE_SHARE * system.total)
        return min(self._budget - used, free) - num_bytes

    def _forget(self, path: Path) -> None:
        size, _ = self._index.pop(path, (0, 0))
        self._index_bytes -= size

    def _rebuild_index(self, deadline: Deadline) -> None:
        found = [(stat.st_atime_ns, path, stat.st_size) for _, path, stat in self._scan(deadline)]
        self._index = {path: (size, used_at) for used_at, path, size in sorted(found)}
        self._index_bytes = sum(size for *_, size in found)
        self._scanned_at = time.monotonic()
        self._written_since_scan = 0

    def _scan(self, deadline: Deadline) -> Iterator[tuple[Name, Path, os.stat_result]]:
        """All segments; drops what is expired, and temporary files that nobody writes."""
        for kind in _KINDS:
            for folder in _listing(self._root / kind):
                deadline.check()
                for file in _listing(folder):
                    with _faults(self._root), suppress(FileNotFoundError):
                        stat = file.stat(follow_symlinks=False)
                        match = _FILE_NAME.fullmatch(file.name)
                        abandoned = (
                            file.name.endswith(".tmp")
                            and time.time() - stat.st_mtime > _STALE_SECONDS
                        )
                        if abandoned or (match and self._expired(stat)):
                            file.unlink()
                        elif match and stat.st_size >= FRAME_BYTES:
                            key = unquote(match["key"])
                            name = Name(kind, key, int(match["rank"]), int(match["num_ranks"]))
                            yield name, file, stat

    @contextmanager
    def _locked(self, deadline: Deadline) -> Iterator[None]:
        if not self._lock.acquire(timeout=deadline.seconds_left):
            raise TierError("timeout", "another thread had the index until the deadline")
        try:
            yield
        finally:
            self._lock.release()


def _listing(folder: Path) -> list[Path]:
    with _faults(folder), suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []


def _read_all(file: Any, view: memoryview) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise TierError("damaged", "the file became shorter while it was read")
        view = view[count:]


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Raise what the operating system refuses as a TierError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        message = f"{path}: {error.strerror or error}"
        raise TierError("full" if full else "other", message) from error

"""The directory of `disk_path`: whether it is fit to keep segments in, and what it may keep.

LMCache's `fs` adapters write one file per object into one directory, and leave them there. Files
get the permissions that the process's umask leaves; it is the directory's that keep others out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import _object_key_to_filename

from vlcache_connector.config import ConfigError
from vlcache_connector.storage.names import RankSegment, read_file_name

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import ObjectKey

logger = logging.getLogger(__name__)

_ROUND_SECONDS = 10.0
_STALE_SECONDS = 600.0
_HEADROOM = 20
"""One part in so many of the budget is for what is written between two rounds."""
_NOTHING_OF_OURS = "name an empty directory, or one that does not exist yet"


# -- the directory ------------------------------------------------------------------------------


_OF_FILE_SYSTEMS = "lost+found"
"""What a volume of one's own has from the start."""


def check_directory(path: str | Path, *, can_store: bool) -> None:
    """Find out whether a directory may be handed to an `fs` adapter.

    Several processes may share it. It is ours if it holds nothing but our objects, of whichever
    deployment and version.

    Args:
        path: `disk_path`.
        can_store: we are going to write to it. It is made if its parent exists.

    Raises:
        ConfigError: it may not; says why, and what to do.
    """
    path = Path(path)
    if can_store:
        try:
            path.mkdir(mode=0o700)  # segments show what users sent
        except FileExistsError:
            pass
        except OSError as error:
            raise _refused(path, str(error.strerror), _NOTHING_OF_OURS) from None
    needed = os.R_OK | os.X_OK | (os.W_OK if can_store else 0)
    with _opened(path) as folder:
        if not os.access(".", needed, dir_fd=folder):
            verb = "write to" if can_store else "read"
            raise _refused(path, f"this process can't {verb} it", f"let it, or {_NOTHING_OF_OURS}")
        for name in os.listdir(folder):
            if read_file_name(name) is None and name != _OF_FILE_SYSTEMS:
                raise _refused(path, f"it holds {name!r}, which is not ours", _NOTHING_OF_OURS)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of the directory, which nothing that happens to its path can change.

    Raises:
        ConfigError: it is none, or somebody else could change what is in it.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        problem = "a symbolic link" if path.is_symlink() else str(error.strerror)
        raise _refused(path, problem, "name a directory") from None
    try:
        found = os.fstat(folder)
        if found.st_uid != os.geteuid():
            problem = f"it belongs to user {found.st_uid}, and we are {os.geteuid()}"
            raise _refused(path, problem, f"change its owner, or {_NOTHING_OF_OURS}")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problem = f"others can write to it (mode {stat.S_IMODE(found.st_mode):o})"
            raise _refused(path, problem, f"chmod 700 it, or {_NOTHING_OF_OURS}")
        yield folder
    finally:
        os.close(folder)


def _refused(path: Path, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"kv_connector_extra_config: disk_path={str(path)!r}: {problem}; {remedy}")


# -- the janitor --------------------------------------------------------------------------------


class _File(NamedTuple):
    """A file of ours.

    Attributes:
        name: in the directory.
        num_bytes: its length.
        written_at: when it was written.
        used_at: when it was written or read last.
    """

    name: str
    num_bytes: int
    written_at: float
    used_at: float


class Janitor(L2AdapterListener):
    """Keeps a directory within its budget: what is too old goes, and what was used longest ago.

    Segments go as a whole, of all deployments alike. The files are the only truth: what was there
    at start counts, as does what other processes write, each of which may have a janitor of its
    own. Files that are not ours are neither counted nor touched. Where the file system has less
    room than the budget, that room is the budget.

    Hears from the adapter, as its listener, what is read and how much is written.
    """

    def __init__(
        self, path: str | Path, budget_bytes: int, ttl_seconds: float, *, can_store: bool
    ) -> None:
        """`start` it to have anything removed.

        Args:
            path: the directory; `check_directory` has found it fit.
            budget_bytes: most bytes of files, but for those that others write within a round.
            ttl_seconds: time from writing until a segment is dropped.
            can_store: without, nothing is ever removed.
        """
        self._path = Path(path)
        self._budget = budget_bytes
        self._ttl = ttl_seconds
        self._can_store = can_store
        self._written = 0
        self._wake = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="vlcache-janitor", daemon=True)

    def start(self) -> None:
        """Clean up now, and every few seconds."""
        if self._can_store:
            self._thread.start()

    def close(self) -> None:
        """End the thread. A janitor that was not started can be closed, too."""
        self._is_closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def clean(self) -> None:
        """Remove what has to go.

        Raises:
            ConfigError: the directory is no longer fit.
            OSError: something can't be removed.
        """
        with _opened(self._path) as folder:
            now = time.time()
            kept: list[tuple[float, int, list[_File]]] = []
            total = 0
            for files, is_complete in _segments(folder):
                num_bytes = sum(file.num_bytes for file in files)
                lifetime = self._ttl if is_complete else _STALE_SECONDS
                if now - min(file.written_at for file in files) > lifetime:
                    _remove(folder, files)
                    continue
                total += num_bytes
                if is_complete:
                    kept.append((max(file.used_at for file in files), num_bytes, files))
            system = os.statvfs(folder)
            limit = min(self._budget, total + system.f_bavail * system.f_frsize)
            limit -= limit // _HEADROOM
            for _, num_bytes, files in sorted(kept):
                if total <= limit:
                    break
                _remove(folder, files)
                total -= num_bytes

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        """Clean up before the next round where much is written."""
        self._written += sum(sizes)
        if self._written > self._budget // _HEADROOM // 2:
            self._wake.set()

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        """Note the use of what was read in its file's time of access."""
        now = time.time_ns()
        for key in keys:
            path = self._path / _object_key_to_filename(key)
            with contextlib.suppress(OSError):  # gone, or of another user
                written_at = os.lstat(path).st_mtime_ns
                os.utime(path, ns=(now, written_at), follow_symlinks=False)

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        """Nothing has to be done."""

    def _run(self) -> None:
        problem = ""
        while not self._is_closing:
            self._written = 0
            try:
                self.clean()
                problem = ""
            except (ConfigError, OSError) as error:
                if str(error) != problem:
                    logger.warning("VLCache: the disk is not cleaned up: %s", error)
                problem = str(error)
            self._wake.wait(_ROUND_SECONDS)
            self._wake.clear()


def _segments(folder: int) -> Iterator[tuple[list[_File], bool]]:
    """Files of ours, those of one segment and rank together; False: one that is not complete."""
    found: dict[RankSegment, list[_File]] = defaultdict(list)
    with os.scandir(folder) as entries:
        for entry in entries:
            named = read_file_name(entry.name)
            if named is None:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(status.st_mode):
                continue
            used_at = max(status.st_atime, status.st_mtime)
            file = _File(entry.name, status.st_size, status.st_mtime, used_at)
            stored, is_complete = named
            if is_complete:
                found[stored.segment].append(file)
            else:
                yield [file], False
    for files in found.values():
        yield files, True


def _remove(folder: int, files: list[_File]) -> None:
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # another janitor was faster
            os.unlink(file.name, dir_fd=folder)

"""What benchmarks write: files, where and when they ran, and numbers with their range."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from serving import ROOT

PACKAGES = ("vllm", "torch", "transformers", "lmcache", "vlcache-connector")


# -- files --------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file beside `path`, then move it there."""
    with replacing(path) as work:
        work.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it replaces `path` when the block is left without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    work = Path(name)
    try:
        yield work
        work.chmod(0o644)
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def read_document(path: Path, schema: int, script: str) -> dict[str, Any]:
    """What an earlier run of a script wrote.

    Raises:
        ValueError: the file is none of this script and schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise ValueError(f"{path} was not written by this version of {Path(script).name}")
    return document


def with_suffix(output: Path, suffix: str) -> Path:
    """The result file of this kind."""
    return output.with_name(output.name + suffix)


# -- about the run ------------------------------------------------------------------------------


def about_run(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """When, where and how a script runs: the first entries of its document."""
    return {
        "started": timestamp(),
        "command": command_line(["python", str(Path(script).resolve()), *arguments]),
        "git": git_state(),
        "versions": versions(),
        "machine": machine(),
    }


def timestamp() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine() -> dict[str, Any]:
    """The processor, and how many of its cores this process may use."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}


def git_state() -> dict[str, Any]:
    """The commit, and whether the code was changed since; None where there is no repository."""
    changes = _git("status", "--porcelain", "vlcache_connector", "scripts")
    return {"commit": _git("rev-parse", "HEAD"), "changed": bool(changes)}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def command_line(command: Sequence[str]) -> str:
    """`command` for readers: paths within the repository are relative to it."""
    return shlex.join(command).replace(f"{ROOT}/", "")


def duration(document: Mapping[str, Any]) -> str:
    """How long a run took, by its times "started" and "finished", if it is "complete"."""
    if not document["complete"]:
        return "**interrupted: not all measurements are there**"
    started, finished = (datetime.fromisoformat(document[key]) for key in ("started", "finished"))
    return f"{(finished - started).total_seconds() / 60:.0f} minutes"


def end_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    """A signal's handler: the script ends, and what it has opened is closed."""
    sys.exit(128 + number)


def cores() -> str:
    """All cores of this process, for `VLLM_CPU_OMP_THREADS_BIND`."""
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))


# -- numbers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and range of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Of `numbers`, of which there is at least one."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))


def with_range(spread: Spread, form: str) -> str:
    """Median and range for readers, each number in this format."""
    return f"{spread.median:{form}} ({spread.low:{form}}-{spread.high:{form}})"


# -- CPU time -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of CPU time that were used so far.

    Attributes:
        groups: by process groups.
        other: by everything else but this process.
    """

    groups: tuple[float, ...]
    other: float

    @classmethod
    def now(cls, groups: Sequence[int]) -> CpuTimes:
        """Read the times of `groups` and of the whole machine."""
        tick = os.sysconf("SC_CLK_TCK")
        used = dict.fromkeys(groups, 0)
        for stat in Path("/proc").glob("[0-9]*/stat"):
            # A process may end at any time.
            with contextlib.suppress(OSError):
                entry = stat.read_text().rpartition(")")[2].split()
                group = int(entry[2])
                if group in used:
                    used[group] += int(entry[11]) + int(entry[12])
        user, nice, system, _, _, irq, softirq, steal = (
            int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        )
        busy = user + nice + system + irq + softirq + steal
        own = sum(used.values()) / tick + time.process_time()
        return cls(tuple(used[group] / tick for group in groups), busy / tick - own)

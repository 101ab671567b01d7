"""What the commands have in common: how they print, refuse, and read values."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Item = TypeVar("Item")
Result = TypeVar("Result")

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class CommandError(Exception):
    """What a command was asked for can't be done; the message says why."""


# -- printing -----------------------------------------------------------------------------------


def out() -> Console:
    """For results."""
    return Console(highlight=False, soft_wrap=True)


def err() -> Console:
    """For everything else."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Print the result for programs, on stdout."""
    print(json.dumps(document, indent=2))


def printable(text: str) -> str:
    """Text of unknown content, without what would make a terminal do things."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


@contextmanager
def progress(**totals: int) -> Iterator[Callable[[str], None]]:
    """Bars by name; a call with a name advances one."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err()) as bars:
        tasks = {name: bars.add_task(name, total=total) for name, total in totals.items()}
        yield lambda name: bars.advance(tasks[name])


def in_parallel(
    what: str, work: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> list[Result]:
    """Results in the order of the items, under a bar named `what`; what `work` raises ends all."""
    results = []
    with progress(**{what: len(items)}) as advance, ThreadPoolExecutor(threads) as pool:
        for result in pool.map(work, items):
            results.append(result)
            advance(what)
    return results


def size_text(num_bytes: int) -> str:
    """A number of bytes for people."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def duration_text(seconds: float | None) -> str:
    """A duration for people, in its two largest units."""
    if seconds is None:
        return "-"
    left = int(seconds)
    parts: list[str] = []
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, _SECONDS[unit])
        if count or parts or unit == "s":
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


# -- asking -------------------------------------------------------------------------------------


def confirm(question: str) -> bool:
    """Whether the user says yes; nobody there to ask is a no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# -- values of arguments ------------------------------------------------------------------------


def checked(value: Item, text: str, is_allowed: Callable[[Item], bool], allowed: str) -> Item:
    """`value`, which was read from `text`, if it is allowed."""
    if not is_allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, only {allowed}")
    return value


def positive(text: str) -> int:
    """A number from 1 on."""
    return checked(int(text), text, lambda value: value >= 1, "at least 1")


def not_negative(text: str) -> int:
    """A number from 0 on."""
    return checked(int(text), text, lambda value: value >= 0, "at least 0")


def duration(text: str) -> float:
    """Seconds, from a number and a unit."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed, only a number with one of the units {', '.join(_SECONDS)}"
        )
    return float(match[1]) * _SECONDS[match[2]]

"""Commands that look after stored segments, on disk or in Redis: `ls`, `stat`, `rm`, and the
half of `verify` that checks them.

What reads tiers is imported when a command runs: it takes seconds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError
from rich.table import Table
from rich.text import Text

from ..config import Bytes, ConfigError
from .console import (
    CommandError,
    checked,
    confirm,
    duration,
    duration_text,
    not_negative,
    out,
    print_json,
    printable,
    size_text,
)

if TYPE_CHECKING:
    from ..tiers import Entry
    from .inspection import Inspector, Owned

_KINDS = ("kv", "encoder")
_SHOWN_BY_DEFAULT = 50
_SHORT = 12
_TEXT_COLUMNS = frozenset({"key", "kind", "model", "problem"})
_LONG_COLUMNS = frozenset({"model", "problem"})


# -- arguments ----------------------------------------------------------------------------------


def add_commands(commands: Any) -> None:
    """Add `ls`, `stat` and `rm` to the commands."""
    command = commands.add_parser(
        "ls",
        help="list stored segments",
        description="List stored segments.",
    )
    _add_place(command)
    _add_filters(command)
    command.add_argument(
        "--sort",
        choices=("age", "size"),
        default="age",
        help="youngest or largest first (default: age)",
    )
    command.add_argument(
        "--limit",
        type=not_negative,
        default=_SHOWN_BY_DEFAULT,
        metavar="N",
        help=f"show the first N, 0: all (default: {_SHOWN_BY_DEFAULT})",
    )
    command.set_defaults(run=run_ls)

    command = commands.add_parser(
        "stat",
        help="count stored segments",
        description="Count stored segments and their bytes by model and kind.",
    )
    _add_place(command)
    command.add_argument(
        "--disk-bytes",
        type=_size,
        metavar="SIZE",
        help="the servers' setting, such as 50GiB, to compare with",
    )
    command.set_defaults(run=run_stat)

    command = commands.add_parser(
        "rm",
        help="remove stored segments",
        description="Remove the stored segments that all given filters fit, after asking.",
    )
    _add_place(command)
    _add_filters(command)
    command.add_argument("--all", action="store_true", help="all of the deployment")
    command.add_argument("--yes", action="store_true", help="don't ask")
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    command.set_defaults(run=run_rm)


def add_places(group: Any) -> None:
    """Add the options that name a tier to a mutually exclusive group."""
    group.add_argument(
        "--redis-url",
        metavar="URL",
        help="Redis tier, as in redis_url; who to log in as comes from VLCACHE_REDIS_USERNAME and "
        "VLCACHE_REDIS_PASSWORD, or from the file that VLCACHE_REDIS_CREDENTIALS_FILE names",
    )
    group.add_argument("--disk-path", metavar="FOLDER", help="disk tier, as in disk_path")


def add_verify_options(command: Any) -> None:
    """Add what `verify` takes besides a tier."""
    _add_common(command)
    command.add_argument("--remove-damaged", action="store_true", help="remove what is damaged")


def _add_place(command: Any) -> None:
    add_places(command.add_mutually_exclusive_group(required=True))
    _add_common(command)


def _add_common(command: Any) -> None:
    command.add_argument("--deployment", default="default", metavar="NAME", help="default: default")
    command.add_argument(
        "--redis-tls-ca-file", metavar="FILE", help="certificates to check a rediss:// server with"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_filters(command: Any) -> None:
    command.add_argument(
        "--key", nargs="+", type=_prefix, metavar="PREFIX", help="keys that begin with one of these"
    )
    command.add_argument("--kind", choices=_KINDS)
    command.add_argument(
        "--model", metavar="NAME", help="name of the model, or the beginning of its fingerprint"
    )
    command.add_argument(
        "--older-than", type=duration, metavar="AGE", help="such as 90s, 15m, 12h, 3d, 2w"
    )


def _prefix(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("'' is not allowed: it is the beginning of every key")
    return text


def _size(text: str) -> int:
    try:
        size: int = TypeAdapter(Bytes).validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 50GiB") from None
    return checked(size, text, lambda value: value > 0, "sizes above 0")


# -- ls -----------------------------------------------------------------------------------------


def run_ls(args: argparse.Namespace) -> int:
    """List segments."""
    with _inspecting(args) as inspector:
        found = _selected(inspector, args)
        found.sort(key=lambda e: e.age_seconds if args.sort == "age" else -e.num_bytes)
        shown = inspector.identify(found[: args.limit or None])
        place = _place(inspector, args)
    num_bytes = sum(entry.num_bytes for entry in found)
    if args.json:
        rows = [
            {**_described(o.entry), "fingerprint": o.fingerprint, "model": o.model} for o in shown
        ]
        print_json({**place, "num_segments": len(found), "num_bytes": num_bytes, "segments": rows})
        return 0
    listed = _table(
        f"Segments: {_summary(found)}",
        ("key", "kind", "rank", "size", "age", "ttl", "model"),
        (
            (
                *_cells(o.entry),
                duration_text(o.entry.age_seconds),
                duration_text(o.entry.ttl_seconds),
                _owner(o),
            )
            for o in shown
        ),
    )
    out().print(listed)
    if 0 < args.limit < len(found):
        out().print(f"Shown are the first {args.limit}; --limit 0 shows all")
    return 0


# -- stat ---------------------------------------------------------------------------------------


def run_stat(args: argparse.Namespace) -> int:
    """Count segments."""
    if args.disk_bytes is not None and args.disk_path is None:
        raise ConfigError("--disk-bytes: goes with --disk-path, not with --redis-url")
    with _inspecting(args) as inspector:
        owned = inspector.identify(inspector.entries())
        place = _place(inspector, args)
    groups: dict[tuple[str, str | None, str | None, str], list[Entry]] = defaultdict(list)
    for o in owned:
        groups[_owner(o), o.model, o.fingerprint, o.entry.name.kind].append(o.entry)
    in_order = sorted(groups.items(), key=lambda item: (item[0][0], item[0][3]))
    everything = [o.entry for o in owned]
    if args.json:
        rows = [
            {"model": model, "fingerprint": fingerprint, "kind": kind, **_figures(entries)}
            for (_, model, fingerprint, kind), entries in in_order
        ]
        total = {**_figures(everything), "budget_bytes": args.disk_bytes}
        print_json({**place, **total, "groups": rows})
        return 0
    counted = _table(
        f"Segments: {_summary(everything)}",
        ("model", "kind", "segments", "size", "oldest", "newest"),
        (
            (owner, kind, str(len(entries)), size_text(_bytes_of(entries)), *_ages_text(entries))
            for (owner, _, _, kind), entries in in_order
        ),
    )
    out().print(counted)
    if args.disk_bytes is not None:
        share = _bytes_of(everything) / args.disk_bytes
        out().print(f"{share:.1%} of {size_text(args.disk_bytes)}")
    elif args.redis_url is not None:
        out().print("The budget is what Redis allows itself (maxmemory)")
    return 0


def _figures(entries: Sequence[Entry]) -> dict[str, Any]:
    ages = [entry.age_seconds for entry in entries]
    return {
        "num_segments": len(entries),
        "num_bytes": _bytes_of(entries),
        "oldest_seconds": max(ages, default=None),
        "newest_seconds": min(ages, default=None),
    }


def _ages_text(entries: Sequence[Entry]) -> tuple[str, str]:
    ages = [entry.age_seconds for entry in entries]
    return duration_text(max(ages)), duration_text(min(ages))


# -- verify -------------------------------------------------------------------------------------


def run_verify(args: argparse.Namespace) -> int:
    """Check segments."""
    with _inspecting(args) as inspector:
        result = inspector.check(inspector.entries())
        removed = 0
        if args.remove_damaged and result.damaged:
            removed = inspector.remove([damage.entry for damage in result.damaged])
        place = _place(inspector, args)
    damaged = result.damaged
    if args.json:
        rows = [{**_described(d.entry), "reason": d.reason, "problem": d.problem} for d in damaged]
        counts = {"sound": result.sound, "gone": result.gone, "removed": removed}
        print_json({**place, **counts, "damaged": rows})
        return 1 if damaged else 0
    if damaged:
        listed = _table(
            "Damaged segments",
            ("key", "kind", "rank", "size", "problem"),
            ((*_cells(damage.entry), damage.problem) for damage in damaged),
        )
        out().print(listed)
    gone = f", {result.gone} gone meanwhile" if result.gone else ""
    out().print(f"{result.sound} sound, {len(damaged)} damaged{gone}")
    if args.remove_damaged:
        out().print(f"Removed: {removed}")
    return 1 if damaged else 0


# -- rm -----------------------------------------------------------------------------------------


def run_rm(args: argparse.Namespace) -> int:
    """Remove segments."""
    filtered = any((args.key, args.kind, args.model, args.older_than is not None))
    if filtered == args.all:
        raise ConfigError("either --all is needed, or some of --key, --kind, --model, --older-than")
    with _inspecting(args) as inspector:
        found = _selected(inspector, args)
        removed = 0
        if found and not args.dry_run:
            if not args.yes and not confirm(f"Remove {_summary(found)}?"):
                raise CommandError("nothing was removed")
            removed = inspector.remove(found)
        place = _place(inspector, args)
    if args.json:
        rows = [_described(entry) for entry in found]
        print_json({**place, "dry_run": args.dry_run, "removed": removed, "segments": rows})
    elif args.dry_run:
        listed = _table(
            f"Would be removed: {_summary(found)}",
            ("key", "kind", "rank", "size", "age"),
            ((*_cells(e), duration_text(e.age_seconds)) for e in found),
        )
        out().print(listed)
    else:
        out().print(f"Removed: {removed}")
    return 0


# -- what the commands share --------------------------------------------------------------------


def _inspecting(args: argparse.Namespace) -> AbstractContextManager[Inspector]:
    from .inspection import inspecting

    return inspecting(
        redis_url=args.redis_url,
        disk_path=args.disk_path,
        tls_ca_file=args.redis_tls_ca_file,
        deployment=args.deployment,
    )


def _place(inspector: Inspector, args: argparse.Namespace) -> dict[str, str]:
    return {"tier": inspector.tier_name, "deployment": args.deployment}


def _selected(inspector: Inspector, args: argparse.Namespace) -> list[Entry]:
    """The segments that all given filters fit.

    Raises:
        CommandError: there is no such model.
    """
    found = [
        entry
        for entry in inspector.entries()
        if (args.kind is None or entry.name.kind == args.kind)
        and (args.key is None or entry.name.key.startswith(tuple(args.key)))
        and (args.older_than is None or entry.age_seconds > args.older_than)
    ]
    if args.model is None:
        return found
    of_model = [o.entry for o in inspector.identify(found) if o.is_of(args.model)]
    if not of_model and not inspector.knows(args.model):
        known = ", ".join(sorted(set(inspector.models.values()))) or "none"
        raise CommandError(f"--model={args.model}: no such model here; known are: {known}")
    return of_model


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose cells are not read as markup; only long texts are broken into lines."""
    table = Table(title=Text(title))
    for column in columns:
        justify: Literal["left", "right"] = "left" if column in _TEXT_COLUMNS else "right"
        table.add_column(column, justify=justify, no_wrap=column not in _LONG_COLUMNS)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _described(entry: Entry) -> dict[str, Any]:
    name = entry.name
    return {
        "key": name.key,
        "kind": name.kind,
        "rank": name.rank,
        "num_ranks": name.num_ranks,
        "num_bytes": entry.num_bytes,
        "age_seconds": round(entry.age_seconds, 3),
        "ttl_seconds": entry.ttl_seconds,
    }


def _cells(entry: Entry) -> tuple[str, str, str, str]:
    """Key, kind, rank and size for people."""
    name = entry.name
    return (
        _short(name.key),
        name.kind,
        f"{name.rank}/{name.num_ranks}",
        size_text(entry.num_bytes),
    )


def _short(key: str) -> str:
    """A key's beginning, which `--key` takes, and its variant."""
    item, slash, variant = key.partition("/")
    return (item if len(item) <= _SHORT else f"{item[:_SHORT]}…") + slash + variant


def _owner(owned: Owned) -> str:
    if owned.fingerprint is None:
        return "(damaged)"
    return owned.model if owned.model is not None else f"({owned.fingerprint[:_SHORT]}…)"


def _bytes_of(entries: Iterable[Entry]) -> int:
    return sum(entry.num_bytes for entry in entries)


def _summary(entries: Sequence[Entry]) -> str:
    return f"{len(entries)}, {size_text(_bytes_of(entries))}"

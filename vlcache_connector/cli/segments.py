"""Commands over stored segments: `ls`, `stat`, `check` and `rm`.

What reads them is imported when a command runs: it takes seconds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from ..config import ConfigError
from .console import (
    CommandError,
    confirm,
    duration,
    duration_text,
    in_parallel,
    not_negative,
    out,
    print_json,
    printable,
    size_text,
)

if TYPE_CHECKING:
    from ..storage.listing import ListedSegment, Store

_KINDS = ("kv", "encoder")
_SHOWN_BY_DEFAULT = 50
_SHORT = 12
_READERS = 4
_TEXT_COLUMNS = frozenset({"key", "kind", "deployment", "model", "problem"})


# -- arguments ----------------------------------------------------------------------------------


def add_commands(commands: Any) -> None:
    """Add `ls`, `stat`, `check` and `rm` to the commands."""
    command = _add(commands, run_ls, "list stored segments", "List stored segments, youngest first")
    command.add_argument(
        "--limit",
        type=not_negative,
        default=_SHOWN_BY_DEFAULT,
        metavar="N",
        help=f"show the first N, 0: all (default: {_SHOWN_BY_DEFAULT})",
    )
    _add(
        commands,
        run_stat,
        "count stored segments",
        "Count stored segments and their bytes by deployment, model and kind",
    )
    command = _add(
        commands,
        run_check,
        "find out whether stored segments are sound",
        "Read stored segments and check every byte; exit with status 1 if any is damaged",
    )
    command.add_argument("--remove-damaged", action="store_true", help="remove what is damaged")
    command = _add(
        commands, run_rm, "remove stored segments", "Remove stored segments, after asking"
    )
    command.add_argument("--all", action="store_true", help="all that lie there")
    command.add_argument("--yes", action="store_true", help="don't ask")
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _add(commands: Any, run: Any, summary: str, description: str) -> Any:
    command = commands.add_parser(
        run.__name__.removeprefix("run_"),
        help=summary,
        description=f"{description}: all that the given filters fit. What lies in Mooncake can't "
        "be listed.",
    )
    place = command.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--disk-path", metavar="FOLDER", help="as disk_path, or base_path of an adapter"
    )
    place.add_argument(
        "--redis-url",
        metavar="URL",
        help="as redis_url, or the server of an adapter of type valkey or resp; who to log in as "
        "comes from VLCACHE_REDIS_USERNAME and VLCACHE_REDIS_PASSWORD, or from the file that "
        "VLCACHE_REDIS_CREDENTIALS_FILE names",
    )
    command.add_argument(
        "--redis-tls-ca-file", metavar="FILE", help="certificates to check a rediss:// server with"
    )
    command.add_argument("--deployment", metavar="NAME")
    command.add_argument(
        "--model",
        type=_prefix,
        metavar="PREFIX",
        help="models whose fingerprint begins so; a server says its own in the log at start",
    )
    command.add_argument("--kind", choices=_KINDS)
    command.add_argument(
        "--key", nargs="+", type=_prefix, metavar="PREFIX", help="keys that begin with one of these"
    )
    command.add_argument(
        "--older-than",
        type=duration,
        metavar="AGE",
        help="on disk only: such as 90s, 15m, 12h, 3d, 2w",
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run)
    return command


def _prefix(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("'' is not allowed: everything begins so")
    return text


# -- the commands -------------------------------------------------------------------------------


def run_ls(args: argparse.Namespace) -> int:
    """List segments."""
    with _opened(args) as store:
        found = _selected(store, args)
        rows = _described(store, found[: args.limit or None])
    if args.json:
        print_json({**_sum(found), "segments": rows})
        return 0
    _print_segments(f"Segments: {_summary(found)}", rows)
    if len(rows) < len(found):
        out().print(f"Shown are the first {args.limit}; --limit 0 shows all")
    return 0


def run_stat(args: argparse.Namespace) -> int:
    """Count segments."""
    with _opened(args) as store:
        found = _selected(store, args)
    groups: dict[Any, list[ListedSegment]] = defaultdict(list)
    for each in found:
        groups[each.id.namespace, each.id.kind].append(each)
    rows = [
        {**namespace._asdict(), "kind": kind, **_sum(each)}
        for (namespace, kind), each in sorted(groups.items())
    ]
    if args.json:
        print_json({**_sum(found), "groups": rows})
        return 0
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "deployment": itemgetter("deployment"),
        "model": lambda row: _short(row["fingerprint"]),
        "kind": itemgetter("kind"),
        "count": lambda row: str(row["num_segments"]),
        "size": lambda row: size_text(row["num_bytes"]),
        "oldest": lambda row: duration_text(row["oldest_seconds"]),
        "newest": lambda row: duration_text(row["newest_seconds"]),
    }
    _print_table(f"Segments: {_summary(found)}", columns, rows)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Check segments."""
    from ..storage.header import RefusedObject
    from ..storage.listing import is_of_this_version

    with _opened(args) as store:
        found = _selected(store, args)
        ours = [each for each in found if is_of_this_version(each)]

        def check(segment: ListedSegment) -> RefusedObject | str:
            try:
                return store.check(segment)
            except RefusedObject as refusal:
                return refusal

        verdicts = in_parallel("checking", check, ours, _READERS)
        refused = {
            segment: verdict
            for segment, verdict in zip(ours, verdicts, strict=True)
            if isinstance(verdict, RefusedObject)
        }
        # Where nothing at all has a header, it may well be encrypted.
        headless = {segment for segment, why in refused.items() if why.reason == "format"}
        readable = {each.id.namespace for each in ours if each not in headless}
        damaged = [each for each in refused if each.id.namespace in readable]
        rows = [
            {**row, "reason": refused[each].reason, "problem": str(refused[each])}
            for each, row in zip(damaged, _described(store, damaged), strict=True)
        ]
        removed = store.remove(damaged) if args.remove_damaged else 0
    counts: dict[str, int] = {
        **{verdict: verdicts.count(verdict) for verdict in ("sound", "incomplete", "gone")},
        "unreadable": len(refused) - len(damaged),
        "other_version": len(found) - len(ours),
    }
    if args.json:
        print_json({**counts, "removed": removed, "damaged": rows})
        return 1 if damaged else 0
    if damaged:
        _print_segments("Damaged segments", rows)
    counts = {"sound": counts.pop("sound"), "damaged": len(damaged)} | {
        name: count for name, count in counts.items() if count
    }
    out().print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    if args.remove_damaged:
        out().print(f"Removed: {removed}")
    return 1 if damaged else 0


def run_rm(args: argparse.Namespace) -> int:
    """Remove segments."""
    filters = (args.deployment, args.model, args.kind, args.key, args.older_than)
    if any(value is not None for value in filters) == args.all:
        raise ConfigError(
            "either --all is needed, or some of --deployment, --model, --kind, --key, --older-than"
        )
    with _opened(args) as store:
        found = _selected(store, args)
        rows = _described(store, found) if args.json or args.dry_run else []
        removed = 0
        if found and not args.dry_run:
            if not args.yes and not confirm(f"Remove {_summary(found)}?"):
                raise CommandError("nothing was removed")
            removed = store.remove(found)
    if args.json:
        print_json({"dry_run": args.dry_run, "removed": removed, "segments": rows})
    elif args.dry_run:
        _print_segments(f"Would be removed: {_summary(found)}", rows)
    else:
        out().print(f"Removed: {removed}")
    return 0


# -- what the commands share --------------------------------------------------------------------


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator[Store]:
    """The place that the arguments name.

    Raises:
        ConfigError: a setting is malformed.
        CommandError: it can't be looked at, or fails at something. No secret is shown.
    """
    from redis import AuthenticationError, RedisError
    from redis.exceptions import NoPermissionError

    from ..storage.listing import Directory, KeySpace
    from ..storage.redis_url import LOGIN_HINT, Credentials, RedisAddress

    authorities = args.redis_tls_ca_file
    if authorities is not None and not (args.redis_url or "").startswith("rediss"):
        raise ConfigError("--redis-tls-ca-file: goes with a rediss:// URL")
    if authorities is not None and not Path(authorities).is_file():
        raise ConfigError(f"--redis-tls-ca-file={authorities}: no such file")
    if args.older_than is not None and args.disk_path is None:
        raise ConfigError("--older-than: goes with --disk-path; Redis does not say how old it is")
    try:
        if args.disk_path is not None:
            with Directory(args.disk_path) as store:
                yield store
            return
        address = RedisAddress.from_url(args.redis_url)
        credentials = Credentials.from_environment()
    except OSError as error:
        raise CommandError(f"--disk-path={args.disk_path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        with KeySpace(address, authorities) as store:
            yield store
    except (RedisError, OSError) as error:
        is_login = isinstance(error, AuthenticationError | NoPermissionError)
        hint = f"; {LOGIN_HINT}" if is_login else ""
        raise CommandError(f"{args.redis_url}: {credentials.redact(str(error))}{hint}") from None


def _selected(store: Store, args: argparse.Namespace) -> list[ListedSegment]:
    """The segments that all given filters fit, youngest first."""
    found = [
        each
        for each in store.segments()
        if args.deployment in (None, each.id.namespace.deployment)
        and each.id.namespace.fingerprint.startswith(args.model or "")
        and args.kind in (None, each.id.kind)
        and (args.older_than is None or (each.age_seconds or 0.0) > args.older_than)
    ]
    if args.key is not None:
        keys = _keys(store, found)
        found = [
            each
            for each, key in zip(found, keys, strict=True)
            if (key or "").startswith(tuple(args.key))
        ]
    return sorted(found, key=lambda each: (each.age_seconds or 0.0, -(each.ttl_seconds or 0.0)))


def _keys(store: Store, segments: Sequence[ListedSegment]) -> list[str | None]:
    """Content keys; None where a segment is gone, damaged or encrypted: only a header has it."""
    from ..storage.header import RefusedObject

    def read(segment: ListedSegment) -> str | None:
        try:
            header = store.header(segment)
        except RefusedObject:
            return None
        return None if header is None else header.key

    return in_parallel("reading", read, segments, _READERS)


def _described(store: Store, segments: Sequence[ListedSegment]) -> list[dict[str, Any]]:
    keys = _keys(store, segments)
    return [
        {
            "key": key,
            "kind": each.id.kind,
            "rank": each.id.rank,
            "num_ranks": each.id.num_ranks,
            **each.id.namespace._asdict(),
            "salt": each.id.salt,
            "num_objects": len(each.objects),
            "num_bytes": each.num_bytes,
            "age_seconds": each.age_seconds,
            "ttl_seconds": each.ttl_seconds,
        }
        for each, key in zip(segments, keys, strict=True)
    ]


def _print_segments(title: str, rows: Sequence[dict[str, Any]]) -> None:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "key": lambda row: _short(row["key"] or "(unreadable)"),
        "kind": itemgetter("kind"),
        "rank": lambda row: f"{row['rank']}/{row['num_ranks']}",
        "size": lambda row: size_text(row["num_bytes"]),
        "age": lambda row: duration_text(row["age_seconds"]),
        "ttl": lambda row: duration_text(row["ttl_seconds"]),
        "deployment": itemgetter("deployment"),
        "model": lambda row: _short(row["fingerprint"]),
    }
    if any("problem" in row for row in rows):
        columns["problem"] = itemgetter("problem")
    _print_table(title, columns, rows)


def _print_table(
    title: str,
    columns: Mapping[str, Callable[[dict[str, Any]], str]],
    rows: Sequence[dict[str, Any]],
) -> None:
    """A table whose cells are not read as markup; only problems are broken into lines."""
    table = Table(title=Text(title))
    for column in columns:
        justify: Literal["left", "right"] = "left" if column in _TEXT_COLUMNS else "right"
        table.add_column(column, justify=justify, no_wrap=column != "problem")
    for row in rows:
        table.add_row(*(Text(printable(cell(row))) for cell in columns.values()))
    out().print(table)


def _short(key: str) -> str:
    """The beginning of a key, which `--key` takes, and its variant; or of a fingerprint."""
    item, slash, variant = key.partition("/")
    return (item if len(item) <= _SHORT else f"{item[:_SHORT]}…") + slash + variant


def _sum(segments: Sequence[ListedSegment]) -> dict[str, Any]:
    ages = [each.age_seconds for each in segments if each.age_seconds is not None]
    return {
        "num_segments": len(segments),
        "num_bytes": sum(each.num_bytes for each in segments),
        "oldest_seconds": max(ages, default=None),
        "newest_seconds": min(ages, default=None),
    }


def _summary(segments: Sequence[ListedSegment]) -> str:
    return f"{len(segments)}, {size_text(sum(each.num_bytes for each in segments))}"

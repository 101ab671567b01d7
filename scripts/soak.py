#!/usr/bin/env python
"""Let a small vLLM with VLCache serve thousands of requests, and look for what is left behind.

The load: text, images that come back and images that never do, one to three of them, some clients
apart from the others, clients that go away, many recompute ratios; an operator who pauses the
engine, lets it sleep, and empties its caches. The KV cache is so small that vLLM preempts requests;
host memory, disk and Redis are so small that each evicts all the time.

After every 100 requests, when nothing runs: the accounts of the indices add up and so do those of
host memory, down to each byte; neither blocks of vLLM's KV cache nor anything else is still held.
At the end: memory does not grow more than that of plain vLLM, which is put to the same load (a line
through the RSS behind the first fifth of the requests, each time after malloc gave back what it
keeps of freed memory), and open files and threads stay as many. Every so often, a request's known
images have donors of their own; it answers as plain vLLM does, or as an engine that has ample
memory, no tiers and nothing else to do reuses the same images.

Results go to PREFIX.json, PREFIX.md and PREFIX.png; the exit code is 1 when something is wrong.

Usage::

    python scripts/soak.py --requests 10000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import stress
from local_redis import LocalRedis, RedisError, find_server
from make_tiny_model import make_tiny_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from stress import IMAGE, Ask, EngineCrashedError, EngineHungError, EngineProcess, Result

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
BATCH = 100
IN_FLIGHT = 16
WARM_UP = 0.2
LEAST_REQUESTS = 2000
"""With fewer, growth is not judged: what is made once takes its time."""
MORE_FILES = 4
POOL = 300
"""Images that come back."""
WITNESS_SHARE = 0.03
INTERRUPTED_SHARE = 0.02
CONNECTOR: Mapping[str, Any] = {
    "cpu_bytes": "4MiB",
    "encoder_cpu_bytes": "1MiB",
    "device_bytes": "1MiB",
    "disk_bytes": "8MiB",
    "write_queue_bytes": "2MiB",
    "fetch_deadline_seconds": 1.0,
    "break_even": False,
}
REDIS_BYTES = "16mb"
ENGINE: Mapping[str, Any] = {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 512}
OPTIONS: tuple[Mapping[str, Any], ...] = (
    *({} for _ in range(6)),
    {"recompute_ratio": 0.0},
    {"recompute_ratio": 1.0},
    {"selector": "cacheblend"},
    {"enabled": False},
)


def make_load(num_requests: int, seed: int = 0) -> Iterator[Ask]:
    """Requests in the order in which they are put; those with `donors` are the witnesses."""
    rng = np.random.default_rng(seed)
    new = iter(range(POOL, 10**9))
    due: dict[int, list[Ask]] = {}
    popularity = 1 / np.arange(1, POOL + 1)
    popularity /= popularity.sum()

    def image(is_new: bool) -> tuple[int, int]:
        number = next(new) if is_new else int(rng.choice(POOL, p=popularity))
        return number, stress.SIDES_PX[number % len(stress.SIDES_PX)]

    for number in range(num_requests):
        if waiting := due.pop(number, None):
            for later in waiting[1:]:
                due.setdefault(number + 1, []).append(later)
            yield waiting[0]
            continue
        if rng.random() < WITNESS_SHARE:
            salt = f"witness {number}"
            images = [image(True) for _ in range(rng.integers(1, 3))]
            donors = [
                Ask(f"{salt} {' shown ' * i} {IMAGE}", (one,), (), 1, salt, with_logprobs=False)
                for i, one in enumerate(images, 1)
            ]
            if rng.random() < 0.3:
                images.append(image(True))
            places = " and ".join([IMAGE] * len(images))
            target = Ask(f"later {salt} saw {places}", tuple(images), tuple(donors), 1, salt)
            for donor in donors[1:]:
                due.setdefault(number + int(rng.integers(1, 20)), []).append(donor)
            due.setdefault(number + int(rng.integers(40, 400)), []).append(target)
            yield donors[0]
            continue
        images = [image(rng.random() < 0.2) for _ in range(rng.choice(4, p=(0.2, 0.4, 0.3, 0.1)))]
        words = " ".join(["word"] * int(rng.integers(1, 40)))
        places = " then ".join([IMAGE] * len(images))
        yield Ask(
            f"request {number} {words} {places}",
            tuple(images),
            max_tokens=int(rng.integers(1, 32)),
            salt=(None, None, None, "ann", "bob")[rng.integers(5)],
            options=OPTIONS[rng.integers(len(OPTIONS))],
            abort_after=int(rng.integers(12)) if rng.random() < 0.15 else None,
            interruption=str(rng.choice(list(stress.INTERRUPTIONS)))
            if rng.random() < INTERRUPTED_SHARE
            else None,
            with_logprobs=False,
        )


def soak(
    args: argparse.Namespace, model: Path, connector: Mapping[str, Any], log: Path, show: Console
) -> dict[str, Any]:
    """Put the load to an engine, and compare what the witnesses answered."""
    asks = list(make_load(args.requests, args.seed))
    problems: list[str] = []
    checks: list[dict[str, Any]] = []
    witnesses: list[tuple[Ask, Result]] = []
    statuses: dict[str, int] = {"done": 0, "aborted": 0, "failed": 0, "hung": 0}
    document: dict[str, Any] = {
        "problems": problems,
        "checks": checks,
        "statuses": statuses,
        "interruptions": dict(Counter(ask.interruption for ask in asks if ask.interruption)),
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=show, transient=True) as progress:
        bar = progress.add_task("requests", total=len(asks))
        try:
            with EngineProcess(model, connector, log, **ENGINE) as engine:
                engine.call(stress.count_preemptions)
                for first in range(0, len(asks), BATCH):
                    batch = asks[first : first + BATCH]
                    results = engine.call(stress.serve, batch, IN_FLIGHT)
                    for result in results:
                        statuses[result.status] += 1
                    ended = zip(batch, results, strict=True)
                    witnesses += [
                        (ask, result)
                        for ask, result in ended
                        if ask.donors and result.status != "aborted"
                    ]
                    end = first + len(batch)
                    wrong = engine.call(stress.violations)
                    problems += [f"after {end} requests: {violation}" for violation in wrong]
                    checks.append({"requests": end, **engine.call(stress.usage)})
                    progress.update(bar, completed=end)
                document["preemptions"] = engine.call(stress.count_preemptions)
                document["counters"] = engine.call(stress.happened)
        except (EngineCrashedError, EngineHungError) as error:
            problems.append(f"after {progress.tasks[bar].completed:.0f} requests: {error}")
        for status in ("failed", "hung"):
            if statuses[status]:
                problems.append(f"{statuses[status]} requests {status}")
        if len(asks) >= LEAST_REQUESTS:
            progress.update(bar, description="plain vLLM", completed=0)
            document["plain_checks"] = plain = []
            with EngineProcess(model, None, log, **ENGINE) as engine:
                for first in range(0, len(asks), BATCH):
                    batch = asks[first : first + BATCH]
                    engine.call(stress.serve, batch, IN_FLIGHT)
                    end = first + len(batch)
                    plain.append({"requests": end, **engine.call(stress.usage)})
                    progress.update(bar, completed=end)
            document |= growth(checks, plain, args.max_slope, problems)
        progress.update(bar, description="witnesses", completed=0, total=len(witnesses))
        same = {"donor": args.donor}
        with EngineProcess(model, {**stress.AMPLE, **same}, log) as engine:
            allowed = engine.call(
                stress.references,
                [ask for ask, _ in witnesses],
                on_progress=lambda done: progress.update(bar, completed=done),
            )
    return document | {"witnesses": compare(witnesses, allowed, problems)}


def compare(
    witnesses: Sequence[tuple[Ask, Result]],
    allowed: Sequence[Sequence[Result]],
    problems: list[str],
) -> dict[str, int]:
    """How many witnesses reused something, and what is wrong with their answers."""
    different = []
    for (ask, result), answers in zip(witnesses, allowed, strict=True):
        wrong = stress.deviation(result, answers)
        if wrong is not None:
            different.append(f"{ask.text!r} answers otherwise: {wrong}")
    problems += different[:10]
    tiers = [result.tier for _, result in witnesses if result.reused]
    return {
        "asked": len(witnesses),
        **{f"from {tier}": tiers.count(tier) for tier in sorted(filter(None, set(tiers)))},
        "different": len(different),
    }


def growth(
    checks: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]],
    max_slope: float,
    problems: list[str],
) -> dict[str, tuple[float, float]]:
    """What grows behind the warm-up.

    Returns:
        Slopes of the RSS with and without VLCache, in MiB per 1,000 requests, each with its
        standard error.
    """
    total = plain[-1]["requests"]
    warm = [check for check in checks if check["requests"] > WARM_UP * total]
    if len(warm) < 4:
        return {}  # the engine died: that is a problem of its own
    slope, error = _slope(warm)
    without = _slope([check for check in plain if check["requests"] > WARM_UP * total])
    if slope - without[0] > max_slope:
        problems.append(
            f"memory grows by {slope - without[0]:.2f} MiB per 1,000 requests more than plain "
            "vLLM's"
        )
    for what in ("files", "threads"):
        more = warm[-1][what] - warm[0][what]
        if more > MORE_FILES:
            problems.append(f"{more} more {what} are open than after the warm-up")
    return {"slope": (slope, error), "plain_slope": without}


def _slope(checks: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    x = np.array([check["requests"] for check in checks]) / 1000
    (slope, _), covariance = np.polyfit(x, [check["rss_mib"] for check in checks], 1, cov=True)
    return float(slope), float(covariance[0, 0] ** 0.5)


# -- results ------------------------------------------------------------------------------------


def rows_of(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table."""
    checks, statuses = document["checks"], document["statuses"]
    counters, witnesses = document.get("counters", {}), document["witnesses"]
    last = checks[-1] if checks else {"rss_mib": 0.0, "files": 0, "threads": 0}
    tiers = [f"{name} {n}" for name, n in witnesses.items() if name.startswith("from")]
    interruptions = (f"{count} {name}" for name, count in document["interruptions"].items())
    rows = [
        ("requests", ", ".join(f"{count} {status}" for status, count in statuses.items())),
        ("interruptions", ", ".join(interruptions)),
        ("preemptions", str(document.get("preemptions", ""))),
        ("checks", f"{len(checks)}, {len(document['problems'])} problems"),
        ("RSS at the end", f"{last['rss_mib']:.0f} MiB in use"),
        *(
            (
                f"RSS behind the first {WARM_UP:.0%}, {of}",
                "{:+.2f} ± {:.2f} MiB per 1,000".format(*to),
            )
            for of, to in (
                ("VLCache", document.get("slope")),
                ("plain vLLM", document.get("plain_slope")),
            )
            if to is not None
        ),
        ("open files, threads", f"{last['files']}, {last['threads']}"),
        ("sampled answers", f"{witnesses['asked']}, reused {', '.join(tiers) or 'nothing'}"),
        ("that differ", str(witnesses["different"])),
    ]
    return rows + [(name, str(count)) for name, count in sorted(counters.items())]


def make_markdown(document: Mapping[str, Any]) -> str:
    """The document as text."""
    problems = document["problems"]
    verdict = f"Problems: {len(problems)}" if problems else "Nothing is left behind"
    lines = [
        f"# {document['requests']:,} requests to a small engine",
        "",
        f"**{verdict}.** {document['seconds'] / 60:.0f} minutes; tiers: {document['tiers']}.",
        "",
        f"- Command: `{document['command']}`",
        f"- After every {BATCH} requests, the accounts of indices and host memory are checked, and "
        "that nothing is held.",
        "- Sampled answers are compared with those of plain vLLM, or of the same reuse by an "
        f"engine without tiers, within {stress.TOLERANCE:g}.",
        "",
        "| What | Count |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in rows_of(document)),
        *(["", *(f"- {problem}" for problem in problems)] if problems else []),
        "",
    ]
    return "\n".join(lines)


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Plot RSS over requests."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    checks, plain = document["checks"], document.get("plain_checks", ())
    x, y = ([check[what] for check in checks] for what in ("requests", "rss_kept_mib"))
    figure, axes = plt.subplots(figsize=(7, 3.5))
    axes.plot(x, y, lw=1, color="lightgrey", label="VLCache, with what malloc keeps when freed")
    axes.plot(x, [check["rss_mib"] for check in checks], lw=1, label="VLCache, in use")
    if plain:
        at, used = ([check[what] for check in plain] for what in ("requests", "rss_mib"))
        axes.plot(at, used, lw=1, label="plain vLLM, in use")
    axes.axvline(WARM_UP * x[-1], color="grey", ls="--", lw=1, label="warm-up")
    axes.set(xlabel="requests", ylabel="RSS, MiB", ylim=(0, 1.1 * max(y)))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parse(argv)
    show, started = Console(stderr=True), time.monotonic()
    try:
        model = make_tiny_model(args.cache_dir / "models" / "qwen2_5_vl-tiny")
        with contextlib.ExitStack() as stack:
            disk = stack.enter_context(tempfile.TemporaryDirectory())
            connector = {**CONNECTOR, "donor": args.donor, "disk_path": disk}
            if find_server() is None:
                show.print("there is no redis-server: host memory and disk only")
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                options: dict[str, Any] = {
                    "maxmemory": REDIS_BYTES,
                    "maxmemory_policy": "allkeys-lru",
                }
                redis = stack.enter_context(LocalRedis(folder, **options))
                connector["redis_url"] = redis.url
            log = args.cache_dir / "logs" / f"{args.output.name}.log"
            document = soak(args, model, connector, log, show)
    except KeyboardInterrupt:
        return 130
    except (EngineCrashedError, EngineHungError, RedisError, stress.StressError, OSError) as error:
        show.print(f"error: {error}", style="red", markup=False)
        return 1
    document |= {
        "schema": SCHEMA,
        "command": shlex.join(["python", *sys.argv]).replace(f"{ROOT}/", ""),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in stress.PACKAGES},
        "requests": args.requests,
        "tiers": ", ".join(
            ["device", "cpu", "fs", *(["valkey"] if "redis_url" in connector else [])]
        ),
        "seconds": time.monotonic() - started,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    path = args.output.with_name(args.output.name + ".json")
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(make_markdown(document), encoding="utf-8")
    if document["checks"]:
        draw(document, path.with_suffix(".png"))
    table = Table("What", "Count", box=None)
    for row in rows_of(document):
        table.add_row(*row)
    Console().print(table)
    for problem in document["problems"]:
        show.print(problem, style="red", markup=False)
    return 1 if document["problems"] else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--requests", type=int, default=10_000, metavar="N", help="(%(default)s)")
    add("--donor", choices=("first_seen", "canonical"), default="first_seen")
    add("--seed", type=int, default=0, help="of the load (%(default)s)")
    help_ = "MiB per 1,000 requests that memory may grow more than plain vLLM's (%(default)s)"
    add("--max-slope", type=float, default=1.0, metavar="MIB", help=help_)
    default = ROOT / "configs" / "results" / "soak"
    add("--output", type=Path, default=default, metavar="PREFIX", help="(%(default)s)")
    add("--cache-dir", type=Path, default=ROOT / ".cache", metavar="DIR", help="models and logs")
    args = parser.parse_args(argv)
    if args.requests < 1:
        parser.error("--requests: at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())

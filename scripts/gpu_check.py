#!/usr/bin/env python
"""Check VLCache on a machine with an NVIDIA GPU and vLLM: is it right, and how fast is it?

    scripts/gpu_check.py exact      # what has to be equal, over runners, CUDA graphs, backends
    scripts/gpu_check.py speed      # time to the first token against what the project asks for

Weights are random or dummies; nothing is downloaded. Each mode ends within its time (`--seconds`);
what there was no time for is named. Every cell runs in processes of its own, so that one that
crashes or hangs is a line of the table. `--device cpu` runs the same code on what vLLM's CPU
platform has, on a small model.

The exit status is 0 if nothing failed, 1 if something did, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gpu_exact  # noqa: E402
import gpu_speed  # noqa: E402
from results import about_run, end_by_signal, timestamp, with_suffix, write_text  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402

SCHEMA = 1
MODELS = ROOT / ".cache" / "models"
SECONDS = 450.0
"""Of a mode, by default."""
LEAST_SECONDS = {"exact": 25.0, "speed": 60.0}
"""A cell for which there is less time left is not begun."""
CELL_SECONDS = 180.0
"""Longest that a cell of the exact mode may take."""
JOBS = 3
"""Cells of the exact mode that share a GPU; their models are tiny."""
GRACE_SECONDS = 10.0
COLOURS = {"pass": "green", "met": "green", "FAIL": "bold red", "missed": "bold red"}


@dataclass
class Outcome:
    """What became of a cell.

    Attributes:
        results: what its process reported, in order.
        error: why it did not come to its end; None if it did.
        started: False if there was no time for it.
    """

    name: str
    results: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    started: bool = True


_running: set[subprocess.Popen[bytes]] = set()
"""Cells that have to be ended with this process."""


def gpu_name() -> str | None:
    """The first NVIDIA GPU that torch can use.

    Asked for in another process: children that fork from this one must find CUDA untouched.
    """
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.split("\n")
    return lines[0] or None


def run_child(mode: str, cell: dict[str, Any], seconds: float, work: Path) -> Outcome:
    """Run one cell in a process group of its own, which has ended when this returns.

    Args:
        cell: what `main` of the child takes; `name` is for people.
        work: directory for its report and its output.
    """
    outcome = Outcome(cell["name"])
    slug = re.sub(r"\W+", "-", f"{mode}-{cell['name']}")
    report, log = work / f"{slug}.jsonl", work / f"{slug}.log"
    command = [sys.executable, __file__, "child", mode, json.dumps(cell), str(report)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        _running.add(process)
        try:
            status = process.wait(seconds)
            if status:
                outcome.error = _last_line(log) or f"exit status {status}"
        except subprocess.TimeoutExpired:
            outcome.error = f"not done after {seconds:.0f} s"
        finally:
            _end_group(process)
            _running.discard(process)
    if report.exists():
        # A process that was ended may have left half a line.
        for line in report.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                outcome.results.append(json.loads(line))
    return outcome


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a child and of its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    """The line that says what went wrong, as far as can be told."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (errors or lines or [""])[-1][:300]


def run_cells(
    mode: str,
    cells: Sequence[dict[str, Any]],
    *,
    seconds: float,
    cell_seconds: float,
    jobs: int,
    show: Callable[[Outcome], None],
) -> list[Outcome]:
    """Run cells in order, `jobs` at a time, as long as there is time."""
    ends = time.monotonic() + seconds
    shown = threading.Lock()

    def run(cell: dict[str, Any], work: Path) -> Outcome:
        left = ends - time.monotonic() - GRACE_SECONDS
        if left < LEAST_SECONDS[mode]:
            return Outcome(cell["name"], started=False)
        limit = min(left, cell_seconds)
        outcome = run_child(mode, cell | {"ends": time.monotonic() + limit}, limit, work)
        with shown:
            show(outcome)
        return outcome

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work, ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(lambda cell: run(cell, Path(work)), cells))
        except BaseException:
            ends = time.monotonic()
            for process in list(_running):
                process.kill()  # its thread ends the others of its group
            raise


def child(mode: str, cell: dict[str, Any], report: Path) -> None:
    """What runs in a cell's own process: results go to `report`, a line of JSON each."""
    with report.open("a", encoding="utf-8") as lines:

        def emit(result: dict[str, Any]) -> None:
            lines.write(json.dumps(result) + "\n")
            lines.flush()

        if mode == "exact":
            gpu_exact.run_cell(gpu_exact.Cell(**cell["cell"]), MODELS, emit)
        else:
            gpu_speed.run_model(
                cell["model"], cell["device"], cell["backend"], MODELS, emit, cell["ends"]
            )


# -- what is shown ------------------------------------------------------------------------------


def rows_of(outcome: Outcome) -> list[tuple[str, str, str, str]]:
    """Cell, what was checked, status, and figures, for a table."""
    rows = [
        (
            outcome.name,
            result["invariant"],
            result["status"],
            f"{result['distance']:.1e} of {result['allowed']:.1e} {result['note']}".strip(),
        )
        for result in outcome.results
    ]
    if not outcome.started:
        rows.append((outcome.name, "", "no time", ""))
    elif outcome.error is not None:
        rows.append((outcome.name, "ran to its end", "FAIL", outcome.error))
    return rows


def make_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose words are coloured by what they say."""
    table = Table(*head, title=title)
    for row in rows:
        cells = [escape(cell) for cell in row]
        table.add_row(
            *(f"[{COLOURS[cell]}]{cell}[/]" if cell in COLOURS else cell for cell in cells)
        )
    return table


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The same for a file."""
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


# -- the command --------------------------------------------------------------------------------


def run_exact(args: argparse.Namespace, console: Console) -> tuple[list[Outcome], list[str]]:
    """The exactness mode: outcomes, and lines of Markdown."""
    on_cpu = args.device == "cpu"
    cells = (
        [gpu_exact.CPU_CELL]
        if on_cpu
        else gpu_exact.make_cells(args.backends or gpu_exact.BACKENDS)
    )
    head = ("cell", "check", "result", "largest difference of log-probs, and what is allowed")
    outcomes = run_cells(
        "exact",
        [{"name": cell.name, "cell": asdict(cell)} for cell in cells],
        seconds=args.seconds,
        cell_seconds=args.seconds if on_cpu else CELL_SECONDS,
        jobs=1 if on_cpu else args.jobs,
        show=lambda outcome: console.print(make_table("", head, rows_of(outcome))),
    )
    rows = [row for outcome in outcomes for row in rows_of(outcome)]
    console.print(make_table("Exactness", head, rows))
    return outcomes, markdown_table(head, rows)


def run_speed(args: argparse.Namespace, console: Console) -> tuple[list[Outcome], list[str]]:
    """The speed mode: outcomes, and lines of Markdown."""
    on_cpu = args.device == "cpu"
    models = args.model or (
        ["tiny"] if on_cpu else ["qwen2_5_vl_7b", "qwen2_5_vl_3b", "qwen3_vl_8b"]
    )
    backend = args.backends[0] if args.backends else None
    outcomes = run_cells(
        "speed",
        [
            {"name": model, "model": model, "device": args.device, "backend": backend}
            for model in models
        ],
        seconds=args.seconds,
        cell_seconds=args.seconds,
        jobs=1,
        show=lambda _: None,
    )
    lines = []
    for outcome in outcomes:
        rows = gpu_speed.rows_of(outcome.results)
        if outcome.error is not None or not outcome.started:
            rows.append(("the rest", "", outcome.error or "no time", ""))
        head = ("what", "aim", "measured", "")
        console.print(make_table(outcome.name, head, rows))
        lines += [f"## {outcome.name}", "", *markdown_table(head, rows), ""]
        stages = gpu_speed.stage_rows(outcome.results)
        if stages:
            head = ("request", *gpu_speed.STAGES)
            console.print(make_table("Where the time goes, ms", head, stages))
            lines += [*markdown_table(head, stages), ""]
    return outcomes, lines


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether anything is wrong; an aim that is missed is not."""
    return any(
        outcome.error is not None or any(r.get("status") == "FAIL" for r in outcome.results)
        for outcome in outcomes
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["child"]:
        child(argv[1], json.loads(argv[2]), Path(argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mode", choices=("exact", "speed"))
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for everything (%(default)g)"
    )
    parser.add_argument(
        "--jobs", type=int, default=JOBS, help="exact: cells at the same time (%(default)d)"
    )
    parser.add_argument(
        "--model", nargs="+", choices=gpu_speed.SHAPES, help="speed: what is measured, in order"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=gpu_exact.BACKENDS,
        help="attention backends that are there; speed takes the first (default: all, vLLM's own)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PREFIX",
        help="results go to PREFIX.json and PREFIX.md; for a GPU by default to configs/results",
    )
    args = parser.parse_args(argv)
    device = "cpu" if args.device == "cpu" else gpu_name()
    if device is None:
        print(
            "gpu_check: no NVIDIA GPU that torch can use; --device cpu runs what can be run "
            "without one",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, end_by_signal)
    console = Console()
    record = {"schema": SCHEMA, "device": device, **about_run(__file__, argv)}
    outcomes, lines = (run_exact if args.mode == "exact" else run_speed)(args, console)
    record |= {"finished": timestamp(), "cells": [asdict(outcome) for outcome in outcomes]}
    output = args.output
    if output is None and args.device == "gpu":
        slug = re.sub(r"\W+", "_", device).strip("_").lower()
        output = ROOT / "configs" / "results" / f"gpu_{slug}_{args.mode}"
    if output is not None:
        about_it = f"{device}; " + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        title = f"# gpu_check {args.mode}"
        text = "\n".join([title, "", about_it, "", f"`{record['command']}`", "", *lines, ""])
        write_text(with_suffix(output, ".json"), json.dumps(record, indent=1) + "\n")
        write_text(with_suffix(output, ".md"), text)
    if not any(outcome.results for outcome in outcomes):
        return 2
    return int(failed(outcomes))


if __name__ == "__main__":
    sys.exit(main())

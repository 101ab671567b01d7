"""`vlcache doctor`: whether VLCache can run here, and what to do where it can't.

What imports vLLM is imported when the command runs: it takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from .console import err, out, print_json, printable

if TYPE_CHECKING:
    from .checks import Finding

_STYLES = {"ok": "green", "warning": "yellow", "failure": "red"}


def add_command(commands: Any) -> None:
    """Add `doctor` to the commands."""
    command = commands.add_parser(
        "doctor",
        help="check versions, vLLM's seams, the platform and the tiers",
        description="Check whether VLCache can run here, with the options of a server if they are "
        "given. A probe of 16 MiB is written to each of its tiers, and removed. Exit with status 1 "
        "if anything failed.",
    )
    given = command.add_mutually_exclusive_group()
    given.add_argument(
        "--config", type=Path, metavar="FILE", help="options as in vllm serve --config FILE"
    )
    given.add_argument(
        "--kv-transfer-config", type=_json_object, metavar="JSON", help="as for vllm serve"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Check everything."""
    from .checks import Options

    if args.config is not None:
        options = Options.read(args.config)
    else:
        options = Options(args.kv_transfer_config or {})
    logging.disable(logging.ERROR)  # the table says it better
    try:
        findings = _run(options)
    finally:
        logging.disable(logging.NOTSET)
    failures = [finding for finding in findings if finding.result == "failure"]
    if args.json:
        rows = [vars(finding) for finding in findings]
        print_json({"ok": not failures, "checks": rows})
    else:
        out().print(_table(findings))
    for failure in failures:
        line = f"{failure.check}: {failure.found}; {failure.remedy}"
        print(f"vlcache doctor: {printable(' '.join(line.split()))}", file=sys.stderr)
    return 1 if failures else 0


def _run(options: Any) -> list[Finding]:
    from .checks import Finding, checks

    findings: list[Finding] = []
    # Whatever is printed meanwhile is no result.
    with contextlib.redirect_stdout(sys.stderr), err().status("") as status:
        for name, check in checks(options):
            status.update(f"checking {name}")
            try:
                for finding in check():
                    findings.append(finding)
            except Exception as error:  # one check shall not keep the others from being made
                problem = f"{type(error).__name__}: {error}"
                findings.append(
                    Finding(name, problem, "see to this package, then run doctor again", "failure")
                )
    return findings


def _table(findings: list[Finding]) -> Table:
    table = Table()
    for column in ("check", "result", "found", "what to do"):
        table.add_column(column, overflow="fold", no_wrap=column in ("check", "result"))
    for finding in findings:
        table.add_row(
            finding.check,
            Text(finding.result, style=_STYLES[finding.result]),
            *(Text(printable(" ".join(text.split()))) for text in (finding.found, finding.remedy)),
        )
    return table


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is needed")
    return value

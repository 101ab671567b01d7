"""The `vlcache` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..config import ConfigError
from ..measure.cases import MeasurementError
from . import calibration, doctor, segments, warm
from .console import CommandError, printable

_BAD_INPUT = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except ConfigError as error:
        _complain(args.command, str(error))
        return _BAD_INPUT
    except (MeasurementError, CommandError) as error:
        _complain(args.command, str(error))
        return 1
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _complain(args.command, f"interrupted{args.after_interrupt}")
        return _INTERRUPTED


def _complain(command: str, problem: str) -> None:
    print(f"vlcache {command}: {printable(' '.join(problem.split()))}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlcache",
        description="Measure the reuse of images' KV on a model, look after stored segments, and "
        "check the installation.",
    )
    parser.add_argument("--version", action="version", version=f"vlcache {__version__}")
    parser.set_defaults(after_interrupt="")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    calibration.add_commands(commands)
    segments.add_commands(commands)
    warm.add_command(commands)
    doctor.add_command(commands)
    return parser

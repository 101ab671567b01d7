"""The `vlcache` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

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
    calibration.add_calibrate(commands)
    _add_verify(commands)
    segments.add_commands(commands)
    warm.add_command(commands)
    doctor.add_command(commands)
    return parser


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify",
        help="find out how good a model's answers are with reused KV, or whether stored segments "
        "are sound",
        description="With --model: compare answers with reused KV to those of a full recompute, "
        "for each donor relation, and write the verdict that the connector's gate follows. With "
        "--redis-url or --disk-path: read all segments there and check every byte; exit with "
        "status 1 if any is damaged.",
    )
    subject = command.add_mutually_exclusive_group(required=True)
    calibration.add_model(subject)
    segments.add_places(subject)
    calibration.add_verify_options(command.add_argument_group("with --model"))
    segments.add_verify_options(command.add_argument_group("with --redis-url or --disk-path"))
    command.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    given, missing = "--model", "--redis-url or --disk-path"
    foreign = segments.add_verify_options
    if args.model is None:
        given, missing = missing, given
        foreign = calibration.add_verify_options
    for option, default in _defaults(foreign).items():
        if getattr(args, option) != default:
            raise ConfigError(
                f"--{option.replace('_', '-')}: goes with {missing}, not with {given}"
            )
    if args.model is None:
        return segments.run_verify(args)
    args.after_interrupt = calibration.AFTER_INTERRUPT
    return calibration.run_verify(args)


def _defaults(add_options: Callable[[Any], None]) -> dict[str, Any]:
    """The options that a function adds, and their defaults."""
    alone = argparse.ArgumentParser()
    add_options(alone)
    return vars(alone.parse_args([]))

"""Command-line options that benchmarks share: where results go, and which model is served."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from make_tiny_model import DTYPES, SIZES, make_tiny_model
from serving import ROOT


def add_output_options(parser: argparse.ArgumentParser, default: Path) -> None:
    """Add `--plot-only` and `--output`."""
    parser.add_argument(
        "--plot-only",
        action="store_true",
        help="measure nothing, draw table and plot from the JSON file",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=default,
        metavar="PREFIX",
        help="results go to PREFIX.json, PREFIX.md and PREFIX.png (%(default)s)",
    )


def add_model_options(group: Any) -> None:
    """Add `--size`, `--model`, `--dtype` and `--cache-dir`, for `model_of`."""
    group.add_argument(
        "--size",
        choices=SIZES,
        default="bench",
        help="size of the model that is made (%(default)s)",
    )
    group.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint to serve instead")
    group.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="precision of the model (%(default)s)"
    )
    group.add_argument(
        "--cache-dir",
        type=Path,
        default=ROOT / ".cache",
        metavar="DIR",
        help="where models and logs are kept (%(default)s)",
    )


def model_problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with `--model`."""
    if args.model is not None and not (args.model / "config.json").is_file():
        yield f"--model {args.model}: there is no config.json in it"


def model_of(args: argparse.Namespace, arch: str = "qwen2_5_vl") -> tuple[Path, str]:
    """The checkpoint that is served, made if none is given, and what to call it."""
    if args.model is not None:
        return args.model, str(args.model)
    folder = args.cache_dir / "models" / f"{arch}-{args.size}-{args.dtype}"
    model = make_tiny_model(folder, arch=arch, size=args.size, dtype=args.dtype)
    return model, f"{arch}, {args.size} size of make_tiny_model.py"

#!/usr/bin/env python
"""Calibrate and verify the grid model (`train_grid_vlm.py`) on questions of its own task.

`vlcache calibrate` and `vlcache verify` ask a model general questions, which this one has no words
for. Measured and written is the same here: schedules of the `layer_aware` selector, checked on
further questions, and the verdict on each donor relation. A plot shows up to which layer an image
has to be recomputed.

Usage::

    python scripts/calibrate_grid_vlm.py --model tests/models/grid-vlm
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import eval_accuracy as accuracy
import grid_vqa as task
import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import Progress

from vlcache_connector.calibration import (
    RELATIONS,
    Calibration,
    ModelIdentity,
    Relation,
    Sample,
)
from vlcache_connector.measure import calibrate, verify
from vlcache_connector.measure.cases import Case, compare
from vlcache_connector.measure.runner import Runner

ROOT = Path(__file__).resolve().parent.parent
SEED = 1
"""Of the questions; `eval_accuracy.py` has other ones by default."""
CHECKED_FROM, VERIFIED_FROM = 10**5, 2 * 10**5
"""Numbers of the first questions that schedules are checked on, and that the verdict rests on."""
RATIO = 0.05
SELECTOR = "first_k"


def make_cases(
    families: Sequence[str], relations: Sequence[Relation], first: int, count: int
) -> Iterator[Case]:
    """`count` questions, families and relations in turn."""
    for number in range(first, first + count):
        family = families[number % len(families)]
        fitting = accuracy.relations_of(family, relations)
        relation = fitting[number // len(families) % len(fitting)]
        made = accuracy.Case.make(SEED, family, number, relation)
        yield Case(relation, made.request(accuracy.NONE), made.donors)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "tests" / "models" / "grid-vlm", metavar="DIR")
    add("--families", nargs="+", choices=task.FAMILIES, default=list(task.FAMILIES))
    add("--requests", type=int, default=120, metavar="N", help="for each purpose (%(default)s)")
    add("--output", type=Path, default=ROOT / "configs" / "schedules" / "grid-vlm.yaml")
    default = ROOT / "configs" / "results" / "accuracy_layers.png"
    add("--plot", type=Path, default=default, metavar="PNG")
    args = parser.parse_args(argv)
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: there is no checkpoint")
    if args.requests < 1:
        parser.error("--requests must be at least 1")
    os.environ.update(accuracy.ENVIRONMENT)
    connector = {**accuracy.CONNECTOR, "selector": SELECTOR, "recompute_ratio": RATIO}
    arguments = {**accuracy.ENGINE, "limit_mm_per_prompt": accuracy.IMAGE_LIMIT, "seed": 0}
    runner = Runner(str(args.model), connector, **arguments)
    try:
        calibration, surface = measure(runner, args)
    finally:
        runner.close()
    calibration.save(args.output)
    draw(surface, args.plot)
    console = Console()
    for schedule in calibration.schedules:
        shares = " ".join(f"{share:g}" for share in schedule.layers)
        console.print(
            f"ratio {schedule.ratio}: KL {schedule.kl:g} (first_k "
            f"{schedule.first_k_kl:g}), shares {shares}"
        )
    assert calibration.verification is not None
    for relation, result in calibration.verification.relations.items():
        console.print(
            f"{relation}: KL {result.kl:g}, flips {result.flip_rate:.1%} of "
            f"{result.requests}, {'passed' if result.passed else 'failed'}"
        )
    console.print(f"verdict: {calibration.verification.verdict}")
    return 0


def measure(runner: Runner, args: argparse.Namespace) -> tuple[Calibration, calibrate.Surface]:
    """What goes into the file, and what the schedules were made from."""
    from vlcache_connector.identity import weights_fingerprint
    from vlcache_connector.support import kv_shape

    num_layers = kv_shape(runner.vllm_config).num_layers
    identity = ModelIdentity(
        name=args.model.name,
        fingerprint=weights_fingerprint(runner.vllm_config),
        num_layers=num_layers,
    )
    n, mixed = args.requests, calibrate.RELATIONS_MEASURED
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("surface", total=n * calibrate.num_grid_points(num_layers))
        surface = calibrate.measure_surface(
            runner,
            make_cases(args.families, mixed, 0, n),
            num_layers,
            lambda: progress.advance(bar),
        )
        check = progress.add_task("check", total=2 * n * len(calibrate.BUDGETS))
        validated = calibrate.validate(
            runner,
            make_cases(args.families, mixed, CHECKED_FROM, n),
            [calibrate.allocate(surface, budget) for budget in calibrate.BUDGETS],
            lambda: progress.advance(check),
        )
        verdict = progress.add_task("verdict", total=n * len(RELATIONS))
        measured = {
            relation: [
                comparison
                for case in make_cases(_able(args.families, relation), [relation], VERIFIED_FROM, n)
                for comparison in compare(runner, case, [{}], lambda: progress.advance(verdict))
            ]
            for relation in RELATIONS
        }
    sample = Sample(images="grid_vqa", requests=n, seed=SEED)
    verification = verify.verification_of(
        measured,
        verify.DEFAULT_THRESHOLDS,
        selector=SELECTOR,
        recompute_ratio=RATIO,
        sample=sample,
    )
    schedules = [entry.schedule for entry in validated]
    return Calibration(
        model=identity, sample=sample, schedules=schedules, verification=verification
    ), surface


def _able(families: Sequence[str], relation: Relation) -> list[str]:
    return [family for family in families if accuracy.relations_of(family, [relation])]


def draw(surface: calibrate.Surface, path: Path) -> None:
    """Plot the divergence against the depth down to which tokens are recomputed."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for share, kl in zip(surface.ranks, surface.kl.T, strict=True):
        axes.plot(surface.depths, np.maximum(kl, 1e-6), "o-", ms=4, label=f"{share:.0%}")
    axes.set_yscale("log")
    axes.set_xlabel("layers, from the first, in which tokens are recomputed")
    axes.set_ylabel("KL(full || reuse) of the answer, nats")
    axes.legend(title="tokens, from the first", fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

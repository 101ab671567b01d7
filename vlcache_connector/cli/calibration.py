"""Commands that run a model: `vlcache calibrate` and `vlcache verify`."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from ..calibration import (
    RELATIONS,
    Calibration,
    ModelIdentity,
    Sample,
    Thresholds,
    default_path,
)
from ..config import ConfigError, SelectorName
from ..measure import calibrate, verify
from ..measure.cases import (
    MAX_IMAGES_PER_PROMPT,
    MIN_IMAGE_PX,
    FolderImages,
    ImageSource,
    Render,
    SyntheticImages,
    make_cases,
    make_render,
)
from ..measure.runner import Runner
from .console import checked, err, not_negative, out, positive, progress

_AFTER_INTERRUPT = "; nothing was written"

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Of the engine, where the caller has set nothing: one process, 2 GiB of KV on CPU, errors only."""

_CONNECTOR: Mapping[str, Any] = {
    "min_recompute_tokens": 0,
    "min_segment_tokens": 1,
    "cpu_bytes": "1GiB",
    "encoder_cpu_bytes": "256MiB",
}
"""Budgets mean what they say, images of any size are reused, and memory is for one case."""

_ENGINE: Mapping[str, Any] = {
    "enforce_eager": True,
    "max_model_len": -1,
    "limit_mm_per_prompt": {"image": MAX_IMAGES_PER_PROMPT, "video": 0},
}
"""Arguments of `vllm.LLM` that --engine-args may change; as long as fits the memory."""

_OWN_ENGINE_ARGUMENTS = frozenset(
    {"model", "kv_transfer_config", "max_logprobs", "enable_prefix_caching"}
)


# -- arguments ----------------------------------------------------------------------------------


def add_commands(commands: Any) -> None:
    """Add `calibrate` and `verify` to the commands."""
    command = commands.add_parser(
        "calibrate",
        help="find out in which layers a model needs recomputation",
        description="Find out in which layers a model needs recomputation, and write schedules "
        "for the layer_aware selector.",
    )
    _add_common(command, requests=24, what="requests to measure on, and as many to check on")
    command.add_argument(
        "--relations",
        nargs="+",
        choices=RELATIONS,
        default=list(calibrate.RELATIONS_MEASURED),
        metavar="RELATION",
        help="donor relations to measure under, in turn: %(choices)s (default: all but the first)",
    )
    command.set_defaults(run=run_calibrate, after_interrupt=_AFTER_INTERRUPT)

    command = commands.add_parser(
        "verify",
        help="find out how good a model's answers are with reused KV",
        description="Compare a model's answers with reused KV to those of a full recompute, for "
        "each donor relation, and write the verdict that the connector's gate follows.",
    )
    default = verify.DEFAULT_THRESHOLDS
    _add_common(command, requests=64, what="requests per donor relation")
    command.add_argument(
        "--selector", choices=get_args(SelectorName), default="first_k", help="default: first_k"
    )
    command.add_argument(
        "--recompute-ratio", type=_share, default=0.05, metavar="SHARE", help="default: 0.05"
    )
    command.add_argument(
        "--max-kl",
        type=_distance,
        default=default.kl,
        metavar="NATS",
        help=f"largest mean KL divergence of the first answer token that passes "
        f"(default: {default.kl})",
    )
    command.add_argument(
        "--max-flip-rate",
        type=_share,
        default=default.flip_rate,
        metavar="SHARE",
        help="largest share of requests whose greedy first token differs that passes "
        f"(default: {default.flip_rate}; to be 95 %% sure of that, no flip in 133 requests)",
    )
    command.add_argument(
        "--at-least",
        choices=[verdict for verdict in reversed(verify.VERDICTS) if verdict != "none"],
        help="exit with status 1 unless the verdict is at least this one",
    )
    command.set_defaults(run=run_verify, after_interrupt=_AFTER_INTERRUPT)


def _add_common(command: Any, requests: int, what: str) -> None:
    command.add_argument("--model", required=True, help="folder of the model, or its hub id")
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="calibration file; by default the one that the connector finds by the model's name",
    )
    command.add_argument(
        "--requests", type=positive, default=requests, metavar="N", help=f"{what} ({requests})"
    )
    command.add_argument("--seed", type=not_negative, default=0, help="default: 0")
    command.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="folder of images to measure with, best those you will serve (default: synthetic)",
    )
    command.add_argument(
        "--image-size",
        type=_image_size,
        default=448,
        metavar="PX",
        help="longest side of an image; larger ones are scaled down (default: 448)",
    )
    command.add_argument(
        "--engine-args",
        type=_engine_arguments,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM, such as '{\"tensor_parallel_size\": 2}'",
    )


def _image_size(text: str) -> int:
    allowed = f"from {MIN_IMAGE_PX} to 4096"
    return checked(int(text), text, lambda value: MIN_IMAGE_PX <= value <= 4096, allowed)


def _share(text: str) -> float:
    return checked(float(text), text, lambda value: 0 <= value <= 1, "from 0 to 1")


def _distance(text: str) -> float:
    return checked(float(text), text, lambda value: 0 <= value < float("inf"), "a number from 0 on")


def _engine_arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: a JSON object is needed")
    own = sorted(_OWN_ENGINE_ARGUMENTS & set(arguments))
    if own:
        raise argparse.ArgumentTypeError(f"{', '.join(own)}: set by the measurement itself")
    return arguments


# -- what both commands do ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Checked arguments.

    Attributes:
        name: of the model, for the file.
        existing: the calibration that is at `output`.
    """

    model: str
    name: str
    output: Path
    existing: Calibration | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Job:
        """Check all that can be checked before the engine starts.

        Raises:
            ConfigError: names the argument.
        """
        folder = Path(args.model)
        is_folder = folder.is_dir()
        model = os.path.abspath(folder) if is_folder else args.model
        config_file = _config_file(model, is_folder)
        output = args.output or default_path(model)
        _check_writable(output)
        existing = Calibration.load(output) if output.exists() else None
        _check_architecture(model, config_file)
        return cls(model, Path(model).name if is_folder else model, output, existing)

    def identify(self, runner: Runner) -> tuple[ModelIdentity, Calibration | None]:
        """The model as it runs, and the existing calibration if it is this model's.

        Raises:
            ConfigError: the existing one is of a model with another name.
        """
        from ..identity import weights_fingerprint
        from ..support import kv_shape

        fingerprint = weights_fingerprint(runner.vllm_config)
        if fingerprint is None:
            raise ConfigError(
                f"--model={self.model}: its weights are in no local file, so that a calibration "
                "could not be told from one of others; use a local folder"
            )
        identity = ModelIdentity(
            name=self.name,
            fingerprint=fingerprint,
            num_layers=kv_shape(runner.vllm_config).num_layers,
        )
        kept = self.existing
        if kept is not None and kept.model.fingerprint != identity.fingerprint:
            if kept.model.name != self.name:
                raise ConfigError(
                    f"--output={self.output}: this is the calibration of another model, "
                    f"{kept.model.name}; name another file, or remove it"
                )
            err().print(f"{self.output} was made for other weights of {self.name}: starting anew")
            kept = None
        return identity, kept


def _config_file(model: str, is_folder: bool) -> Path:
    if is_folder:
        path = Path(model) / "config.json"
        if not path.is_file():
            raise ConfigError(f"--model={model}: there is no config.json in this folder")
        return path
    if model.startswith((".", "/", "~")):
        raise ConfigError(f"--model={model}: no such folder")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (OSError, ValueError) as error:
        # What follows the first line is advice on the hub.
        [reason, *_] = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(
            f"--model={model}: neither a folder nor a model that the hub gives: {reason}"
        ) from None


def _check_architecture(model: str, config_file: Path) -> None:
    try:
        architectures = json.loads(config_file.read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--model={model}: its config.json names no architectures, so it can't be served"
        ) from None
    from ..support import SUPPORTED_ARCHITECTURES

    if not SUPPORTED_ARCHITECTURES & set(architectures):
        raise ConfigError(
            f"--model={model}: its architecture {', '.join(architectures)} is not supported; "
            f"allowed are {', '.join(sorted(SUPPORTED_ARCHITECTURES))}"
        )


def _check_writable(output: Path) -> None:
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        if output.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"--output={output}: can't be written: {error.strerror or error}"
        ) from None


def _images(args: argparse.Namespace, part: tuple[int, int] = (0, 1)) -> ImageSource:
    if args.images is None:
        return SyntheticImages(args.image_size)
    return FolderImages(args.images, args.image_size, part)


@contextmanager
def _engine(
    args: argparse.Namespace, model: str, connector: Mapping[str, Any]
) -> Iterator[tuple[Runner, Render]]:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    arguments = {**_ENGINE, **args.engine_args, "enable_prefix_caching": False}
    err().print(f"Starting vLLM with {model}")
    try:
        runner = Runner(model, {**_CONNECTOR, **connector}, **arguments)
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError) as error:
        given = f" --engine-args={json.dumps(args.engine_args)}" if args.engine_args else ""
        raise ConfigError(f"--model={model}{given}: vLLM refuses it: {error}") from None
    try:
        yield runner, make_render(runner.tokenizer, runner.vllm_config.model_config.hf_config)
    finally:
        runner.close()


# -- calibrate ----------------------------------------------------------------------------------


def run_calibrate(args: argparse.Namespace) -> int:
    """Measure, and write schedules."""
    held_out_images = _images(args, (1, 2))
    images = _images(args, (0, 2))
    job = _Job.of(args)
    with _engine(args, job.model, {}) as (runner, render):
        identity, existing = job.identify(runner)
        num_layers = identity.num_layers
        points = args.requests * calibrate.num_grid_points(num_layers)
        checks = args.requests * 2 * len(calibrate.BUDGETS)
        with progress(measuring=points, checking=checks) as advance:
            surface = calibrate.measure_surface(
                runner,
                make_cases(
                    args.relations,
                    args.requests,
                    images,
                    render,
                    seed=args.seed,
                    label="calibrate",
                ),
                num_layers,
                lambda: advance("measuring"),
            )
            validated = calibrate.validate(
                runner,
                make_cases(
                    args.relations,
                    args.requests,
                    held_out_images,
                    render,
                    seed=args.seed,
                    label="held-out",
                ),
                [calibrate.allocate(surface, budget) for budget in calibrate.BUDGETS],
                lambda: advance("checking"),
            )
    calibration = Calibration(
        model=identity,
        sample=Sample(images=images.name, requests=args.requests, seed=args.seed),
        schedules=[entry.schedule for entry in validated],
        verification=existing.verification if existing is not None else None,
    )
    _save(calibration, job.output)
    out().print(_schedules_table(validated))
    for entry in validated:
        if entry.is_uniform:
            out().print(
                f"ratio {entry.schedule.ratio}: first_k was better on the held-out requests, so "
                "the schedule is the same in all layers"
            )
    out().print(f"Written to {job.output}")
    return 0


def _schedules_table(validated: Sequence[calibrate.Validated]) -> Table:
    table = Table(title="Held-out requests: KL divergence (nats) and computed token-layers")
    for heading in ("ratio", "layer_aware", "first_k", "token-layers", "of first_k"):
        table.add_column(heading, justify="right")
    table.add_column("shares from first to last layer")
    for entry in validated:
        layers = entry.schedule.layers
        table.add_row(
            f"{entry.schedule.ratio}",
            f"{entry.allocated_kl:.4g}",
            f"{entry.schedule.first_k_kl:.4g}",
            f"{entry.token_layers:.0f}",
            f"{entry.first_k_token_layers:.0f}",
            " ".join(f"{share:.3g}" for share in dict.fromkeys(layers)),
        )
    return table


def _save(calibration: Calibration, output: Path) -> None:
    try:
        calibration.save(output)
    except OSError as error:
        raise ConfigError(
            f"--output={output}: can't be written: {error.strerror or error}"
        ) from None


# -- verify -------------------------------------------------------------------------------------


def run_verify(args: argparse.Namespace) -> int:
    """Measure, and write a verdict."""
    images = _images(args)
    job = _Job.of(args)
    connector = {"selector": args.selector, "recompute_ratio": args.recompute_ratio}
    if args.selector == "layer_aware":
        if job.existing is None or not job.existing.schedules:
            raise ConfigError(
                f"--selector=layer_aware: there are no schedules in {job.output}; run vlcache "
                "calibrate before"
            )
        connector["calibration"] = str(job.output.absolute())
    with _engine(args, job.model, connector) as (runner, render):
        identity, existing = job.identify(runner)
        with progress(requests=args.requests * len(RELATIONS)) as advance:
            measured = verify.measure(
                runner, args.requests, images, render, args.seed, lambda: advance("requests")
            )
    verification = verify.verification_of(
        measured,
        Thresholds(kl=args.max_kl, flip_rate=args.max_flip_rate),
        selector=args.selector,
        recompute_ratio=args.recompute_ratio,
        sample=Sample(images=images.name, requests=args.requests, seed=args.seed),
    )
    _save(
        (existing or Calibration(model=identity)).model_copy(
            update={"model": identity, "verification": verification}
        ),
        job.output,
    )
    table = Table(
        title=f"{args.selector}, ratio {args.recompute_ratio}: reuse against a full recompute"
    )
    for heading in ("relation", "requests", "KL (nats)", "95 % below", "flips", "95 % below", ""):
        is_text = heading in ("relation", "")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=is_text)
    for relation, result in verification.relations.items():
        kl_bound, flip_bound = verify.upper_bounds(measured[relation])
        table.add_row(
            relation,
            str(result.requests),
            f"{result.kl:.4g}",
            f"{kl_bound:.4g}",
            f"{result.flip_rate:.1%}",
            f"{flip_bound:.1%}",
            "passed" if result.passed else "failed",
        )
    out().print(table)
    allowed = ", ".join(sorted(verification.allowed)) or "none"
    out().print(
        f"Verdict: {verification.verdict} (KL at most {args.max_kl}, flips at most "
        f"{args.max_flip_rate:.1%}); reuse is allowed under: {allowed}"
    )
    out().print(f"Written to {job.output}")
    rank = verify.VERDICTS.index
    wanted = args.at_least or "none"
    return 0 if rank(verification.verdict) >= rank(wanted) else 1

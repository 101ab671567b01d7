#!/usr/bin/env python
"""Measure what the choice of donors does to answers: who came first, and how many variants.

Two workloads of the grid task (`grid_vqa.py`) through real vLLM:

- "order": a stream of questions about a small pool of images, asked in two orders, with
  `donor: first_seen` and with `donor: canonical`. How many answers depend on the order?
- "window": several chats over the same sequence of images, each showing the last three, so that
  an image is the third, then the second, then the first of its prompt. How much is reused, and
  how good are the answers, when every donor may be reused, or only one of the same ordinal, with
  one to three variants of each image?

Usage::

    python scripts/eval_donors.py --model tests/models/grid-vlm
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from grid_vqa import IMAGE_TOKENS, Grid, Question, Scene, list_queries, make_grid, make_prefix
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from vlcache_connector.calibration import (
    Calibration,
    ModelIdentity,
    RelationResult,
    Sample,
    Thresholds,
    Verdict,
    Verification,
)
from vlcache_connector.measure.runner import (
    FULL_RECOMPUTE,
    Outcome,
    Request,
    Runner,
    kl_divergence,
)

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("colour", "shape", "where", "find", "has", "rule")
WINDOW = 3
RATIO = 0.05
CONNECTOR = {
    "recompute_ratio": RATIO,
    "min_recompute_tokens": 0,
    "min_segment_tokens": 1,
    "cpu_bytes": "256MiB",
    "encoder_cpu_bytes": "64MiB",
}
_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "limit_mm_per_prompt": {"image": WINDOW, "video": 0},
    "seed": 0,
}


@dataclass(frozen=True)
class Served:
    """What one engine made of a stream of requests, one after the other.

    Attributes:
        seconds: of the whole stream.
    """

    outcomes: list[Outcome]
    seconds: float


def serve(
    model: str, connector: Mapping[str, Any], streams: Sequence[Sequence[Request]]
) -> list[Served]:
    """Serve each stream with one engine in a process of its own."""
    return _in_a_process(_serve, model, dict(connector), streams)


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """vLLM leaves state behind in a process, so that each engine gets its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _serve(
    model: str, connector: dict[str, Any], streams: Sequence[Sequence[Request]]
) -> list[Served]:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
        TORCHDYNAMO_DISABLE="1",
        # Requests are tiny and come one by one: a second thread costs more than it gives.
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    runner = Runner(model, connector, **_ENGINE)
    served = []
    try:
        runner.run([replace(streams[0][0], salt="warm-up")])
        for stream in streams:
            start = time.perf_counter()
            outcomes = [runner.run([request])[0] for request in stream]
            served.append(Served(outcomes, time.perf_counter() - start))
    finally:
        runner.close()
    return served


def ask_about(rng: np.random.Generator, grids: tuple[Grid, ...]) -> Question:
    """A question about given images, from a random family."""
    while True:
        family = str(rng.choice(FAMILIES))
        rule = str(rng.choice(["colour", "shape"])) if family == "rule" else None
        listing = list_queries(rng, family, Scene(grids, rule), 1)
        if listing.items:
            break
    words, answer = listing.items[0]
    prefix = make_prefix(rng, rule, len(grids), int(rng.integers(17)))
    return Question(grids, (*prefix, " ".join(listing.head + words)), family, rule, answer)


def request_of(question: Question, salt: str, options: Mapping[str, Any]) -> Request:
    """The engine's request for a question."""
    images = tuple(Image.fromarray(pixels) for pixels in question.images())
    return Request(question.text(), images, salt, options)


def pool_questions(rng: np.random.Generator, requests: int, images: int) -> list[Question]:
    """Questions about two images of a pool each."""
    pool = [make_grid(rng) for _ in range(images)]
    return [
        ask_about(rng, tuple(pool[i] for i in rng.choice(images, size=2, replace=False)))
        for _ in range(requests)
    ]


def window_questions(rng: np.random.Generator, turns: int, chats: int) -> list[Question]:
    """Chats over the same images, one after the other, two questions a turn."""
    stream = [make_grid(rng) for _ in range(turns + WINDOW - 1)]
    return [
        ask_about(rng, tuple(stream[turn : turn + WINDOW]))
        for _ in range(chats)
        for turn in range(turns)
        for _ in range(2)
    ]


def quality(
    questions: Sequence[Question], outcomes: Sequence[Outcome], full: Sequence[Outcome]
) -> dict[str, float]:
    """Exact match, answers that differ from full recompute, mean KL, share of tokens reused."""
    reused = sum(outcome.figures.get("reused_tokens", 0) for outcome in outcomes)
    tokens = sum(IMAGE_TOKENS * len(question.grids) for question in questions)
    pairs = list(zip(full, outcomes, strict=True))
    return {
        "requests": len(questions),
        "flip_rate": sum(a.token != b.token for a, b in pairs) / len(pairs),
        "kl": float(np.mean([kl_divergence(a, b) for a, b in pairs])),
        "reused_share": reused / tokens,
    }


def accuracy(
    questions: Sequence[Question], outcomes: Sequence[Outcome], words: Mapping[int, str]
) -> float:
    """Share of the questions whose first token is the answer."""
    right = [
        words.get(o.token, "").strip() == q.answer for q, o in zip(questions, outcomes, strict=True)
    ]
    return sum(right) / len(right)


def measure_order(
    model: str, words: Mapping[int, str], requests: int, seed: int
) -> Iterator[dict[str, Any]]:
    """One row per donor mode."""
    rng = np.random.default_rng(seed)
    questions = pool_questions(rng, requests, max(4, requests // 10))
    order = rng.permutation(len(questions))
    for mode in ("first_seen", "canonical"):
        forward = [request_of(question, "forward", {}) for question in questions]
        shuffled = [replace(forward[i], salt="shuffled") for i in order]
        exact = [replace(request, salt="full", options=FULL_RECOMPUTE) for request in forward]
        connector = {**CONNECTOR, "donor": mode}
        one, other, full = serve(model, connector, [forward, shuffled, exact])
        back = [other.outcomes[place] for place in np.argsort(order)]
        pairs = list(zip(one.outcomes, back, strict=True))
        yield {
            "donor": mode,
            **quality(questions, one.outcomes, full.outcomes),
            "accuracy": accuracy(questions, one.outcomes, words),
            "accuracy_full": accuracy(questions, full.outcomes, words),
            "differ_by_order": sum(a.token != b.token for a, b in pairs) / len(pairs),
            "kl_between_orders": float(np.mean([kl_divergence(a, b) for a, b in pairs])),
            "seconds_over_full": one.seconds / full.seconds,
        }


def measure_window(
    model: str, words: Mapping[int, str], turns: int, seed: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """One row per verdict and number of variants."""
    questions = window_questions(np.random.default_rng(seed), turns, chats=3)
    stream = [request_of(question, "chat", {}) for question in questions]
    exact = [replace(request, salt="full", options=FULL_RECOMPUTE) for request in stream]
    [full] = serve(model, CONNECTOR, [exact])
    identity: ModelIdentity = _in_a_process(_read_identity, model)
    for verdict, variants in (
        ("any", 1),
        ("same_ordinal", 1),
        ("same_ordinal", 2),
        ("same_ordinal", 3),
    ):
        path = folder / f"{verdict}.yaml"
        _calibration(identity, verdict).save(path)
        connector = {
            **CONNECTOR,
            "donor_variants": variants,
            "gate": "require",
            "calibration": str(path),
        }
        [served] = serve(model, connector, [stream])
        yield {
            "relations": verdict,
            "variants": variants,
            **quality(questions, served.outcomes, full.outcomes),
            "accuracy": accuracy(questions, served.outcomes, words),
            "accuracy_full": accuracy(questions, full.outcomes, words),
            "seconds_over_full": served.seconds / full.seconds,
        }


def _read_identity(model: str) -> ModelIdentity:
    from vllm.engine.arg_utils import EngineArgs

    from vlcache_connector.identity import weights_fingerprint
    from vlcache_connector.support import kv_shape

    config = EngineArgs(model=model, **_ENGINE).create_engine_config()
    return ModelIdentity(
        name=Path(model).name,
        fingerprint=weights_fingerprint(config),
        num_layers=kv_shape(config).num_layers,
    )


def _calibration(identity: ModelIdentity, verdict: Verdict) -> Calibration:
    """A file that lets the relations of `verdict` through."""
    passed = {"any": 4, "same_ordinal": 2}[verdict]
    names = ("single_image", "same_ordinal", "lone_donor", "other_ordinal")
    return Calibration(
        model=identity,
        verification=Verification(
            selector="first_k",
            recompute_ratio=RATIO,
            sample=Sample(images="assumed", requests=1, seed=0),
            thresholds=Thresholds(kl=0.0, flip_rate=0.0),
            relations={
                name: RelationResult(requests=1, kl=0.0, flip_rate=0.0, passed=index < passed)
                for index, name in enumerate(names)
            },
            verdict=verdict,
        ),
    )


def make_markdown(document: Mapping[str, Any]) -> str:
    """Tables of the results."""
    lines = [
        "# Donors: who came first, and how many variants",
        "",
        f"- Model: {document['model']}, first_k at {RATIO:g}",
        f"- Command: `{document['command']}`",
        "",
        "## A stream of questions about a pool of images, asked in two orders",
        "",
        *_table(
            document["order"],
            {
                "donor": "Donor",
                "requests": "Requests",
                "differ_by_order": "Answers that depend on the order",
                "kl_between_orders": "KL between the orders",
                "accuracy": "Exact match",
                "accuracy_full": "Full recompute",
                "flip_rate": "Flips",
                "kl": "KL to full",
                "reused_share": "Image tokens reused",
                "seconds_over_full": "Time / full",
            },
        ),
        "",
        f"## Three chats over the same images, {WINDOW} in the window",
        "",
        *_table(
            document["window"],
            {
                "relations": "Relations reused",
                "variants": "Variants",
                "requests": "Requests",
                "accuracy": "Exact match",
                "accuracy_full": "Full recompute",
                "flip_rate": "Flips",
                "kl": "KL to full",
                "reused_share": "Image tokens reused",
                "seconds_over_full": "Time / full",
            },
        ),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    def text(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    return [
        f"| {' | '.join(columns.values())} |",
        "| --- " + "| ---: " * (len(columns) - 1) + "|",
        *(f"| {' | '.join(text(row[name]) for name in columns)} |" for row in rows),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run both workloads and write PREFIX.json and PREFIX.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "tests" / "models" / "grid-vlm"))
    parser.add_argument("--requests", type=int, default=400, help="questions of the stream")
    parser.add_argument("--turns", type=int, default=60, help="turns of each chat")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "configs" / "results" / "donors", metavar="PREFIX"
    )
    args = parser.parse_args(argv)
    if not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model}: no checkpoint there")
    if min(args.requests, args.turns) < 1:
        parser.error("--requests and --turns must be at least 1")
    console = Console(stderr=True)
    words = _words(args.model)
    document: dict[str, Any] = {
        "model": Path(args.model).name,
        "command": shlex.join(["python", *sys.argv]),
        "order": [],
        "window": [],
    }
    with Progress(console=console) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("donor policies", total=6)
        workloads = {
            "order": measure_order(args.model, words, args.requests, args.seed),
            "window": measure_window(args.model, words, args.turns, args.seed, Path(folder)),
        }
        for name, rows in workloads.items():
            for row in rows:
                document[name].append(row)
                progress.advance(task)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    markdown = make_markdown(document)
    args.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(markdown)
    console.print(markdown, markup=False)
    return 0


def _words(model: str) -> dict[int, str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return {token: word for word, token in tokenizer.get_vocab().items()}


if __name__ == "__main__":
    sys.exit(main())

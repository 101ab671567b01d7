#!/usr/bin/env python
"""Measure how answers change when every image's KV comes from another request.

Questions of the grid task (`grid_vqa.py`) go through real vLLM with VLCache. In front of each one,
donor requests make its images known, each at another position and in another context. Then the
question is asked with every recompute policy over the same donors, and once with everything
computed by plain vLLM ("full"), which is what all policies are compared with.

Relations of donors to questions:

- "single_image": the question has one image, which was alone in its donor, too.
- "same_ordinal": every image was the so-many-eth of its donor as it is of the question.
- "lone_donor": every image was alone in its donor.
- "other_ordinal": every image had images in front of it in its donor, another number of them.

Questions are asked in chunks, by several processes of one thread each. What each chunk gave is
kept in .cache/accuracy/NAME.samples.jsonl; the same command continues there after an interruption.

Results go to PREFIX.json, PREFIX.md, PREFIX.png (exact match) and PREFIX_kl.png.

Usage::

    python scripts/eval_accuracy.py --model tests/models/grid-vlm
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grid_vqa as task
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlcache_connector.calibration import RELATIONS, Relation, load_for, relation_of
from vlcache_connector.config import ConfigError
from vlcache_connector.measure import runner
from vlcache_connector.measure.runner import Outcome, Request

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
POLICIES = ("none", "first_k", "layer_aware", "cacheblend", "random_k")
RATIOS = (0.02, 0.05, 0.1, 0.2)
FULL = "full"
ALL = "all"
"""What stands for all families together."""
IMAGES = 2
CHUNK = 16
TIMED_FROM = 10**6
"""Number of the first timed question: those of the sample have smaller ones."""
HELD_OUT_SEED = 2**31
"""The training of the model (`train_grid_vlm.py`) draws from smaller seeds."""
EXACT_KL = 1e-3
"""More than rounding: a recompute of all tokens that is as far from plain vLLM is broken."""
CLOSE = 0.01
CLOSE_RATIO = 0.05
PACKAGES = ("vllm", "torch", "transformers", "lmcache", "vlcache-connector")
BYTES = {"cpu_bytes": "512MiB", "encoder_cpu_bytes": "64MiB"}
CONNECTOR = {"min_recompute_tokens": 0, "min_segment_tokens": 1, **BYTES}
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 32}
IMAGE_LIMIT = {"image": task.MAX_IMAGES, "video": 0}
# One thread: those of such small operations would mostly wait for each other.
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    **{"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    **{"DO_NOT_TRACK": "1", "LMCACHE_TRACK_USAGE": "false"},
}


class EvaluationError(RuntimeError):
    """What was measured is not what it should be, or can't go together with earlier results."""


# -- questions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A policy at a ratio."""

    policy: str
    ratio: float

    @property
    def name(self) -> str:
        """How it is called in files."""
        return f"{self.policy}@{self.ratio:g}"


NONE = Cell("none", 0.0)
EXACT = Cell("first_k", 1.0)


def cells_of(policies: Sequence[str], ratios: Sequence[float]) -> list[Cell]:
    """What is compared. Ratio zero is always in; `random_k` gets every second ratio."""
    cells = [NONE]
    for policy in policies:
        some = (ratios[1::2] or ratios) if policy == "random_k" else ratios
        cells += [Cell(policy, ratio) for ratio in some if policy != "none"]
    return cells


def relations_of(family: str, relations: Sequence[Relation]) -> list[Relation]:
    """The relations that a family's questions can have."""
    two = family in task.TWO_IMAGE_FAMILIES
    return [relation for relation in relations if not (two and relation == "single_image")]


def question_of(seed: int, family: str, number: int, relation: Relation) -> task.Question:
    """A question; the same one for all relations with so many images."""
    images = 1 if relation == "single_image" else IMAGES
    entropy = (HELD_OUT_SEED + seed, images, list(task.FAMILIES).index(family), number)
    return task.make_question(np.random.default_rng(entropy), family, images)


def donors_of(question: task.Question, relation: Relation, seed: int) -> tuple[task.Donor, ...]:
    """One donor prompt for each image of a question."""
    rng = np.random.default_rng((seed, RELATIONS.index(relation)))
    alone = relation in ("single_image", "lone_donor")
    while True:
        donors = task.donor_prompts(question, "single" if alone else relation, rng)
        # The task also takes an image without any in front of it for one at another ordinal.
        kinds = {relation_of(donor.index, ordinal) for ordinal, donor in enumerate(donors)}
        if relation != "other_ordinal" or kinds == {relation}:
            return donors


def count_tokens(prompt: task.Prompt) -> int:
    """Tokens of a prompt: words, and each image's with the two around them."""
    words = sum(len(part.split()) for part in prompt.parts if isinstance(part, str))
    return words + (task.IMAGE_TOKENS + 2) * len(prompt.grids)


# -- measuring, in processes of their own -------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Questions of one family that are asked together."""

    family: str
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Scope:
    """What is done with every question."""

    seed: int
    relations: tuple[Relation, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Case:
    """A question under one relation."""

    relation: Relation
    question: task.Question
    images: tuple[Image.Image, ...]
    donors: tuple[Request, ...]
    salt: str

    @classmethod
    def make(cls, seed: int, family: str, number: int, relation: Relation) -> Case:
        """Draw the question and its donors."""
        question = question_of(seed, family, number, relation)
        salt = f"{seed}-{family}-{number}-{relation}"
        donors = (
            Request(donor.text(), _pictures(donor), salt)
            for donor in donors_of(question, relation, HELD_OUT_SEED + seed + number)
        )
        return cls(relation, question, _pictures(question), tuple(donors), salt)

    def request(self, cell: Cell | None) -> Request:
        """The question with a policy; None: everything is computed, nothing is known."""
        if cell is None:
            salt = f"{self.salt}-full"
            return Request(self.question.text(), self.images, salt, runner.FULL_RECOMPUTE)
        options = {"selector": cell.policy, "recompute_ratio": cell.ratio}
        return Request(self.question.text(), self.images, self.salt, options)


def _pictures(prompt: task.Prompt) -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(pixels) for pixels in prompt.images())


class Worker:
    """An engine that questions are put to."""

    def __init__(self, model: str, calibration: str | None) -> None:
        named = {} if calibration is None else {"calibration": calibration}
        connector = {**CONNECTOR, **named}
        self._runner = runner.Runner(
            model, connector, limit_mm_per_prompt=IMAGE_LIMIT, seed=0, **ENGINE
        )
        from vlcache_connector.identity import weights_fingerprint
        from vlcache_connector.support import kv_shape

        fingerprint = weights_fingerprint(self._runner.vllm_config)
        self._layers = kv_shape(self._runner.vllm_config).num_layers
        found = load_for(model, calibration, fingerprint, self._layers)
        schedules = [schedule.layers for schedule in found.schedules] if found else []
        self._description = {"fingerprint": fingerprint, "schedules": schedules}

    def describe(self) -> dict[str, Any]:
        """The model's fingerprint, and the schedules of `layer_aware`."""
        return self._description

    def ask(self, chunk: Chunk, scope: Scope) -> dict[str, Any]:
        """Put a chunk's questions, all together, after all of their donors.

        Returns:
            By relation, for each question: whether full recompute answers it, tokens, tokens of
            images; and for each cell: whether it is answered, whether differently, KL, image
            tokens computed per layer.
        """
        cases = [
            Case.make(scope.seed, chunk.family, number, relation)
            for relation in relations_of(chunk.family, scope.relations)
            for number in chunk.numbers
        ]
        self._runner.run([donor for case in cases for donor in case.donors])
        # Several relations have the same questions: these need one full recompute.
        distinct = {case.question: case for case in cases}
        full = self._runner.run([case.request(None) for case in distinct.values()])
        full_of = dict(zip(distinct, full, strict=True))
        requests = [case.request(cell) for case in cases for cell in scope.cells]
        outcomes = iter(self._runner.run(requests))
        relations: dict[str, Any] = {}
        for case in cases:
            reference = full_of[case.question]
            entry = relations.setdefault(case.relation, {"questions": [], "cells": {}})
            right = self._runner.tokenizer.convert_tokens_to_ids(case.question.answer)
            tokens = [count_tokens(case.question), task.IMAGE_TOKENS * len(case.images)]
            entry["questions"].append([int(reference.token == right), *tokens])
            answered = {cell: next(outcomes) for cell in scope.cells}
            for cell, computed in self._image_tokens(case, answered).items():
                token = answered[cell].token
                divergence = float(f"{runner.kl_divergence(reference, answered[cell]):.4g}")
                values = [int(token == right), int(token != reference.token), divergence, computed]
                entry["cells"].setdefault(cell.name, []).append(values)
        return {"family": chunk.family, "numbers": list(chunk.numbers), "relations": relations}

    def time(self, family: str, number: int, scope: Scope) -> dict[str, Any]:
        """Put a question alone, with every policy in turn.

        Returns:
            By relation: each cell's time to the first token over that of a full recompute, and
            the divergence of a recompute of all tokens by VLCache.
        """
        result: dict[str, Any] = {}
        order: list[Cell | None] = [None, *scope.cells]
        turn = number % len(order)
        for relation in relations_of(family, scope.relations):
            case = Case.make(scope.seed, family, number, relation)
            self._runner.run(case.donors)
            # Not timed: from here on the images are processed and encoded for everyone.
            full, exact = self._runner.run([case.request(None), case.request(EXACT)])
            divergence = runner.kl_divergence(full, exact)
            if divergence > EXACT_KL:
                raise EvaluationError(
                    f"{case.salt}: all tokens recomputed, and yet KL {divergence:.3g} from plain "
                    "vLLM: the connector does not compute what vLLM does"
                )
            turned = order[turn:] + order[:turn]
            outcomes = {cell: self._runner.run_alone(case.request(cell)) for cell in turned}
            self._image_tokens(case, {cell: outcomes[cell] for cell in scope.cells})
            seconds = {cell: outcome.seconds or math.nan for cell, outcome in outcomes.items()}
            ratios = {cell.name: seconds[cell] / seconds[None] for cell in scope.cells}
            result[relation] = {"ratios": ratios, "exact_kl": divergence}
        return result

    def _image_tokens(self, case: Case, outcomes: Mapping[Cell, Outcome]) -> dict[Cell, float]:
        """Image tokens that a layer computed on average; checks that the others were reused."""
        images = task.IMAGE_TOKENS * len(case.images)
        none = outcomes[NONE].figures
        result = {}
        for cell, outcome in outcomes.items():
            figures = outcome.figures
            whole = none.get("reused_tokens") == images and not figures.get("fallback")
            if not whole or not 0 < figures["reused_tokens"] <= images:
                raise EvaluationError(
                    f"{case.salt}: {cell.name} did not reuse its {len(case.images)} images: "
                    f"{dict(figures)}; without recomputation: {dict(none)}"
                )
            # Without recomputation, only text is computed.
            more = figures["computed_token_layers"] - none["computed_token_layers"]
            result[cell] = round(more / self._layers, 4)
        return result


_worker: Worker | None = None


def _start(model: str, calibration: str | None) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's to handle
    os.environ.update(ENVIRONMENT)
    _worker = Worker(model, calibration)


def _do(method: str, *arguments: Any) -> Any:
    assert _worker is not None
    return getattr(_worker, method)(*arguments)


# -- samples on disk ----------------------------------------------------------------------------


class Samples:
    """What was measured so far, one JSON document per line; the first one holds the settings."""

    def __init__(self, path: Path, settings: Mapping[str, Any], restart: bool) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() and not restart else ""
        try:  # the last line may be incomplete
            lines = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
        except json.JSONDecodeError as error:
            raise EvaluationError(
                f"{path} is damaged ({error}); --restart throws it away"
            ) from None
        old = lines[0]["settings"] if lines else settings
        differences = [
            f"{key} was {old.get(key)!r}, now it is {settings.get(key)!r}"
            for key in sorted(old.keys() | settings.keys())
            if old.get(key) != settings.get(key)
        ]
        if differences:
            raise EvaluationError(
                f"{path} was measured with other settings: {'; '.join(differences)}. "
                "Use these, another --output, or --restart to throw it away"
            )
        self.records = lines[1:]
        work = path.with_suffix(f".{os.getpid()}.part")
        whole = [{"settings": dict(settings)}, *self.records]
        work.write_text("".join(json.dumps(line) + "\n" for line in whole), encoding="utf-8")
        work.replace(path)

    def add(self, kind: str, record: Any) -> None:
        """Keep what a chunk or timed question gave."""
        self.records.append({kind: record})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.records[-1]) + "\n")

    def of(self, kind: str) -> list[Any]:
        """All records of a kind."""
        return [record[kind] for record in self.records if kind in record]


def chunks_left(
    families: Sequence[str], questions: int, done: Sequence[Mapping[str, Any]]
) -> list[Chunk]:
    """What is still to be asked, family after family in turn, so that all get equally far."""
    queues = []
    for family in families:
        over = {n for record in done if record["family"] == family for n in record["numbers"]}
        left = [number for number in range(questions) if number not in over]
        parts = (tuple(left[i : i + CHUNK]) for i in range(0, len(left), CHUNK))
        queues.append([Chunk(family, part) for part in parts])
    longest = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


# -- statistics ---------------------------------------------------------------------------------


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of paired differences of right and wrong answers, and its 95 % confidence interval.

    The interval is the normal approximation after one more pair for, and one against, was added
    (Bonett and Price, 2012): without them it would have no width where no answer differs.
    """
    padded = np.concatenate([differences, [1.0, -1.0]])
    centre, half = padded.mean(), 1.959964 * padded.std() / math.sqrt(len(padded))
    return float(differences.mean()), max(-1.0, centre - half), min(1.0, centre + half)


def make_rows(
    records: Sequence[Mapping[str, Any]],
    timings: Sequence[Mapping[str, Any]],
    families: Sequence[str],
    cells: Sequence[Cell],
) -> list[dict[str, Any]]:
    """Figures of all families together and of each, under each relation with each cell."""
    rows = []
    for family in (ALL, *families):
        members = [r for r in records if r["family"] in (families if family == ALL else [family])]
        for relation in RELATIONS:
            entries = [r["relations"][relation] for r in members if relation in r["relations"]]
            if not entries:
                continue
            times = [timing[relation]["ratios"] for timing in timings if relation in timing]
            questions = np.concatenate([entry["questions"] for entry in entries])
            right, _, images = questions.T
            about = {"family": family, "relation": relation}
            itself = np.stack([right, 0 * right, 0 * right, images], axis=1)
            rows.append(about | _row(Cell(FULL, 1.0), questions, itself))
            for cell in cells:
                values = np.concatenate([entry["cells"][cell.name] for entry in entries])
                rows.append(about | _row(cell, questions, values))
                if family == ALL and times:
                    rows[-1]["ttft_ratio"] = float(np.median([time[cell.name] for time in times]))
    return rows


def _row(cell: Cell, questions: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    right, prompt, images = questions.T
    mine, flipped, divergence, computed = values.T
    difference, low, high = paired_interval(mine - right)
    means = {
        "exact_match": mine,
        "flip_rate": flipped,
        "kl": divergence,
        "tokens_per_layer": prompt - images + computed,
        "image_tokens_per_layer": computed,
    }
    return {
        **{"policy": cell.policy, "ratio": cell.ratio, "n": len(right)},
        **{"difference": difference, "low": low, "high": high},
        **{name: float(value.mean()) for name, value in means.items()},
    }


Rows = Sequence[Mapping[str, Any]]


def first_k_kl_at(rows: Rows, tokens: float) -> float | None:
    """`first_k`'s KL where it computes so many image tokens, of the rows of one relation.

    Between two ratios, its logarithm is interpolated; no recomputation is the first ratio. None
    outside of what was measured.
    """
    chosen = [row for row in rows if row["policy"] in ("none", "first_k")]
    known = sorted((row["image_tokens_per_layer"], row["kl"]) for row in chosen)
    if len(known) < 2 or tokens > known[-1][0]:
        return None
    x, y = zip(*known, strict=True)
    return float(np.exp(np.interp(tokens, x, np.log(np.maximum(y, 1e-12)))))


# -- results ------------------------------------------------------------------------------------

_HEADS = (
    *("Policy", "Ratio", "Questions", "Exact match", "Against full, points"),
    *("Answers that differ", "KL", "Tokens per layer", "of images"),
)


def make_markdown(document: Mapping[str, Any]) -> str:
    """Statements and tables."""
    rows, machine = document["rows"], document["machine"]
    lines = [
        "# Answers over other requests' KV",
        "",
        *_statements(document),
        "",
        f"- Model {document['model']} (`{document['settings']['fingerprint'][:12]}`), seed "
        f"{document['settings']['seed']}, {machine['cpu']}, {machine['cores']} cores.",
        f"- Command: `{document['command']}`",
        *(f"- {note}" for note in document["notes"]),
        "- Every image's KV comes from a donor at another position, in another context. What is "
        "compared is the first token, which is the whole answer.",
        "- Against full: exact match minus that of a full recompute of the same questions, with "
        "its 95 % confidence interval (normal approximation of the paired differences, one pair "
        "for and one against added).",
        "- KL: of the answer token's distribution from that of a full recompute, in nats, mean.",
        "- Tokens per layer: computed token-layers over layers; text included, then images only.",
        f"- TTFT: over that of a full recompute of the same question, median of "
        f"{document['timed']} questions put alone to an engine of one thread. All images are "
        "processed and encoded before.",
        "",
        "## All families",
        "",
    ]
    for family in (ALL, *document["families"]):
        if family != ALL:
            lines += [f"## {family}: {task.FAMILIES[family]}", ""]
        for relation in RELATIONS:
            chosen = [r for r in rows if r["family"] == family and r["relation"] == relation]
            if chosen:
                lines += [f"### {relation}", "", *_table(chosen, timed=family == ALL), ""]
    return "\n".join(lines)


def _statements(document: Mapping[str, Any]) -> list[str]:
    """What the figures say about `first_k` at 5 %, and about `layer_aware` against `first_k`."""
    rows = document["rows"]
    at = {
        (row["family"], row["relation"]): row
        for row in rows
        if (row["policy"], row["ratio"]) == ("first_k", CLOSE_RATIO)
    }
    relations = [relation for relation in RELATIONS if any(key[1] == relation for key in at)]
    if not at:
        return [f"`first_k` at {CLOSE_RATIO:.0%} was not measured.", "", *_layer_aware(rows)]
    lines = [
        f"Is the exact match of `first_k` at {CLOSE_RATIO:.0%} within one point of that of full "
        "recompute? By the measured difference; in brackets its 95 % confidence interval.",
        "",
        f"| Family | {' | '.join(relations)} |",
        "| --- " * (1 + len(relations)) + "|",
    ]
    for family in (ALL, *document["families"]):
        verdicts = []
        for relation in relations:
            row = at.get((family, relation))
            close = row and abs(row["difference"]) <= CLOSE + 1e-9
            word = "yes" if close else "**no**"
            verdicts.append(f"{word}: {_points(row)}" if row else "")
        lines.append(f"| {family} | {' | '.join(verdicts)} |")
    return [*lines, "", *_layer_aware(rows)]


def _layer_aware(rows: Rows) -> list[str]:
    worse, compared = [], 0
    for row in rows:
        if row["policy"] == "layer_aware":
            same = [r for r in rows if all(r[key] == row[key] for key in ("family", "relation"))]
            other = first_k_kl_at(same, row["image_tokens_per_layer"])
            compared += other is not None
            if other is not None and row["kl"] > other:
                worse.append(
                    f"- {row['family']}, {row['relation']}, {row['ratio']:.0%}: "
                    f"KL {row['kl']:.3g}, `first_k` {other:.3g}"
                )
    if not compared:
        return ["`layer_aware` was not compared with `first_k`."]
    return [
        f"With as many token-layers, `layer_aware` has a higher KL than `first_k` (interpolated "
        f"between its ratios) in {len(worse)} of {compared} cases.",
        "",
        *worse,
    ]


def _points(row: Mapping[str, Any]) -> str:
    difference, low, high = (100 * row[key] for key in ("difference", "low", "high"))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def _table(rows: Rows, timed: bool) -> list[str]:
    heads = [*_HEADS, *(["TTFT / full"] if timed else [])]
    lines = [f"| {' | '.join(heads)} |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for row in rows:
        texts = [
            *(row["policy"], f"{row['ratio']:g}", str(row["n"]), f"{row['exact_match']:.1%}"),
            _points(row) if row["policy"] != FULL else "",
            *(f"{row['flip_rate']:.1%}", f"{row['kl']:.2g}"),
            *(f"{row['tokens_per_layer']:.1f}", f"{row['image_tokens_per_layer']:.1f}"),
        ]
        if timed:
            texts.append(f"{row['ttft_ratio']:.2f}" if "ttft_ratio" in row else "")
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def draw(document: Mapping[str, Any], path: Path, value: str) -> None:
    """Plot "exact_match" or "kl" of all families against the computed image tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in document["rows"] if row["family"] == ALL]
    relations = [r for r in RELATIONS if any(row["relation"] == r for row in rows)]
    figure, panels = plt.subplots(1, len(relations), sharey=True, squeeze=False)
    figure.set_size_inches(4.5 * len(relations) + 1, 4.2)
    for axes, relation in zip(panels[0], relations, strict=True):
        here = [row for row in rows if row["relation"] == relation]
        for index, policy in enumerate(POLICIES[1:]):
            points = [row for row in here if row["policy"] in ("none", policy)]
            if len(points) < 2:
                continue
            points.sort(key=lambda row: row["image_tokens_per_layer"])
            x = [row["image_tokens_per_layer"] for row in points]
            y = [max(row[value], 1e-9) if value == "kl" else row[value] for row in points]
            ends = [(r["difference"] - r["low"], r["high"] - r["difference"]) for r in points]
            errors = None if value == "kl" else np.maximum(np.transpose(ends), 0)
            axes.errorbar(x, y, errors, fmt="o-", ms=4, capsize=2, color=f"C{index}", label=policy)
        if value == "kl":
            axes.set_yscale("log")
        else:
            full = next(row for row in here if row["policy"] == FULL)
            axes.axhline(full[value], color="grey", ls="--", label="full recompute")
        axes.set(title=relation, xlabel="image tokens computed per layer")
        axes.grid(alpha=0.3)
    names = {"kl": "KL(full || policy) of the answer, nats", "exact_match": "exact match"}
    panels[0][0].set_ylabel(names[value])
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def with_suffix(prefix: Path, suffix: str) -> Path:
    """The result file of this kind."""
    return prefix.with_name(prefix.name + suffix)


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    cpu = found[1] if found else platform.machine()
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}


# -- the command --------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure what is missing, and aggregate all there is."""
    context = multiprocessing.get_context("spawn")
    made = (args.model, args.calibration)
    pool = ProcessPoolExecutor(args.processes, context, initializer=_start, initargs=made)
    try:
        model = pool.submit(_do, "describe").result()
        notes = []
        policies = list(args.policies)
        if "layer_aware" in policies and not model["schedules"]:
            policies.remove("layer_aware")
            notes.append("`layer_aware` is left out: there are no schedules (--calibration).")
            console.print(notes[-1])
        cells = cells_of(policies, args.ratios)
        scope = Scope(args.seed, tuple(args.relations), tuple(cells))
        settings = {
            "schema": SCHEMA,
            "fingerprint": model["fingerprint"],
            "seed": args.seed,
            "relations": args.relations,
            "cells": [cell.name for cell in cells],
            "schedules": model["schedules"] if "layer_aware" in policies else [],
            "task": hashlib.sha256(Path(task.__file__).read_bytes()).hexdigest(),
        }
        name = args.output.name + ".samples.jsonl"
        samples = Samples(args.cache_dir / "accuracy" / name, settings, args.restart)
        _measure(pool, args, scope, samples, console)
    finally:
        pool.shutdown(cancel_futures=True)
    timings, chunks = samples.of("timing"), samples.of("chunk")
    left = sum(len(c.numbers) for c in chunks_left(args.families, args.questions, chunks))
    if left:
        notes.append(f"Stopped before the end: {left} questions were not asked.")
    exact = [relation["exact_kl"] for timing in timings for relation in timing.values()]
    if exact:
        text = f"Check: with all tokens recomputed by VLCache, KL is at most {max(exact):.1g}"
        notes.append(f"{text} ({len(exact)} questions).")
    return {
        "schema": SCHEMA,
        "complete": not left,
        "command": shlex.join(["python", *sys.argv]).replace(f"{ROOT}/", ""),
        "model": Path(args.model).name,
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "settings": settings,
        "families": args.families,
        "questions": args.questions,
        "timed": len(timings),
        "notes": notes,
        "rows": make_rows(chunks, timings, args.families, cells),
    }


def _measure(
    pool: ProcessPoolExecutor,
    args: argparse.Namespace,
    scope: Scope,
    samples: Samples,
    show: Console,
) -> None:
    deadline = time.monotonic() + 60 * args.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=show) as progress:
        timed = range(len(samples.of("timing")), args.timed)
        for index in progress.track(timed, description="timed questions"):
            if time.monotonic() < deadline:  # one at a time: nothing else may run
                family = args.families[index % len(args.families)]
                done = pool.submit(_do, "time", family, TIMED_FROM + index, scope)
                samples.add("timing", done.result())
        left = chunks_left(args.families, args.questions, samples.of("chunk"))
        bar = progress.add_task("questions", total=sum(len(chunk.numbers) for chunk in left))
        running: set[Future[Any]] = set()
        while running or (left and time.monotonic() < deadline):
            while left and len(running) < args.processes and time.monotonic() < deadline:
                running.add(pool.submit(_do, "ask", left.pop(0), scope))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                samples.add("chunk", future.result())
                progress.advance(bar, len(future.result()["numbers"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parse(argv)
    console = Console(stderr=True)
    path = with_suffix(args.output, ".json")
    try:
        if args.plot_only:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("schema") != SCHEMA:
                raise EvaluationError(f"{path} was not written by this version of the script")
        else:
            document = evaluate(args, console)
            if not document["rows"]:
                raise EvaluationError("no question was asked: --minutes is too short")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        with_suffix(args.output, ".md").write_text(make_markdown(document), encoding="utf-8")
        draw(document, with_suffix(args.output, ".png"), "exact_match")
        draw(document, with_suffix(args.output, "_kl.png"), "kl")
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues", style="red")
        return 130
    except (EvaluationError, ConfigError, BrokenProcessPool, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    console.print(f"results are in {path.parent}", markup=False)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default=str(ROOT / "tests" / "models" / "grid-vlm"), metavar="DIR")
    add("--questions", type=int, default=500, metavar="N", help="per family (%(default)s)")
    add("--families", nargs="+", choices=task.FAMILIES, default=list(task.FAMILIES))
    add("--relations", nargs="+", choices=RELATIONS, default=list(RELATIONS))
    add("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    add("--ratios", nargs="+", type=float, default=list(RATIOS), metavar="R")
    add("--seed", type=int, default=0, help="of the questions (%(default)s)")
    add("--calibration", metavar="FILE", help="schedules of layer_aware; else by the model's name")
    default = ROOT / "configs" / "results" / "accuracy"
    add("--output", type=Path, default=default, metavar="PREFIX", help="(%(default)s)")
    add("--timed", type=int, default=20, metavar="N", help="questions asked alone (%(default)s)")
    add("--restart", action="store_true", help="throw away what was measured before")
    add("--plot-only", action="store_true", help="make tables and plots from PREFIX.json")
    add("--minutes", type=float, default=math.inf, metavar="M", help="ask no more after so many")
    add("--processes", type=int, default=len(os.sched_getaffinity(0)), help="(%(default)s)")
    add("--cache-dir", type=Path, default=ROOT / ".cache", metavar="DIR", help="of raw samples")
    args = parser.parse_args(argv)
    args.relations = sorted(set(args.relations), key=RELATIONS.index)
    args.ratios = sorted(set(args.ratios))
    args.families = list(dict.fromkeys(args.families))
    args.policies = sorted(set(args.policies), key=POLICIES.index)
    if not all(0 < ratio < 1 for ratio in args.ratios):
        parser.error("--ratios must be between 0 and 1 (0 is the policy none, 1 is full)")
    if min(args.questions, args.processes) < 1 or not 0 <= args.seed < HELD_OUT_SEED:
        parser.error("--questions and --processes must be at least 1, --seed at least 0")
    if not all(relations_of(family, args.relations) for family in args.families):
        parser.error(f"{', '.join(task.TWO_IMAGE_FAMILIES)} have no single_image questions")
    if not args.plot_only and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model}: there is no checkpoint")
    return args


if __name__ == "__main__":
    sys.exit(main())

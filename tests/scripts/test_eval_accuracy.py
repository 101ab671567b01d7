"""Tests of scripts/eval_accuracy.py."""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import eval_accuracy as evaluation
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vlcache_connector.calibration import RELATIONS, relation_of

SCRIPTS = Path(evaluation.__file__).parent
QUIET = Console(quiet=True)


class FakeWorker:
    """Answers as `evaluation.Worker` does, without an engine.

    Attributes:
        asked: the chunks that were asked.
        limit: with so many chunks asked, the next one is interrupted.
    """

    def __init__(self) -> None:
        self.asked: list[evaluation.Chunk] = []
        self.limit = math.inf
        self.schedules: list[list[float]] = []

    def describe(self) -> dict[str, Any]:
        return {"fingerprint": "0123456789abcdef", "schedules": self.schedules}

    def ask(self, chunk: evaluation.Chunk, scope: evaluation.Scope) -> dict[str, Any]:
        if len(self.asked) >= self.limit:
            raise KeyboardInterrupt
        self.asked.append(chunk)
        relations = {}
        for relation in evaluation.relations_of(chunk.family, scope.relations):
            images = 36 if relation == "single_image" else 72
            cells: dict[str, Any] = {cell.name: [] for cell in scope.cells}
            for number in chunk.numbers:
                for cell in scope.cells:
                    wrong = int(cell.ratio == 0 and number % 4 == 0)
                    better = 0.5 if cell.policy == "layer_aware" else 1.0
                    kl = better * 10 ** (-1 - 10 * cell.ratio)
                    cells[cell.name].append([1 - wrong, wrong, kl, images * cell.ratio])
            questions = [[1, images + 20, images] for _ in chunk.numbers]
            relations[relation] = {"questions": questions, "cells": cells}
        return {"family": chunk.family, "numbers": list(chunk.numbers), "relations": relations}

    def time(self, family: str, number: int, scope: evaluation.Scope) -> dict[str, Any]:
        ratios = {cell.name: 0.5 + cell.ratio for cell in scope.cells}
        relations = evaluation.relations_of(family, scope.relations)
        return {relation: {"ratios": ratios, "exact_kl": 1e-7} for relation in relations}


class InlinePool:
    """Does what it is told at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        pass


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    fake = FakeWorker()
    monkeypatch.setattr(evaluation, "_worker", fake)
    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", InlinePool)
    return fake


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return [
        *("--model", str(model), "--output", str(tmp_path / "results" / "accuracy")),
        *("--cache-dir", str(tmp_path / "cache"), "--families", "colour", "has"),
        *("--questions", "40", "--ratios", "0.05", "0.2", "--processes", "2", "--timed", "5"),
    ]


def _evaluate(arguments: list[str], *more: str) -> dict[str, Any]:
    args: argparse.Namespace = evaluation._parse([*arguments, *more])
    return evaluation.evaluate(args, QUIET)


def _samples(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "accuracy" / "accuracy.samples.jsonl"


# -- questions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
def test_donors_stand_as_the_relation_says(relation: Any) -> None:
    for number in range(20):
        question = evaluation.question_of(0, "colour", number, relation)
        assert len(question.grids) == (1 if relation == "single_image" else 2)
        donors = evaluation.donors_of(question, relation, number)
        for ordinal, (grid, donor) in enumerate(zip(question.grids, donors, strict=True)):
            assert donor.grids[donor.index] == grid
            if relation == "lone_donor":
                assert len(donor.grids) == 1
            elif relation == "same_ordinal":
                assert donor.index == ordinal
                assert len(donor.grids) > 1
            else:
                assert relation_of(donor.index, ordinal) == relation


def test_questions_differ_by_number_and_seed_only() -> None:
    def make(seed: int, number: int, relation: Any = "lone_donor") -> Any:
        return evaluation.question_of(seed, "chain", number, relation)

    assert make(0, 1) == make(0, 1, "same_ordinal")
    assert len({make(0, 1), make(0, 2), make(1, 1)}) == 3


def test_tokens_are_counted() -> None:
    question = evaluation.question_of(0, "colour", 0, "lone_donor")
    text = question.text("|" * 38).replace("|", " | ")
    assert evaluation.count_tokens(question) == len(text.split())


def test_cells_and_relations() -> None:
    names = [cell.name for cell in evaluation.cells_of(["first_k", "random_k"], [0.02, 0.05])]
    assert names == ["none@0", "first_k@0.02", "first_k@0.05", "random_k@0.05"]
    assert evaluation.relations_of("has", RELATIONS) == list(RELATIONS[1:])


def test_all_families_get_equally_far() -> None:
    done = [{"family": "has", "numbers": [0, 2]}]
    chunks = evaluation.chunks_left(["colour", "has"], 20, done)
    assert [chunk.family for chunk in chunks] == ["colour", "has", "colour", "has"]
    assert chunks[1].numbers == (1, *range(3, 18))
    assert chunks[3].numbers == (18, 19)
    assert evaluation.chunks_left(["has"], 1, done) == []


# -- statistics ---------------------------------------------------------------------------------


def test_paired_interval_is_bonett_and_price() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mine, full = rng.integers(2, size=(2, 60))
        gained, lost = int((mine > full).sum()), int((mine < full).sum())
        p, q, n = (gained + 1) / 62, (lost + 1) / 62, 62
        half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / n)
        mean, low, high = evaluation.paired_interval(mine - full)
        assert mean == pytest.approx((gained - lost) / 60)
        assert (low, high) == pytest.approx((p - q - half, p - q + half))


def test_paired_interval_agrees_with_a_bootstrap() -> None:
    rng = np.random.default_rng(1)
    differences = rng.choice([-1, 0, 1], p=(0.1, 0.85, 0.05), size=500)
    means = rng.choice(differences, size=(4000, 500)).mean(axis=1)
    _, low, high = evaluation.paired_interval(differences)
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.005)
    _, low, high = evaluation.paired_interval(np.zeros(500))
    assert -0.01 < low < 0 < high < 0.01


def test_rows_are_means_over_questions() -> None:
    cell = evaluation.Cell("first_k", 0.05)

    def record(family: str, questions: Any, values: Any) -> dict[str, Any]:
        entry = {"questions": questions, "cells": {cell.name: values}}
        return {"family": family, "numbers": [], "relations": {"lone_donor": entry}}

    records = [
        record("has", [[1, 90, 72], [0, 92, 72]], [[1, 0, 0.0, 4.0], [1, 1, 0.3, 6.0]]),
        record("same", [[1, 94, 72]], [[0, 1, 0.6, 8.0]]),
        record("chain", [[1, 1, 1]], [[0, 1, 9.0, 9.0]]),
    ]
    timings = [{"lone_donor": {"ratios": {cell.name: ratio}}} for ratio in (0.2, 0.4, 0.9)]
    rows = evaluation.make_rows(records, timings, ["has", "same"], [cell])
    assert [(row["family"], row["policy"]) for row in rows] == [
        (family, policy) for family in ("all", "has", "same") for policy in ("full", "first_k")
    ]
    full, row = rows[:2]
    assert (full["n"], full["kl"], full["flip_rate"], full["difference"]) == (3, 0, 0, 0)
    assert full["exact_match"] == row["exact_match"] == pytest.approx(2 / 3)
    assert (full["tokens_per_layer"], full["image_tokens_per_layer"]) == (92, 72)
    assert row["difference"] == 0
    assert row["flip_rate"] == pytest.approx(2 / 3)
    assert row["kl"] == pytest.approx(0.3)
    assert (row["tokens_per_layer"], row["image_tokens_per_layer"]) == (26, 6)
    assert row["ttft_ratio"] == 0.4
    assert rows[3]["difference"] == 0.5
    assert "ttft_ratio" not in rows[3]


def test_first_k_is_interpolated() -> None:
    rows = [
        {"policy": policy, "image_tokens_per_layer": tokens, "kl": kl}
        for policy, tokens, kl in (("none", 0, 1.0), ("first_k", 4, 0.01), ("random_k", 2, 9.0))
    ]
    assert evaluation.first_k_kl_at(rows, 2) == pytest.approx(0.1)
    assert evaluation.first_k_kl_at(rows, 4) == pytest.approx(0.01)
    assert evaluation.first_k_kl_at(rows, 5) is None


# -- samples ------------------------------------------------------------------------------------


def test_a_truncated_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    samples = evaluation.Samples(path, {"seed": 0}, restart=False)
    samples.add("chunk", 1)
    with path.open("a") as file:
        file.write('{"chunk": 2')
    samples = evaluation.Samples(path, {"seed": 0}, restart=False)
    assert samples.of("chunk") == [1]
    samples.add("chunk", 3)
    assert evaluation.Samples(path, {"seed": 0}, restart=False).of("chunk") == [1, 3]


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"settings": {}}\n{"chunk": \n{"chunk": 1}\n')
    with pytest.raises(evaluation.EvaluationError, match="damaged"):
        evaluation.Samples(path, {}, restart=False)
    assert evaluation.Samples(path, {}, restart=True).records == []


def test_an_interruption_is_continued(
    worker: FakeWorker, arguments: list[str], tmp_path: Path
) -> None:
    worker.limit = 3
    assert evaluation.main(arguments) == 130
    assert not (tmp_path / "results").exists()
    with _samples(tmp_path).open("a") as file:
        file.write('{"chunk": {"fam')
    worker.limit = math.inf
    document = _evaluate(arguments)
    assert document["complete"] is True
    assert document["timed"] == 5
    # The interrupted process lost what it had not kept: at most what was running.
    kept = [c["chunk"] for c in map(json.loads, _samples(tmp_path).open()) if "chunk" in c]
    for family in ("colour", "has"):
        numbers = sorted(n for c in kept if c["family"] == family for n in c["numbers"])
        assert numbers == list(range(40))
    worker.asked.clear()
    assert _evaluate(arguments)["rows"] == document["rows"]
    assert worker.asked == []
    assert _evaluate(arguments, "--restart")["rows"] == document["rows"]
    assert len(worker.asked) == 6


def test_other_settings_are_refused(worker: FakeWorker, arguments: list[str]) -> None:
    _evaluate(arguments)
    with pytest.raises(evaluation.EvaluationError, match=r"seed was 0, now it is 1.*--restart"):
        _evaluate(arguments, "--seed", "1")
    more = _evaluate(arguments, "--questions", "50")
    assert {row["n"] for row in more["rows"] if row["family"] == "colour"} == {50}


def test_time_is_limited(worker: FakeWorker, arguments: list[str]) -> None:
    assert evaluation.main([*arguments, "--minutes", "0"]) == 1
    assert worker.asked == []


# -- results ------------------------------------------------------------------------------------


def test_results(worker: FakeWorker, arguments: list[str], tmp_path: Path) -> None:
    worker.schedules = [[0.5, 0.1]]
    assert evaluation.main(arguments) == 0
    folder = tmp_path / "results"
    names = ["accuracy.json", "accuracy.md", "accuracy.png", "accuracy_kl.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    page = (folder / "accuracy.md").read_text()
    assert "| all | yes: +0.0 (" in page
    assert "in 0 of 22 cases" in page
    assert "| none | 0 | 80 | 75.0% | -25.0 (" in page
    assert "## has: which image" in page
    for name in names[2:]:
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300

    for name in names[1:]:
        (folder / name).unlink()
    assert evaluation.main([*arguments, "--plot-only"]) == 0
    assert (folder / "accuracy.md").read_text() == page


def test_without_schedules_layer_aware_is_left_out(
    worker: FakeWorker, arguments: list[str]
) -> None:
    document = _evaluate(arguments)
    assert {row["policy"] for row in document["rows"]} == {"full", *evaluation.POLICIES} - {
        "layer_aware"
    }
    page = evaluation.make_markdown(document)
    assert "`layer_aware` is left out" in page
    assert "`layer_aware` was not compared" in page


@pytest.mark.parametrize(
    "wrong",
    [
        ["--ratios", "1"],
        ["--questions", "0"],
        ["--relations", "single_image"],
        ["--model", "nowhere"],
    ],
)
def test_wrong_arguments(arguments: list[str], wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        evaluation._parse([*arguments, *wrong])


@pytest.fixture(scope="module")
def untrained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the grid task that attends to its images, but knows nothing."""
    import torch
    import train_grid_vlm as training

    model = training.build_model(training.Recipe(layers=3), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    path = tmp_path_factory.mktemp("model") / "untrained"
    training.write_checkpoint(model, path)
    return path


def test_real_engine(untrained_model: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(SCRIPTS / "eval_accuracy.py"), "--model", str(untrained_model)),
        *("--output", str(tmp_path / "results" / "accuracy"), "--processes", "1"),
        *("--cache-dir", str(tmp_path / "cache"), "--families", "colour", "has"),
        *(
            "--questions",
            "2",
            "--policies",
            "first_k",
            "cacheblend",
            "--ratios",
            "0.2",
            "--timed",
            "16",
        ),
    ]
    samples = _samples(tmp_path)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (
            samples.exists() and '"timing"' in samples.read_text()
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    finally:
        process.kill()
    before = samples.read_text().splitlines()
    assert 2 <= len(before) < 2 + 16
    with samples.open("a") as file:
        file.write('{"timing": ')

    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = samples.read_text().splitlines()
    assert lines[: len(before)] == before
    assert len(lines) == 1 + 16 + 2

    document = json.loads((tmp_path / "results" / "accuracy.json").read_text())
    assert document["complete"] is True
    rows = {(r["family"], r["relation"], r["policy"]): r for r in document["rows"]}
    assert {relation for _, relation, _ in rows} == set(RELATIONS)
    for relation in RELATIONS:
        full, none, first_k, blend = (
            rows["all", relation, policy] for policy in ("full", "none", "first_k", "cacheblend")
        )
        images = 1 if relation == "single_image" else 2
        assert full["image_tokens_per_layer"] == 36 * images
        assert none["image_tokens_per_layer"] == 0
        assert first_k["image_tokens_per_layer"] == 8 * images
        # All tokens of two of three layers, then some.
        assert blend["image_tokens_per_layer"] == pytest.approx((24 + 8 / 3) * images, abs=1e-3)
        assert none["kl"] > first_k["kl"] > 0
        assert first_k["ttft_ratio"] > 0

"""Tests of scripts/gpu_check.py: the matrix, what is judged how, cells that crash; one real run."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check as check
import gpu_exact as exact
import gpu_speed as speed
import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Answer, Ask, Engine

SCRIPT = Path(check.__file__)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}


def test_without_a_gpu_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "exact", "--output", str(tmp_path / "out")],
        env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "gpu_check: no NVIDIA GPU that torch can use; --device cpu runs what can be run without "
        "one\n"
    )
    assert list(tmp_path.iterdir()) == []


# -- the matrix -----------------------------------------------------------------------------


def pairs(cells: list[exact.Cell]) -> set[tuple[str, str]]:
    values = (dataclasses.astuple(cell) for cell in cells)
    return {pair for row in values for pair in itertools.combinations(row, 2)}


def test_the_matrix_is_whole_and_its_first_quarter_has_all_pairs() -> None:
    cells = exact.make_cells()
    assert len(set(cells)) == len(cells) == 2 * 3 * 3 * 2
    assert cells[0] == exact.Cell("V2", "FULL_AND_PIECEWISE", "FLASH_ATTN", "qwen2_5_vl")
    assert pairs(cells[:9]) == pairs(cells)
    assert {cell.backend for cell in exact.make_cells(["TRITON_ATTN"])} == {"TRITON_ATTN"}


def test_a_cell_is_what_its_engine_is_started_with() -> None:
    cell = exact.Cell("V1", "PIECEWISE", "FLASHINFER", "qwen3_vl")
    arguments = exact.engine_arguments(cell, "bfloat16")
    assert arguments["runner"] == "V1"
    assert arguments["attention_backend"] == "FLASHINFER"
    assert arguments["compilation_config"]["cudagraph_mode"] == "PIECEWISE"
    assert not arguments["enforce_eager"]
    eager = exact.engine_arguments(dataclasses.replace(cell, graphs="eager"), "bfloat16")
    assert eager["enforce_eager"]
    assert "compilation_config" not in eager


# -- judging --------------------------------------------------------------------------------


def answer(tokens: list[int], logprobs: list[list[float]]) -> Answer:
    return Answer([1, 2], tokens, np.array(logprobs), None, "length")


def test_answers_are_compared_up_to_where_they_go_apart() -> None:
    one = answer([5, 6, 7], [[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]])
    other = answer([5, 9, 7], [[-1.0, -2.0], [-1.5, -2.0], [-9.0, -9.0]])
    assert exact.distance(one, one) == 0.0
    assert exact.distance(one, other) == 0.5
    assert exact.distance(one, dataclasses.replace(one, prompt=[1])) == math.inf


@pytest.mark.parametrize(
    ("found", "allowed", "wrong", "status"),
    [
        (0.0, 0.0, math.inf, "pass"),
        (0.1, 0.2, 0.5, "pass"),
        (0.3, 0.2, 0.5, "FAIL"),
        (0.1, 0.6, 0.5, "blunt"),
        (math.nan, 0.2, 0.5, "FAIL"),
        (math.inf, 0.2, math.inf, "FAIL"),
    ],
)
def test_a_check_passes_only_if_an_error_would_have_shown(
    found: float, allowed: float, wrong: float, status: str
) -> None:
    assert exact.judge("it", found, allowed, wrong).status == status


# -- cells in processes of their own ----------------------------------------------------------


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Lets a script take the place of a cell; it gets the name of the report."""

    def replace(code: str) -> None:
        script = tmp_path / "cell.py"
        script.write_text(f"import sys, time\nreport = open(sys.argv[-1], 'a')\n{code}\n")
        monkeypatch.setattr(check, "__file__", str(script))

    return replace


PASSED = json.dumps({"invariant": "it", "status": "pass", "distance": 0, "allowed": 0, "note": ""})


def test_a_cell_that_crashes_is_a_line_and_keeps_what_it_had(child: Any, tmp_path: Path) -> None:
    child(f"print('{PASSED}', file=report, flush=True)\nreport.write('{{half')\nraise KeyError(7)")
    outcome = check.run_child("exact", {"name": "a b"}, 60, tmp_path)
    assert (len(outcome.results), outcome.error) == (1, "KeyError: 7")
    assert check.failed([outcome])
    assert [row[2] for row in check.rows_of(outcome)] == ["pass", "FAIL"]


def test_a_cell_that_hangs_is_ended_with_its_children(child: Any, tmp_path: Path) -> None:
    child(
        "import subprocess\n"
        "p = subprocess.Popen(['sleep', '600'])\n"
        "open(report.name + '.pid', 'w').write(str(p.pid))\n"
        "time.sleep(600)"
    )
    start = time.monotonic()
    outcome = check.run_child("exact", {"name": "slow"}, 5, tmp_path)
    assert outcome.error == "not done after 5 s"
    assert time.monotonic() - start < 60
    [written] = tmp_path.glob("*.pid")
    stat = Path(f"/proc/{written.read_text()}/stat")
    with contextlib.suppress(FileNotFoundError):
        # It was killed, which takes a moment.
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() - start < 60
            time.sleep(0.1)


def test_cells_without_time_are_named_and_not_begun(child: Any) -> None:
    child("raise SystemExit('must not run')")
    shown: list[check.Outcome] = []
    options = {"cell_seconds": 60.0, "jobs": 2, "show": shown.append}
    outcomes = check.run_cells("exact", [{"name": "x"}], seconds=20.0, **options)
    assert [check.rows_of(outcome) for outcome in outcomes] == [[("x", "", "no time", "")]]
    assert shown == []
    assert not check.failed(outcomes)


def test_a_run_that_is_given_up_ends_its_cells(child: Any) -> None:
    child("time.sleep(600 if 'slow' in sys.argv[3] else 2)")

    def show(outcome: check.Outcome) -> None:
        raise KeyboardInterrupt

    cells = [{"name": "quick"}, {"name": "slow"}]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        check.run_cells("exact", cells, seconds=900, cell_seconds=800, jobs=2, show=show)
    assert time.monotonic() - start < 60
    assert not check._running


# -- speed ------------------------------------------------------------------------------------


def sample(case: str, system: str, pair: int, ttft: float, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "sample",
        "case": case,
        "system": system,
        "pair": pair,
        "ttft": ttft,
        "engine": ttft / 2,
        "stages": [0.0, 0.0, 0.0, 0.0, ttft, ttft],
        "prompt_tokens": 100,
        "cached_tokens": 60,
        "figures": {"reused_tokens": 90},
        **fields,
    }


def test_rows_are_ratios_within_turns() -> None:
    results = [
        {
            "kind": "facts",
            "weight_bytes": 10e9,
            "kv_bytes_per_token": 10**7,
            "host_to_device": 10e9,
            "device_memory": 1000e9,
        }
    ]
    for pair, slow in enumerate((1.0, 4.0, 1.0)):
        results += [
            sample("one", "plain", pair, 2.0 * slow),
            sample("one", "device", pair, 0.1 * slow),
            sample("one", "cpu", pair, 0.18),
            sample("cold", "plain", pair, 1.0),
            sample("cold", "cpu", pair, 1.05),
            sample("prefix", "plain", pair, 0.04),
        ]
    rows = {row[0]: row[1:] for row in speed.rows_of(results)}
    what = "one known image, 2%: plain / VLCache"
    assert rows[f"{what}, device tier"] == (">= 20x", "20.0x (20.0 to 20.0)", "met")
    assert rows[f"{what}, cpu tier"] == (">= 16x", "11.1x (11.1 to 44.4)", "missed")
    # 90 tokens of 10 MB at 10 GB/s: 0.09 s.
    assert rows["TTFT / floor, cpu tier"] == ("<= 1.5x", "2.000x (2.000 to 2.000)", "missed")
    assert rows["a new image, which is stored: VLCache / plain"][1:] == (
        "1.050x (1.050 to 1.050)",
        "missed",
    )
    assert rows["text only: VLCache / plain"] == ("<= 1.01x", "not measured", "")
    passes = rows["two passes over the weights, against one of as many tokens"]
    assert passes[1] == "+30.0 ms (50.0 - 20.0, 40 tokens)"
    assert ("one, cpu", *["0.0"] * 4, "180.0", "180.0") in speed.stage_rows(results)


def test_nothing_measured_is_said_so() -> None:
    assert {row[2] for row in speed.rows_of([])} == {"not measured"}


def test_an_engine_tells_its_sizes_and_the_stages_of_a_request(
    engines: Callable[..., Engine],
) -> None:
    engine = engines({}, disable_log_stats=False)
    facts = engine.call(speed.facts)
    assert all(value > 0 for value in facts.values())
    sample = engine.call(speed.timed, Ask(f"this {IMAGE} here", ((31, 224),)))
    *stages, ttft = sample["stages"]
    assert 0 < sample["engine"] < sample["ttft"] == ttft
    assert sum(stages) == pytest.approx(ttft)


@pytest.mark.parametrize("name", [name for name, shape in speed.SHAPES.items() if shape.text])
def test_a_shape_is_a_checkpoint_that_transformers_reads(name: str, tmp_path: Path) -> None:
    import transformers

    shape = speed.SHAPES[name]
    folder = speed.make_shape(shape, check.MODELS, tmp_path)
    assert not list(folder.glob("*.safetensors"))
    config = transformers.AutoConfig.from_pretrained(folder)
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert head_dim == 128
    assert 2 * sum(text.rope_parameters["mrope_section"]) == head_dim
    assert config.vision_config.out_hidden_size == text.hidden_size
    assert len(getattr(text, "layer_types", None) or range(text.num_hidden_layers)) == (
        text.num_hidden_layers
    )
    kv_bytes = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
    published = {"qwen2_5_vl_7b": 57_344, "qwen2_5_vl_3b": 36_864, "qwen3_vl_8b": 147_456}
    assert kv_bytes == published[name]
    patch = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    assert (shape.one_px // patch) ** 2 == 10_000
    assert (shape.four_px // patch) ** 2 == 2_500
    processor = transformers.AutoProcessor.from_pretrained(folder)
    size = processor.image_processor.size
    assert size["longest_edge"] >= shape.one_px**2


# -- for real ---------------------------------------------------------------------------------


def test_a_run_on_the_cpu_passes_every_check(tmp_path: Path) -> None:
    output = tmp_path / "exact"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "exact", "--device", "cpu", "--output", str(output)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout
    record = json.loads(output.with_suffix(".json").read_text())
    [cell] = record["cells"]
    statuses = [result["status"] for result in cell["results"]]
    assert cell["error"] is None
    assert statuses.count("pass") == len(statuses) - 1 == 13
    assert "| V2 eager CPU_ATTN qwen2_5_vl | ratio 1.0 equals plain | pass |" in (
        output.with_suffix(".md").read_text()
    )

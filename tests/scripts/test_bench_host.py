"""Tests of scripts/bench_host.py: short runs, and that the host's work grows with runs only."""

import json
from pathlib import Path
from typing import Any

import bench_host as bench
import pytest

LAYERS = 2


@pytest.fixture(scope="module")
def cells() -> dict[str, dict[str, Any]]:
    """By the prompts' names."""
    arguments = ["--tokens", "1000", "10000", "--layers", str(LAYERS), "--repetitions", "1"]
    found = bench.measure_apart(bench.ROOT, arguments)
    return {cell["prompt"]["name"]: cell for cell in found}


def test_parts_of_known_images_are_measured(cells: dict[str, dict[str, Any]]) -> None:
    assert list(cells) == [
        "1,000 tokens",
        "10,000 tokens",
        "10,000 tokens in 10 images",
        "10,000 tokens, text inside",
    ]
    for cell in cells.values():
        # Text inside an image is recomputed or reused as its other tokens are.
        assert cell["reused_tokens"] >= 0.98 * cell["prompt"]["tokens"]
        assert cell["recomputed_tokens"] >= 0.02 * cell["prompt"]["tokens"]
        [run] = cell["runs"]
        # Everything but the difference that one pickle makes.
        assert {name for name, seconds in run.items() if seconds > 0} >= {
            *bench.PARTS,
            *bench.APART,
        } - {bench.METADATA}


def test_python_executes_no_more_for_more_tokens(cells: dict[str, dict[str, Any]]) -> None:
    """But for the blocks behind the fence, each of which has a hash, and the store's objects."""
    small, large, inside = (
        dict(cells[name]["bytecodes"])
        for name in ("1,000 tokens", "10,000 tokens", "10,000 tokens, text inside")
    )
    blocks = 10_000 / bench.BLOCK
    assert large.pop("scheduler/fence.py") < 40 * blocks
    small.pop("scheduler/fence.py")
    assert sum(large.values()) < 1.1 * sum(small.values())
    # 100 stretches of rows, with a text token between two.
    inside.pop("scheduler/fence.py")
    assert sum(inside.values()) < sum(large.values()) + 100 * 300


def test_a_run_of_two_packages_writes_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "host"
    arguments = ["--tokens", "200", "--layers", str(LAYERS), "--repetitions", "2", "--rounds", "1"]
    assert bench.main([*arguments, "--against", str(bench.ROOT), "--output", str(output)]) == 0
    document = json.loads(output.with_suffix(".json").read_text())
    assert document["complete"]
    assert [len(cell["runs"]) for cell in document["cells"]["before"]] == [2] * 3
    assert [len(cell["runs"]) for cell in document["cells"]["after"]] == [2] * 3
    text = output.with_suffix(".md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert "## 200 tokens: " in text
    assert "| | before | after |" in text
    for part in bench.PARTS:
        assert f"| {part} | " in text


def test_a_folder_without_the_package_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--against", str(tmp_path), "--output", str(tmp_path / "host")])
    assert f"--against {tmp_path}: not a checkout" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_not_charged_for_what_runs_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    stopwatch = bench.Stopwatch()
    inner = stopwatch.timed("inner", lambda: "done")
    outer = stopwatch.timed("outer", lambda: inner())
    assert outer() == "done"
    assert stopwatch.seconds == {"outer": 1.0 + 4.0, "inner": 2.0}


def test_bytecodes_of_the_package_alone_are_counted() -> None:
    from vlcache_connector.protocol import Span, uncovered

    bytecodes = bench.Bytecodes()
    with bytecodes.counting():
        sorted(range(100), key=lambda number: -number)
    assert bytecodes.total == 0
    with bytecodes.counting():
        uncovered(Span(0, 10), [Span(2, 4)])
    assert bytecodes.by_file.keys() == {"protocol.py"}
    once = bytecodes.total
    with bytecodes.counting():
        uncovered(Span(0, 10), [Span(2, 4)])
    assert bytecodes.total == 2 * once > 0

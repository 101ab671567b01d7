"""Tests of scripts/bench_workload.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_workload as bench
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.quick_start import QUICK_START

SCRIPTS = Path(__file__).parents[2] / "scripts"


small = st.integers(1, 5)
scales = st.fixed_dictionaries(
    {
        "users": small,
        "turns": small,
        "images": st.integers(2, 6),
        "documents": small,
        "pages": small,
        "questions": st.integers(1, 40),
        "rates": st.lists(st.integers(0, 100), min_size=1, max_size=4).map(tuple),
        "requests": small,
    }
)


@given(scale=scales)
def test_no_image_is_twice_at_the_same_place(scale: dict[str, Any]) -> None:
    elsewhere: set[int] = set()
    for workload in bench.make_workloads(bench.Scale(**scale)):
        places: list[tuple[int, int, int]] = []
        for prompt in (*workload.primed, *workload.prompts):
            assert len(set(prompt.images)) == len(prompt.images)
            places += [(image, slot, prompt.fillers) for slot, image in enumerate(prompt.images)]
        assert len(set(places)) == len(places)
        mine = {image for image, _, _ in places}
        assert not mine & elsewhere
        elsewhere |= mine


@given(scale=scales)
def test_repeats(scale: dict[str, Any]) -> None:
    made = bench.Scale(**scale)
    window, documents, *repeats = bench.make_workloads(made)

    assert len(window.prompts) == made.users * made.turns
    for number, prompt in enumerate(window.prompts[made.users :]):
        before = window.prompts[number].images  # the user's turn before
        assert prompt.images[:-1] == before[1:]
        assert prompt.images[-1] not in before

    assert len(documents.prompts) == made.questions
    for number, prompt in enumerate(documents.prompts):
        same = documents.prompts[number % made.documents].images
        assert sorted(prompt.images) == sorted(same)
        assert len(prompt.images) == made.pages

    assert [workload.rate for workload in repeats] == list(made.rates)
    for workload in repeats:
        slots = made.requests * made.images
        assert len(workload.prompts) == made.requests
        assert round(workload.repeated * slots) == round(workload.rate * slots / 100)


def test_repeated_share() -> None:
    def share(*orders: list[int], primed: int = 0) -> float:
        prompts = bench.shifted(orders)
        return float(bench.Workload("", prompts[primed:], prompts[:primed]).repeated)

    assert share([1, 2], [3, 4]) == 0.0
    assert share([1, 2], [2, 3]) == 0.25
    assert share([1, 2], [2, 3], primed=1) == 0.5
    scale = bench.Scale()
    assert [w.repeated for w in bench.make_workloads(scale)[2:]] == [r / 100 for r in scale.rates]


def test_dataset(tmp_path: Path) -> None:
    """The rows are what vLLM's dataset class takes, and it sends them as they are."""
    from vllm.benchmarks.datasets import CustomImageDataset

    prompts = bench.shifted([[1, 2], [2, 3], [2, 3]])
    workload = bench.Workload("repeat 50 %", prompts[1:], prompts[:1])
    path = bench.write_dataset(workload, tmp_path, 112)
    dataset = CustomImageDataset(dataset_path=str(path), disable_shuffle=True)
    requests = dataset.sample(tokenizer=None, num_requests=2, ensure_client_side_data=True)
    sent = [request.prompt for request in requests]
    assert [[part["type"] for part in parts] for parts in sent] == [
        ["text", "image_url", "text", "image_url", "text"]
    ] * 2
    urls = [[p["image_url"]["url"] for p in parts if p["type"] == "image_url"] for parts in sent]
    assert urls[0] == urls[1]
    assert urls[0][0] != urls[0][1]
    assert all(url.startswith("data:image/png;base64,") for url in urls[0])
    fronts = [parts[0]["text"] for parts in sent]
    assert [front[:15] for front in fronts] == ["Request 000001.", "Request 000002."]
    assert len(fronts[0]) != len(fronts[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "0"], "--users 0: must be at least 1"),
        (["--images", "1"], "--images 1: must be at least 2"),
        (["--output-tokens", "0"], "--output-tokens 0: must be at least 1"),
        (["--rates", "50", "101"], "--rates 101: must be between 0 and 100"),
        (["--image-px", "450"], "--image-px 450: must be a multiple of 28, 112 to 1792"),
        (["--systems", "ec"], "--systems ec: plain must be among them"),
        (["--workloads", "chat"], "argument --workloads: invalid choice: 'chat'"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_foreign_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert bench.main(["--plot-only", "--output", str(tmp_path / "other")]) == 1
    assert "was not written by this version of bench_workload.py" in capsys.readouterr().err


def _run(workload: str, system: str, texts: list[str]) -> dict[str, Any]:
    return {"workload": workload, "system": system, "texts": texts}


def test_groups() -> None:
    assert bench._groups(["plain", "vlcache-disk"], 2) == {"plain": ["vlcache-disk"], "plain-2": []}
    groups = bench._groups(bench.SYSTEMS, 2)
    assert list(groups.values()) == [
        ["ec", "lmcache"],
        *([list(bench.VLCACHE[i : i + 2]) for i in (0, 2)]),
    ]
    runs = [
        {"system": name, "plain": plain} for plain in groups for name in (plain, *groups[plain])
    ]
    assert bench._systems(reversed(runs)) == [run["system"] for run in runs]


def test_agreement() -> None:
    mine = _run("window", "vlcache-cpu", ["a", "b", "c", "d"])
    plain = _run("window", "plain", ["a", "b", "c", "x"])
    assert bench.agreement([mine, _run("documents", "plain", ["a"])], mine) is None
    assert bench.agreement([_run("documents", "plain", ["y"] * 4), plain, mine], mine) == 0.75


def test_reduced_run(tmp_path: Path) -> None:
    output = tmp_path / "results" / "workload"
    command = [
        *(sys.executable, str(SCRIPTS / "bench_workload.py"), "--size", "tiny"),
        *("--image-px", "224", "--systems", "plain", "vlcache-disk"),
        *("--workloads", "window", "repeat", "--users", "2", "--turns", "2", "--images", "3"),
        *("--rates", "100", "--requests", "1", "--output-tokens", "2"),
        "--always-reuse",
        *("--output", str(output), "--cache-dir", str(tmp_path / "cache")),
    ]
    process = subprocess.run(
        command,
        env=os.environ | QUICK_START,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]

    document = json.loads(output.with_name("workload.json").read_text())
    assert document["complete"] is True
    assert document["not_run"] == {}
    runs = {(run["workload"], run["system"]): run for run in document["runs"]}
    systems = ["plain", "vlcache-disk", "plain-2"]
    assert set(runs) == {(name, s) for name in ("window", "repeat 100 %") for s in systems}
    for (workload, system), run in runs.items():
        requests = 4 if workload == "window" else 1
        assert run["requests"] == len(run["ttfts"]) == len(run["texts"]) == requests
        assert 0 < run["ttft"]["p50"] <= run["ttft"]["p95"] <= run["ttft"]["p99"]
        assert run["prompt_tokens"] == runs[workload, "plain"]["prompt_tokens"]
        assert 192 * requests < run["prompt_tokens"] < 192 * requests + 256 * requests
        if system.startswith("plain"):
            # Prefix caching alone serves nothing.
            assert run["computed_tokens"] == run["prompt_tokens"]
            assert run["reused_tokens"] == {}
        else:
            known = 4 if workload == "window" else 3
            reused = sum(run["reused_tokens"].values())
            assert 0 < reused <= known * (64 - 8)  # of each image, 8 tokens are recomputed
            assert run["computed_tokens"] == run["prompt_tokens"] - reused
            assert run["sparse_prefill_tokens"] >= reused / (64 - 8) * 8
            assert sum(run["lookups"].values()) == 3 * requests
    assert [runs["window", system]["plain"] for system in systems] == ["plain"] * 2 + systems[2:]
    page = output.with_name("workload.md").read_text()
    assert "## Window: 4 requests, 33% of the images known" in page
    with Image.open(output.with_name("workload.png")) as picture:
        assert picture.format == "PNG"
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {"models", "logs"}

"""Tests of scripts/bench_ttft.py."""

import json
from pathlib import Path
from typing import Any

import bench_ttft as bench
import pytest
from PIL import Image

from tests.helpers.quick_start import QUICK_START
from tests.helpers.script import run_script


def _sample(pair: int, system: str, ttft: float, **fields: Any) -> Any:
    sample = {
        "kind": "warm",
        "image_px": 1120,
        "images": 2,
        "image_tokens": 3200,
        "pair": pair,
        "system": system,
        "ratio": 0.05 if system == "vlcache" else None,
        "ttft": ttft,
        "seconds": ttft + 0.01,
        "prompt_tokens": 3270,
        "idle_server_cpu": 0.0,
        "other_cpu": 0.01,
        "engine": ttft - 0.05,
    }
    return bench.Sample(**(sample | fields))


def _document(path: Path) -> dict[str, Any]:
    about = {
        "started": "2026-01-01T00:00:00+00:00",
        "command": "python scripts/bench_ttft.py",
        "servers": {},
        "git": {"commit": None, "changed": False},
        "versions": {"python": "3.11.0"},
        "machine": {"cpu": "CPU", "cores": 2},
        "settings": {"model": "model", "dtype": "float32"},
    }
    record = bench.Record(path, about)
    text = {"kind": "text", "image_px": 0, "images": 0, "image_tokens": 0, "prompt_tokens": 90}
    for pair, (plain, mine) in enumerate([(2.0, 0.1), (4.0, 0.5), (3.0, 0.2)]):
        record.add(
            [_sample(pair, "plain", plain), _sample(pair, "vlcache", mine)]
            + [_sample(pair, "plain", 0.05, kind="repeat")] * (pair == 0)
        )
    record.add(
        [
            _sample(3, "vlcache", 0.11, ratio=None, **text),
            _sample(3, "plain", 0.10, **text),
        ]
    )
    document: dict[str, Any] = record.document
    return document


def test_quick(tmp_path: Path) -> None:
    output = tmp_path / "results" / "ttft"
    arguments = [
        *("--quick", "--size", "tiny"),
        *("--repetitions", "2", "--text-repetitions", "2", "--ratios", "0.05", "0.5"),
        *("--pause", "0", "--sizes", "280", "560"),
        *("--output", str(output), "--cache-dir", str(tmp_path / "cache")),
    ]
    run_script("bench_ttft.py", *arguments, env=QUICK_START)

    document = json.loads(output.with_name("ttft.json").read_text())
    assert document["complete"] is True
    assert document["left_out"] == []
    assert "--quick --size tiny" in document["command"]
    assert set(document["servers"]) == {"plain", "vlcache"}
    assert "VLCacheConnector" in document["servers"]["vlcache"]
    assert "VLCacheConnector" not in document["servers"]["plain"]
    assert document["versions"]["vllm"]
    assert document["machine"]["cores"] >= 1
    samples = document["samples"]
    assert all(0 < s["engine"] < s["ttft"] <= s["seconds"] for s in samples)
    assert {s["prompt_tokens"] for s in samples if s["kind"] == "text"} != set()
    counts = {
        kind: sum(s["kind"] == kind for s in samples) for kind in ("cold", "warm", "text", "repeat")
    }
    # Two sizes, one or two images, two ratios and plain vLLM.
    assert counts == {"cold": 2 * 2 * 2, "warm": 2 * 2 * 2 * 3, "text": 2 * 2 * 2, "repeat": 8}
    # Within a pair, prompts differ, but not in length.
    for pair in {s["pair"] for s in samples}:
        members = [s for s in samples if s["pair"] == pair]
        assert len({s["prompt_tokens"] for s in members}) == 1
        assert [s["system"] for s in members if s["kind"] != "repeat"].count("plain") == 1
    assert len(document["figures"]) == 2 * 2 * 2
    for entry in document["figures"]:
        image_tokens = entry["images"] * (entry["image_px"] // 28) ** 2
        assert entry["reused_tokens"] + entry["recomputed_tokens"] == image_tokens
        assert entry["recomputed_tokens"] == pytest.approx(image_tokens * entry["ratio"], abs=16)

    page = output.with_name("ttft.md").read_text()
    assert "| 560 px | 2 |" in page
    assert "| text only |" in page
    with Image.open(output.with_name("ttft.png")) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "ttft.json",
        "ttft.md",
        "ttft.png",
    ]


def test_an_interruption_says_where_the_measurements_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*_: Any) -> None:
        _document(tmp_path / "ttft.json")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    assert bench.main(["--output", str(tmp_path / "ttft")]) == 130
    assert str(tmp_path / "ttft.json") in capsys.readouterr().err
    assert bench.read_document(tmp_path / "ttft.json", bench.SCHEMA, "x")["complete"] is False


def test_ratios_are_taken_within_pairs(tmp_path: Path) -> None:
    document = _document(tmp_path / "ttft.json")
    text, warm = bench.make_cells(bench.samples_of(document))
    assert (warm.pairs, warm.ratio, warm.image_tokens) == (3, 0.05, 3200)
    assert warm.plain == bench.Spread(3.0, 2.0, 4.0)
    assert (warm.speed_up.median, warm.speed_up.low, warm.speed_up.high) == pytest.approx(
        (15.0, 8.0, 20.0)
    )
    assert text.overhead.median == pytest.approx(1.1)
    assert [met for _, _, met in bench.make_aims([text, warm])] == [False, True]


def test_plot_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ttft.json"
    document = _document(path)
    assert bench.read_document(path, bench.SCHEMA, "x") == document
    assert bench.main(["--plot-only", "--output", str(tmp_path / "ttft")]) == 0
    page = (tmp_path / "ttft.md").read_text()
    assert "15.0 (8.0-20.0)" in page
    assert "interrupted" in page
    with Image.open(tmp_path / "ttft.png") as picture:
        assert picture.format == "PNG"
    assert "15.0" in capsys.readouterr().out


def test_cells_that_would_take_too_long_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    def send(self: Any, request: Any, content: Any, system: str, ratio: float | None) -> Any:
        tokens = request.images * request.image_px**2
        self._seconds_left -= tokens / 1e6
        sent.append((request.kind, request.image_px, request.images))
        return _sample(self._pair, system, 1.0, kind=request.kind)

    monkeypatch.setattr(bench.Bench, "_warm_up", lambda _: None)
    monkeypatch.setattr(bench.Bench, "_take_figures", lambda *_: None)
    monkeypatch.setattr(bench.Bench, "_send", send)
    server = type("Server", (), {"process_group": 1})()
    matrix = bench.Matrix((280, 560, 1120), (1, 2), (0.05,), 2, 3)
    record = bench.Record(tmp_path / "ttft.json", {})
    servers = dict.fromkeys(bench.SYSTEMS, server)
    measuring = bench.Bench(None, servers, matrix, record, lambda *_: None, seconds=20.0)
    measuring.measure()

    left_out = {tuple(cell.values()) for cell in record.document["left_out"]}
    assert left_out == {("cold", 1120, 1), ("warm", 1120, 1), ("warm", 1120, 2)}
    assert not left_out & set(sent)
    assert ("warm", 560, 2) in sent
    assert sent.count(("text", 0, 0)) == 2 * 2 * 3
    assert measuring._done == matrix.count_pairs()


def test_bad_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--plot-only", "--output", str(tmp_path / "ttft")]
    assert bench.main(command) == 1
    assert "ttft.json" in capsys.readouterr().err
    for content, message in (("{", "is not JSON"), ('{"schema": 0}', "was not written by")):
        (tmp_path / "ttft.json").write_text(content)
        assert bench.main(command) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "450"], "--sizes 450: must be a multiple of 28, 56 to 1792"),
        (["--sizes", "1820"], "--sizes 1820"),
        (["--images", "5"], "--images 5: must be between 1 and 4"),
        (["--ratios", "1.5"], "--ratios 1.5: must be between 0 and 1"),
        (["--repetitions", "0"], "--repetitions 0: must be at least 1"),
        (["--model", "nowhere"], "--model nowhere: there is no config.json in it"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err

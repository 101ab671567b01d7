"""Tests of scripts/bench_media.py."""

import io
import json
from pathlib import Path
from typing import Any

import bench_media as bench
import pytest
from PIL import Image

from tests.helpers.script import run_script


def _samples(repetition: int, is_known: bool = True, **milliseconds: float) -> list[Any]:
    return [
        bench.Sample("photo", "4K", "PNG", is_known, name, repetition, 10**6, ms / 1000, 1.0)
        for name, ms in milliseconds.items()
    ]


def test_ratios_are_taken_within_rounds() -> None:
    samples = [
        *_samples(0, plain=100, off=110, on=10),
        *_samples(1, on=40, plain=200, off=200),
        *_samples(2, plain=1),  # interrupted
        *_samples(0, is_known=False, plain=300, off=300, on=300),
    ]
    known, unknown = bench.cells_of(samples)
    on = known.ratios["on"]
    assert (on.median, on.low, on.high) == pytest.approx((0.15, 0.1, 0.2))
    assert known.ratios["off"].median == pytest.approx(1.05)
    assert known.seconds["plain"].median == pytest.approx(0.15)
    assert (known.is_known, unknown.is_known) == (True, False)
    assert unknown.ratios["on"].median == 1


@pytest.mark.parametrize("image_format", bench.FORMATS)
def test_bytes_behind_the_end_are_no_part_of_the_picture(image_format: str) -> None:
    data = bench.file_of(bench.picture("screen", 448, 448), image_format)
    with Image.open(io.BytesIO(data)) as one, Image.open(io.BytesIO(data + b"12345678")) as other:
        assert one.size == (448, 448)
        assert one.tobytes() == other.tobytes()


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--repetitions", "0"], "--repetitions must be above 0"),
        (["--systems", "on"], "--systems on: plain must be among them"),
    ):
        with pytest.raises(SystemExit, match="2"):
            bench.main(arguments)
        assert message in capsys.readouterr().err


def test_reduced_run(tmp_path: Path) -> None:
    output = tmp_path / "results" / "media"
    arguments = [
        *("--sizes", "448 px", "--repetitions", "1"),
        *("--systems", "plain", "on"),
        *("--output", str(output), "--cache-dir", str(tmp_path / "cache")),
    ]
    printed = run_script("bench_media.py", *arguments)
    document = json.loads(output.with_suffix(".json").read_text())
    assert document["complete"] is True
    samples = [bench.Sample(**entry) for entry in document["samples"]]
    kinds = len(bench.PICTURES) * len(bench.FORMATS) * 2
    assert len(samples) == kinds * 2
    assert len(bench.cells_of(samples)) == kinds
    assert all(0 < sample.to_first_step < sample.to_answer for sample in samples)
    assert len(document["lookups"]) == kinds / 2
    assert all(0 < entry["lookup"] < entry["decode"] for entry in document["lookups"])
    page = output.with_suffix(".md").read_text()
    assert page in printed
    assert "| picture | size | file | plain | on | on / plain |" in page
    assert "| photo | 448 px | PNG, 0." in page
    left = [path for path in (tmp_path / "cache").iterdir() if path.name != "models"]
    assert left == []  # no server's folder

"""The demo, from its command line, against real `vllm serve` processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.quick_start import QUICK_START

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "scripts" / "demo.py"


def _demo(*args: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), *args],
        cwd=ROOT,
        env=os.environ | QUICK_START | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _servers(model_root: Path) -> list[str]:
    """Command lines of running processes that serve a model below `model_root`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(model_root) in command and "serve" in command.split():
            found.append(command)
    return found


def test_demo_with_the_tiny_model(tmp_path: Path) -> None:
    figures_path = tmp_path / "figures.json"
    done = _demo(
        *("--size", "tiny", "--variants", "1"),
        *("--cache-dir", str(tmp_path), "--json", str(figures_path)),
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert _servers(tmp_path) == []

    rows = json.loads(figures_path.read_text())["rows"]
    assert len(rows) == 6
    # The table shows what the figures say.
    lines = [re.split(r"\s*│\s*", line.strip("│ ")) for line in done.stdout.splitlines()]
    cells = {line[0]: line[1:4] for line in lines if len(line) == 9}
    assert len(cells) == len(rows)
    for row in rows:
        names = ("prompt_tokens", "reused_tokens", "recomputed_tokens")
        assert cells[row["request"]] == [str(row[name]) for name in names]

    image_tokens = (336 // 28) ** 2
    cold, reordered, shifted, twice, partly_new, text = rows
    for row, known in ((reordered, 2), (shifted, 1), (twice, 2), (partly_new, 2)):
        assert row["warm"]
        # All of a known image is either reused or recomputed: 5 %, but not less than 8 tokens.
        assert row["recomputed_tokens"] == known * 8
        assert row["reused_tokens"] == known * (image_tokens - 8)
        assert row["same_first_token_at_ratio_1"] == [2, 2]
        assert row["largest_logprob_difference_when_exact"] < 1e-4
    for row in (cold, text):
        assert not row["warm"]
        assert row["reused_tokens"] == row["recomputed_tokens"] == 0
        assert row["same_first_token"] == [2, 2]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--recompute-ratio", "1.5"], "--recompute-ratio"),
        (["--variants", "0"], "--variants"),
        (["--image-px", "100"], "--image-px"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--size", "huge"], "--size"),
    ],
)
def test_wrong_command_lines_are_refused(args: list[str], named: str) -> None:
    done = _demo(*args, timeout=120)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr

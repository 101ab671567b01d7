"""Tests of scripts/bench_kernels.py: what it says without a GPU, and how it shows results."""

import os
import subprocess
import sys
from pathlib import Path

import bench_kernels as bench

SCRIPT = Path(bench.__file__)


def test_without_a_gpu_one_line_and_no_results(tmp_path: Path) -> None:
    output = tmp_path / "kernels"
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(output)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "bench_kernels: no GPU that torch can use; there is nothing to measure\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_bytes_of_a_pass() -> None:
    """Qwen2.5-VL-7B in bfloat16 has 57,344 bytes per token, here read and written."""
    assert bench.pass_bytes(1, 28, 4, 128, 2, 2) == 2 * 57_344 + 28 * 8
    assert bench.pass_bytes(100, 1, 4, 128, 2, 1) == 100 * (4 * 128 * 2 * 3 + 8)


def test_a_line_says_time_amount_rate_and_share() -> None:
    cells = [bench.Cell(1024, 28, 0.0005, 1_000_000_000), bench.Cell(64, 1, 1e-5, 2_000_000)]
    text = bench.markdown("NVIDIA X", "bfloat16, 4 KV heads of 128", 4e12, cells)
    assert "NVIDIA X; bfloat16, 4 KV heads of 128. A copy on the device moves 4,000 GB/s" in text
    assert text.splitlines()[-2:] == [
        "| 1,024 | 28 | 0.500 ms | 1,000.0 MB | 2,000 GB/s | 50% |",
        "| 64 | 1 | 0.010 ms | 2.0 MB | 200 GB/s | 5% |",
    ]

"""vlcache calibrate, then verify, as commands with engines of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vlcache_connector.calibration import (
    Calibration,
)
from vlcache_connector.measure.calibrate import BUDGETS


def test_calibrate_then_verify_a_tiny_model(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "tiny.yaml"
    # Compiling the few operations that vLLM compiles in eager mode too takes longer than this test.
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "LMCACHE_TRACK_USAGE": "false",
    }

    def vlcache(*arguments: str) -> str:
        done = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("vlcache")), *arguments),
                *("--model", str(tiny_model()), "--output", str(output)),
                *("--requests", "1", "--image-size", "112"),
            ],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    vlcache("calibrate")
    calibrated = Calibration.load(output)
    assert [schedule.ratio for schedule in calibrated.schedules] == list(BUDGETS)
    assert all(schedule.kl is not None for schedule in calibrated.schedules)

    # With this selector the connector itself takes the file, or does not start.
    printed = vlcache("verify", "--selector", "layer_aware")
    verified = Calibration.load(output)
    assert verified.model == calibrated.model
    assert verified.schedules == calibrated.schedules
    assert verified.verification is not None
    assert f"Verdict: {verified.verification.verdict}" in printed

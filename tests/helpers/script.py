"""Runs a program of `scripts/`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run_script(name: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """What it prints; it has to end well, within 15 minutes."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments],
        env=os.environ | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout

#!/usr/bin/env python
"""Put another release of vLLM into .venv/vllm-VERSION, for CPUs that no wheel of it is made for.

The Python files are those of that release's wheel, the compiled ones those of the CPU build that is
installed: what they do has to be the same in both. A process that finds the folder first in
`PYTHONPATH` runs that release. Packages that it needs and the installed one does not, and that have
to do with no GPU, are installed.

Usage::

    PYTHONPATH=$(python scripts/overlay_vllm.py 0.33.0) vllm --version
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {"0.33.0": ("orjson>=3.11.6",)}
"""By release: what it imports on a CPU, and vLLM 0.32 does not."""


def overlay(version: str, wheel: Path, installed: Path, target: Path) -> None:
    """Make `target`, whole or not at all.

    Args:
        version: of the wheel.
        wheel: a release's.
        installed: the package `vllm` that the compiled files come from.
        target: a new folder, for `PYTHONPATH`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and not name.endswith(".so"):
                    archive.extract(name, work)
        for compiled in installed.rglob("*.so"):
            there = work / "vllm" / compiled.relative_to(installed)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(compiled, there)
        # vLLM tells by its version that it is a CPU build.
        info = work / f"vllm-{version}+cpu.dist-info"
        info.mkdir()
        about = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        (info / "METADATA").write_text(about, encoding="utf-8")
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _installed() -> Path:
    """The package `vllm`, which takes seconds to import."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("version", choices=NEEDED)
    version = parser.parse_args().version
    target = ROOT / ".venv" / f"vllm-{version}"
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        with tempfile.TemporaryDirectory(dir=ROOT / ".venv") as folder:
            only = ("--no-deps", "--only-binary", ":all:", "--dest", folder)
            subprocess.run([*pip, "download", *only, f"vllm=={version}"], check=True)
            subprocess.run([*pip, "install", *NEEDED[version]], check=True)
            [wheel] = Path(folder).glob("*.whl")
            overlay(version, wheel, _installed(), target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())

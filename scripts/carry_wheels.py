#!/usr/bin/env python
"""Gather the wheels that vLLM and VLCache need on a bare GPU machine, as parts of limited size.

For a machine without a network that has Python, torch with CUDA and Triton already:

    scripts/carry_wheels.py carried/          # here: parts, checksums, install.sh
    sh carried/install.sh                     # there: joins, checks and installs them

vLLM's own wheel is packed anew without its FlashAttention libraries, which are most of it, and
what only they, other kernels or torch itself need is left out. So vLLM has to be told
`--attention-backend TRITON_ATTN` there. Its other compiled code uses torch's stable ABI, which
newer and older releases of torch load, within limits: the last release that is pinned to torch 2.11
is 0.26.0, should a newer one not load (`--vllm 0.26.0`; VLCache itself needs 0.32).
"""

from __future__ import annotations

import argparse
import base64
import configparser
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PART_BYTES = 60 << 20
STRIPPED = re.compile(r"(^|/)(vllm_flash_attn/.*\.so|_vllm_fa\d+_C[^/]*\.so)$")
"""FlashAttention's libraries in vLLM's wheel."""
ON_THE_MACHINE = re.compile(r"(torch|triton|nvidia-.*|cuda-.*|cupy-.*)$")
NOT_NEEDED = re.compile(
    r"(torchaudio|torchcodec|torchvision|flashinfer-.*|tilelang|quack-kernels|tokenspeed-mla"
    r"|humming-kernels|pynvvideocodec|fastsafetensors|instanttensor)$"
)
"""Kernels and loaders that TRITON_ATTN and images get by without. torchvision comes by itself, in
the release that goes with the machine's torch."""
INSTALL = """\
#!/bin/sh
# Joins the parts, checks them, and installs the wheels over the machine's own torch and Triton.
set -eu
cd "$(dirname "$0")"
sha256sum -c SHA256SUMS
mkdir -p wheels
cat wheels.tar.* | tar -x -C wheels
# Without dependencies: vLLM names another torch than the machine has.
python3 -m pip install --no-index --no-deps wheels/*.whl
"""


def target_options(python: str) -> list[str]:
    """pip's options for wheels of another machine."""
    platforms = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
    return [
        *("--only-binary=:all:", "--python-version", python, "--implementation", "cp"),
        *(option for platform in platforms for option in ("--platform", platform)),
    ]


def pip(*arguments: str) -> str:
    """Run pip; its output."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-input", "--quiet"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def own_requirements() -> list[str]:
    """What VLCache needs besides vLLM, from its own metadata."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    return [line for line in lines if not re.match(r"(vllm|torch|triton)\b", line)]


def wanted(report: dict[str, Any], roots: Iterable[str], python: str) -> list[str]:
    """What has to be carried of all that pip would install.

    Args:
        report: of `pip install --report`.
        roots: requirements that it was made for.

    Returns:
        "name==version", of what `roots` need without the packages that are left out.
    """
    known = {
        canonicalize_name(entry["metadata"]["name"]): entry["metadata"]
        for entry in report["install"]
    }
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    found: set[str] = set()
    queue = [Requirement(root) for root in roots]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in known or ON_THE_MACHINE.match(name) or NOT_NEEDED.match(name):
            continue
        entry = f"{name}[{','.join(sorted(requirement.extras))}]"
        if entry in found:
            continue
        found.add(entry)
        for line in known[name].get("requires_dist", []):
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(
                needed.marker.evaluate(environment | {"extra": extra}) for extra in extras
            ):
                queue.append(needed)
    names = {entry.partition("[")[0] for entry in found}
    return sorted(f"{name}=={known[name]['version']}" for name in names)


def strip_wheel(source: Path, target: Path) -> list[str]:
    """Write a wheel without FlashAttention's libraries, and its RECORD without their lines.

    Returns:
        The names of what was left out.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        left_out = [name for name in old.namelist() if STRIPPED.search(name)]
        for info in old.infolist():
            if info.filename in left_out:
                continue
            content = old.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                rows = csv.reader(io.StringIO(content.decode()))
                text = io.StringIO()
                kept = (row for row in rows if row and row[0] not in left_out)
                csv.writer(text, lineterminator="\n").writerows(kept)
                content = text.getvalue().encode()
            new.writestr(info, content, compress_type=zipfile.ZIP_DEFLATED)
    return left_out


def check_record(wheel: Path) -> None:
    """Compare a wheel with its RECORD.

    Raises:
        ValueError: a file is missing, or differs.
    """
    with zipfile.ZipFile(wheel) as archive:
        [record] = [n for n in archive.namelist() if n.endswith(".dist-info/RECORD")]
        for name, digest, _ in csv.reader(io.StringIO(archive.read(record).decode())):
            if not digest:
                continue
            algorithm, _, expected = digest.partition("=")
            try:
                actual = hashlib.new(algorithm, archive.read(name)).digest()
            except KeyError:
                raise ValueError(f"{wheel.name}: RECORD names {name}, which is not there") from None
            if base64.urlsafe_b64encode(actual).decode().rstrip("=") != expected:
                raise ValueError(f"{wheel.name}: {name} differs from RECORD")


class _Parts(io.RawIOBase):
    """A file to write to that becomes parts of at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._left = 0
        self._file: Any = None
        self.paths: list[Path] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        while view:
            if not self._left:
                self._next()
            piece = view[: self._left]
            self._file.write(piece)
            self._left -= len(piece)
            view = view[len(piece) :]
        return len(data)

    def _next(self) -> None:
        self.finish()
        self.paths.append(self._folder / f"wheels.tar.{len(self.paths):03}")
        self._file = self.paths[-1].open("wb")
        self._left = self._limit

    def finish(self) -> None:
        """Close the last part."""
        if self._file is not None:
            self._file.close()


def pack(wheels: Sequence[Path], folder: Path, limit: int = PART_BYTES) -> list[Path]:
    """Write parts, SHA256SUMS and install.sh to `folder`; the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("wheels.tar.*"):
        stale.unlink()
    parts = _Parts(folder, limit)
    with tarfile.open(fileobj=parts, mode="w|") as archive:
        for wheel in sorted(wheels):
            archive.add(wheel, wheel.name)
    parts.finish()
    lines = (f"{_sha256(path)}  {path.name}\n" for path in parts.paths)
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    (folder / "install.sh").write_text(INSTALL, encoding="utf-8")
    return parts.paths


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gather(args: argparse.Namespace, work: Path) -> Iterator[Path]:
    """Download what is to be carried to `work`; vLLM's wheel is stripped."""
    target = target_options(args.python)
    pinned = [f"vllm=={args.vllm}"]
    if not args.only_vllm:
        roots = pinned + own_requirements()
        options = ("--dry-run", "--ignore-installed", "--target", str(work / "nowhere"))
        report = json.loads(pip("install", *options, "--report", "-", *target, *roots))
        pinned = [*wanted(report, roots, args.python), f"torchvision=={args.torchvision}"]
    raw = work / "raw"
    pip("download", "--no-deps", *target, "--dest", str(raw), *pinned)
    for wheel in sorted(raw.iterdir()):
        if wheel.name.startswith("vllm-"):
            stripped = work / wheel.name
            left_out = strip_wheel(wheel, stripped)
            if not left_out:
                raise SystemExit(f"carry_wheels: {wheel.name} has no FlashAttention libraries")
            check_record(stripped)
            sizes = f"{wheel.stat().st_size / 1e6:.0f} MB, {stripped.stat().st_size / 1e6:.0f} MB"
            print(f"{wheel.name}: {sizes} without {', '.join(left_out)}")
            wheel = stripped
        yield wheel


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--vllm", default="0.32.0", help="release (%(default)s)")
    parser.add_argument(
        "--torchvision", default="0.26.0", help="that goes with the machine's torch (%(default)s)"
    )
    parser.add_argument("--python", default="3.12", help="of the machine (%(default)s)")
    parser.add_argument(
        "--only-vllm", action="store_true", help="leave out all that vLLM and VLCache depend on"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="carry-wheels-") as work:
        wheels = list(gather(args, Path(work)))
        shutil.rmtree(args.output / "wheels", ignore_errors=True)
        parts = pack(wheels, args.output)
    total = sum(part.stat().st_size for part in parts)
    print(f"{len(wheels)} wheels, {total / 1e6:.0f} MB in {len(parts)} parts: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

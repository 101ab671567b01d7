"""Tests of scripts/carry_wheels.py on wheels that are made here; nothing is downloaded."""

import base64
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import carry_wheels as carry
import pytest

KEPT = {
    "vllm/__init__.py": b"print('vllm')\n",
    "vllm/_C_stable_libtorch.abi3.so": bytes(range(256)) * 40,
    "vllm/vllm_flash_attn/__init__.py": b"",
}
LEFT_OUT = {
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": os.urandom(5000),
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": os.urandom(7000),
}


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A wheel with a RECORD."""
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
    tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {f"{info}/METADATA": metadata, f"{info}/WHEEL": tags}
    rows = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        rows.append(f"{path},sha256={digest},{len(content)}\n")
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/RECORD", "".join(rows) + f"{info}/RECORD,,\n")
    return wheel


def test_a_stripped_wheel_has_everything_else_and_a_record_that_fits(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "vllm", KEPT | LEFT_OUT)
    stripped = tmp_path / "stripped.whl"
    assert sorted(carry.strip_wheel(wheel, stripped)) == sorted(LEFT_OUT)
    carry.check_record(stripped)
    with zipfile.ZipFile(stripped) as archive:
        names = set(archive.namelist())
        assert {name: archive.read(name) for name in KEPT} == KEPT
    with zipfile.ZipFile(wheel) as archive:
        assert names == set(archive.namelist()) - set(LEFT_OUT)


@pytest.mark.parametrize("change", ["missing", "other"])
def test_a_wheel_that_does_not_fit_its_record_is_found(tmp_path: Path, change: str) -> None:
    wheel = make_wheel(tmp_path, "vllm", KEPT)
    damaged = tmp_path / "damaged.whl"
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(damaged, "w") as new:
        for name in old.namelist():
            if name != "vllm/__init__.py":
                new.writestr(name, old.read(name))
            elif change == "other":
                new.writestr(name, b"other")
    with pytest.raises(ValueError, match=r"vllm/__init__\.py"):
        carry.check_record(damaged)


def test_parts_are_small_and_install_to_what_was_packed(tmp_path: Path) -> None:
    """With the shell script that the other machine runs, by pip, without an index."""
    files = {"vllm_made_up/__init__.py": b"", "vllm_made_up/data.bin": os.urandom(300_000)}
    wheels = [
        make_wheel(tmp_path / "raw", "vllm_made_up", files),
        make_wheel(tmp_path / "raw", "another_one", {"another_one.py": b"x = 1\n"}),
    ]
    folder = tmp_path / "carried"
    parts = carry.pack(wheels, folder, limit=100_000)
    assert len(parts) > 3
    assert max(part.stat().st_size for part in parts) <= 100_000
    target = tmp_path / "site"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PIP_TARGET": str(target),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    subprocess.run(["sh", str(folder / "install.sh")], env=environment, check=True, timeout=120)
    for wheel in wheels:
        assert (folder / "wheels" / wheel.name).read_bytes() == wheel.read_bytes()
    assert (target / "vllm_made_up" / "data.bin").read_bytes() == files["vllm_made_up/data.bin"]
    assert (target / "another_one.py").exists()


def test_a_damaged_part_is_not_installed(tmp_path: Path) -> None:
    folder = tmp_path / "carried"
    wheel = make_wheel(tmp_path, "made_up", {"made_up.bin": os.urandom(50_000)})
    [first, *_] = carry.pack([wheel], folder, limit=20_000)
    content = bytearray(first.read_bytes())
    content[1000] ^= 1
    first.write_bytes(content)
    done = subprocess.run(["sh", str(folder / "install.sh")], capture_output=True, timeout=60)
    assert done.returncode != 0
    assert not (folder / "wheels").exists()


def test_packing_again_leaves_no_stale_part(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "made_up", {"made_up.bin": os.urandom(50_000)})
    folder = tmp_path / "carried"
    carry.pack([wheel], folder, limit=10_000)
    parts = carry.pack([wheel], folder, limit=30_000)
    assert sorted(folder.glob("wheels.tar.*")) == parts


def entry(name: str, *requires: str) -> dict[str, object]:
    return {"metadata": {"name": name, "version": "1.0", "requires_dist": list(requires)}}


def test_what_only_torch_and_other_kernels_need_is_left_out() -> None:
    report = {
        "install": [
            entry("vllm", "torch==2.13.0", "Xgrammar", "fastapi[standard]", "tilelang", "old; "
                  "python_version < '3.12'"),
            entry("torch", "sympy", "nvidia-cublas"),
            entry("xgrammar", "torch", "apache-tvm-ffi"),
            entry("apache-tvm-ffi"),
            entry("fastapi", "starlette", 'uvicorn; extra == "standard"', 'x; extra == "all"'),
            entry("starlette"),
            entry("uvicorn"),
            entry("x"),
            entry("old"),
            entry("sympy"),
            entry("nvidia-cublas"),
            entry("tilelang", "z3"),
            entry("z3"),
            entry("redis"),
        ]
    }  # fmt: skip
    kept = "apache-tvm-ffi fastapi redis starlette uvicorn vllm xgrammar"
    assert carry.wanted(report, ["vllm==1.0", "redis"], "3.12") == [
        f"{name}==1.0" for name in kept.split()
    ]


def test_own_requirements_are_those_of_the_package() -> None:
    names = {re.split("[<=>]", line)[0] for line in carry.own_requirements()}
    assert {"lmcache", "msgpack", "redis", "transformers"} <= names
    assert not names & {"vllm", "torch", "triton"}

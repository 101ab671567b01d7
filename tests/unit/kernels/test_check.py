"""The start-up check: yes where the kernel gives torch's bits, else a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.triton_device import DEVICE, needs_triton
from vlcache_connector.kernels import delta_rope
from vlcache_connector.kernels.check import obstacle
from vlcache_connector.kernels.paged import FLOAT8_DTYPES, PLAIN_DTYPES, PagedKV
from vlcache_connector.rope import RotarySpec

ROOT = Path(__file__).resolve().parents[2]
SPEC = RotarySpec(0.5 ** torch.arange(8, dtype=torch.float32), 24, 16, is_neox=True)


def make_paged(dtype: torch.dtype, *, heads_first: bool = False) -> PagedKV:
    shape = (2, 2, 16, 48) if heads_first else (2, 16, 2, 48)
    cache = torch.full(shape, 3.0).to(DEVICE, dtype)
    cache = cache.transpose(1, 2) if heads_first else cache
    scale = torch.ones((), device=DEVICE)
    return PagedKV(*cache.split(24, dim=-1), scale, scale)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(dtype, dtype) for dtype in PLAIN_DTYPES]
    + [(torch.bfloat16, cache_dtype) for cache_dtype in FLOAT8_DTYPES],
)
@pytest.mark.parametrize("heads_first", [False, True])
def test_here_the_kernel_can_be_used(
    dtype: torch.dtype, cache_dtype: torch.dtype, heads_first: bool
) -> None:
    paged = make_paged(cache_dtype, heads_first=heads_first)
    assert obstacle(paged, SPEC, dtype) is None
    for cache in (paged.key, paged.value):
        assert bool((cache.float() == 3.0).all()), "the model's cache was touched"


@needs_triton
def test_defaults_of_device_and_dtype_do_not_matter() -> None:
    paged = make_paged(torch.bfloat16)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert obstacle(paged, SPEC, torch.bfloat16) is None
    finally:
        torch.set_default_dtype(dtype)


def _moves_a_slot(scatter: Any, paged: PagedKV, *rest: Any) -> None:
    spec, key, value, slots, turns = rest
    scatter(paged, spec, key, value, slots ^ 1, turns)


def _turns_back(scatter: Any, paged: PagedKV, *rest: Any) -> None:
    spec, key, value, slots, turns = rest
    scatter(paged, spec, key, value, slots, None if turns is None else -turns)


def _writes_what_is_skipped(scatter: Any, paged: PagedKV, *rest: Any) -> None:
    scatter(paged, *rest)
    paged.value[-1, -1, -1, -1] += 1


def _loses_a_bit(scatter: Any, paged: PagedKV, *rest: Any) -> None:
    scatter(paged, *rest)
    paged.key.mul_(1.01)


@needs_triton
@pytest.mark.parametrize(
    "wrong", [_moves_a_slot, _turns_back, _writes_what_is_skipped, _loses_a_bit]
)
def test_a_kernel_that_is_wrong_is_found_out(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., None]
) -> None:
    right = delta_rope.scatter
    monkeypatch.setattr(delta_rope, "scatter", lambda *arguments: wrong(right, *arguments))
    assert obstacle(make_paged(torch.float32), SPEC, torch.float32) == (
        "its results differ from torch's"
    )


OUTSIDE = """
import sys
import torch
from vlcache_connector.kernels.check import obstacle
from vlcache_connector.kernels.paged import PagedKV
from vlcache_connector.rope import RotarySpec

if sys.argv[1] == "without":
    sys.modules["triton"] = None
spec = RotarySpec(torch.ones(8), 24, 16, is_neox=True)
caches = torch.zeros(2, 16, 2, 48).split(24, dim=-1)
print(obstacle(PagedKV(*caches, torch.ones(()), torch.ones(())), spec, torch.float32))
"""


@pytest.mark.parametrize(
    ("triton", "expected"), [("with", "driver"), ("without", "ModuleNotFoundError")]
)
def test_where_triton_is_missing_or_can_not_run_it_is_said_in_one_line(
    triton: str, expected: str
) -> None:
    """Tensors of a CPU, outside the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    output = subprocess.run(
        [sys.executable, "-c", OUTSIDE, triton],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    reason, end = output.split("\n")
    assert (expected in reason, end) == (True, "")


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vlcache_connector.kernels.delta_rope import _scatter_kernel as kernel

form = dict(
    BLOCK_SIZE=16, HEAD_DIM=80, HEAD_DIM_PADDED=128, ROTARY_DIM=80, TOKENS=16, ROTATES=True,
    PER_TOKEN=True, IS_NEOX=True, IS_BFLOAT16=True, MANTISSA=3, BIAS=7, LARGEST=448.0,
)
types = {"key_ptr": "*i16", "value_ptr": "*i16", "key_cache_ptr": "*u8", "value_cache_ptr": "*u8"}
types |= {"slots_ptr": "*i64", **dict.fromkeys(form, "constexpr")}
signature = {
    name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names
}
compiled = triton.compile(
    ASTSource(fn=kernel, signature=signature, constexprs=form),
    target=GPUTarget("cuda", int(sys.argv[1]), 32),
)
print(len(compiled.asm["cubin"]))
"""


@pytest.mark.parametrize("capability", [75, 90, 120])
def test_it_compiles_for_gpus_that_are_not_here(capability: int, tmp_path: Path) -> None:
    """To machine code, float8 included, which 7.5 has no instructions for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout
    assert int(output) > 1000

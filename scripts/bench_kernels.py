#!/usr/bin/env python
"""Measure the kernel that writes reused KV into the paged cache, on a GPU.

One pass rotates and writes a segment's K and V in all layers. Every row is read once and written
once, so the floor is the time that the device takes to copy as many bytes; how fast it copies is
measured, too. Launches are part of what is measured: the passes are queued one behind the other,
and where the GPU waits for Python, that shows.

Results go to PREFIX.json and PREFIX.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from results import with_suffix, write_text

from vlcache_connector.kernels.paged import PagedKV, turns_of
from vlcache_connector.rope import RotarySpec, delta_angles

SCHEMA = 1
BLOCK_SIZE = 16
COPY_BYTES = 1 << 30
"""Larger than any GPU's own caches."""


@dataclass(frozen=True)
class Cell:
    """One number of tokens in one number of layers.

    Attributes:
        seconds: of a pass, median.
        bytes_moved: read and written by a pass.
    """

    tokens: int
    layers: int
    seconds: float
    bytes_moved: int

    @property
    def bytes_per_second(self) -> float:
        """Of reading and writing together."""
        return self.bytes_moved / self.seconds


def pass_bytes(tokens: int, layers: int, heads: int, head_dim: int, read: int, written: int) -> int:
    """Bytes of K and V, and of the slots that each layer reads again.

    Args:
        read, written: bytes of an element in a segment and in the cache.
    """
    return layers * tokens * (2 * heads * head_dim * (read + written) + 8)


def median_seconds(run: Callable[[], None], repetitions: int) -> float:
    """Device time of one `run`."""
    run()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def measure_copy(repetitions: int) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_seconds(lambda: target.copy_(source), repetitions)


def measure(tokens: int, layers: int, heads: int, head_dim: int, repetitions: int) -> Cell:
    """A bfloat16 segment into caches as FlashAttention keeps them, at scattered blocks."""
    # Importing it without a GPU is of no use.
    from vlcache_connector.kernels.delta_rope import scatter

    pairs = head_dim // 2
    inv_freq = 1e6 ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
    spec = RotarySpec(inv_freq, head_dim, head_dim, is_neox=True)
    turns = turns_of(delta_angles(spec, torch.tensor([1234]))).cuda()
    blocks = -(-tokens // BLOCK_SIZE)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
    slots = (order[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:tokens].cuda()
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    segment = torch.randn(layers, 2, tokens, heads, head_dim, **options)
    caches = torch.zeros(layers, blocks, BLOCK_SIZE, heads, 2 * head_dim, **options)
    scale = torch.ones((), device="cuda")
    paged = [PagedKV(*cache.split(head_dim, dim=-1), scale, scale) for cache in caches]

    def run() -> None:
        for target, (key, value) in zip(paged, segment, strict=True):
            scatter(target, spec, key, value, slots, turns)

    seconds = median_seconds(run, repetitions)
    return Cell(tokens, layers, seconds, pass_bytes(tokens, layers, heads, head_dim, 2, 2))


def markdown(device: str, shape: str, copy: float, cells: Sequence[Cell]) -> str:
    """The table."""
    lines = [
        "# Writing reused KV into the paged cache",
        "",
        f"{device}; {shape}. A copy on the device moves {copy / 1e9:,.0f} GB/s, read and written.",
        "",
        "| tokens | layers | time | moved | rate | of a copy's |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {cell.tokens:,} | {cell.layers} | {cell.seconds * 1e3:.3f} ms "
        f"| {cell.bytes_moved / 1e6:,.1f} MB | {cell.bytes_per_second / 1e9:,.0f} GB/s "
        f"| {cell.bytes_per_second / copy:.0%} |"
        for cell in cells
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384], metavar="N"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 28], metavar="N")
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument(
        "--output", type=Path, default=Path("configs/results/kernels"), metavar="PREFIX"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "bench_kernels: no GPU that torch can use; there is nothing to measure", file=sys.stderr
        )
        return 1
    device = torch.cuda.get_device_name()
    shape = f"bfloat16, {args.kv_heads} KV heads of {args.head_dim}"
    copy = measure_copy(args.repetitions)
    cells = [
        measure(tokens, layers, args.kv_heads, args.head_dim, args.repetitions)
        for layers in args.layers
        for tokens in args.tokens
    ]
    record = {
        "schema": SCHEMA,
        "device": device,
        "shape": shape,
        "copy_bytes_per_second": copy,
        "cells": [asdict(cell) | {"bytes_per_second": cell.bytes_per_second} for cell in cells],
    }
    text = markdown(device, shape, copy, cells)
    write_text(with_suffix(args.output, ".json"), json.dumps(record, indent=1) + "\n")
    write_text(with_suffix(args.output, ".md"), text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

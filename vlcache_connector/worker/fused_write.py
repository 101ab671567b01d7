"""Writes reused KV with one Triton kernel per layer, where there is one for this cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.logger import init_logger

from ..attention.paged import is_covered, paged_kv
from ..kernels import check
from ..rope import RotarySpec
from .injection import ReusedRows, WriteRows, write_by_vllm

logger = init_logger(__name__)


def write_fused(index: int, layer: Any, part: ReusedRows) -> None:
    """Write a part's rows of decoder layer `index`: rotated on their way into the paged cache."""
    # Triton is not there, or of no use, on machines that never come here.
    from ..kernels.delta_rope import scatter

    rows, slots = part.window
    placed = part.placed
    key, value = placed.staged(index, rows)
    turns = placed.turns
    if turns is not None and len(turns) > 1:
        turns = turns[rows]
    scatter(paged_kv(layer), placed.spec, key, value, slots, turns)


def choose_write(
    layers: Iterable[Any], spec: RotarySpec, dtype: torch.dtype, device: torch.device
) -> WriteRows:
    """How reused KV gets into the paged cache: by the kernel, else by vLLM's own write.

    Args:
        layers: vLLM's attention layers, their caches bound.
        spec: how the model rotates.
        dtype: of K and V.
        device: of the caches. On a CPU there is no choice.
    """
    if device.type != "cuda":
        return write_by_vllm
    reason = obstacle(layers, spec, dtype)
    if reason is not None:
        logger.warning("VLCache: reused KV is written without the Triton kernel: %s", reason)
        return write_by_vllm
    logger.info("VLCache: reused KV is written by the Triton kernel")
    return write_fused


def obstacle(layers: Iterable[Any], spec: RotarySpec, dtype: torch.dtype) -> str | None:
    """Why the kernel can't write to these layers' caches; None: it can.

    It is tried once, in the form that the first layer's cache has.
    """
    layers = list(layers)
    for layer in layers:
        covered, reason = is_covered(layer, spec, dtype)
        if not covered:
            return reason
    return check.obstacle(paged_kv(layers[0]), spec, dtype)

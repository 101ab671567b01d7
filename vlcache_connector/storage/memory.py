"""Host memory of ours that L2 adapters may read and write.

LMCache seam: its `MemoryObj` over memory that is not of its own pool.
"""

from __future__ import annotations

import torch
from lmcache.v1.memory_management import MemoryObjMetadata, TensorMemoryObj
from torch import Tensor

PAGE = 4096
"""Alignment in bytes; adapters may ask for whole pages."""


def aligned(num_bytes: int) -> Tensor:
    """Page-aligned memory, uint8 `[num_bytes]`; of no content, and not touched."""
    memory = torch.empty(num_bytes + PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + num_bytes]


def memory_object(view: Tensor) -> TensorMemoryObj:
    """Some of it, uint8 `[bytes]`, as adapters take it."""
    shape = torch.Size([view.numel()])
    metadata = MemoryObjMetadata(
        shape, torch.uint8, 0, view.numel(), 1, shapes=[shape], dtypes=[torch.uint8]
    )
    return TensorMemoryObj(view, metadata, None)

"""A checksum of the weights that a worker holds.

vLLM seam: `weight_checksum._weights` (`vllm/model_executor/model_loader/weight_checksum.py`), the
tensors that vLLM itself verifies after an update.
"""

from __future__ import annotations

import hashlib

import torch
import xxhash
from vllm.model_executor.model_loader.weight_checksum import _weights

_PIECE = 1 << 22
"""Numbers of eight bytes that are summed up at once on a device: 32 MiB."""


def checksum(model: torch.nn.Module) -> str:
    """Digest of all weights of a model; it reads them once, where they are."""
    hasher = hashlib.sha256()
    for name, weight in _weights(model):
        data = weight.detach().contiguous().view(-1).view(torch.uint8)
        total = xxhash.xxh3_64_intdigest(data.numpy().data) if data.is_cpu else device_sum(data)
        hasher.update(f"{name} {list(weight.shape)} {weight.dtype} {total}\n".encode())
    return hasher.hexdigest()


def device_sum(data: torch.Tensor) -> int:
    """Of bytes [n] on a device, such that another byte or another order gives another sum."""
    whole = len(data) // 8 * 8
    body = data[:whole]
    if body.storage_offset() % 8:
        body = body.clone()
    total = int.from_bytes(bytes(data[whole:].tolist()), "little")
    for index, part in enumerate(body.view(torch.int64).split(_PIECE)):
        # An odd factor for each place: no change of one number is lost modulo 2 ** 64.
        places = torch.arange(len(part), dtype=torch.int64, device=part.device) + index * _PIECE
        total += int((part * (places * 0x5851F42D4C957F2D * 2 + 1)).sum())
    return total % (1 << 64)

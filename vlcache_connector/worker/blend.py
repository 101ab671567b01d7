"""CacheBlend's choice: the tokens whose fresh keys are farthest from the donor's."""

from __future__ import annotations

import torch

from .ranks import sum_over_ranks


def most_deviating(fresh: torch.Tensor, donor: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` tokens with the largest squared distance between two sets of keys.

    Args:
        fresh: [n, kv_heads, head_dim] keys as this prefill computed them.
        donor: the same tokens' stored keys, at the same positions.

    Returns:
        bool [n] on the CPU, the same on all tensor-parallel ranks, which hold different heads.
    """
    distance = (fresh.float() - donor.float()).square().sum(dim=(1, 2))
    chosen = torch.zeros(len(distance), dtype=torch.bool)
    chosen[sum_over_ranks(distance).topk(count).indices.cpu()] = True
    return chosen

"""CacheBlend's choice: the tokens whose fresh keys are farthest from the donor's."""

from __future__ import annotations

import torch


def distances(fresh: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    """Squared distance between two sets of one rank's keys, token by token.

    Args:
        fresh: [n, kv_heads, head_dim] keys as this prefill computed them.
        donor: the same tokens' stored keys, at the same positions.

    Returns:
        float32 [n]. Tensor-parallel ranks hold different heads: their sum tells.
    """
    return (fresh.float() - donor.float()).square().sum(dim=(1, 2))


def farthest(distance: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` tokens with the largest of distances [n]: bool [n], on the CPU."""
    chosen = torch.zeros(len(distance), dtype=torch.bool)
    chosen[distance.topk(count).indices.cpu()] = True
    return chosen

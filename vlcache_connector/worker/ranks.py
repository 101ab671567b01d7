"""Agreement between tensor-parallel ranks.

vLLM seam: `get_tp_group` (`vllm/distributed/parallel_state.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.distributed.parallel_state import get_tp_group


def own_rank() -> int:
    """This worker's tensor-parallel rank."""
    rank: int = get_tp_group().rank_in_group
    return rank


def all_ranks_have(flags: Sequence[bool]) -> list[bool]:
    """Elementwise AND over all ranks, in a blocking exchange on the host.

    Ranks run the same passes with collectives inside: what one of them lacks, none may use.
    """
    group = get_tp_group()
    if group.world_size == 1 or not flags:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return [bool(vote) for vote in votes]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of each rank's `values`, on every rank."""
    total: torch.Tensor = get_tp_group().all_reduce(values)
    return total

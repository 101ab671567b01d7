"""Agreement between tensor-parallel ranks.

Ranks meet inside forwards, and whoever is missing there is waited for without end. So work that one
rank does for itself is settled with the others before they meet (`agreed`), and where it fails in
between, this worker ends (`in_lockstep`), which vLLM notices at once.

vLLM seam: `get_tp_group` (`vllm/distributed/parallel_state.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

logger = init_logger(__name__)


class AgreedError(RuntimeError):
    """Raised on all ranks at the same place, because something raised on one of them."""


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


@contextmanager
def agreed() -> Iterator[None]:
    """Work that each rank does for itself: if it raises on one of them, it raises on all.

    Ranks meet once, at the end of the block, whether it raised or not.

    Raises:
        AgreedError: something raised here, which is its cause, or on another rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    [ok] = all_ranks_have([error is None])
    if not ok:
        raise AgreedError("failed on this rank" if error else "failed on another rank") from error


@contextmanager
def in_lockstep() -> Iterator[None]:
    """Work in which ranks meet; `agreed` parts of it may raise, on all ranks.

    Raises:
        SystemExit: anything else raised on one of several ranks, and the others may be waiting for
            this one. vLLM itself would wait for them for `VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`.
    """
    try:
        yield
    except AgreedError:
        raise
    except Exception:
        if get_tp_group().world_size == 1:
            raise
        logger.exception("VLCache: a forward failed on one of several ranks, which ends its worker")
        raise SystemExit(1) from None


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of each rank's `values`, on every rank."""
    total: torch.Tensor = get_tp_group().all_reduce(values)
    return total

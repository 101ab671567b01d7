"""Two ranks, each a thread with a process group of its own, that meet as workers do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from vlcache_connector.worker import ranks
from vlcache_connector.worker.ranks import AgreedError, agreed, all_ranks_have, in_lockstep

Together = Callable[[Callable[[int], Any]], list[Any]]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Together:
    """Runs a function of the rank on both ranks; gives what they return, or raise."""
    own = threading.local()
    monkeypatch.setattr(ranks, "get_tp_group", lambda: own.group)
    store = dist.HashStore()

    def run(function: Callable[[int], Any]) -> list[Any]:
        def on(rank: int) -> Any:
            group = dist.ProcessGroupGloo(store, rank, 2)
            own.group = SimpleNamespace(world_size=2, rank_in_group=rank, cpu_group=group)
            try:
                return function(rank)
            except BaseException as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return [future.result(60) for future in [pool.submit(on, rank) for rank in range(2)]]

    return run


def test_what_one_rank_lacks_none_has(together: Together) -> None:
    flags = [[True, False, True], [True, True, False]]
    assert together(lambda rank: all_ranks_have(flags[rank])) == [[True, False, False]] * 2


def test_what_raises_on_one_rank_raises_on_both_and_they_go_on_together(
    together: Together,
) -> None:
    def fail_on_one(rank: int) -> None:
        with agreed():
            pass
        with agreed():
            if rank == 1:
                raise ValueError("fault")

    def work(rank: int) -> Any:
        with pytest.raises(AgreedError) as raised, in_lockstep():
            fail_on_one(rank)
        # In step again: what comes next is the same exchange on both.
        return type(raised.value.__cause__), all_ranks_have([True, rank == 0])

    assert together(work) == [(type(None), [True, False]), (ValueError, [True, False])]


def test_a_rank_that_fails_where_the_others_wait_ends(together: Together) -> None:
    def work(rank: int) -> Any:
        with in_lockstep():
            if rank == 1:
                raise ValueError("fault")

    nothing, ended = together(work)
    assert nothing is None
    assert isinstance(ended, SystemExit)


def test_a_rank_alone_sees_what_was_raised() -> None:
    with pytest.raises(ValueError, match="fault"), in_lockstep():
        raise ValueError("fault")
    with pytest.raises(AgreedError) as raised, agreed():
        raise ValueError("fault")
    assert isinstance(raised.value.__cause__, ValueError)

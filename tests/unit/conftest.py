"""There is one rank, unless a test says otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlcache_connector.worker import ranks


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(world_size=1, rank_in_group=0, all_reduce=lambda values: values)
    monkeypatch.setattr(ranks, "get_tp_group", lambda: group)

"""The guarded tier over a real disk and a real Redis."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from local_redis import LocalRedis

from vlcache_connector.tiers import (
    CircuitBreaker,
    Deadline,
    DiskTier,
    GuardedTier,
    Name,
    RedisTier,
    Tier,
)

NAME = Name("kv", "key", 0, 1)


def soon() -> Deadline:
    return Deadline(20)


def guard(tier: Tier, **options: object) -> GuardedTier:
    settings = {"failures": 3, "min_backoff_seconds": 100.0} | options
    return GuardedTier(tier, CircuitBreaker(tier.name, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["disk", "redis"])
def test_over_a_real_tier(
    tmp_path: Path, redis_server: Callable[..., LocalRedis], kind: str
) -> None:
    server = redis_server() if kind == "redis" else None
    tier: Tier = (
        RedisTier(server.url, "dep", 60.0)
        if server
        else DiskTier(tmp_path / "disk", "dep", 1 << 30, 60.0)
    )
    guarded = guard(tier, min_backoff_seconds=0.2, max_backoff_seconds=0.2)
    data = bytes(1 << 20)
    assert guarded.name == kind
    assert guarded.sizes([NAME], soon()) == [None]
    assert guarded.write(NAME, [data, b"x"], soon())
    assert guarded.sizes([NAME], soon()) == [len(data) + 1]
    assert guarded.read(NAME, 2 << 20, soon()) == [data, b"x"]
    assert 0 < (guarded.estimate_read_seconds(1 << 20) or 0) < 60
    assert 0 < (guarded.estimate_write_seconds(1 << 20) or 0) < 60
    guarded.damaged(NAME, soon())
    assert guarded.read(NAME, 2 << 20, soon()) is None
    guarded.write(NAME, [data], soon())
    assert guarded.read(NAME, 5, soon()) == "failed"  # larger than it can be: removed
    assert guarded.sizes([NAME], soon()) == [None]
    counters = guarded.take_counters()
    assert counters.faults == {("read", "damaged"): 1}
    assert counters.damaged == 1
    assert counters.bytes_read == len(data) + 1
    if server:
        server.kill()
        answers = [guarded.read(NAME, 100, soon()) for _ in range(4)]
        assert answers == [*["failed"] * 3, "skipped"]
        assert guarded.breaker.state == "open"
        assert guarded.take_counters().faults == {("read", "connection"): 3}
        server.start()
        time.sleep(0.3)
        assert guarded.write(NAME, [b"again"], soon())
        assert guarded.breaker.state == "closed"
    guarded.close()

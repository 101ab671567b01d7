"""Latency and bandwidth, learned from transfers."""

from __future__ import annotations

import random

import pytest

from vlcache_connector.storage.transfer_time import TransferTime


def test_latency_and_bandwidth_are_learned() -> None:
    rng = random.Random(0)
    transfer = TransferTime()
    assert transfer.estimate(1) is None
    for _ in range(300):
        size = rng.randrange(1_000_000, 100_000_000)
        transfer.observe(size, 0.02 + size / 1e9)
    assert transfer.estimate(0) == pytest.approx(0.02, rel=0.1)
    assert transfer.estimate(500_000_000) == pytest.approx(0.52, rel=0.05)
    for _ in range(60):  # the network has become slower
        size = rng.randrange(1_000_000, 100_000_000)
        transfer.observe(size, 0.02 + size / 1e8)
    assert transfer.estimate(500_000_000) == pytest.approx(5.02, rel=0.05)


def test_transfers_of_one_size_tell_a_rate_only() -> None:
    transfer = TransferTime()
    for _ in range(10):
        transfer.observe(1000, 0.5)
    assert transfer.estimate(1000) == pytest.approx(0.5)
    assert transfer.estimate(2000) == pytest.approx(1.0)


def test_transfers_that_all_take_as_long_tell_a_latency() -> None:
    transfer = TransferTime()
    for size in (1_000_000, 5_000_000, 20_000_000) * 40:
        transfer.observe(size, 0.5)
    assert transfer.estimate(0) == pytest.approx(0.5, rel=0.1)
    assert transfer.estimate(100_000_000) == pytest.approx(0.5, rel=0.2)


def test_estimates_are_never_negative() -> None:
    rng = random.Random(1)
    transfer = TransferTime()
    for _ in range(200):
        transfer.observe(rng.randrange(1, 1000), rng.random())
        previous = 0.0
        for size in (0, 1, 1000, 10**9):
            estimate = transfer.estimate(size)
            assert estimate is not None
            assert estimate >= previous
            previous = estimate


def test_an_estimate_lies_on_the_line_that_is_told() -> None:
    transfer = TransferTime()
    assert transfer.line() is None
    for size in (1_000_000, 5_000_000, 20_000_000) * 40:
        transfer.observe(size, 0.02 + size / 1e9)
    line = transfer.line()
    assert line is not None
    assert line == (pytest.approx(0.02, rel=0.1), pytest.approx(1e-9, rel=0.1))
    assert transfer.estimate(3_000_000) == pytest.approx(line[0] + 3_000_000 * line[1])

"""What parts of a step take: on the host's clock, and on a device that is behind the host."""

from __future__ import annotations

import time

import pytest
import torch

from tests.helpers.unordered_device import Device
from vlcache_connector.worker.pace import Pace
from vlcache_connector.worker.stopwatch import Laps, Stopwatch, clock_of


def ticking(*instants: float) -> Stopwatch:
    clock = iter(instants)
    return Stopwatch(lambda: next(clock))


def test_a_part_ends_where_the_next_one_begins_and_what_recurs_adds_up() -> None:
    stopwatch = ticking(1.0, 1.5, 2.5, 2.75, 4.75, 5.0)
    for part in ("load", "sparse_prefill", "load", "sparse_prefill", "forward", None):
        stopwatch.start(part)
    assert stopwatch.laps.seconds() == {"load": 0.75, "sparse_prefill": 3.0, "forward": 0.25}


def test_between_parts_nothing_is_timed() -> None:
    stopwatch = ticking(1.0, 2.0, 9.0, 9.5)
    for part in ("forward", None, "load", None):
        stopwatch.start(part)
    assert stopwatch.laps.seconds() == {"forward": 1.0, "load": 0.5}


def test_a_part_that_has_not_ended_is_left_out() -> None:
    stopwatch = ticking(1.0, 2.0)
    stopwatch.start("load")
    stopwatch.start("forward")
    assert stopwatch.laps.seconds() == {"load": 1.0}
    assert Laps().seconds() == {}


def test_a_step_that_is_reported_early_still_grows_and_the_next_one_is_another() -> None:
    stopwatch = ticking(1.0, 2.0, 3.0, 3.5)
    stopwatch.start("forward")
    first = stopwatch.laps
    assert first.seconds() == {}
    stopwatch.start(None)
    stopwatch.restart()
    stopwatch.start("load")
    stopwatch.start("forward")
    assert first.seconds() == {"forward": 1.0}
    assert stopwatch.laps.seconds() == {"load": 0.5}


def test_a_cpu_is_timed_by_the_hosts_clock() -> None:
    stopwatch = Stopwatch(clock_of(torch.device("cpu")))
    stopwatch.start("forward")
    time.sleep(0.02)
    stopwatch.start(None)
    assert 0.02 <= stopwatch.laps.seconds()["forward"] < 1.0


@pytest.mark.parametrize("seed", range(20))
def test_a_device_is_timed_by_what_it_did_and_not_before_it_is_done(seed: int) -> None:
    device = Device(seed)
    stopwatch, pace = Stopwatch(device.mark), Pace()
    for part, operations in (("load", 3), ("sparse_prefill", 20), ("load", 2)):
        stopwatch.start(part)
        for _ in range(operations):
            device.run(lambda: None)
    start = stopwatch.start("forward")
    for _ in range(50):
        device.run(lambda: None)
    end = stopwatch.start(None)
    laps, is_done = stopwatch.laps, end.query()
    pace.add(200, start, end)
    expected = {"load": 0.005, "sparse_prefill": 0.02, "forward": 0.05}
    assert laps.seconds() == (pytest.approx(expected) if is_done else {})
    device.drain()
    pace.add(1, start, end)
    assert laps.seconds() == pytest.approx(expected)
    assert pace.tokens_per_second == pytest.approx(4000.0)

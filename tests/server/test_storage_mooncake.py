"""The storage engine over Mooncake: a master and nodes in processes of their own, over TCP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mooncake import Master, Node, find_master
from tests.server.test_storage_engine import FORM, MIB, SPACE, holds, put, stage
from vlcache_connector.storage.adapters import guarded_configs
from vlcache_connector.storage.engine import SegmentEngine
from vlcache_connector.storage.header import SegmentId

LOOKUP_SECONDS = 0.5


def serve(pipe: Connection, params: dict[str, Any]) -> None:
    spec = {"type": "mooncake", **params}
    configs = guarded_configs([spec], lookup_seconds=LOOKUP_SECONDS, transfer_seconds=5.0)
    engine = SegmentEngine(SPACE, 32 * MIB, configs)
    while True:
        question, *rest = pipe.recv()
        if question == "is ready":
            pipe.send(engine._manager.report_status()["l2_adapters"][0]["is_healthy"])
        elif question == "put":
            name, seed = rest
            put(engine, SegmentId(name, "kv"), FORM, seed)
            pipe.send(engine.flush(20))
        elif question == "stage":
            name, seed, seconds = rest
            segment = SegmentId(name, "kv")
            engine.remove(segment, FORM)
            began = time.monotonic()
            staged = stage(engine, segment, FORM, seconds)
            took = time.monotonic() - began
            outcome = (
                "wrong" if staged.segment and not holds(staged, FORM, seed) else staged.outcome
            )
            engine.flush(5)
            engine.check_integrity()
            pipe.send((outcome, took))


@pytest.fixture
def master(tmp_path: Path) -> Iterator[Master]:
    command = find_master()
    if command is None:
        pytest.skip("no mooncake_master that runs here")
    with Master(command, tmp_path) as started:
        yield started


@pytest.fixture
def node(tmp_path: Path, master: Master) -> Iterator[Callable[[], Node]]:
    with ExitStack() as stack:

        def start() -> Node:
            started = Node(serve, tmp_path / "nodes.log", master.params)
            stack.callback(started.kill)
            until(lambda: started.ask("is ready"))
            return started

        yield start


def until(is_so: Callable[[], bool], seconds: float = 40) -> None:
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.2)


def test_a_node_reads_what_another_one_wrote_and_goes_on_when_that_one_restarts(
    node: Callable[[], Node],
) -> None:
    first, second = node(), node()
    assert first.ask("put", "a", 1)
    until(lambda: second.ask("stage", "a", 1, 10)[0] == "hit")
    assert second.ask("stage", "unknown", 1, 10)[0] == "miss"
    first.kill()
    # Of what lies on both, a part is gone. It is a miss, not an error, whatever is asked for.
    assert second.ask("stage", "a", 1, 10)[0] in ("hit", "miss")
    first = node()
    # The master gives out the dead one's memory until it notices: not every write arrives.
    until(lambda: first.ask("put", "b", 2) and second.ask("stage", "b", 2, 10)[0] == "hit")
    until(lambda: second.ask("put", "c", 3) and first.ask("stage", "c", 3, 10)[0] == "hit")


def test_a_master_that_stops_or_restarts_costs_no_more_than_the_deadline(
    master: Master, node: Callable[[], Node]
) -> None:
    only = node()
    assert only.ask("put", "a", 1)
    until(lambda: only.ask("stage", "a", 1, 10)[0] == "hit")
    master.pause()
    outcome, took = only.ask("stage", "a", 1, 5)
    assert outcome == "miss"
    assert took < 2 * LOOKUP_SECONDS
    master.resume()
    until(lambda: only.ask("stage", "a", 1, 10)[0] == "hit")
    master.kill()
    assert only.ask("stage", "a", 1, 5)[0] in ("miss", "late")
    master.start()
    numbers = iter(range(100))

    def works() -> bool:
        name = f"again {next(numbers)}"
        return only.ask("put", name, 2) and only.ask("stage", name, 2, 5)[0] == "hit"

    until(works)


@pytest.mark.parametrize("fault", ["away", "stopped"])
def test_a_master_that_does_not_answer_at_start_holds_nothing_up(
    master: Master, tmp_path: Path, fault: str
) -> None:
    if fault == "away":
        master.kill()
    else:
        master.pause()
    early = Node(serve, tmp_path / "early.log", master.params)
    try:
        assert early.ask("put", "a", 1, seconds=40)
        assert early.ask("stage", "a", 1, 1)[0] == "miss"
        assert not early.ask("is ready")
        if fault == "away":
            master.start()
        else:
            master.resume()
        until(lambda: early.ask("is ready"))
        until(lambda: early.ask("put", "b", 1) and early.ask("stage", "b", 1, 5)[0] == "hit")
    finally:
        early.kill()

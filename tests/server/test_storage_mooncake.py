"""The storage engine over Mooncake: a master and nodes in processes of their own, over TCP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from local_mooncake import Master, find_master

from tests.helpers.mooncake import Node
from tests.helpers.stored import MIB, adapters_of, fetch, holds_random, put_random
from tests.server.test_storage_engine import TOKENS, layout
from vlcache_connector.storage.engine import SegmentEngine
from vlcache_connector.storage.header import SegmentId

LOOKUP_SECONDS = 0.5


def serve(pipe: Connection, params: dict[str, Any]) -> None:
    spec = {"type": "mooncake", **params}
    configs = adapters_of(spec, fetch_deadline_seconds=2 * LOOKUP_SECONDS)
    engine = SegmentEngine(layout(), 32 * MIB, configs)
    while True:
        question, *rest = pipe.recv()
        if question == "is ready":
            pipe.send(engine._lmcache.report_status()["l2_adapters"][0]["is_healthy"])
        elif question == "state":
            pipe.send(configs[0].tier.state().guard)
        elif question == "put":
            name, seed = rest
            put_random(engine, SegmentId(name, "kv"), TOKENS, seed)
            pipe.send(engine.flush(20))
        elif question == "fetch":
            name, seed, seconds = rest
            segment = SegmentId(name, "kv")
            engine.remove(segment)
            began = time.monotonic()
            outcome = fetch(engine, segment, TOKENS, seconds)
            took = time.monotonic() - began
            if outcome == "hit" and not holds_random(engine, segment, TOKENS, seed):
                outcome = "wrong"
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
    until(lambda: second.ask("fetch", "a", 1, 10)[0] == "hit")
    assert second.ask("fetch", "unknown", 1, 10)[0] == "miss"
    first.kill()
    # Of what lies on both, a part is gone. It is a miss, not an error, whatever is asked for.
    assert second.ask("fetch", "a", 1, 10)[0] in ("hit", "miss", "failed")
    first = node()
    # The master gives out the dead one's memory until it notices: not every write arrives.
    until(lambda: first.ask("put", "b", 2) and second.ask("fetch", "b", 2, 10)[0] == "hit")
    until(lambda: second.ask("put", "c", 3) and first.ask("fetch", "c", 3, 10)[0] == "hit")


def test_a_master_that_stops_or_restarts_costs_no_more_than_the_deadline(
    master: Master, node: Callable[[], Node]
) -> None:
    only = node()
    assert only.ask("put", "a", 1)
    until(lambda: only.ask("fetch", "a", 1, 10)[0] == "hit")
    master.pause()
    outcome, took = only.ask("fetch", "a", 1, 5)
    assert outcome != "hit"
    assert took < 2 * LOOKUP_SECONDS
    master.resume()
    until(lambda: only.ask("fetch", "a", 1, 10)[0] == "hit")
    master.kill()
    assert only.ask("fetch", "a", 1, 5)[0] != "hit"
    master.start()
    numbers = iter(range(100))

    def works() -> bool:
        name = f"again {next(numbers)}"
        return only.ask("put", name, 2) and only.ask("fetch", name, 2, 5)[0] == "hit"

    until(works)


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_master_that_is_gone_is_left_alone(
    master: Master, node: Callable[[], Node], fault: str
) -> None:
    only = node()
    assert only.ask("put", "a", 1)
    until(lambda: only.ask("fetch", "a", 1, 10)[0] == "hit")
    if fault == "killed":
        master.kill()
    else:
        master.pause()
    took = [only.ask("fetch", "a", 1, 1)[1] for _ in range(12)]
    assert only.ask("state") != "closed"
    assert sorted(took[8:])[2] < 0.05


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
        assert early.ask("fetch", "a", 1, 1)[0] != "hit"
        assert not early.ask("is ready")
        if fault == "away":
            master.start()
        else:
            master.resume()
        until(lambda: early.ask("is ready"))
        until(lambda: early.ask("put", "b", 1) and early.ask("fetch", "b", 1, 5)[0] == "hit")
    finally:
        early.kill()

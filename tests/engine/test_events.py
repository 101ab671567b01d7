"""What vLLM's KV events say, as a router hears it over ZMQ: exact blocks, and segments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from local_redis import free_port
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
    KVEventBatch,
)

from tests.helpers.engine import IMAGE, Ask, Engine, request_of
from vlcache_connector.scheduler.events import MEDIUM

LONG = "a shared system prompt that fills blocks " * 8
DONOR = Ask(f"see {IMAGE} now", ((51, 336),))
TARGET = Ask(f"{LONG} a question about {IMAGE} in the end", DONOR.images, max_tokens=8)


class Router:
    """Subscribes to an engine's events."""

    def __init__(self, address: str) -> None:
        self._socket: Any = zmq.Context.instance().socket(zmq.SUB)
        self._socket.bind(address)  # an engine binds to all interfaces, or connects
        self._socket.subscribe(b"")
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    def hear(self, seconds: float = 0.5) -> list[KVCacheEvent]:
        """All events until nothing is said for a while."""
        heard: list[KVCacheEvent] = []
        while self._socket.poll(1000 * seconds):
            _, _, payload = self._socket.recv_multipart()
            heard += self._decoder.decode(payload).events
        return heard

    def close(self) -> None:
        self._socket.close(linger=0)


@pytest.fixture
def listen(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., tuple[Engine, Router]]]:
    """An engine, and who has subscribed to its events."""
    alive: list[Any] = []

    def start(connector: dict[str, Any], **arguments: Any) -> tuple[Engine, Router]:
        address = f"tcp://127.0.0.1:{free_port()}"
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": address,
        }
        router = Router(address)
        alive.append(router)
        arguments |= {"kv_events_config": events, "enable_prefix_caching": True}
        engine = Engine(tiny_model(), connector, **arguments)
        alive.append(engine)
        until = time.monotonic() + 20
        number = 0
        while not router.hear() and time.monotonic() < until:
            number += 1  # what is said before it has connected is lost
            engine.ask(Ask(f"hello {number} {LONG}"))
        return engine, router

    yield start
    for each in alive:
        each.close()


def tokens_of(events: list[KVCacheEvent]) -> list[int]:
    """Tokens that blocks on the GPU are said to have, in order."""
    return [
        token
        for event in events
        if isinstance(event, BlockStored) and event.medium != MEDIUM
        for token in event.token_ids
    ]


def segments(events: list[KVCacheEvent]) -> tuple[list[BlockStored], list[BlockRemoved]]:
    """Those that are said to be stored, and gone."""
    ours = [event for event in events if getattr(event, "medium", None) == MEDIUM]
    return (
        [event for event in ours if isinstance(event, BlockStored)],
        [event for event in ours if isinstance(event, BlockRemoved)],
    )


def reset(llm: Any, connector: bool) -> None:
    assert llm.reset_prefix_cache(reset_connector=connector)


def identifiers(llm: Any, ask: Ask) -> list[str]:
    """What vLLM calls a request's images."""
    seen: list[str] = []
    core = llm.llm_engine.engine_core.engine_core.scheduler
    add = core.add_request

    def note(request: Any) -> None:
        seen.extend(feature.identifier for feature in request.mm_features)
        add(request)

    core.add_request = note
    try:
        prompt, params = request_of(ask)
        llm.generate([prompt], [params], use_tqdm=False)
    finally:
        core.add_request = add
    return seen


def test_approximate_blocks_are_not_announced_and_exact_ones_are(
    listen: Callable[..., tuple[Engine, Router]],
) -> None:
    engine, router = listen({})
    engine.ask(DONOR)
    router.hear()

    [approximate] = engine.ask(replace(TARGET, vlcache={"recompute_ratio": 0.0}))
    assert approximate.figures is not None
    assert approximate.figures["reused_tokens"] > 0
    said = tokens_of(router.hear())
    image = approximate.prompt.index(max(set(approximate.prompt), key=approximate.prompt.count))
    assert 0 < len(said) <= image
    assert said == approximate.prompt[: len(said)]

    # Who reuses nothing has the same blocks once more, and these are what their tokens say.
    [exact] = engine.ask(replace(TARGET, vlcache={"enabled": False}))
    assert exact.prompt == approximate.prompt
    rest = tokens_of(router.hear())
    assert rest == (exact.prompt + exact.tokens)[len(said) : len(said) + len(rest)]
    assert len(said) + len(rest) > len(exact.prompt) - 128


def test_segments_are_announced_while_they_are_here(
    listen: Callable[..., tuple[Engine, Router]],
) -> None:
    engine, router = listen({})
    [identifier] = engine.call(identifiers, replace(DONOR, cache_salt="tenant"))
    engine.ask(Ask("the next step"))
    [stored], removed = segments(router.hear())
    assert removed == []
    assert (stored.token_ids, stored.block_size, stored.parent_block_hash) == ([], 0, None)
    assert stored.extra_keys is not None
    [extra] = stored.extra_keys
    assert extra is not None
    pair, salt = extra
    assert (list(pair), salt) == ([identifier, 0], "tenant")

    # Known already; another tenant's is a segment of its own.
    engine.ask(replace(TARGET, cache_salt="tenant"))
    engine.ask(DONOR)
    engine.ask(Ask("the next step"))
    [other], removed = segments(router.hear())
    assert removed == []
    assert other.block_hashes != stored.block_hashes
    assert other.extra_keys is not None
    assert [len(keys or ()) for keys in other.extra_keys] == [1]

    # vLLM forgets its blocks, and who hears that takes it for all that there is.
    engine.call(reset, False)
    engine.ask(Ask("the next step"))
    heard = router.hear()
    again, removed = segments(heard)
    assert removed == []
    assert {event.block_hashes[0] for event in again} == {
        *stored.block_hashes,
        *other.block_hashes,
    }
    cleared = next(i for i, event in enumerate(heard) if isinstance(event, AllBlocksCleared))
    assert all(heard.index(event) > cleared for event in again)

    engine.call(reset, True)
    engine.ask(Ask("the next step"))
    heard = router.hear()
    assert any(isinstance(event, AllBlocksCleared) for event in heard)
    assert segments(heard)[0] == []


def test_segments_that_make_room_are_told_to_be_gone(
    listen: Callable[..., tuple[Engine, Router]],
) -> None:
    engine, router = listen({"cpu_bytes": "3MiB"})
    for seed in range(8):
        engine.ask(Ask(f"see {IMAGE} now", ((60 + seed, 336),)))
    engine.ask(Ask("the next step"))
    stored, removed = segments(router.hear())
    names = [event.block_hashes[0] for event in stored]
    assert len(set(names)) == len(names) == 8
    gone = [event.block_hashes[0] for event in removed]
    assert gone == names[: len(gone)]
    assert 0 < len(gone) < 8

"""Segments on disk and in Redis, through real vLLM: shared, kept over restarts, never trusted."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_mooncake import Master, find_master
from local_redis import LocalRedis, find_server

from tests.helpers.engine import IMAGE, Answer, Ask, Engine
from tests.helpers.quick_start import KV_BLOCKS
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.names import read_file_name

A, B = (171, 224), (172, 336, 224)
DONOR = Ask(f"see {IMAGE} and {IMAGE}", (A, B))
MOVED = Ask(f"the same two, moved {IMAGE} and {IMAGE} compare", (B, A), max_tokens=4)
EXACT = {"recompute_ratio": 0.1}
"""Options of all engines here; a node and the one it shares with have to agree."""

needs_redis = pytest.mark.skipif(find_server() is None, reason="no redis-server")


def flush(llm: Any) -> bool:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._worker._storage.flush(30.0)


def forget(llm: Any) -> None:
    """Empty all memory: vLLM's caches and VLCache's, as in a node that has just started."""
    assert flush(llm)
    llm.llm_engine.reset_encoder_cache()
    assert llm.reset_prefix_cache(reset_connector=True)


def events(llm: Any) -> dict[str, int]:
    return dict(
        llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler.statistics.events
    )


def store_images(engine: Engine, ask: Ask = DONOR) -> None:
    """Make both images known, down to the slowest tier."""
    engine.ask(ask)
    assert engine.call(flush)


def assert_equal(actual: Answer, expected: Answer) -> None:
    assert actual.tokens == expected.tokens
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def assert_reused(answer: Answer, expected: Answer, tier: str) -> None:
    """Both images were reused, out of this tier, as `expected` reused them."""
    assert answer.figures is not None
    assert expected.figures is not None
    assert answer.figures["reused_tokens"] == expected.figures["reused_tokens"] > 0
    assert answer.figures["tier"] == tier
    assert_equal(answer, expected)


def assert_recomputed(answer: Answer, engines: Callable[..., Engine], ask: Ask = MOVED) -> None:
    [expected] = engines(None).ask(ask)
    assert answer.figures is not None
    assert answer.figures["reused_tokens"] == 0
    assert_equal(answer, expected)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[LocalRedis]:
    with LocalRedis(tmp_path) as server:
        yield server


@pytest.fixture
def start(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    """Engines that end with the test."""
    alive: list[Engine] = []

    def make(
        connector: dict[str, Any],
        role: str = "kv_both",
        policy: str = "recompute",
        **arguments: Any,
    ) -> Engine:
        transfer = {
            "kv_connector": "VLCacheConnector",
            "kv_role": role,
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {
                "cpu_bytes": "128MiB",
                "encoder_cpu_bytes": "64MiB",
                "write_queue_bytes": "64MiB",
                "min_recompute_tokens": 0,
                # Images move to other places here.
                "gate": "off",
                # An engine that knows how fast it computes finds no load of this model worth it.
                "break_even": False,
                **EXACT,
                **connector,
            },
        }
        arguments |= {"kv_transfer_config": transfer, "num_gpu_blocks_override": KV_BLOCKS}
        alive.append(Engine(tiny_model(), None, **arguments))
        return alive[-1]

    yield make
    for engine in alive:
        engine.close()


def test_disk_survives_a_restart_and_refuses_what_is_damaged(
    start: Callable[..., Engine], engines: Callable[..., Engine], tmp_path: Path
) -> None:
    connector = {"disk_path": str(tmp_path), "fetch_deadline_seconds": 20.0}
    first = start(connector)
    store_images(first)
    [expected] = first.ask(MOVED)
    first.close()

    second = start(connector)
    [answer] = second.ask(MOVED)
    assert_reused(answer, expected, "fs")
    [again] = second.ask(Ask(f"once more {IMAGE} and {IMAGE}", (B, A)))
    assert again.figures is not None
    assert again.figures["tier"] == "cpu"

    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 4096]
    assert files
    for path in files:
        with path.open("r+b") as file:
            file.seek(path.stat().st_size * 3 // 4)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
    second.call(forget)
    [answer] = second.ask(MOVED)
    assert_recomputed(answer, engines)
    assert second.call(events)["fs.refused.checksum"] >= 2


def test_a_tenant_over_its_quota_loses_its_own_segments_and_no_others(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    connector = {
        "disk_path": str(tmp_path),
        "fetch_deadline_seconds": 20.0,
        "salt_quota_bytes": "3MiB",
    }

    def held(kind: str) -> Counter[str]:
        """Bytes on disk by salt, as names of objects say it."""
        found: Counter[str] = Counter()
        for path in tmp_path.iterdir():
            stored = read_file_name(path.name)
            if stored is not None and stored[0].segment.kind == kind:
                with contextlib.suppress(FileNotFoundError):
                    found[stored[0].segment.salt] += path.stat().st_size
        return found

    engine = start(connector)
    for salt in ("modest", None):
        engine.ask(Ask(DONOR.text, DONOR.images, cache_salt=salt))
    assert engine.call(flush)
    before = held("kv")
    modest, num_bytes = next((salt, size) for salt, size in before.items() if salt)
    assert set(before) == {"", modest}
    assert num_bytes == before[""]
    assert set(held("encoder")) == {""}
    rows = held("encoder")[""]
    for seed in range(4):
        engine.ask(Ask(DONOR.text, ((300 + seed, 336), (400 + seed, 336)), cache_salt="greedy"))
    assert engine.call(flush)
    until = time.monotonic() + 20
    while max(held("kv").values()) > 3 << 20 and time.monotonic() < until:
        time.sleep(0.2)
    after = held("kv")
    [greedy] = set(after) - set(before)
    assert 0 < after[greedy] <= 3 << 20
    assert (after[modest], after[""]) == (before[modest], before[""])
    assert held("encoder")[""] > rows
    engine.call(forget)
    [answer] = engine.ask(Ask(MOVED.text, MOVED.images, max_tokens=4, cache_salt="modest"))
    assert answer.figures is not None
    assert (answer.figures["tier"], answer.figures["reused_tokens"] > 0) == ("fs", True)


def test_who_has_another_key_finds_nothing_and_reads_nothing(
    start: Callable[..., Engine], engines: Callable[..., Engine], tmp_path: Path
) -> None:
    connector = {"disk_path": str(tmp_path / "store"), "fetch_deadline_seconds": 20.0}
    keys = []
    for name in ("one", "two"):
        path = tmp_path / name
        path.write_bytes(os.urandom(32))
        keys.append(connector | {"encryption_key_file": str(path)})
    first = start(keys[0])
    store_images(first)
    [expected] = first.ask(MOVED)
    first.close()
    files = sorted((tmp_path / "store").iterdir())
    assert files
    for path in files:
        assert b"float32" not in path.read_bytes()  # as headers say

    for stranger in (keys[1], connector):
        other = start(stranger)
        [answer] = other.ask(MOVED)
        assert_recomputed(answer, engines)
        assert other.call(flush)
        assert not any("refused" in name or "failed" in name for name in other.call(events))
        other.close()

    again = start(keys[0])
    [answer] = again.ask(MOVED)
    assert_reused(answer, expected, "fs")


@needs_redis
def test_what_one_node_prefilled_the_other_reuses_on_its_first_request(
    start: Callable[..., Engine], redis: LocalRedis
) -> None:
    connector = {"redis_url": redis.url, "fetch_deadline_seconds": 20.0}
    node = start(connector, role="kv_producer")
    store_images(node)
    [refused] = node.ask(MOVED)  # a producer reuses nothing
    assert refused.figures is not None
    assert refused.figures["reused_tokens"] == 0

    other = start(connector)
    [answer] = other.ask(MOVED)
    [expected] = other.ask(Ask(f"x {MOVED.text}", MOVED.images, max_tokens=4))
    assert answer.figures is not None
    assert answer.figures["tier"] == "valkey"
    assert expected.figures is not None
    assert answer.figures["reused_tokens"] == expected.figures["reused_tokens"] > 0

    consumer = start(connector, role="kv_consumer")
    [same] = consumer.ask(MOVED)
    assert_reused(same, answer, "valkey")
    before = redis.client.dbsize()
    consumer.ask(Ask(f"new {IMAGE}", ((199, 224),)))
    assert consumer.call(flush)
    assert redis.client.dbsize() == before  # a consumer stores nothing


@pytest.mark.skipif(find_master() is None, reason="no mooncake_master that runs here")
def test_nodes_share_memory_through_mooncake_and_one_goes_on_when_the_other_restarts(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    with Master(str(find_master()), tmp_path) as master:
        adapter = {"type": "mooncake", **master.params}
        connector = {"l2_adapters": [adapter], "fetch_deadline_seconds": 20.0}

        def node() -> Engine:
            started = start(connector)
            until = time.monotonic() + 40
            while not started.call(is_reached):
                assert time.monotonic() < until
                time.sleep(0.2)
            return started

        first, second = node(), node()
        store_images(first)
        [answer] = second.ask(MOVED)
        assert answer.figures is not None
        assert answer.figures["tier"] == "mooncake"
        assert answer.figures["reused_tokens"] > 0

        first.close()
        other = Ask(f"with {IMAGE}", ((173, 224),))
        moved = Ask(f"now with {IMAGE}", other.images, max_tokens=4)
        second.ask(other)
        [expected] = second.ask(moved)
        first = node()
        second.call(forget)
        second.ask(other)  # what lay on the node that ended is gone, and is computed
        assert second.call(flush)
        [same] = first.ask(moved)
        assert_reused(same, expected, "mooncake")


def is_reached(llm: Any) -> bool:
    """Whether the one adapter was made."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    [tier] = get_kv_transfer_group()._worker._storage.engine.tiers
    return bool(tier.adapter.report_status()["is_healthy"])


@needs_redis
def test_nodes_that_differ_share_nothing(start: Callable[..., Engine], redis: LocalRedis) -> None:
    connector = {"redis_url": redis.url, "fetch_deadline_seconds": 20.0}
    node = start(connector)
    store_images(node)
    two_ranks = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    }
    strangers: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"deployment": "another"}, {}),
        ({"donor": "canonical"}, {}),
        ({}, {"dtype": "bfloat16"}),
        ({}, {"hf_overrides": {"text_config": {"rope_parameters": {"rope_theta": 5e5}}}}),
        ({}, two_ranks),
    ]
    for ours, theirs in strangers:
        stranger = start(connector | ours, **theirs)
        [answer] = stranger.ask(MOVED)
        stranger.close()
        assert answer.figures is not None
        assert answer.figures["reused_tokens"] == 0, (ours, theirs)
    # The node itself does find it.
    node.call(forget)
    [answer] = node.ask(MOVED)
    assert answer.figures is not None
    assert answer.figures["tier"] == "valkey"
    assert answer.figures["reused_tokens"] > 0


@needs_redis
def test_salts_are_separate_and_unsalted_requests_can_be_left_out(
    start: Callable[..., Engine], redis: LocalRedis
) -> None:
    connector = {"redis_url": redis.url, "fetch_deadline_seconds": 20.0, "share_unsalted": False}
    node = start(connector)
    store_images(node, Ask(DONOR.text, DONOR.images, cache_salt="ann"))
    store_images(node)
    other = start(connector)

    def reused(salt: str | None) -> int:
        other.call(forget)
        [answer] = other.ask(Ask(MOVED.text, MOVED.images, cache_salt=salt))
        return 0 if answer.figures is None else int(answer.figures["reused_tokens"])

    assert reused("bob") == 0
    assert reused(None) == 0
    assert reused("ann") > 0


def lose_fetched(llm: Any) -> None:
    """Host memory loses each KV segment as soon as it was fetched and promised."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    storage = get_kv_transfer_group()._worker._storage
    original = storage.get

    def get(segment: SegmentId) -> Any:
        if segment.kind == "kv":
            storage.remove(segment)
        return original(segment)

    storage.get = get


@needs_redis
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_no_fault_of_redis_fails_a_request(
    start: Callable[..., Engine],
    engines: Callable[..., Engine],
    redis: LocalRedis,
    policy: str,
) -> None:
    connector = {"redis_url": redis.url, "fetch_deadline_seconds": 0.5}
    node = start(connector, policy=policy)
    store_images(node)
    node.call(forget)
    node.call(lose_fetched)
    lost = Ask(f"lost {MOVED.text}", MOVED.images, max_tokens=4)
    [answer] = node.ask(lost)
    assert node.call(events)["valkey.read.bytes"] > 0
    assert_recomputed(answer, engines, lost)
    redis.pause()
    started = time.monotonic()
    [answer] = node.ask(MOVED)
    waited = time.monotonic() - started
    redis.resume()
    assert_recomputed(answer, engines)
    assert waited < 20.0  # the server never answers
    assert answer.figures is not None
    assert 0.2 < answer.figures["ttft_part_seconds"]["staging"] < waited
    redis.kill()
    [answer] = node.ask(Ask(f"killed {IMAGE}", ((198, 224),)))
    assert_recomputed(answer, engines, Ask(f"killed {IMAGE}", ((198, 224),)))


def break_once(llm: Any, name: str) -> None:
    """A call of the worker's storage raises, once."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    storage = get_kv_transfer_group()._worker._storage

    def fail(*_: Any) -> None:
        delattr(storage, name)
        raise OSError("broken")

    setattr(storage, name, fail)


@pytest.mark.parametrize("name", ["look_up", "load"])
def test_a_fetch_that_can_not_begin_holds_nobody_up(
    start: Callable[..., Engine], engines: Callable[..., Engine], tmp_path: Path, name: str
) -> None:
    node = start({"disk_path": str(tmp_path), "fetch_deadline_seconds": 60.0})
    store_images(node)
    node.call(forget)
    node.call(break_once, name)
    [answer] = node.ask(MOVED)
    assert node.call(events)["failed.fetch"] == 1
    assert answer.figures is not None
    assert answer.figures["ttft_part_seconds"]["staging"] < 30
    [expected] = engines(None).ask(MOVED)
    assert answer.tokens == expected.tokens
    node.call(forget)
    [answer] = node.ask(Ask(f"again {MOVED.text}", MOVED.images))
    assert answer.figures is not None
    assert answer.figures["tier"] == "fs"


def fall_asleep(llm: Any) -> None:
    """What vLLM 0.33's worker calls before it frees device memory, and after."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    group: Any = get_kv_transfer_group()
    group.unregister_kv_caches()
    assert group._worker._storage._device.used_bytes == 0


def test_device_memory_keeps_what_was_used_last(engines: Callable[..., Engine]) -> None:
    engine = engines(EXACT | {"device_bytes": "64MiB"})
    engine.ask(DONOR)
    [first] = engine.ask(MOVED)
    [second] = engine.ask(Ask(f"a {MOVED.text}", MOVED.images, max_tokens=4))
    assert first.figures is not None
    assert second.figures is not None
    assert (first.figures["tier"], second.figures["tier"]) == ("cpu", "device")
    engine.call(fall_asleep)
    [awake] = engine.ask(Ask(f"yet {MOVED.text}", MOVED.images, max_tokens=4))
    assert awake.figures is not None
    assert awake.figures["tier"] == "cpu"
    plain = engines(EXACT)
    plain.ask(DONOR)
    [expected] = plain.ask(MOVED)
    assert_reused(first, expected, "cpu")


def ask_named(llm: Any, ask: Ask, names: list[str]) -> Answer:
    """`ask` with names that the client gives to the images."""
    from tests.helpers.engine import answer_of, request_of

    prompt, params = request_of(ask)
    prompt["multi_modal_uuids"] = {"image": names}
    [output] = llm.generate([prompt], [params], use_tqdm=False)
    return answer_of(output)


def test_a_clients_name_for_an_image_is_no_content_hash(engines: Callable[..., Engine]) -> None:
    engine = engines(EXACT)
    engine.call(ask_named, Ask(f"named {IMAGE}", ((181, 224),)), ["holiday.png"])
    other = Ask(f"another picture of that name {IMAGE}", ((182, 224),))
    answer = engine.call(ask_named, other, ["holiday-2.png"])
    again = engine.call(ask_named, Ask(f"again {IMAGE}", ((182, 224),)), ["holiday.png"])
    assert answer.figures is None
    assert again.figures is None
    assert engine.call(events)["refused.client_uuid"] == 3
    # The same pictures without a name are stored and reused.
    engine.ask(Ask(f"unnamed {IMAGE}", ((182, 224),)))
    [hit] = engine.ask(Ask(f"unnamed, moved {IMAGE}", ((182, 224),)))
    assert hit.figures is not None
    assert hit.figures["reused_tokens"] > 0


def ask_without_room(llm: Any, ask: Ask) -> Answer:
    """`ask`, while encoder rows that are to be loaded find no room in host memory."""
    from lmcache.v1.distributed.api import MemoryLayoutDesc, PrefetchTaskSpec
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from tests.helpers.engine import run

    lmcache = get_kv_transfer_group()._worker._storage.engine._lmcache
    start = lmcache.submit_prefetch_task
    larger_than_memory = MemoryLayoutDesc([torch.Size([1 << 40])], [torch.uint8])

    def start_without_room(task: PrefetchTaskSpec) -> Any:
        if task.key_groups[0].object_group_id >= 1 << 16:
            groups = [replace(group, layout_desc=larger_than_memory) for group in task.key_groups]
            task = replace(task, key_groups=groups)
        return start(task)

    lmcache.submit_prefetch_task = start_without_room
    try:
        [answer] = run(llm, [ask])
    finally:
        del lmcache.submit_prefetch_task
    return answer


def test_encoder_rows_that_find_no_room_are_computed(
    start: Callable[..., Engine], engines: Callable[..., Engine], tmp_path: Path
) -> None:
    connector = {"disk_path": str(tmp_path), "fetch_deadline_seconds": 20.0}
    node = start(connector)
    store_images(node)
    node.call(forget)
    # Of another tenant: its KV is unknown, its encoder rows are on disk.
    stranger = Ask(MOVED.text, MOVED.images, max_tokens=4, cache_salt="b")
    assert_recomputed(node.call(ask_without_room, stranger), engines)

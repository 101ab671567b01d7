"""The metrics: stats on their way and in Prometheus."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.helpers.exposition import Exposition
from vlcache_connector import metrics
from vlcache_connector.connector import VLCacheConnector
from vlcache_connector.metrics import METRICS, VLCacheStats


def some_stats(factor: int = 1) -> VLCacheStats:
    stats = VLCacheStats()
    stats.add(metrics.LOOKUPS, "fs", "hit", amount=2 * factor)
    stats.add(metrics.LOOKUPS, "none", "miss")
    stats.add(metrics.RECOMPUTED_TOKENS, amount=8 * factor)
    stats.observe(metrics.TTFT_PART_SECONDS, "load", "fs", value=0.25 * factor)
    stats.set(metrics.STORED_BYTES, "kv", value=1000 * factor)
    return stats


def test_new_and_reset_stats_are_empty() -> None:
    assert VLCacheStats().is_empty()
    stats = some_stats()
    assert not stats.is_empty()
    stats.reset()
    assert stats.is_empty()
    assert stats.reduce() == {}


def test_counters_add_up_observations_are_kept_and_the_last_value_of_a_gauge_counts() -> None:
    early, late = some_stats(), some_stats(3)
    late.add(metrics.LOOKUPS, "cpu", "hit")
    total = early.aggregate(late)
    assert total.data == {
        metrics.LOOKUPS.name: {("fs", "hit"): 8, ("none", "miss"): 2, ("cpu", "hit"): 1},
        metrics.RECOMPUTED_TOKENS.name: {(): 32},
        metrics.TTFT_PART_SECONDS.name: {("load", "fs"): [0.25, 0.75]},
        metrics.STORED_BYTES.name: {("kv",): 3000},
    }
    # Every logger of a process gets the same data and adds to it.
    assert early == some_stats()
    assert late.data[metrics.TTFT_PART_SECONDS.name] == {("load", "fs"): [0.75]}


def test_the_log_line_sums_up() -> None:
    assert some_stats().aggregate(some_stats(3)).reduce() == {
        "lookups_total{fs,hit}": 8,
        "lookups_total{none,miss}": 2,
        "recomputed_tokens_total": 32,
        "ttft_part_seconds{load,fs}_count": 2,
        "ttft_part_seconds{load,fs}_mean": 0.5,
        "stored_bytes{kv}": 3000,
    }


def travel_by_msgpack(stats: KVConnectorStats) -> KVConnectorStats | None:
    sent = EngineCoreOutputs(scheduler_stats=SchedulerStats(kv_connector_stats=stats.to_dict()))
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    return VLCacheConnector.build_kv_connector_stats(received.scheduler_stats.kv_connector_stats)


def travel_by_pickle(stats: KVConnectorStats) -> KVConnectorStats | None:
    return pickle.loads(pickle.dumps(stats))


@pytest.mark.parametrize("travel", [travel_by_msgpack, travel_by_pickle])
def test_stats_survive_the_way_to_the_loggers(
    travel: Callable[[KVConnectorStats], KVConnectorStats],
) -> None:
    received = travel(some_stats())
    assert received == some_stats()
    assert received.aggregate(some_stats()) == some_stats().aggregate(some_stats())


def test_metrics_have_names_and_labels_as_prometheus_wants_them() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("vllm:vlcache_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(metric.buckets)
        assert metric.help.endswith(".")
        for values in metric.labels.values():
            assert len(set(values)) == len(values) < 20


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def prometheus(registry: CollectorRegistry) -> metrics.VLCachePromMetrics:
    """Of two engines, in a registry of the test's own."""
    types: dict[Any, Any] = {
        kind: functools.partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)
    }
    engines: dict[int, list[object]] = {0: ["model", "0"], 1: ["model", "1"]}
    return VLCacheConnector.build_prom_metrics(
        VllmConfig(), types, ["model_name", "engine"], engines
    )


def expose(registry: CollectorRegistry) -> Exposition:
    from prometheus_client import generate_latest

    return Exposition(generate_latest(registry).decode())


def test_counters_begin_at_zero(
    registry: CollectorRegistry, prometheus: metrics.VLCachePromMetrics
) -> None:
    scraped = expose(registry)
    for metric in METRICS:
        own = [sample for sample in scraped.samples if sample.name == metric.name]
        combinations = 1
        for values in metric.labels.values():
            combinations *= len(values)
        assert len(own) == (2 * combinations if metric.kind == "counter" else 0), metric.name
        assert all(sample.value == 0 for sample in own)


def test_stats_are_added_to_the_metrics_of_their_engine(
    registry: CollectorRegistry, prometheus: metrics.VLCachePromMetrics
) -> None:
    for stats in (some_stats(), some_stats(3)):
        prometheus.observe(stats.data, engine_idx=1)
    scraped = expose(registry)
    engine = {"model_name": "model", "engine": "1"}
    loads = {"part": "load", "tier": "fs", **engine}
    assert scraped(metrics.LOOKUPS.name, tier="fs", outcome="hit", **engine) == 8
    assert scraped(metrics.LOOKUPS.name, tier="none", outcome="miss", **engine) == 2
    assert scraped(metrics.RECOMPUTED_TOKENS.name, **engine) == 32
    assert scraped(f"{metrics.TTFT_PART_SECONDS.name}_count", **loads) == 2
    assert scraped(f"{metrics.TTFT_PART_SECONDS.name}_sum", **loads) == 1.0
    assert scraped(f"{metrics.TTFT_PART_SECONDS.name}_bucket", le="0.25", **loads) == 1
    assert scraped(metrics.STORED_BYTES.name, kind="kv", **engine) == 3000
    assert not any(
        s.value for s in scraped.samples if s.labels["engine"] == "0" and "created" not in s.name
    )

"""The metrics: stats on their way, in Prometheus, and on the `/metrics` of a real server."""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families
from serving import VLLMServer, chat, image_part, make_client, make_image, text_part
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vlcache_connector import metrics
from vlcache_connector.connector import VLCacheConnector
from vlcache_connector.metrics import METRICS, VLCacheStats
from vlcache_connector.protocol import TIERS


def some_stats(factor: int = 1) -> VLCacheStats:
    stats = VLCacheStats()
    stats.add(metrics.LOOKUPS, "disk", "hit", amount=2 * factor)
    stats.add(metrics.LOOKUPS, "none", "miss")
    stats.add(metrics.RECOMPUTED_TOKENS, amount=8 * factor)
    stats.observe(metrics.LOAD_SECONDS, "disk", value=0.25 * factor)
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
        metrics.LOOKUPS.name: {("disk", "hit"): 8, ("none", "miss"): 2, ("cpu", "hit"): 1},
        metrics.RECOMPUTED_TOKENS.name: {(): 32},
        metrics.LOAD_SECONDS.name: {("disk",): [0.25, 0.75]},
        metrics.STORED_BYTES.name: {("kv",): 3000},
    }
    # Every logger of a process gets the same data and adds to it.
    assert early == some_stats()
    assert late.data[metrics.LOAD_SECONDS.name] == {("disk",): [0.75]}


def test_the_log_line_sums_up() -> None:
    assert some_stats().aggregate(some_stats(3)).reduce() == {
        "lookups_total{disk,hit}": 8,
        "lookups_total{none,miss}": 2,
        "recomputed_tokens_total": 32,
        "load_seconds{disk}_count": 2,
        "load_seconds{disk}_mean": 0.5,
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


class Exposition:
    """What Prometheus would scrape."""

    def __init__(self, text: str) -> None:
        self.samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("vllm:")
        ]

    def __call__(self, name: str, **labels: str) -> float:
        """Sum of the samples with this name and these labels."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def by(self, metric: metrics.Metric) -> dict[tuple[str, ...], float]:
        """Values of a counter or gauge that are not zero, by its own labels."""
        return {
            tuple(sample.labels[label] for label in metric.labels): sample.value
            for sample in self.samples
            if sample.name == metric.name and sample.value
        }


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
    assert scraped(metrics.LOOKUPS.name, tier="disk", outcome="hit", **engine) == 8
    assert scraped(metrics.LOOKUPS.name, tier="none", outcome="miss", **engine) == 2
    assert scraped(metrics.RECOMPUTED_TOKENS.name, **engine) == 32
    assert scraped(f"{metrics.LOAD_SECONDS.name}_count", tier="disk", **engine) == 2
    assert scraped(f"{metrics.LOAD_SECONDS.name}_sum", tier="disk", **engine) == 1.0
    assert scraped(f"{metrics.LOAD_SECONDS.name}_bucket", tier="disk", le="0.25", **engine) == 1
    assert scraped(metrics.STORED_BYTES.name, kind="kv", **engine) == 3000
    assert not any(
        s.value for s in scraped.samples if s.labels["engine"] == "0" and "created" not in s.name
    )


# -- a real server --------------------------------------------------------------------------------


class Serving:
    """A server with a disk tier, and the figures of all its answers."""

    def __init__(self, server: VLLMServer, client: Any) -> None:
        self._server = server
        self._client = client
        self.figures: list[dict[str, Any]] = []

    def ask(self, text: str, *parts: dict[str, Any]) -> dict[str, Any] | None:
        answer = chat(self._client, self._server, [text_part(text), *parts, text_part("why")])
        figures = (answer.kv_transfer_params or {}).get("vlcache")
        if figures is not None:
            self.figures.append(figures)
        return figures

    def scrape(self) -> Exposition:
        """The metrics, once those of the last request's last step have arrived."""
        self.ask("what is written in the background arrives with the next step")
        time.sleep(0.5)
        return Exposition(self._client.get(f"{self._server.base_url}/metrics").text)

    def reset(self) -> None:
        """Empty vLLM's prefix cache and all that VLCache has in memory."""
        answer = self._client.post(
            f"{self._server.base_url}/reset_prefix_cache", params={"reset_external": "true"}
        )
        answer.raise_for_status()


@pytest.fixture
def serving(tiny_model: Callable[..., Path], tmp_path: Path) -> Iterator[Serving]:
    config = {
        "cpu_bytes": "64MiB",
        "encoder_cpu_bytes": "64MiB",
        "disk_path": str(tmp_path / "segments"),
        "fetch_deadline_seconds": 20.0,
        # On so small a model nothing would be worth a load.
        "break_even": False,
    }
    with (
        VLLMServer(
            tiny_model(),
            connector=config,
            extra_args=["--enforce-eager", "--max-model-len", "2048", "--dtype", "float32"],
            log_path=tmp_path / "server.log",
            env={"TORCHDYNAMO_DISABLE": "1", "VLLM_SERVER_DEV_MODE": "1"},
        ) as server,
        make_client() as client,
    ):
        yield Serving(server, client)


@pytest.mark.slow
def test_a_servers_metrics_agree_with_its_answers(serving: Serving) -> None:
    first, second = (image_part(make_image(seed, 224)) for seed in (15, 16))
    idle = serving.scrape()
    assert idle.by(metrics.LOOKUPS) == {}
    assert idle(metrics.BREAKER_STATE.name, tier="disk") == 0
    assert ("disk",) in {
        tuple(s.labels[label] for label in metrics.BREAKER_STATE.labels)
        for s in idle.samples
        if s.name == metrics.BREAKER_STATE.name
    }

    serving.ask("a new one", first)
    serving.ask("the same elsewhere, and another new one", first, text_part("and"), second)
    serving.ask("named by the client", {**second, "uuid": "holiday.png"})
    deadline = time.monotonic() + 60
    while (scraped := serving.scrape())(metrics.WRITTEN_BYTES.name, tier="disk") < scraped(
        metrics.STORED_BYTES.name
    ):
        assert time.monotonic() < deadline
    assert scraped.by(metrics.LOOKUPS) == {("none", "miss"): 2, ("cpu", "hit"): 1}
    assert scraped.by(metrics.STORED_SEGMENTS) == {("kv",): 2, ("encoder",): 2}
    assert scraped.by(metrics.REFUSED) == {("client_uuid",): 1}
    assert scraped(metrics.READ_BYTES.name) == 0

    serving.reset()
    figures = serving.ask("out of the disk, at yet another place", second, text_part("x"), first)
    assert figures is not None
    assert figures["tier"] == "disk"
    scraped = serving.scrape()
    assert scraped.by(metrics.LOOKUPS) == {
        ("none", "miss"): 2,
        ("cpu", "hit"): 1,
        ("disk", "hit"): 2,
    }
    assert scraped.by(metrics.STORED_SEGMENTS) == {("kv",): 4, ("encoder",): 4}
    assert scraped.by(metrics.EVICTED_SEGMENTS) == {}  # what was reset had not to make room
    assert scraped.by(metrics.FELL_BACK) == {}
    assert scraped(metrics.READ_BYTES.name, tier="disk") >= figures["reused_tokens"]
    assert scraped(metrics.PINNED_SEGMENTS.name) == 0

    def total(figure: str, **equal: str) -> float:
        return sum(f[figure] for f in serving.figures if equal.items() <= f.items())

    for tier in TIERS:
        reused = total("reused_tokens", tier=tier)
        assert scraped(metrics.REUSED_TOKENS.name, tier=tier) == reused
        seconds = total("load_seconds", tier=tier) + total("fetch_seconds", tier=tier)
        assert scraped(f"{metrics.LOAD_SECONDS.name}_sum", tier=tier) == pytest.approx(
            seconds, abs=1e-4
        )
    reusing = sum(figures["reused_tokens"] > 0 for figures in serving.figures)
    assert reusing == 2
    assert scraped(f"{metrics.LOAD_SECONDS.name}_count") == reusing
    assert scraped(f"{metrics.SPARSE_PREFILL_SECONDS.name}_count") == reusing
    assert scraped(f"{metrics.SPARSE_PREFILL_SECONDS.name}_sum") == pytest.approx(
        total("sparse_prefill_seconds"), abs=1e-4
    )
    assert scraped(metrics.RECOMPUTED_TOKENS.name) == total("recomputed_tokens") > 0
    assert scraped(metrics.SPARSE_PREFILL_TOKENS.name) == total("computed_tokens")
    speed = scraped(metrics.PREFILL_TOKENS_PER_SECOND.name)
    claimed = scraped("vllm:external_prefix_cache_hits_total")
    assert 0 <= scraped(metrics.SAVED_SECONDS.name) < claimed / speed
    assert scraped(metrics.TIER_BYTES_PER_SECOND.name, tier="disk") > 0

    # vLLM's own figures: computed tokens count as claimed, but not as cached.
    reused, computed = total("reused_tokens"), total("computed_tokens")
    assert claimed == reused + computed
    local = scraped("vllm:prefix_cache_hits_total")
    assert scraped("vllm:prompt_tokens_cached_total") == local + reused
    sources = {
        source: scraped("vllm:prompt_tokens_cached_by_source_total", source=source)
        for source in ("host", "disk", "external_unspecified")
    }
    assert sources == {
        "host": total("reused_tokens", tier="cpu"),
        "disk": total("reused_tokens", tier="disk"),
        "external_unspecified": computed,
    }

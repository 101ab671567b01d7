"""VLCache's metrics on vLLM's `/metrics`: what they are called, and how they get there.

The scheduler side records, vLLM carries a `VLCacheStats` from the engine to its loggers, and there
`VLCachePromMetrics` adds it to Prometheus, with vLLM's labels `model_name` and `engine`.

vLLM seams: `KVConnectorStats` and `KVConnectorPromMetrics`
(`vllm/distributed/kv_transfer/kv_connector/v1/metrics.py`), used by `vllm/v1/metrics/loggers.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from .config import ADAPTER_TYPES
from .protocol import TIERS, TTFTPart

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PREFIX = "vllm:vlcache_"
_BELOW = ADAPTER_TYPES
_KINDS = ("kv", "encoder")

NOWHERE = "none"
"""The tier of a lookup that found nothing."""

OUTCOMES = {
    "hit": "its KV was reused",
    "miss": "it is stored nowhere",
    "late": "its fetch had not ended by `fetch_deadline_seconds`",
    "skipped": "it was left where it is: the gate, `break_even`, no room, or a tier left alone",
    "failed": "it could not be had, although it is there or may be",
}
"""What became of looking for the KV of an image."""

REFUSALS = {
    # Requests.
    "gate": "a request with images whose KV the model is not known to stand",
    "budget": "a request's known images behind more new tokens than a step may compute",
    "break_even": "a request's known images that take longer to reuse than to compute",
    "unsalted": "a request without a cache_salt, with share_unsalted=false",
    "client_uuid": "a request with an image that the client has given a name",
    "unsupported": "a request that is left to plain vLLM (LoRA, embeddings, pooling, ...)",
    # Segments.
    "late": "a segment that was not found and loaded in time",
    "not_worth": "a segment that takes longer to load than to compute",
    "no_room": "a segment that host memory has no room for",
    "queue_full": "objects that are not written to a tier; each rank counts its own",
    # What was read from a tier; each rank counts its own.
    "format": "an object that is none of ours",
    "version": "an object of another version",
    "identity": "an object of another key or model",
    "shape": "an object of other sizes than it should have",
    "checksum": "an object whose content is damaged",
    # Calls of a tier; each rank counts its own.
    "left_alone": "a call of a tier that only costs",
}
"""What was declined, by reason."""

FALLBACKS = {
    # Requests.
    "segment_lost": "a request's segment was not there when it was to be loaded",
    "error": "a request's sparse prefill failed; it was computed without reuse",
    "failed": "a request's claim could not be filled; what then is kv_load_failure_policy's affair",
    "read": "a request could not be read",
    "plan": "a request's reuse could not be planned",
    "media": "an image could not be looked up among the known ones, and was decoded",
    # Segments; each rank counts its own.
    "store": "a segment that was computed could not be stored",
    "canonical": "a canonical donor could not be computed",
    "fetch": "a lookup or a load could not be begun",
    # Calls of a tier; each rank counts its own.
    "tier_lookup": "a lookup in a tier was not done in time",
    "tier_load": "objects that a tier has could not be loaded",
    "tier_store": "objects could not be written to a tier",
}
"""What went wrong, by reason; each cost only reuse."""

DECODING = {
    "decoded": "it was not known, and decoded on arrival",
    "known": "it was known, and not decoded on arrival",
    "late": "it was known, but decoded after all: vLLM's processor asked for its pixels",
}
"""What became of an image that arrived in a file's bytes; `known` includes `late`."""

PARTS: dict[TTFTPart, str] = {
    "queue": "from its arrival to its first step, without media, processor and staging",
    "media": "fetching and decoding its images; known where VLCache's media connector does it",
    "processor": "vLLM's processor, with its cache",
    "staging": "waiting for segments from below host memory",
    "load": "opening what it reuses, rotating it and writing it to the paged cache",
    "sparse_prefill": "computing the other tokens of what it claims",
    "forward": "vLLM's own forwards of the steps up to its first token, without the encoder",
}
"""The parts of a request's time to first token that are known, none within another."""

GUARD_STATES = ("closed", "half_open", "open")
"""In the order of their numbers in `vllm:vlcache_guard_state`."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as Prometheus shows it.
        kind: what it is to Prometheus.
        help: what it tells, with its unit.
        labels: of its own, with all the values they may have.
        buckets: upper bounds, of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


LOOKUPS = Metric(
    f"{_PREFIX}lookups_total",
    "counter",
    "Images of requests whose KV was looked for, by the tier it was found in and the outcome.",
    {"tier": (*TIERS, NOWHERE), "outcome": tuple(OUTCOMES)},
)
IMAGES = Metric(
    f"{_PREFIX}images_total",
    "counter",
    "Images that arrived in base64, by URL or as files, by what became of decoding them.",
    {"decoding": tuple(DECODING)},
)
REUSED_TOKENS = Metric(
    f"{_PREFIX}reused_tokens_total",
    "counter",
    "Tokens of images whose KV was reused, by the tier it was found in.",
    {"tier": TIERS},
)
RECOMPUTED_TOKENS = Metric(
    f"{_PREFIX}recomputed_tokens_total",
    "counter",
    "Tokens of reused images that the first layer computed anew.",
)
SPARSE_PREFILL_TOKENS = Metric(
    f"{_PREFIX}sparse_prefill_tokens_total",
    "counter",
    "Tokens that entered sparse prefills: recomputed ones, text and new images between them.",
)
READ_BYTES = Metric(
    f"{_PREFIX}read_bytes_total",
    "counter",
    "Bytes of segments read from the tiers below host memory, over all ranks.",
    {"tier": _BELOW},
)
WRITTEN_BYTES = Metric(
    f"{_PREFIX}written_bytes_total",
    "counter",
    "Bytes of segments written to the tiers below host memory, over all ranks.",
    {"tier": _BELOW},
)
STORED_SEGMENTS = Metric(
    f"{_PREFIX}stored_segments_total",
    "counter",
    "Segments that host memory took in, computed here or loaded from below.",
    {"kind": _KINDS},
)
EVICTED_SEGMENTS = Metric(
    f"{_PREFIX}evicted_segments_total",
    "counter",
    "Segments that host memory dropped to make room.",
    {"kind": _KINDS},
)
REFUSED = Metric(
    f"{_PREFIX}refused_total",
    "counter",
    "Requests, segments and calls that were declined, by reason.",
    {"reason": tuple(REFUSALS)},
)
FELL_BACK = Metric(
    f"{_PREFIX}fallbacks_total",
    "counter",
    "What went wrong and cost only reuse, by reason.",
    {"reason": tuple(FALLBACKS)},
)
NET_SAVED_SECONDS = Metric(
    f"{_PREFIX}net_saved_seconds",
    "gauge",
    "Estimate of the time to first token saved since the start: the tokens that vLLM's own prefill "
    "was spared, at its measured speed and without the vision encoder, less fetching, loading and "
    "sparse prefill, and less what requests waited for that then reused nothing. Below zero where "
    "reuse costs more than it brings.",
)
TTFT_PART_SECONDS = Metric(
    f"{_PREFIX}ttft_part_seconds",
    "histogram",
    "Seconds of a request's time to first token, by part, and by the slowest tier that something "
    "it reuses came from. Observed when the request ends; what can't be known is left out.",
    {"part": tuple(PARTS), "tier": (*TIERS, NOWHERE)},
    (
        *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
        *(1.0, 2.5, 5.0, 10.0, 25.0, 60.0),
    ),
)
PINNED_SEGMENTS = Metric(
    f"{_PREFIX}pinned_segments",
    "gauge",
    "Segments in host memory that are not evicted because requests were promised them.",
)
STORED_BYTES = Metric(
    f"{_PREFIX}stored_bytes",
    "gauge",
    "Bytes of segments in host memory on one rank, those being written included.",
    {"kind": _KINDS},
)
GUARD_STATE = Metric(
    f"{_PREFIX}guard_state",
    "gauge",
    "Guard of a tier: 0 closed, 1 half-open, 2 open: it is left alone. The worst of all ranks.",
    {"tier": _BELOW},
)
TIER_BYTES_PER_SECOND = Metric(
    f"{_PREFIX}tier_bytes_per_second",
    "gauge",
    "Bandwidth of reading from a tier that break_even goes by. Of the slowest rank.",
    {"tier": _BELOW},
)
TIER_LATENCY_SECONDS = Metric(
    f"{_PREFIX}tier_latency_seconds",
    "gauge",
    "Latency of reading from a tier that break_even goes by. Of the slowest rank.",
    {"tier": _BELOW},
)
PREFILL_TOKENS_PER_SECOND = Metric(
    f"{_PREFIX}prefill_tokens_per_second",
    "gauge",
    "Speed of vLLM's own prefill that break_even goes by. Of the slowest rank.",
)

METRICS = (
    *(IMAGES, LOOKUPS, REUSED_TOKENS, RECOMPUTED_TOKENS, SPARSE_PREFILL_TOKENS),
    *(READ_BYTES, WRITTEN_BYTES, STORED_SEGMENTS, EVICTED_SEGMENTS),
    *(REFUSED, FELL_BACK, NET_SAVED_SECONDS, TTFT_PART_SECONDS),
    *(PINNED_SEGMENTS, STORED_BYTES, GUARD_STATE),
    *(TIER_BYTES_PER_SECOND, TIER_LATENCY_SECONDS, PREFILL_TOKENS_PER_SECOND),
)
"""All of them."""

_BY_NAME = {metric.name: metric for metric in METRICS}

_shown: VLCachePromMetrics | None = None
"""What this process shows on `/metrics`; of several, vLLM shows the latest."""


def count(metric: Metric, *labels: str) -> None:
    """Add one to a counter in the frontend's process, where stats need not travel."""
    if _shown is not None:
        _shown.count(metric, *labels)


class VLCacheStats(KVConnectorStats):
    """What happened since the last stats, on its way from the scheduler side to vLLM's loggers.

    `data` goes through msgpack: a metric's name -> values of its labels -> what was added to a
    counter, what was observed (a list), or the latest value of a gauge.
    """

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data

    def add(self, metric: Metric, *labels: str, amount: float = 1) -> None:
        """Add to a counter."""
        values = self.data.setdefault(metric.name, {})
        values[labels] = values.get(labels, 0) + amount

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        """Add an observation to a histogram."""
        self.data.setdefault(metric.name, {}).setdefault(labels, []).append(value)

    def set(self, metric: Metric, *labels: str, value: float) -> None:
        """Set a gauge."""
        self.data.setdefault(metric.name, {})[labels] = value

    def aggregate(self, other: KVConnectorStats) -> VLCacheStats:
        """These stats and later ones; neither is changed, several loggers share them."""
        merged = VLCacheStats({name: dict(values) for name, values in self.data.items()})
        for name, values in other.data.items():
            mine = merged.data.setdefault(name, {})
            for labels, value in values.items():
                is_new = labels not in mine or _BY_NAME[name].kind == "gauge"
                mine[labels] = value if is_new else mine[labels] + value
        return merged

    def reduce(self) -> dict[str, int | float]:
        """The line that vLLM logs: sums, means of what was observed, latest values."""
        line: dict[str, int | float] = {}
        for name, values in self.data.items():
            short = name.removeprefix(_PREFIX)
            for labels, value in values.items():
                shown = f"{short}{{{','.join(labels)}}}" if labels else short
                if isinstance(value, list):
                    line[f"{shown}_count"] = len(value)
                    line[f"{shown}_mean"] = round(sum(value) / len(value), 6)
                else:
                    line[shown] = round(value, 6)
        return line


class VLCachePromMetrics(KVConnectorPromMetrics):
    """All of `METRICS` in Prometheus; counters begin at zero."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        makers = {
            "counter": lambda **arguments: metric_types[Counter](**arguments),
            # API servers take turns in getting stats: the last one who was told is right.
            "gauge": lambda **arguments: metric_types[Gauge](
                multiprocess_mode="mostrecent", **arguments
            ),
            "histogram": lambda **arguments: metric_types[Histogram](**arguments),
        }
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            arguments = {"buckets": metric.buckets} if metric.buckets else {}
            made = self._metrics[metric.name] = makers[metric.kind](
                name=metric.name,
                documentation=metric.help,
                labelnames=[*labelnames, *metric.labels],
                **arguments,
            )
            if metric.kind == "counter":
                for engine in per_engine_labelvalues.values():
                    for labels in itertools.product(*metric.labels.values()):
                        made.labels(*engine, *labels)
        global _shown
        _shown = self

    def count(self, metric: Metric, *labels: str) -> None:
        """Add one to a counter of what happens before a request has an engine: the first one's."""
        engine = next(iter(self.per_engine_labelvalues.values()))
        self._metrics[metric.name].labels(*engine, *labels).inc()

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in the data of a `VLCacheStats`."""
        engine = self.per_engine_labelvalues[engine_idx]
        for name, values in transfer_stats_data.items():
            kind = _BY_NAME[name].kind
            for labels, value in values.items():
                child = self._metrics[name].labels(*engine, *labels)
                if kind == "counter":
                    child.inc(value)
                elif kind == "gauge":
                    child.set(value)
                else:
                    for observation in value:
                        child.observe(observation)

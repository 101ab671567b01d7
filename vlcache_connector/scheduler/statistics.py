"""What happens, counted: for vLLM's metrics, and by name for whoever looks closer."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping

from .. import metrics
from ..metrics import Metric, VLCacheStats
from ..protocol import Outcome, StepReport, TierState, TTFTPart, WorkerState
from .index import ResidencyIndex
from .requests import Loaded

_SPENT: frozenset[TTFTPart] = frozenset({"staging", "load", "sparse_prefill"})
"""What reuse costs a request."""
_SEGMENTS = {"stored": metrics.STORED_SEGMENTS, "evicted": metrics.EVICTED_SEGMENTS}


class Statistics:
    """Counts what the scheduler side sees and what the workers report.

    Args:
        indices: of host memory, by the kind of what they hold.
    """

    def __init__(self, indices: Mapping[str, ResidencyIndex]) -> None:
        self._indices = indices
        self.events: Counter[str] = Counter()
        """What went wrong, was refused, or happened in the tiers, by name, since the start."""
        self._new = VLCacheStats()
        self._told: dict[tuple[str, ...], float] = {}
        """Name and labels of a gauge -> its value when it was last told."""
        self._workers: dict[int, WorkerState] = {}
        self._net_saved_seconds = 0.0

    def happened(self, event: str, count: int = 1) -> None:
        """Count an event: `failed.<what>`, `refused.<why>`, or one of a worker's."""
        self.events[event] += count
        counter = _counter_of(event)
        if counter is not None:
            metric, label = counter
            self._new.add(metric, label, amount=count)

    def looked_up(self, tier: str | None, outcome: Outcome) -> None:
        """The KV of a request's item was looked for.

        Args:
            tier: that it was found in, or that gave no answer.
        """
        self._new.add(metrics.LOOKUPS, tier or metrics.NOWHERE, outcome)
        if outcome == "late":
            self.happened("refused.late")

    def take_report(self, report: StepReport) -> None:
        """Take in the workers' events and what they have learned."""
        for event, count in report.events.items():
            self.happened(event, count)
        if report.states:
            self._workers |= report.states
            self._set_worker_gauges()

    def loaded(self, loaded: Loaded, seconds: Mapping[TTFTPart, float]) -> None:
        """A request's claim was filled.

        Args:
            seconds: of staging, load and sparse prefill, as far as they are known.
        """
        figures = loaded.figures
        if figures.fallback is not None:
            self.happened(f"fallback.{figures.fallback.replace(' ', '_')}")
        for item, tier in loaded.tiers.items():
            self.looked_up(tier, "hit" if item in figures.reused else "failed")
            self._new.add(metrics.REUSED_TOKENS, tier, amount=figures.reused.get(item, 0))
        self._new.add(metrics.RECOMPUTED_TOKENS, amount=figures.recomputed_tokens)
        self._new.add(metrics.SPARSE_PREFILL_TOKENS, amount=figures.computed_tokens)
        speed = self.prefill_speed
        if speed is not None and seconds.keys() >= _SPENT:
            spent = sum(seconds[part] for part in _SPENT)
            self._saved(len(loaded.plan.claim) / speed - spent)

    def answered(self, seconds: Mapping[TTFTPart, float], tier: str | None) -> None:
        """A request that got its first token has ended.

        Args:
            seconds: of the parts of its time to first token that are known.
            tier: slowest that something it reused was found in; None: it reused nothing.
        """
        for part, took in seconds.items():
            self._new.observe(metrics.TTFT_PART_SECONDS, part, tier or metrics.NOWHERE, value=took)

    def waited_in_vain(self, seconds: float) -> None:
        """A request waited for segments from below host memory, and claims nothing."""
        if seconds:
            self._saved(-seconds)

    def _saved(self, seconds: float) -> None:
        self._net_saved_seconds += seconds
        self._set(metrics.NET_SAVED_SECONDS, value=self._net_saved_seconds)

    @property
    def prefill_speed(self) -> float | None:
        """Tokens per second of vLLM's own prefill, of the slowest rank; None: not known yet."""
        return _slowest(state.tokens_per_second for state in self._workers.values())

    def read_seconds(self, tier: str, num_bytes: int) -> float | None:
        """How long loading so many bytes from a tier takes on the slowest rank; None: not known."""
        seconds = [
            state.latency_seconds + num_bytes / (state.bytes_per_second or math.inf)
            for worker in self._workers.values()
            if (state := worker.tiers.get(tier)) and state.latency_seconds is not None
        ]
        return max(seconds, default=None)

    def take(self) -> VLCacheStats | None:
        """What is new since the last call; None: nothing."""
        for kind, index in self._indices.items():
            for event, count in index.take_events().items():
                if event == "no_room":
                    self.happened("refused.no_room", count)
                else:
                    self._new.add(_SEGMENTS[event], kind, amount=count)
            self._set(metrics.STORED_BYTES, kind, value=index.used_bytes)
        pinned = sum(index.num_promised for index in self._indices.values())
        self._set(metrics.PINNED_SEGMENTS, value=pinned)
        if self._new.is_empty():
            return None
        new, self._new = self._new, VLCacheStats()
        return new

    def _set_worker_gauges(self) -> None:
        """Of the slowest rank, and of the worst guard of each tier."""
        self._set(metrics.PREFILL_TOKENS_PER_SECOND, value=self.prefill_speed)
        by_tier: dict[str, list[TierState]] = {}
        for worker in self._workers.values():
            for tier, state in worker.tiers.items():
                by_tier.setdefault(tier, []).append(state)
        for tier, states in by_tier.items():
            guard = max(metrics.GUARD_STATES.index(state.guard) for state in states)
            self._set(metrics.GUARD_STATE, tier, value=guard)
            speed = _slowest(state.bytes_per_second for state in states)
            self._set(metrics.TIER_BYTES_PER_SECOND, tier, value=speed)
            latencies = [s.latency_seconds for s in states if s.latency_seconds is not None]
            self._set(metrics.TIER_LATENCY_SECONDS, tier, value=max(latencies, default=None))

    def _set(self, metric: Metric, *labels: str, value: float | None) -> None:
        """Set a gauge, if it has changed."""
        if value is not None and self._told.get((metric.name, *labels)) != value:
            self._told[metric.name, *labels] = value
            self._new.set(metric, *labels, value=value)


def _slowest(speeds: Iterable[float | None]) -> float | None:
    return min((speed for speed in speeds if speed is not None), default=None)


@functools.cache
def _counter_of(event: str) -> tuple[Metric, str] | None:
    """Metric that counts an event, and its label; None: none does.

    Failures that show in a request's figures as well are counted there, once for all ranks.
    """
    what, _, detail = event.partition(".")
    if what == "refused":
        return metrics.REFUSED, detail
    if what in ("failed", "fallback"):
        return (metrics.FELL_BACK, detail) if detail in metrics.FALLBACKS else None
    # Of a tier.
    if detail == "read.bytes":
        return metrics.READ_BYTES, what
    if detail == "write.bytes":
        return metrics.WRITTEN_BYTES, what
    operation, _, ended = detail.partition(".")
    if operation == "refused":
        return metrics.REFUSED, ended
    if ended == "skipped":
        return metrics.REFUSED, "left_alone"
    if ended == "queue_full":
        return metrics.REFUSED, "queue_full"
    if ended in ("late", "failed"):
        return metrics.FELL_BACK, f"tier_{operation}"
    return None

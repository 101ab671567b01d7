"""Metrics in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from vlcache_connector.metrics import Metric


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

    def by(self, metric: Metric) -> dict[tuple[str, ...], float]:
        """Values of a counter or gauge that are not zero, by its own labels."""
        return {
            tuple(sample.labels[label] for label in metric.labels): sample.value
            for sample in self.samples
            if sample.name == metric.name and sample.value
        }

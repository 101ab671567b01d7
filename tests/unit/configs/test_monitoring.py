"""configs/docker: what Prometheus scrapes, and what Grafana shows of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from tests.helpers.deployment import CONFIGS, FROM_VLLM
from vlcache_connector.metrics import METRICS, Metric

DOCKER = CONFIGS / "docker"
SERVICES: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
DASHBOARD: dict[str, Any] = json.loads(
    (DOCKER / "grafana" / "dashboards" / "vlcache.json").read_text()
)


COMMON_LABELS = {"model_name", "engine", "instance", "job"}


def series(metric: Metric) -> dict[str, set[str]]:
    """Labels of the series of a metric that queries may ask for, by name."""
    labels = COMMON_LABELS | set(metric.labels)
    if metric.kind != "histogram":
        return {metric.name: labels}
    return {
        f"{metric.name}_bucket": labels | {"le"},
        f"{metric.name}_sum": labels,
        f"{metric.name}_count": labels,
    }


KNOWN = {
    name: labels for metric in (*METRICS, *FROM_VLLM) for name, labels in series(metric).items()
}


def queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def parsed(query: str) -> Any:
    """A query as Grafana sends it, its variables filled in."""
    filled = re.sub(r"\$__(rate_interval|range)", "5m", query)
    return promql_parser.parse(re.sub(r"\$(model|instance)", ".*", filled))


def nodes(expression: Any) -> Iterator[Any]:
    """An expression and all in it."""
    yield expression
    for part in ("lhs", "rhs", "expr", "param", "vector_selector"):
        below = getattr(expression, part, None)
        if below is not None:
            yield from nodes(below)
    for argument in getattr(expression, "args", None) or ():
        yield from nodes(argument)


def selectors(expression: Any) -> list[Any]:
    return [node for node in nodes(expression) if isinstance(node, promql_parser.VectorSelector)]


def unknown(query: str) -> set[str]:
    """Metrics and labels of a query that are not exported."""
    expression = parsed(query)
    names = {selector.name for selector in selectors(expression)}
    found = names - set(KNOWN)
    allowed = set.intersection(*(KNOWN[name] for name in names & set(KNOWN)))
    for node in nodes(expression):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            found |= set(node.modifier.labels) - allowed
        if isinstance(node, promql_parser.VectorSelector):
            found |= {matcher.name for matcher in node.matchers.matchers} - allowed
    return found


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_what_is_exported(query: str) -> None:
    assert selectors(parsed(query))
    assert unknown(query) == set()


def test_what_is_not_exported_is_found() -> None:
    filters = 'model_name=~"$model"'
    assert unknown(f"rate(vllm:vlcache_reused_tokens_total{{{filters}}}[5m])") == set()
    for query, expected in (
        ("sum by (kind) (vllm:vlcache_reused_tokens_total)", {"kind"}),
        ("vllm:vlcache_reused_tokens_total{place='cpu'}", {"place"}),
        ("vllm:vlcache_lookups_total / vllm:vlcache_lookups", {"vllm:vlcache_lookups"}),
        (
            "rate(vllm:vlcache_lookups_total[5m]) + vllm:vlcache_ttft_part_seconds",
            {"vllm:vlcache_ttft_part_seconds"},
        ),
    ):
        assert unknown(query) == expected


def test_the_kind_of_a_metric_fits_its_use() -> None:
    counters = {metric.name for metric in METRICS if metric.kind == "counter"}
    for query in queries():
        ranged = {
            node.vector_selector.name
            for node in nodes(parsed(query))
            if isinstance(node, promql_parser.MatrixSelector)
        }
        asked = {selector.name for selector in selectors(parsed(query))}
        is_cumulative = {name for name in asked if name in counters or name.endswith("_bucket")}
        assert ranged == is_cumulative, query


def test_every_metric_is_shown() -> None:
    shown = {selector.name for query in queries() for selector in selectors(parsed(query))}
    for metric in METRICS:
        assert shown & set(series(metric)), metric.name


def test_panels_have_places_and_numbers_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    mounts = dict(volume.split(":")[1::-1] for volume in SERVICES["grafana"]["volumes"])
    assert (DOCKER / mounts["/etc/grafana/provisioning"]).resolve() == provisioning.resolve()
    [provider] = yaml.safe_load((provisioning / "dashboards" / "vlcache.yaml").read_text())[
        "providers"
    ]
    folder = DOCKER / mounts[provider["options"]["path"]]
    assert [path.name for path in folder.iterdir()] == ["vlcache.json"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/vlcache.json"

    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert set(SERVICES["grafana"]["networks"]) & set(SERVICES["prometheus"]["networks"])
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    for panel in DASHBOARD["panels"]:
        for asks in [panel, *panel.get("targets", ())] if panel["type"] != "row" else []:
            assert asks["datasource"] == {"type": source["type"], "uid": "${datasource}"}
    for name in ("model", "instance"):
        [metric] = re.findall(r"label_values\(([a-z_:]+)", variables[name]["query"])
        assert metric in KNOWN


def test_prometheus_scrapes_both_servers() -> None:
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    [static] = job["static_configs"]
    assert static["targets"] == [f"{name}:8000" for name in SERVICES if name.startswith("vllm")]
    [mounted] = SERVICES["prometheus"]["configs"]
    assert mounted["target"] == "/etc/prometheus/prometheus.yml"  # where the image looks
    for name in ("vllm-a", "vllm-b"):
        assert set(SERVICES[name]["networks"]) & set(SERVICES["prometheus"]["networks"])
    provisioned = yaml.safe_load(
        (DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    [source] = provisioned["datasources"]
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]

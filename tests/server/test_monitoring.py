"""What the dashboard takes from vLLM, as a real server exports it."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families
from serving import VLLMServer

from tests.helpers.deployment import FROM_VLLM


def test_vllm_exports_its_own(cpu_server: VLLMServer) -> None:
    response = httpx.get(f"{cpu_server.base_url}/metrics", trust_env=False)
    exported = {family.name: family for family in text_string_to_metric_families(response.text)}
    for metric in FROM_VLLM:
        assert exported[metric.name].type == metric.kind
        assert "model_name" in exported[metric.name].samples[0].labels

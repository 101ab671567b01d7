"""`vllm serve` with VLCache: its answers, its metrics, its log."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import VLLMServer, chat, image_part, make_client, make_image, text_part

from tests.helpers.exposition import Exposition
from vlcache_connector import metrics
from vlcache_connector.protocol import TIERS


class Serving:
    """A server with a disk tier, and the figures of all its answers."""

    def __init__(self, server: VLLMServer, client: httpx.Client) -> None:
        self._server = server
        self._client = client
        self.figures: list[dict[str, Any]] = []

    def ask(self, text: str, *parts: dict[str, Any]) -> dict[str, Any] | None:
        asked = time.monotonic()
        answer = chat(self._client, self._server, [text_part(text), *parts, text_part("why")])
        took = time.monotonic() - asked
        figures = (answer.kv_transfer_params or {}).get("vlcache")
        if figures is not None:
            self.figures.append(figures)
            seconds = figures["ttft_part_seconds"]
            assert min(seconds.values()) >= 0
            assert sum(seconds.values()) <= took
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


@pytest.fixture(scope="module")
def server(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMServer]:
    """With one flag: the multi-process engine, found by name through the plug-in."""
    folder = tmp_path_factory.mktemp("server")
    config = {
        "cpu_bytes": "64MiB",
        "encoder_cpu_bytes": "64MiB",
        "disk_path": str(folder / "segments"),
        "fetch_deadline_seconds": 20.0,
        # On so small a model nothing would be worth a load.
        "break_even": False,
    }
    with VLLMServer(
        tiny_model(),
        connector=config,
        extra_args=[
            *("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32"),
            "--enable-scale-out",  # endpoints for tokens instead of text
        ],
        log_path=folder / "server.log",
        env={"TORCHDYNAMO_DISABLE": "1", "VLLM_SERVER_DEV_MODE": "1"},
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with make_client() as client:
        yield client


def test_a_servers_metrics_agree_with_its_answers(server: VLLMServer, client: httpx.Client) -> None:
    """The first test of this server, which has counted nothing yet."""
    serving = Serving(server, client)
    first, second = (image_part(make_image(seed, 224)) for seed in (15, 16))
    idle = serving.scrape()
    assert idle.by(metrics.LOOKUPS) == {}

    serving.ask("a new one", first)
    serving.ask("the same elsewhere, and another new one", first, text_part("and"), second)
    serving.ask("named by the client", {**second, "uuid": "holiday.png"})
    deadline = time.monotonic() + 60
    while (scraped := serving.scrape())(metrics.WRITTEN_BYTES.name, tier="fs") < scraped(
        metrics.STORED_BYTES.name
    ):
        assert time.monotonic() < deadline
    assert scraped.by(metrics.LOOKUPS) == {("none", "miss"): 2, ("cpu", "hit"): 1}
    assert scraped.by(metrics.STORED_SEGMENTS) == {("kv",): 2, ("encoder",): 2}
    assert scraped.by(metrics.REFUSED) == {("client_uuid",): 1}
    assert scraped(metrics.GUARD_STATE.name, tier="fs") == 0
    assert ("fs",) in {
        tuple(s.labels[label] for label in metrics.GUARD_STATE.labels)
        for s in scraped.samples
        if s.name == metrics.GUARD_STATE.name
    }
    assert scraped(metrics.READ_BYTES.name) == 0

    serving.reset()
    figures = serving.ask("out of the disk, at yet another place", second, text_part("x"), first)
    assert figures is not None
    assert figures["tier"] == "fs"
    scraped = serving.scrape()
    assert scraped.by(metrics.LOOKUPS) == {
        ("none", "miss"): 2,
        ("cpu", "hit"): 1,
        ("fs", "hit"): 2,
    }
    assert scraped.by(metrics.STORED_SEGMENTS) == {("kv",): 4, ("encoder",): 4}
    assert scraped.by(metrics.EVICTED_SEGMENTS) == {}  # what was reset had not to make room
    assert scraped.by(metrics.FELL_BACK) == {}
    assert scraped(metrics.READ_BYTES.name, tier="fs") >= figures["reused_tokens"]
    assert scraped(metrics.PINNED_SEGMENTS.name) == 0

    def total(figure: str, **equal: str) -> float:
        return sum(f[figure] for f in serving.figures if equal.items() <= f.items())

    for tier in TIERS:
        reused = total("reused_tokens", tier=tier)
        assert scraped(metrics.REUSED_TOKENS.name, tier=tier) == reused
    assert sum(figures["reused_tokens"] > 0 for figures in serving.figures) == 2
    for part in metrics.PARTS:
        is_of_reuse = part in ("load", "sparse_prefill")
        for tier in (None, *TIERS):
            seconds = [
                f["ttft_part_seconds"].get(part) for f in serving.figures if f["tier"] == tier
            ]
            known = [took for took in seconds if took is not None]
            assert len(known) == (0 if is_of_reuse and tier is None else len(seconds)), part
            labels = {"part": part, "tier": tier or metrics.NOWHERE}
            observed = metrics.TTFT_PART_SECONDS.name
            assert scraped(f"{observed}_count", **labels) == len(known)
            assert scraped(f"{observed}_sum", **labels) == pytest.approx(sum(known), abs=1e-4)
    assert scraped(metrics.RECOMPUTED_TOKENS.name) == total("recomputed_tokens") > 0
    assert scraped(metrics.SPARSE_PREFILL_TOKENS.name) == total("computed_tokens")
    speed = scraped(metrics.PREFILL_TOKENS_PER_SECOND.name)
    claimed = scraped("vllm:external_prefix_cache_hits_total")
    assert scraped(metrics.NET_SAVED_SECONDS.name) < claimed / speed
    # A small segment may take as long as a large one: then all of it is latency.
    assert (
        scraped(metrics.TIER_BYTES_PER_SECOND.name, tier="fs")
        + scraped(metrics.TIER_LATENCY_SECONDS.name, tier="fs")
        > 0
    )

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
        "disk": total("reused_tokens", tier="fs"),
        "external_unspecified": computed,
    }


def test_answers_over_the_openai_api(server: VLLMServer, client: httpx.Client) -> None:
    picture = image_part(make_image(5, 224))

    def figures(text: str, vlcache: dict[str, Any] | None = None) -> dict[str, Any]:
        params = None if vlcache is None else {"vlcache": vlcache}
        content = [text_part(text), picture, text_part("why")]
        answer = chat(client, server, content, kv_transfer_params=params)
        assert answer.kv_transfer_params is not None
        return answer.kv_transfer_params["vlcache"]

    assert figures("first")["reused_tokens"] == 0
    assert figures("now behind a longer text")["reused_tokens"] > 0
    assert figures("switched off", {"enabled": False})["computed_tokens"] == 0
    assert figures("a bad ratio", {"recompute_ratio": 2})["reused_tokens"] > 0
    grid = io.BytesIO()
    torch.save(torch.tensor([1, 8, 8]), grid)
    without_tensor = {"image_grid_thw": base64.b64encode(grid.getvalue()).decode()}
    part = {"type": "image_embeds", "uuid": "x", "image_embeds": without_tensor}
    message = {"role": "user", "content": [part, text_part("embeddings left out")]}
    refused = client.post(
        f"{server.base_url}/v1/chat/completions",
        json={"model": server.model, "messages": [message]},
    )
    assert refused.status_code == 400
    assert figures("still alive")["reused_tokens"] > 0
    assert "kv_transfer_params.vlcache: recompute_ratio=2" in server.log_path.read_text()


def test_a_hash_in_a_token_in_request_is_taken_for_no_content(
    server: VLLMServer, client: httpx.Client
) -> None:
    """Whoever sends another picture under a known one's hash neither gets nor leaves anything."""
    serving = Serving(server, client)
    known, other = (image_part(make_image(seed, 224)) for seed in (25, 26))

    def rendered(text: str, picture: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": "user", "content": [text_part(text), picture, text_part("why")]}]
        answer = client.post(
            f"{server.base_url}/v1/chat/completions/render",
            json={"model": server.model, "messages": messages, "max_tokens": 1},
        )
        answer.raise_for_status()
        body: dict[str, Any] = answer.json()
        return body

    serving.ask("known", known)
    before = serving.scrape()
    forged = rendered("another one", other)
    forged["features"]["mm_hashes"] = rendered("known", known)["features"]["mm_hashes"]
    for body in (forged, rendered("known, in its own name", known)):
        answer = client.post(f"{server.base_url}/inference/v1/generate", json=body)
        assert answer.status_code == 200, answer.text
    after = serving.scrape()
    refused = metrics.REFUSED.name
    assert after(refused, reason="client_uuid") == before(refused, reason="client_uuid") + 2
    assert after.by(metrics.STORED_SEGMENTS) == before.by(metrics.STORED_SEGMENTS)
    figures = serving.ask("known, at another place", known)
    assert figures is not None
    assert figures["reused_tokens"] > 0

"""configs/*.yaml, served."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from local_redis import LocalRedis
from serving import (
    Answer,
    VLLMServer,
    chat,
    image_part,
    make_client,
    make_image,
    text_part,
)

from tests.helpers.deployment import CONFIGS, SMALL, with_options
from vlcache_connector.storage.header import FORMAT_VERSION


def ask(client: httpx.Client, server: VLLMServer, text: str, seed: int) -> Answer:
    return chat(client, server, [text_part(text), image_part(make_image(seed, 224))])


def figure(answer: Answer, name: str) -> Any:
    return (answer.kv_transfer_params or {})["vlcache"][name]


def test_the_cpu_configuration_reuses_an_image(cpu_server: VLLMServer) -> None:
    with make_client() as client:
        first = ask(client, cpu_server, "What is this?", seed=1)
        again = ask(client, cpu_server, "Now in other words: what is in the picture?", seed=1)
    assert figure(first, "reused_tokens") == 0
    assert figure(again, "reused_tokens") == (224 // 28) ** 2 - 8
    assert figure(again, "tier") == "cpu"


def test_servers_share_images_through_redis(
    serve: Callable[..., VLLMServer],
    redis_server: Callable[..., LocalRedis],
    tmp_path: Path,
) -> None:
    redis = redis_server(requirepass="hunter2")
    credentials = tmp_path / "credentials"
    credentials.write_text(":hunter2\n")
    env = {"VLCACHE_REDIS_CREDENTIALS_FILE": str(credentials)}

    def server(name: str, **options: Any) -> VLLMServer:
        config = CONFIGS / f"{name}.yaml"
        copy = with_options(config, tmp_path, redis_url=redis.url, **SMALL, **options)
        return serve(copy, tmp_path / f"{name}.log", **env)

    def keys() -> set[bytes]:
        return set(redis.client.scan_iter())

    with make_client() as client, server("redis", write_queue_bytes="64MiB") as first:
        ask(client, first, "What is this?", seed=2)
        until = time.monotonic() + 30
        # Its encoder rows, and its KV.
        while len(keys()) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        again = ask(client, first, "Now in other words: what is in the picture?", seed=2)
        assert figure(again, "reused_tokens") > 0
        assert figure(again, "tier") == "cpu"
    stored = keys()
    assert len(stored) == 2
    assert all(key.startswith(f"vlcache{FORMAT_VERSION}-production-".encode()) for key in stored)

    with make_client() as client, server("consumer") as second:
        known = ask(client, second, "Seen by the other server. What is it?", seed=2)
        assert figure(known, "reused_tokens") == figure(again, "reused_tokens")
        assert figure(known, "tier") == "valkey"
        ask(client, second, "What is this?", seed=3)
        new = ask(client, second, "And once more, what is this?", seed=3)
        assert figure(new, "reused_tokens") == 0
    assert keys() == stored
    for log in tmp_path.glob("*.log"):
        assert "hunter2" not in log.read_text(errors="replace")

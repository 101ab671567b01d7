"""Several API servers in front of one engine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serving import VLLMServer, chat, image_part, make_client, make_image, text_part

from tests.helpers.exposition import Exposition


def test_each_of_them_finds_what_another_had_stored(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM's processor cache then stays in each of them, and every request carries its pixels."""
    with VLLMServer(
        tiny_model(),
        connector={"cpu_bytes": "64MiB", "encoder_cpu_bytes": "64MiB", "break_even": False},
        extra_args=[
            *("--api-server-count", "2", "--enforce-eager", "--max-model-len", "2048"),
            *("--dtype", "float32"),
        ],
        log_path=tmp_path / "server.log",
        env={"TORCHDYNAMO_DISABLE": "1"},
    ) as server:

        def ask(number: int) -> int:
            parts = [text_part(f"Question {number} about"), image_part(make_image(5, 224))]
            with make_client() as client:  # a connection of its own, which either of them takes
                answer = chat(client, server, parts, max_tokens=1)
            assert answer.kv_transfer_params is not None
            return int(answer.kv_transfer_params["vlcache"]["reused_tokens"])

        first = ask(0)
        with ThreadPoolExecutor(4) as pool:
            reused = list(pool.map(ask, range(1, 17)))
        time.sleep(0.5)
        with make_client() as client:
            metrics = Exposition(client.get(f"{server.base_url}/metrics").text)
        log = (tmp_path / "server.log").read_text()
    tokens = (224 // 28) ** 2
    expected = tokens - max(8, round(0.05 * tokens))
    assert (first, reused) == (0, 16 * [expected])
    assert metrics("vllm:vlcache_reused_tokens_total") == 16 * expected
    # Each knows the images that it decoded itself.
    images = {d: metrics("vllm:vlcache_images_total", decoding=d) for d in ("decoded", "known")}
    assert sum(images.values()) == 17
    assert images["known"] > 0
    assert set(re.findall(r"ApiServer_\d", log)) == {"ApiServer_0", "ApiServer_1"}

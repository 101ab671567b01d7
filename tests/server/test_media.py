"""Known images over HTTP: not decoded, and answered as before; bad ones refused as before."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import VLLMServer, chat, make_client, text_part
from vllm.multimodal.media import ImageMediaIO

from tests.helpers.exposition import Exposition
from tests.helpers.files import BAD_IMAGES, GOOD_IMAGES, damaged_png, encoded, photo
from vlcache_connector.metrics import DECODING, FELL_BACK, IMAGES

STATUS = {"decompression bomb": 500, "animated decompression bomb": 500}
"""What plain vLLM answers with, where it isn't 400."""

EXACT: dict[str, Any] = {"kv_transfer_params": {"vlcache": {"enabled": False}}}
"""No reuse of KV, which changes answers."""


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with make_client() as client:
        yield client


def part(data: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def images(client: httpx.Client, server: VLLMServer) -> dict[str, float]:
    """How many were decoded on arrival, known, decoded late; and our own failures."""
    scraped = Exposition(client.get(f"{server.base_url}/metrics").text)
    found = {decoding: scraped(IMAGES.name, decoding=decoding) for decoding in DECODING}
    return found | {"failed": scraped(FELL_BACK.name, reason="media")}


def more(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_a_known_image_is_answered_as_before_without_being_decoded(
    cpu_server: VLLMServer, client: httpx.Client, name: str
) -> None:
    content = [text_part(f"What is in this {name}?"), part(GOOD_IMAGES[name]())]
    before = images(client, cpu_server)
    first = chat(client, cpu_server, content, **EXACT)
    assert more(before, images(client, cpu_server)) == {"decoded": 1}
    again = chat(client, cpu_server, content, **EXACT)
    assert more(before, images(client, cpu_server)) == {"decoded": 1, "known": 1}
    assert again.prompt_tokens == first.prompt_tokens
    assert again.text == first.text
    assert again.first_logprobs == pytest.approx(first.first_logprobs, abs=1e-4)


def test_a_damaged_image_that_vllm_takes_is_decoded_each_time(
    cpu_server: VLLMServer, client: httpx.Client
) -> None:
    content = [text_part("What is this?"), part(damaged_png())]
    before = images(client, cpu_server)
    first, again = (chat(client, cpu_server, content, **EXACT) for _ in range(2))
    assert again.text == first.text
    assert more(before, images(client, cpu_server)) == {"decoded": 2}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_as_by_plain_vllm(
    cpu_server: VLLMServer, client: httpx.Client, name: str
) -> None:
    data = BAD_IMAGES[name]()
    with pytest.raises(Exception) as refused:  # noqa: PT011
        ImageMediaIO().load_bytes(data)
    message = re.sub(" at 0x[0-9a-f]+", "", str(refused.value))
    good, bad = part(encoded(photo(20), "PNG")), part(data)
    chat(client, cpu_server, [text_part("What?"), good])
    before = images(client, cpu_server)
    for _ in range(2):
        # After a 500 the connection is closed.
        answer = httpx.post(
            f"{cpu_server.base_url}/v1/chat/completions",
            json={
                "model": cpu_server.model,
                "messages": [{"role": "user", "content": [good, bad]}],
                "max_completion_tokens": 1,
            },
            timeout=300,
            trust_env=False,
        )
        assert answer.status_code == STATUS.get(name, 400), answer.text
        assert answer.json()["error"]["message"] == message
    assert more(before, images(client, cpu_server)) == {"known": 2}

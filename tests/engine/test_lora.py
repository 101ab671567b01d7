"""Requests for the base model beside requests with an adapter, in the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.adapter import RANK, make_adapter
from tests.helpers.engine import IMAGE, Answer, Ask, Engine, answer_of, request_of
from vlcache_connector.storage.header import SegmentId

PICTURE = (601, 224)
DONOR = Ask(f"seen before {IMAGE} here", (PICTURE,))
BASE = Ask(f"the same one, moved {IMAGE} what is it", (PICTURE,), max_tokens=8)
ADAPTED = Ask("only text, answered by the adapter", max_tokens=24)
ADAPTED_KNOWN = Ask(f"the adapter is shown {IMAGE} as well", (PICTURE,), max_tokens=4)


def beside_an_adapter(
    llm: Any, adapter: str, adapted: Ask, asks: list[Ask], steps: int = 3
) -> list[Answer]:
    """Ask the adapter, and after a few steps of it the base model; the adapter's answer first."""
    from vllm.lora.request import LoRARequest

    engine, answers = llm.llm_engine, {}

    def step() -> None:
        for output in engine.step():
            if output.finished:
                # vLLM appends something of its own to the names of requests.
                answers[output.request_id[0]] = answer_of(output)

    engine.add_request(
        "0-adapted", *request_of(adapted), lora_request=LoRARequest("adapter", 1, adapter)
    )
    for _ in range(steps):
        step()
    for index, ask in enumerate(asks, 1):
        engine.add_request(f"{index}-base", *request_of(ask))
    while engine.has_unfinished_requests():
        step()
    return [answer for _, answer in sorted(answers.items())]


def assert_same(actual: Answer, expected: Answer) -> None:
    assert actual.finish_reason == expected.finish_reason == "length"
    assert actual.tokens == expected.tokens
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def adapter(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_adapter(tmp_path_factory.mktemp("lora") / "adapter", tiny_model()))


@pytest.fixture(scope="module", params=["V1", "V2"])
def engine(tiny_model: Callable[..., Path], request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(
        tiny_model(),
        {"donor": "canonical"},
        runner=request.param,
        enable_lora=True,
        max_lora_rank=2 * RANK,
        # vLLM's CPU kernels take the last slot's weights for rows without an adapter: it is empty.
        max_loras=2,
    )
    yield engine
    engine.close()


def test_base_requests_beside_an_adapter(
    engines: Callable[..., Engine], engine: Engine, adapter: str
) -> None:
    plain = engines(None)
    [cold] = engine.call(beside_an_adapter, adapter, replace(ADAPTED_KNOWN, cache_salt="cold"), [])
    [alone] = engine.call(beside_an_adapter, adapter, ADAPTED, [])
    assert alone.tokens != plain.ask(ADAPTED)[0].tokens
    # The donor, and its canonical computation, run beside the adapter, too.
    engine.call(beside_an_adapter, adapter, ADAPTED, [DONOR])

    exact = replace(BASE, vlcache={"recompute_ratio": 1.0})
    adapted, base = engine.call(beside_an_adapter, adapter, ADAPTED, [exact])
    assert base.figures is not None
    assert base.figures["recomputed_tokens"] > 0
    assert base.figures["fallback"] is None
    assert_same(base, plain.ask(BASE)[0])
    assert_same(adapted, alone)

    [warm] = engine.call(beside_an_adapter, adapter, ADAPTED_KNOWN, [])
    assert warm.figures is None
    assert_same(warm, cold)


def stored_kv(llm: Any) -> list[torch.Tensor]:
    """All KV segments in host memory."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    worker = get_kv_transfer_group()._worker
    segments = []
    for key, kind in list(worker._storage.engine._resident):
        if kind == "kv":
            with worker._storage.get(SegmentId(key, kind)) as segment:
                layers = range(len(worker._model.layer_names))
                segments.append(torch.stack([torch.stack(segment.layer(i)) for i in layers]))
    return segments


def reset(llm: Any) -> None:
    """Forget all KV and encoder rows, vLLM's own ones, too."""
    llm.llm_engine.reset_prefix_cache(reset_connector=True)
    llm.llm_engine.reset_encoder_cache()


def test_no_adapter_gets_into_canonical_donors(engine: Engine, adapter: str) -> None:
    other = Ask(f"never seen {IMAGE} so far", ((602, 224),), max_tokens=4)
    engine.call(reset)
    engine.ask(replace(other, max_tokens=24))
    [alone] = engine.call(stored_kv)
    engine.call(reset)
    engine.call(beside_an_adapter, adapter, replace(ADAPTED, max_tokens=48), [other])
    [beside] = engine.call(stored_kv)
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)

"""Tensor-parallel ranks stay together whatever raises on one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Ask, Engine, EngineError, run

DONOR = Ask(f"seen before {IMAGE} here", ((701, 224),))
HANG_SECONDS = 120.0
"""vLLM itself waits for 300 s for a rank that does not answer."""


def known(name: str) -> Ask:
    return Ask(f"{name}: the same one, moved {IMAGE} what is it", DONOR.images, max_tokens=3)


def break_on_second_rank(worker: Any, path: str, times: int) -> None:
    """In a worker's process: let a method of the worker side raise for its first calls."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.distributed.parallel_state import get_tp_group

    if get_tp_group().rank_in_group != 1:
        return
    *owners, name = path.split(".")
    owner = get_kv_transfer_group()._worker
    for each in owners:
        owner = getattr(owner, each)
    original, left = getattr(owner, name), times

    def fault(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left == 0:
            return original(*args, **kwargs)
        left -= 1
        raise RuntimeError("injected fault")

    setattr(owner, name, fault)


def ask_with_a_broken_rank(llm: Any, path: str, times: int, ask: Ask) -> tuple[Any, float]:
    llm.collective_rpc(break_on_second_rank, args=(path, times))
    start = time.monotonic()
    [answer] = run(llm, [ask])
    return answer, time.monotonic() - start


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    engine = Engine(
        tiny_model(),
        {},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        },
    )
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "path",
    [
        "_loader.fetch",
        "_loader.open_rows",
        "_loader.job",
        "_loader.injection",
        "_storage.get",
        "_prefill._inputs_of",
        "_prefill._metadata.build",
        "_capture.expect",
        "_model.positions",
    ],
)
def test_what_raises_on_one_rank_is_computed_on_all(
    engines: Callable[..., Engine], engine: Engine, path: str
) -> None:
    engine.ask(DONOR)
    ask = known(path)
    answer, seconds = engine.call(ask_with_a_broken_rank, path, 1, ask)
    assert seconds < HANG_SECONDS
    assert answer.finish_reason == "length"
    if answer.figures["reused_tokens"] == 0:
        [expected] = engines(None).ask(ask)
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_reused_kv_that_can_not_be_written_on_one_rank(
    engines: Callable[..., Engine], engine: Engine
) -> None:
    """In the middle of a forward, between two collectives."""
    engine.ask(DONOR)
    ask = known("write")
    # Raises inside of the layers' hook.
    answer, seconds = engine.call(ask_with_a_broken_rank, "_loader._write", 1, ask)
    assert seconds < HANG_SECONDS
    assert answer.figures["reused_tokens"] == 0
    [expected] = engines(None).ask(ask)
    np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_a_forward_that_raises_on_one_rank_ends_the_engine_at_once(engine: Engine) -> None:
    engine.ask(DONOR)
    start = time.monotonic()
    with pytest.raises((EngineError, RuntimeError)):
        engine.call(ask_with_a_broken_rank, "_model.forward", 1, known("forward"))
    assert time.monotonic() - start < HANG_SECONDS

"""Tensor-parallel ranks stay together whatever raises on one of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Answer, Ask, Engine, EngineError, run

_images = itertools.count(701)
HANG_SECONDS = 120.0
"""vLLM itself waits for 300 s for a rank that does not answer."""


def made_known(engine: Engine, name: str) -> Ask:
    """A request for an image that the engine has seen; what broke before may have cost others."""
    images = ((next(_images), 224),)
    engine.ask(Ask(f"{name}: seen before {IMAGE} here", images))
    return Ask(f"{name}: the same one, moved {IMAGE} what is it", images, max_tokens=3)


def break_on_second_rank(worker: Any, path: str, fault: Path) -> None:
    """In a worker's process: a method of the worker side raises once when the file `fault` is
    there, and removes it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.distributed.parallel_state import get_tp_group

    *owners, name = path.split(".")
    owner = get_kv_transfer_group()._worker
    for each in owners:
        owner = getattr(owner, each)
    original = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if fault.exists():
            fault.unlink()
            raise RuntimeError("injected fault")
        return original(*args, **kwargs)

    if get_tp_group().rank_in_group == 1:
        setattr(owner, name, broken)


def prepare(llm: Any, path: str, fault: Path) -> None:
    llm.collective_rpc(break_on_second_rank, args=(path, fault))


def ask_and_time(llm: Any, ask: Ask) -> tuple[Answer, float]:
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
        "_capture.end_pass",
        # Raises inside of the layers' hook, in the middle of a forward.
        "_loader._write",
        "_model.positions",
    ],
)
def test_what_raises_on_one_rank_is_computed_on_all(
    engines: Callable[..., Engine], engine: Engine, tmp_path: Path, path: str
) -> None:
    fault = tmp_path / "fault"
    # First: what it does to a worker may be a change of the weights, and costs all that is stored.
    engine.call(prepare, path, fault)
    ask = made_known(engine, path)
    fault.touch()
    answer, seconds = engine.call(ask_and_time, ask)
    assert not fault.exists()
    assert seconds < HANG_SECONDS
    assert answer.finish_reason == "length"
    assert answer.figures is not None
    assert answer.figures["computed_tokens"] > 0
    parts = answer.figures["ttft_part_seconds"]
    assert set(parts) == {"queue", "processor", "load", "sparse_prefill", "forward"}
    assert sum(parts.values()) < seconds
    if answer.figures["reused_tokens"] == 0:
        [expected] = engines(None).ask(ask)
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_a_forward_that_raises_on_one_rank_ends_the_engine_at_once(
    engine: Engine, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    engine.call(prepare, "_model.forward", fault)
    ask = made_known(engine, "forward")
    fault.touch()
    start = time.monotonic()
    with pytest.raises((EngineError, RuntimeError)):
        engine.call(ask_and_time, ask)
    assert time.monotonic() - start < HANG_SECONDS

"""What vLLM and VLCache rely on at their seams, seen from outside: requests beside each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Answer, Ask, Engine, run

DONOR = Ask(f"seen before {IMAGE} here", ((501, 224),))


def known(name: str, **fields: Any) -> Ask:
    """The donor's image behind another text; no two names share a prefix."""
    return Ask(f"{name}: the same one, moved {IMAGE} what is it", DONOR.images, **fields)


def sides(llm: Any) -> tuple[Any, Any]:
    """The scheduler side and the worker side of the engine in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    return scheduler, get_kv_transfer_group()._worker


def run_with_fault(llm: Any, path: str, times: int, *asks: Ask) -> tuple[list[Answer], int]:
    """Run `asks` while the worker side's method at `path` raises for its first `times` calls.

    Returns:
        The answers, and how often it raised.
    """
    *owners, name = path.split(".")
    owner = sides(llm)[1]
    for each in owners:
        owner = getattr(owner, each)
    original, raised = getattr(owner, name), 0

    def fault(*args: Any, **kwargs: Any) -> Any:
        nonlocal raised
        if raised == times:
            return original(*args, **kwargs)
        raised += 1
        raise RuntimeError("injected fault")

    setattr(owner, name, fault)
    try:
        return run(llm, asks), raised
    finally:
        delattr(owner, name)


def assert_same(actual: Answer, expected: Answer) -> None:
    assert actual.tokens == expected.tokens
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=1e-4)


# -- what is set for a nested pass is unset on every way out --------------------------------


@pytest.mark.parametrize(
    "neighbour",
    [
        Ask("only text, long enough to lie where the image's rows were", max_tokens=3),
        Ask(f"an unknown one {IMAGE} here", ((502, 224),), max_tokens=3),
    ],
    ids=["text", "image"],
)
def test_a_failed_pass_leaves_the_main_batchs_deepstack_features(
    engines: Callable[..., Engine], neighbour: Ask
) -> None:
    plain, engine = engines(None, "qwen3_vl"), engines({}, "qwen3_vl")
    engine.ask(DONOR)
    warm = known(f"fault beside {len(neighbour.images)}", max_tokens=3)
    # Raised when the pass's own features are in the buffers, and the layers have not run.
    answers, raised = engine.call(run_with_fault, "_model._context", 1, neighbour, warm)
    assert raised == 1
    for actual, expected in zip(answers, plain.ask(neighbour, warm), strict=True):
        assert_same(actual, expected)

"""What vLLM and VLCache rely on at their seams, seen from outside: requests beside each other."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Answer, Ask, Engine, run
from vlcache_connector.storage.header import SegmentId

DONOR = Ask(f"seen before {IMAGE} here", ((501, 224),))


def known(name: str, images: Any = DONOR.images, **fields: Any) -> Ask:
    """The donor's image behind another text; no two names share a prefix."""
    return Ask(f"{name}: the same one, moved {IMAGE} what is it", images, **fields)


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


# -- a request pays for nobody else ---------------------------------------------------------


def run_with_a_bad_one(llm: Any, method: str, *asks: Ask) -> list[Answer]:
    """Run `asks` while a method of the loader raises for the one that has two images."""
    loader = sides(llm)[1]._loader
    original = getattr(loader, method)

    def fault(entry: Any) -> Any:
        if len(entry.plan.encoder_inputs) == 2 and entry.uses_store:
            raise RuntimeError("injected fault")
        return original(entry)

    setattr(loader, method, fault)
    try:
        return run(llm, asks)
    finally:
        delattr(loader, method)


@pytest.mark.parametrize("method", ["fetch", "open_rows", "job"])
def test_a_request_that_fails_costs_its_neighbours_nothing(
    engines: Callable[..., Engine], method: str
) -> None:
    engine = engines({})
    engine.ask(DONOR)
    bad = known(f"bad {method} twice {IMAGE} and", images=DONOR.images * 2, max_tokens=2)
    good = known(f"good {method}", max_tokens=2)
    answers = engine.call(run_with_a_bad_one, method, bad, good)
    assert all(answer.figures is not None for answer in answers)
    figures = [answer.figures or {} for answer in answers]
    assert figures[0]["reused_tokens"] == 0
    assert figures[0]["fallback"] == "error"
    assert figures[1]["reused_tokens"] > 0
    assert figures[1]["fallback"] is None
    assert_same(answers[0], engines(None).ask(bad)[0])


# -- exceptions at each call of the worker side ---------------------------------------------


def parts_of_the_worker_side() -> dict[str, type]:
    """What the worker side calls, by its place in it."""
    from vlcache_connector.worker.capture import SegmentCapture
    from vlcache_connector.worker.loader import Loader
    from vlcache_connector.worker.model import SparsePrefillModel
    from vlcache_connector.worker.pace import Pace
    from vlcache_connector.worker.sparse_prefill import SparsePrefill
    from vlcache_connector.worker.stopwatch import Stopwatch
    from vlcache_connector.worker.storage import Storage

    return {
        "_storage": Storage,
        "_loader": Loader,
        "_capture": SegmentCapture,
        "_prefill": SparsePrefill,
        "_model": SparsePrefillModel,
        "_pace": Pace,
        "_stopwatch": Stopwatch,
    }


NOT_GUARDED = ("close", "flush", "follow")
"""The end of the engine, and whether what is below host memory belongs to the loaded weights."""
CALLS = [
    f"{part}.{name}"
    for part, cls in parts_of_the_worker_side().items()
    for name, function in inspect.getmembers(cls, inspect.isfunction)
    if not name.startswith("_") and name not in NOT_GUARDED
]
HOOKS = ("_prefill.before_layer", "_prefill.on_kv_write")
"""Inside of these is what may fail; they themselves only hand on."""
BY_LAYER = ("_model.run_layers", "_model.take_deepstack")
"""Of passes whose rows shrink from layer to layer."""


NOT_CALLED = ("_storage.look_up", "_storage.load", "_storage.free_device_memory")
"""There are no tiers below host memory, and nobody falls asleep."""


def lose_encoder_rows(llm: Any) -> None:
    host = sides(llm)[1]._storage.engine
    for key, kind in list(host._resident):
        if kind == "encoder":
            host.remove(SegmentId(key, kind))


def lose_segments(llm: Any) -> None:
    """On the worker, and so soon on the scheduler side, which has others dropped."""
    scheduler, _ = sides(llm)
    scheduler._segments.clear()


def nothing(llm: Any) -> None:
    """As it is."""


BEFORE: dict[str, Callable[[Any], None]] = {
    "_model.encode": lose_encoder_rows,
    "_storage.remove": lose_segments,
}
"""What has to happen for a method to be called."""


@pytest.mark.parametrize("path", [path for path in CALLS if path not in HOOKS + BY_LAYER])
def test_an_exception_anywhere_costs_no_answer(engines: Callable[..., Engine], path: str) -> None:
    """A known image, an unknown one and text, in one step and the steps behind it."""
    engine, plain = engines({}), engines(None)
    image, new = ((800 + CALLS.index(path), 112),), ((900 + CALLS.index(path), 112),)
    engine.ask(Ask(f"{path}: seen before {IMAGE}", image))
    asks = [
        known(f"{path} is broken", image, max_tokens=3, vlcache={"recompute_ratio": 1.0}),
        Ask(f"{path} is broken, unknown {IMAGE}", new, max_tokens=3),
        Ask(f"{path} is broken, only text", max_tokens=3),
    ]
    engine.call(BEFORE.get(path, nothing))
    answers, raised = engine.call(run_with_fault, path, 1, *asks)
    assert raised == (path not in NOT_CALLED)
    assert answers[0].figures is not None
    assert path == "_storage.remove" or answers[0].figures["computed_tokens"] > 0
    for actual, expected in zip(answers, plain.ask(*asks), strict=True):
        assert actual.finish_reason == "length"
        assert_same(actual, expected)
    # And nothing is wrong behind it.
    exact = {"recompute_ratio": 1.0}
    again = [Ask(f"again {ask.text}", ask.images, max_tokens=2, vlcache=exact) for ask in asks]
    for actual, expected in zip(engine.ask(*again), plain.ask(*again), strict=True):
        assert actual.finish_reason == "length"
        assert_same(actual, expected)


@pytest.mark.parametrize("path", BY_LAYER)
def test_an_exception_in_a_pass_of_single_layers_costs_no_answer(
    engines: Callable[..., Engine], path: str
) -> None:
    engine, image = engines({}), ((850 + CALLS.index(path), 224),)
    engine.ask(Ask(f"{path}: seen before {IMAGE}", image))
    blend = {"selector": "cacheblend", "recompute_ratio": 0.2}
    ask = known(f"{path} is broken", image, max_tokens=3, vlcache=blend)
    [answer], raised = engine.call(run_with_fault, path, 1, ask)
    assert raised == 1
    assert answer.figures is not None
    assert answer.figures["fallback"] == "error"
    assert_same(answer, engines(None).ask(ask)[0])


# -- more rows than a backend takes ---------------------------------------------------------


def run_with_few_rows(llm: Any, most: int, ask: Ask) -> tuple[Answer, list[int]]:
    """Run `ask` as if the backend took `most` rows; the rows of each metadata that was built."""
    metadata = sides(llm)[1]._prefill._metadata
    build, built = metadata.build, []

    def counting(rows: Any) -> Any:
        built.append(len(rows))
        return build(rows)

    metadata.build, metadata.max_rows, before = counting, most, metadata.max_rows
    try:
        [answer] = run(llm, [ask])
        return answer, built
    finally:
        metadata.max_rows = before
        del metadata.build


@pytest.mark.parametrize("selector", ["random_k", "cacheblend"])
def test_passes_with_few_rows_compute_the_same(
    engines: Callable[..., Engine], selector: str
) -> None:
    engine = engines({})
    engine.ask(DONOR)
    options = {"selector": selector, "recompute_ratio": 0.2}
    ask = known(selector, vlcache=options, max_tokens=2)
    whole, rows = engine.call(run_with_few_rows, 1000, ask)
    engine.call(reset_prefix_cache)
    split, fewer = engine.call(run_with_few_rows, 3, ask)
    assert max(rows) > 3
    assert max(fewer) <= 3
    assert whole.figures is not None
    assert split.figures is not None
    assert split.figures["reused_tokens"] == whole.figures["reused_tokens"] > 0
    assert split.figures["fallback"] is None
    if selector == "random_k":
        assert_same(split, whole)


def reset_prefix_cache(llm: Any) -> None:
    assert llm.llm_engine.reset_prefix_cache()


# -- what travels ---------------------------------------------------------------------------


def bytes_of_a_step(llm: Any, ask: Ask) -> int:
    """Bytes that vLLM sends to workers of another process in a request's first step."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, sizes = scheduler.schedule, []

    def measuring(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        sizes.append(len(pickle.dumps(output)))
        return output

    scheduler.schedule = measuring
    try:
        run(llm, [ask])
    finally:
        del scheduler.schedule
    return sizes[0]


def test_no_more_pixels_travel_than_without_reuse(engines: Callable[..., Engine]) -> None:
    """vLLM leaves out those of images in a claim; of a plan and vLLM's own, each goes once."""
    engine = engines({})
    engine.ask(DONOR)
    text = f"travels: the known one {IMAGE} and a new one {IMAGE} in front of it {IMAGE}"
    images = (DONOR.images[0], (503, 224), DONOR.images[0])
    warm = engine.call(bytes_of_a_step, Ask(text, images))
    cold = Ask(f"cold, {text}", images, vlcache={"enabled": False})
    assert 500_000 < warm < engine.call(bytes_of_a_step, cold) + 50_000

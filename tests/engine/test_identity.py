"""Nothing that other weights or another preprocessing made is reused from a disk that is shared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_tiny_model import make_tiny_model

from tests.helpers.engine import IMAGE, Answer, Ask, Engine, answer_of, request_of
from tests.helpers.quick_start import KV_BLOCKS

A, B = (171, 224), (172, 336, 224)
DONOR = Ask(f"see {IMAGE} and {IMAGE}", (A, B))
MOVED = Ask(f"the same two, moved {IMAGE} and {IMAGE} compare", (A, B), max_tokens=4)


def flush(llm: Any) -> bool:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._worker._storage.flush(30.0)


def reload_weights(llm: Any, model: str, reset_connector: bool) -> None:
    """As a trainer does between two rounds."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
    llm.llm_engine.reset_encoder_cache()
    assert llm.reset_prefix_cache(reset_connector=reset_connector)


def reset_amid_a_capture(llm: Any, ask: Ask) -> tuple[int, int]:
    """Items under capture before a reset, and segments that are stored when the request has ended.

    It is in the middle of its image then, and goes on.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    llm.llm_engine.add_request("in flight", *request_of(ask))
    capturing = 0
    while not capturing:
        llm.llm_engine.step()
        capturing = sum(len(tracked.capturing) for tracked in scheduler._requests.values())
    llm.reset_prefix_cache(reset_connector=True)  # vLLM's own cache is in use, and stays
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return capturing, len(scheduler._segments)


def reused(answer: Answer) -> tuple[int, str | None]:
    assert answer.figures is not None
    return answer.figures["reused_tokens"], answer.figures["tier"]


def assert_computed(engine: Engine, ask: Ask = MOVED) -> Answer:
    """Nothing is reused, and the answer is that of the engine's own model."""
    [answer] = engine.ask(ask)
    [expected] = engine.ask(replace(ask, vlcache={"enabled": False}, cache_salt="plain"))
    assert reused(answer)[0] == 0
    assert answer.tokens == expected.tokens
    np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    return answer


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Engines with one disk that end with the test."""
    alive: list[Engine] = []

    def make(model: Path, **arguments: Any) -> Engine:
        connector = {
            "disk_path": str(tmp_path / "disk"),
            "fetch_deadline_seconds": 20.0,
            "break_even": False,
            "recompute_ratio": 0.1,
            "gate": "off",
        }
        alive.append(Engine(model, connector, num_gpu_blocks_override=KV_BLOCKS, **arguments))
        return alive[-1]

    yield make
    for engine in alive:
        engine.close()


def test_reloaded_weights_find_nothing_of_the_old_ones_and_publish_nothing_under_their_name(
    tiny_model: Callable[..., Path], start: Callable[..., Engine], tmp_path: Path
) -> None:
    first = tiny_model()
    second = make_tiny_model(tmp_path / "second", seed=7)
    engine = start(first, max_num_batched_tokens=128, max_num_seqs=8)
    engine.ask(DONOR)
    assert engine.call(flush)
    [before] = engine.ask(MOVED)
    assert reused(before)[0] > 0
    assert engine.call(flush)
    files = {path for path in (tmp_path / "disk").rglob("*") if path.is_file()}

    # With and without the reset of the connector: what is done to the weights is noticed.
    for reset_connector in (True, False):
        engine.call(reload_weights, str(second), reset_connector)
        after = assert_computed(engine)
        assert np.abs(after.logprobs - before.logprobs).max() > 1e-2
        [again] = engine.ask(Ask(f"x {MOVED.text}", MOVED.images))
        assert reused(again) == (reused(before)[0], "cpu")  # what the new weights made
        assert engine.call(flush)
        assert {path for path in (tmp_path / "disk").rglob("*") if path.is_file()} == files

    # The first weights again: what is on the disk is theirs.
    engine.call(reload_weights, str(first), True)
    [back] = engine.ask(MOVED)
    assert reused(back) == (reused(before)[0], "fs")
    np.testing.assert_allclose(back.logprobs, before.logprobs, rtol=0, atol=1e-4)

    in_flight = Ask(f"new {IMAGE}", ((173, 336),))
    capturing, stored = engine.call(reset_amid_a_capture, in_flight)
    assert (capturing, stored) == (1, 0)


def test_two_paths_of_one_model_share_and_another_preprocessing_shares_nothing(
    tiny_model: Callable[..., Path], start: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = start(tiny_model())
    engine.ask(DONOR)
    assert engine.call(flush)
    engine.close()

    mounted = start(shutil.copytree(tiny_model(), tmp_path / "mounted elsewhere"))
    [answer] = mounted.ask(MOVED)
    assert reused(answer)[0] > 0
    assert reused(answer)[1] == "fs"
    mounted.close()

    # The same weights with smaller images: 144 tokens at most.
    model = shutil.copytree(tiny_model(), tmp_path / "changed")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((model / name).read_text())
        settings["size"] = {**settings["size"], "longest_edge": 112 * 112}
        settings.pop("max_pixels", None)
        (model / name).write_text(json.dumps(settings))
    changed = start(model)
    smaller = assert_computed(changed)
    assert len(smaller.prompt) < len(answer.prompt)
    exact = Ask(f"exactly {MOVED.text}", MOVED.images, vlcache={"recompute_ratio": 1.0})
    [recomputed] = changed.ask(exact)
    [expected] = changed.ask(replace(exact, vlcache={"enabled": False}, cache_salt="plain"))
    np.testing.assert_allclose(recomputed.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def ask_named(llm: Any, asks: list[Ask], name: str) -> list[Answer]:
    """Requests whose one image has this name."""
    answers = []
    for ask in asks:
        prompt, params = request_of(ask)
        prompt["multi_modal_uuids"] = {"image": [name]}
        [output] = llm.generate([prompt], [params], use_tqdm=False)
        answers.append(answer_of(output))
    return answers


def test_names_are_reused_where_the_operator_trusts_them(
    engines: Callable[..., Engine],
) -> None:
    engine = engines({"trust_client_names": True, "recompute_ratio": 0.1})
    asks = [Ask(f"{text} {IMAGE}", ((174, 224),)) for text in ("named", "named and moved")]
    first, second = engine.call(ask_named, asks, "holiday.png")
    assert reused(first)[0] == 0
    assert reused(second)[0] > 0
    # A name is no content: the picture itself is another item.
    [unnamed] = engine.ask(asks[1])
    assert reused(unnamed)[0] == 0

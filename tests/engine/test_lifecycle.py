"""Pauses, sleeps, resets and aborts in any order: no failed request, no wrong answer, no leak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.engine.test_concurrency import state
from tests.helpers.engine import IMAGE, Answer, Ask, Engine, answer_of, request_of

SIDE = 224
IMAGES = 3
"""Of each kind: those that are always shown behind the same text, and those that move."""

MANY_STEPS = 500

# -- inside the engine's process --------------------------------------------------------------


def submit(llm: Any, name: str, ask: Ask) -> None:
    """Add a request."""
    prompt, params = request_of(ask)
    llm.llm_engine.add_request(name, prompt, params)


def step(llm: Any, count: int | None) -> dict[str, Answer]:
    """So many steps, or all there are to make; what finished in them, by name."""
    engine, answers = llm.llm_engine, {}
    for _ in range(MANY_STEPS if count is None else count):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = answer_of(output)
    assert count is not None or not engine.has_unfinished_requests(), "requests hang"
    return answers


def abort(llm: Any, names: list[str]) -> None:
    llm.llm_engine.abort_request(names, internal=False)


def control(llm: Any, method: str, arguments: dict[str, Any]) -> Any:
    """Call a method of vLLM's `EngineCore`, as its HTTP endpoints do."""
    if method in ("pause_scheduler", "sleep"):
        llm.llm_engine.renderer.clear_mm_cache()  # the core clears its side
    return getattr(llm.llm_engine.engine_core.engine_core, method)(**arguments)


# -- the model ----------------------------------------------------------------------------------


def at_home(number: int) -> Ask:
    """Always in one context, the donor's own: exact at any ratio."""
    image = (300 + number, SIDE)
    return Ask(f"at home {number} sits {IMAGE} and waits", (image,), max_tokens=3)


def moved(number: int, words: int) -> Ask:
    """In some context, all of it recomputed: exact, too."""
    image = (310 + number, SIDE)
    text = f"number {number} {'went ' * words} to {IMAGE} there"
    return Ask(text, (image,), max_tokens=3, vlcache={"recompute_ratio": 1.0})


class Life(RuleBasedStateMachine):
    """One engine, and what should be true of it.

    Attributes:
        engine: with VLCache, shared by all runs.
        expect: the answer of plain vLLM.
        stored: by image, whether its KV is stored; None where that depends on how far a request
            got.
    """

    engine: Engine
    expect: Callable[[Ask], Answer]

    @initialize()
    def begin(self) -> None:
        self.running: dict[str, Ask] = {}
        self.stored: dict[tuple[int, ...], bool | None] = {}
        self.paused: Literal["no", "new", "all"] = "no"
        self.asleep = False
        self.count = 0
        # Every run begins alike, so that it can be repeated.
        self.control("reset_prefix_cache", reset_connector=True)
        self.control("reset_encoder_cache")
        self.failures = self.engine.call(state)["failures"]

    def control(self, method: str, **arguments: Any) -> Any:
        return self.engine.call(control, method, arguments)

    def finish(self, answers: dict[str, Answer]) -> None:
        for name, answer in answers.items():
            ask = self.running.pop(name)
            expected = self.expect(ask)
            assert answer.finish_reason == "length"
            assert answer.tokens == expected.tokens
            np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-3)
            self.stored[ask.images[0]] = True

    def submit(self, ask: Ask) -> None:
        self.count += 1
        name = str(self.count)
        self.engine.call(submit, name, ask)
        self.running[name] = ask
        if not self.stored.get(ask.images[0]):
            self.stored[ask.images[0]] = None

    def abort_all(self) -> None:
        self.engine.call(abort, list(self.running))
        self.running.clear()

    def forget_all(self) -> None:
        self.stored = {ask.images[0]: None for ask in self.running.values()}

    @rule(number=st.integers(0, IMAGES - 1))
    def ask_at_home(self, number: int) -> None:
        self.submit(at_home(number))

    @rule(number=st.integers(0, IMAGES - 1), words=st.integers(1, 4))
    def ask_elsewhere(self, number: int, words: int) -> None:
        self.submit(moved(number, words))

    @precondition(lambda self: self.paused == "no" and not self.running)
    @rule(number=st.integers(0, IMAGES - 1))
    def ask_alone(self, number: int) -> None:
        """What is stored is found, and nothing else."""
        ask = moved(number, 5 + self.count)
        was_stored = self.stored.get(ask.images[0], False)
        self.submit(ask)
        [answer] = (answers := self.engine.call(step, None)).values()
        self.finish(answers)
        assert answer.figures is not None
        assert answer.figures["fallback"] is None
        if was_stored is not None:
            assert (answer.figures["recomputed_tokens"] > 0) == was_stored

    @precondition(lambda self: self.paused != "all" and self.running)
    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        self.finish(self.engine.call(step, count))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 9))
    def abort(self, number: int) -> None:
        name = sorted(self.running)[number % len(self.running)]
        self.engine.call(abort, [name])
        del self.running[name]

    @rule(connector=st.booleans(), running=st.booleans())
    def reset_prefix_cache(self, connector: bool, running: bool) -> None:
        done = self.control(
            "reset_prefix_cache", reset_connector=connector, reset_running_requests=running
        )
        if done and connector:
            self.forget_all()

    @precondition(lambda self: not self.running)
    @rule()
    def reset_encoder_cache(self) -> None:
        self.control("reset_encoder_cache")

    @precondition(lambda self: self.paused == "no")
    @rule(clear=st.booleans())
    def pause(self, clear: bool) -> None:
        self.abort_all()
        self.control("pause_scheduler", mode="abort", clear_cache=clear)
        self.paused = "new"
        if clear:
            self.forget_all()

    @precondition(lambda self: self.paused == "no")
    @rule()
    def pause_and_keep(self) -> None:
        self.control("pause_scheduler", mode="keep", clear_cache=False)
        self.paused = "all"

    @precondition(lambda self: self.paused == "no")
    @rule(level=st.integers(0, 2))
    def sleep(self, level: int) -> None:
        self.abort_all()
        self.control("sleep", level=level)
        self.paused = "new"
        self.asleep = level > 0
        if level > 0:
            self.forget_all()

    @precondition(lambda self: self.paused != "no")
    @rule(tags=st.booleans())
    def wake(self, tags: bool) -> None:
        self.control("wake_up", tags=["scheduling"] if tags and not self.asleep else None)
        self.paused, self.asleep = "no", False

    @invariant()
    def is_alive(self) -> None:
        assert self.control("is_scheduler_paused") == (self.paused != "no")

    def teardown(self) -> None:
        self.control("wake_up")
        self.finish(self.engine.call(step, None))
        # One more step lets the workers forget the last finished requests.
        self.engine.ask(Ask("that was all"))
        held = self.engine.call(state)
        # Other tests that share the engine may have made some.
        assert held.pop("failures") == self.failures
        assert set(held.values()) == {0}


def test_any_order_of_requests_and_interruptions(engines: Callable[..., Engine]) -> None:
    plain, known = engines(None), dict[str, Answer]()

    def expect(ask: Ask) -> Answer:
        exact = replace(ask, vlcache=None)
        if (key := str(exact)) not in known:
            [known[key]] = plain.ask(exact)
        return known[key]

    life = type("TestedLife", (Life,), {"engine": engines({}), "expect": staticmethod(expect)})
    run_state_machine_as_test(
        life,
        settings=settings(
            max_examples=8,
            stateful_step_count=25,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )


def run_and_lose_everything(llm: Any, ask: Ask) -> Answer:
    """Preempt a request that has claimed its image, and leave nothing of that anywhere."""
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    engine.add_request("preempted", *request_of(ask))
    engine.step()
    assert core.scheduler.requests
    assert core.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    core.reset_encoder_cache()
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return answer_of(outputs[-1])


@pytest.mark.parametrize("runner", [None, "V2"])
def test_a_preempted_request_may_find_nothing_when_it_goes_on(
    engines: Callable[..., Engine], runner: Literal["V2"] | None
) -> None:
    """vLLM has left the image's pixels out, since its tokens were claimed."""
    engine = engines({}) if runner is None else engines({}, runner=runner)
    image = ((699, 224),)
    engine.ask(Ask(f"to be lost {IMAGE}", image))
    ask = Ask(f"lost in between {IMAGE} is it", image, max_tokens=4)
    answer = engine.call(run_and_lose_everything, ask)
    assert answer.finish_reason == "length"
    [expected] = engines(None).ask(ask)
    assert len(answer.tokens) == len(expected.tokens)

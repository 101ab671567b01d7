"""Claims and vLLM's own tokens share a step's budget, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.request import Request, RequestStatus

from tests.helpers.made_requests import request
from vlcache_connector.scheduler.budget import StepBudget, Work

MAX, ENCODER = 128, 96
SMALL = MAX // 8


def limits(**changes: int) -> Any:
    """Of vLLM's scheduler."""
    defaults = {
        "max_num_batched_tokens": MAX,
        "max_num_encoder_input_tokens": ENCODER,
        "long_prefill_token_threshold": 0,
    }
    return SimpleNamespace(**{**defaults, **changes})


def running(name: str, num_tokens: int, num_computed: int, num_outputs: int = 0) -> Request:
    made = request(request_id=name, prompt_token_ids=list(range(num_tokens - num_outputs)))
    made.append_output_token_ids(list(range(num_outputs)))
    made.status, made.num_computed_tokens = RequestStatus.RUNNING, num_computed
    return made


def budget(*live: Request, **changes: int) -> StepBudget:
    return StepBudget(limits(**changes), {made.request_id: made for made in live})


DECODES = [running(f"decode {n}", 50, 49, num_outputs=10) for n in range(28)]


@pytest.mark.parametrize(
    ("live", "work", "expected"),
    [
        ([], Work(100, 28), "now"),
        ([], Work(100, 29), "never"),
        (DECODES, Work(90, 10), "now"),
        (DECODES, Work(90, 11), "never"),
        ([running("prefill", 500, 100)], Work(100, 10), "later"),
        ([running("prefill", 500, 100), *DECODES], Work(101, 0), "never"),
        ([running("last chunk", 500, 480)], Work(100, 8), "now"),
        # Beside a full step, or in front of a long text, a little more is computed.
        ([running("prefill", 500, 100)], Work(SMALL, 128), "now"),
        ([], Work(SMALL, 128), "now"),
        ([], Work(SMALL + 1, 128), "never"),
        ([], Work(10, 10, encoded=90, rest_encoded=6), "now"),
        ([], Work(10, 10, encoded=90, rest_encoded=7), "never"),
        ([], Work(10, 10, encoded=0, rest_encoded=200), "now"),
    ],
)
def test_what_fits_beside_what_runs(live: list[Request], work: Work, expected: str) -> None:
    assert budget(*live).fit(work, encoded=0) == expected


def test_a_long_prompt_takes_no_more_of_a_step_than_vllm_would_let_it() -> None:
    limited = budget(*DECODES, long_prefill_token_threshold=40)
    assert limited.chunk(100) == 40
    assert limited.fit(Work(30, 10), 0) == "now"
    assert limited.fit(Work(31, 10), 0) == "never"
    assert limited.fit(Work(5, 40), 0) == "now"
    alone = budget(running("r", 100, 0), long_prefill_token_threshold=40)
    assert alone.chunk(100) == 100


def test_what_was_claimed_in_a_step_is_taken_from_those_that_ask_later() -> None:
    shared = budget()
    shared.claim(Work(80, 10))
    assert shared.fit(Work(60, 0), 0) == "later"
    assert shared.fit(Work(20, 0), 0) == "now"
    assert shared.is_spent_for(Work(0, 60), 0)
    assert not shared.is_spent_for(Work(0, 20), 0)
    shared.end_step()
    assert shared.fit(Work(60, 0), 0) == "now"
    assert not shared.is_spent_for(Work(0, 200), 0)


def test_encoding_is_shared_as_well() -> None:
    shared = budget()
    assert shared.fit(Work(10, 0, encoded=50), encoded=50) == "later"
    shared.claim(Work(10, 0, encoded=50))
    assert shared.fit(Work(10, 0, encoded=50), encoded=0) == "later"
    assert shared.is_spent_for(Work(0, 10, rest_encoded=50), encoded=0)
    assert not shared.is_spent_for(Work(0, 10, rest_encoded=46), encoded=0)


def test_nobody_overtakes_a_claim_that_waits() -> None:
    shared = budget()
    shared.wait()
    assert shared.is_spent_for(Work(0, 1), 0)
    shared.end_step()
    assert not shared.is_spent_for(Work(0, 1), 0)


@dataclass
class Arrival:
    """A request to come: the tokens of its claim, those behind it, and outputs."""

    step: int
    claimed: int
    rest: int
    outputs: int


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 20),
        claimed=st.integers(0, 150),
        rest=st.integers(1, 400),
        outputs=st.integers(1, 30),
    ),
    max_size=25,
)


@given(coming=arrivals)
def test_no_step_is_longer_than_its_budget_and_all_requests_end(coming: list[Arrival]) -> None:
    """As vLLM schedules: running requests first, then those that wait, in order."""
    live: dict[str, Request] = {}
    account = StepBudget(limits(), live)
    waiting = sorted(enumerate(coming), key=lambda pair: pair[1].step)
    active: dict[str, Arrival] = {}
    for step in range(2000):
        if not waiting and not active:
            break
        left, claimed, ours = MAX, 0, {}
        for name in active:
            ours[name] = min(live[name].num_tokens - live[name].num_computed_tokens, left)
            left -= ours[name]
        still: list[tuple[int, Arrival]] = []
        for number, arrival in waiting:
            name = str(number)
            tokens = arrival.claimed
            fit = account.fit(Work(tokens, account.chunk(arrival.rest)), 0) if tokens else "never"
            if fit == "never":
                tokens = 0
            total = arrival.claimed + arrival.rest
            waits = arrival.step > step or left == 0
            if not waits and tokens and fit == "later":
                account.wait()
                waits = True
            if not waits and not tokens:
                waits = account.is_spent_for(Work(0, account.chunk(total)), 0)
            if waits:
                still.append((number, arrival))
                continue
            account.claim(Work(tokens, arrival.rest))
            claimed += tokens
            live[name] = running(name, total, tokens)
            active[name] = arrival
            ours[name] = min(total - tokens, left)
            left -= ours[name]
        assert MAX - left + claimed <= MAX or claimed <= SMALL
        waiting = still
        account.end_step()
        for name, tokens in ours.items():
            live[name].num_computed_tokens += tokens
            if live[name].num_computed_tokens == live[name].num_tokens:
                live[name].append_output_token_ids([0])
                if live[name].num_output_tokens >= active[name].outputs:
                    del active[name], live[name]
    assert not waiting
    assert not active

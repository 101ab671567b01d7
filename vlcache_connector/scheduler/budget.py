"""What a step may compute: claims fit into vLLM's own budgets.

A sparse prefill runs beside vLLM's own forward, in the same step, and vLLM does not count what it
computes. A step that is longer than vLLM's budgets allow stalls all requests that decode.

vLLM seams: `SchedulerConfig`'s budgets (`vllm/config/scheduler.py`), and the counts of `Request`
(`vllm/v1/request.py`) that `vllm/v1/core/sched/scheduler.py` schedules by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.config.scheduler import SchedulerConfig
    from vllm.v1.request import Request

_SMALL_SHARE = 8
"""A claim that computes no more than a budget's eighth is made at any time: vLLM fills a step with
what it finds, such as the text behind an image, whatever the claim leaves free."""

Fit = Literal["now", "later", "never"]
"""Whether a claim fits into this step, only into one without other prefills, or into none."""


@dataclass(frozen=True)
class Work:
    """What a claim makes a step compute.

    Attributes:
        tokens: in the sparse prefill.
        rest: tokens of the request behind the claim that vLLM schedules by itself.
        encoded: encoder rows of items that the sparse prefill encodes.
        rest_encoded: encoder rows of unknown items in the rest.
    """

    tokens: int
    rest: int
    encoded: int = 0
    rest_encoded: int = 0


class StepBudget:
    """Keeps account of the step that is being scheduled.

    vLLM schedules its running requests first and then admits waiting ones, each of which asks for
    a claim just before it is admitted.

    Args:
        limits: vLLM's.
        live: requests by id, waiting and running ones.
    """

    def __init__(self, limits: SchedulerConfig, live: Mapping[str, Request]) -> None:
        self._max_tokens = limits.max_num_batched_tokens
        self._max_encoded = limits.max_num_encoder_input_tokens
        self._long_prefill = limits.long_prefill_token_threshold
        self._live = live
        self._tokens = 0
        self._encoded = 0
        self._has_waiting_claim = False

    def fit(self, work: Work, encoded: int) -> Fit:
        """Whether a request may claim so much.

        Args:
            encoded: encoder rows that vLLM computes in this step.
        """
        chunk, scheduled = self._max_chunk(), self._scheduled()
        is_short = work.tokens + work.rest <= chunk or work.tokens <= chunk // _SMALL_SHARE
        fits_encoder = work.encoded == 0 or work.encoded + work.rest_encoded <= self._max_encoded
        if not is_short or not fits_encoder:
            return "never"
        if self._has_room(work, self._tokens, scheduled) and (
            work.encoded == 0
            or encoded + self._encoded + work.encoded + work.rest_encoded <= self._max_encoded
        ):
            return "now"
        return "later" if self._has_room(work, 0, self._scheduled(prefills=False)) else "never"

    def _has_room(self, work: Work, claimed: int, scheduled: int) -> bool:
        rest = min(work.rest, self._max_tokens - scheduled)
        claimed += work.tokens
        return (
            scheduled + claimed + rest <= self._max_tokens
            or claimed <= self._max_tokens // _SMALL_SHARE
        )

    def claim(self, work: Work) -> None:
        """vLLM admitted a request with its claim."""
        self._tokens += work.tokens
        self._encoded += work.encoded

    def wait(self) -> None:
        """A claim waits for room: none that asks after it is admitted before it."""
        self._has_waiting_claim = True

    def is_spent_for(self, work: Work, encoded: int) -> bool:
        """Whether a request that claims nothing has to wait, because of what others claimed.

        Args:
            encoded: encoder rows that vLLM computes in this step.
        """
        if self._has_waiting_claim:
            return True
        if self._encoded and encoded + self._encoded + work.rest_encoded > self._max_encoded:
            return True
        if self._tokens <= self._max_tokens // _SMALL_SHARE:
            return False
        return self._scheduled() + self._tokens + work.rest > self._max_tokens

    def end_step(self) -> None:
        """The step is scheduled; the next one begins."""
        self._tokens = self._encoded = 0
        self._has_waiting_claim = False

    def _scheduled(self, *, prefills: bool = True) -> int:
        """Tokens that vLLM has scheduled in this step, at most.

        Args:
            prefills: whether those of requests without a first token count in full.
        """
        chunk = self._max_chunk()
        tokens = 0
        for request in self._live.values():
            if request.status == RequestStatus.RUNNING:
                left = request.num_tokens_with_spec + request.num_output_placeholders
                left -= request.num_computed_tokens
                is_prefill = request.num_output_tokens == 0
                tokens += min(left, chunk if prefills or not is_prefill else 1)
        return min(tokens, self._max_tokens)

    def chunk(self, num_tokens: int) -> int:
        """How many of a request's next tokens vLLM schedules in a step, at most."""
        return min(num_tokens, self._max_chunk())

    def _max_chunk(self) -> int:
        if not self._long_prefill:
            return self._max_tokens
        # vLLM raises the threshold to a fair share, if so configured, and for a request alone.
        fair = self._max_tokens // max(1, len(self._live))
        return max(self._long_prefill, fair)

"""A stand-in for the engine: outcomes by a formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from vlcache_connector.measure.runner import Outcome, Request

IMAGE = "<image>"
NUM_LAYERS = 4
IMAGE_TOKENS = 20

Error = Callable[[Mapping[str, Any]], float]
"""KL divergence from a request's options."""


class FakeTokenizer:
    """Knows one special token and no chat template."""

    chat_template = None

    def convert_ids_to_tokens(self, token_id: int) -> str:
        assert token_id == 7
        return IMAGE


class FakeRunner:
    """Answers with one of two tokens; what is reused costs `error(options)` nats.

    Attributes:
        seen: all requests.
    """

    tokenizer = FakeTokenizer()
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(image_token_id=7))
    )

    def __init__(
        self, error: Error, flips: bool = False, figures: Mapping[str, Any] | None = None
    ) -> None:
        self._error = error
        self._flips = flips
        self._figures = {
            "tier": "cpu",
            "fallback": None,
            "reused_tokens": IMAGE_TOKENS - 1,
            "recomputed_tokens": 1,
            **(figures or {}),
        }
        self.seen: list[Request] = []
        self.is_closed = False

    def run(
        self, requests: Sequence[Request], advance: Callable[[], None] | None = None
    ) -> list[Outcome]:
        self.seen += requests
        outcomes = []
        for request in requests:
            is_full = request.options.get("enabled") is False
            outcomes.append(
                self._outcome(0.0 if is_full else self._error(request.options), is_full)
            )
            if advance is not None:
                advance()
        return outcomes

    def _outcome(self, kl: float, is_full: bool) -> Outcome:
        # KL((1/2, 1/2) || (1/2 - x, 1/2 + x)) = -log(1 - 4 x^2) / 2
        x = math.sqrt(1 - math.exp(-2 * kl)) / 2
        return Outcome(
            token=int(self._flips and not is_full),
            ids=np.array([0, 1]),
            logprobs=np.log([0.5 - x, 0.5 + x]),
            figures={} if is_full else {**self._figures, "computed_token_layers": 40},
            image_tokens=IMAGE_TOKENS,
        )

    def close(self) -> None:
        self.is_closed = True

"""Runs requests through a real engine with VLCache, and compares first tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_LOGPROBS = 4096
"""Most log-probs asked for per token; of larger vocabularies the rest is negligible."""

FULL_RECOMPUTE: Mapping[str, Any] = {"enabled": False}
"""Request options that make plain vLLM compute everything."""


@dataclass(frozen=True)
class Request:
    """A prompt for one answer token.

    Attributes:
        text: with vLLM's placeholder for each image.
        salt: requests with different salts know nothing of each other's images.
        options: the request's `kv_transfer_params["vlcache"]`.
    """

    text: str
    images: tuple[Image, ...]
    salt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came back.

    Attributes:
        token: the most likely first token.
        ids: int64 [n] token ids, ascending; all of a small vocabulary, else the most likely ones.
        logprobs: float64 [n].
        figures: the response's `kv_transfer_params["vlcache"]`.
        image_tokens: tokens of the prompt that stand for images.
        seconds: time to the token; of a request that ran alone, else None.
    """

    token: int
    ids: np.ndarray
    logprobs: np.ndarray
    figures: Mapping[str, Any]
    image_tokens: int
    seconds: float | None = None


def kl_divergence(reference: Outcome, other: Outcome) -> float:
    """KL(reference || other) of the first token, in nats.

    A token that `other` does not list gets its least likely listed one's probability.
    """
    places = np.searchsorted(other.ids, reference.ids).clip(max=len(other.ids) - 1)
    listed = other.ids[places] == reference.ids
    theirs = np.where(listed, other.logprobs[places], other.logprobs.min())
    divergence = np.sum(np.exp(reference.logprobs) * (reference.logprobs - theirs))
    return max(0.0, float(divergence))


class Runner:
    """A vLLM engine with VLCache, its gate off.

    Args:
        connector: `kv_connector_extra_config`, over the gate.
        arguments: of `vllm.LLM`.
    """

    def __init__(self, model: str, connector: Mapping[str, Any], **arguments: Any) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=model,
            max_logprobs=-1,
            kv_transfer_config={
                "kv_connector": "VLCacheConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"gate": "off", "break_even": False, **connector},
            },
            **arguments,
        )
        vocabulary = self._llm.model_config.get_vocab_size()
        hf_config = self._llm.model_config.hf_config
        names = ("image_token_id", "image_token_index")
        self._image_token = next(
            (getattr(hf_config, n) for n in names if hasattr(hf_config, n)), None
        )
        self._next_id = 0
        self._num_logprobs = -1 if vocabulary <= _MAX_LOGPROBS else _MAX_LOGPROBS

    @property
    def vllm_config(self) -> Any:
        """vLLM's configuration of the engine."""
        return self._llm.llm_engine.vllm_config

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._llm.get_tokenizer()

    def run(
        self, requests: Sequence[Request], advance: Callable[[], None] | None = None
    ) -> list[Outcome]:
        """Run requests together.

        Args:
            advance: called as each of them is finished.
        """
        from vllm import SamplingParams

        engine: Any = self._llm.llm_engine
        first = self._next_id
        for number, request in enumerate(requests, first):
            prompt: dict[str, Any] = {"prompt": request.text}
            if request.images:
                prompt["multi_modal_data"] = {"image": list(request.images)}
            if request.salt is not None:
                prompt["cache_salt"] = request.salt
            params = SamplingParams(
                max_tokens=1,
                temperature=0,
                logprobs=self._num_logprobs,
                detokenize=False,
                extra_args={"kv_transfer_params": {"vlcache": dict(request.options)}},
            )
            engine.add_request(str(number), prompt, params)
        self._next_id += len(requests)
        outcomes: dict[int, Outcome] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    outcomes[int(output.request_id)] = _outcome(output, self._image_token)
                    if advance is not None:
                        advance()
        return [outcomes[first + index] for index in range(len(requests))]

    def run_alone(self, request: Request) -> Outcome:
        """Run one request and take the time to its first token."""
        start = time.perf_counter()
        [outcome] = self.run([request])
        seconds = time.perf_counter() - start
        return replace(outcome, seconds=seconds)

    def close(self) -> None:
        """End the engine."""
        self._llm.llm_engine.engine_core.shutdown()


def _outcome(output: Any, image_token: int | None) -> Outcome:
    completion = output.outputs[0]
    entries = sorted((token, entry.logprob) for token, entry in completion.logprobs[0].items())
    return Outcome(
        token=completion.token_ids[0],
        ids=np.array([token for token, _ in entries], dtype=np.int64),
        logprobs=np.array([logprob for _, logprob in entries]),
        figures=(output.kv_transfer_params or {}).get("vlcache", {}),
        image_tokens=output.prompt_token_ids.count(image_token),
    )

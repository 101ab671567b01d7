"""The exactness mode of `gpu_check.py`: what has to be equal, in one cell of the matrix.

A cell is a model runner, a CUDA graph mode, an attention backend and an architecture. Its checks
are the invariants of the test suite, with plain vLLM beside it, and, at ratios below 1, with the
independent reference on plain transformers (`tests/helpers/reference.py`).

Where the backend computes in float32, 1e-4 in the log-probs is allowed. Where it knows 16 bits
only, what is allowed is measured: how far plain vLLM is from itself when the same request runs in
another batch, and from the float32 reference in a full prefill. A comparison that could not tell
right from wrong by that measure is called blunt, not passed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from make_tiny_model import make_tiny_model
from PIL import Image

from tests.helpers.engine import IMAGE, Answer, Ask, Engine, engines_together

RUNNERS = ("V2", "V1")
GRAPHS = ("FULL_AND_PIECEWISE", "eager", "PIECEWISE")
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
ARCHS = ("qwen2_5_vl", "qwen3_vl")
"""Of each, the most used first."""

RATIOS = (0.0, 0.1, 0.5)
TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-7}
"""Allowed in any case; that of bfloat16 is a last bit of a logit from 1 to 2."""
NOISE_FACTOR = 3.0
"""A noise is the largest of few samples; others may be as much larger."""
CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
KV_CACHE_BYTES = 1 << 30
DEVICE_SHARE = 0.1
"""Of a GPU's memory that has to be free for one of a cell's two engines."""

A, B, C = (21, 224), (22, 336, 224), (23, 280)
DONORS = (
    Ask(f"first {IMAGE} seen", (A,), max_tokens=4),
    Ask(f"another {IMAGE} then {IMAGE} both", (B, C), max_tokens=4),
)
TARGET = Ask(f"a new question about {IMAGE} and {IMAGE} and {IMAGE} now", (C, A, B), max_tokens=4)
REUSED = ((1, 1), (0, 0), (1, 0))
"""Donor and its item, for each image of the target."""
TEXTS = (
    Ask("no image at all, only text", max_tokens=8),
    Ask("text " * 150 + "end", max_tokens=4),
)
OTHERS = (Ask(f"one that is new {IMAGE} here", ((24, 280),), max_tokens=4), TEXTS[0])
"""What runs in the same steps as the target."""


@dataclass(frozen=True)
class Cell:
    """One combination; the words are vLLM's own."""

    runner: str
    graphs: str
    backend: str
    arch: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.runner} {self.graphs} {self.backend} {self.arch}"


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        invariant: what was compared.
        status: "pass", "FAIL", or "blunt" (the allowance is larger than what an error would show);
            empty for what is a measure of the others.
        distance: largest difference of log-probs.
        allowed: of them.
    """

    invariant: str
    status: str
    distance: float
    allowed: float
    note: str = ""


Emit = Callable[[dict[str, Any]], None]

CPU_CELL = Cell("V2", "eager", "CPU_ATTN", "qwen2_5_vl")
"""What is run without a GPU: GPUs' default model runner."""


def make_cells(backends: Sequence[str] = BACKENDS) -> list[Cell]:
    """The whole matrix, so ordered that early cells have met as many pairs of values as may be."""
    left = [Cell(*values) for values in itertools.product(RUNNERS, GRAPHS, backends, ARCHS)]
    ordered: list[Cell] = []
    met: set[tuple[str, str]] = set()
    while left:
        # Of equally good ones the first, which has the more usual values.
        best = max(left, key=lambda cell: len(_pairs(cell) - met))
        met |= _pairs(best)
        ordered.append(best)
        left.remove(best)
    return ordered


def _pairs(cell: Cell) -> set[tuple[str, str]]:
    return set(itertools.combinations(asdict(cell).values(), 2))


def engine_arguments(cell: Cell, dtype: str) -> dict[str, Any]:
    """Arguments of `engine.Engine`, but model and connector."""
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 8,
        "enforce_eager": cell.graphs == "eager",
        "runner": cell.runner,
    }
    if cell == CPU_CELL:
        return arguments
    arguments |= {
        "attention_backend": cell.backend,
        "gpu_memory_utilization": DEVICE_SHARE,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }
    if cell.graphs != "eager":
        arguments["compilation_config"] = {
            "cudagraph_mode": cell.graphs,
            "cudagraph_capture_sizes": list(CAPTURE_SIZES),
        }
    return arguments


def dtype_of(cell: Cell) -> str:
    """float32 where the backend takes it."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    supported = AttentionBackendEnum[cell.backend].get_class().supported_dtypes
    return "float32" if torch.float32 in supported else "bfloat16"


def forget_prefixes(llm: Any) -> None:
    """Empty vLLM's exact prefix cache, but nothing of VLCache."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM's prefix cache could not be reset")


def distance(one: Answer, other: Answer) -> float:
    """Largest difference of log-probs, up to the step from which the answers go apart."""
    if one.prompt != other.prompt or one.logprobs.shape != other.logprobs.shape:
        return math.inf
    same = [a == b for a, b in zip(one.tokens, other.tokens, strict=True)]
    steps = same.index(False) + 1 if False in same else len(same)
    return float(np.abs(one.logprobs[:steps] - other.logprobs[:steps]).max())


def judge(
    invariant: str, found: float, allowed: float, wrong: float = math.inf, note: str = ""
) -> Check:
    """A check.

    Args:
        wrong: the distance that an answer with an error would at least have.
    """
    status = "FAIL" if not found <= allowed else "pass" if allowed < wrong else "blunt"
    return Check(invariant, status, found, allowed, note)


def chosen(num_tokens: int, ratio: float) -> list[int]:
    """The documented rule of `first_k` without a least number."""
    return list(range(math.ceil(round(ratio * num_tokens, 6))))


class _Cell:
    """The checks of a cell whose engines run."""

    def __init__(self, plain: Engine, cached: Engine, model: Path, dtype: str) -> None:
        self._plain, self._cached, self._model = plain, cached, model
        self._noise = 0.0
        self._least = TOLERANCES[dtype]

    def checks(self) -> Iterator[Check]:
        """All of them, in an order that each needs."""
        yield from self._texts()
        yield from self._cold_and_own_context()
        yield self._ratio_one()
        yield from self._together()
        yield from self._reference()

    def _allowed(self) -> float:
        return max(self._least, NOISE_FACTOR * self._noise)

    def _again(self, ask: Ask) -> tuple[Answer, float]:
        """Plain vLLM's answer, and how far it is from itself, computed a second time."""
        [first] = self._plain.ask(ask)
        self._plain.call(forget_prefixes)
        [second] = self._plain.ask(ask)
        return first, distance(first, second)

    def _texts(self) -> Iterator[Check]:
        for name, ask in zip(("text only", "long text only"), TEXTS, strict=True):
            expected, repeat = self._again(ask)
            [actual] = self._cached.ask(ask)
            yield judge(f"{name}: bit-equal", distance(actual, expected), repeat)

    def _cold_and_own_context(self) -> Iterator[Check]:
        colds = []
        for number, ask in enumerate(DONORS, 1):
            expected, repeat = self._again(ask)
            [actual] = self._cached.ask(ask)
            colds.append(actual)
            yield judge(f"cold {number}: bit-equal", distance(actual, expected), repeat)
        self._measure_noise()
        yield Check("plain vLLM's own noise", "", self._noise, self._noise)
        self._cached.call(forget_prefixes)
        for number, (ask, cold) in enumerate(zip(DONORS, colds, strict=True), 1):
            [warm] = self._cached.ask(replace(ask, vlcache={"recompute_ratio": 0.0}))
            figures = _figures(warm)
            note = "" if figures["reused_tokens"] else "nothing was reused"
            found = math.inf if note else distance(warm, cold)
            yield judge(f"donor {number}'s own context", found, self._allowed(), note=note)

    def _measure_noise(self) -> None:
        [alone] = self._plain.ask(TARGET)
        [hit] = self._plain.ask(TARGET)
        self._plain.call(forget_prefixes)
        together = self._plain.ask(TARGET, *OTHERS)[0]
        self._plain.call(forget_prefixes)
        self._noise = max(distance(alone, hit), distance(alone, together))

    def _donate(self, salt: str) -> list[Answer]:
        """Make the donors known, to requests of this salt only."""
        return [self._cached.ask(replace(ask, cache_salt=salt))[0] for ask in DONORS]

    def _ratio_one(self) -> Check:
        self._donate("one")
        [expected] = self._plain.ask(TARGET)
        [actual] = self._cached.ask(
            replace(TARGET, cache_salt="one", vlcache={"recompute_ratio": 1.0})
        )
        figures = _figures(actual)
        is_full = figures["recomputed_tokens"] and not figures["reused_tokens"]
        note = "" if is_full and figures["fallback"] is None else f"figures {figures}"
        found = math.inf if note else distance(actual, expected)
        return judge("ratio 1.0 equals plain", found, self._allowed(), note=note)

    def _together(self) -> Iterator[Check]:
        """A warm request, one with a new image and one without run in the same steps."""
        self._donate("together")
        asks = (TARGET, *OTHERS)
        expected = []
        for ask in asks:
            self._plain.call(forget_prefixes)
            expected += self._plain.ask(ask)
        first, *others = (replace(ask, cache_salt="together") for ask in asks)
        actual = self._cached.ask(replace(first, vlcache={"recompute_ratio": 1.0}), *others)
        names = ("warm", "new image", "text")
        for name, one, other in zip(names, actual, expected, strict=True):
            yield judge(f"in one batch: {name}", distance(one, other), self._allowed())

    def _reference(self) -> Iterator[Check]:
        from tests.helpers.reference import Reference

        reference = Reference(self._model)
        donors = [self._plain.ask(ask)[0] for ask in DONORS]
        prompts = [
            reference.prompt_from_ids(answer.prompt, _pictures(ask))
            for answer, ask in zip(donors, DONORS, strict=True)
        ]
        results = [reference.full(prompt) for prompt in prompts]
        reused = {
            item: (results[donor], prompts[donor], place)
            for item, (donor, place) in enumerate(REUSED)
        }
        self._plain.call(forget_prefixes)
        [plain] = self._plain.ask(TARGET)
        target = reference.prompt_from_ids(plain.prompt, _pictures(TARGET))
        full = np.asarray(reference.full(target).logprobs[0])
        # What 16 bits lose, in full prefills that have no part in reuse.
        rounding = max(
            _first(answer, np.asarray(result.logprobs[0]))
            for answer, result in zip(donors, results, strict=True)
        )
        allowed = max(self._least, NOISE_FACTOR * max(rounding, _first(plain, full)))
        lengths = [end - start for start, end in target.spans]
        for ratio in RATIOS:
            salt = f"ratio {ratio}"
            self._donate(salt)
            vlcache = {"recompute_ratio": ratio}
            [actual] = self._cached.ask(replace(TARGET, cache_salt=salt, vlcache=vlcache))
            recompute: Mapping[int, Sequence[int]] = {
                item: chosen(length, ratio) for item, length in enumerate(lengths)
            }
            expected = np.asarray(reference.reuse(target, reused, recompute).logprobs[0])
            figures = _figures(actual)
            planned = sum(lengths) - sum(map(len, recompute.values()))
            note = "" if figures["reused_tokens"] == planned else f"figures {figures}"
            found = math.inf if note else _first(actual, expected)
            wrong = float(np.abs(expected - full).max())
            yield judge(f"reference, ratio {ratio:g}", found, allowed, wrong, note)


def _figures(answer: Answer) -> dict[str, Any]:
    if answer.figures is None:
        raise RuntimeError("the response has no figures of VLCache: is the connector active?")
    return answer.figures


def _first(answer: Answer, logprobs: np.ndarray) -> float:
    return float(np.abs(answer.logprobs[0] - logprobs).max())


def _pictures(ask: Ask) -> list[Image.Image]:
    return [Image.fromarray(array) for array in ask.image_arrays()]


def run_cell(cell: Cell, models: Path, emit: Emit) -> None:
    """Run a cell's checks; `emit` gets each as it is made.

    Args:
        models: directory that tiny models are made in.
    """
    dtype = dtype_of(cell)
    model = make_tiny_model(models / f"{cell.arch}-tiny-{dtype}", arch=cell.arch, dtype=dtype)
    start = time.monotonic()
    connectors: dict[str, dict[str, Any] | None] = {"plain": None, "cached": {}}
    with engines_together(model, connectors, **engine_arguments(cell, dtype)) as running:
        for check in _Cell(running["plain"], running["cached"], model, dtype).checks():
            emit(asdict(check) | {"dtype": dtype, "seconds": time.monotonic() - start})

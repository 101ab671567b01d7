"""Real vLLM engines for tests, each in a process of its own.

One engine fills a process's global state, so every engine gets a child process; inside it, engine,
scheduler and worker run in that one process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), and tests can
send functions there to look inside.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.context
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch._dynamo

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "LMCACHE_TRACK_USAGE": "false",
}

_PRELOADED = [
    *("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"),
    *("vllm.model_executor.models.qwen2_5_vl", "vllm.model_executor.models.qwen3_vl"),
    *("vlcache_connector.connector", "vlcache_connector.encoder_connector"),
]
"""Modules that engines import, and that start nothing."""

_STARTING = threading.Lock()
"""Held while this process has an engine's environment."""


def grid(seed: int, width: int, height: int) -> np.ndarray:
    """A picture of coloured 28 px cells: uint8 [height, width, 3]."""
    cells = np.random.default_rng(seed).integers(
        0, 255, (-(-height // 28), -(-width // 28), 3), dtype=np.uint8
    )
    return np.kron(cells, np.ones((28, 28, 1), dtype=np.uint8))[:height, :width]


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        text: prompt with `IMAGE` and `VIDEO` placeholders.
        images: (seed, side in px) or (seed, width, height) of each image.
        videos: (seed, side in px, frames) of each video.
        vlcache: the request's `kv_transfer_params["vlcache"]`.
        sampling: further `SamplingParams`.
    """

    text: str
    images: tuple[tuple[int, ...], ...] = ()
    videos: tuple[tuple[int, int, int], ...] = ()
    max_tokens: int = 1
    vlcache: Any = None
    cache_salt: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    def image_arrays(self) -> list[np.ndarray]:
        """The images' pixels."""
        return [grid(spec[0], spec[1], spec[-1]) for spec in self.images]

    def video_arrays(self) -> list[np.ndarray]:
        """The videos' frames: uint8 [frames, side, side, 3]."""
        return [
            np.stack([grid(1000 * seed + frame, side, side) for frame in range(frames)])
            for seed, side, frames in self.videos
        ]


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        prompt: token ids with placeholders expanded.
        tokens: generated token ids.
        logprobs: float64 [generated tokens, vocabulary].
        figures: `kv_transfer_params["vlcache"]` of the response, None without.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: np.ndarray
    figures: dict[str, Any] | None
    finish_reason: str | None


class Engine:
    """A vLLM engine in a child process.

    Args:
        connector: `kv_connector_extra_config`, over small budgets, no least number of recomputed
            tokens, a gate that is off and claims that needn't pay; None runs plain vLLM.
        environment: of the child, over the defaults.
        prepare: called in the child before the engine is made; it must be importable there.
        runner: vLLM's model runner; None takes its default, V1 on a CPU. There, V2 runs its Triton
            kernels in Triton's interpreter.
        arguments: of `vllm.LLM`.
    """

    def __init__(
        self,
        model: Path,
        connector: dict[str, Any] | None,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        runner: Literal["V1", "V2"] | None = None,
        **arguments: Any,
    ) -> None:
        environment = {**_ENVIRONMENT, **(environment or {})}
        if runner is not None:
            environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "V2"))
        context = _context()
        if runner == "V2" and not torch.cuda.is_available():
            # Triton and vLLM look at what there is when they are imported: not in a fork of a
            # process that has done so.
            context = multiprocessing.get_context("spawn")
            environment["TRITON_INTERPRET"] = "1"
        self._connection, child = context.Pipe()
        if connector is not None:
            arguments.setdefault(
                "kv_transfer_config",
                {
                    "kv_connector": "VLCacheConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {
                        "cpu_bytes": "128MiB",
                        "encoder_cpu_bytes": "64MiB",
                        "write_queue_bytes": "64MiB",
                        "min_recompute_tokens": 0,
                        "gate": "off",
                        "break_even": False,
                        **connector,
                    },
                },
            )
        defaults = {
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 4096,
            "max_logprobs": -1,
            "limit_mm_per_prompt": {"image": 6, "video": 2},
            "seed": 0,
        }
        self._process = context.Process(
            target=_serve,
            args=(
                child,
                str(model),
                environment,
                prepare,
                {**defaults, **arguments},
            ),
            daemon=False,
        )
        with _STARTING, _environ(environment):
            self._process.start()
        child.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, *asks: Ask) -> list[Answer]:
        """Run requests together."""
        self._connection.send(("ask", asks))
        return self._receive()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run `function(llm, *arguments)` in the engine's process; it must be importable there."""
        self._connection.send(("call", (function, arguments)))
        return self._receive()

    def _receive(self) -> Any:
        try:
            ok, value = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise RuntimeError(f"the engine died, exit code {self._process.exitcode}") from None
        if not ok:
            raise EngineError(value)
        return value

    def close(self) -> None:
        """End the child."""
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def engines_together(
    model: Path, connectors: Mapping[str, dict[str, Any] | None], **arguments: Any
) -> Iterator[dict[str, Engine]]:
    """Engines by name, started at the same time and alive inside the block.

    Args:
        connectors: of each, see `Engine`.
        arguments: of all of them.
    """
    _context()  # not from several threads
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(connectors)) as pool:
        starting = {
            name: pool.submit(Engine, model, connector, **arguments)
            for name, connector in connectors.items()
        }
        for future in starting.values():
            if future.exception() is None:
                stack.callback(future.result().close)
        yield {name: future.result() for name, future in starting.items()}


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """Children fork from a server that has imported vLLM, but has run nothing of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # The server hands its environment, as it is now, on to all children.
    with _environ(_ENVIRONMENT):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environ(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


class EngineError(RuntimeError):
    """Something raised inside the engine's process; the message is its traceback."""


def _serve(
    connection: Connection,
    model: str,
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
    arguments: dict[str, Any],
) -> None:
    os.environ.update(environment)
    try:
        if environment.get("TRITON_INTERPRET") == "1":
            _pretend_triton_has_a_cpu_backend()
        if prepare is not None:
            prepare()
        if arguments["enforce_eager"]:
            # vLLM compiles the gathering of log-probs all the same, which takes seconds.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
            torch._dynamo.config.disable = True
        # vLLM collects garbage several times while it starts: not what was imported before.
        gc.freeze()
        from vllm import LLM

        llm = LLM(model=model, **arguments)
        connection.send((True, None))
    except BaseException:
        connection.send((False, traceback.format_exc()))
        return
    while True:
        try:
            operation, payload = connection.recv()
        except EOFError:
            break
        try:
            if operation == "ask":
                value = run(llm, payload)
            else:
                function, args = payload
                value = function(llm, *args)
            connection.send((True, value))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    llm.llm_engine.engine_core.shutdown()
    # The engine is down: taking apart all of vLLM's and torch's modules takes a second more.
    os._exit(0)


def _pretend_triton_has_a_cpu_backend() -> None:
    """Let vLLM use Triton on a CPU, which runs all kernels in its interpreter.

    vLLM looks for a backend of this name (`vllm/triton_utils/importing.py`).
    """
    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=None)


def request_of(ask: Ask) -> tuple[dict[str, Any], Any]:
    """vLLM's prompt and sampling parameters for `ask`."""
    from PIL import Image
    from vllm import SamplingParams

    prompt: dict[str, Any] = {"prompt": ask.text, "multi_modal_data": {}}
    if ask.images:
        prompt["multi_modal_data"]["image"] = [Image.fromarray(a) for a in ask.image_arrays()]
    if ask.videos:
        metadata = {"fps": 2.0, "video_backend": "opencv", "do_sample_frames": False}
        prompt["multi_modal_data"]["video"] = [
            (
                frames,
                {
                    **metadata,
                    "total_num_frames": len(frames),
                    "duration": len(frames) / 2.0,
                    "frames_indices": list(range(len(frames))),
                },
            )
            for frames in ask.video_arrays()
        ]
    if ask.cache_salt is not None:
        prompt["cache_salt"] = ask.cache_salt
    extra = None if ask.vlcache is None else {"kv_transfer_params": {"vlcache": ask.vlcache}}
    sampling = {
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "logprobs": -1,
        "ignore_eos": True,
        "extra_args": extra,
        **ask.sampling,
    }
    return prompt, SamplingParams(**sampling)


def answer_of(output: Any, completion: int = 0) -> Answer:
    """Turn vLLM's `RequestOutput` into an `Answer`."""
    completed = output.outputs[completion]
    logprobs = [
        [entry.logprob for _, entry in sorted(step.items())] for step in completed.logprobs or []
    ]
    params = output.kv_transfer_params or {}
    return Answer(
        prompt=list(output.prompt_token_ids),
        tokens=list(completed.token_ids),
        logprobs=np.array(logprobs),
        figures=params.get("vlcache"),
        finish_reason=completed.finish_reason,
    )


def run(llm: Any, asks: Sequence[Ask]) -> list[Answer]:
    """Run `asks` together in this process."""
    prompts, params = zip(*[request_of(ask) for ask in asks], strict=True)
    return [answer_of(o) for o in llm.generate(list(prompts), list(params), use_tqdm=False)]

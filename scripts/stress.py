"""A real engine in a process of its own, under mixed load: what the scripts that try to break it
share.

Requests name the donors of their known images. From that follows what a request may answer: what
plain vLLM answers, or what comes of reusing the images of some of these donors, as an engine
answers that is asked nothing else.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from serving import make_image

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PACKAGES = ("vllm", "torch", "lmcache", "valkey-glide-sync", "vlcache-connector")
"""Whose versions stand in the results."""
SIDES_PX = (112, 140, 168, 196)
"""Edges of the images."""
TOLERANCE = 1e-3
"""Between logprobs, in float32: a batch of other requests changes less."""
START_SECONDS = 300.0
SETTLE_SECONDS = 30.0
CONNECTOR: Mapping[str, Any] = {
    "gate": "off",
    "break_even": False,
    "min_recompute_tokens": 0,
    "recompute_ratio": 0.1,
}
AMPLE: Mapping[str, Any] = {"cpu_bytes": "64MiB", "encoder_cpu_bytes": "16MiB"}
ENGINE: Mapping[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "block_size": 32,
    "max_logprobs": -1,
    "limit_mm_per_prompt": {"image": 4, "video": 0},
    "mm_processor_cache_gb": 0.05,
    "seed": 0,
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    # Compiled matmuls, one per shape: the 1,024 it keeps otherwise take hundreds of MiB, which
    # come and go and hide what a leak would add.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "LMCACHE_TRACK_USAGE": "false",
}
PAUSED_STEPS = 3
_PRELOADED = ["vllm.entrypoints.llm", "vllm.v1.engine.core"]
"""Modules that every engine imports: its process is forked from one that has them."""
_REFERENCES_AT_ONCE = 8


class StressError(RuntimeError):
    """What is to be tested can't be tested like this."""


class EngineCrashedError(RuntimeError):
    """The engine's process raised or ended."""


class EngineHungError(RuntimeError):
    """Nothing was heard of the engine's process for too long."""


# -- requests and what comes back ---------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        text: prompt with `IMAGE` for each image.
        images: (seed, side in px) of each.
        donors: requests that make images of this one known, at most one for each.
        salt: requests with different ones know nothing of each other's images.
        options: the request's `kv_transfer_params["vlcache"]`.
        abort_after: the client goes away after so many steps of the engine; None: it stays.
        interruption: one of `INTERRUPTIONS`, by the operator, just before the request is put.
        with_logprobs: whether they are wanted.
    """

    text: str
    images: tuple[tuple[int, int], ...] = ()
    donors: tuple[Ask, ...] = ()
    max_tokens: int = 3
    salt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    abort_after: int | None = None
    interruption: str | None = None
    with_logprobs: bool = True


@dataclass(frozen=True)
class Result:
    """How a request ended.

    Attributes:
        status: "done", "aborted" (by its client or an operator), "failed" (the engine gave it up),
            or "hung" (not done in time, then aborted).
        tokens: of the answer.
        logprobs: float32 [tokens, vocabulary].
        figures: the response's `kv_transfer_params["vlcache"]`.
        ttft: seconds until the first token.
    """

    status: Literal["done", "aborted", "failed", "hung"]
    tokens: tuple[int, ...] = ()
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    figures: Mapping[str, Any] = field(default_factory=dict)
    ttft: float = 0.0

    @property
    def reused(self) -> int:
        """Tokens whose KV is a donor's."""
        return int(self.figures.get("reused_tokens", 0))

    @property
    def tier(self) -> str | None:
        """Slowest tier that something was reused from."""
        return self.figures.get("tier")


def distance(a: Result, b: Result) -> float:
    """Largest difference between two answers' logprobs.

    Where the most likely tokens differ, the answers go different ways: steps behind it are not
    compared, the step itself is.
    """
    if len(a.tokens) != len(b.tokens) or not a.tokens:
        return float("inf")
    largest = 0.0
    for step, (token, other) in enumerate(zip(a.tokens, b.tokens, strict=True)):
        largest = max(largest, float(np.abs(a.logprobs[step] - b.logprobs[step]).max()))
        if token != other:
            break
    return largest


def deviation(result: Result, allowed: Sequence[Result]) -> str | None:
    """What is wrong with an answer; None: it is one of those allowed, with as much reused."""
    same = [distance(result, other) for other in allowed if other.reused == result.reused]
    if min(same, default=float("inf")) <= TOLERANCE:
        return None
    distances = ", ".join(f"{other.reused}: {distance(result, other):.2g}" for other in allowed)
    return f"{result.reused} tokens reused; distance from the answer with so many: {distances}"


@dataclass(frozen=True)
class Interruption:
    """A call of a method of vLLM's `EngineCore`, as its HTTP endpoints make it.

    Attributes:
        aborts: the requests that run end.
        pauses: nothing runs until the engine is woken.
    """

    method: str
    arguments: Mapping[str, Any]
    aborts: bool = False
    pauses: bool = False


INTERRUPTIONS: Mapping[str, Interruption] = {
    "pause": Interruption("pause_scheduler", {"mode": "keep", "clear_cache": False}, pauses=True),
    "pause and clear": Interruption(
        "pause_scheduler", {"mode": "abort", "clear_cache": True}, aborts=True, pauses=True
    ),
    **{
        f"sleep {level}": Interruption("sleep", {"level": level}, aborts=True, pauses=True)
        for level in range(3)
    },
    "reset": Interruption("reset_prefix_cache", {}),
    "reset with the connector": Interruption("reset_prefix_cache", {"reset_connector": True}),
    "reset with all that runs": Interruption(
        "reset_prefix_cache", {"reset_running_requests": True, "reset_connector": True}
    ),
    "reset the encoder's": Interruption("reset_encoder_cache", {}, aborts=True),
}


# -- the engine's process -----------------------------------------------------------------------

Tell = Callable[[Any], None]
"""Reports progress to whoever called."""


class EngineProcess:
    """vLLM in a child process, where engine, scheduler and worker are at hand.

    A context manager.

    Args:
        connector: `kv_connector_extra_config`, over `CONNECTOR`; None: vLLM without VLCache.
        log: file that all output of the child is added to.
        arguments: of `vllm.LLM`, over `ENGINE`.

    Raises:
        EngineCrashedError: the engine did not start.
    """

    def __init__(
        self, model: Path, connector: Mapping[str, Any] | None, log: Path, **arguments: Any
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._pipe, child = context.Pipe()
        arguments = {**ENGINE, **arguments}
        if connector is not None:
            arguments["kv_transfer_config"] = {
                "kv_connector": "VLCacheConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {**CONNECTOR, **connector},
            }
        given = (child, str(model), arguments, str(log))
        self._process = context.Process(target=_child, args=given)
        self._process.start()
        child.close()
        try:
            self._receive(START_SECONDS, None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        limit: float = 120.0,
        on_progress: Tell | None = None,
    ) -> Any:
        """Run `function(llm, tell, *arguments)` in the child, which has to be able to import it.

        Args:
            limit: seconds without a word from the child until it is taken for hung, and killed.
            on_progress: gets what the function tells.

        Raises:
            EngineCrashedError: the function raised, or the child ended; use it no longer.
            EngineHungError: see `limit`.
        """
        self._pipe.send((function, arguments))
        return self._receive(limit, on_progress)

    def _receive(self, limit: float, on_progress: Tell | None) -> Any:
        while True:
            try:
                if not self._pipe.poll(limit):
                    self.close(grace=0.0)
                    raise EngineHungError(f"nothing was heard of the engine for {limit:.0f} s")
                kind, value = self._pipe.recv()
            except (EOFError, ConnectionError):
                self._process.join(10)
                raise EngineCrashedError(
                    f"the engine's process ended, exit code {self._process.exitcode}"
                ) from None
            if kind == "error":
                raise EngineCrashedError(value)
            if kind == "result":
                return value
            if on_progress is not None:
                on_progress(value)

    def close(self, grace: float = 30.0) -> None:
        """End the child."""
        self._pipe.close()
        self._process.join(grace)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _child(pipe: Any, model: str, arguments: dict[str, Any], log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's to handle
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(ENVIRONMENT)
    for name in ("USERNAME", "PASSWORD", "CREDENTIALS_FILE"):
        os.environ.pop(f"VLCACHE_REDIS_{name}", None)
    try:
        import torch
        from vllm import LLM

        torch.set_num_threads(1)  # torch may have been imported before the environment was set
        torch._dynamo.config.disable = True
        llm = LLM(model=model, **arguments)
        pipe.send(("result", None))
        while True:
            function, given = pipe.recv()
            pipe.send(("result", function(llm, lambda v: pipe.send(("progress", v)), *given)))
    except EOFError:
        llm.llm_engine.engine_core.shutdown()
    except BaseException:
        traceback.print_exc()
        pipe.send(("error", traceback.format_exc()))


_numbers = itertools.count()


# -- what runs in there -------------------------------------------------------------------------


def request_of(ask: Ask) -> tuple[dict[str, Any], Any]:
    """vLLM's prompt and sampling parameters."""
    from vllm import SamplingParams

    prompt: dict[str, Any] = {"prompt": ask.text}
    if ask.images:
        prompt["multi_modal_data"] = {"image": [make_image(*image) for image in ask.images]}
    if ask.salt is not None:
        prompt["cache_salt"] = ask.salt
    params = SamplingParams(
        max_tokens=ask.max_tokens,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprobs=-1 if ask.with_logprobs else None,
        extra_args={"kv_transfer_params": {"vlcache": dict(ask.options)}},
    )
    return prompt, params


@dataclass
class _Running:
    ask: Ask
    name: str
    started: float
    steps: int = 0
    ttft: float | None = None


def serve(
    llm: Any, tell: Tell, asks: Sequence[Ask], in_flight: int = 8, seconds: float = 60.0
) -> list[Result]:
    """Put requests to the engine, so many at a time; tells how many have ended.

    Args:
        seconds: a request that takes longer is aborted, and taken for hung.
    """
    engine = llm.llm_engine
    waiting = deque(enumerate(asks))
    running: dict[int, _Running] = {}
    results: dict[int, Result] = {}
    told = 0
    while waiting or running:
        while waiting and len(running) < in_flight:
            index, ask = waiting.popleft()
            if ask.interruption is not None:
                interruption = INTERRUPTIONS[ask.interruption]
                if interruption.aborts:
                    engine.abort_request([entry.name for entry in running.values()])
                    results |= dict.fromkeys(running, Result("aborted"))
                    running.clear()
                _interrupt(engine, interruption)
            running[index] = _Running(ask, str(next(_numbers)), time.monotonic())
            engine.add_request(running[index].name, *request_of(ask))
        by_name = {entry.name: index for index, entry in running.items()}
        for index, entry in list(running.items()):
            late = time.monotonic() - entry.started > seconds
            if late or (entry.ask.abort_after is not None and entry.steps >= entry.ask.abort_after):
                engine.abort_request([entry.name])
                results[index] = Result("hung" if late else "aborted")
                del running[index]
            entry.steps += 1
        outputs = engine.step() if running else ()
        _watch_guards()
        for output in outputs:
            index = by_name[output.request_id]
            if index not in running:
                continue
            entry = running[index]
            if entry.ttft is None:
                entry.ttft = time.monotonic() - entry.started
            if output.finished:
                del running[index]
                results[index] = _result(output, entry.ttft)
        if len(results) > told:
            told = len(results)
            tell(told)
    return [results[index] for index in range(len(asks))]


def _interrupt(engine: Any, interruption: Interruption) -> None:
    if interruption.pauses:
        engine.renderer.clear_mm_cache()  # the core clears its side
    core = engine.engine_core.engine_core
    getattr(core, interruption.method)(**interruption.arguments)
    if interruption.pauses:
        for _ in range(PAUSED_STEPS):
            if engine.step():
                raise StressError(f"{interruption.method} does not pause the engine")
        core.wake_up()


def _result(output: Any, ttft: float) -> Result:
    completion = output.outputs[0]
    steps = [
        [entry.logprob for _, entry in sorted(step.items())] for step in completion.logprobs or ()
    ]
    return Result(
        status="done" if completion.finish_reason == "length" else "failed",
        tokens=tuple(completion.token_ids),
        logprobs=np.array(steps, np.float32),
        figures=(output.kv_transfer_params or {}).get("vlcache") or {},
        ttft=ttft,
    )


def references(llm: Any, tell: Tell, asks: Sequence[Ask]) -> list[list[Result]]:
    """What each request may answer: first as plain vLLM, then with every choice of its donors.

    Each choice gets a salt of its own, so that nothing but the chosen donors is known.
    """
    found: list[list[Result]] = []
    for first in range(0, len(asks), _REFERENCES_AT_ONCE):
        chunk = asks[first : first + _REFERENCES_AT_ONCE]
        donors, targets = [], []
        for number, ask in enumerate(chunk, first):
            for choice in range(2 ** len(ask.donors)):
                salt = f"reference {number}/{choice}"
                chosen = [d for bit, d in enumerate(ask.donors) if choice >> bit & 1]
                donors += [replace(donor, salt=salt) for donor in chosen]
                options = ask.options if chosen else {"enabled": False}
                targets.append(replace(ask, salt=salt, options=options, abort_after=None))
        serve(llm, _tell_nobody, donors)
        settle(llm, _tell_nobody)
        results = iter(serve(llm, _tell_nobody, targets))
        for ask in chunk:
            found.append([next(results) for _ in range(2 ** len(ask.donors))])
            if not all(result.reused for result in found[-1][1:]):
                raise StressError(f"the images of {ask.text!r} were not reused from their donors")
        tell(len(found))
    return found


def forget(llm: Any, tell: Tell, seconds: float = SETTLE_SECONDS) -> None:
    """Drop all that is in memory; what is in the tiers below stays.

    Args:
        seconds: longest that it waits until these have what was stored.
    """
    settle(llm, tell, seconds)
    llm.llm_engine.reset_encoder_cache()
    if not llm.llm_engine.reset_prefix_cache(reset_connector=True):
        raise StressError("vLLM does not reset its prefix cache: a request holds blocks")
    settle(llm, tell, seconds)


def settle(llm: Any, tell: Tell, seconds: float = SETTLE_SECONDS) -> bool:
    """Let everything end that goes on in the background; whether it did in time."""
    scheduler, worker, _ = _sides(llm)
    until = time.monotonic() + seconds
    while True:
        # A step takes in what has ended, and tells the worker which requests are over.
        serve(llm, _tell_nobody, [Ask("settle", max_tokens=2, with_logprobs=False)])
        left = until - time.monotonic()
        is_written = worker._storage.flush(max(0.01, min(left, 5.0)))
        staging, canonical = scheduler._staging, scheduler._canonical
        fetches = len(staging._running) if staging is not None else 0
        pending = len(canonical._pending) if canonical is not None else 0
        is_busy = worker._storage.engine.is_busy
        if is_written and not (is_busy or fetches or pending):
            return True
        if left <= 0:
            return False
        tell(None)


def _tell_nobody(_: Any) -> None:
    pass


def _sides(llm: Any) -> tuple[Any, Any, Any]:
    """VLCache's scheduler side and worker side, and vLLM's scheduler."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector: Any = get_kv_transfer_group()
    vllm = llm.llm_engine.engine_core.engine_core.scheduler
    return vllm.connector._scheduler, connector._worker, vllm


def held(llm: Any, tell: Tell) -> dict[str, int]:
    """What is still held although no request runs; all zero where nothing leaks."""
    scheduler, worker, vllm = _sides(llm)
    host, staging = worker._storage.engine, scheduler._staging
    pool = vllm.kv_cache_manager.block_pool
    stored = {kind: {key for key, of in host._resident if of == kind} for kind in ("kv", "encoder")}
    indices = {"kv": scheduler._segments, "encoder": scheduler._encoder_rows.index}
    counts = {
        "KV blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),  # one is vLLM's own
        "requests of the scheduler side": len(scheduler._requests) + len(scheduler._live),
        "finished requests": len(scheduler._finishing),
        "requests of the worker side": len(worker._requests),
        "captures": len(worker._capture),
        "read handles": len(host._open),
        "segments being written": len(host._writing) + len(host._arriving) + len(host._unwanted),
        "removed segments": len(host._leaving),
        "lookups of the worker": len(host._asked),
        "loads of the worker": len(host._wanted) + len(host._loading),
    }
    for kind, index in indices.items():
        known = set(index._entries)
        counts[f"{kind} stored but unknown"] = len(stored[kind] - known)
        counts[f"{kind} known but not stored"] = len(known - stored[kind])
        counts[f"{kind} never ready"] = sum(not index.is_ready(key) for key in known)
    if staging is not None:
        counts["tickets of the staging"] = len(staging._tickets)
        counts["fetches of the staging"] = len(staging._running)
    if scheduler._canonical is not None:
        canonical = scheduler._canonical
        counts["canonical donors"] = len(canonical._pending)
    return counts


def violations(llm: Any, tell: Tell) -> list[str]:
    """What an engine that has nothing to do gets wrong about what it holds."""
    scheduler, worker, _ = _sides(llm)
    found = [] if settle(llm, tell) else ["the background work does not end"]
    for name, part in (
        ("index of KV segments", scheduler._segments),
        ("index of encoder rows", scheduler._encoder_rows.index),
        ("host memory", worker._storage.engine),
    ):
        try:
            part.check_integrity()
        except AssertionError as error:
            found.append(f"{name}: {str(error) or 'the accounts do not add up'}")
    return found + [f"{name}: {count} held" for name, count in held(llm, tell).items() if count]


_guards: dict[str, str] = {}
"""States of the tiers' guards at the last step."""
_guards_turned: Counter[str] = Counter()


def _watch_guards() -> None:
    """Count how often each guard has turned to a state, "fs.guard.open" and so on."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return
    connector: Any = get_kv_transfer_group()
    for tier, state in connector._worker._storage.tier_states().items():
        if _guards.get(tier, "closed") != state.guard:
            _guards_turned[f"{tier}.guard.{state.guard}"] += 1
        _guards[tier] = state.guard


def happened(llm: Any, tell: Tell) -> dict[str, int]:
    """What VLCache counted since the engine's start, and how often guards turned."""
    scheduler, _, _ = _sides(llm)
    return dict(scheduler.statistics.events) | _guards_turned


def _status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return dict(line.split(":", 1) for line in lines)


def usage(llm: Any, tell: Tell) -> dict[str, float]:
    """Memory in MiB, open files and threads of the engine's process.

    "rss_mib" is what is in use: malloc gives back what it keeps of freed memory, which by itself
    it does rarely. "rss_kept_mib" is with that.
    """
    gc.collect()
    kept = _status()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = _status()
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) / 1024,
        "rss_kept_mib": int(kept["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
    }


_preemptions = 0


def count_preemptions(llm: Any, tell: Tell) -> int:
    """Preemptions since the first call, which begins to count."""
    from vllm.v1.core.sched import scheduler

    vllm: Any = scheduler.Scheduler
    original = vllm._preempt_request
    if original.__module__ != __name__:

        def counting(self: Any, *arguments: Any, **named: Any) -> None:
            global _preemptions
            _preemptions += 1
            original(self, *arguments, **named)

        vllm._preempt_request = counting
    return _preemptions

"""The speed mode of `gpu_check.py`: what the project asks for, on the shape of a published model.

Three engines share the GPU: plain vLLM (prefix caching and encoder cache on), VLCache that loads
from host memory, and VLCache whose device tier holds the image. They get the same requests one at
a time, in turn, so that what changes on the machine changes all alike; what counts are ratios
within a turn. Every prompt begins with another number: no prefix cache can serve it.

Time to the first token (TTFT) is the whole call of the offline engine for one token, hashing and
tokenizing included. Its stages are told by vLLM's own timestamps and by VLCache's figures. On a GPU
those of the load and the sparse pass are what the host takes to queue them; what the device still
has to do then shows in the last stage.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_tiny_model import STAMP_NAME, make_tiny_model, write_json

from tests.helpers.engine import IMAGE, Ask, Engine, engines_together, request_of

SYSTEMS = ("plain", "cpu", "device")
STAGES = ("tokenise, hash", "schedule", "load", "sparse pass", "main pass, sample", "TTFT")
ONE_RATIO, FOUR_RATIO = 0.02, 0.05
COLD_REPETITIONS, REPETITIONS = 3, 7
MARGIN_SECONDS = 30.0
"""For ending the engines."""
PROBE_BYTES = 1 << 30
GIB = 1 << 30

_QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_QWEN2_5_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


@dataclass(frozen=True)
class Shape:
    """What is measured.

    Attributes:
        arch: of `make_tiny_model`.
        one_px, four_px: edges of the one large image, and of four smaller ones.
        text, vision: what a published checkpoint has in its configuration, over the tiny model's;
            None: the tiny model itself.
        is_tied: whether the output embeddings are the input embeddings.
    """

    arch: str
    one_px: int
    four_px: int
    text: dict[str, Any] | None = None
    vision: dict[str, Any] | None = None
    is_tied: bool = False


SHAPES = {
    "qwen2_5_vl_7b": Shape(
        "qwen2_5_vl",
        one_px=2800,  # 100 x 100 tokens of 28 px
        four_px=1400,
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": _QWEN2_5_ROPE,
        },
        vision=_QWEN2_5_VISION | {"out_hidden_size": 3584},
    ),
    "qwen2_5_vl_3b": Shape(
        "qwen2_5_vl",
        one_px=2800,
        four_px=1400,
        text={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "rope_parameters": _QWEN2_5_ROPE,
        },
        vision=_QWEN2_5_VISION | {"out_hidden_size": 2048},
        is_tied=True,
    ),
    "qwen3_vl_8b": Shape(
        "qwen3_vl",
        one_px=3200,  # 100 x 100 tokens of 32 px
        four_px=1600,
        text={
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
            "num_position_embeddings": 2304,
        },
    ),
    "tiny": Shape("qwen2_5_vl", one_px=224, four_px=112),
}

Emit = Callable[[dict[str, Any]], None]


def make_shape(shape: Shape, models: Path, directory: Path) -> Path:
    """A checkpoint without weights, or the tiny model; its directory."""
    tiny = make_tiny_model(models / f"{shape.arch}-tiny", arch=shape.arch)
    if shape.text is None or shape.vision is None:
        return tiny
    directory.mkdir(parents=True, exist_ok=True)
    for path in tiny.iterdir():
        if path.suffix != ".safetensors" and path.name != STAMP_NAME:
            shutil.copy(path, directory)
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    # One entry per layer of the tiny model; it follows from the rest.
    config["text_config"].pop("layer_types", None)
    config["text_config"] |= shape.text | {"tie_word_embeddings": shape.is_tied}
    config["vision_config"] |= shape.vision
    config |= {"dtype": "bfloat16", "tie_word_embeddings": shape.is_tied}
    for part in (config["text_config"], config["vision_config"]):
        part["dtype"] = "bfloat16"
    write_json(directory / "config.json", config)
    processor = json.loads((tiny / "preprocessor_config.json").read_text(encoding="utf-8"))
    processor["size"]["longest_edge"] = shape.one_px**2
    write_json(directory / "preprocessor_config.json", processor)
    return directory


def engine_arguments(shape: Shape, device: str, backend: str | None) -> dict[str, Any]:
    """Arguments of `engine.Engine` for all systems."""
    arguments: dict[str, Any] = {"disable_log_stats": False, "limit_mm_per_prompt": {"image": 4}}
    if shape.text is not None:
        arguments |= {"load_format": "dummy", "dtype": "bfloat16", "skip_mm_profiling": True}
    if device == "cpu":
        return arguments
    if backend is not None:
        arguments["attention_backend"] = backend
    return arguments | {
        "enforce_eager": False,
        "max_model_len": 16384,
        # One step takes a whole prompt, and vLLM's encoder cache holds its images.
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 6 * GIB,
        "gpu_memory_utilization": 0.25,
    }


def connector_of(system: str, device: str) -> dict[str, Any] | None:
    """`kv_connector_extra_config` of a system; None for plain vLLM."""
    if system == "plain":
        return None
    budgets: dict[str, Any] = {}
    if device != "cpu":
        budgets = {"cpu_bytes": 12 * GIB, "encoder_cpu_bytes": 2 * GIB}
    if system == "device":
        budgets["device_bytes"] = (4 * GIB) if device != "cpu" else (32 << 20)
    return budgets


# -- in an engine's process ---------------------------------------------------------------------


def timed(llm: Any, ask: Ask) -> dict[str, Any]:
    """Run one request alone; its times in seconds."""
    prompt, params = request_of(ask)
    start = time.monotonic()
    [output] = llm.generate([prompt], [params], use_tqdm=False)
    ttft = time.monotonic() - start
    stats = output.metrics
    figures = (output.kv_transfer_params or {}).get("vlcache") or {}
    in_engine = stats.first_token_ts - stats.scheduled_ts
    parts = figures.get("ttft_part_seconds") or {}
    load, sparse = parts.get("load", 0.0), parts.get("sparse_prefill", 0.0)
    prompt_tokens, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
    return {
        "ttft": ttft,
        "engine": in_engine,
        "stages": [
            stats.queued_ts - start,
            stats.scheduled_ts - stats.queued_ts,
            load,
            sparse,
            ttft - (stats.scheduled_ts - start) - load - sparse,
            ttft,
        ],
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached,
        "figures": figures,
    }


def facts(llm: Any) -> dict[str, Any]:
    """Sizes of the model, and speeds of the machine as torch's copies have them."""
    import torch
    from vllm.platforms import current_platform

    from vlcache_connector.support import kv_shape
    from vlcache_connector.worker.loaded import loaded_model

    config = llm.llm_engine.vllm_config
    language_model: Any = loaded_model(config).get_language_model()
    device = torch.device(current_platform.device_type)
    size = PROBE_BYTES if device.type != "cpu" else PROBE_BYTES >> 4
    host = torch.ones(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
    first = torch.empty(size, dtype=torch.uint8, device=device)
    second = torch.ones_like(first)
    return {
        "weight_bytes": sum(p.nbytes for p in language_model.parameters()),
        "kv_bytes_per_token": kv_shape(config).bytes_per_token,
        "host_to_device": size / _seconds(lambda: first.copy_(host, non_blocking=True)),
        "device_memory": 2 * size / _seconds(lambda: first.copy_(second)),
    }


def _seconds(run: Callable[[], Any], repetitions: int = 5) -> float:
    import torch

    def wait() -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    times = []
    for _ in range(repetitions):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


# -- the requests -------------------------------------------------------------------------------


class _Workload:
    """Sends requests to all engines in turn."""

    def __init__(self, running: dict[str, Engine], shape: Shape, emit: Emit, ends: float) -> None:
        self._running = running
        self._shape = shape
        self._emit = emit
        self._ends = ends
        self._number = 0

    def run(self) -> None:
        """All cases, the most wanted first; ends early when there is no time left."""
        self._emit({"kind": "facts", **self._running["plain"].call(facts)})
        one = self._shape.one_px
        # The first request of a kind compiles; the first reuse fills the device tier.
        self._turn(None, [(1, one)])
        for _ in range(2):
            self._turn(None, [(1, one)], ONE_RATIO)
        for pair in range(COLD_REPETITIONS):
            self._turn("cold", [(10 + pair, one)], pair=pair)
        known = [(10 + COLD_REPETITIONS - 1, one)]
        self._turn(None, known, ONE_RATIO)
        for pair in range(REPETITIONS):
            self._turn("one", known, ONE_RATIO, pair=pair)
        four = [(20 + place, self._shape.four_px) for place in range(4)]
        self._turn(None, four)
        for pair in range(REPETITIONS + 1):
            # Rotations: each image has another neighbour in front of it, or none.
            order = four[pair % 3 + 1 :] + four[: pair % 3 + 1]
            self._turn("four" if pair else None, order, FOUR_RATIO, pair=pair)
        for pair in range(3 * REPETITIONS + 1):
            self._turn("text" if pair else None, [], pair=pair)
        self._one_pass(known)

    def _turn(
        self,
        case: str | None,
        images: Sequence[tuple[int, int]],
        ratio: float | None = None,
        *,
        pair: int = 0,
    ) -> None:
        """The same request to each engine, beginning with another one each time."""
        self._number += 1
        text = f"Request {self._number:06}. Look at {' and '.join([IMAGE] * len(images))} now."
        if not images:
            text += " And then the children went to the market." * 64
        first = self._number % len(SYSTEMS)
        for system in SYSTEMS[first:] + SYSTEMS[:first]:
            self._send(case, system, text, images, ratio, pair)

    def _send(
        self,
        case: str | None,
        system: str,
        text: str,
        images: Sequence[tuple[int, int]],
        ratio: float | None,
        pair: int,
    ) -> dict[str, Any]:
        if time.monotonic() > self._ends:
            raise OutOfTimeError
        vlcache = None if system == "plain" or ratio is None else {"recompute_ratio": ratio}
        sampling = {"logprobs": None, "detokenize": False}
        ask = Ask(text, tuple(images), vlcache=vlcache, sampling=sampling)
        sample = self._running[system].call(timed, ask)
        if case is not None:
            self._emit({"kind": "sample", "case": case, "system": system, "pair": pair, **sample})
        return sample

    def _one_pass(self, known: Sequence[tuple[int, int]]) -> None:
        """Plain vLLM behind an exact prefix hit, with as many tokens as both passes computed."""
        self._number += 1
        front = f"Request {self._number:06}. Look at {IMAGE}"
        sample = self._send(None, "device", front, known, ONE_RATIO, 0)
        computed = sample["figures"]["computed_tokens"]
        self._send(None, "plain", front, known, None, 0)
        for pair in range(REPETITIONS):
            text = f"{front} {pair}" + " the" * computed
            self._send("prefix", "plain", text, known, None, pair)


class OutOfTimeError(Exception):
    """Nothing more is measured."""


def run_model(
    name: str, device: str, backend: str | None, models: Path, emit: Emit, ends: float
) -> None:
    """Measure one shape; `emit` gets facts and samples as they come.

    Args:
        backend: of attention; None is vLLM's own choice.
        ends: when this process is ended, by the machine's monotonic clock.
    """
    shape = SHAPES[name]
    model = make_shape(shape, models, models / f"{name}-shape")
    connectors = {system: connector_of(system, device) for system in SYSTEMS}
    arguments = engine_arguments(shape, device, backend)
    with (
        engines_together(model, connectors, **arguments) as running,
        contextlib.suppress(OutOfTimeError),
    ):
        _Workload(running, shape, emit, ends - MARGIN_SECONDS).run()


# -- what it comes to ---------------------------------------------------------------------------


def _samples(results: Sequence[dict[str, Any]], case: str, system: str) -> dict[int, Any]:
    return {
        result["pair"]: result
        for result in results
        if result["kind"] == "sample" and (result["case"], result["system"]) == (case, system)
    }


def _ratios(results: Sequence[dict[str, Any]], case: str, above: str, below: str) -> list[float]:
    """Ratios of TTFT within turns."""
    over, under = _samples(results, case, above), _samples(results, case, below)
    return [over[pair]["ttft"] / under[pair]["ttft"] for pair in sorted(over.keys() & under.keys())]


def _verdict(values: Sequence[float], aim: float, *, at_least: bool) -> tuple[str, str, str]:
    """Aim, measured, verdict."""
    shown = f"{'>=' if at_least else '<='} {aim:g}x"
    if not values:
        return shown, "not measured", ""
    middle = statistics.median(values)
    is_met = middle >= aim if at_least else middle <= aim
    digits = 1 if at_least else 3
    measured = f"{middle:.{digits}f}x ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return shown, measured, "met" if is_met else "missed"


def rows_of(results: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """What, aim, measured, verdict."""
    one = f"one known image, {ONE_RATIO:.0%}: plain / VLCache"
    four = f"four known images in new order, {FOUR_RATIO:.0%}: plain / VLCache"
    rows = []
    for what, aim, case, system in (
        (one, 20.0, "one", "device"),
        (one, 16.0, "one", "cpu"),
        (four, 10.0, "four", "device"),
        (four, 10.0, "four", "cpu"),
    ):
        speed_ups = _ratios(results, case, "plain", system)
        rows.append((f"{what}, {system} tier", *_verdict(speed_ups, aim, at_least=True)))
    of_facts = next((result for result in results if result["kind"] == "facts"), None)
    for what, aim, values in (
        ("TTFT / floor, cpu tier", 1.5, _floors(results, of_facts)),
        (
            "a new image, which is stored: VLCache / plain",
            1.03,
            _ratios(results, "cold", "cpu", "plain"),
        ),
        ("text only: VLCache / plain", 1.01, _ratios(results, "text", "cpu", "plain")),
    ):
        rows.append((what, *_verdict(values, aim, at_least=False)))
    passes = "two passes over the weights, against one of as many tokens"
    rows.append((passes, "a figure", _second_pass(results), ""))
    if of_facts is not None:
        speeds = (of_facts["host_to_device"], of_facts["device_memory"])
        shown = ", ".join(f"{speed / 1e9:,.0f} GB/s" for speed in speeds)
        rows.append(("host to device, device memory", "", shown, ""))
    return rows


def floor_seconds(sample: dict[str, Any], of_facts: dict[str, Any]) -> float:
    """What a warm request takes at least: its KV through the bus, or the weights read once."""
    kv_bytes = sample["figures"].get("reused_tokens", 0) * of_facts["kv_bytes_per_token"]
    return max(
        kv_bytes / of_facts["host_to_device"], of_facts["weight_bytes"] / of_facts["device_memory"]
    )


def _floors(results: Sequence[dict[str, Any]], of_facts: dict[str, Any] | None) -> list[float]:
    samples = _samples(results, "one", "cpu").values() if of_facts is not None else ()
    return [sample["ttft"] / floor_seconds(sample, of_facts) for sample in samples]


def _second_pass(results: Sequence[dict[str, Any]]) -> str:
    two = [s["engine"] for s in _samples(results, "one", "device").values()]
    single = _samples(results, "prefix", "plain").values()
    if not two or not single:
        return "not measured"
    one = statistics.median(s["engine"] for s in single)
    tokens = statistics.median(s["prompt_tokens"] - s["cached_tokens"] for s in single)
    both = statistics.median(two)
    return f"{(both - one) * 1e3:+.1f} ms ({both * 1e3:.1f} - {one * 1e3:.1f}, {tokens:.0f} tokens)"


def stage_rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Medians of each stage in ms, by request and system."""
    rows = []
    for case in ("one", "four", "cold", "text", "prefix"):
        for system in SYSTEMS:
            stages = [s["stages"] for s in _samples(results, case, system).values()]
            if stages:
                medians = (statistics.median(column) for column in zip(*stages, strict=True))
                rows.append((f"{case}, {system}", *(f"{1e3 * m:.1f}" for m in medians)))
    return rows

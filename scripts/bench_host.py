#!/usr/bin/env python
"""Measure what a warm request costs the host, part by part, on a CPU.

KV, encoder rows and prompt have the sizes of Qwen2.5-VL-7B (28 layers, 4 KV heads of 128,
bfloat16, rows of 3584, blocks of 16 tokens); the model computes nothing. The scheduler side, the
worker side, their host memory and vLLM's KV cache manager are the real ones, called in vLLM's
order: a request arrives, claims what is known of its images, is allocated, crosses to the worker,
is filled, reported and ends. Every request shows the same images behind other text. A part's time
is what is spent in it and in no other part. Moving KV itself into the paged cache, which copy
engine and kernel do on a GPU, is shown apart.

With `--against CHECKOUT`, requests run in turn with the package in another checkout, e.g. one that
`git worktree add` made of an older commit. Results go to PREFIX.json and PREFIX.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from results import Spread, about_run, duration, timestamp, with_range, with_suffix, write_text
from serving import ROOT, SERVER_ENV

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

SCHEMA = 1
LAYERS, KV_HEADS, HEAD_DIM, WIDTH, BLOCK = 28, 4, 128, 3584, 16
MROPE_SECTION = [16, 24, 24]
IMAGE_TOKEN = 630  # of the small tokenizer that scripts/make_tiny_model.py makes
RATIO = 0.02
TEXT_TOKENS = 40
AIM_MS = 3.0
KV_MOVED = "KV into the paged cache"
MODEL = "model"
APART = (KV_MOVED, MODEL)
"""Not counted: bytes that have to move, and what the model does."""

_PARTS: Mapping[str, Sequence[str]] = {
    "hash and plan": [
        f"scheduler.scheduler:SchedulerSide.{method}"
        for method in (
            "on_new_request",
            "get_num_new_matched_tokens",
            "update_state_after_alloc",
            "external_tokens",
            "build_step_plan",
        )
    ],
    "fence": [f"scheduler.fence:PrefixFences.{method}" for method in ("find", "raise_at", "lift")],
    "lookup": ["scheduler.scheduler:SchedulerSide._look_up"],
    "positions and slots": [
        "worker.model:SparsePrefillModel.positions",
        "worker.loader:Loader._place",
    ],
    "read": ["worker.storage:Storage.get"],
    "encoder rows": ["worker.loader:Loader.open_rows"],
    "inputs of the pass": ["worker.sparse_prefill:SparsePrefill._inputs_of"],
    "attention metadata": ["attention.metadata:MetadataFactory.build"],
    "injection": ["worker.loader:Loader.injection", "worker.injection:Injection.write_layer"],
    "load, the rest": ["worker.worker:WorkerSide.begin_step", "worker.worker:WorkerSide.load"],
    "report": [
        "worker.worker:WorkerSide.end_step",
        "worker.worker:WorkerSide.take_report",
        "scheduler.scheduler:SchedulerSide.update_from_report",
        "scheduler.scheduler:SchedulerSide.request_finished",
        "scheduler.statistics:Statistics.take",
    ],
}
METADATA = "metadata"
PARTS = (*_PARTS, METADATA)


TraceFunction = Callable[[FrameType, str, Any], Any]
"""See `sys.settrace`."""


@dataclass(frozen=True)
class Prompt:
    """What requests show.

    Attributes:
        name: for readers.
        tokens: of all images together.
        images: as many, of the same size.
        text_every: tokens between two text tokens inside an image's placeholder, as videos of some
            models have them; None: all of them take encoder rows.
    """

    name: str
    tokens: int
    images: int = 1
    text_every: int | None = None


def prompts_of(sizes: Sequence[int]) -> list[Prompt]:
    """One image of each size; and, of the largest, several images, and one with text inside."""
    largest = max(sizes)
    return [
        *(Prompt(f"{size:,} tokens", size) for size in sizes),
        Prompt(f"{largest:,} tokens in 10 images", largest, images=10),
        Prompt(f"{largest:,} tokens, text inside", largest, text_every=100),
    ]


# -- time ---------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up seconds by part; a part's time stops while another one runs inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = 0.0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, a part's."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return call

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def watching(self, parts: Mapping[str, Sequence[str]]) -> Iterator[None]:
        """Time methods of the package, "module:Class.method", for the block."""
        with contextlib.ExitStack() as stack:
            for name, methods in parts.items():
                for method in methods:
                    module, _, path = method.partition(":")
                    owner_name, _, attribute = path.partition(".")
                    owner = getattr(
                        importlib.import_module(f"vlcache_connector.{module}"), owner_name
                    )
                    original = vars(owner)[attribute]
                    stack.callback(setattr, owner, attribute, original)
                    if isinstance(original, staticmethod):
                        timed: Any = staticmethod(self.timed(name, original.__func__))
                    else:
                        timed = self.timed(name, original)
                    setattr(owner, attribute, timed)
            yield


class Bytecodes:
    """Counts what Python executes of the package: unlike time, the same in every run.

    Attributes:
        by_file: bytecodes by the file they are in, relative to the package.
    """

    _PACKAGE = f"{os.sep}vlcache_connector{os.sep}"

    def __init__(self) -> None:
        self.by_file: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Of all files."""
        return self.by_file.total()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is called in the block."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> TraceFunction | None:
        _, found, file = frame.f_code.co_filename.rpartition(self._PACKAGE)
        if not found:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def count(frame: FrameType, event: str, arg: Any) -> TraceFunction:
            self.by_file[file] += event == "opcode"
            return count

        return count


# -- an engine without a model ------------------------------------------------------------------


def configuration(folder: Path, layers: int, max_tokens: int) -> VllmConfig:
    """vLLM's configuration of a Qwen2.5-VL with the attention of the 7B model."""
    from make_tiny_model import make_tiny_model
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig

    make_tiny_model(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config["text_config"]
    text |= {
        "hidden_size": WIDTH,
        "num_attention_heads": WIDTH // HEAD_DIM,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "max_window_layers": layers,
        "max_position_embeddings": max_tokens,
    }
    text["rope_parameters"]["mrope_section"] = MROPE_SECTION
    path.write_text(json.dumps(config), encoding="utf-8")
    return VllmConfig(
        model_config=ModelConfig(model=str(folder), dtype="bfloat16", max_model_len=max_tokens),
        cache_config=CacheConfig(block_size=BLOCK),
        scheduler_config=SchedulerConfig(
            max_model_len=max_tokens,
            max_num_batched_tokens=8192,
            max_num_seqs=64,
            is_encoder_decoder=False,
        ),
    )


def _model_of(config: VllmConfig, layers: Sequence[Any], stopwatch: Stopwatch) -> Any:
    """Embeds tokens as vLLM's models do; its decoder only passes through the attention layers."""
    import torch
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.model_executor.models.interfaces import SupportsMultiModal
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    text = config.model_config.hf_text_config
    rotary = get_rope(
        HEAD_DIM,
        max_position=text.max_position_embeddings,
        is_neox_style=True,
        rope_parameters=text.rope_parameters,
        dtype=torch.bfloat16,
    )

    class Decoder(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.attn, self.rotary_emb = layer, rotary

    class Model(torch.nn.Module):
        iter_mm_grid_thw = Qwen2_5_VLForConditionalGeneration.iter_mm_grid_thw
        get_mrope_input_positions = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions
        _has_oov_mm_tokens = False
        _embed_text_input_ids = SupportsMultiModal._embed_text_input_ids
        embed_input_ids = stopwatch.timed(MODEL, SupportsMultiModal.embed_input_ids)
        before_layer: Callable[[str], None]

        def __init__(self) -> None:
            super().__init__()
            self.config = config.model_config.hf_config
            self.table = torch.nn.Embedding(640, WIDTH, dtype=torch.bfloat16)
            self.decoders = torch.nn.ModuleList(map(Decoder, layers))

        def get_language_model(self) -> Any:
            return SimpleNamespace(embed_input_ids=self.table)

        def forward(self, **_: Any) -> None:
            for layer in layers:
                self.before_layer(layer.layer_name)

    return Model().requires_grad_(requires_grad=False)


class Host:
    """The two sides of an engine, which requests pass through one at a time."""

    def __init__(self, folder: Path, layers: int, max_tokens: int) -> None:
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.distributed.parallel_state import (
            ensure_model_parallel_initialized,
            init_distributed_environment,
        )
        from vllm.model_executor.layers.attention import Attention
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import init_none_hash
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        from vlcache_connector.attention import hook
        from vlcache_connector.calibration import RELATIONS
        from vlcache_connector.config import VLCacheConfig
        from vlcache_connector.scheduler.encoder import EncoderRows
        from vlcache_connector.scheduler.index import ResidencyIndex
        from vlcache_connector.scheduler.scheduler import SchedulerSide
        from vlcache_connector.storage.engine import SegmentEngine
        from vlcache_connector.storage.layout import SegmentLayout, Space
        from vlcache_connector.support import KVShape
        from vlcache_connector.worker.encoder import EncoderRows as StoredRows
        from vlcache_connector.worker.model import SparsePrefillModel
        from vlcache_connector.worker.pace import Pace
        from vlcache_connector.worker.storage import Storage
        from vlcache_connector.worker.worker import WorkerSide

        self.stopwatch = Stopwatch()
        init_none_hash(sha256)
        hook.install()
        config = configuration(folder, layers, max_tokens)
        names = [f"model.layers.{index}.self_attn.attn" for index in range(layers)]
        num_blocks = 2 * max_tokens // BLOCK
        with set_current_vllm_config(config):
            init_distributed_environment(
                1, 0, f"file://{folder.parent.resolve()}/rendezvous", local_rank=0, backend="gloo"
            )
            ensure_model_parallel_initialized(1, 1)
            attention = [
                Attention(
                    KV_HEADS,
                    HEAD_DIM,
                    HEAD_DIM**-0.5,
                    num_kv_heads=KV_HEADS,
                    cache_config=config.cache_config,
                    prefix=name,
                )
                for name in names
            ]
            model = _model_of(config, attention, self.stopwatch)
        cache_shape = (num_blocks, KV_HEADS, BLOCK, 2 * HEAD_DIM)
        for layer in attention:
            layer.kv_cache = torch.zeros(cache_shape, dtype=torch.bfloat16)
        # vLLM's CPU kernel takes blocks of 16, but it does not offer them.
        backend = attention[0].get_attn_backend()
        backend.get_supported_kernel_block_sizes = staticmethod(lambda _=None: [BLOCK])
        group = KVCacheGroupSpec(names, attention[0].get_kv_cache_spec(config))
        kv_cache_config = KVCacheConfig(num_blocks, [], [group])
        shape = KVShape(layers, KV_HEADS, HEAD_DIM, torch.bfloat16, BLOCK)
        row_bytes = WIDTH * 2
        budget = max_tokens * (shape.bytes_per_token + row_bytes) * 5 // 4
        layout = SegmentLayout(
            Space("bench", rank=0, num_ranks=1),
            num_layers=layers,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            kv_dtype=torch.bfloat16,
            positions_rows=3,
            encoder_width=WIDTH,
            encoder_dtype=torch.bfloat16,
        )
        self._engine = SegmentEngine(layout, budget)
        storage = Storage(self._engine, layers)
        device = torch.device("cpu")
        self._worker = WorkerSide(
            SparsePrefillModel(model, config, names, device),
            shape,
            storage,
            StoredRows(storage, device),
            rank=0,
            pace=Pace(),
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            device=device,
        )
        model.before_layer = self._worker.wait_for_layer_load
        loader = self._worker._loader
        loader._write = self.stopwatch.timed(KV_MOVED, loader._write)
        options = VLCacheConfig(recompute_ratio=RATIO, gate="off")
        self._segments = ResidencyIndex(budget, 1)
        self._rows = EncoderRows(
            options,
            fingerprint="bench",
            row_bytes=row_bytes,
            index=ResidencyIndex(budget, 1),
            can_store=True,
        )
        self._scheduler = SchedulerSide(
            options,
            shape,
            fingerprint="bench",
            hash_block_size=BLOCK,
            limits=config.scheduler_config,
            segments=self._segments,
            encoder_rows=self._rows,
            schedules=(),
            opening=None,
            allowed=frozenset(RELATIONS),
            can_store=True,
            can_reuse=True,
            num_ranks=1,
        )
        self._manager = KVCacheManager(
            kv_cache_config,
            max_model_len=max_tokens,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        self._scheduler.bind_kv_cache_manager(self._manager)
        self._model = model
        self._number = 0

    def close(self) -> None:
        """Give all memory back."""
        self._worker.close()
        self._engine.close()

    def request(self, prompt: Prompt) -> Request:
        """The prompt's images behind and between text that no other request has."""
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        self._number += 1
        tokens, features = [], []
        for index in range(prompt.images):
            tokens += [
                (self._number * 7 + index * 13 + place) % 600 for place in range(TEXT_TOKENS)
            ]
            feature, placeholder = image(prompt, index, len(tokens))
            features.append(feature)
            tokens += placeholder
        tokens += list(range(TEXT_TOKENS))
        return Request(
            request_id=f"request-{self._number}",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            mm_features=features,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )

    def know(self, prompt: Prompt) -> None:
        """Store KV and encoder rows of the prompt's images, as if a request had computed them."""
        import torch

        from vlcache_connector.scheduler.requests import TrackedRequest
        from vlcache_connector.storage.header import SegmentId

        self._segments.clear()
        self._rows.index.clear()
        self._engine.clear()
        request = self.request(prompt)
        scheduler = self._scheduler
        tracked = TrackedRequest.of(request, scheduler._config, "bench", scheduler._options.read)
        positions, _ = self._model.get_mrope_input_positions(
            request.prompt_token_ids, request.mm_features
        )
        for item in tracked.items:
            key = scheduler._donors.reserve(item, len(item.span) * scheduler._shape.bytes_per_token)
            if key is None:
                raise RuntimeError(f"{prompt.name}: no room for an image's KV")
            writer = self._engine.open_kv(key, positions[:, item.span.start : item.span.end])
            rows = torch.ones(item.num_embeds, WIDTH, dtype=torch.bfloat16)
            if writer is None or not self._engine.put_encoder(item.encoder_key, rows):
                raise RuntimeError(f"{prompt.name}: no room in host memory")
            for layer in range(scheduler._shape.num_layers):
                writer.layer(layer).fill_(0.5)
            writer.finish()
            self._segments.stored(key, 1)
            self._rows.index.reserve(item.encoder_key, rows.nbytes)
            self._rows.index.stored(item.encoder_key, 1)
            assert self._engine.contains(SegmentId(key, "kv"))

    def serve(self, request: Request) -> dict[str, Any]:
        """Take a request through; the figures that its client gets.

        Raises:
            RuntimeError: it was not served from what is stored.
        """
        from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
        from vllm.v1.request import RequestStatus

        scheduler, worker, manager = self._scheduler, self._worker, self._manager
        with self.stopwatch.watching(_PARTS):
            scheduler.on_new_request(request)
            blocks, num_local, _ = manager.get_computed_blocks(request)
            num_external, _ = scheduler.get_num_new_matched_tokens(request, num_local)
            if not num_external:
                raise RuntimeError("the request's images are not known")
            num_computed = num_local + num_external
            num_new = request.num_tokens - num_computed
            manager.allocate_slots(
                request,
                num_new,
                num_new_computed_tokens=num_local,
                new_computed_blocks=blocks,
                num_external_computed_tokens=num_external,
            )
            block_ids = manager.get_block_ids(request.request_id)
            request.prefill_stats.set(
                num_prompt_tokens=request.num_prompt_tokens,
                num_local_cached_tokens=num_local,
                num_external_cached_tokens=num_external,
            )
            scheduler.update_state_after_alloc(request, tuple(block_ids[0]), num_external)
            request.status, request.num_computed_tokens = RequestStatus.RUNNING, num_computed
            scheduler.external_tokens(request)
            output = SchedulerOutput.make_empty()
            output.scheduled_new_reqs = [
                NewRequestData.from_request(request, block_ids, uses_mrope=True)
            ]
            output.num_scheduled_tokens = {request.request_id: num_new}
            output.total_num_scheduled_tokens = num_new
            plan = scheduler.build_step_plan(output)
            plan = self._crossed(output, plan)
            worker.begin_step(plan)
            worker.load(plan.reuse)
            worker.expect_captures(plan.captures)
            worker.end_step(plan.num_tokens)
            report = worker.take_report(is_idle=False)
            request.num_computed_tokens = request.num_tokens
            figures = scheduler.request_finished(request)
            scheduler.update_from_report(report)
            scheduler.statistics.take()
            manager.free(request)
        if figures is None or not figures["vlcache"]["reused_tokens"]:
            raise RuntimeError(f"nothing was reused: {figures}")
        # Later requests must not find it in vLLM's prefix cache.
        manager.reset_prefix_cache()
        scheduler.build_step_plan(SchedulerOutput.make_empty())
        return figures["vlcache"]

    def _crossed(self, output: Any, plan: Any) -> Any:
        """The plan, pickled with vLLM's own output; what that adds is the plan's."""

        def pickled() -> tuple[float, Any]:
            times = []
            for _ in range(10):
                start = time.perf_counter()
                copy = pickle.loads(pickle.dumps(output, pickle.HIGHEST_PROTOCOL))
                times.append(time.perf_counter() - start)
            return min(times), copy

        own, _ = pickled()
        output.kv_connector_metadata = plan
        both, copy = pickled()
        self.stopwatch.seconds[METADATA] += max(0.0, both - own)
        return copy.kv_connector_metadata


def image(prompt: Prompt, index: int, offset: int) -> tuple[Any, list[int]]:
    """An image of the prompt, known by its index, and its placeholder tokens."""
    import torch
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    num_rows = prompt.tokens // prompt.images
    length, is_embed = num_rows, None
    if prompt.text_every is not None:
        length += num_rows // prompt.text_every
        is_embed = torch.ones(length, dtype=torch.bool)
        is_embed[:: prompt.text_every + 1][: length - num_rows] = False
    placeholder = [IMAGE_TOKEN] * length
    grid = torch.tensor([1, 2, 2 * num_rows])  # patches; four make a token
    field = MultiModalFieldElem(data=grid, field=MultiModalBatchedField(keep_on_cpu=True))
    feature = MultiModalFeatureSpec(
        # Pixels are left out: they are bytes to be moved, which plain vLLM sends as well.
        data=MultiModalKwargsItem({"image_grid_thw": field}),
        modality="image",
        identifier=f"vlcache-content:{prompt.name}-{index}",
        mm_position=PlaceholderRange(offset=offset, length=length, is_embed=is_embed),
    )
    return feature, placeholder


# -- measuring ----------------------------------------------------------------------------------


def measure(sizes: Sequence[int], layers: int, repetitions: int) -> list[dict[str, Any]]:
    """Seconds by part of each repetition, and how much was reused, for each prompt."""
    prompts = prompts_of(sizes)
    longest = max(prompt.tokens + (prompt.images + 1) * TEXT_TOKENS for prompt in prompts)
    max_tokens = -(-longest * 11 // 10 // BLOCK) * BLOCK
    measured = []
    gc.collect()
    gc.freeze()  # as vLLM's engine does when it has started
    with tempfile.TemporaryDirectory(prefix="vlcache-host-") as folder:
        host = Host(Path(folder) / "model", layers, max_tokens)
        try:
            for prompt in prompts:
                host.know(prompt)
                host.serve(host.request(prompt))  # memory, imports, caches
                runs = []
                for _ in range(repetitions):
                    request = host.request(prompt)
                    host.stopwatch.seconds.clear()
                    figures = host.serve(request)
                    seconds = host.stopwatch.seconds
                    runs.append({part: round(value, 7) for part, value in seconds.items()})
                request, bytecodes = host.request(prompt), Bytecodes()
                with bytecodes.counting():
                    host.serve(request)
                kept = ("reused_tokens", "recomputed_tokens", "computed_tokens")
                measured.append(
                    {
                        "prompt": asdict(prompt),
                        **{key: figures[key] for key in kept},
                        "bytecodes": dict(bytecodes.by_file),
                        "runs": runs,
                    }
                )
        finally:
            host.close()
    return measured


def measure_apart(package: Path, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """`measure` in a process of its own, with the package in a checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--measure"]
    # One thread for torch, as vLLM's workers on GPUs have.
    environment = {
        **os.environ,
        **SERVER_ENV,
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def merged(rounds: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The runs of all rounds, prompt by prompt."""
    return [
        {**cells[0], "runs": [run for cell in cells for run in cell["runs"]]}
        for cells in zip(*rounds, strict=True)
    ]


def part_ms(cell: Mapping[str, Any], part: str) -> Spread:
    """Of one part, in milliseconds."""
    return Spread.of([1e3 * run.get(part, 0.0) for run in cell["runs"]])


def host_ms(cell: Mapping[str, Any]) -> Spread:
    """Of all parts that count."""
    return Spread.of([1e3 * sum(run.get(part, 0.0) for part in PARTS) for run in cell["runs"]])


def markdown(document: Mapping[str, Any]) -> str:
    """A table for each prompt."""
    systems = [name for name in ("before", "after") if name in document["cells"]]
    machine = document["machine"]
    lines = [
        "# Host work of a warm request",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, one thread for torch; {document['shape']}.",
        f"{document['repetitions']} requests each, {duration(document)}.",
        "",
        f"`{document['command']}`",
        "",
        "Milliseconds, median and range. Rows in italics are not host work: bytes that have to be",
        "moved, and the model's embedding of what is computed. The last row counts what Python",
        "executes of the package.",
    ]
    for cells in zip(*(document["cells"][name] for name in systems), strict=True):

        def row(
            label: str, of: Callable[[Mapping[str, Any]], str], cells: Sequence[Any] = cells
        ) -> str:
            return f"| {label} | " + " | ".join(map(of, cells)) + " |"

        def spread(part: str) -> Callable[[Mapping[str, Any]], str]:
            return lambda cell: with_range(part_ms(cell, part), ".2f")

        reused = f"{cells[-1]['reused_tokens']:,} tokens reused"
        lines += ["", f"## {cells[-1]['prompt']['name']}: {reused}", ""]
        lines += ["| | " + " | ".join(systems) + " |", "| --- |" + " ---: |" * len(systems)]
        lines += [row(part, spread(part)) for part in PARTS]
        lines.append(row("**host work**", lambda cell: with_range(host_ms(cell), ".2f")))
        lines += [row(f"*{part}*", spread(part)) for part in APART]
        lines.append(row("bytecodes", lambda cell: f"{sum(cell['bytecodes'].values()):,}"))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 10000], metavar="N")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repetitions", type=int, default=15, help="requests per round")
    parser.add_argument("--rounds", type=int, default=3, help="of the two packages in turn")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="whose package is measured, too"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("configs/results/host"), metavar="PREFIX"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.tokens, args.layers, args.repetitions)))
        return 0
    arguments = list(sys.argv[1:] if argv is None else argv)
    packages = {"after": ROOT}
    if args.against is not None:
        if not (args.against / "vlcache_connector").is_dir():
            parser.error(f"--against {args.against}: not a checkout with a vlcache_connector")
        packages = {"before": args.against.resolve(), "after": ROOT}
    document: dict[str, Any] = {
        "schema": SCHEMA,
        **about_run(__file__, arguments),
        "complete": False,
        "shape": f"{args.layers} layers, {KV_HEADS} KV heads of {HEAD_DIM}, bfloat16, encoder rows "
        f"of {WIDTH}, blocks of {BLOCK}; {RATIO:.0%} recomputed",
        "repetitions": args.repetitions * args.rounds,
        "packages": {name: package_commit(folder) for name, folder in packages.items()},
    }
    own = ["--layers", str(args.layers), "--repetitions", str(args.repetitions), "--tokens"]
    own += map(str, args.tokens)
    rounds: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in packages}
    for _ in range(args.rounds):
        for name, folder in packages.items():
            rounds[name].append(measure_apart(folder, own))
    document["cells"] = {name: merged(of_system) for name, of_system in rounds.items()}
    document |= {"complete": True, "finished": timestamp()}
    text = markdown(document)
    write_text(with_suffix(args.output, ".json"), json.dumps(document, indent=1) + "\n")
    write_text(with_suffix(args.output, ".md"), text)
    print(text)
    return 0


def package_commit(checkout: Path) -> str | None:
    """What is measured; None where there is no repository."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())

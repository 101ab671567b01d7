#!/usr/bin/env python
"""Measure the tiers that segments are kept in: their speed, what a request gains, and the gate.

- "bandwidth": segments of several sizes are put into host memory, device memory and each of
  LMCache's adapters, and got back, one at a time and four at a time, through the classes that the
  connector uses. Beside it, a plain copy of as many bytes.
- "tiers": node A, an engine that ends then, has filled the adapters. Node B, a fresh engine, is
  asked about these images: TTFT by the tier that an image comes from, against images that nobody
  knows. Between two requests node B forgets all it has in memory.
- "gate": before a segment is loaded, the connector weighs loading against computing. Here both
  are done, and compared with what it decided: from each adapter, and, by a node of its own, from
  Redis behind links of several speeds around the one at which loading takes as long as computing.
- "decoding": the time between two tokens of requests that decode, without loads, and with ten a
  second that they have nothing to do with.

What counts are ratios within a round, whose requests are made one after the other, in an order
that turns around from round to round. Engines run one at a time, each in a process of its own.
Files are dropped from the page cache before they are read, unless said otherwise. On a CPU, device
memory is host memory, too. Fetches have all the time they take.

Servers are started here, on 127.0.0.1; adapters whose server or package is missing are left out.

Results go to PREFIX.json (every single measurement), PREFIX.md and PREFIX.png.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import signal
import socket
import socketserver
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import results
from bench_ttft import BEHIND, IN_FRONT, TEXT_TOKENS
from local_mooncake import Master, MooncakeError, find_master
from local_redis import LocalRedis, RedisError, find_server, find_valkey
from options import add_model_options, add_output_options, model_of, model_problems
from results import Spread, with_suffix, write_text
from rich.console import Console
from serving import CELL_PX, ROOT, SERVER_ENV, make_image
from tiny_architectures import MAX_PIXELS

from vlcache_connector.config import ADAPTER_TYPES
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.segment import Segment

SCHEMA = 2
PARTS = ("bandwidth", "tiers", "gate", "decoding")
PLACES = ("cold", *reversed(ADAPTER_TYPES), "cpu", "device")
"""What a request of the part "tiers" can be, slowest first."""
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
WARM_UP_SEED, KNOWN_SEED, NEW_SEED = 1, 10_000, 20_000
PATIENCE = 600.0
"""Seconds that nothing here takes."""
ATTEMPTS = 5
"""At a round, where other programs use the machine, too."""
RATIO = 0.05
NODE = {
    "recompute_ratio": RATIO,
    "cpu_bytes": "1GiB",
    "encoder_cpu_bytes": "256MiB",
    "device_bytes": "256MiB",
    "write_queue_bytes": "1GiB",
    "fetch_deadline_seconds": PATIENCE,
    "break_even": True,
}
STREAMS = (1, 4)
"""Segments at a time."""
DECODING, LOADS_PER_SECOND = 4, 10.0
"""Requests that decode, and what is loaded beside them."""
LAYERS, KV_HEADS, HEAD_DIM = 28, 4, 128
"""Of the segments of "bandwidth": Qwen2.5-VL-7B. In bfloat16, a token has 57,344 bytes."""


class BenchError(RuntimeError):
    """What was measured is not what it should be."""


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        part: "tiers" or "gate".
        source: tier that the image may come from, with the speed of its link if it has one.
        how: "tiers": one of `PLACES`; "gate": "load" or "compute" (the encoder's rows were loaded,
            and the KV too, or not), "memory" (the KV was in host memory), "plain" (nothing was
            looked for).
        image_px: edge of the image.
        pair: number of the round.
        ttft: seconds to the first token.
        estimates: of the gate, "load" and "compute", in seconds, as far as it had any.
        gate_loads: what it decided; None: it was not asked.
        read_seconds: reading the KV from its tier.
        other_load: cores that anything else on the machine used during the round.
    """

    part: str
    source: str
    how: str
    image_px: int
    image_tokens: int
    pair: int
    ttft: float
    estimates: dict[str, float] = field(default_factory=dict)
    gate_loads: bool | None = None
    read_seconds: float | None = None
    other_load: float = 0.0


class Link(socketserver.ThreadingTCPServer):
    """A port on 127.0.0.1 behind which another one seems far away; serves inside a `with` block.

    Args:
        port: where it leads.
        bytes_per_second: of all answers together; may be changed.

    Attributes:
        port: where it listens.
    """

    daemon_threads = True

    def __init__(self, port: int, bytes_per_second: float) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.leads_to = ("127.0.0.1", port)
        self.port = int(self.server_address[1])
        self.bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)

    def pass_on(self, num_bytes: int) -> None:
        """Wait until so many bytes are through, behind all that came before."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + num_bytes / self.bytes_per_second
            seconds = self._free_at - now
        time.sleep(seconds)


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        link, client = cast(Link, self.server), self.request
        with socket.create_connection(link.leads_to) as server:
            there = threading.Thread(target=_pump, args=(client, server), daemon=True)
            there.start()
            _pump(server, client, link.pass_on)
            there.join()


def _pump(
    source: socket.socket, target: socket.socket, before: Callable[[int], object] = bool
) -> None:
    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 15):
            before(len(data))
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


# -- adapters -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Servers:
    """What adapters need, as far as there is any.

    Attributes:
        missing: types of adapters that are left out, with the reason.
    """

    redis: LocalRedis | None
    mooncake: Master | None
    missing: Mapping[str, str]

    @classmethod
    def start(cls, stack: contextlib.ExitStack, names: Iterable[str], folder: Path) -> Servers:
        """Those for these types of adapters."""
        missing: dict[str, str] = {}
        redis = master = None
        wanted = {"valkey", "resp"} & set(names)
        if wanted and (command := find_valkey() or find_server()):
            redis = stack.enter_context(LocalRedis(folder, command=command))
        elif wanted:
            missing |= dict.fromkeys(wanted, "neither a valkey-server nor a redis-server")
        if "mooncake" in names and (command := find_master()):
            master = stack.enter_context(Master(command, folder))
        elif "mooncake" in names:
            missing["mooncake"] = "no mooncake_master that runs here"
        return cls(redis, master, missing)

    def spec(self, name: str, folder: Path, port: int | None = None) -> dict[str, Any]:
        """An adapter's configuration.

        Args:
            folder: for those that keep files.
            port: in place of the server's own.
        """
        if name in ("fs", "fs_native"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            return {"type": name, "base_path": str(folder / name)}
        if name == "mooncake":
            assert self.mooncake is not None
            return {"type": name, **self.mooncake.params, "global_segment_size": 2 << 30}
        assert self.redis is not None
        port = port or self.redis.port
        if name == "resp":
            return {"type": name, "host": "127.0.0.1", "port": port, "num_workers": 4}
        nodes = f"127.0.0.1:{port}"
        return {"type": name, "startup_nodes": nodes, "num_workers": 4, "request_timeout": PATIENCE}


def drop_from_page_cache(folder: Path) -> None:
    """The next reader of the folder's files has to get them from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- bandwidth ----------------------------------------------------------------------------------


class Segments:
    """Segments in host memory, and in an adapter below it.

    Args:
        spec: of the adapter; None: there is none.
        num_bytes: host memory.
    """

    def __init__(self, spec: Mapping[str, Any] | None, num_bytes: int) -> None:
        import torch

        from vlcache_connector.config import VLCacheConfig
        from vlcache_connector.storage.adapters import open_adapters
        from vlcache_connector.storage.engine import SegmentEngine
        from vlcache_connector.storage.layout import SegmentLayout, Space

        layout = SegmentLayout(
            Space(f"bench-{spec['type'] if spec else 'host'}", rank=0, num_ranks=1),
            num_layers=LAYERS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            kv_dtype=torch.bfloat16,
            positions_rows=3,
            encoder_width=1,
            encoder_dtype=torch.bfloat16,
        )
        config = VLCacheConfig(
            l2_adapters=[dict(spec)] if spec else [],
            fetch_deadline_seconds=PATIENCE,
            write_queue_bytes=num_bytes,
        )
        self.engine = SegmentEngine(layout, num_bytes, open_adapters(config, can_store=True))
        self._layout = layout

    def objects(self, segment: SegmentId, num_tokens: int) -> Any:
        """See `SegmentLayout.expected`."""
        return self._layout.expected(segment, num_tokens)

    def write(self, segment: SegmentId, kv: Any) -> Any:
        """Copy KV `[layers, 2, tokens, heads, dim]` to host memory; `finish` the result."""
        import torch

        writer = self.engine.open_kv(segment.key, torch.arange(kv.shape[2]).expand(3, -1))
        if writer is None:
            raise BenchError(f"no room for {segment.key}")
        for layer, both in enumerate(kv):
            writer.layer(layer).copy_(both)
        return writer

    def wait_until_stored(self, num_bytes: int) -> None:
        """Until the adapter has taken so many bytes."""
        written, seen = 0, Counter[str]()
        while written < num_bytes:
            time.sleep(0.0002)
            events = self.engine.take_events()
            seen += events
            written += sum(n for event, n in events.items() if event.endswith(".write.bytes"))
            if any("store." in event for event in events):
                raise BenchError(f"not all was stored: {dict(seen)}")

    def load(self, segments: Sequence[SegmentId], num_tokens: int) -> None:
        """Bring segments back to host memory, all at a time."""
        deadline = time.monotonic() + PATIENCE
        for segment in segments:
            self.engine.load(segment, num_tokens, deadline)
        left = len(segments)
        while left:
            for ended in self.engine.take_loaded():
                left -= 1
                if not ended.is_here:
                    raise BenchError(f"{ended.id.key} could not be loaded")
            time.sleep(0.0002)

    def get(self, segment: SegmentId) -> Segment:
        """What is in host memory."""
        found = self.engine.get(segment)
        if found is None:
            raise BenchError(f"{segment.key} is not in host memory")
        return found

    def forget(self, segments: Sequence[SegmentId]) -> None:
        """Drop them from host memory."""
        for segment in segments:
            self.engine.remove(segment)


Laps = dict[tuple[str, int], list[float]]
"""What was done, and how many segments at a time -> seconds of each run."""


def measure_bandwidth(
    spec: Mapping[str, Any] | None, mebibytes: Sequence[int], runs: int
) -> list[dict[str, Any]]:
    """Put segments into an adapter, or memory alone, and get them back: one entry per operation,
    size and number of segments at a time."""
    import torch

    segments = Segments(spec, (max(STREAMS) + 1) * (max(mebibytes) + 16) << 20)
    measured = []
    try:
        for size in mebibytes:
            tokens = max(1, (size << 20) // (LAYERS * 2 * KV_HEADS * HEAD_DIM * 2))
            shape = (LAYERS, 2, tokens, KV_HEADS, HEAD_DIM)
            kv = torch.randint(0, 2**14, shape, dtype=torch.int16).view(torch.bfloat16)
            laps: Laps = {}
            for run in range(runs + 1):
                if spec is None:
                    _run_in_memory(segments, kv, laps)
                else:
                    _run_below(segments, spec, kv, run, laps)
            # The first run finds memory that was never touched.
            num_bytes = segments.objects(SegmentId("", "kv"), tokens).num_bytes
            measured += [
                {"what": what, "streams": n, "num_bytes": n * num_bytes, "seconds": seconds[1:]}
                for (what, n), seconds in laps.items()
            ]
    finally:
        segments.engine.close()
    return measured


@contextlib.contextmanager
def _timed(laps: Laps, what: str, streams: int) -> Iterator[None]:
    start = time.perf_counter()
    yield
    laps.setdefault((what, streams), []).append(time.perf_counter() - start)


def _run_in_memory(segments: Segments, kv: Any, laps: Laps) -> None:
    """Host and device memory, and what copies take alone."""
    import torch

    from vlcache_connector.streams import Leaving
    from vlcache_connector.worker.device import DeviceSegments

    segment, target = SegmentId("one", "kv"), torch.empty_like(kv)
    cpu = torch.device("cpu")
    device = DeviceSegments(kv.nbytes, cpu, None, Leaving(None, cpu))

    def copy_out(of: Any) -> None:
        with of:
            for layer in range(LAYERS):  # as a load does
                target[layer, 0], target[layer, 1] = of.layer(layer)

    with _timed(laps, "host: put", 1):
        segments.write(segment, kv).finish()
    with _timed(laps, "host: get", 1):
        copy_out(segments.get(segment))
    with _timed(laps, "device: put", 1):
        device.promote(segments.get(segment), LAYERS)
    with _timed(laps, "device: get", 1):
        copy_out(device.get(segment.key))
    segments.forget([segment])
    for streams in STREAMS:
        targets = [torch.empty_like(kv).fill_(0) for _ in range(streams)]
        with ThreadPoolExecutor(streams) as pool, _timed(laps, "copy", streams):
            list(pool.map(lambda one: one.copy_(kv), targets))


def _run_below(segments: Segments, spec: Mapping[str, Any], kv: Any, run: int, laps: Laps) -> None:
    """An adapter."""
    name, tokens = spec["type"], kv.shape[2]
    for streams in STREAMS:
        mine = [SegmentId(f"{tokens} {run} {streams} {number}", "kv") for number in range(streams)]
        objects = [segments.objects(segment, tokens) for segment in mine]
        writers = [segments.write(segment, kv) for segment in mine]
        with _timed(laps, f"{name}: put", streams):
            for writer in writers:
                writer.finish()
            segments.wait_until_stored(sum(of.num_bytes for of in objects))
        segments.forget(mine)
        if "base_path" in spec:
            with _timed(laps, f"{name}: get, from the page cache", streams):
                segments.load(mine, tokens)
            segments.forget(mine)
            drop_from_page_cache(Path(spec["base_path"]))
        with _timed(laps, f"{name}: get", streams):
            segments.load(mine, tokens)
        segments.forget(mine)
        adapter: Any = segments.engine.tiers[0].adapter
        adapter.delete([key for of in objects for key in of.keys])


# -- nodes --------------------------------------------------------------------------------------


class Engine:
    """vLLM with VLCache, in this process; it reaches into the connector to see what is measured.

    Args:
        connector: its options.
        arguments: of `vllm.LLM`.
    """

    def __init__(self, model: str, connector: Mapping[str, Any], **arguments: Any) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from vlcache_connector.measure.runner import Runner
        from vlcache_connector.scheduler.break_even import BreakEven

        arguments |= {"enforce_eager": True, "enable_prefix_caching": True, "seed": 0}
        arguments |= {"skip_mm_profiling": True, "limit_mm_per_prompt": {"image": 1, "video": 0}}
        self._runner = Runner(model, connector, max_num_seqs=DECODING, **arguments)
        group: Any = get_kv_transfer_group()
        self._shape, self._storage = group._worker._shape, group._worker._storage
        self._device, self._engine = self._storage._device, self._storage.engine
        llm_engine: Any = self._runner._llm.llm_engine
        side = llm_engine.engine_core.engine_core.scheduler.connector._scheduler
        self._statistics, self._staging = side.statistics, side._staging
        # Loads alone are weighed: what has been loaded is reused.
        side._break_even = BreakEven(is_on=False)
        self._decide = self._staging._is_worth
        self._staging._is_worth = self._judge
        self._load, self._take_loaded = self._engine.load, self._engine.take_loaded
        self._engine.load, self._engine.take_loaded = self._begin_load, self._end_loads
        self._folders = [
            Path(spec["base_path"]) for spec in connector["l2_adapters"] if "base_path" in spec
        ]
        self._force: bool | None = None
        self._seen: dict[str, Any] = {}
        self._begun: dict[SegmentId, float] = {}
        """When loads that are on their way began."""
        self._loaded: dict[SegmentId, int] = {}
        """KV segments that were loaded so far, and their tokens."""

    def ask(
        self,
        number: int,
        image: tuple[int, int],
        sources: Sequence[str],
        on_device: bool = False,
        force: bool | None = None,
        plain: bool = False,
    ) -> dict[str, Any]:
        """Time a request.

        Args:
            number: in front of the prompt; no prefix is ever the same.
            image: seed and edge in pixels.
            sources: tiers below host memory that are used.
            on_device: use device memory, too.
            force: whether to load a segment that is found; None: as the gate decides.
            plain: look for nothing, and store nothing.
        """
        from vlcache_connector.measure.runner import FULL_RECOMPUTE, Request

        self._use(sources)
        self._runner._llm.reset_mm_cache()  # every request has to have its image decoded
        self._storage._device = self._device if on_device else None
        self._force, self._seen = force, {}
        text = f"Request {number:06}. {IN_FRONT}{IMAGE}{BEHIND}"
        options = FULL_RECOMPUTE if plain else {}
        outcome = self._runner.run_alone(Request(text, (make_image(*image),), options=options))
        if not self._storage.flush(PATIENCE):
            raise BenchError("what was stored was not written in time")
        tier = outcome.figures.get("tier") if outcome.figures.get("reused_tokens") else None
        about = {"ttft": outcome.seconds, "image_tokens": outcome.image_tokens, "tier": tier}
        return about | self._seen

    def _use(self, sources: Sequence[str]) -> None:
        for tier in self._engine.tiers:
            tier.set_open(tier.name in sources)
        for folder in self._folders:
            drop_from_page_cache(folder)

    def forget(self) -> None:
        """Empty all memory, as that of a fresh engine."""
        engine = self._runner._llm.llm_engine
        if not engine.reset_prefix_cache(reset_connector=True):
            raise BenchError("the prefix cache could not be reset")
        engine.reset_encoder_cache()
        self._device.clear()
        # With its next step, the worker looks at the weights, and opens all tiers that fit them.
        self._runner.run_alone(_text_request())

    def forget_speed(self, source: str) -> None:
        """A tier has another speed from now on."""
        from vlcache_connector.storage.transfer_time import TransferTime

        for tier in self._engine.tiers:
            if tier.name == source:
                tier.read_time = TransferTime()

    def decode(self, source: str, steps: int, loads_per_second: float) -> dict[str, Any]:
        """Time the steps of requests that decode, while what was loaded before is loaded again.

        Returns:
            Seconds of each step ("gaps"), how many loads ended ("loads"), and their bytes.
        """
        from vllm import SamplingParams

        self._use([source])
        self._begun.clear()
        engine = self._runner._llm.llm_engine
        params = SamplingParams(max_tokens=steps + 8, temperature=0, ignore_eos=True)
        names = [f"decoding {source} {loads_per_second} {index}" for index in range(DECODING)]
        for name in names:
            engine.add_request(name, {"prompt": f"{name}: {IN_FRONT}"}, params)
        for _ in range(4):  # prefill, and what a request does once
            engine.step()
        gaps: list[float] = []
        segments, begun, ended, num_bytes = list(self._loaded.items()), 0, 0, 0
        first = last = time.perf_counter()
        while len(gaps) < steps and engine.has_unfinished_requests():
            while begun < (last - first) * loads_per_second:
                segment, num_tokens = segments[begun % len(segments)]
                begun += 1
                if segment not in self._begun:  # the one before is not through yet
                    self._engine.load(segment, num_tokens, time.monotonic() + PATIENCE)
                    num_bytes += num_tokens * self._shape.bytes_per_token
            before = len(self._begun)
            engine.step()
            ended += before - len(self._begun)
            gaps.append(time.perf_counter() - last)
            last += gaps[-1]
        engine.abort_request(names)
        while self._begun:
            self._runner.run_alone(_text_request())
        return {"gaps": gaps, "loads": ended, "num_bytes": num_bytes}

    def facts(self) -> dict[str, float]:
        """How fast it computes, and how large KV is."""
        speed = self._statistics.prefill_speed
        return {"tokens_per_second": speed, "bytes_per_token": self._shape.bytes_per_token}

    def close(self) -> None:
        """End it."""
        self._runner.close()

    def _begin_load(self, segment: SegmentId, num_tokens: int, deadline: float) -> None:
        self._begun[segment] = time.perf_counter()
        if segment.kind == "kv":
            self._loaded[segment] = num_tokens
        self._load(segment, num_tokens, deadline)

    def _end_loads(self) -> Any:
        loaded = self._take_loaded()
        for ended in loaded:
            began = self._begun.pop(ended.id, None)
            if began is not None and ended.id.kind == "kv":
                self._seen["read_seconds"] = time.perf_counter() - began
        return loaded

    def _judge(self, tier: str, num_bytes: int, saved_tokens: int) -> bool:
        decision: bool = self._decide(tier, num_bytes, saved_tokens)
        self._staging._num_skipped = 0  # no load is made only to see whether speeds have changed
        speed = self._statistics.prefill_speed
        load = self._statistics.read_seconds(tier, num_bytes)
        estimates = {"load": load, "compute": speed and saved_tokens / speed}
        self._seen["estimates"] = {k: v for k, v in estimates.items() if v is not None}
        self._seen["gate_loads"] = decision
        return decision if self._force is None else self._force


def _text_request() -> Any:
    from vlcache_connector.measure.runner import Request

    return Request("no image", ())


_engine: Engine | None = None


def _call(method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Runs in the node's process."""
    global _engine
    if method == "start":
        _engine = Engine(*args, **options)
        return None
    return getattr(_engine, method)(*args, **options)


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """Processes fork from one that has imported vLLM, with the environment that it has then."""
    os.environ.update(
        SERVER_ENV,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        TORCHDYNAMO_DISABLE="1",
        VLLM_CPU_OMP_THREADS_BIND=results.cores(),
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.core"])
    return context


class Node:
    """An `Engine` in a process of its own, as a context manager; see there for the arguments."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._pool = ProcessPoolExecutor(1, _context())
        self._start = args, options

    def __enter__(self) -> Node:
        try:
            self.call("start", *self._start[0], **self._start[1])
        except BaseException:
            self._pool.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenProcessPool, AttributeError):
            self.call("close")
        self._pool.shutdown()

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the engine."""
        return self._pool.submit(_call, method, args, options).result()


class Bench:
    """Asks node B, and keeps what comes back.

    Args:
        sources: tiers that both nodes have.
        keep: called with all requests of a round.
        groups: process groups of what runs here.
        max_other_load: most cores that anything else may use during a round on average; else it
            is measured again, up to `ATTEMPTS` times.
    """

    def __init__(
        self,
        node: Node,
        sources: Sequence[str],
        keep: Callable[[list[Sample]], None],
        groups: Sequence[int],
        max_other_load: float,
    ) -> None:
        self._node = node
        self._sources = sources
        self._keep = keep
        self._groups = groups
        self._max_other_load = max_other_load
        self._number = 0

    def round(self, measure: Callable[[int], list[dict[str, Any]]], number: int) -> None:
        """Make a round until nothing else disturbs it, and keep the least disturbed one."""
        rounds: list[list[Sample]] = []
        while len(rounds) < ATTEMPTS and (
            not rounds or rounds[-1][0].other_load > self._max_other_load
        ):
            before, started = results.CpuTimes.now(self._groups).other, time.monotonic()
            answers = measure(number)
            used = results.CpuTimes.now(self._groups).other - before
            load = round(max(0.0, used / (time.monotonic() - started)), 3)
            rounds.append([Sample(pair=number, other_load=load, **answer) for answer in answers])
        self._keep(min(rounds, key=lambda samples: samples[0].other_load))

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Compute twice and load once per size and tier; nothing is kept."""
        for px in sizes:
            for new in (-1, -2):
                self._ask("", "compute", px, NEW_SEED + new, [])
        for source in self._sources:
            self.teach(source, sizes)

    def teach(self, source: str, sizes: Sequence[int]) -> None:
        """Load once per size, so that the gate knows how long that takes; nothing is kept."""
        self._node.call("forget_speed", _tier_of(source))
        for px in sizes:
            self._node.call("forget")
            self._ask(source, "load", px, WARM_UP_SEED, [_tier_of(source)], force=True)

    def tiers(self, px: int, number: int) -> list[dict[str, Any]]:
        """The requests of a round of the part "tiers"."""
        known, answers = KNOWN_SEED + number, []
        for turn in _in_turn([*self._sources, "cold"], number):
            self._node.call("forget")
            if turn == "cold":
                answers.append(self._ask("", "cold", px, NEW_SEED + number, self._sources))
                continue
            answers.append(self._ask(turn, turn, px, known, [turn], force=True))
            if turn == self._sources[-1]:
                answers.append(self._ask("cpu", "cpu", px, known, []))
                self._ask("cpu", "cpu", px, known, [], on_device=True)  # copies it there
                answers.append(self._ask("device", "device", px, known, [], on_device=True))
        return [{"part": "tiers", **answer} for answer in answers]

    def gate(self, source: str, px: int, number: int) -> list[dict[str, Any]]:
        """The requests of a round of the part "gate"."""
        known, tiers, answers = KNOWN_SEED + number, [_tier_of(source)], []
        for turn in _in_turn(["plain", "compute", "load"], number):
            self._node.call("forget")
            if turn == "plain":
                answers.append(self._ask(source, turn, px, known, tiers, plain=True))
                continue
            answers.append(self._ask(source, turn, px, known, tiers, force=turn == "load"))
            if turn == "load":
                answers.append(self._ask(source, "memory", px, known, []))
        return [{"part": "gate", **answer} for answer in answers]

    def _ask(
        self, source: str, how: str, px: int, seed: int, sources: Sequence[str], **options: Any
    ) -> dict[str, Any]:
        self._number += 1
        answer: dict[str, Any] = self._node.call(
            "ask", self._number, (seed, px), sources, **options
        )
        tier = answer.pop("tier")
        wanted = {"load": _tier_of(source), "memory": "cpu", **dict.fromkeys(PLACES[1:], how)}
        if tier != wanted.get(how):
            raise BenchError(f"an image of {px} px ({how}, {source}) came from {tier}")
        return {"source": source, "how": how, "image_px": px, **answer}


def _tier_of(source: str) -> str:
    return source.partition(" ")[0]


def _in_turn(turns: Sequence[Any], number: int) -> Sequence[Any]:
    return turns if number % 2 else turns[::-1]


# -- what the measurements say ------------------------------------------------------------------


@dataclass(frozen=True)
class TierCell:
    """TTFT by where an image is; the ratio is to that of an unknown image of the same round."""

    image_px: int
    image_tokens: int
    how: str
    rounds: int
    ttft: Spread
    ratio: Spread


def tier_cells(samples: Sequence[Sample]) -> list[TierCell]:
    """By size of the image, then in the order of `PLACES`."""
    mine = [sample for sample in samples if sample.part == "tiers"]
    cold = {(s.image_px, s.pair): s.ttft for s in mine if s.how == "cold"}
    groups: dict[tuple[int, int], list[Sample]] = {}
    for sample in mine:
        if (sample.image_px, sample.pair) in cold:
            key = (sample.image_px, PLACES.index(sample.how))
            groups.setdefault(key, []).append(sample)
    return [
        TierCell(
            image_px=px,
            image_tokens=found[0].image_tokens,
            how=PLACES[place],
            rounds=len(found),
            ttft=Spread.of([s.ttft for s in found]),
            ratio=Spread.of([s.ttft / cold[px, s.pair] for s in found]),
        )
        for (px, place), found in sorted(groups.items())
    ]


@dataclass(frozen=True)
class GateCell:
    """Loading against computing the KV of images of one size; seconds are medians.

    Attributes:
        estimated_load, estimated_compute: what the gate took them for; None: it knew nothing.
        read: reading the KV from its tier.
        load, compute: by how much TTFT is longer than with the KV in host memory.
        plain: the same for a request that looks for nothing, not even the encoder's rows.
        ratio: of TTFT with a load to that without, round by round.
        gate_loads: what the gate decided most of the time.
    """

    source: str
    image_px: int
    estimated_load: float | None
    read: float | None
    load: float
    estimated_compute: float | None
    compute: float
    plain: float
    ratio: Spread
    gate_loads: bool

    @property
    def verdict(self) -> str:
        """ "right" or "wrong"; "close" where not even the rounds agree."""
        if self.ratio.low < 1.0 < self.ratio.high:
            return "close"
        return "right" if self.gate_loads == (self.ratio.median < 1.0) else "wrong"

    @property
    def lost(self) -> float:
        """Share of TTFT that the other decision would have saved."""
        median = self.ratio.median
        return max(0.0, 1 - (1 / median if self.gate_loads else median))


def gate_cells(samples: Sequence[Sample]) -> list[GateCell]:
    """By source and size, in the order in which they were measured."""
    groups: dict[tuple[str, int], dict[int, dict[str, Sample]]] = {}
    for sample in samples:
        if sample.part == "gate":
            rounds = groups.setdefault((sample.source, sample.image_px), {})
            rounds.setdefault(sample.pair, {})[sample.how] = sample
    cells = []
    for (source, px), rounds in groups.items():
        pairs = list(rounds.values())
        asked = [pair[how] for pair in pairs for how in ("load", "compute")]
        longer = {
            how: statistics.median(pair[how].ttft - pair["memory"].ttft for pair in pairs)
            for how in ("load", "compute", "plain")
        }
        cells.append(
            GateCell(
                source=source,
                image_px=px,
                estimated_load=_median(s.estimates.get("load") for s in asked),
                read=_median(pair["load"].read_seconds for pair in pairs),
                estimated_compute=_median(s.estimates.get("compute") for s in asked),
                ratio=Spread.of([pair["load"].ttft / pair["compute"].ttft for pair in pairs]),
                gate_loads=2 * sum(bool(s.gate_loads) for s in asked) > len(asked),
                **longer,
            )
        )
    return cells


def _median(numbers: Iterable[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return statistics.median(known) if known else None


# -- what is shown ------------------------------------------------------------------------------


def make_markdown(document: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    samples = [Sample(**entry) for entry in document["samples"]]
    settings, machine = document["settings"], document["machine"]
    commit, changed = document["git"]["commit"] or "unknown", document["git"]["changed"]
    lines = [
        "# Tiers: speed, time to the first token, break-even, decoding",
        "",
        f"- Model: {settings['model']}, {settings['dtype']}; {RATIO:.0%} recomputed",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores",
        f"- Versions: {', '.join(f'{k} {v}' for k, v in document['versions'].items())}; "
        f"commit {commit[:12]}{' with changes' if changed else ''}",
        f"- Started {document['started']}, {results.duration(document)}",
        f"- Command: `{document['command']}`",
        *(f"- {note}" for note in document["notes"]),
    ]
    if samples:
        load = statistics.mean(sample.other_load for sample in samples)
        lines.append(f"- Other programs used {load:.2f} cores during the rounds")
    if document["bandwidth"]:
        lines += _bandwidth_section(document["bandwidth"])
    if document["decoding"]:
        lines += _decoding_section(document["decoding"])
    if cells := tier_cells(samples):
        lines += _tiers_section(cells)
    if gate := gate_cells(samples):
        lines += _gate_section(gate, document["facts"])
    return "\n".join(lines) + "\n"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(heading)} |", "| --- " + "| ---: " * (len(heading) - 1) + "|"]
    return ["", *lines, *(f"| {' | '.join(row)} |" for row in rows)]


def _bandwidth_section(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    sizes = sorted({result["num_bytes"] // result["streams"] for result in measured})
    rows: dict[tuple[str, int], dict[int, str]] = {}
    for result in measured:
        speed = Spread.of([result["num_bytes"] / s / 1e6 for s in result["seconds"]])
        latency = 1e3 * statistics.median(result["seconds"])
        row = rows.setdefault((result["what"], result["streams"]), {})
        size = result["num_bytes"] // result["streams"]
        row[size] = f"{results.with_range(speed, '.0f')}; {latency:.1f} ms"
    return [
        "",
        "## Bandwidth",
        "",
        f"MB/s, median (and range) of {len(measured[0]['seconds'])} runs, and milliseconds; KV of "
        "Qwen2.5-VL-7B in bfloat16, as many segments at a time as it says. A put includes the "
        "checksums: into host memory with the copy, into an adapter until it has all. A get from "
        'an adapter ends in host memory, checked; one from memory copies every layer. "Copy" '
        "copies as many bytes, in as many threads, and does nothing else.",
        *_table(
            ["", "At a time", *(f"{size / 2**20:.0f} MiB" for size in sizes)],
            [
                [what, str(n), *(row.get(size, "") for size in sizes)]
                for (what, n), row in rows.items()
            ],
        ),
    ]


def _decoding_section(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for source in dict.fromkeys(entry["source"] for entry in rounds):
        mine = [entry for entry in rounds if entry["source"] == source]
        pairs = [
            {bool(e["loads_per_second"]): e for e in mine if e["pair"] == pair}
            for pair in sorted({entry["pair"] for entry in mine})
        ]
        ratios = Spread.of(
            [
                statistics.median(p[True]["gaps"]) / statistics.median(p[False]["gaps"])
                for p in pairs
            ]
        )
        for with_loads in (False, True):
            gaps = sorted(1e3 * gap for pair in pairs for gap in pair[with_loads]["gaps"])
            loads = [pair[with_loads] for pair in pairs]
            seconds = sum(sum(entry["gaps"]) for entry in loads)
            rows.append(
                [
                    source,
                    f"{sum(entry['loads'] for entry in loads) / seconds:.1f}",
                    f"{sum(entry['num_bytes'] for entry in loads) / seconds / 1e6:.0f}",
                    *(f"{gaps[int(share * (len(gaps) - 1))]:.1f}" for share in (0.5, 0.99, 1)),
                    results.with_range(ratios, ".2f") if with_loads else "1",
                ]
            )
    heading = ["From", "Loads/s", "MB/s", "Median, ms", "99 %", "Longest", "Median, ratio"]
    return [
        "",
        "## What loads cost requests that decode",
        "",
        f"Time between two tokens of {DECODING} requests, without loads and with up to "
        f"{LOADS_PER_SECOND:g} a second, each of one segment, for nobody; the ratio is taken round "
        "by round.",
        *_table(heading, rows),
    ]


def _tiers_section(cells: Sequence[TierCell]) -> list[str]:
    rows = []
    for c in cells:
        spreads = (results.with_range(spread, ".3f") for spread in (c.ttft, c.ratio))
        rows.append([f"{c.image_px} px", str(c.image_tokens), c.how, str(c.rounds), *spreads])
    return [
        "",
        "## Time to the first token, by where the image is",
        "",
        "Seconds, and the ratio to an image that no tier knows, round by round: median and range. "
        '"cpu" and "device" are memory of the node itself.',
        *_table(["Image", "Image tokens", "From", "Rounds", "TTFT", "TTFT / cold"], rows),
    ]


def _gate_section(cells: Sequence[GateCell], facts: Mapping[str, float]) -> list[str]:
    rows = []
    for c in cells:
        seconds = (c.estimated_load, c.read, c.load, c.estimated_compute, c.compute, c.plain)
        verdict = f"**wrong**, {c.lost:.0%} lost" if c.verdict == "wrong" else c.verdict
        decision = "load" if c.gate_loads else "compute"
        rows.append(
            [
                *(c.source, f"{c.image_px} px"),
                *("-" if number is None else f"{number:.3f}" for number in seconds),
                *(results.with_range(c.ratio, ".2f"), decision, verdict),
            ]
        )
    heading = ["From", "Image", "Load, estimated", "Read", "Load", "Compute, estimated", "Compute"]
    heading += ["Nothing loaded", "TTFT load / compute", "Gate", "Which is"]
    verdicts = [cell.verdict for cell in cells]
    return [
        "",
        "## Break-even: what the gate decides, and what is so",
        "",
        "Seconds, medians. Load and compute are what TTFT gets longer by, against KV in host "
        'memory, when the KV is loaded or computed; "read" is the part of a load that the gate '
        'estimates. The encoder\'s rows are loaded in both; "nothing loaded" does without them, '
        f"too. Node A computed {facts['tokens_per_second']:.0f} tokens per second, of "
        f"{facts['bytes_per_token']:.0f} bytes of KV each. Decisions: "
        + ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)
        + " (rounds differ in which is faster). Lost is the share of TTFT that the other decision "
        "would have saved.",
        *_table(heading, rows),
    ]


VERDICTS = {"right": "tab:green", "close": "grey", "wrong": "tab:red"}
"""Colours in the plot."""


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw TTFT by tier, and loading against computing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    samples = [Sample(**entry) for entry in document["samples"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    tiers = tier_cells(samples)
    sizes = sorted({cell.image_px for cell in tiers})
    places = [place for place in PLACES if any(cell.how == place for cell in tiers)]
    for index, px in enumerate(sizes):
        cells = [cell for cell in tiers if cell.image_px == px]
        offset, width = (index - (len(sizes) - 1) / 2) * 0.8 / len(sizes), 0.75 / len(sizes)
        x = [places.index(cell.how) + offset for cell in cells]
        medians = [cell.ratio.median for cell in cells]
        colour = plt.get_cmap("viridis")(0.3 + 0.4 * index / max(1, len(sizes) - 1))
        label = f"{px} px, {cells[0].image_tokens} tokens"
        left.bar(x, medians, width, color=colour, label=label)
        left.vlines(x, [c.ratio.low for c in cells], [c.ratio.high for c in cells], color="black")
        for place, cell in zip(x, cells, strict=True):
            left.text(place, cell.ratio.high + 0.01, f"{cell.ratio.median:.2f}", ha="center")
    names = {"cold": "computed", "cpu": "host\nmemory", "device": "device\nmemory"}
    left.set_xticks(range(len(places)), [names.get(place, place) for place in places])
    left.set_ylabel("time to the first token, relative to computing all")
    left.set_title("By where a known image is", fontsize=11)

    gate = gate_cells(samples)
    sources = list(dict.fromkeys(cell.source for cell in gate))
    for index, px in enumerate(sorted({cell.image_px for cell in gate})):
        mine = [cell for cell in gate if cell.image_px == px]
        x = [sources.index(cell.source) for cell in mine]
        line = {"color": "black", "alpha": 0.5, "lw": 1, "ls": [":", "-.", "--", "-"][index % 4]}
        right.plot(x, [cell.ratio.median for cell in mine], label=f"{px} px", **line)
        for place, other in zip(x, mine, strict=True):
            marker = "o" if other.gate_loads else "X"
            style = {"marker": marker, "color": VERDICTS[other.verdict], "markersize": 8}
            right.plot(place, other.ratio.median, **style)
    right.axhline(1.0, color="black", linewidth=1)
    for marker, label in (("o", "gate loads"), ("X", "gate computes")):
        right.plot([], [], marker, color="black", label=label)
    for verdict, shade in VERDICTS.items():
        right.plot([], [], "s", color=shade, label=verdict)
    right.set_yscale("log")
    right.set_xticks(range(len(sources)), [source.replace(" at ", "\n") for source in sources])
    right.set_ylabel("time to the first token, KV loaded / KV computed")
    right.set_title("What the gate decides", fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9)
    machine, settings = document["machine"], document["settings"]
    about = (settings["model"], settings["dtype"], f"{machine['cores']} cores of {machine['cpu']}")
    figure.suptitle(", ".join(about), fontsize=11)
    with results.replacing(path) as work:
        figure.savefig(work, dpi=150, format="png")
    plt.close(figure)


def report(console: Console, document: dict[str, Any], output: Path) -> None:
    """Write page and plot, and print the page."""
    page = make_markdown(document)
    write_text(with_suffix(output, ".md"), page)
    if document["samples"]:
        plot(document, with_suffix(output, ".png"))
    console.print(page, markup=False, soft_wrap=True)


# -- the command --------------------------------------------------------------------------------


def run(console: Console, args: argparse.Namespace) -> None:
    """Measure and report."""
    model, model_name = model_of(args)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        **results.about_run(__file__, args.argv),
        "settings": {"model": model_name, "dtype": args.dtype, "connector": NODE},
        "notes": [],
        "bandwidth": [],
        "decoding": [],
        "samples": [],
    }

    def save() -> None:
        write_text(with_suffix(args.output, ".json"), json.dumps(document, indent=1) + "\n")

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.cache_dir)))
        servers = Servers.start(stack, args.adapters, folder)
        document["notes"] = [f"{name} was left out: {why}" for name, why in servers.missing.items()]
        adapters = [name for name in args.adapters if name not in servers.missing]
        show = stack.enter_context(console.status("")).update
        for name in [None, *adapters] if "bandwidth" in args.parts else ():
            show(f"bandwidth: {name or 'memory'}")
            spec = servers.spec(name, folder / "bandwidth") if name else None
            with ProcessPoolExecutor(1, _context()) as pool:
                job = pool.submit(measure_bandwidth, spec, args.segments, args.runs)
                document["bandwidth"] += job.result()
            save()
        if set(args.parts) - {"bandwidth"}:
            measure_nodes(document, args, model, folder, servers, adapters, show, save)
    document |= {"complete": True, "finished": results.timestamp()}
    save()
    report(console, document, args.output)


def measure_nodes(
    document: dict[str, Any],
    args: argparse.Namespace,
    model: Path,
    folder: Path,
    servers: Servers,
    sources: Sequence[str],
    show: Callable[[str], None],
    save: Callable[[], None],
) -> None:
    """The parts "tiers", "gate" and "decoding"."""
    # The slowest one last: what host memory has of it is asked for next.
    sources = sorted(sources, key=ADAPTER_TYPES.index)
    connector = NODE | {"l2_adapters": [servers.spec(name, folder) for name in sources]}
    rounds = {"tiers": args.rounds, "gate": args.gate_rounds, "decoding": args.gate_rounds}
    rounds = {part: count if part in args.parts else 0 for part, count in rounds.items()}
    sizes = {"tiers": args.sizes, "gate": args.gate_sizes, "decoding": args.sizes[-1:]}
    stored = sorted({px for part, count in rounds.items() if count for px in sizes[part]})
    longest = -(-max(4096, (stored[-1] // CELL_PX) ** 2 + TEXT_TOKENS) // 1024) * 1024
    arguments = {"dtype": args.dtype, "max_model_len": longest, "max_num_batched_tokens": longest}
    groups = [os.getpgrp()]
    if servers.redis:
        groups.append(servers.redis.client.info()["process_id"])

    def keep(samples: list[Sample]) -> None:
        document["samples"] += [asdict(sample) for sample in samples]
        save()

    def measure_gate(bench: Bench, source: str) -> None:
        bench.teach(source, args.gate_sizes)
        for number in range(rounds["gate"]):
            for px in args.gate_sizes:
                show(f"gate: {source}, {px} px, round {number + 1} of {args.gate_rounds}")
                bench.round(functools.partial(bench.gate, source, px), number)

    with Node(str(model), connector, **arguments) as node:
        for px in stored:
            for number in range(max(rounds.values()) + 1):
                show(f"node A: image {number} of {px} px")
                seed = KNOWN_SEED + number - 1 if number else WARM_UP_SEED
                node.call("ask", 10_000 * px + number, (seed, px), sources)
        facts = document["facts"] = node.call("facts")
    show("node B starts")
    with Node(str(model), connector, **arguments) as node:
        bench = Bench(node, sources, keep, groups, args.max_other_load)
        bench.warm_up(stored)
        for number in range(rounds["tiers"]):
            for px in args.sizes:
                show(f"tiers: {px} px, round {number + 1} of {args.rounds}")
                bench.round(functools.partial(bench.tiers, px), number)
        for source in sources if rounds["gate"] else ():
            measure_gate(bench, source)
        for source in sources if rounds["decoding"] else ():
            for number in range(rounds["decoding"]):
                show(f"decoding: {source}, round {number + 1} of {args.gate_rounds}")
                for rate in _in_turn([0.0, LOADS_PER_SECOND], number):
                    node.call("forget")
                    found = node.call("decode", source, args.decoding_steps, rate)
                    about = {"source": source, "pair": number, "loads_per_second": rate}
                    document["decoding"].append(about | found)
                save()
    if not rounds["gate"] or "valkey" not in sources:
        return
    even = facts["tokens_per_second"] * facts["bytes_per_token"]
    assert servers.redis is not None
    with Link(servers.redis.port, math.inf) as link:
        show("node C starts")
        connector = NODE | {"l2_adapters": [servers.spec("valkey", folder, link.port)]}
        with Node(str(model), connector, **arguments) as node:
            bench = Bench(node, ["valkey"], keep, groups, args.max_other_load)
            bench.warm_up(args.gate_sizes)
            for share in sorted(args.link_speeds, reverse=True):
                link.bytes_per_second = share * even
                measure_gate(bench, f"valkey at {share * even / 1e6:.1f} MB/s")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    console = Console(highlight=False)
    try:
        if args.plot_only:
            path = with_suffix(args.output, ".json")
            report(console, results.read_document(path, SCHEMA, __file__), args.output)
        else:
            signal.signal(signal.SIGTERM, results.end_by_signal)
            run(console, args)
    except KeyboardInterrupt:
        print("interrupted; --plot-only draws what was measured", file=sys.stderr)
        return 130
    except (BenchError, MooncakeError, RedisError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_output_options(parser, ROOT / "configs" / "results" / "tiers_cpu")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (all)")
    many: dict[str, Any] = {"type": int, "nargs": "+"}
    add("--segments", **many, default=[1, 8, 64, 256], metavar="MIB", help="for the bandwidth")
    add("--runs", type=int, default=7, help="of each transfer (%(default)s)")
    add("--sizes", **many, default=[448, 1120], metavar="PX", help="images for the tiers")
    add("--rounds", type=int, default=7, help="of the tiers (%(default)s)")
    add("--gate-sizes", **many, default=[224, 448, 672, 1120], metavar="PX", help="for the gate")
    add("--gate-rounds", type=int, default=3, help="of the gate (%(default)s)")
    many |= {"type": float, "metavar": "SHARE", "default": [0.25, 0.5, 1.0, 2.0, 4.0]}
    add("--link-speeds", **many, help="of links to Redis, as shares of the break-even speed")
    load: dict[str, Any] = {"type": float, "default": math.inf, "metavar": "CORES"}
    add("--max-other-load", **load, help="measure rounds again in which others used more")
    add("--decoding-steps", type=int, default=300, metavar="N", help="of a round (%(default)s)")
    add("--adapters", nargs="+", choices=ADAPTER_TYPES, default=list(ADAPTER_TYPES), help="(all)")
    add_model_options(parser)
    args = parser.parse_args(argv)
    args.argv = list(argv)
    largest = math.isqrt(MAX_PIXELS)
    for px in (*args.sizes, *args.gate_sizes):
        if px % CELL_PX or not 4 * CELL_PX <= px <= largest:
            parser.error(f"{px} px: must be a multiple of {CELL_PX}, {4 * CELL_PX} to {largest}")
    if min(args.runs, args.rounds, args.gate_rounds, *args.segments, *args.link_speeds) <= 0:
        parser.error("runs, rounds, segments and link speeds must be above 0")
    for problem in model_problems(args):
        parser.error(problem)
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Measure the tiers that segments are kept in: their speed, what a request gains, and the gate.

- "bandwidth": segments of several sizes are put into each tier and got back, through the classes
  that the connector uses.
- "tiers": node A, an engine that ends then, has filled a disk directory and a Redis. Node B, a
  fresh engine, is asked about these images: TTFT by the tier that an image comes from, against
  images that nobody knows. Between two requests node B forgets all it has in memory.
- "gate": before a segment is loaded, the connector weighs loading against computing. Here both
  are done, and compared with what it decided: from disk, from Redis, and from Redis behind links
  of several speeds around the one at which loading takes as long as computing.

What counts are ratios within a round, whose requests are made one after the other, in an order
that turns around from round to round. Engines run one at a time, each in a process of its own.
Files are dropped from the page cache before they are read, unless said otherwise. On a CPU, device
memory is host memory, too. Fetches have all the time they take.

Redis is started here, on 127.0.0.1; without a redis-server it is left out.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import results
from bench_ttft import BEHIND, IN_FRONT, TEXT_TOKENS
from local_redis import LocalRedis, RedisError, find_server
from options import add_model_options, add_output_options, model_of, model_problems
from results import Spread, with_suffix, write_text
from rich.console import Console
from serving import CELL_PX, ROOT, SERVER_ENV, make_image
from tiny_architectures import MAX_PIXELS

from vlcache_connector.storage.header import SegmentId

SCHEMA = 1
PARTS = ("bandwidth", "tiers", "gate")
PLACES = ("cold", "redis", "disk", "cpu", "device")
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
LAYERS, KV_HEADS, HEAD_DIM = 28, 4, 128
"""Of the segments of "bandwidth": Qwen2.5-VL-7B. In bfloat16, a token has 57,344 bytes."""


class BenchError(RuntimeError):
    """What was measured is not what it should be."""


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        part: "tiers" or "gate".
        source: tier, or link to Redis, that the image may come from.
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
        bytes_per_second: of all answers together.
    """

    daemon_threads = True

    def __init__(self, port: int, bytes_per_second: float) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.leads_to = ("127.0.0.1", port)
        self.url = f"redis://127.0.0.1:{self.server_address[1]}"
        self._bytes_per_second = bytes_per_second
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
            self._free_at = max(now, self._free_at) + num_bytes / self._bytes_per_second
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


# -- bandwidth ----------------------------------------------------------------------------------


def drop_from_page_cache(folder: Path) -> None:
    """The next reader of the folder's files has to get them from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_bandwidth(
    folder: Path, redis_url: str | None, mebibytes: Sequence[int], runs: int
) -> list[dict[str, Any]]:
    """Put segments into every tier and get them back: one entry per operation and size."""
    import torch

    from vlcache_connector.store import LMCacheSegmentStore
    from vlcache_connector.streams import Leaving
    from vlcache_connector.tiers import CircuitBreaker, DiskTier, GuardedTier, RedisTier
    from vlcache_connector.worker.device import DeviceSegments

    store = LMCacheSegmentStore(
        model_name="bench",
        fingerprint="bench",
        rank=0,
        world_size=1,
        budget_bytes=3 * (max(mebibytes) + 16) << 20,
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        kv_dtype=torch.bfloat16,
        verify=False,
    )
    cpu = torch.device("cpu")
    device = DeviceSegments(2 * (max(mebibytes) + 16) << 20, cpu, None, Leaving(None, cpu))
    plain: list[Any] = [DiskTier(folder, "bench", 100 << 30, None)]
    plain += [] if redis_url is None else [RedisTier(redis_url, "bench", None)]
    tiers = [GuardedTier(t, CircuitBreaker(t.name, slow_seconds=PATIENCE)) for t in plain]
    measured = []
    for size in mebibytes:
        tokens = max(1, (size << 20) // (LAYERS * 2 * KV_HEADS * HEAD_DIM * 2))
        num_bytes, steps = _steps(store, device, tiers, folder, tokens)
        seconds: dict[str, list[float]] = {}
        for _ in range(runs + 1):
            for name, step in steps:
                start = time.perf_counter()
                if not step():
                    raise BenchError(f"{name}: {size} MiB failed")
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        # The first run finds memory that was never touched; steps without a name are no results.
        measured += [
            {"what": name, "num_bytes": num_bytes, "seconds": times[1:]}
            for name, times in seconds.items()
            if name
        ]
    for tier in tiers:
        tier.close()
    store.close()
    return measured


def _steps(
    store: Any, device: Any, tiers: Sequence[Any], folder: Path, tokens: int
) -> tuple[int, list[tuple[str, Callable[[], Any]]]]:
    """What is done with a segment, in this order; every step returns something true."""
    import torch

    from vlcache_connector.tiers import Deadline, Name

    name = Name("kv", f"segment of {tokens}", 0, 1)
    shape = (LAYERS, 2, tokens, KV_HEADS, HEAD_DIM)
    kv = torch.randint(0, 2**14, shape, dtype=torch.int16).view(torch.bfloat16)
    target, positions = torch.empty_like(kv), torch.arange(tokens).expand(3, -1)

    def put() -> Any:
        writer = store.open_kv(name.key, positions)
        assert writer is not None
        for layer, both in enumerate(kv):
            writer.layer(layer).copy_(both)
        return writer.finish()

    def copy_out(segment: Any) -> bool:
        with segment:
            for layer in range(LAYERS):  # as a load does
                target[layer, 0], target[layer, 1] = segment.layer(layer)
        return True

    def forget() -> bool:
        store.remove(SegmentId(name.key, "kv"))
        device.remove(name.key)
        drop_from_page_cache(folder)
        return True

    def check() -> bool:
        store.check_encoded(SegmentId(name.key, "kv"), objects, tokens)
        return True

    put()
    encoded = store.get_encoded(SegmentId(name.key, "kv"))
    objects = [memoryview(bytearray(part)) for part in encoded.objects]
    encoded.release()
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("", forget),
        ("host: put", put),
        ("host: get", lambda: copy_out(store.get(SegmentId(name.key, "kv")))),
        ("device: put", lambda: device.promote(store.get(SegmentId(name.key, "kv")), LAYERS)),
        ("device: get", lambda: copy_out(device.get(name.key))),
    ]
    for tier in tiers:

        def write(tier: Any = tier) -> Any:
            return tier.write(name, objects, Deadline(PATIENCE))

        def read(tier: Any = tier) -> Any:
            return tier.read(name, 1 << 40, Deadline(PATIENCE))

        steps.append((f"{tier.name}: put", write))
        if tier.name == "disk":
            steps += [("disk: get, from the page cache", read), ("", forget)]
        steps.append((f"{tier.name}: get", read))
    # What a worker does with a segment that came from below.
    steps += [("host: check", check)]
    steps += [("host: admit", lambda: store.put_encoded(SegmentId(name.key, "kv"), objects))]
    return sum(map(len, objects)), steps


# -- nodes --------------------------------------------------------------------------------------


class Engine:
    """vLLM with VLCache, in this process; it reaches into the connector to see what is measured.

    Args:
        connector: its options.
        links: name -> URL of more ways to the Redis.
        arguments: of `vllm.LLM`.
    """

    def __init__(
        self, model: str, connector: Mapping[str, Any], links: Mapping[str, str], **arguments: Any
    ) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from vlcache_connector.config import VLCacheConfig
        from vlcache_connector.measure.runner import Runner
        from vlcache_connector.scheduler.break_even import BreakEven
        from vlcache_connector.tiers import open_tiers

        arguments |= {"enforce_eager": True, "enable_prefix_caching": True, "seed": 0}
        arguments |= {"skip_mm_profiling": True, "limit_mm_per_prompt": {"image": 1, "video": 0}}
        self._runner = Runner(model, connector, max_num_seqs=4, **arguments)
        group: Any = get_kv_transfer_group()
        self._shape, self._storage = group._worker._shape, group._worker._storage
        self._device, self._transfers = self._storage._device, self._storage._transfers
        self._configured = self._transfers._tiers
        self._tiers = {tier.name: tier for tier in self._configured}
        for name, url in links.items():
            config = VLCacheConfig(redis_url=url, fetch_deadline_seconds=PATIENCE)
            [self._tiers[name]] = open_tiers(config, "bench", "bench")
        for tier in self._tiers.values():
            tier.read = self._timed(tier.read)
        # Loads alone are weighed: what has been loaded is reused.
        scheduler: Any = self._runner._llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.connector._scheduler._break_even = BreakEven(is_on=False)
        self._decide = self._transfers._is_worth
        self._transfers._is_worth = self._judge
        self._force: bool | None = None
        self._seen: dict[str, Any] = {}

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

        if "disk" in sources:
            drop_from_page_cache(self._tiers["disk"]._tier._root)
        self._runner._llm.reset_mm_cache()  # every request has to have its image decoded
        self._transfers._tiers = [self._tiers[source] for source in sources]
        self._storage._device = self._device if on_device else None
        self._force, self._seen = force, {}
        text = f"Request {number:06}. {IN_FRONT}{IMAGE}{BEHIND}"
        options = FULL_RECOMPUTE if plain else {}
        outcome = self._runner.run_alone(Request(text, (make_image(*image),), options=options))
        if not self._transfers.flush(PATIENCE):
            raise BenchError("what was stored was not written in time")
        tier = outcome.figures.get("tier") if outcome.figures.get("reused_tokens") else None
        about = {"ttft": outcome.seconds, "image_tokens": outcome.image_tokens, "tier": tier}
        return about | self._seen

    def forget(self) -> None:
        """Empty all memory, as that of a fresh engine."""
        engine = self._runner._llm.llm_engine
        if not engine.reset_prefix_cache(reset_connector=True):
            raise BenchError("the prefix cache could not be reset")
        engine.reset_encoder_cache()
        for key in list(self._device._segments):
            self._device.remove(key)

    def facts(self) -> dict[str, float]:
        """How fast it computes, and how large KV is."""
        speed = self._transfers._pace.tokens_per_second
        return {"tokens_per_second": speed, "bytes_per_token": self._shape.bytes_per_token}

    def close(self) -> None:
        """End it."""
        self._transfers._tiers = self._configured
        self._runner.close()

    def _timed(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def timed(name: Any, *args: Any) -> Any:
            start = time.perf_counter()
            objects = read(name, *args)
            if name.kind == "kv":
                self._seen["read_seconds"] = time.perf_counter() - start
            return objects

        return timed

    def _judge(self, tier: Any, num_bytes: int, saved_tokens: int) -> bool:
        decision: bool = self._decide(tier, num_bytes, saved_tokens)
        if not saved_tokens:
            return decision
        self._transfers._skipped = 0  # no load is made only to see whether speeds have changed
        speed = self._transfers._pace.tokens_per_second
        load = tier.estimate_read_seconds(num_bytes)
        estimates = {"load": load, "compute": speed and saved_tokens / speed}
        self._seen["estimates"] = {k: v for k, v in estimates.items() if v is not None}
        self._seen["gate_loads"] = decision
        return decision if self._force is None else self._force


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
        for px in sizes:
            self._node.call("forget")
            self._ask(source, "load", px, WARM_UP_SEED, [source], force=True)

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
        known, answers = KNOWN_SEED + number, []
        for turn in _in_turn(["plain", "compute", "load"], number):
            self._node.call("forget")
            if turn == "plain":
                answers.append(self._ask(source, turn, px, known, [source], plain=True))
                continue
            answers.append(self._ask(source, turn, px, known, [source], force=turn == "load"))
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
        wanted = {"load": source.split(" ")[0], "memory": "cpu", **dict.fromkeys(PLACES[1:], how)}
        if tier != wanted.get(how):
            raise BenchError(f"an image of {px} px ({how}, {source}) came from {tier}")
        return {"source": source, "how": how, "image_px": px, **answer}


def _in_turn(turns: Sequence[str], number: int) -> Sequence[str]:
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
        "# Tiers: speed, time to the first token, break-even",
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
    if cells := tier_cells(samples):
        lines += _tiers_section(cells)
    if gate := gate_cells(samples):
        lines += _gate_section(gate, document["facts"])
    return "\n".join(lines) + "\n"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(heading)} |", "| --- " + "| ---: " * (len(heading) - 1) + "|"]
    return ["", *lines, *(f"| {' | '.join(row)} |" for row in rows)]


def _bandwidth_section(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    rows: dict[str, list[str]] = {}
    for result in sorted(measured, key=lambda result: (result["what"], result["num_bytes"])):
        speed = Spread.of([result["num_bytes"] / s / 1e6 for s in result["seconds"]])
        latency = 1e3 * statistics.median(result["seconds"])
        entry = f"{results.with_range(speed, '.0f')}; {latency:.1f} ms"
        rows.setdefault(result["what"], []).append(entry)
    sizes = sorted({result["num_bytes"] for result in measured})
    return [
        "",
        "## Bandwidth",
        "",
        f"MB/s, median (and range) of {len(measured[0]['seconds'])} runs, and milliseconds; KV of "
        "Qwen2.5-VL-7B in bfloat16. A put into host memory includes the checksum, a get a copy of "
        'every layer. "Check" (the checksum, in a thread of its own) and "admit" (a copy, in the '
        "engine's step) follow each get from disk or Redis.",
        *_table(
            ["", *(f"{size / 2**20:.0f} MiB" for size in sizes)],
            [[name, *entries] for name, entries in rows.items()],
        ),
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
    with_redis = not args.no_redis and find_server() is not None
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        **results.about_run(__file__, args.argv),
        "settings": {"model": model_name, "dtype": args.dtype, "connector": NODE},
        "notes": [] if with_redis else ["Redis was left out: no redis-server, or --no-redis"],
        "bandwidth": [],
        "samples": [],
    }

    def save() -> None:
        write_text(with_suffix(args.output, ".json"), json.dumps(document, indent=1) + "\n")

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.cache_dir)))
        redis = stack.enter_context(LocalRedis(folder)) if with_redis else None
        show = stack.enter_context(console.status("")).update
        if "bandwidth" in args.parts:
            show("bandwidth")
            with ProcessPoolExecutor(1, _context()) as pool:
                url = redis.url if redis else None
                arguments = (folder / "bandwidth", url, args.segments, args.runs)
                document["bandwidth"] = pool.submit(measure_bandwidth, *arguments).result()
            save()
        if {"tiers", "gate"} & set(args.parts):
            measure_nodes(document, args, model, folder, redis, show, save)
    document |= {"complete": True, "finished": results.timestamp()}
    save()
    report(console, document, args.output)


def measure_nodes(
    document: dict[str, Any],
    args: argparse.Namespace,
    model: Path,
    folder: Path,
    redis: LocalRedis | None,
    show: Callable[[str], None],
    save: Callable[[], None],
) -> None:
    """The parts "tiers" and "gate"."""
    connector: dict[str, Any] = NODE | {"disk_path": str(folder / "segments")}
    connector |= {"redis_url": redis.url} if redis else {}
    sources = ["disk", "redis"] if redis else ["disk"]
    rounds = {"tiers": args.rounds, "gate": args.gate_rounds}
    sizes = {"tiers": args.sizes, "gate": args.gate_sizes}
    rounds = {part: count if part in args.parts else 0 for part, count in rounds.items()}
    stored = sorted({px for part, count in rounds.items() if count for px in sizes[part]})
    longest = -(-max(4096, (stored[-1] // CELL_PX) ** 2 + TEXT_TOKENS) // 1024) * 1024
    arguments = {"dtype": args.dtype, "max_model_len": longest, "max_num_batched_tokens": longest}
    with Node(str(model), connector, {}, **arguments) as node:
        for px in stored:
            for number in range(max(rounds.values()) + 1):
                show(f"node A: image {number} of {px} px")
                seed = KNOWN_SEED + number - 1 if number else WARM_UP_SEED
                node.call("ask", 10_000 * px + number, (seed, px), sources)
        facts = document["facts"] = node.call("facts")
    even = facts["tokens_per_second"] * facts["bytes_per_token"]
    with contextlib.ExitStack() as stack:
        links = {}
        if redis and rounds["gate"]:
            for share in sorted(args.link_speeds, reverse=True):
                link = stack.enter_context(Link(redis.port, share * even))
                links[f"redis at {share * even / 1e6:.1f} MB/s"] = link.url
        show("node B starts")
        node = stack.enter_context(Node(str(model), connector, links, **arguments))

        def keep(samples: list[Sample]) -> None:
            document["samples"] += [asdict(sample) for sample in samples]
            save()

        groups = [os.getpgrp(), *([redis.client.info()["process_id"]] if redis else [])]
        bench = Bench(node, sources, keep, groups, args.max_other_load)
        bench.warm_up(stored)
        for number in range(rounds["tiers"]):
            for px in args.sizes:
                show(f"tiers: {px} px, round {number + 1} of {args.rounds}")
                bench.round(functools.partial(bench.tiers, px), number)
        for source in [*sources, *links] if rounds["gate"] else ():
            bench.teach(source, args.gate_sizes)
            for number in range(rounds["gate"]):
                for px in args.gate_sizes:
                    show(f"gate: {source}, {px} px, round {number + 1} of {args.gate_rounds}")
                    bench.round(functools.partial(bench.gate, source, px), number)


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
    except (BenchError, RedisError, OSError, ValueError) as error:
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
    add("--no-redis", action="store_true", help="leave Redis out")
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

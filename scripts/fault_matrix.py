#!/usr/bin/env python
"""Strike what is below host memory, under load, and see that it costs only time.

A real vLLM with VLCache serves a mixed load: text, new images, known images at new places, several
images, clients that go away. All known images lie in a store below host memory only:

- "redis", "valkey": the adapter `valkey` before a redis-server or a valkey-server. A proxy between
  them lets the fault strike one kind of command: at "lookup" (EXISTS), "load" (GET), or "store"
  (SET).
- "mooncake": the adapter `mooncake`. The fault strikes the master, or the node whose memory holds
  everything.

The faults: "killed" and "stopped" (the server, at the first such command), "latency" (2 s for each
round trip), "dropped" (every second round trip loses its connection), "flipped" (one bit of each
value; the answer of a lookup), "version" (a valid object of another format version in place of what
is read or written), "auth" (refused), and "memory" (the server has none left and evicts, or refuses
to write).

A tenth into the load, the fault sets in. Behind the load, memory is emptied, and some of its new
images are asked for again, while the fault lasts. Then the fault is lifted. What is checked:

- no request crashes the engine, fails or hangs;
- every answer is that of plain vLLM, or that of the reuse of the images that its figures name,
  within 1e-3 of each token's logprobs; both come from an engine that has no tiers;
- of the requests for known images in the second half of the load and behind it, when the guard has
  seen enough, the median waits no more than 5 % of `fetch_deadline_seconds` longer than without a
  fault;
- the guard has opened where all reads fail;
- at the 95th percentile, the time to the first token is above that of the load without a fault by
  no more than `fetch_deadline_seconds`, and a little;
- segments are loaded from there again, and nothing leaks.

Cells that were measured are kept in .cache/fault_matrix; the same command continues there after an
interruption. Results go to PREFIX.json and PREFIX.md; the exit code is 1 when a cell fails. Stores
that are not installed are named as not run.

Usage::

    python scripts/fault_matrix.py --stores valkey --faults stopped latency --at lookup
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import stress
import torch
from local_mooncake import Master, MooncakeError, MooncakeNode, find_master
from local_redis import LocalRedis, RedisError, find_server, find_valkey
from make_tiny_model import make_tiny_model
from redis_proxy import OPERATIONS, Command, Cut, Forward, RedisProxy, pack_value, value_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from stress import IMAGE, Ask, EngineCrashedError, EngineHungError, EngineProcess, Result

from vlcache_connector.config import ADAPTER_TYPES
from vlcache_connector.storage import codec

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 2
FAULTS = ("killed", "stopped", "latency", "dropped", "flipped", "version", "auth", "memory")
PARTS = ("master", "node")
"""Of Mooncake's store."""
STORES = ("redis", "valkey", "mooncake")
NO_FAULT = "none"
READS_FAIL = (
    *((fault, at) for fault in ("latency", "auth") for at in ("lookup", "load")),
    *((fault, at) for fault in ("killed", "stopped") for at in (*OPERATIONS, *PARTS)),
    *((fault, "load") for fault in ("flipped", "version")),
)
"""Cells in which all reads do."""
DEADLINE_SECONDS = 2.0
"""Of which a lookup has a small share, which it must not miss on a busy machine without a fault."""
SLACK_SECONDS = 0.25
"""Beyond the deadline: what was not fetched is computed, in a step with others."""
MOST_WAIT = 0.05
"""Of the deadline: what the median request may wait once the guard has seen enough."""
ALL_OF_IT = 0.9
"""Of the deadline: who waits longer has waited in vain."""
LATENCY_SECONDS = 2.0
RECOVERY_SECONDS = 90.0
"""A guard leaves a tier alone for 72 s at most."""
IN_FLIGHT = 6
ARMED_AFTER = 0.1
AGAIN_SHARE = 0.1
"""Of the load's requests: those for images that are new in it."""
CONNECTOR: Mapping[str, Any] = {
    **stress.AMPLE,
    "fetch_deadline_seconds": DEADLINE_SECONDS,
    # Every load is made: the tiny model computes faster than any Redis answers.
    "break_even": False,
}


class MatrixError(RuntimeError):
    """What is measured is not what it should be, even without a fault."""


# -- the load -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What is asked in each cell.

    Attributes:
        donors: make images known, before.
        asks: under load. No image occurs twice, so that all reuse is of these donors.
        again: after it, with memory emptied: images that were new in `asks`, at other places.
        probe: asked alone until its image comes from Redis again.
    """

    donors: tuple[Ask, ...]
    asks: tuple[Ask, ...]
    again: tuple[Ask, ...]
    probe: Ask


def make_load(num_requests: int) -> Load:
    """The same load for the same number of requests."""
    seeds = iter(range(1, 10**9))

    def image(turn: int) -> tuple[int, int]:
        return next(seeds), stress.SIDES_PX[turn % len(stress.SIDES_PX)]

    def donor(*images: tuple[int, int]) -> Ask:
        places = " then ".join([IMAGE] * len(images))
        text = f"donor {next(seeds)} shows {places} to somebody"
        return Ask(text, images, max_tokens=1, with_logprobs=False)

    donors: list[Ask] = []
    asks: list[Ask] = []
    again: list[Ask] = []
    for number in range(num_requests):
        a, b, new = image(number), image(number + 1), image(number + 2)
        alone, other = donor(a), donor(b)
        behind = donor(image(number + 3), a)  # the image has another one in front of it
        start = f"request {number}"
        ask = (
            Ask(f"{start} is text " + "and nothing but text " * (1 + number % 9)),
            Ask(f"{start} has a new {IMAGE} image", (new,)),
            Ask(f"{start} moves a known {IMAGE} image", (a,), (alone,)),
            Ask(f"{start} has two known ones {IMAGE} and {IMAGE}", (b, a), (alone, other)),
            Ask(f"{start} has {IMAGE} before a new {IMAGE}", (a, new), (alone,)),
            Ask(f"{start} has a new {IMAGE} before {IMAGE}", (new, a), (behind,)),
            Ask(f"{start} has {IMAGE}, {IMAGE} and {IMAGE}", (a, new, b), (alone, other)),
            Ask(f"{start} knows {IMAGE} from the second place", (a,), (behind,)),
            Ask(f"{start} goes away {IMAGE}", (a,), (alone,), abort_after=number // 10 % 5),
            Ask(f"{start} goes {IMAGE} {IMAGE}", (a, new), (alone,), abort_after=number // 10 % 7),
        )[number % 10]
        asks.append(ask)
        donors += ask.donors
        if number % 10 == 1 and len(again) < max(1, AGAIN_SHARE * num_requests):
            text = f"again {number}: {IMAGE} stood elsewhere"
            again.append(Ask(text, ask.images, (replace(ask, with_logprobs=False),)))
    a = image(2)
    probe = Ask(f"is this {IMAGE} there", (a,), (donor(a),))
    return Load((*donors, *probe.donors), tuple(asks), tuple(again), probe)


# -- faults -------------------------------------------------------------------------------------


class Strike:
    """A fault at one operation: what `RedisProxy.fault` takes.

    Attributes:
        count: commands that it struck.
    """

    def __init__(self, name: str, operation: str, redis: LocalRedis) -> None:
        self.count = 0
        self._name = name
        self._operation = operation
        self._redis = redis
        self._rng = np.random.default_rng(0)
        self._lock = threading.Lock()

    def __call__(self, command: Command, forward: Forward) -> bytes:
        if command.operation != self._operation:
            return forward(command.arguments)
        with self._lock:
            self.count += 1
            if self.count == 1:
                self._strike_server()
        if self._name == "latency":
            time.sleep(max(0.0, command.received + LATENCY_SECONDS - time.monotonic()))
        if self._name == "auth":
            return forward([b"AUTH", b"nobody", b"wrong"])
        if self._name in ("flipped", "version"):
            return self._altered(command, forward)
        reply = forward(command.arguments)
        # The commands of a round trip came at one time. Not always the first one is cut.
        if self._name == "dropped" and int(command.received * 1e6) % 2 and self._draw(2):
            raise Cut(reply[: len(reply) // 2])
        return reply

    def _draw(self, below: int) -> int:
        with self._lock:
            return int(self._rng.integers(below))

    def _strike_server(self) -> None:
        if self._name == "killed":
            self._redis.kill()
        elif self._name == "stopped":
            self._redis.pause()
        elif self._name == "memory":
            policy = "noeviction" if self._operation == "store" else "allkeys-random"
            self._redis.client.config_set("maxmemory-policy", policy)
            self._redis.client.config_set("maxmemory", 1)

    def _altered(self, command: Command, forward: Forward) -> bytes:
        arguments = list(command.arguments)
        alter = another_version if self._name == "version" else self._flip
        if self._operation == "store":
            arguments[2] = alter(arguments[2])
            return forward(arguments)
        reply = forward(arguments)
        if self._operation == "lookup":
            return {b":0\r\n": b":1\r\n", b":1\r\n": b":0\r\n"}.get(reply, reply)
        value = value_of(reply)
        return pack_value(alter(value)) if value else reply

    def _flip(self, value: bytes) -> bytes:
        changed = bytearray(value)
        changed[self._draw(len(value))] ^= 1 << self._draw(8)
        return bytes(changed)

    def lift(self) -> None:
        """The server is well again; what it has lost is lost."""
        self._redis.resume()
        self._redis.start()
        self._redis.client.config_set("maxmemory", 0)


def another_version(value: bytes) -> bytes:
    """An object as another version of VLCache might have written it, its checksum right."""
    buffer = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    header = codec.read_header(buffer)
    codec.seal(buffer, replace(header, format_version=header.format_version + 1))
    return buffer.numpy().tobytes()


# -- what is struck -----------------------------------------------------------------------------


class RedisStore:
    """A redis-server or valkey-server behind a proxy; a context manager.

    Attributes:
        tier: that the engine has.
        cells: faults, and where they strike.
        restores: whether `restore` brings back what there was.
    """

    tier = "valkey"
    cells = tuple(
        cell for cell in itertools.product(FAULTS, OPERATIONS) if cell != ("version", "lookup")
    )
    restores = True

    def __init__(self, command: str, folder: Path) -> None:
        self._redis = LocalRedis(folder, command=command)
        self._strike: Strike | None = None
        self._known: dict[str, dict[bytes, bytes]] = {}

    def __enter__(self) -> RedisStore:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._redis)
            self._proxy = stack.enter_context(RedisProxy(self._redis.port))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def connector(self) -> dict[str, Any]:
        """Options of an engine for which it is empty."""
        self._redis.load({})
        return {"redis_url": self._proxy.url}

    def keep(self, name: str) -> None:
        """Remember what it holds."""
        self._known[name] = self._redis.dump()

    def restore(self, name: str, *, instead: bool = True) -> None:
        """Put back what it held, over or instead of what it holds."""
        self._redis.load(self._known[name], instead=instead)

    def strike(self, fault: str, at: str) -> None:
        """From now on, the fault strikes."""
        if self._strike is None:
            self._strike = self._proxy.fault = Strike(fault, at, self._redis)

    def lift(self) -> int:
        """Everything is well again; how often the fault has struck."""
        strike, self._strike = self._strike, None
        self._proxy.fault = None
        if strike is None:
            return 0
        strike.lift()
        return strike.count


class MooncakeStore:
    """A master and a node that holds everything; see `RedisStore`."""

    tier = "mooncake"
    cells = tuple(itertools.product(("killed", "stopped"), PARTS))
    restores = False

    def __init__(self, command: str, folder: Path) -> None:
        self._master = Master(command, folder)
        self._node = MooncakeNode(self._master.params, folder / "node.log")
        self._struck: tuple[str, Master | MooncakeNode] | None = None

    def __enter__(self) -> MooncakeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._node.kill()
        self._master.kill()

    def connector(self) -> dict[str, Any]:
        self.__exit__()
        self._master.start()
        self._node.start()
        spec = {"type": "mooncake", **self._master.params, "global_segment_size": 0}
        return {"l2_adapters": [spec]}

    def keep(self, name: str) -> None:
        pass

    def restore(self, name: str, *, instead: bool = True) -> None:
        pass

    def strike(self, fault: str, at: str) -> None:
        if self._struck is None:
            part = self._master if at == "master" else self._node
            self._struck = fault, part
            if fault == "killed":
                part.kill()
            else:
                part.pause()

    def lift(self) -> int:
        struck, self._struck = self._struck, None
        if struck is None:
            return 0
        fault, part = struck
        if fault == "killed":
            part.start()
        else:
            part.resume()
        return 1


Store = RedisStore | MooncakeStore


def open_store(name: str, folder: Path) -> Store | str:
    """The store of this name; or why there is none."""
    if name == "mooncake":
        command = find_master()
        return MooncakeStore(command, folder) if command else "no mooncake_master that runs here"
    command = find_valkey() if name == "valkey" else find_server()
    return RedisStore(command, folder) if command else f"no {name}-server"


# -- a cell -------------------------------------------------------------------------------------


def recover(
    llm: Any, tell: stress.Tell, probe: Ask, tier: str, seconds: float
) -> tuple[float | None, list[Result]]:
    """Ask until the image comes from a tier; how long that took, and all answers."""
    started = time.monotonic()
    results: list[Result] = []
    while time.monotonic() - started < seconds:
        # What is on its way there may still be stuck: nobody waits for it here.
        stress.forget(llm, tell, seconds=0.0)
        results += stress.serve(llm, tell, [probe])
        if results[-1].tier == tier:
            return time.monotonic() - started, results
        time.sleep(0.05)
    return None, results


Cell = dict[str, Any]


class Matrix:
    """Measures cells; a context manager that ends its engine.

    Args:
        model: directory of the checkpoint.
        name: of the store, for readers.
        log: file for what the engines print.
    """

    def __init__(self, model: Path, load: Load, name: str, store: Store, log: Path):
        self._model = model
        self._load = load
        self._name = name
        self._store = store
        self._log = log
        self._engine: EngineProcess | None = None
        self._allowed: list[list[Result]] = []
        self._ttft: list[float] = []
        self._wait = 0.0
        """Median, without a fault."""

    def __enter__(self) -> Matrix:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_engine()

    def prepare(self, advance: stress.Tell) -> None:
        """Find out what may be answered, and how fast without a fault.

        Raises:
            MatrixError: something is wrong even then.
        """
        load = self._load
        with EngineProcess(self._model, stress.AMPLE, self._log) as engine:
            asks = [*load.asks, *load.again, load.probe]
            self._allowed = engine.call(stress.references, asks, on_progress=advance)
        # What the probe itself stored, while its image was not to be had, may be loaded later.
        # Reused in the same place and context, it changes nothing.
        plain, reused = self._allowed[-1]
        self._allowed[-1].append(replace(plain, figures=reused.figures))
        for _ in range(2):  # the first time, the engine has not seen the images yet
            self._ttft = []
            cell = self.measure(NO_FAULT, "", advance)
            if cell["problems"]:
                raise MatrixError("without a fault: " + "; ".join(cell["problems"]))

    def measure(self, fault: str, at: str, advance: stress.Tell) -> Cell:
        """One cell: what happened, and what of it is a problem."""
        load, store = self._load, self._store
        results: list[Result] = []
        cell: Cell = {"store": self._name, "fault": fault, "at": at, "crashed": 0, "hung": 0}
        armed_at = max(1, int(ARMED_AFTER * len(load.asks)))

        def on_progress(done: int | None) -> None:
            if done is not None:
                advance(done)
                if done >= armed_at and fault != NO_FAULT:
                    store.strike(fault, at)

        problems: list[str] = []
        try:
            call = self._ready_engine().call
            before = call(stress.happened)
            results = call(stress.serve, load.asks, IN_FLIGHT, on_progress=on_progress)
            call(stress.forget, 5.0)
            results += call(stress.serve, load.again, IN_FLIGHT)
            lifted = time.monotonic()
            cell["strikes"] = store.lift()
            store.restore("probe", instead=False)
            lifting = time.monotonic() - lifted
            seconds, answers = call(recover, load.probe, store.tier, RECOVERY_SECONDS)
            cell["recovery_seconds"] = None if seconds is None else lifting + seconds
            problems += call(stress.violations)
            after = call(stress.happened)
            cell["counters"] = {k: v - before.get(k, 0) for k, v in sorted(after.items())}
            cell["counters"] = {k: v for k, v in cell["counters"].items() if v}
            if fault == NO_FAULT:
                problems += self._is_reused(results)
                if not self._ttft:
                    self._ttft = ttfts(results)
                    self._wait = float(np.median(self._waits(results)))
            results.append(answers[-1])
        except EngineCrashedError as error:
            cell["crashed"] = 1
            problems.append(f"the engine crashed: {str(error).strip().splitlines()[-1]}")
        except EngineHungError as error:
            cell["hung"] = len(load.asks) + len(load.again) - len(results)
            problems.append(str(error))
        finally:
            cell.setdefault("strikes", store.lift())
        if cell["crashed"] or cell["hung"] or not store.restores:
            self._close_engine()
        cell |= self._judge(cell, results, problems)
        problems += judge(cell)
        return cell | {"problems": problems}

    def _judge(self, cell: Cell, results: Sequence[Result], problems: list[str]) -> Cell:
        """What the answers, as far as there are any, say."""
        asks = [*self._load.asks, *self._load.again, self._load.probe]
        different = []
        for ask, result, allowed in zip(asks, results, self._allowed, strict=False):
            is_answered = result.status in ("done", "failed")
            wrong = stress.deviation(result, allowed) if is_answered else None
            if wrong:
                different.append(f"{ask.text!r}: {wrong}")
        problems += different[:3]
        free, mine = np.array(self._ttft), np.array(ttfts(results[: len(asks) - 1]))
        waits = self._waits(results)
        return {
            "requests": len(results),
            "aborted": sum(result.status == "aborted" for result in results),
            "failed": sum(result.status == "failed" for result in results),
            "hung": cell["hung"] + sum(result.status == "hung" for result in results),
            "reused": sum(result.reused > 0 for result in results),
            "different": len(different),
            "added_wait": float(np.median(waits)) - self._wait if waits else None,
            "waited_in_vain": sum(wait >= ALL_OF_IT * DEADLINE_SECONDS for wait in waits),
            "late_requests": len(waits),
            "added_p95": float(np.percentile(mine, 95) - np.percentile(free, 95))
            if mine.size and free.size
            else None,
            "opened": cell.get("counters", {}).get(f"{self._store.tier}.guard.open", 0),
        }

    def _waits(self, results: Sequence[Result]) -> list[float]:
        """Seconds that requests for known images waited, when the guard has seen enough."""
        asks = [*self._load.asks, *self._load.again]
        return [
            result.figures.get("ttft_part_seconds", {}).get("staging", 0.0)
            for ask, result in list(zip(asks, results, strict=False))[len(self._load.asks) // 2 :]
            if ask.donors and result.status == "done"
        ]

    def _is_reused(self, results: Sequence[Result]) -> list[str]:
        """Without a fault, everything that is known is loaded."""
        asks = [*self._load.asks, *self._load.again]
        return [
            f"{ask.text!r} reused {result.reused} tokens of {result.tier}, not all from "
            f"{self._store.tier}"
            for ask, result, allowed in zip(asks, results, self._allowed, strict=False)
            if result.status == "done"
            and ask.donors
            and (result.tier != self._store.tier or result.reused != allowed[-1].reused)
        ][:3]

    def _ready_engine(self) -> EngineProcess:
        """The engine, with all its memory empty; a new one stores the donors first."""
        if self._engine is None:
            connector = {**CONNECTOR, **self._store.connector()}
            self._engine = EngineProcess(self._model, connector, self._log)
            call = self._engine.call
            *others, probe = self._load.donors
            call(stress.serve, [probe])
            call(stress.forget)
            self._store.keep("probe")
            call(stress.serve, others)
            call(stress.forget)
            self._store.keep("all")
        self._engine.call(stress.forget)
        self._store.restore("all")
        return self._engine

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def ttfts(results: Sequence[Result]) -> list[float]:
    """Times to the first token of requests whose clients stayed."""
    return [result.ttft for result in results if result.status == "done"]


def judge(cell: Cell) -> list[str]:
    """What is wrong with a cell's figures."""
    problems = [
        f"{cell[key]} {text}"
        for key, text in (
            ("hung", "requests hung"),
            ("failed", "requests failed"),
            ("different", "answers differ"),
        )
        if cell[key]
    ]
    if cell["added_p95"] is not None and cell["added_p95"] > DEADLINE_SECONDS + SLACK_SECONDS:
        problems.append(f"{cell['added_p95']:.2f} s were added at p95")
    if cell["added_wait"] is not None and cell["added_wait"] > MOST_WAIT * DEADLINE_SECONDS:
        problems.append(
            f"requests waited {cell['added_wait']:.2f} s longer, at the median, once the guard "
            "had seen enough"
        )
    if (cell["fault"], cell["at"]) in READS_FAIL and not cell["opened"] and not cell["crashed"]:
        problems.append("all reads failed, and the guard did not open")
    if cell["fault"] != NO_FAULT and not cell["strikes"]:
        problems.append("the fault never struck")
    if not cell["crashed"] and not cell["hung"] and cell["recovery_seconds"] is None:
        problems.append(f"nothing was loaded for {RECOVERY_SECONDS:.0f} s after the fault")
    return problems


# -- results ------------------------------------------------------------------------------------

HEADS = (
    *("Store", "Fault", "At", "Requests", "Aborted", "Crashed", "Hung", "Failed", "Differ"),
    *("Reused", "Wait +p50", "Waited in vain", "TTFT +p95", "Guard opened", "Recovery"),
    *("Struck", "Counters"),
)
_TEXTS = (*HEADS[:3], HEADS[-1])


def row_of(cell: Cell) -> list[str]:
    """A line of the table."""
    counters = cell.get("counters", {})
    events = [
        f"{event} {count}"
        for key, count in counters.items()
        if not key.endswith(".bytes") and ".guard." not in key
        for event in [key.partition(".")[2] if key.split(".")[0] in ADAPTER_TYPES else key]
    ]
    counts = ("requests", "aborted", "crashed", "hung", "failed", "different", "reused")
    recovery, wait = cell.get("recovery_seconds"), cell["added_wait"]
    shown = _seconds(wait, "+.3f")
    return [
        *(cell["store"], cell["fault"], cell["at"]),
        *(str(cell[name]) for name in counts),
        f"**{shown}**" if wait is not None and wait > MOST_WAIT * DEADLINE_SECONDS else shown,
        f"{cell['waited_in_vain']} of {cell['late_requests']}",
        _seconds(cell["added_p95"], "+.2f"),
        f"{cell['opened']} times" if cell["opened"] else "no",
        _seconds(recovery, ".1f") if recovery is not None else "**never**",
        str(cell["strikes"]),
        ", ".join(events),
    ]


def _seconds(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}} s"


def make_markdown(document: Mapping[str, Any]) -> str:
    """The document as text."""
    cells = document["cells"]
    failed = [cell for cell in cells if cell["problems"]]
    done = len(cells) - len(failed)
    lines = [
        "# Faults below host memory, under load",
        "",
        f"**{done} of {len(cells)} cells passed.** {document['requests']} requests in each, "
        f"{IN_FLIGHT} at a time; `fetch_deadline_seconds` {DEADLINE_SECONDS:g}; "
        f"{document['machine']['cores']} cores, {document['seconds'] / 60:.0f} minutes in all.",
        "",
        f"- Command: `{document['command']}`",
        *(f"- Not run: {name}: {why}" for name, why in document["not_run"].items()),
        "- Wait: median time that requests for known images wait for them, in the second half of "
        "the load and behind it, minus that without a fault; waited in vain: how many of these "
        f"waited {ALL_OF_IT:.0%} of the deadline or more. TTFT: 95th percentile of all requests, "
        "minus that without a fault.",
        "- Reused: requests that reused something, although the fault lasted.",
        "- Guard opened: how often it was seen to leave the tier's reads alone, recovery included.",
        "- Recovery: from lifting the fault until a segment is loaded again. Struck: commands, or "
        "processes.",
        "",
        f"| {' | '.join(HEADS)} |",
        "| --- | --- | --- " + "| ---: " * (len(HEADS) - 4) + "| --- |",
        *(f"| {' | '.join(row_of(cell))} |" for cell in cells),
    ]
    for cell in failed:
        lines += ["", f"**{cell['store']}, {cell['fault']}, {cell['at']}:**", ""]
        lines += [f"- {problem}" for problem in cell["problems"]]
    return "\n".join([*lines, ""])


def print_table(cells: Sequence[Cell], console: Console) -> None:
    """The table, one line per cell, and what went wrong."""
    table = Table(box=None, pad_edge=False)
    for head in HEADS:
        table.add_column(head, justify="left" if head in _TEXTS else "right")
    for cell in cells:
        table.add_row(*row_of(cell), style="red" if cell["problems"] else None)
    console.print(table)
    for cell in cells:
        for problem in cell["problems"]:
            text = f"{cell['store']}, {cell['fault']}, {cell['at']}: {problem}"
            console.print(text, style="red", markup=False)


# -- the command --------------------------------------------------------------------------------


class Kept:
    """Cells of a run that was interrupted, one JSON document per line behind the settings."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        self.cells: list[Cell] = whole[1:] if whole[:1] == [dict(settings)] else []
        records = [dict(settings), *self.cells]
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")

    def add(self, cell: Cell) -> None:
        """Keep a cell."""
        self.cells.append(cell)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")

    def drop(self) -> None:
        """The run is complete."""
        self._path.unlink()


def run(args: argparse.Namespace, show: Console) -> dict[str, Any]:
    """Measure the cells that are missing."""
    started = time.monotonic()
    load = make_load(args.requests)
    packages = {"python": platform.python_version(), **{p: version(p) for p in stress.PACKAGES}}
    settings = {"schema": SCHEMA, "requests": args.requests, "versions": packages}
    kept = Kept(args.cache_dir / "fault_matrix" / f"{args.output.name}.cells.jsonl", settings)
    log = args.cache_dir / "logs" / f"{args.output.name}.log"
    model = make_tiny_model(args.cache_dir / "models" / "qwen2_5_vl-tiny")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    order, not_run = [], {}
    with contextlib.ExitStack() as outer:
        folder = Path(outer.enter_context(tempfile.TemporaryDirectory()))
        show_bar = Progress(*columns, TimeElapsedColumn(), console=show, transient=True)
        progress = outer.enter_context(show_bar)
        bar = progress.add_task("what may be answered", total=len(load.asks))

        def advance(done: int) -> None:
            progress.update(bar, completed=done)

        for name in args.stores:
            found = open_store(name, folder)
            if isinstance(found, str):
                not_run[name] = found
                continue
            faults = [
                (fault, at) for fault, at in found.cells if fault in args.faults and at in args.at
            ]
            wanted = [(name, fault, at) for fault, at in [(NO_FAULT, ""), *faults]]
            order += wanted
            over = {_name_of(cell) for cell in kept.cells}
            left = [cell for cell in wanted if cell not in over]
            if not left:
                continue
            with contextlib.ExitStack() as stack:
                stack.enter_context(found)
                matrix = stack.enter_context(Matrix(model, load, name, found, log))
                matrix.prepare(advance)
                for _, fault, at in left:
                    progress.update(bar, description=f"{name}, {fault}, {at}", completed=0)
                    kept.add(matrix.measure(fault, at, advance))
    kept.drop()
    return {
        "schema": SCHEMA,
        "command": shlex.join(["python", *sys.argv]).replace(f"{ROOT}/", ""),
        "machine": {"cpu": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "versions": packages,
        "requests": len(load.asks) + len(load.again) + 1,
        "seconds": time.monotonic() - started,
        "not_run": not_run,
        "cells": sorted(
            (cell for cell in kept.cells if _name_of(cell) in order),
            key=lambda cell: order.index(_name_of(cell)),
        ),
    }


def _name_of(cell: Cell) -> tuple[str, str, str]:
    return cell["store"], cell["fault"], cell["at"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parse(argv)
    show = Console(stderr=True)
    try:
        document = run(args, show)
    except KeyboardInterrupt:
        show.print("interrupted; the same command continues", style="red")
        return 130
    except (
        MatrixError,
        MooncakeError,
        RedisError,
        stress.StressError,
        EngineCrashedError,
        OSError,
    ) as error:
        show.print(f"error: {error}", style="red", markup=False)
        return 1
    args.output.parent.mkdir(parents=True, exist_ok=True)
    path = args.output.with_name(args.output.name + ".json")
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(make_markdown(document), encoding="utf-8")
    print_table(document["cells"], Console(width=max(show.width, 200)))
    return 1 if any(cell["problems"] for cell in document["cells"]) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--stores", nargs="+", choices=STORES, default=list(STORES), help="(all)")
    add("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="(all)")
    places = (*OPERATIONS, *PARTS)
    add("--at", nargs="+", choices=places, default=list(places), help="where it strikes (all)")
    add("--requests", type=int, default=200, metavar="N", help="of the load (%(default)s)")
    default = ROOT / "configs" / "results" / "fault_matrix"
    add("--output", type=Path, default=default, metavar="PREFIX", help="(%(default)s)")
    add("--cache-dir", type=Path, default=ROOT / ".cache", metavar="DIR", help="models and logs")
    args = parser.parse_args(argv)
    args.stores = list(dict.fromkeys(args.stores))
    if args.requests < 10:
        parser.error("--requests: at least 10, one of each kind")
    return args


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Measure the time to the first token (TTFT) of plain vLLM and of vLLM with VLCache.

Two servers run at the same time and get the same requests over the OpenAI API, one request at a
time: while one of them works, the other one is idle. Requests alternate between the two, and so
does the order within a pair, so that a machine that gets slower or faster changes both alike.
What counts are ratios within a pair. Before each request there is a pause, because vLLM's worker
keeps a core busy for a second after each one, waiting for more.

Workloads:

- "cold": one image that no server has seen before. These requests make the images known.
- "warm": known images, in new order, behind new text. Every prompt begins with another number, so
  vLLM's prefix cache can't serve it. VLCache gets the request once for each recompute ratio.
- "text": no image, two lengths.
- "repeat": a warm request word for word again, to plain vLLM. Its prefix cache serves all full
  blocks, so this is about what a request costs without its prefill.

For each request the server's own account of its engine's time is kept, too: the rest of TTFT is
HTTP, decoding and hashing of the images, tokenizing.

Plain vLLM has its prefix cache turned on, and an encoder cache that holds all known images.

Cells that would take longer than the time that is left are left out, and named in the results.

Results go to PREFIX.json (every single measurement, rewritten after each pair), PREFIX.md and
PREFIX.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import httpx
from make_tiny_model import ARCHS
from options import add_model_options, add_output_options, model_of, model_problems
from results import (
    CpuTimes,
    Spread,
    about_run,
    command_line,
    cores,
    duration,
    end_by_signal,
    read_document,
    replacing,
    timestamp,
    with_range,
    with_suffix,
    write_text,
)
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from serving import (
    CELL_PX,
    ROOT,
    Part,
    ServerError,
    VLLMServer,
    chat,
    chat_stream,
    counters,
    image_part,
    make_client,
    make_image,
    text_part,
)
from tiny_architectures import MAX_PIXELS

SCHEMA = 1
DEFAULT_OUTPUT = ROOT / "configs" / "results" / "ttft_cpu"

# What the project asks for: the speed-up of a warm request, and how much longer others may take.
AIM_WARM = (1120, 2, 0.05, 10.0)
AIM_COLD = 1.05
AIM_TEXT = 1.02

WARM_UP_SEED = 1
FIRST_SEED = 1000
MAX_IMAGES = 4
SYSTEMS = ("plain", "vlcache")
ENGINE_METRICS = (
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
)
PAUSE_SECONDS = 1.1
"""By default, longer than the second for which vLLM's workers poll for work."""
REPEATS = 2
"""How many requests of a "warm" cell are repeated."""
TEXT_TOKENS = 256
"""Room for the text of a prompt with images."""
LONG_TEXT_REPEATS = 8

IN_FRONT = "Look at these pictures: "
BEHIND = " Which one is older, and why?"
STORY = (
    "The document is a letter from a school to the parents. It says that the summer holidays start "
    "one week earlier than last year, and that every child should return the books before then. "
    "The bridge is closed between the station and the market until the end of the month. "
)


# -- what is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """What is measured.

    Attributes:
        sizes: edges of the images in pixels.
        images: numbers of images in a prompt.
        ratios: recompute ratios.
        repetitions: pairs of a "warm" cell, and at least of a "cold" one.
        text_repetitions: pairs of a "text" cell.
    """

    sizes: tuple[int, ...]
    images: tuple[int, ...]
    ratios: tuple[float, ...]
    repetitions: int
    text_repetitions: int

    @property
    def cold_repetitions(self) -> int:
        """Pairs of a "cold" cell: they also have to make enough images known."""
        return max(self.repetitions, *self.images)

    @property
    def prompt_tokens(self) -> int:
        """An upper bound of a prompt's length."""
        return max(self.images) * (max(self.sizes) // CELL_PX) ** 2 + TEXT_TOKENS

    def count_pairs(self) -> int:
        """How many groups of requests are compared."""
        with_images = len(self.images) * self.repetitions + self.cold_repetitions
        return len(self.sizes) * with_images + 2 * self.text_repetitions


FULL = Matrix((448, 672, 1120, 1792), (1, 2, 3, 4), (0.02, 0.05, 0.1), 5, 30)
QUICK = Matrix((448, 1120), (1, 2), (0.05,), 5, 10)
MINUTES = 13.0
"""For the measurements; the servers need about two more until they are ready."""


@dataclass(frozen=True)
class Sample:
    """One measured request.

    Attributes:
        kind: "cold", "warm", "text" or "repeat".
        image_px: edge of the images; 0 without images.
        images: number of images.
        image_tokens: tokens of all images.
        pair: number of the group of requests that are compared with each other.
        system: "plain" or "vlcache".
        ratio: recompute ratio that was asked for; None where none was.
        ttft: seconds to the first token.
        seconds: to the end of the answer (2 tokens).
        prompt_tokens: length of the prompt.
        idle_server_cpu: seconds of CPU time that the other server used meanwhile.
        other_cpu: seconds of CPU time that anything else on the machine used meanwhile.
        disturbed: whether others used so much that the pair was measured again.
        engine: the part of `ttft` that the server's engine took by its own account; the rest is
            HTTP, decoding and hashing of images, tokenizing. None where it gave no account.
    """

    kind: str
    image_px: int
    images: int
    image_tokens: int
    pair: int
    system: str
    ratio: float | None
    ttft: float
    seconds: float
    prompt_tokens: int
    idle_server_cpu: float
    other_cpu: float
    disturbed: bool = False
    engine: float | None = None


@dataclass(frozen=True)
class Request:
    """A request as it can be sent several times, with another number in front each time.

    Attributes:
        kind, image_px, images: see `Sample`.
        parts: its content behind the number.
    """

    kind: str
    image_px: int
    images: int
    parts: tuple[Part, ...]

    def content(self, number: int) -> list[Part]:
        """Its content; different numbers make different prompts of the same length."""
        return [text_part(f"Request {number:06}. "), *self.parts]


def image_request(kind: str, image_px: int, images: Sequence[Part]) -> Request:
    """A request about `images`."""
    parts: list[Part] = [text_part(IN_FRONT)]
    for index, image in enumerate(images):
        parts += [text_part(", ")] * (index > 0) + [image]
    return Request(kind, image_px, len(images), (*parts, text_part(BEHIND)))


def text_request(repeats: int) -> Request:
    """A request without images."""
    return Request("text", 0, 0, (text_part(STORY * repeats + "When do the holidays start?"),))


# -- the record ---------------------------------------------------------------------------------


class Record:
    """The measurements and all that is needed to judge them, kept in a JSON file."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "complete": False,
            **about,
            "left_out": [],
            "figures": [],
            "samples": [],
        }

    def add(self, samples: Iterable[Sample]) -> None:
        """Add measurements that belong together, and save."""
        self.document["samples"] += [asdict(sample) for sample in samples]
        self.save()

    def finish(self) -> None:
        """Note that nothing is missing."""
        self.document["complete"] = True
        self.document["finished"] = timestamp()
        self.save()

    def save(self) -> None:
        """Replace the file at once: it is never seen half-written."""
        write_text(self._path, json.dumps(self.document, indent=1) + "\n")


def samples_of(document: dict[str, Any]) -> list[Sample]:
    """The measurements of a document that count."""
    samples = [Sample(**entry) for entry in document["samples"]]
    return [sample for sample in samples if not sample.disturbed]


# -- measuring ----------------------------------------------------------------------------------


class Bench:
    """Sends the requests of a matrix to both servers.

    Args:
        servers: "plain" and "vlcache".
        advance: called before each request with its description and the pairs done so far.
        pause: seconds before each request.
        seconds: for all measurements, pauses included.
        max_other_load: most cores that other programs may use during a pair on average; else it
            is measured again. None: any number.
    """

    def __init__(
        self,
        client: httpx.Client,
        servers: dict[str, VLLMServer],
        matrix: Matrix,
        record: Record,
        advance: Callable[[str, int], None],
        *,
        pause: float = PAUSE_SECONDS,
        seconds: float = math.inf,
        max_other_load: float | None = None,
    ) -> None:
        self._client = client
        self._servers = servers
        self._groups = [servers[name].process_group for name in SYSTEMS]
        self._matrix = matrix
        self._record = record
        self._show = advance
        self._pause = pause
        self._seconds_left = seconds
        self._largest: dict[str, tuple[int, float]] = {}
        self._max_other_load = max_other_load
        self._number = 0
        self._pair = 0
        self._done = 0

    def measure(self) -> None:
        """Send everything."""
        self._warm_up()
        sizes = self._matrix.sizes
        for index, image_px in enumerate(sizes):
            known: list[Part] = []
            with self._cell("cold", image_px, 1, self._matrix.cold_repetitions) as fits:
                if fits:
                    known = self._cold(image_px)
            for images in self._matrix.images:
                repetitions = self._matrix.repetitions
                with self._cell("warm", image_px, images, repetitions, bool(known)) as fits:
                    if fits:
                        self._warm(image_px, known, images)
            # A part of the text requests after each size, so that they see the same machine.
            total = self._matrix.text_repetitions
            done, after = (total * (index + more) // len(sizes) for more in (0, 1))
            for repeats in (1, LONG_TEXT_REPEATS):
                for _ in range(after - done):
                    self._compare_until_quiet(text_request(repeats), [None])
        self._record.finish()

    def _warm_up(self) -> None:
        """Two requests with an image and one without, to each server; nothing is kept."""
        image_px = max(self._matrix.sizes)
        image = image_part(make_image(WARM_UP_SEED, image_px))
        request = image_request("warm-up", image_px, [image])
        for server in self._servers.values():
            for content in (request, request, text_request(LONG_TEXT_REPEATS)):
                self._show("warm-up", 0)
                chat_stream(self._client, server, content.content(self._next_number()))

    @contextlib.contextmanager
    def _cell(
        self, kind: str, image_px: int, images: int, pairs: int, possible: bool = True
    ) -> Iterator[bool]:
        """Whether the time that is left will do for a cell, judged by the largest one before."""
        tokens = images * (image_px // CELL_PX) ** 2
        before, seconds = self._largest.get(kind, (tokens, 0.0))
        left = self._seconds_left
        fits = possible and left > 0 and seconds * max(1.0, tokens / before) ** 2 <= left
        yield fits
        if fits:
            if tokens >= before:
                self._largest[kind] = (tokens, left - self._seconds_left)
        else:
            self._done += pairs
            about = {"kind": kind, "image_px": image_px, "images": images}
            self._record.document["left_out"].append(about)

    def _cold(self, image_px: int) -> list[Part]:
        """Show new images to both servers; returns the last ones, which are known now."""
        known: list[Part] = []
        wanted = self._done + self._matrix.cold_repetitions
        while self._done < wanted:
            seed = FIRST_SEED + 1000 * image_px + len(known)
            known.append(image_part(make_image(seed, image_px)))
            self._compare(image_request("cold", image_px, known[-1:]), [None])
        return known[-max(self._matrix.images) :]

    def _warm(self, image_px: int, known: Sequence[Part], images: int) -> None:
        orders = [
            random.Random(f"{image_px} {images} {index}").sample(known, images)
            for index in range(self._matrix.repetitions + 1)
        ]
        for ratio in self._matrix.ratios:
            self._take_figures(image_request("warm", image_px, orders[-1]), ratio)
        for index, order in enumerate(orders[:-1]):
            request = image_request("warm", image_px, order)
            self._compare_until_quiet(request, self._matrix.ratios, repeat=index < REPEATS)

    def _take_figures(self, request: Request, ratio: float) -> None:
        """Ask once without streaming: only then VLCache says what it did."""
        self._show(f"{_describe(request)}, ratio {ratio:g}: figures", self._done)
        answer = chat(
            self._client,
            self._servers["vlcache"],
            request.content(self._next_number()),
            max_tokens=2,
            kv_transfer_params=_params(ratio),
        )
        figures = (answer.kv_transfer_params or {}).get("vlcache", {})
        if not figures.get("reused_tokens"):
            raise ServerError(
                f"VLCache reused nothing in a request with {_describe(request)} that it knows: "
                f"{figures}; is there room for them (--cpu-bytes)?"
            )
        about = {"image_px": request.image_px, "images": request.images, "ratio": ratio}
        self._record.document["figures"].append(about | figures)

    def _compare_until_quiet(
        self, request: Request, ratios: Sequence[float | None], repeat: bool = False
    ) -> None:
        wanted = self._done + 1
        while self._done < wanted:
            self._compare(request, ratios, repeat)

    def _compare(
        self, request: Request, ratios: Sequence[float | None], repeat: bool = False
    ) -> None:
        """Send a request to plain vLLM and to VLCache, there once for each ratio.

        Args:
            repeat: send it to plain vLLM once more.
        """
        turns: list[tuple[str, float | None]] = [("vlcache", ratio) for ratio in ratios]
        turns.insert(0, ("plain", None))
        if self._pair % 2:
            turns.reverse()
        samples = []
        for system, ratio in turns:
            content = request.content(self._next_number())
            samples.append(self._send(request, content, system, ratio))
            if repeat and system == "plain":
                again = replace(request, kind="repeat")
                samples.append(self._send(again, content, system, None))
        self._pair += 1
        if self._max_other_load is not None:
            load = sum(s.other_cpu for s in samples) / sum(s.seconds for s in samples)
            if load > self._max_other_load:
                self._record.add(replace(sample, disturbed=True) for sample in samples)
                return
        self._record.add(samples)
        self._done += 1

    def _send(
        self, request: Request, content: Sequence[Part], system: str, ratio: float | None
    ) -> Sample:
        what = f"{request.kind}, {_describe(request)}, {system}"
        server = self._servers[system]
        engine_before = self._engine_seconds(server)
        self._wait(what if ratio is None else f"{what} {ratio:g}")
        cpu_before = CpuTimes.now(self._groups)
        answer = chat_stream(
            self._client,
            server,
            content,
            max_tokens=2,
            kv_transfer_params=None if ratio is None else _params(ratio),
        )
        cpu_after = CpuTimes.now(self._groups)
        self._seconds_left -= self._pause + answer.seconds
        requests, engine = (
            after - before
            for before, after in zip(engine_before, self._engine_seconds(server), strict=True)
        )
        idle = 1 - SYSTEMS.index(system)
        assert answer.ttft is not None
        return Sample(
            kind=request.kind,
            image_px=request.image_px,
            images=request.images,
            image_tokens=request.images * (request.image_px // CELL_PX) ** 2,
            pair=self._pair,
            system=system,
            ratio=ratio,
            ttft=answer.ttft,
            seconds=answer.seconds,
            prompt_tokens=answer.prompt_tokens,
            idle_server_cpu=round(cpu_after.groups[idle] - cpu_before.groups[idle], 3),
            other_cpu=round(max(0.0, cpu_after.other - cpu_before.other), 3),
            engine=engine if requests == 1 else None,
        )

    def _engine_seconds(self, server: VLLMServer) -> tuple[float, float]:
        """How many requests the engine has answered, and its time to all their first tokens."""
        found = counters(self._client, server)
        requests, *seconds = (float(found[name]) for name in ENGINE_METRICS)
        return requests, sum(seconds)

    def _wait(self, what: str) -> None:
        """Until both servers are idle, and the machine, too, if that is asked for."""
        self._show(what, self._done)
        while True:
            before, started = CpuTimes.now(self._groups), time.monotonic()
            time.sleep(self._pause)
            if self._max_other_load is None:
                return
            used = CpuTimes.now(self._groups).other - before.other
            load = used / (time.monotonic() - started)
            if load <= self._max_other_load:
                return
            self._show(f"{what}: others use {load:.1f} cores, waiting", self._done)

    def _next_number(self) -> int:
        self._number += 1
        return self._number


def _describe(request: Request) -> str:
    if not request.images:
        return "no image"
    return f"{request.images} x {request.image_px} px"


def _params(ratio: float) -> dict[str, Any]:
    return {"vlcache": {"recompute_ratio": ratio}}


# -- what the measurements say ------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """All measurements of one kind of request at one recompute ratio, against plain vLLM.

    Attributes:
        kind, image_px, images, image_tokens, ratio: see `Sample`.
        prompt_tokens: length of the prompts.
        pairs: how many.
        plain: TTFT of plain vLLM in seconds.
        vlcache: TTFT with VLCache in seconds.
        speed_up: how many times longer plain vLLM takes, pair by pair.
        outside: median of the seconds of VLCache's TTFT that were not the engine's.
    """

    kind: str
    image_px: int
    images: int
    image_tokens: int
    ratio: float | None
    prompt_tokens: int
    pairs: int
    plain: Spread
    vlcache: Spread
    speed_up: Spread
    outside: float | None

    @property
    def overhead(self) -> Spread:
        """How many times longer VLCache takes, pair by pair."""
        up = self.speed_up
        return Spread(1 / up.median, 1 / up.high, 1 / up.low)


def make_cells(samples: Sequence[Sample]) -> list[Cell]:
    """Compare what belongs together, in the order of the requests' sizes."""
    plain = {s.pair: s for s in samples if s.system == "plain" and s.kind != "repeat"}
    groups: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        if sample.system == "vlcache" and sample.pair in plain:
            key = (sample.kind, sample.image_px, sample.images, sample.prompt_tokens, sample.ratio)
            groups.setdefault(key, []).append(sample)
    cells = []
    for (kind, image_px, images, prompt_tokens, ratio), mine in groups.items():
        theirs = [plain[sample.pair] for sample in mine]
        outside = [sample.ttft - sample.engine for sample in mine if sample.engine is not None]
        cells.append(
            Cell(
                kind=kind,
                image_px=image_px,
                images=images,
                image_tokens=mine[0].image_tokens,
                ratio=ratio,
                prompt_tokens=prompt_tokens,
                pairs=len(mine),
                plain=Spread.of([sample.ttft for sample in theirs]),
                vlcache=Spread.of([sample.ttft for sample in mine]),
                speed_up=Spread.of([a.ttft / b.ttft for a, b in zip(theirs, mine, strict=True)]),
                outside=statistics.median(outside) if outside else None,
            )
        )
    return sorted(cells, key=lambda c: (c.kind, c.prompt_tokens, c.ratio or 0.0))


def repeats_of(samples: Sequence[Sample]) -> dict[tuple[int, int], Spread]:
    """TTFT of plain vLLM when its prefix cache serves a warm request, by size and images."""
    found: dict[tuple[int, int], list[float]] = {}
    for sample in samples:
        if sample.kind == "repeat":
            found.setdefault((sample.image_px, sample.images), []).append(sample.ttft)
    return {key: Spread.of(numbers) for key, numbers in found.items()}


def make_aims(cells: Sequence[Cell]) -> list[tuple[str, str, bool]]:
    """What was aimed at, what was measured, whether it is met; for the cells that are there."""
    aims = []
    px, images, ratio, wanted = AIM_WARM
    for cell in cells:
        if cell.kind == "warm" and (cell.image_px, cell.images, cell.ratio) == (px, images, ratio):
            what = f"{images} known images of {px} px, ratio {ratio:g}: speed-up >= {wanted:g}"
            measured = cell.speed_up.median
            aims.append((what, f"{measured:.1f}", measured >= wanted))
        limit = {"cold": AIM_COLD, "text": AIM_TEXT}.get(cell.kind)
        if limit is not None:
            name = f"new image of {cell.image_px} px" if cell.images else "no image"
            what = f"{name}, {cell.prompt_tokens} tokens: TTFT <= {limit:g} x plain"
            measured = cell.overhead.median
            aims.append((what, f"{measured:.3f}", measured <= limit))
    return aims


# -- what is shown ------------------------------------------------------------------------------


def make_markdown(document: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    samples = samples_of(document)
    cells = make_cells(samples)
    settings, machine = document["settings"], document["machine"]
    commit = document["git"]["commit"] or "unknown"
    changed = " with changes" if document["git"]["changed"] else ""
    lines = [
        "# Time to the first token: plain vLLM and VLCache",
        "",
        f"- Model: {settings['model']}, {settings['dtype']}",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores",
        f"- Versions: {', '.join(f'{k} {v}' for k, v in document['versions'].items())}; "
        f"commit {commit[:12]}{changed}",
        f"- Started {document['started']}, {duration(document)}",
        f"- Command: `{document['command']}`",
        f"- CPU time used during the measurements, in cores: {_cpu_summary(samples)}",
        "",
        "TTFT is measured by a streaming client of the OpenAI API and is the median in seconds. "
        "Ratios are medians of the ratios within pairs of requests, with their range in brackets. "
        "Plain vLLM has its prefix cache and its encoder cache turned on, and the latter holds "
        "every known image.",
        "",
        "## Aims",
        "",
        "| Aim | Measured | |",
        "| --- | ---: | --- |",
        *(
            f"| {what} | {measured} | {'met' if met else '**missed**'} |"
            for what, measured, met in make_aims(cells)
        ),
        "",
        "## Known images, in new order, behind new text",
        "",
        *_warm_table(cells, repeats_of(samples)),
        "",
        '"Exact repeat" is the same request word for word again, sent to plain vLLM: its prefix '
        'cache serves all full blocks. "Outside" is the part of VLCache\'s TTFT that the engine '
        "has no hand in, by the server's own account: HTTP, decoding and hashing of the images, "
        "tokenizing.",
        *_left_out(document),
        "",
        "## Requests that VLCache can't help",
        "",
        "| Request | Prompt tokens | Plain | VLCache | VLCache / plain |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {f'one new image of {c.image_px} px' if c.images else 'text only'} "
            f"| {c.prompt_tokens} | {c.plain.median:.3f} | {c.vlcache.median:.3f} "
            f"| {with_range(c.overhead, '.3f')} |"
            for c in cells
            if c.kind in ("cold", "text")
        ),
    ]
    return "\n".join(lines) + "\n"


def _left_out(document: dict[str, Any]) -> list[str]:
    cells = [
        f"{cell['kind']} {cell['images']} x {cell['image_px']} px"
        for cell in document.get("left_out", [])
    ]
    return ["", f"Left out for lack of time: {', '.join(cells)}."] if cells else []


def _warm_table(cells: Sequence[Cell], repeats: dict[tuple[int, int], Spread]) -> list[str]:
    ratios = sorted({cell.ratio for cell in cells if cell.kind == "warm" and cell.ratio})
    heading = ["Image", "Images", "Prompt tokens", "Plain", "Exact repeat", "Outside"]
    for ratio in ratios:
        heading += [f"VLCache {ratio:g}", f"Speed-up {ratio:g}"]
    lines = [f"| {' | '.join(heading)} |", "| --- " + "| ---: " * (len(heading) - 1) + "|"]
    rows: dict[tuple[int, int], dict[float | None, Cell]] = {}
    for cell in cells:
        if cell.kind == "warm":
            rows.setdefault((cell.image_px, cell.images), {})[cell.ratio] = cell
    for (image_px, images), by_ratio in sorted(rows.items()):
        first = next(iter(by_ratio.values()))
        repeat = repeats.get((image_px, images))
        entries = [f"{image_px} px", str(images), str(first.prompt_tokens)]
        entries += [f"{first.plain.median:.3f}", f"{repeat.median:.3f}" if repeat else "-"]
        entries.append("-" if first.outside is None else f"{first.outside:.3f}")
        for ratio in ratios:
            found = by_ratio.get(ratio)
            entries += (
                [f"{found.vlcache.median:.3f}", with_range(found.speed_up, ".1f")]
                if found
                else ["-", "-"]
            )
        lines.append(f"| {' | '.join(entries)} |")
    return lines


def _cpu_summary(samples: Sequence[Sample]) -> str:
    seconds = sum(sample.seconds for sample in samples)
    if not seconds:
        return "nothing was measured"
    idle, other = (
        sum(getattr(sample, name) for sample in samples) / seconds
        for name in ("idle_server_cpu", "other_cpu")
    )
    return f"{idle:.3f} by the server that was idle, {other:.2f} by other programs"


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw TTFT and speed-up against image tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    samples = samples_of(document)
    warm = sorted(
        (cell for cell in make_cells(samples) if cell.kind == "warm"), key=lambda c: c.image_tokens
    )
    if not warm:
        raise ValueError("there are no measurements of known images to plot")
    ratios = sorted({cell.ratio for cell in warm if cell.ratio is not None})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")

    def draw(axes: Any, points: Sequence[tuple[int, Spread]], **style: Any) -> None:
        x = [tokens for tokens, _ in points]
        axes.plot(x, [spread.median for _, spread in points], markersize=5, **style)
        low, high = [s.low for _, s in points], [s.high for _, s in points]
        axes.vlines(x, low, high, color=style["color"], linewidth=1.2)

    one_ratio = [cell for cell in warm if cell.ratio == ratios[0]]
    draw(
        left,
        [(cell.image_tokens, cell.plain) for cell in one_ratio],
        color="black",
        marker="o",
        label="plain vLLM",
    )
    colours = plt.get_cmap("viridis")
    for index, ratio in enumerate(ratios):
        cells = [cell for cell in warm if cell.ratio == ratio]
        style = {
            "color": colours(0.15 + 0.65 * (1 - index / max(1, len(ratios) - 1))),
            "marker": "sD^v"[index % 4],
            "label": f"VLCache, {100 * ratio:.3g} % recomputed",
        }
        draw(left, [(cell.image_tokens, cell.vlcache) for cell in cells], **style)
        draw(right, [(cell.image_tokens, cell.speed_up) for cell in cells], **style)
    tokens = {(cell.image_px, cell.images): cell.image_tokens for cell in warm}
    repeats = [(tokens[key], s) for key, s in repeats_of(samples).items() if key in tokens]
    if repeats:
        draw(
            left,
            sorted(repeats, key=lambda point: point[0]),
            color="grey",
            linestyle=":",
            marker=".",
            label="exact repeat, prefix cache of plain vLLM",
        )
    right.axhline(1.0, color="black", linewidth=1)

    plain_number = FuncFormatter(lambda value, _: f"{value:g}")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(plain_number)
        axes.yaxis.set_major_formatter(plain_number)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("image tokens of the prompt")
        axes.grid(which="major", alpha=0.4)
        axes.grid(which="minor", alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    left.set_ylabel("time to the first token (s)")
    right.set_ylabel("speed-up against plain vLLM")
    machine, settings = document["machine"], document["settings"]
    figure.suptitle(
        "Known images in new order behind new text: median and range of "
        f"{min(cell.pairs for cell in warm)} pairs\n"
        f"{settings['model']}, {settings['dtype']}, {machine['cores']} cores of {machine['cpu']}",
        fontsize=11,
    )
    with replacing(path) as work:
        figure.savefig(work, dpi=150, format="png")
    plt.close(figure)


def write_reports(document: dict[str, Any], output: Path) -> list[Path]:
    """Write the table and the plot beside the JSON file; returns what was written."""
    page, picture = with_suffix(output, ".md"), with_suffix(output, ".png")
    write_text(page, make_markdown(document))
    plot(document, picture)
    return [page, picture]


# -- the command --------------------------------------------------------------------------------


def make_servers(model: Path, matrix: Matrix, args: argparse.Namespace) -> dict[str, VLLMServer]:
    """Both servers, alike but for the connector; neither is started."""
    # One step takes the longest prompt, and vLLM's encoder cache has room for as many tokens.
    tokens = -(-max(matrix.prompt_tokens, 4096) // 1024) * 1024
    server_args = [
        *("--dtype", args.dtype),
        *("--max-model-len", str(tokens)),
        *("--max-num-batched-tokens", str(tokens)),
        *("--max-num-seqs", "4"),
        *("--limit-mm-per-prompt", json.dumps({"image": max(matrix.images)})),
        "--skip-mm-profiling",
        "--enable-prefix-caching",
        *(() if args.compile else ("--enforce-eager",)),
    ]
    # By default vLLM's CPU backend keeps a core free, and one more for any connector.
    connectors = {
        "plain": None,
        "vlcache": {
            "cpu_bytes": args.cpu_bytes,
            "encoder_cpu_bytes": args.encoder_cpu_bytes,
            "break_even": False,  # what reuse takes is measured where it does not pay, too
        },
    }
    return {
        name: VLLMServer(
            model,
            connector=connector,
            extra_args=server_args,
            log_path=args.cache_dir / "logs" / f"bench-{name}.log",
            env={"VLLM_CPU_OMP_THREADS_BIND": cores()},
            timeout=args.start_timeout,
        )
        for name, connector in connectors.items()
    }


def run(console: Console, args: argparse.Namespace) -> None:
    """Measure and report."""
    matrix = args.matrix
    with console.status("Making the model"):
        model, model_name = model_of(args, args.arch)
    servers = make_servers(model, matrix, args)
    record = Record(
        with_suffix(args.output, ".json"),
        {
            **about_run(__file__, args.argv),
            "servers": {
                name: f"VLLM_CPU_OMP_THREADS_BIND={cores()} "
                + command_line(server.command(0)).replace("--port 0", "--port PORT")
                for name, server in servers.items()
            },
            "settings": {"model": model_name, "dtype": args.dtype, **asdict(matrix)},
        },
    )
    with contextlib.ExitStack() as stack:
        for name, server in servers.items():
            with console.status(f"{name}: starting") as status:

                def show(seconds: float, line: str, name: str = name, status: Any = status) -> None:
                    room = max(10, console.width - len(name) - 24)
                    status.update(
                        f"{name}: starting, {seconds:.0f} s [dim]{escape(line[:room])}[/]"
                    )

                server.on_progress = show
                stack.enter_context(server)
            console.print(
                f"{name}: ready after {server.start_seconds:.0f} s, log in {server.log_path}"
            )
        client = stack.enter_context(make_client(timeout=1800.0))
        progress = stack.enter_context(
            Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("pairs"),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.description}"),
                console=console,
                transient=True,
            )
        )
        task = progress.add_task("", total=matrix.count_pairs())

        def advance(what: str, done: int) -> None:
            progress.update(task, completed=done, description=what)

        Bench(
            client,
            servers,
            matrix,
            record,
            advance,
            pause=args.pause,
            seconds=60 * args.minutes,
            max_other_load=args.max_other_load,
        ).measure()
    report(console, record.document, args.output)


def report(console: Console, document: dict[str, Any], output: Path) -> None:
    """Write table and plot, and print what was aimed at."""
    written = write_reports(document, output)
    samples = samples_of(document)
    for line in _warm_table(make_cells(samples), repeats_of(samples)):
        console.print(line, soft_wrap=True)
    for what, measured, met in make_aims(make_cells(samples)):
        console.print(f"{'[green]met[/]   ' if met else '[red]missed[/]'} {what}: {measured}")
    names = [str(path) for path in (with_suffix(output, ".json"), *written)]
    console.print(f"Written: {', '.join(names)}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    try:
        if args.plot_only:
            path = with_suffix(args.output, ".json")
            report(console, read_document(path, SCHEMA, __file__), args.output)
        else:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, end_by_signal)
            run(console, args)
    except KeyboardInterrupt:
        print(
            f"interrupted; what was measured is in {with_suffix(args.output, '.json')}, "
            "--plot-only draws it",
            file=sys.stderr,
        )
        return 130
    except (ServerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure the time to the first token of plain vLLM and of vLLM with VLCache.",
    )
    parser.add_argument("--quick", action="store_true", help="a small matrix, about 3 minutes")
    add_output_options(parser, DEFAULT_OUTPUT)
    what = parser.add_argument_group("what is measured; without these, what --quick decides")
    what.add_argument("--sizes", type=int, nargs="+", metavar="PX", help="edges of the images")
    what.add_argument("--images", type=int, nargs="+", metavar="N", help="images in a prompt")
    what.add_argument("--ratios", type=float, nargs="+", metavar="R", help="recompute ratios")
    what.add_argument("--repetitions", type=int, metavar="N", help="pairs of a cell with images")
    what.add_argument("--text-repetitions", type=int, metavar="N", help="pairs of one without")
    what.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        metavar="M",
        help="time for the measurements (%(default)g); larger prompts come last",
    )
    what.add_argument(
        "--pause",
        type=float,
        default=PAUSE_SECONDS,
        metavar="SECONDS",
        help="pause before each request (%(default)g): vLLM's workers poll for a second after each",
    )
    what.add_argument(
        "--max-other-load",
        type=float,
        metavar="CORES",
        help="on a machine with other users: wait while other programs use more than this, and "
        "measure pairs again during which they did",
    )
    served = parser.add_argument_group("what is served")
    add_model_options(served)
    served.add_argument(
        "--arch",
        choices=[arch for arch in ARCHS if arch.startswith("qwen2")],
        default="qwen2_5_vl",
        help="architecture of the model that is made (%(default)s)",
    )
    served.add_argument(
        "--compile",
        action="store_true",
        help="let vLLM compile the model, in both servers; without it, --enforce-eager",
    )
    served.add_argument(
        "--cpu-bytes",
        default="1GiB",
        metavar="BYTES",
        help="VLCache's memory for KV of images (%(default)s)",
    )
    served.add_argument(
        "--encoder-cpu-bytes",
        default="256MiB",
        metavar="BYTES",
        help="VLCache's memory for encoder outputs (%(default)s)",
    )
    served.add_argument(
        "--start-timeout",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="how long a server may take until it is ready (%(default)g)",
    )
    args = parser.parse_args(argv)
    args.argv = list(argv)
    names = [field.name for field in fields(Matrix)]
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in chosen.items():
        if isinstance(value, list):
            chosen[name] = tuple(sorted(set(value)))
    args.matrix = replace(QUICK if args.quick else FULL, **chosen)
    for problem in _problems(args.matrix):
        parser.error(problem)
    if not args.minutes > 0.0:
        parser.error(f"--minutes {args.minutes}: must be above 0")
    if not 0.0 <= args.pause <= 60.0:
        parser.error(f"--pause {args.pause}: must be between 0 and 60")
    if args.max_other_load is not None and (args.max_other_load <= 0.0 or not args.pause):
        parser.error("--max-other-load must be above 0, and needs a --pause")
    for problem in model_problems(args):
        parser.error(problem)
    return args


def _problems(matrix: Matrix) -> Iterator[str]:
    largest = math.isqrt(MAX_PIXELS)
    for size in matrix.sizes:
        if size % CELL_PX or not 2 * CELL_PX <= size <= largest:
            yield f"--sizes {size}: must be a multiple of {CELL_PX}, {2 * CELL_PX} to {largest}"
    for images in matrix.images:
        if not 1 <= images <= MAX_IMAGES:
            yield f"--images {images}: must be between 1 and {MAX_IMAGES}"
    for ratio in matrix.ratios:
        if not 0.0 <= ratio <= 1.0:
            yield f"--ratios {ratio}: must be between 0 and 1"
    for name, value in (
        ("--repetitions", matrix.repetitions),
        ("--text-repetitions", matrix.text_repetitions),
    ):
        if value < 1:
            yield f"{name} {value}: must be at least 1"


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Measure what a request with an image costs before the engine sees it.

From the last byte of the request's body, sent after the server has read all others, to the moment
at which the engine's scheduler has planned the first step that computes it: reading the JSON,
base64, decoding, vLLM's processor, its hashes and caches, the way to the engine, and looking for
stored KV. Servers take turns, on the same bytes:

- plain: vLLM without VLCache
- off: VLCache with `lazy_decoding: false`
- on: VLCache

Known is an image that the server was asked about just before. Unknown is the same image with a few
bytes more behind its end, which no decoder reads: other bytes, the same work. The processor makes
small ones of all images (at most 256 tokens), so that the model takes little time; decoding does
not depend on it.

What looking up adds to an image that is not known is less than other programs on the machine let
see that way. It is measured in this process, as CPU time of one thread: recognising an image in its
file, against decoding it.

Results go to PREFIX.json and PREFIX.md.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import secrets
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results
from first_step import CLASS, PATH_VARIABLE, first_steps
from make_tiny_model import make_tiny_model
from PIL import Image
from results import Spread, with_range, with_suffix, write_text
from serving import ROOT, ServerError, VLLMServer, start_together

SCHEMA = 1
SIZES = {"4K": (3840, 2160), "1080p": (1920, 1080), "448 px": (448, 448)}
FORMATS: Mapping[str, Mapping[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 90},
    "WEBP": {"quality": 90, "method": 2},
}
"""Pillow's names of them, and options of its `save`."""
PICTURES = ("photo", "screen")
SYSTEMS: Mapping[str, Mapping[str, Any] | None] = {
    "plain": None,
    "off": {"lazy_decoding": False},
    "on": {},
}
"""By name, VLCache's options; None: without."""
MEMORY = {"cpu_bytes": "256MiB", "encoder_cpu_bytes": "64MiB"}
MAX_PIXELS = 256 * 28 * 28
SERVER_ARGS = (
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "2048"),
    *("--num-gpu-blocks-override", "64", "--scheduler-cls", CLASS),
    *("--mm-processor-kwargs", json.dumps({"max_pixels": MAX_PIXELS})),
)
SERVER_ENV = {
    "TORCHDYNAMO_DISABLE": "1",
    # The engine's process runs the model, as for one GPU.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "PYTHONPATH": str(ROOT / "scripts"),
}
SECONDS_TO_READ = 0.2
SECONDS_PER_BYTE = 1e-8
"""How long the server gets to read all of a body but its last byte."""


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        picture: one of `PICTURES`.
        size: one of `SIZES`.
        image_format: one of `FORMATS`.
        is_known: whether the server had been asked about the image before.
        system: one of `SYSTEMS`.
        repetition: number of the round.
        file_bytes: of the image's file.
        to_first_step: seconds from the body's last byte to the plan of the first step.
        to_answer: seconds from the body's last byte to the end of the answer, of one token.
    """

    picture: str
    size: str
    image_format: str
    is_known: bool
    system: str
    repetition: int
    file_bytes: int
    to_first_step: float
    to_answer: float


@dataclass(frozen=True)
class Lookup:
    """What recognising an image costs, and decoding it, in CPU seconds; medians."""

    picture: str
    size: str
    image_format: str
    lookup: float
    decode: float


@dataclass(frozen=True)
class Cell:
    """All requests of one kind.

    Attributes:
        seconds: to the first step, by system.
        ratios: a system's seconds in those of plain vLLM in the same round.
    """

    picture: str
    size: str
    image_format: str
    is_known: bool
    file_bytes: int
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]


def picture(kind: str, width: int, height: int) -> Image.Image:
    """A photo, of slowly changing colours under noise, or a screen, of areas and small signs."""
    random = np.random.default_rng(0)
    if kind == "photo":
        colours = random.integers(0, 256, (9, 16, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC), np.int16
        )
        noise = random.normal(0, 2, (height, width, 3)).round().astype(np.int16)
        return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))
    areas = random.integers(200, 256, (9, 16, 3), dtype=np.uint8)
    screen = np.array(Image.fromarray(areas).resize((width, height), Image.Resampling.NEAREST))
    signs = random.random((height // 12, width // 6, 12, 6)) < 0.3
    signs[:, :, 8:] = False  # between lines
    lines = signs.transpose(0, 2, 1, 3).reshape(height // 12 * 12, width // 6 * 6)
    screen[: lines.shape[0], : lines.shape[1]][lines] = 40
    return Image.fromarray(screen)


def file_of(image: Image.Image, image_format: str) -> bytes:
    """The image's file."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **FORMATS[image_format])
    return buffer.getvalue()


class Asker:
    """Sends requests to one server, one at a time.

    Args:
        server: it has to run.
        steps: the file that its scheduler writes to.
    """

    def __init__(self, server: VLLMServer, steps: Path) -> None:
        self._server = server
        self._steps = steps
        self._asked = 0

    def ask(self, data: bytes) -> tuple[float, float]:
        """Ask about an image: seconds to the first step and to the answer.

        Raises:
            ServerError: the request failed, or the engine was not seen to take it.
        """
        self._asked += 1
        url = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
        content = [
            {"type": "text", "text": f"Question {self._asked}: what is this?"},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        body = json.dumps(
            {
                "model": self._server.model,
                "messages": [{"role": "user", "content": content}],
                "max_completion_tokens": 1,
                "temperature": 0.0,
            }
        ).encode()
        before = len(first_steps(self._steps))
        started, answer = self._send(body)
        ended = time.monotonic()
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ServerError(f"{answer[-500:].decode(errors='replace')}\n{self._server.explain()}")
        new = first_steps(self._steps)[before:]
        if len(new) != 1:
            raise ServerError(f"the engine began {len(new)} requests instead of one")
        return new[0] - started, ended - started

    def _send(self, body: bytes) -> tuple[float, bytes]:
        """When the last byte was sent, and the response."""
        host, port = self._server.base_url.removeprefix("http://").split(":")
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port)), timeout=300) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(head.encode() + body[:-1])
            time.sleep(SECONDS_TO_READ + len(body) * SECONDS_PER_BYTE)
            started = time.monotonic()
            connection.sendall(body[-1:])
            answer = b""
            while piece := connection.recv(1 << 16):
                answer += piece
        return started, answer


@contextlib.contextmanager
def askers(folder: Path, model: Path, systems: Sequence[str]) -> Iterator[dict[str, Asker]]:
    """One server per system, as long as the block lasts.

    Raises:
        ServerError: one could not be started.
    """
    steps = {name: folder / f"{name}.steps" for name in systems}
    servers = {
        name: VLLMServer(
            model,
            connector=None if (options := SYSTEMS[name]) is None else {**MEMORY, **options},
            extra_args=SERVER_ARGS,
            log_path=folder / f"{name}.log",
            env=SERVER_ENV | {PATH_VARIABLE: str(steps[name])},
        )
        for name in systems
    }
    with start_together(servers) as failed:
        for error in failed.values():
            raise error
        yield {name: Asker(server, steps[name]) for name, server in servers.items()}


def measure(
    asking: Mapping[str, Asker], sizes: Sequence[str], repetitions: int
) -> Iterator[Sample]:
    """All kinds of requests, each to all systems in turn."""
    for kind in PICTURES:
        for size in sizes:
            image = picture(kind, *SIZES[size])
            for image_format in FORMATS:
                data = file_of(image, image_format)
                for asker in asking.values():
                    asker.ask(data)
                for repetition in range(repetitions):
                    for is_known in (True, False):
                        sent = data if is_known else data + secrets.token_bytes(8)
                        names = list(asking)
                        first = repetition % len(names)
                        for name in names[first:] + names[:first]:
                            seconds = asking[name].ask(sent)
                            about = (kind, size, image_format, is_known, name, repetition)
                            yield Sample(*about, len(data), *seconds)


def lookups(sizes: Sequence[str], repetitions: int) -> Iterator[Lookup]:
    """Look all pictures up among the known ones, and decode them as vLLM does."""
    # Of vLLM, which takes long to import.
    from vllm.multimodal.media import ImageMediaIO

    from vlcache_connector.media import SEEN

    vllms = ImageMediaIO()
    for kind in PICTURES:
        for size in sizes:
            image = picture(kind, *SIZES[size])
            for image_format in FORMATS:
                data = file_of(image, image_format)
                times = []
                for _ in range(repetitions):
                    started = time.thread_time()
                    SEEN.find(SEEN.key(data, vllms.image_mode, vllms.rgba_background_color))
                    looked_up = time.thread_time()
                    vllms.load_bytes(data)
                    times.append((looked_up - started, time.thread_time() - looked_up))
                yield Lookup(
                    kind, size, image_format, *map(statistics.median, zip(*times, strict=True))
                )


def cells_of(samples: Sequence[Sample]) -> list[Cell]:
    """What tables show: ratios are taken within rounds."""
    found = []
    systems = [name for name in SYSTEMS if any(sample.system == name for sample in samples)]
    kinds = dict.fromkeys((s.picture, s.size, s.image_format, s.is_known) for s in samples)
    for kind in kinds:
        rounds: dict[int, dict[str, float]] = {}
        for sample in samples:
            if (sample.picture, sample.size, sample.image_format, sample.is_known) == kind:
                rounds.setdefault(sample.repetition, {})[sample.system] = sample.to_first_step
                file_bytes = sample.file_bytes
        whole = [times for times in rounds.values() if len(times) == len(systems)]
        if whole:
            seconds = {name: Spread.of([times[name] for times in whole]) for name in systems}
            ratios = {
                name: Spread.of([times[name] / times["plain"] for times in whole])
                for name in systems
                if name != "plain"
            }
            found.append(Cell(*kind, file_bytes, seconds, ratios))
    return found


def markdown(document: Mapping[str, Any]) -> str:
    """The tables."""
    cells = cells_of([Sample(**entry) for entry in document["samples"]])
    machine = document["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    lines = [
        "# From the body's last byte to the engine's first step",
        "",
        f"- Command: `{document['command']}`; {results.duration(document)}",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores; {versions}",
        f"- Commit: {document['git']['commit']}"
        + (", with changes" if document["git"]["changed"] else ""),
        "",
        "Milliseconds, medians with ranges, and in those of plain vLLM in the same round: `on` is "
        "VLCache, `off` VLCache with `lazy_decoding: false`. Known images were asked about before; "
        "unknown ones have a few other bytes behind their end. The first step has been planned "
        "then: reading JSON and base64, decoding, processor, hashes, the way to the engine and "
        "the look-up of stored KV are in it, the model is not.",
    ]
    for is_known, title in ((True, "Known"), (False, "Unknown")):
        lines += ["", f"## {title} images", ""]
        if cells:
            columns = [*cells[0].seconds, *(f"{name} / plain" for name in cells[0].ratios)]
            lines.append(f"| picture | size | file | {' | '.join(columns)} |")
            lines.append(f"| --- | --- | --- |{' ---: |' * len(columns)}")
        for cell in cells:
            if cell.is_known == is_known:
                ms = [
                    with_range(Spread(*(1000 * value for value in vars(seconds).values())), ".1f")
                    for seconds in cell.seconds.values()
                ]
                ratios = [with_range(ratio, ".2f") for ratio in cell.ratios.values()]
                file = f"{cell.image_format}, {cell.file_bytes / 1e6:.2f} MB"
                lines.append(f"| {' | '.join((cell.picture, cell.size, file, *ms, *ratios))} |")
    lines += [
        "",
        "## Recognising an image",
        "",
        "CPU time of one thread: what an image that is not known costs more, and what it costs "
        "anyway.",
        "",
        "| picture | size | file | look up, ms | decode, ms | look up / decode |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for entry in document["lookups"]:
        found = Lookup(**entry)
        lines.append(
            f"| {found.picture} | {found.size} | {found.image_format} | {1000 * found.lookup:.3f} "
            f"| {1000 * found.decode:.1f} | {found.lookup / found.decode:.3f} |"
        )
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; what is there is written even if it ends early.

    Raises:
        ServerError: a server failed.
    """
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        **results.about_run(__file__, args.argv),
        "lookups": [asdict(found) for found in lookups(args.sizes, args.repetitions)],
        "samples": [],
    }
    model = make_tiny_model(args.cache_dir / "models" / "qwen2_5_vl-tiny", arch="qwen2_5_vl")
    try:
        with (
            tempfile.TemporaryDirectory(dir=args.cache_dir, prefix="media-") as folder,
            askers(Path(folder), model, args.systems) as asking,
        ):
            for sample in measure(asking, args.sizes, args.repetitions):
                document["samples"].append(asdict(sample))
        document["complete"] = True
    finally:
        document["finished"] = results.timestamp()
        write_text(with_suffix(args.output, ".json"), json.dumps(document, indent=1) + "\n")
        write_text(with_suffix(args.output, ".md"), markdown(document))
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="(all)")
    add("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the images (all)")
    add("--repetitions", type=int, default=9, help="of each request (%(default)s)")
    add("--output", type=Path, default=ROOT / "configs" / "results" / "media", metavar="PREFIX")
    add("--cache-dir", type=Path, default=ROOT / ".cache", metavar="DIR")
    args = parser.parse_args(arguments)
    args.argv = list(arguments)
    if "plain" not in args.systems:
        parser.error(f"--systems {' '.join(args.systems)}: plain must be among them")
    if args.repetitions < 1:
        parser.error("--repetitions must be above 0")
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, results.end_by_signal)
    try:
        print(markdown(run(args)), end="")
    except KeyboardInterrupt:
        return 130
    except (ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

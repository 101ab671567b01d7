#!/usr/bin/env python
"""Serve one model twice, by plain vLLM and with VLCache, and compare them over the OpenAI API.

Both servers get the same requests, one at a time: two images nobody has seen before, then requests
that bring these images back in another order, behind other text, twice, beside a new one. Plain
vLLM has its prefix cache and its encoder cache turned on, and the latter is large enough to keep
every image of the demo.

Each request is sent in several variants of the same shape, which differ in a number at the very
beginning of the prompt. So none of them finds its own earlier variant in the prefix cache, and

- the time to the first token is the best one of the streamed variants,
- reused and recomputed tokens come from one more variant that is not streamed, because vLLM's
  streamed answers don't carry the connector's figures,
- with `recompute_ratio` 1.0, where VLCache computes all of the images' tokens anew, every variant
  must have plain vLLM's first token: the check that the machinery is exact. With a small ratio the
  first token of a model with random weights often is another one; trained models differ less.

Exit status: 0 when known images were reused, the first tokens agreed where they must, and big
requests with known images were faster than with plain vLLM; 1 when not, or when a server or a
request failed; 2 for a wrong command line; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from make_tiny_model import ARCHS, SIZES, make_tiny_model
from results import end_by_signal
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from serving import (
    CELL_PX,
    ROOT,
    Answer,
    Part,
    ServerError,
    VLLMServer,
    chat,
    chat_stream,
    image_part,
    make_client,
    make_image,
    text_part,
)

IMAGE_PX = {"tiny": 336, "bench": 896}
MAX_MODEL_LEN = 8192
CONTROL_TOLERANCE = 1.25
BIG_PROMPT_TOKENS = 1000
"""From this length on, requests with known images have to be faster than with plain vLLM."""
MIN_BATCHED_TOKENS = 8192
WARM_UP_SEED = 1
NEW_IMAGE_SEED = 1000
EXACT = {"vlcache": {"recompute_ratio": 1.0}}
SMALL_MODEL_MEMORY = {"cpu_bytes": "512MiB", "encoder_cpu_bytes": "256MiB"}
"""Host memory for VLCache: plenty for the models made here. The default is for real ones."""

LONG_TEXT = (
    "The document is a letter from a school to the parents. It says that the summer holidays start "
    "one week earlier than last year, and that every child should return the books before then. "
    "The bridge is closed between the station and the market until the end of the month, so the "
    "bus stops in front of the shop, next to the wall with the two white windows. "
)


# -- the requests -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: as printed.
        prompt: the content behind the variant's number, made of the images that are new in it.
        new_images: how many images a variant brings that no other request has.
        warm: whether it brings known images.
    """

    name: str
    prompt: Callable[[Sequence[Part]], list[Part]]
    new_images: int = 0
    warm: bool = True

    def content(self, number: int, variant: int, image_px: int) -> list[Part]:
        """The content of one variant; `number` tells cases apart."""
        first_seed = NEW_IMAGE_SEED + 100 * number + 10 * variant
        new = [image_part(make_image(first_seed + i, image_px)) for i in range(self.new_images)]
        return [text_part(f"Request {number}{variant:02}. "), *self.prompt(new)]


def make_cases(image_px: int) -> list[Case]:
    """The requests, in the order they are sent; the first one makes its images known."""
    a, b = (image_part(make_image(NEW_IMAGE_SEED + i, image_px)) for i in range(2))
    text = text_part
    return [
        Case(
            "two new images (cold)",
            lambda new: [text("Look at this: "), new[0], text(" and "), new[1], text("Compare.")],
            new_images=2,
            warm=False,
        ),
        Case(
            "the same two, new order, new text",
            lambda _: [
                text("List the differences between the first image "),
                b,
                text(" and the second image "),
                a,
                text(" in a few words."),
            ],
        ),
        Case(
            "one of them behind other text",
            lambda _: [text(LONG_TEXT), a, text("Which colour is the largest object?")],
        ),
        Case(
            "one of them twice",
            lambda _: [text("Are "), b, text(" and "), b, text(" the same picture?")],
        ),
        Case(
            "three images, the middle one new",
            lambda new: [
                text("Three pictures: "),
                b,
                new[0],
                a,
                text("How many people are there?"),
            ],
            new_images=1,
        ),
        Case(
            "text only",
            lambda _: [text(LONG_TEXT + "When do the summer holidays start?")],
            warm=False,
        ),
    ]


# -- what came back -----------------------------------------------------------------------------


@dataclass
class Result:
    """What one server answered to one case."""

    streamed: list[Answer] = field(default_factory=list)
    """All variants but the last one."""
    whole: list[Answer] = field(default_factory=list)
    """The last variant, not streamed."""
    exact: list[Answer] = field(default_factory=list)
    """All variants again, with everything recomputed."""

    @property
    def answers(self) -> list[Answer]:
        """All variants."""
        return self.streamed + self.whole

    @property
    def ttft(self) -> float:
        """Best time to the first token, in seconds: what else the machine does only adds to it."""
        return min(a.ttft for a in self.streamed if a.ttft is not None)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.whole[0].prompt_tokens

    def figure(self, name: str) -> int:
        """One of VLCache's figures; 0 where it had nothing to do."""
        params = self.whole[0].kv_transfer_params or {}
        return int(params.get("vlcache", {}).get(name, 0))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: Case
    vlcache: Result
    plain: Result

    @property
    def speed_up(self) -> float:
        """How many times sooner VLCache's first token comes."""
        return self.plain.ttft / self.vlcache.ttft

    @property
    def is_big(self) -> bool:
        """Whether the times say something."""
        return self.case.warm and self.vlcache.prompt_tokens >= BIG_PROMPT_TOKENS

    def same(self, answers: Sequence[Answer]) -> tuple[int, int]:
        """How many of `answers`, and of how many, have plain vLLM's first token."""
        pairs = zip(answers, self.plain.answers, strict=True)
        return sum(mine.first_token == theirs.first_token for mine, theirs in pairs), len(answers)

    def logprob_difference(self) -> float:
        """Largest difference to plain vLLM's top logprobs where VLCache has to be exact."""
        answers = self.vlcache.exact if self.case.warm else self.vlcache.answers
        return max(
            abs(logprob - theirs.first_logprobs[token])
            for mine, theirs in zip(answers, self.plain.answers, strict=True)
            for token, logprob in mine.first_logprobs.items()
            if token in theirs.first_logprobs
        )

    def as_json(self) -> dict[str, Any]:
        """The figures of the line."""
        return {
            "request": self.case.name,
            "warm": self.case.warm,
            "prompt_tokens": self.vlcache.prompt_tokens,
            "reused_tokens": self.vlcache.figure("reused_tokens"),
            "recomputed_tokens": self.vlcache.figure("recomputed_tokens"),
            "ttft_vlcache_seconds": self.vlcache.ttft,
            "ttft_vllm_seconds": self.plain.ttft,
            "speed_up": self.speed_up,
            "same_first_token": self.same(self.vlcache.answers),
            "same_first_token_at_ratio_1": self.same(self.vlcache.exact)
            if self.case.warm
            else None,
            "largest_logprob_difference_when_exact": self.logprob_difference(),
        }


# -- sending ------------------------------------------------------------------------------------


def ask_everything(
    client: httpx.Client,
    server: VLLMServer,
    cases: Sequence[Case],
    *,
    variants: int,
    image_px: int,
    with_exact: bool,
    advance: Callable[[str], None],
) -> list[Result]:
    """Send all requests to one server, one after the other.

    Args:
        variants: streamed variants of each case; one more is not streamed.
        with_exact: send known images once more with everything recomputed.
        advance: called before each request.
    """
    image = image_part(make_image(WARM_UP_SEED, image_px))
    for greeting in ("Hello. ", "Good morning. "):
        advance("warm-up")
        chat_stream(client, server, [text_part(greeting), image, text_part("What is this?")])
    results = []
    for number, case in enumerate(cases):
        contents = [case.content(number, variant, image_px) for variant in range(variants + 1)]
        result = Result()
        for content in contents[:-1]:
            advance(case.name)
            result.streamed.append(chat_stream(client, server, content))
        advance(case.name)
        result.whole.append(chat(client, server, contents[-1]))
        if with_exact and case.warm:
            for content in contents:
                advance(f"{case.name}, all recomputed")
                result.exact.append(chat(client, server, content, kv_transfer_params=EXACT))
        results.append(result)
    return results


def count_requests(cases: Sequence[Case], variants: int, with_exact: bool) -> int:
    """How often `ask_everything` calls `advance`."""
    return 2 + sum((variants + 1) * (2 if with_exact and case.warm else 1) for case in cases)


def serve_and_ask(
    console: Console,
    name: str,
    server: VLLMServer,
    cases: Sequence[Case],
    *,
    variants: int,
    image_px: int,
    with_exact: bool,
) -> list[Result]:
    """Start `server`, send all requests to it and end it."""
    with contextlib.ExitStack() as stack:
        with console.status(f"{name}: starting") as status:

            def show(seconds: float, line: str) -> None:
                room = max(10, console.width - len(name) - 24)
                status.update(f"{name}: starting, {seconds:.0f} s [dim]{escape(line[:room])}[/]")

            server.on_progress = show
            stack.enter_context(server)
        console.print(
            f"{name}: ready after {server.start_seconds:.0f} s, log in {server.log_path}",
            soft_wrap=True,
        )
        client = stack.enter_context(make_client())
        with Progress(
            TextColumn(f"{name}:"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as progress:
            task = progress.add_task("", total=count_requests(cases, variants, with_exact))
            sent = 0

            def advance(what: str) -> None:
                nonlocal sent
                progress.update(task, completed=sent, description=what)
                sent += 1

            results = ask_everything(
                client,
                server,
                cases,
                variants=variants,
                image_px=image_px,
                with_exact=with_exact,
                advance=advance,
            )
        console.print(f"{name}: {sent} requests answered")
        with console.status(f"{name}: ending"):
            stack.close()
    return results


# -- what is printed ----------------------------------------------------------------------------


def make_table(rows: Sequence[Row], ratio: float) -> Table:
    """The comparison."""
    table = Table(title="VLCache and plain vLLM, time to the first token (TTFT)")
    table.add_column("Request")
    for heading in (
        "Prompt\ntokens",
        "Reused",
        "Recom-\nputed",
        "TTFT\nVLCache",
        "TTFT\nplain vLLM",
        "Speed-up",
        f"Same 1st token\nratio {ratio:g}",
        "Same 1st token\nratio 1",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        mine = row.vlcache
        table.add_row(
            row.case.name,
            str(mine.prompt_tokens),
            str(mine.figure("reused_tokens")),
            str(mine.figure("recomputed_tokens")),
            f"{mine.ttft:.3f} s",
            f"{row.plain.ttft:.3f} s",
            f"{row.speed_up:.1f} x",
            _of(row.same(mine.answers)),
            _of(row.same(mine.exact)) if row.case.warm else "-",
        )
    return table


def make_checks(rows: Sequence[Row]) -> list[tuple[bool, str]]:
    """What has to hold, and whether it does."""
    warm = [row for row in rows if row.case.warm]
    other = [row for row in rows if not row.case.warm]
    big = [row for row in rows if row.is_big]
    checks = [
        (
            all(row.vlcache.figure("reused_tokens") > 0 for row in warm),
            "every request with known images reused tokens",
        ),
        (
            all(row.same(row.vlcache.exact)[0] == len(row.vlcache.exact) for row in warm),
            "with everything recomputed (ratio 1) the first tokens are those of plain vLLM",
        ),
        (
            all(row.same(row.vlcache.answers)[0] == len(row.vlcache.answers) for row in other),
            "without known images the first tokens are those of plain vLLM",
        ),
    ]
    if big:
        checks.append(
            (
                all(row.speed_up > 1 for row in big),
                f"requests with known images and {BIG_PROMPT_TOKENS} tokens or more are faster",
            )
        )
    return checks


def make_note(rows: Sequence[Row]) -> str | None:
    """What to say when the times can't be compared well; None when they can.

    Where there is nothing to reuse both servers do the same work: these requests are the control.
    """
    control = [row.speed_up for row in rows if not row.case.warm]
    if all(1 / CONTROL_TOLERANCE < speed_up < CONTROL_TOLERANCE for speed_up in control):
        return None
    factors = " and ".join(f"{speed_up:.1f} x" for speed_up in control)
    return (
        "requests without known images are the control, their speed-up should be 1.0 x and is "
        f"{factors} here. Most likely other programs kept the machine busy for part of the time: "
        "take the times with as much care."
    )


def _of(count: tuple[int, int]) -> str:
    return f"{count[0]} of {count[1]}"


# -- the command --------------------------------------------------------------------------------


def run(console: Console, args: argparse.Namespace) -> int:
    """Make the model, serve it twice, print the comparison; returns the exit status."""
    model = args.model
    if model is None:
        name = f"{args.arch}-{args.size}-float32"
        with console.status(f"Making the model {name}"):
            model = make_tiny_model(
                args.cache_dir / "models" / name, arch=args.arch, size=args.size, dtype="float32"
            )
    image_px = args.image_px or IMAGE_PX[args.size]
    cases = make_cases(image_px)
    num_images = 1 + sum(case.new_images for case in cases) * (args.variants + 1)
    # vLLM's encoder cache has room for one batch: let plain vLLM keep every image.
    image_tokens = num_images * (image_px // CELL_PX) ** 2
    server_args = [
        *("--dtype", "float32" if args.model is None else "auto"),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--max-num-batched-tokens", str(max(MIN_BATCHED_TOKENS, image_tokens))),
        *("--max-num-seqs", "8"),
        *("--limit-mm-per-prompt", '{"image": 3}'),
        "--skip-mm-profiling",
        "--enable-prefix-caching",
        "--enforce-eager",
    ]

    def server(log_name: str, connector: dict[str, Any] | None) -> VLLMServer:
        return VLLMServer(
            model,
            connector=connector,
            extra_args=server_args,
            log_path=args.cache_dir / "logs" / f"{log_name}.log",
            # The models run eagerly; compiling the gathering of log-probs would take seconds.
            env={"TORCHDYNAMO_DISABLE": "1"},
            timeout=args.start_timeout,
        )

    options: dict[str, Any] = {"variants": args.variants, "image_px": image_px}
    plain_server = server("demo-plain", None)
    # A tiny model computes as fast as it loads; what is shown is what reuse does.
    connector: dict[str, Any] = {"recompute_ratio": args.recompute_ratio, "break_even": False}
    if args.model is None:
        connector |= SMALL_MODEL_MEMORY
    vlcache_server = server("demo-vlcache", connector)
    in_both = set(plain_server.command(0))
    switch = shlex.join(arg for arg in vlcache_server.command(0) if arg not in in_both)
    console.print(f"Model {model}, images of {image_px} x {image_px} px", soft_wrap=True)
    console.print(f"VLCache is turned on by {escape(switch)}", soft_wrap=True)
    plain = serve_and_ask(console, "plain vLLM", plain_server, cases, with_exact=False, **options)
    mine = serve_and_ask(console, "VLCache", vlcache_server, cases, with_exact=True, **options)
    rows = [Row(*entry) for entry in zip(cases, mine, plain, strict=True)]
    console.print()
    console.print(make_table(rows, args.recompute_ratio))
    console.print(
        f"TTFT: best of {args.variants}; largest difference of the first token's top logprobs "
        f"where VLCache has to be exact: {max(row.logprob_difference() for row in rows):.1e}"
    )
    note = make_note(rows)
    if note is not None:
        console.print(f"[yellow]note[/]    {note}")
    checks = make_checks(rows)
    for holds, what in checks:
        console.print(f"[green]ok[/]      {what}" if holds else f"[red]FAILED[/]  {what}")
    if args.json is not None:
        figures = {
            "recompute_ratio": args.recompute_ratio,
            "rows": [row.as_json() for row in rows],
            "note": note,
            "checks": [{"holds": holds, "what": what} for holds, what in checks],
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(holds for holds, _ in checks) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_by_signal)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 136)
    try:
        return run(console, args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ServerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare VLCache with plain vLLM over the OpenAI API, on a small model.",
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="bench",
        help="size of the model that is made (%(default)s)",
    )
    parser.add_argument(
        "--arch",
        choices=[arch for arch in ARCHS if arch.startswith("qwen")],
        default="qwen2_5_vl",
        help="architecture of the model that is made (%(default)s)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a checkpoint to serve instead, in its own precision",
    )
    parser.add_argument(
        "--recompute-ratio",
        type=float,
        default=0.05,
        metavar="RATIO",
        help="share of a known image's tokens that VLCache computes anew (%(default)s)",
    )
    parser.add_argument(
        "--variants",
        type=int,
        default=2,
        metavar="N",
        help="streamed variants of each request: the best time counts (%(default)s)",
    )
    parser.add_argument(
        "--image-px",
        type=int,
        metavar="PX",
        help=f"edge of the images, a multiple of {CELL_PX} "
        f"({IMAGE_PX['bench']}; {IMAGE_PX['tiny']} with --size tiny)",
    )
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="how long a server may take until it is ready (%(default)g)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=ROOT / ".cache",
        metavar="DIR",
        help="where models and logs are kept (%(default)s)",
    )
    args = parser.parse_args(argv)
    if not 0.0 <= args.recompute_ratio <= 1.0:
        parser.error(f"--recompute-ratio {args.recompute_ratio}: must be between 0 and 1")
    if not 1 <= args.variants <= 9:
        parser.error(f"--variants {args.variants}: must be between 1 and 9")
    if args.image_px is not None and (args.image_px < CELL_PX or args.image_px % CELL_PX):
        parser.error(f"--image-px {args.image_px}: must be a positive multiple of {CELL_PX}")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: there is no config.json in it")
    return args


if __name__ == "__main__":
    sys.exit(main())

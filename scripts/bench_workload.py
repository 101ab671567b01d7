#!/usr/bin/env python
"""Run workloads with recurring images through `vllm bench serve`: VLCache and its alternatives.

Workloads (no image occurs in two of them):

- "window": users with turns. A prompt has the user's last images: with each turn one leaves, one is
  new, and all others have moved.
- "documents": questions about documents. A prompt has all pages of one, in another order each time.
- "repeat R %": prompts in which R % of the images are known, from a pool shown before.

Each prompt begins with a number of its own, so that prefix caching alone can't serve it, and no
image is ever where it was before: it follows more or fewer images, or other text (`shifted`).

Systems, each in a server of its own, which takes about 3 GiB: only some are alive at a time. They
get each workload one after the other, from empty caches:

- "plain": vLLM with its prefix cache and its encoder cache. It has its turn with every group of the
  others. Their TTFT is compared to that one, and "plain-2" and so on are the control for agreement.
- "ec": plus vLLM's own encoder-cache connector. It is `ECExampleConnector` (files), because
  `ECCPUConnector` needs Model Runner V2, and that needs Triton.
- "lmcache": plus LMCache's connector, prefix caching in host memory. It is `LMCacheMPConnector`,
  with a server of its own: `LMCacheConnectorV1` (0.5.6) logs "No supported cpu connector found" on
  a CPU, and from then on stores nothing.
- "vlcache-device", "-cpu", "-disk", "-redis": plus VLCache. Where segments are to come from disk or
  Redis, host memory has room for little more than the images of the prompts under way; otherwise
  for all. "Reused from" tells where they did come from.

A peer that can't be started, or doesn't even serve the same prompt again, is named with the reason.

The dataset is `custom_image` (`vllm/benchmarks/datasets/datasets.py`). Of rows with "prompt" and
"image_files", vLLM makes one text with all images behind it (`openai-chat`). Rows with "content"
are sent as they are, text and images interleaved: those are written here, all users' first turns
first. They are sent in this order (`--disable-shuffle`), each as soon as fewer than
`--max-concurrency` are under way, with images as data URLs. Each run of the client is a process of
its own, forked from one that has imported vLLM.

TTFT and requests/s are the client's. Tokens are those of the servers' `/metrics`: "computed" are
`vllm:prompt_tokens` less `vllm:prompt_tokens_cached`, everything that went through the language
model to fill KV. Tokens that VLCache recomputes are not cached ones. "Agreement" is the share of
answers (greedy) that are the very text of plain vLLM's. On random weights it tells how far reuse
moves logits, not how good answers are.

Results go to PREFIX.json (each run with every TTFT and text), PREFIX.md and PREFIX.png.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import results
from bench_ttft import BEHIND, IN_FRONT, TEXT_TOKENS
from local_redis import LocalRedis, RedisError, find_server, free_port
from options import add_model_options, add_output_options, model_of, model_problems
from results import with_suffix, write_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from serving import (
    CELL_PX,
    ROOT,
    SERVER_ENV,
    Part,
    ServerError,
    VLLMServer,
    chat,
    counters,
    image_part,
    make_client,
    make_image,
    reset_caches,
    start_together,
    text_part,
)

SCHEMA = 1
DEFAULT_OUTPUT = ROOT / "configs" / "results" / "workload_cpu"
PEERS = ("ec", "lmcache")
VLCACHE = ("vlcache-cpu", "vlcache-device", "vlcache-disk", "vlcache-redis")
SYSTEMS = ("plain", *PEERS, *VLCACHE)
WORKLOADS = ("window", "documents", "repeat")
SCALE_HELP = {
    "users": "window: how many users",
    "turns": "window: of each user",
    "images": "window and repeat: images in a prompt",
    "documents": "documents: how many",
    "pages": "documents: pages of each, all of them in a prompt",
    "questions": "documents: how many in all",
    "requests": "repeat: prompts of each rate",
}
PERCENTILES = (50, 95, 99)
FILLER = "The bridge is closed. "
BETWEEN, SEEDS_APART = ", ", 1_000_000
ROOM = 1.3
"""Memory that images get, in what they need."""
START_SECONDS = 900.0


class BenchError(RuntimeError):
    """What was measured is not what it should be."""


# -- workloads ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How much is asked; `images` are those of a prompt, but for documents, which have `pages`."""

    users: int = 2
    turns: int = 4
    images: int = 5
    documents: int = 2
    pages: int = 4
    questions: int = 4
    rates: tuple[int, ...] = (0, 25, 50, 80, 100)
    requests: int = 4

    @property
    def most_images(self) -> int:
        """Of a prompt."""
        return max(self.images, self.pages)


@dataclass(frozen=True)
class Prompt:
    """A prompt: seeds of its images in their order, and how much text is in front of them."""

    images: tuple[int, ...]
    fillers: int


@dataclass(frozen=True)
class Workload:
    """What is asked, and what is shown before that and not measured."""

    name: str
    prompts: tuple[Prompt, ...]
    primed: tuple[Prompt, ...] = ()
    rate: int | None = None

    @property
    def repeated(self) -> float:
        """Share of the measured prompts' images that were shown before."""
        shown = {image for prompt in self.primed for image in prompt.images}
        repeats = []
        for prompt in self.prompts:
            repeats += [image in shown for image in prompt.images]
            shown.update(prompt.images)
        return sum(repeats) / len(repeats)


def shifted(orders: Iterable[Sequence[int]]) -> tuple[Prompt, ...]:
    """Prompts in which each image is at a place where it never was in those before."""
    seen: set[tuple[int, int, int]] = set()
    prompts = []
    for number, images in enumerate(orders):
        for fillers in itertools.count(number % 3):
            places = {(image, slot, fillers) for slot, image in enumerate(images)}
            if not places & seen:
                break
        seen |= places
        prompts.append(Prompt(tuple(images), fillers))
    return tuple(prompts)


def make_workloads(scale: Scale) -> list[Workload]:
    """All workloads, the same for the same scale."""
    seeds = itertools.count(SEEDS_APART, SEEDS_APART)
    first = next(seeds)
    windows = [
        [first + user * (scale.images + scale.turns) + turn + slot for slot in range(scale.images)]
        for turn in range(scale.turns)
        for user in range(scale.users)
    ]
    first = next(seeds)
    questions = []
    for number in range(scale.questions):
        start = first + number % scale.documents * scale.pages
        pages = list(range(start, start + scale.pages))
        questions.append(random.Random(number).sample(pages, len(pages)))
    workloads = [
        Workload("window", shifted(windows)),
        Workload("documents", shifted(questions)),
    ]
    return workloads + [_repeats(rate, scale, next(seeds)) for rate in scale.rates]


def _repeats(rate: int, scale: Scale, first: int) -> Workload:
    """Prompts with known images, evenly spread; the pool has those of two prompts."""
    size = scale.images
    known = [[first + 2 * i + half for i in range(size)] for half in (0, 1)]
    pool = itertools.cycle(known[0] + known[1])
    new = itertools.count(first + 2 * size)
    slots = scale.requests * size
    repeats = round(rate * slots / 100)
    orders = []
    for number in range(scale.requests):
        images = []
        for slot in range(number * size, (number + 1) * size):
            is_known = (slot + 1) * repeats // slots > slot * repeats // slots
            images.append(next(pool) if is_known else next(new))
        random.Random(f"{rate} {number}").shuffle(images)
        orders.append(images)
    primed, prompts = (p := shifted([*known, *orders]))[: len(known)], p[len(known) :]
    return Workload(f"repeat {rate} %", prompts, primed, rate)


def content(prompt: Prompt, number: int, show: Callable[[int], Part]) -> list[Part]:
    """A prompt as content of a chat; `show` makes that of an image."""
    front = f"Request {number:06}. {FILLER * prompt.fillers}{IN_FRONT}"
    parts = [text_part(front)]
    for slot, image in enumerate(prompt.images):
        parts += [text_part(BETWEEN)] * (slot > 0) + [show(image)]
    return [*parts, text_part(BEHIND)]


def write_dataset(workload: Workload, folder: Path, image_px: int) -> Path:
    """Write images, and a JSONL file for `--dataset-name custom_image`; returns its path."""

    def show(seed: int) -> Part:
        path = folder / f"{seed}.png"
        if not path.exists():
            make_image(seed, image_px).save(path)
        return {"type": "image", "image": str(path)}

    first = len(workload.primed)
    rows = [{"content": content(p, i, show)} for i, p in enumerate(workload.prompts, first)]
    path = folder / f"{workload.name.replace(' ', '_').replace('%', 'percent')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- systems ------------------------------------------------------------------------------------


def make_servers(
    model: Path,
    args: argparse.Namespace,
    workloads: Sequence[Workload],
    folder: Path,
    redis_url: str | None,
) -> dict[str, VLLMServer]:
    """One server for each system, alike but for its connector; none is started."""
    image_tokens = (args.image_px // CELL_PX) ** 2
    tokens = args.scale.most_images * image_tokens + TEXT_TOKENS
    tokens = -(-max(tokens, 2048) // 1024) * 1024
    shared = [
        *("--dtype", args.dtype, "--max-model-len", str(tokens)),
        *("--max-num-batched-tokens", str(2 * tokens)),
        *("--max-num-seqs", str(max(4, args.concurrency))),
        *("--limit-mm-per-prompt", json.dumps({"image": args.scale.most_images, "video": 0})),
        *("--skip-mm-profiling", "--enable-prefix-caching", "--enforce-eager"),
    ]
    under_way = args.scale.most_images * args.concurrency
    in_all = max(map(_count_images, workloads))
    kv, rows = (ROOM * image_tokens * n for n in _bytes_per_token(model, args.dtype))
    connector: dict[str, Any] = {"break_even": False} if args.always_reuse else {}
    ample = connector | {"cpu_bytes": int(in_all * kv), "encoder_cpu_bytes": int(in_all * rows)}
    small = connector | {
        "cpu_bytes": int(under_way * kv),
        "encoder_cpu_bytes": int(under_way * rows),
        "write_queue_bytes": int(under_way * (kv + rows)),
    }
    vlcache: dict[str, dict[str, Any]] = {
        "vlcache-device": ample | {"device_bytes": ample["cpu_bytes"]},
        "vlcache-cpu": ample,
        "vlcache-disk": small | {"disk_path": str(folder / "disk")},
        "vlcache-redis": small | {"redis_url": redis_url},
    }
    (folder / "ec").mkdir()
    ec = {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_both",
        "ec_connector_extra_config": {"shared_storage_path": str(folder / "ec")},
    }
    # The server's default is another way of moving KV than a CPU worker's.
    lmcache = {
        "lmcache.mp.host": "tcp://127.0.0.1",
        "lmcache.mp.port": free_port(),
        "lmcache.mp.autostart": True,
        "lmcache.mp.autostart.wait_timeout": START_SECONDS,
        "lmcache.mp.autostart.server_args": "--l1-size-gb 1 --eviction-policy LRU "
        f"--chunk-size 128 --supported-transfer-mode auto --http-port {free_port()}",
    }
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": lmcache,
    }
    extra = {
        "ec": ["--ec-transfer-config", json.dumps(ec)],
        "lmcache": ["--kv-transfer-config", json.dumps(transfer)],
    }
    return {
        name: VLLMServer(
            model,
            connector=vlcache.get(name),
            extra_args=[*shared, *extra.get(name, [])],
            log_path=args.cache_dir / "logs" / f"workload-{name}.log",
            env={
                "VLLM_CPU_OMP_THREADS_BIND": results.cores(),
                "VLLM_SERVER_DEV_MODE": "1",  # endpoints that reset caches
                "LMCACHE_DISABLE_BANNER": "1",
            },
            timeout=START_SECONDS,
        )
        for name in args.systems
    }


def _count_images(workload: Workload) -> int:
    prompts = workload.primed + workload.prompts
    return len({image for prompt in prompts for image in prompt.images})


def _bytes_per_token(model: Path, dtype: str) -> tuple[int, int]:
    """Of KV, and of a row of the encoder's output."""
    element = 4 if dtype == "float32" else 2
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    head_dim = text.get("head_dim") or hidden // heads
    kv = text["num_hidden_layers"] * 2 * text.get("num_key_value_heads", heads) * head_dim
    return kv * element, hidden * element


def check_cache(
    client: httpx.Client, server: VLLMServer, name: str, images: int, image_px: int
) -> None:
    """Warm a server up; its KV connector has to serve a prompt that comes again.

    Raises:
        BenchError: it doesn't.
    """
    prompt = Prompt(tuple(range(images)), 0)
    parts = content(prompt, 0, lambda seed: image_part(make_image(seed, image_px)))
    before = counters(client, server)
    for _ in range(2):
        reset_caches(client, server, connector=False)
        chat(client, server, parts, max_tokens=2)
    hits = (counters(client, server) - before)["vllm:external_prefix_cache_hits_total"]
    if name not in ("plain", "ec") and not hits:
        raise BenchError("its cache does not even serve the same prompt again")


# -- measuring ----------------------------------------------------------------------------------


def _vllm(arguments: Sequence[str], log: str) -> None:
    """Runs in a process of its own: the command `vllm`."""
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *arguments]
    main()


class Client:
    """`vllm bench serve`, each time in a new process that need not import vLLM first."""

    def __init__(self, model: Path, log: Path, output_tokens: int, concurrency: int) -> None:
        self._model, self._log = model, log
        self._output_tokens, self._concurrency = output_tokens, concurrency
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["vllm.entrypoints.cli.main", "vllm.benchmarks.serve"])
        os.environ.update(SERVER_ENV, NO_PROXY="127.0.0.1")  # the forkserver inherits them
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)

    def arguments(self, server: VLLMServer, dataset: Path, prompts: int) -> list[str]:
        """Of `vllm`."""
        return [
            *("bench", "serve", "--backend", "openai-chat", "--base-url", server.base_url),
            *("--endpoint", "/v1/chat/completions", "--model", str(self._model)),
            *("--served-model-name", server.model, "--dataset-name", "custom_image"),
            *("--dataset-path", str(dataset), "--num-prompts", str(prompts)),
            *("--disable-shuffle", "--no-oversample", "--custom-ensure-client-side-data"),
            *("--custom-output-len", str(self._output_tokens), "--temperature", "0"),
            *("--max-concurrency", str(self._concurrency), "--disable-tqdm"),
            *("--percentile-metrics", "ttft"),
            *("--metric-percentiles", ",".join(map(str, PERCENTILES))),
            *("--save-result", "--save-detailed", "--result-dir", str(dataset.parent)),
            *("--result-filename", "result.json"),
        ]

    def run(self, server: VLLMServer, dataset: Path, prompts: int) -> dict[str, Any]:
        """Send a dataset; returns what the client wrote.

        Raises:
            BenchError: it failed, or a request did.
        """
        result = dataset.parent / "result.json"
        result.unlink(missing_ok=True)
        arguments = self.arguments(server, dataset, prompts)
        process = self._context.Process(target=_vllm, args=(arguments, str(self._log)), daemon=True)
        process.start()
        process.join()
        if process.exitcode or not result.exists():
            server.raise_if_dead()
            raise BenchError(f"vllm bench serve ended with {process.exitcode}, see {self._log}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if found["completed"] != prompts:
            errors = [error for error in found["errors"] if error]
            raise BenchError(f"{prompts - found['completed']} requests failed: {errors[:1]}")
        return found


def measure(
    http: httpx.Client,
    client: Client,
    server: VLLMServer,
    workload: Workload,
    dataset: Path,
    image_px: int,
) -> dict[str, Any]:
    """One workload on one system, from empty caches."""
    reset_caches(http, server)
    for number, prompt in enumerate(workload.primed):
        parts = content(prompt, number, lambda seed: image_part(make_image(seed, image_px)))
        chat(http, server, parts, max_tokens=1)
    before = counters(http, server)
    found = client.run(server, dataset, len(workload.prompts))
    used = counters(http, server) - before
    prompt_tokens = used["vllm:prompt_tokens_total"]
    return {
        "requests": found["completed"],
        "seconds": found["duration"],
        "requests_per_second": found["request_throughput"],
        "ttft": {f"p{p}": found[f"p{p}_ttft_ms"] / 1e3 for p in PERCENTILES},
        "prompt_tokens": prompt_tokens,
        "computed_tokens": prompt_tokens - used["vllm:prompt_tokens_cached_total"],
        "sparse_prefill_tokens": used["vllm:vlcache_sparse_prefill_tokens_total"],
        "reused_tokens": _labelled(used, "vllm:vlcache_reused_tokens_total"),
        "lookups": _labelled(used, "vllm:vlcache_lookups_total"),
        "ttfts": found["ttfts"],
        "texts": found["generated_texts"],
    }


def _labelled(counts: Mapping[str, float], name: str) -> dict[str, float]:
    """Of one metric: what is above zero, by labels."""
    mine = {key.removeprefix(f"{name}/"): n for key, n in counts.items() if key.startswith(name)}
    return {key: n for key, n in mine.items() if n}


# -- what the measurements say ------------------------------------------------------------------


def agreement(runs: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> float | None:
    """Share of a run's answers that are plain vLLM's; None where that is not known."""
    for other in runs:
        if (other["workload"], other["system"]) == (run["workload"], "plain"):
            pairs = list(zip(run["texts"], other["texts"], strict=True))
            return sum(mine == theirs for mine, theirs in pairs) / len(pairs)
    return None


def make_markdown(document: Mapping[str, Any]) -> str:
    """The results as a Markdown page."""
    settings, machine, runs = document["settings"], document["machine"], document["runs"]
    systems = _systems(runs)
    commit, changed = document["git"]["commit"] or "unknown", document["git"]["changed"]
    lines = [
        "# Workloads with recurring images, through vllm bench serve",
        "",
        f"- Model: {settings['model']}, {settings['dtype']}; images of {settings['image_px']} px, "
        f"{settings['image_tokens']} tokens each; {settings['output_tokens']} output tokens; "
        f"{settings['concurrency']} request(s) at a time",
        f"- Scale: {', '.join(f'{k} {v}' for k, v in settings['scale'].items())}",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores; other programs and "
        f"the client kept {_mean(document['other_load']):.1f} of them busy",
        f"- Versions: {', '.join(f'{k} {v}' for k, v in document['versions'].items())}; "
        f"commit {commit[:12]}{' with changes' if changed else ''}",
        f"- Started {document['started']}, {results.duration(document)}",
        f"- Command: `{document['command']}`; client: `{document['client']}`",
        *(f"- Not run: {name}: {reason}" for name, reason in document["not_run"].items()),
        "",
        "TTFT in seconds, by the client; of few requests p99 is the slowest one. Speed-up: p50 of "
        "plain vLLM beside the system, the nearest above it, over that of the system. "
        "Computed: tokens of all prompts that went through the language model, those that "
        "VLCache recomputed included. Agreement: answers that are the very text of plain vLLM's; "
        "plain-2 and so on are the control. Known: shown before.",
    ]
    for workload in document["workloads"]:
        mine = [run for run in runs if run["workload"] == workload["name"]]
        mine.sort(key=lambda run: systems.index(run["system"]))
        lines += [
            "",
            f"## {workload['name'][0].upper()}{workload['name'][1:]}: {workload['requests']} "
            f"requests, {workload['repeated']:.0%} of the images known",
            "",
            "| System | p50 | p95 | p99 | Speed-up | Requests/s | Computed | Reused from "
            "| Agreement |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
            *(f"| {' | '.join(_row(runs, run))} |" for run in mine),
        ]
    return "\n".join(lines) + "\n"


def _systems(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """In the order of their groups, plain vLLM first in each."""
    plain = {run["system"]: run["plain"] for run in runs}
    return sorted(plain, key=lambda name: (plain[name], [plain[name], *SYSTEMS].index(name)))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(1, len(numbers))


def _row(runs: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> list[str]:
    reused, agreed = run["reused_tokens"], agreement(runs, run)
    computed = run["computed_tokens"]
    [plain] = [r for r in runs if (r["workload"], r["system"]) == (run["workload"], run["plain"])]
    return [
        run["system"],
        *(f"{run['ttft'][f'p{p}']:.2f}" for p in PERCENTILES),
        f"{plain['ttft']['p50'] / run['ttft']['p50']:.1f}",
        f"{run['requests_per_second']:.2f}",
        f"{computed:.0f} ({computed / run['prompt_tokens']:.0%})",
        ", ".join(f"{tier} {n / sum(reused.values()):.0%}" for tier, n in reused.items()) or "-",
        "-" if agreed is None or run["system"] == "plain" else f"{agreed:.0%}",
    ]


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw TTFT by workload and system, and requests/s over the repeat rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = document["runs"]
    systems = _systems(runs)
    names = [w["name"] for w in document["workloads"]]
    rates = {w["name"]: w["rate"] for w in document["workloads"] if w["rate"] is not None}
    viridis = plt.get_cmap("viridis")
    colours: dict[str, Any] = {name: viridis(0.25 + 0.2 * i) for i, name in enumerate(VLCACHE)}
    colours |= {"plain": "black", "ec": "tab:orange", "lmcache": "tab:red"}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 5), layout="constrained", width_ratios=(2, 1)
    )
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        mine = [run for run in runs if run["system"] == system]
        x = [
            names.index(run["workload"]) + (index - (len(systems) - 1) / 2) * width for run in mine
        ]
        p50, p95 = ([run["ttft"][p] for run in mine] for p in ("p50", "p95"))
        left.bar(x, p50, 0.9 * width, color=colours.get(system, "grey"), label=system)
        left.vlines(x, p50, p95, color=colours.get(system, "grey"), linewidth=1.5)
        by_rate = sorted(
            (rates[run["workload"]], run["requests_per_second"])
            for run in mine
            if run["workload"] in rates
        )
        style = {"linestyle": "--", "marker": "x"} if system not in SYSTEMS else {"marker": "o"}
        right.plot(
            *zip(*by_rate, strict=True), color=colours.get(system, "grey"), label=system, **style
        )
    left.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names])
    left.set_ylabel("time to the first token (s): p50, line up to p95")
    right.set_xlabel("images shown before (%)")
    right.set_ylabel("requests per second")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9, ncols=2)
    machine, settings = document["machine"], document["settings"]
    figure.suptitle(
        f"vllm bench serve, images of {settings['image_px']} px, "
        f"{settings['model']}, {machine['cores']} cores of {machine['cpu']}",
        fontsize=11,
    )
    with results.replacing(path) as work:
        figure.savefig(work, dpi=130, format="png")
    plt.close(figure)


# -- the command --------------------------------------------------------------------------------


def run(console: Console, args: argparse.Namespace) -> None:
    """Measure and report."""
    model, model_name = model_of(args)
    workloads = [w for w in make_workloads(args.scale) if w.name.split()[0] in args.workloads]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        **results.about_run(__file__, args.argv),
        "settings": {
            "model": model_name,
            "dtype": args.dtype,
            "image_px": args.image_px,
            "image_tokens": (args.image_px // CELL_PX) ** 2,
            "output_tokens": args.output_tokens,
            "concurrency": args.concurrency,
            "scale": asdict(args.scale),
        },
        "not_run": {},
        "workloads": [
            {"name": w.name, "requests": len(w.prompts), "repeated": w.repeated, "rate": w.rate}
            for w in workloads
        ],
        "servers": {},
        "other_load": [],
        "runs": [],
    }
    if "vlcache-redis" in args.systems and find_server() is None:
        document["not_run"]["vlcache-redis"] = "there is no redis-server"
        args.systems.remove("vlcache-redis")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.cache_dir)))
        redis = None
        if "vlcache-redis" in args.systems:
            redis = stack.enter_context(LocalRedis(folder)).url
        servers = make_servers(model, args, workloads, folder, redis)
        progress = stack.enter_context(
            Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.description}"),
                console=console,
                transient=True,
            )
        )
        turns = [(plain, *names) for plain, names in _groups(servers, args.together).items()]
        task = progress.add_task("", total=len(workloads) * sum(map(len, turns)))

        def show(what: str, done: int = 0) -> None:
            progress.update(task, description=what, advance=done)

        measure_all(document, args, model, workloads, servers, folder, show)
    document |= {"complete": True, "finished": results.timestamp()}
    save(document, args.output)
    report(console, document, args.output)


def measure_all(
    document: dict[str, Any],
    args: argparse.Namespace,
    model: Path,
    workloads: Sequence[Workload],
    servers: Mapping[str, VLLMServer],
    folder: Path,
    show: Callable[..., None],
) -> None:
    """All workloads on one group of systems after the other, and on plain vLLM with each."""
    log = args.cache_dir / "logs" / "workload-client.log"
    client = Client(model, log, args.output_tokens, args.concurrency)
    datasets = [write_dataset(workload, folder, args.image_px) for workload in workloads]
    images = args.scale.most_images
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(make_client(timeout=1800.0))
        show("starting plain")
        for error in stack.enter_context(start_together({"plain": servers["plain"]})).values():
            raise error
        check_cache(http, servers["plain"], "plain", images, args.image_px)
        arguments = client.arguments(servers["plain"], Path("WORKLOAD.jsonl"), 0)
        document["client"] = results.command_line(["vllm", *arguments])
        for plain, names in _groups(servers, args.together).items():
            show(f"starting {', '.join(names)}")
            here = {name: servers[name] for name in names}
            with start_together(here) as failed:
                for name in names:
                    show(f"warming up {name}")
                    try:
                        if name in failed:
                            raise failed[name]
                        check_cache(http, here[name], name, images, args.image_px)
                    except (BenchError, ServerError) as error:
                        if name not in PEERS:
                            raise
                        document["not_run"][name] = str(error).strip().splitlines()[-1]
                        del here[name]
                here[plain] = servers["plain"]
                document["servers"] |= {
                    name: results.command_line(server.command(0)) for name, server in here.items()
                }
                groups = [server.process_group for server in here.values()]
                for index, (workload, dataset) in enumerate(zip(workloads, datasets, strict=True)):
                    before, started = results.CpuTimes.now(groups), time.monotonic()
                    turns = list(here)
                    first = index % len(turns)  # nobody is always the first one
                    for name in turns[first:] + turns[:first]:
                        show(f"{workload.name}, {name}")
                        found = measure(http, client, here[name], workload, dataset, args.image_px)
                        about = {"workload": workload.name, "system": name, "plain": plain}
                        document["runs"].append(about | found)
                        save(document, args.output)
                        show(f"{workload.name}, {name}", 1)
                    used = results.CpuTimes.now(groups).other - before.other
                    document["other_load"].append(used / (time.monotonic() - started))


def _groups(servers: Iterable[str], size: int) -> dict[str, list[str]]:
    """Systems that are alive at the same time, by the name of plain vLLM's turn with them."""
    others = [name for name in servers if name != "plain"]
    groups = [others[start : start + size] for start in range(0, len(others), size)]
    groups += [[]] * (len(groups) == 1)  # the control
    return {_plain(number): names for number, names in enumerate(groups)}


def _plain(number: int) -> str:
    return f"plain-{number + 1}" if number else "plain"


def save(document: Mapping[str, Any], output: Path) -> None:
    """Replace the JSON file at once."""
    write_text(with_suffix(output, ".json"), json.dumps(document, indent=1) + "\n")


def report(console: Console, document: Mapping[str, Any], output: Path) -> None:
    """Write page and plot, and print the page."""
    page = make_markdown(document)
    write_text(with_suffix(output, ".md"), page)
    plot(document, with_suffix(output, ".png"))
    console.print(page, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    try:
        if args.plot_only:
            path = with_suffix(args.output, ".json")
            report(console, results.read_document(path, SCHEMA, __file__), args.output)
        else:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, results.end_by_signal)
            args.cache_dir.mkdir(parents=True, exist_ok=True)
            run(console, args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (BenchError, ServerError, RedisError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Workloads with recurring images through vllm bench serve: plain vLLM, its "
        "encoder-cache connector, LMCache's connector, and VLCache from each of its tiers."
    )
    add_output_options(parser, DEFAULT_OUTPUT)
    what = parser.add_argument_group("what is asked")
    what.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    what.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    scale = Scale()
    for name, text in SCALE_HELP.items():
        default = getattr(scale, name)
        what.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)")
    what.add_argument(
        "--rates",
        type=int,
        nargs="+",
        default=list(scale.rates),
        metavar="PERCENT",
        help="of known images",
    )
    what.add_argument("--image-px", type=int, default=336, help="edge of the images (%(default)s)")
    what.add_argument("--output-tokens", type=int, default=4, help="of an answer (%(default)s)")
    what.add_argument(
        "--concurrency",
        type=int,
        default=1,
        help="most requests at a time (%(default)s: on few cores, more would only queue)",
    )
    served = parser.add_argument_group("what is served")
    add_model_options(served)
    served.add_argument(
        "--always-reuse",
        action="store_true",
        help="also where computing takes less time (break_even: false)",
    )
    served.add_argument(
        "--together",
        type=int,
        default=2,
        metavar="N",
        help="how many servers are alive beside plain vLLM's; each takes 3 GiB (%(default)s)",
    )
    args = parser.parse_args(argv)
    args.argv = list(argv)
    args.scale = Scale(
        **{name: getattr(args, name) for name in SCALE_HELP}, rates=tuple(sorted(set(args.rates)))
    )
    for problem in _problems(args):
        parser.error(problem)
    return args


def _problems(args: argparse.Namespace) -> Iterator[str]:
    for name in (*SCALE_HELP, "output_tokens", "concurrency", "together"):
        least = 2 if name == "images" else 1
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            yield f"--{flag} {getattr(args, name)}: must be at least {least}"
    for rate in args.rates:
        if not 0 <= rate <= 100:
            yield f"--rates {rate}: must be between 0 and 100"
    if args.image_px % CELL_PX or not 112 <= args.image_px <= 1792:
        yield f"--image-px {args.image_px}: must be a multiple of {CELL_PX}, 112 to 1792"
    if "plain" not in args.systems:
        yield f"--systems {' '.join(args.systems)}: plain must be among them"
    yield from model_problems(args)


if __name__ == "__main__":
    sys.exit(main())

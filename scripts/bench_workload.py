#!/usr/bin/env python
"""Run workloads with recurring images through `vllm bench serve`: VLCache and its alternatives.

Workloads are those of `workloads.py`. Each of `--rounds` puts all of them to all systems.

Systems, each in a server of its own, which takes about 3 GiB: only some are alive at a time. They
get each workload one after the other, from empty caches:

- "plain": vLLM with its prefix cache and its encoder cache. It has its turn with every group of the
  others, "plain-2" with the second one and so on, and they are compared to that turn. "again" is
  its second turn in each round: the control, which tells how far to trust a ratio.
- "ec": plus vLLM's own encoder-cache connector. It is `ECExampleConnector` (files), because
  `ECCPUConnector` needs Model Runner V2, and that needs Triton.
- "lmcache": plus LMCache's connector, prefix caching in host memory. It is `LMCacheMPConnector`,
  with a server of its own: `LMCacheConnectorV1` (0.5.6) logs "No supported cpu connector found" on
  a CPU, and from then on stores nothing.
- "vlcache-device", "-cpu", "-fs", "-valkey": plus VLCache. Where segments are to come from disk or
  Redis, host memory has room for little more than the images of the prompts under way; otherwise
  for all. "Reused from" tells where they did come from.

A peer that can't be started, or doesn't even serve the same prompt again, is named with the reason.

The dataset is `custom_image` (`vllm/benchmarks/datasets/datasets.py`). Of rows with "prompt" and
"image_files", vLLM makes one text with all images behind it (`openai-chat`). Rows with "content"
are sent as they are, text and images interleaved: those are written here, all users' first turns
first. They are sent in this order (`--disable-shuffle`), each as soon as fewer than
`--max-concurrency` are under way, with images as data URLs. Each run of the client is a process of
its own, forked from one that has imported vLLM.

TTFT, inter-token latency and requests/s are the client's. Ratios are taken within rounds: the
median TTFT of a kind of requests, and the mean of their inter-token latencies, in those of plain
vLLM. Tokens are those of the servers' `/metrics`: "computed" are
`vllm:prompt_tokens` less `vllm:prompt_tokens_cached`, everything that went through the language
model to fill KV. Tokens that VLCache recomputes are not cached ones. "Agreement" is the share of
answers (greedy) that are the very text of plain vLLM's. On random weights it tells how far reuse
moves logits, not how good answers are.

Results go to PREFIX.json (each run with every TTFT and text), PREFIX.md and PREFIX.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import results
from bench_ttft import TEXT_TOKENS
from local_redis import LocalRedis, RedisError, find_server, free_port
from options import add_model_options, add_output_options, model_of, model_problems
from results import Spread, with_range, with_suffix, write_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from serving import (
    CELL_PX,
    ROOT,
    SERVER_ENV,
    ServerError,
    VLLMServer,
    chat,
    counters,
    image_part,
    make_client,
    make_image,
    reset_caches,
    start_together,
)
from workloads import (
    SCALE_HELP,
    WORKLOADS,
    Prompt,
    Scale,
    Workload,
    content,
    make_workloads,
    write_dataset,
)

SCHEMA = 2
DEFAULT_OUTPUT = ROOT / "configs" / "results" / "workload_cpu"
PEERS = ("ec", "lmcache")
VLCACHE = ("vlcache-cpu", "vlcache-device", "vlcache-fs", "vlcache-valkey")
SYSTEMS = ("plain", *PEERS, *VLCACHE)
AGAIN = "again"
PERCENTILES = (50, 95, 99)
MOST = 1.03
"""Of plain vLLM's latency that anything may take."""
ROOM = 1.3
"""Memory that images get, in what they need."""
START_SECONDS = 900.0


class BenchError(RuntimeError):
    """What was measured is not what it should be."""


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
    tokens = TEXT_TOKENS + max(w.most_images * image_tokens + w.most_text_tokens for w in workloads)
    tokens = -(-max(tokens, 2048) // 1024) * 1024
    most_images = max(workload.most_images for workload in workloads)
    at_once = max(workload.at_once or args.concurrency for workload in workloads)
    shared = [
        *("--dtype", args.dtype, "--max-model-len", str(tokens)),
        *("--max-num-batched-tokens", str(2 * tokens)),
        *("--max-num-seqs", str(max(4, at_once))),
        *("--limit-mm-per-prompt", json.dumps({"image": most_images, "video": 0})),
        *("--skip-mm-profiling", "--enable-prefix-caching", "--enforce-eager"),
    ]
    under_way = max(w.most_images * (w.at_once or args.concurrency) for w in workloads)
    in_all = max(under_way, *(w.num_images if w.room is None else w.room for w in workloads))
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
        "vlcache-fs": small | {"disk_path": str(folder / "disk")},
        "vlcache-valkey": small | {"redis_url": redis_url},
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

    def arguments(self, server: VLLMServer, dataset: Path, workload: Workload) -> list[str]:
        """Of `vllm`."""
        output_tokens = workload.output_tokens or self._output_tokens
        at_once = workload.at_once or self._concurrency
        return [
            *("bench", "serve", "--backend", "openai-chat", "--base-url", server.base_url),
            *("--endpoint", "/v1/chat/completions", "--model", str(self._model)),
            *("--served-model-name", server.model, "--dataset-name", "custom_image"),
            *("--dataset-path", str(dataset), "--num-prompts", str(len(workload.prompts))),
            *("--disable-shuffle", "--no-oversample", "--custom-ensure-client-side-data"),
            *("--custom-output-len", str(output_tokens), "--temperature", "0"),
            *("--ignore-eos", "--max-concurrency", str(at_once), "--disable-tqdm"),
            *("--percentile-metrics", "ttft"),
            *("--metric-percentiles", ",".join(map(str, PERCENTILES))),
            *("--save-result", "--save-detailed", "--result-dir", str(dataset.parent)),
            *("--result-filename", "result.json"),
        ]

    def run(self, server: VLLMServer, dataset: Path, workload: Workload) -> dict[str, Any]:
        """Send a dataset; returns what the client wrote.

        Raises:
            BenchError: it failed, or a request did.
        """
        result = dataset.parent / "result.json"
        result.unlink(missing_ok=True)
        arguments = self.arguments(server, dataset, workload)
        process = self._context.Process(target=_vllm, args=(arguments, str(self._log)), daemon=True)
        process.start()
        process.join()
        if process.exitcode or not result.exists():
            server.raise_if_dead()
            raise BenchError(f"vllm bench serve ended with {process.exitcode}, see {self._log}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        failed = len(workload.prompts) - found["completed"]
        if failed:
            errors = [error for error in found["errors"] if error]
            raise BenchError(f"{failed} requests failed: {errors[:1]}")
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
    found = client.run(server, dataset, workload)
    used = counters(http, server) - before
    prompt_tokens = used["vllm:prompt_tokens_total"]
    return {
        "requests": found["completed"],
        "seconds": found["duration"],
        "requests_per_second": found["request_throughput"],
        "prompt_tokens": prompt_tokens,
        "computed_tokens": prompt_tokens - used["vllm:prompt_tokens_cached_total"],
        "sparse_prefill_tokens": used["vllm:vlcache_sparse_prefill_tokens_total"],
        "reused_tokens": _labelled(used, "vllm:vlcache_reused_tokens_total"),
        "lookups": _labelled(used, "vllm:vlcache_lookups_total"),
        "ttfts": found["ttfts"],
        "itls": found["itls"],
        "texts": found["generated_texts"],
    }


def _labelled(counts: Mapping[str, float], name: str) -> dict[str, float]:
    """Of one metric: what is above zero, by labels."""
    mine = {key.removeprefix(f"{name}/"): n for key, n in counts.items() if key.startswith(name)}
    return {key: n for key, n in mine.items() if n}


# -- what the measurements say ------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Requests of one kind on one system beside plain vLLM.

    Attributes:
        requests: in each round.
        plain: of plain vLLM, over all rounds: the median TTFT, in seconds.
        ttft: ratio of the median TTFTs, by rounds.
        plain_itl: of plain vLLM, over all rounds: the mean inter-token latency, in seconds; None:
            answers have one token.
        itl: ratio of the mean inter-token latencies, by rounds.
    """

    workload: str
    kind: str
    system: str
    requests: int
    plain: float
    ttft: Spread
    plain_itl: float | None
    itl: Spread | None

    @property
    def verdict(self) -> str:
        """What rounds agree upon."""
        spreads = [spread for spread in (self.ttft, self.itl) if spread is not None]
        if any(spread.low > MOST for spread in spreads):
            return f"**above {MOST}**"
        if any(spread.median > MOST for spread in spreads):
            return f"above {MOST} in some rounds"
        return f"at most {MOST}"


def cells_of(document: Mapping[str, Any]) -> list[Cell]:
    """By workload, kind and system."""
    runs = {(run["workload"], run["system"], run["round"]): run for run in document["runs"]}
    cells = []
    for workload in document["workloads"]:
        for kind in dict.fromkeys(workload["kinds"]):
            for system in _systems(document["runs"]):
                pairs = [
                    (run, runs[plain])
                    for (name, mine, number), run in runs.items()
                    if (name, mine) == (workload["name"], system) and run["plain"] != system
                    if (plain := (name, run["plain"], number)) in runs
                ]
                if pairs:
                    cells.append(_cell(workload, kind, system, pairs))
    return cells


def _cell(
    workload: Mapping[str, Any],
    kind: str,
    system: str,
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> Cell:
    mine = [index for index, each in enumerate(workload["kinds"]) if each == kind]
    gaps = workload["output_tokens"] - 1

    def ttfts(run: Mapping[str, Any]) -> list[float]:
        return [run["ttfts"][index] for index in mine]

    def itl(run: Mapping[str, Any]) -> float:
        # A token and the end of its answer come as one event or as two.
        return statistics.fmean(sum(run["itls"][index]) / gaps for index in mine)

    def ratio(of: Callable[[Mapping[str, Any]], float]) -> Spread:
        return Spread.of([of(run) / of(plain) for run, plain in pairs])

    return Cell(
        workload["name"],
        kind,
        system,
        len(mine),
        statistics.median(ttft for _, plain in pairs for ttft in ttfts(plain)),
        ratio(lambda run: statistics.median(ttfts(run))),
        statistics.fmean(itl(plain) for _, plain in pairs) if gaps else None,
        ratio(itl) if gaps else None,
    )


def agreement(runs: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> float | None:
    """Share of a run's answers that are plain vLLM's; None where that is not known."""
    wanted = (run["workload"], "plain", run["round"])
    for other in runs:
        if (other["workload"], other["system"], other["round"]) == wanted:
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
        f"{settings['concurrency']} request(s) at a time; {settings['rounds']} round(s)",
        f"- Scale: {', '.join(f'{k} {v}' for k, v in settings['scale'].items())}",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores; other programs and "
        f"the client kept {_mean(document['other_load']):.1f} of them busy",
        f"- Versions: {', '.join(f'{k} {v}' for k, v in document['versions'].items())}; "
        f"commit {commit[:12]}{' with changes' if changed else ''}",
        f"- Started {document['started']}, {results.duration(document)}",
        f"- Command: `{document['command']}`; client: `{document['client']}`",
        *(f"- Not run: {name}: {reason}" for name, reason in document["not_run"].items()),
        "",
        "## Beside plain vLLM",
        "",
        "Ratios to plain vLLM in the same round: median (range) over the rounds, of the median "
        "TTFT and the mean inter-token latency (ITL). `again` is plain vLLM's second turn: what "
        "noise alone makes.",
        "",
        "| Workload | Requests | System | TTFT, plain (s) | TTFT / plain | ITL, plain (ms) "
        "| ITL / plain | Verdict |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
        *(f"| {' | '.join(_ratios(cell))} |" for cell in cells_of(document)),
        "",
        "## All figures",
        "",
        "Over all rounds. TTFT in seconds, by the client; of few requests p99 is the slowest one. "
        "Computed: tokens of all prompts that went through the language model, those that "
        "VLCache recomputed included. Agreement: answers that are the very text of plain vLLM's "
        "in the same round. Known: shown before.",
    ]
    for workload in document["workloads"]:
        lines += [
            "",
            f"### {workload['name'][0].upper()}{workload['name'][1:]}: "
            f"{len(workload['kinds'])} requests, {workload['repeated']:.0%} of the images known",
            "",
            "| System | p50 | p95 | p99 | Requests/s | Computed | Reused from | Agreement |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        ]
        for system in systems:
            mine = [r for r in runs if (r["workload"], r["system"]) == (workload["name"], system)]
            if mine:
                lines.append(f"| {' | '.join(_row(runs, system, mine))} |")
    return "\n".join(lines) + "\n"


def _systems(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """In the order of their groups, plain vLLM first in each."""
    plain = {run["system"]: run["plain"] for run in runs}
    order = [*SYSTEMS, AGAIN]
    return sorted(plain, key=lambda name: (plain[name], [plain[name], *order].index(name)))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(1, len(numbers))


def _ratios(cell: Cell) -> list[str]:
    return [
        cell.workload,
        f"{cell.requests} {cell.kind}".strip(),
        cell.system,
        f"{cell.plain:.3f}",
        with_range(cell.ttft, ".3f"),
        "-" if cell.plain_itl is None else f"{1000 * cell.plain_itl:.1f}",
        "-" if cell.itl is None else with_range(cell.itl, ".3f"),
        cell.verdict,
    ]


def _row(
    runs: Sequence[Mapping[str, Any]], system: str, mine: Sequence[Mapping[str, Any]]
) -> list[str]:
    ttfts = [ttft for run in mine for ttft in run["ttfts"]]
    agreed = [share for run in mine if (share := agreement(runs, run)) is not None]
    computed, prompt = (
        sum(run[key] for run in mine) for key in ("computed_tokens", "prompt_tokens")
    )
    reused: Counter[str] = Counter()
    for run in mine:
        reused.update(run["reused_tokens"])
    requests, seconds = (sum(run[key] for run in mine) for key in ("requests", "seconds"))
    return [
        system,
        *(f"{np.percentile(ttfts, p):.2f}" for p in PERCENTILES),
        f"{requests / seconds:.2f}",
        f"{computed:.0f} ({computed / prompt:.0%})",
        ", ".join(f"{tier} {n / reused.total():.0%}" for tier, n in reused.items()) or "-",
        f"{_mean(agreed):.0%}" if agreed and system != "plain" else "-",
    ]


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw ratios to plain vLLM by workload and system."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = cells_of(document)
    systems = list(dict.fromkeys(cell.system for cell in cells))
    rows = list(dict.fromkeys((cell.workload, cell.kind) for cell in cells))
    viridis = plt.get_cmap("viridis")
    colours: dict[str, Any] = {name: viridis(0.25 + 0.2 * i) for i, name in enumerate(VLCACHE)}
    colours |= {AGAIN: "black", "ec": "tab:orange", "lmcache": "tab:red"}
    figure, panels = plt.subplots(
        1,
        2,
        figsize=(13, 2 + 0.12 * len(rows) * (1 + len(systems))),
        layout="constrained",
        sharey=True,
    )
    for axes, title, spread_of in (
        (panels[0], "TTFT", lambda cell: cell.ttft),
        (panels[1], "mean inter-token latency", lambda cell: cell.itl),
    ):
        for index, system in enumerate(systems):
            mine = [cell for cell in cells if cell.system == system and spread_of(cell) is not None]
            y = [
                rows.index((cell.workload, cell.kind))
                + (index - (len(systems) - 1) / 2) * 0.8 / len(systems)
                for cell in mine
            ]
            spreads = [spread_of(cell) for cell in mine]
            colour = colours.get(system, "grey")
            axes.hlines(y, [s.low for s in spreads], [s.high for s in spreads], color=colour)
            axes.plot([s.median for s in spreads], y, "o", color=colour, label=system)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.axvline(MOST, color="black", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelsize=7)
        axes.set_xlabel(f"{title} in that of plain vLLM (dotted: {MOST})")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(
        range(len(rows)), [f"{name}: {kind}" if kind else name for name, kind in rows]
    )
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False, fontsize=9)
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
            "rounds": args.rounds,
            "scale": asdict(args.scale),
        },
        "not_run": {},
        "workloads": [
            {
                "name": w.name,
                "kinds": [prompt.kind for prompt in w.prompts],
                "output_tokens": w.output_tokens or args.output_tokens,
                "repeated": w.repeated,
            }
            for w in workloads
        ],
        "servers": {},
        "other_load": [],
        "runs": [],
    }
    if "vlcache-valkey" in args.systems and find_server() is None:
        document["not_run"]["vlcache-valkey"] = "there is no redis-server"
        args.systems.remove("vlcache-valkey")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.cache_dir)))
        redis = None
        if "vlcache-valkey" in args.systems:
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
        turns = sum(len(_turns(*group)) for group in _groups(servers, args.together).items())
        task = progress.add_task("", total=args.rounds * len(workloads) * turns)

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
    images = max(workload.most_images for workload in workloads)
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(make_client(timeout=1800.0))
        show("starting plain")
        for error in stack.enter_context(start_together({"plain": servers["plain"]})).values():
            raise error
        check_cache(http, servers["plain"], "plain", images, args.image_px)
        anything = Workload("", ())
        arguments = client.arguments(servers["plain"], Path("WORKLOAD.jsonl"), anything)
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
                turns = {name: here.get(name, servers["plain"]) for name in _turns(plain, here)}
                document["servers"] |= {
                    name: results.command_line(server.command(0)) for name, server in turns.items()
                }
                groups = [server.process_group for server in {*turns.values()}]
                for number in range(args.rounds):
                    for index, (workload, dataset) in enumerate(
                        zip(workloads, datasets, strict=True), number
                    ):
                        before, started = results.CpuTimes.now(groups), time.monotonic()
                        first = index % len(turns)  # nobody is always the first one
                        names = list(turns)
                        for name in names[first:] + names[:first]:
                            show(f"round {number + 1}, {workload.name}, {name}")
                            server = turns[name]
                            found = measure(http, client, server, workload, dataset, args.image_px)
                            about = {"workload": workload.name, "system": name, "plain": plain}
                            document["runs"].append(about | {"round": number} | found)
                            save(document, args.output)
                            show(f"round {number + 1}, {workload.name}, {name}", 1)
                        used = results.CpuTimes.now(groups).other - before.other
                        document["other_load"].append(used / (time.monotonic() - started))


def _turns(plain: str, names: Iterable[str]) -> list[str]:
    """Of one group in each round; plain vLLM has a second one in the first group."""
    return [plain, *names] + [AGAIN] * (plain == _plain(0))


def _groups(servers: Iterable[str], size: int) -> dict[str, list[str]]:
    """Systems that are alive at the same time, by the name of plain vLLM's turn with them."""
    others = [name for name in servers if name != "plain"]
    groups = [others[start : start + size] for start in range(0, len(others), size)]
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
        what.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help=f"{text} (%(default)s)"
        )
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
        help="most requests at a time, where a workload has no number of its own (%(default)s: on "
        "few cores, more would only queue)",
    )
    what.add_argument(
        "--rounds", type=int, default=3, help="how often all is measured (%(default)s)"
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
    for name in (*SCALE_HELP, "output_tokens", "concurrency", "rounds", "together"):
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

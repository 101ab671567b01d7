#!/usr/bin/env python
"""Compare plain vLLM with VLCache on benchmarks of lmms-eval, through the OpenAI API.

A 7B model on a GPU, with benchmarks of single images (MMMU, DocVQA, MMStar) and of several ones
(MuirBench); the first command is needed once, and most data sets want a Hugging Face login:

    python scripts/eval_lmms.py --install
    python scripts/eval_lmms.py --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --tasks mmmu_val docvqa_val mmstar muirbench --recompute-ratio 0.05 \\
        --server-args="--max-model-len 32768" --output results/qwen2.5-vl-7b

`--limit 100` asks the first 100 questions of each task; with `--concurrency 8` it is faster, but
latencies cannot be compared. The same path on a CPU without network, with the tests' model:

    python scripts/eval_lmms.py --model tests/models/grid-vlm --tasks grid_vqa --limit 50 \\
        --connector '{"cpu_bytes": "256MiB", "encoder_cpu_bytes": "64MiB"}'

Other tasks with several images are `blink` and `mantis`. lmms-eval gets an environment of its own
(`.cache/lmms-eval-venv`, where `bin/lmms-eval tasks` lists all tasks).

Plain vLLM and VLCache run one after the other. lmms-eval asks each of them the tasks' questions
through a small proxy on 127.0.0.1, which makes all answers greedy, with the same seed. In most
benchmarks an image occurs once, so nothing could be reused. Therefore, with VLCache only, the proxy
first sends each image of a question in a chat of its own (the donor): alone, behind other text, at
another position. As the text in front differs, vLLM's prefix cache cannot serve the question's
images. A donor comes right before its question, not in a pass before all questions: that needs
only a small store, while all images of a benchmark can need 100 GB.

What was reused comes from the figures in VLCache's answers (`kv_transfer_params.vlcache`); if it
is nothing, the script ends with an error. In the table, "reused" is the share of the questions'
image tokens; latency is the mean time to the end of an answer, without donors (for the time to the
first token see bench_ttft.py). Metrics are those of lmms-eval; the interval is that of the mean
difference between the two answers to a question, where lmms-eval logs what its score is made from.
Results go to PREFIX.json and PREFIX.md, lmms-eval's own and all logs to `.cache/lmms-eval/PREFIX`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.markdown import Markdown
from serving import ROOT, ServerError, VLLMServer, make_client

from vlcache_connector.config import ConfigError, VLCacheConfig

LMMS_EVAL = "0.7.3"
VENV = ROOT / ".cache" / "lmms-eval-venv"
SYSTEMS = ("plain", "vlcache")
DONOR_TEXT = (
    "here are some notes from today before you start . it was sunny yesterday and we like tea . "
    "take your time , please look at the first"
)
"""In front of a donor's image; of words that the tests' model knows."""
UV_SETTINGS = {"index-url": "DEFAULT_INDEX", "extra-index-url": "INDEX", "find-links": "FIND_LINKS"}
HEADS = ["task", "metric", "plain", "VLCache", "difference", "95 % CI, paired", "other answers"]
HEADS += ["reused", "latency plain", "latency VLCache"]


class EvaluationError(RuntimeError):
    """It can't go on, and why."""


def donor_chats(messages: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """A chat for each different image of a chat: the image alone, behind other text."""
    contents = [m["content"] for m in messages if not isinstance(m["content"], str)]
    images = [p for content in contents for p in content if p["type"].endswith("_url")]
    system = {"role": "system", "content": DONOR_TEXT}
    different = {json.dumps(image): image for image in images}
    return [[system, {"role": "user", "content": [image]}] for image in different.values()]


class Proxy(ThreadingHTTPServer):
    """Stands between lmms-eval and a server: makes answers greedy, asks donors, takes notes.

    Attributes:
        url: to be asked instead of the server, with `/v1`.
        figures: sums over the answered questions; "unserved" are those with images of which
            nothing was reused, "errors" counts questions that were refused.
        first_error: what the first refused one got.
    """

    def __init__(self, server_url: str, *, seed: int, donors: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.figures: Counter[str] = Counter()
        self.first_error, self._seed, self._donors = "", seed, donors
        self._url = f"{server_url}/v1/chat/completions"
        self._client = make_client(timeout=600.0)
        self._lock = threading.Lock()

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)
        self._client.close()

    def reply(self, body: dict[str, Any]) -> tuple[int, bytes]:
        """HTTP status and content of the answer to a question."""
        body = {key: body[key] for key in body if key not in ("top_p", "top_k")}
        body |= {"temperature": 0.0, "seed": self._seed}
        chats = donor_chats(body["messages"]) if self._donors else []
        try:
            for chat in chats:
                donor = body | {"messages": chat, "max_tokens": 1}
                self._client.post(self._url, json=donor).raise_for_status()
            started = time.perf_counter()
            reply = self._client.post(self._url, json=body).raise_for_status()
            self._note(reply.json(), time.perf_counter() - started, len(chats))
            return reply.status_code, reply.content
        except httpx.HTTPError as error:
            answer = getattr(error, "response", None)
            text = repr(error) if answer is None else answer.text
            with self._lock:
                self.figures["errors"] += 1
                self.first_error = self.first_error or text
            # A status with which the client does not try again.
            return 400, json.dumps({"error": {"message": text}}).encode()

    def _note(self, answer: Mapping[str, Any], seconds: float, donors: int) -> None:
        images = (answer["usage"].get("prompt_tokens_details") or {}).get("multimodal_tokens") or {}
        mine = (answer.get("kv_transfer_params") or {}).get("vlcache", {})
        sums = {"questions": 1, "seconds": seconds, "donors": donors}
        sums |= {name: mine.get(name, 0) for name in ("reused_tokens", "recomputed_tokens")}
        sums["image_tokens"] = sum(images.values())
        sums["unserved"] = int(sums["image_tokens"] > sums["reused_tokens"] == 0)
        if mine.get("fallback"):
            sums[f"fallback: {mine['fallback']}"] = 1
        with self._lock:
            self.figures.update(sums)


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, content = self.server.reply(body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def install(venv: Path, console: Console) -> None:
    """Make the environment of lmms-eval, with uv.

    Raises:
        EvaluationError: it could not be made.
    """
    run = partial(subprocess.run, capture_output=True, text=True)
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        raise EvaluationError(f"there is no {uv}: run scripts/setup.sh first")
    env = os.environ | {"UV_HTTP_RETRIES": "1", "UV_INDEX_STRATEGY": "unsafe-best-match"}
    for line in run([sys.executable, "-m", "pip", "config", "list"]).stdout.splitlines():
        # uv does not read pip's settings of where packages come from.
        key, _, value = line.partition("=")
        if setting := UV_SETTINGS.get(key.rpartition(".")[2]):
            separator = "," if setting == "FIND_LINKS" else " "
            env.setdefault(f"UV_{setting}", separator.join(value.strip("'\"").split()))
    python, torch = venv / "bin" / "python", version("torch")
    if not python.exists():
        run([uv, "venv", "--python", sys.executable, venv]).check_returncode()
    command = [uv, "pip", "install", "--python", python, f"lmms-eval=={LMMS_EVAL}"]
    command.append(f"torchvision=={version('torchvision').split('+')[0]}")
    # A CPU build is enough; else the very build that is next to vLLM.
    for choice in (["--torch-backend=cpu", f"torch=={torch.split('+')[0]}"], [f"torch=={torch}"]):
        with console.status("installing lmms-eval"):
            done = run([*command, *choice], env=env)
        if done.returncode == 0:
            break
    else:
        raise EvaluationError(f"lmms-eval could not be installed:\n{done.stderr.strip()}")
    if run([python, "-c", "import torchvision"]).returncode:
        # As scripts/setup.sh does where only a CUDA build of torchvision is to be had.
        (site,) = (venv / "lib").glob("python*/site-packages")
        name = "vlcache_torchvision_schemas"
        shutil.copy(ROOT / "scripts" / "torchvision_schemas.py", site / f"{name}.py")
        (site / f"{name}.pth").write_text(f"import {name}; {name}.install()\n")
    console.print(f"lmms-eval {LMMS_EVAL} is installed in {venv}", markup=False)


def run_task(args: argparse.Namespace, proxy: Proxy, model: str, task: str, folder: Path) -> None:
    """Let lmms-eval ask a task's questions, and write its results into `folder`.

    Raises:
        EvaluationError: there are no results; with lmms-eval's own message.
    """
    model_args = f"model={model},base_url={proxy.url},api_key=EMPTY,httpx_trust_env=False"
    model_args += f",max_retries=1,num_concurrent={args.concurrency}"
    command = [
        *(str(args.venv / "bin" / "python"), "-m", "lmms_eval", "--model", "openai"),
        *("--model_args", model_args, "--tasks", task, "--batch_size", "1", "--log_samples"),
        *("--include_path", str(ROOT / "configs" / "lmms"), "--output_path", str(folder)),
        *("--seed", str(args.seed), *(["--limit", str(args.limit)] if args.limit else [])),
    ]
    folder.mkdir(parents=True)
    log = folder / "lmms_eval.log"
    with log.open("wb") as output, args.console.status("") as status:
        # The working directory is where the data of the local task lie.
        env, where = os.environ | {"CUDA_VISIBLE_DEVICES": ""}, folder.parents[1]
        process = subprocess.Popen(command, cwd=where, env=env, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                status.update(f"{folder.parent.name}: {task}, {proxy.figures['questions']} answers")
                time.sleep(0.5)
        finally:
            process.kill()
            process.wait()
    if not list(folder.rglob("*_results.json")):  # it ends with status 0 in any case
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
        lines = text.splitlines()
        said = "\n".join([line for line in lines if "ERROR" in line] or lines[-12:])
        raise EvaluationError(f"lmms-eval has no results for {task}:\n{said}\n(all of it: {log})")


def read_metrics(folder: Path) -> dict[tuple[str, str], float]:
    """The metrics that lmms-eval wrote, by task (or group) and name."""
    (path,) = folder.rglob("*_results.json")
    return {
        (task, key.removesuffix(",none")): float(value)
        for task, figures in json.loads(path.read_text(encoding="utf-8"))["results"].items()
        for key, value in figures.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }


def read_samples(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What lmms-eval logged of each answer, by task and number of the document."""
    samples = {}
    for path in folder.rglob("*_samples_*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            samples[path.stem.partition("_samples_")[2], sample["doc_id"]] = sample
    return samples


def score_of(value: Any) -> float | None:
    """The score of an answer from what a task logs for a metric; None if it can't be told."""
    if isinstance(value, dict):
        answer, guess = value.get("answer"), value.get("pred")
        if value.get("question_type") == "multiple-choice" and "parsed_pred" in value:  # MMMU
            return float(answer in value["parsed_pred"])
        if isinstance(guess, str) and isinstance(answer, str):  # MuirBench
            return float(guess.lower().strip() == answer.lower().strip())
        value = next((value[k] for k in ("score", "correct", "is_correct") if k in value), None)
    return float(value) if isinstance(value, int | float) else None


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean: the normal approximation, with one pair for and one
    against added (Bonett and Price, 2012), so that it has a width where no answer differs.
    """
    scale = max([1.0, *(abs(value) for value in differences)])
    padded = np.array([*differences, scale, -scale])
    half = 1.959964 * padded.std() / math.sqrt(len(padded))
    return float(padded.mean() - half), float(padded.mean() + half)


def compare(plain: Path, mine: Path) -> list[dict[str, Any]]:
    """A row for each metric, from lmms-eval's results with plain vLLM and with VLCache."""
    before, after = read_metrics(plain), read_metrics(mine)
    old, new = read_samples(plain), read_samples(mine)
    rows = []
    for task, metric in sorted(before.keys() & after.keys()):
        name = metric.partition(",")[0]
        twins = [(old[k], new[k]) for k in old.keys() & new.keys() if k[0] == task]
        twins = [(a, b) for a, b in twins if name in a and name in b]
        scores = [(score_of(a[name]), score_of(b[name])) for a, b in twins]
        gains = [b - a for a, b in scores if a is not None and b is not None]
        texts = [[s.get("resps", s["filtered_resps"]) for s in twin] for twin in twins]
        rows.append(
            {"task": task, "metric": metric}
            | {"plain": before[task, metric], "vlcache": after[task, metric]}
            | {"difference": after[task, metric] - before[task, metric]}
            | {"interval": paired_interval(gains) if gains else None, "scored": len(gains)}
            | {"answers": len(twins), "answers_that_differ": sum(a != b for a, b in texts)}
        )
    return rows


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """A row of the table as text, in the order of `HEADS`."""
    scored = "" if row["scored"] == row["answers"] else f" ({row['scored']} answers)"
    return [
        *(row["task"], row["metric"], f"{row['plain']:.4g}", f"{row['vlcache']:.4g}"),
        f"{row['difference']:+.4g}",
        "{:+.3g} to {:+.3g}".format(*row["interval"]) + scored if row["interval"] else "",
        f"{row['answers_that_differ']} of {row['answers']}" if row["answers"] else "",
        f"{row['reused_share']:.1%}",
        *(f"{row[f'latency_{system}']:.3f} s" for system in SYSTEMS),
    ]


def make_markdown(document: Mapping[str, Any]) -> str:
    """The table, and notes of what was reused and what went wrong."""
    notes = [f"Command: `{document['command']}`", f"VLCache: `{document['connector']}`"]
    for task, systems in document["tasks"].items():
        notes.append(
            "{}: {reused_tokens} of {image_tokens} image tokens reused, {recomputed_tokens} "
            "recomputed, in {questions} questions after {donors} donors; nothing reused in "
            "{unserved} questions".format(task, **systems["vlcache"])
        )
        for name, sums in systems.items():
            notes += [f"{task}: {sums[key]} times {key}" for key in sums if "fallback" in key]
            if sums["first_error"]:
                notes.append(f"{task}, {name}: {sums['errors']} failed: {sums['first_error']}")
    lines = [HEADS, ["---"] * 2 + ["---:"] * (len(HEADS) - 2), *map(cells_of, document["rows"])]
    text = [*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in notes)]
    return "\n".join(["# Plain vLLM and VLCache", "", *text, ""])


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Ask all tasks' questions of plain vLLM, then of VLCache."""
    work = ROOT / ".cache" / "lmms-eval" / args.output.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    numbers = [{"seed": args.seed, "number": number} for number in range(args.limit or 1000)]
    (work / "grid_vqa.jsonl").write_text("\n".join(map(json.dumps, numbers)), encoding="utf-8")
    extra = ["--enable-prompt-tokens-details", "--seed", str(args.seed)]
    figures: dict[str, dict[str, Any]] = {task: {} for task in args.tasks}
    for system in SYSTEMS:
        server = VLLMServer(
            args.model,
            connector=args.connector if system == "vlcache" else None,
            extra_args=[*extra, *shlex.split(args.server_args)],
            log_path=work / f"{system}.log",
            env={"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")},
            timeout=3600.0,
        )
        args.console.print(f"{system}: starting vLLM, its log is {server.log_path}", markup=False)
        with server:
            for task in args.tasks:
                with Proxy(server.base_url, seed=args.seed, donors=system == "vlcache") as proxy:
                    run_task(args, proxy, server.model, task, work / system / task)
                server.raise_if_dead()
                sums = proxy.figures
                if not sums["questions"]:
                    raise EvaluationError(f"{task}: nothing was answered: {proxy.first_error}")
                figures[task][system] = dict(sums) | {
                    "latency": sums["seconds"] / sums["questions"],
                    "reused_share": sums["reused_tokens"] / max(1, sums["image_tokens"]),
                    "first_error": proxy.first_error,
                }
    rows = []
    for task, both in figures.items():
        more = {"reused_share": both["vlcache"]["reused_share"]}
        more |= {f"latency_{system}": both[system]["latency"] for system in SYSTEMS}
        rows += [row | more for row in compare(*(work / system / task for system in SYSTEMS))]
    return {
        **{name: getattr(args, name) for name in ("model", "seed", "limit", "concurrency")},
        "command": shlex.join(["python", *sys.argv]).replace(f"{ROOT}/", ""),
        "connector": args.connector,
        "versions": {"vllm": version("vllm"), "lmms-eval": LMMS_EVAL},
        **{"rows": rows, "tasks": figures},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parse(argv)
    try:
        if args.install:
            install(args.venv, args.console)
        elif not (args.venv / "bin" / "lmms-eval").exists():
            raise EvaluationError(f"there is no lmms-eval in {args.venv}: run with --install first")
        if not args.model:
            return 0
        document = evaluate(args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        texts = {".json": json.dumps(document, indent=1) + "\n", ".md": make_markdown(document)}
        for suffix, text in texts.items():
            args.output.with_name(args.output.name + suffix).write_text(text, encoding="utf-8")
    except KeyboardInterrupt:
        args.console.print("interrupted", style="red")
        return 130
    except (EvaluationError, ServerError, subprocess.CalledProcessError, OSError) as error:
        args.console.print(f"error: {error}", style="red", markup=False)
        return 1
    Console().print(Markdown(make_markdown(document)))
    idle = [t for t, both in document["tasks"].items() if not both["vlcache"]["reused_tokens"]]
    if idle and args.selector != "full":
        args.console.print(f"error: nothing was reused in {', '.join(idle)}", style="red")
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--install", action="store_true", help="make the environment of lmms-eval")
    add("--model", metavar="MODEL", help="directory or Hugging Face name")
    tasks = ["mmmu_val", "docvqa_val", "mmstar", "muirbench"]
    add("--tasks", nargs="+", default=tasks, metavar="TASK", help=f"({' '.join(tasks)})")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--recompute-ratio", type=float, default=0.05, metavar="R", help="(%(default)s)")
    add("--selector", default="first_k", help="rule that picks what is recomputed (%(default)s)")
    add("--connector", type=json.loads, default={}, metavar="JSON", help="VLCache's other options")
    add("--server-args", default="", metavar="ARGS", help="for vllm serve, as one string")
    add("--concurrency", type=int, default=1, metavar="N", help="questions at a time (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--output", type=Path, default="lmms_results", metavar="PREFIX", help="(%(default)s)")
    add("--venv", type=Path, default=VENV, metavar="DIR", help="lmms-eval's (%(default)s)")
    args = parser.parse_args(argv)
    args.console, args.venv = Console(stderr=True), args.venv.absolute()
    if not (args.model or args.install):
        parser.error("--model is needed, or --install")
    if not isinstance(args.connector, dict):
        parser.error("--connector must be a JSON object")
    args.connector |= {"selector": args.selector, "recompute_ratio": args.recompute_ratio}
    try:
        VLCacheConfig.from_extra_config(args.connector)
    except ConfigError as error:
        parser.error(str(error))
    if min(args.concurrency, args.limit or 1) < 1 or args.limit == 0 or args.seed < 0:
        parser.error("--limit and --concurrency must be at least 1, --seed at least 0")
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

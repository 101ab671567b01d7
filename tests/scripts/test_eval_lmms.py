"""Tests of scripts/eval_lmms.py: only the last one needs lmms-eval and a vLLM server."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import grid_vqa
import httpx
import numpy as np
import pytest

from tests.helpers.quick_start import QUICK_START

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".cache" / "lmms-eval-venv"


@pytest.fixture(scope="module")
def lmms() -> ModuleType:
    return importlib.import_module("eval_lmms")


@pytest.fixture(scope="module")
def task() -> ModuleType:
    path = ROOT / "configs" / "lmms" / "grid_vqa" / "utils.py"
    spec = importlib.util.spec_from_file_location("grid_vqa_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server(ThreadingHTTPServer):
    """Answers chats like vLLM with VLCache, of which it knows the images it was shown."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bodies: list[dict[str, Any]] = []
        self.known: set[str] = set()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.bodies.append(body)
        if body["messages"][-1]["content"] == "refuse":
            return 400, {"error": {"message": "too long"}}
        images = [image for message in body["messages"] for image in _images(message["content"])]
        known = sum(image in self.known for image in images)
        self.known.update(images)
        usage: dict[str, Any] = {"prompt_tokens": 50, "completion_tokens": 1, "total_tokens": 51}
        tokens = {"image": 36 * len(images)} if images else None
        usage["prompt_tokens_details"] = {"multimodal_tokens": tokens}
        figures = {"reused_tokens": 28 * known, "recomputed_tokens": 8 * known, "fallback": None}
        message = {"role": "assistant", "content": "red"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        mine = {"kv_transfer_params": {"vlcache": figures}}
        return 200, {"choices": choices, "usage": usage, **mine}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = self.server.answer(body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _images(content: Any) -> list[str]:
    if isinstance(content, str):
        return []
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


def _chat(*images: str, **extra: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "what is it"}]
    parts += [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return {"model": "model", "messages": [{"role": "user", "content": parts}], **extra}


def _post(proxy: Any, body: dict[str, Any]) -> httpx.Response:
    with httpx.Client(trust_env=False) as client:
        return client.post(f"{proxy.url}/chat/completions", json=body)


def test_proxy_shows_each_image_in_another_chat_first(lmms: ModuleType, server: Server) -> None:
    body = _chat("a", "b", "a", temperature=0.7, top_p=0.5, max_tokens=16, seed=1)
    with lmms.Proxy(server.url, seed=7, donors=True) as proxy:
        reply = _post(proxy, body)
    assert reply.json()["choices"][0]["message"]["content"] == "red"
    *donors, question = server.bodies
    assert [donor["max_tokens"] for donor in donors] == [1, 1]
    for donor, image in zip(donors, "ab", strict=True):
        first, second = donor["messages"]
        assert first == {"role": "system", "content": lmms.DONOR_TEXT}
        assert _images(second["content"]) == [image]
    assert question["messages"] == body["messages"]
    assert question["max_tokens"] == 16
    # Greedy, with one seed, whatever the task asks for.
    assert all(b["temperature"] == 0 and b["seed"] == 7 for b in server.bodies)
    assert not any("top_p" in b for b in server.bodies)
    figures = dict(proxy.figures)
    assert figures.pop("seconds") > 0
    assert figures == {
        **{"questions": 1, "donors": 2, "image_tokens": 108, "unserved": 0},
        **{"reused_tokens": 84, "recomputed_tokens": 24},
    }


def test_proxy_of_plain_vllm_shows_nothing(lmms: ModuleType, server: Server) -> None:
    with lmms.Proxy(server.url, seed=0, donors=False) as proxy:
        _post(proxy, _chat("a"))
        _post(proxy, _chat())
    assert len(server.bodies) == 2
    assert proxy.figures["questions"] == 2
    assert proxy.figures["donors"] == 0
    assert proxy.figures["unserved"] == 1
    assert proxy.figures["image_tokens"] == 36


def test_proxy_hands_on_what_went_wrong(lmms: ModuleType, server: Server) -> None:
    body = {"model": "model", "messages": [{"role": "user", "content": "refuse"}]}
    with lmms.Proxy(server.url, seed=0, donors=True) as proxy:
        reply = _post(proxy, body)
        assert reply.status_code == 400
        assert "too long" in reply.text
        server.shutdown()
        server.server_close()
        assert _post(proxy, body).status_code == 400
    assert "too long" in proxy.first_error
    assert proxy.figures["errors"] == 2
    assert proxy.figures["questions"] == 0


def test_donor_text_is_known_to_the_model_of_the_tests(lmms: ModuleType) -> None:
    unknown = set(lmms.DONOR_TEXT.split()) - set(grid_vqa.WORDS)
    assert unknown <= {",", "picture"}


def test_grid_task(task: ModuleType) -> None:
    families = set()
    for number in range(20):
        doc = {"seed": 3, "number": number}
        question = task.question_of(doc)
        families.add(question.family)
        assert task.question_of(doc) == question
        (message,) = task.doc_to_messages(doc)
        texts = [part.get("text") for part in message["content"]]
        assert texts == [None if isinstance(part, int) else part for part in question.parts]
        pictures = [part["url"] for part in message["content"] if part["type"] == "image"]
        for picture, pixels in zip(pictures, question.images(), strict=True):
            assert (np.array(picture) == pixels).all()
        assert len(task.doc_to_visual(doc)) == len(pictures) == 2
        assert task.doc_to_text(doc).count("<image>") == 2
        right = f" {task.doc_to_target(doc)} ."
        assert task.process_results(doc, [right]) == {"exact_match": 1.0}
        assert task.process_results(doc, [f"{grid_vqa.STAR} {question.answer}"])["exact_match"] == 0
        assert task.process_results(doc, [""])["exact_match"] == 0
    assert families == set(grid_vqa.FAMILIES)


@pytest.mark.parametrize(
    ("value", "score"),
    [
        *[(1.0, 1.0), (False, 0.0), ("red", None), ({"id": 3}, None), (None, None)],
        *[({"score": 0.5}, 0.5), ({"correct": True}, 1.0), ({"is_correct": False}, 0.0)],
        # MuirBench
        *[({"pred": "a ", "answer": "A"}, 1.0), ({"pred": "b", "answer": "A"}, 0.0)],
        # MMMU; its open questions are judged by rules that are not repeated here.
        ({"question_type": "multiple-choice", "answer": "B", "parsed_pred": ["B"]}, 1.0),
        ({"question_type": "open", "answer": "5", "parsed_pred": [["5", 5.0]]}, None),
    ],
)
def test_score_of(lmms: ModuleType, value: Any, score: float | None) -> None:
    assert lmms.score_of(value) == score


def test_paired_interval(lmms: ModuleType) -> None:
    low, high = lmms.paired_interval([0.0] * 98)
    assert low == -high
    assert 0.02 < high < 0.03
    low, high = lmms.paired_interval([-1.0] * 50 + [0.0] * 50)
    assert low < -0.5 < high < -0.35
    # Scores of 0 to 100 get a wider one.
    assert lmms.paired_interval([100.0, 0.0])[1] > 50


def _write(folder: Path, results: dict[str, Any], samples: dict[str, list[Any]]) -> Path:
    """As lmms-eval does."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "20260101_results.json").write_text(json.dumps({"results": results}))
    for task, lines in samples.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (model / f"20260101_samples_{task}.jsonl").write_text(text)
    return folder


def _samples(scores: list[float], texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"doc_id": i, "filtered_resps": text, "acc": {"score": score}}
        for i, (score, text) in enumerate(zip(scores, texts, strict=True))
    ]


def test_compare_and_show(lmms: ModuleType, tmp_path: Path) -> None:
    figures = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "other,strict": "N/A"}
    plain = _write(
        tmp_path / "plain",
        {"t": figures, "group": {"acc,none": 0.5}},
        {"t": _samples([1, 0], ["red", "red"])},
    )
    mine = _write(
        tmp_path / "mine",
        {"t": figures | {"acc,none": 1.0}, "group": {"acc,none": 1.0}},
        {"t": list(reversed(_samples([1, 1], ["red", "blue"])))},
    )
    group, row = lmms.compare(plain, mine)
    assert (group["task"], group["difference"], group["interval"]) == ("group", 0.5, None)
    assert (row["task"], row["metric"]) == ("t", "acc")
    assert (row["plain"], row["vlcache"], row["difference"]) == (0.5, 1.0, 0.5)
    assert (row["answers"], row["scored"], row["answers_that_differ"]) == (2, 2, 1)
    assert row["interval"] == pytest.approx(lmms.paired_interval([0.0, 1.0]))

    sums = {"questions": 2, "image_tokens": 72, "donors": 2, "unserved": 1, "first_error": ""}
    sums |= {"reused_tokens": 28, "recomputed_tokens": 8, "fallback: no room": 1}
    failed = sums | {"first_error": "too long", "errors": 3}
    more = {"reused_share": 28 / 72, "latency_plain": 2.0, "latency_vlcache": 0.25}
    page = lmms.make_markdown(
        {"command": "python x", "connector": {}, "rows": [row | more, group | more]}
        | {"tasks": {"t": {"plain": failed, "vlcache": sums}}}
    )
    assert "| t | acc | 0.5 | 1 | +0.5 |" in page
    assert "| 1 of 2 | 38.9% | 2.000 s | 0.250 s |" in page
    assert "28 of 72 image tokens reused, 8 recomputed, in 2 questions after 2 donors" in page
    assert "t: 1 times fallback: no room" in page
    assert "t, plain: 3 failed: too long" in page


def test_without_lmms_eval_it_says_what_to_do(
    lmms: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lmms.main(["--model", "m", "--venv", str(tmp_path)]) == 1
    assert "--install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is needed"),
        (["--model", "m", "--recompute-ratio", "2"], "recompute_ratio"),
        (["--model", "m", "--selector", "best"], "selector"),
        (["--model", "m", "--connector", '{"cpu_byte": 1}'], "cpu_byte"),
        (["--model", "m", "--connector", "[]"], "JSON object"),
        (["--model", "m", "--connector", "{"], "--connector"),
        (["--model", "m", "--limit", "0"], "--limit"),
        (["--model", "m", "--concurrency", "0"], "--concurrency"),
    ],
)
def test_bad_arguments(
    lmms: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        lmms.main(arguments)
    assert message in capsys.readouterr().err


def _fake_venv(folder: Path, script: str) -> Path:
    """An environment whose Python does nothing but `script`."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "lmms-eval").touch()
    (folder / "bin" / "python").write_text(f"#!{sys.executable}\n{script}")
    (folder / "bin" / "python").chmod(0o755)
    return folder


def test_lmms_eval_own_message_is_passed_on(
    lmms: ModuleType, server: Server, tmp_path: Path
) -> None:
    said = "import sys\nprint('starting')\nprint('ERROR Tasks were not found:', sys.argv[8])\n"
    args = lmms._parse(["--model", "m", "--venv", str(_fake_venv(tmp_path / "venv", said))])
    with (
        lmms.Proxy(server.url, seed=0, donors=False) as proxy,
        pytest.raises(lmms.EvaluationError, match="no results") as caught,
    ):
        lmms.run_task(args, proxy, "model", "nonsense", tmp_path / "work" / "plain" / "nonsense")
    assert "Tasks were not found: nonsense" in str(caught.value)
    assert "starting" not in str(caught.value).split("\n")


@pytest.mark.skipif(
    not (VENV / "bin" / "lmms-eval").exists(),
    reason="lmms-eval is not installed: python scripts/eval_lmms.py --install",
)
def test_grid_task_in_lmms_eval(
    lmms: ModuleType,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (QUICK_START | {"HF_HUB_OFFLINE": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    small = {"cpu_bytes": "128MiB", "encoder_cpu_bytes": "64MiB"}
    command = [
        *("--model", str(tiny_model()), "--limit", "6", "--connector", json.dumps(small)),
        *("--server-args", "--dtype float32 --enforce-eager --max-model-len 1024"),
        *("--output", str(tmp_path / "test-lmms")),
    ]
    status = lmms.main([*command, "--tasks", "grid_vqa"])
    assert status == 0, capsys.readouterr()
    document = json.loads((tmp_path / "test-lmms.json").read_text())
    (row,) = document["rows"]
    assert (row["task"], row["metric"], row["answers"], row["scored"]) == (
        *("grid_vqa", "exact_match"),
        *(6, 6),
    )
    plain, mine = (document["tasks"]["grid_vqa"][system] for system in lmms.SYSTEMS)
    assert plain["image_tokens"] == mine["image_tokens"] == 6 * 2 * grid_vqa.IMAGE_TOKENS
    assert (plain["donors"], plain["reused_tokens"]) == (0, 0)
    assert (mine["donors"], mine["unserved"]) == (12, 0)
    assert mine["reused_tokens"] + mine["recomputed_tokens"] == mine["image_tokens"]
    assert "| grid_vqa | exact_match |" in (tmp_path / "test-lmms.md").read_text()

    assert lmms.main([*command, "--tasks", "nonsense"]) == 1
    assert "nonsense" in capsys.readouterr().err

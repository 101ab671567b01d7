"""`vlcache warm` against a real HTTP server that answers as vLLM does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from local_redis import free_port
from PIL import Image

from vlcache_connector import cli

KEY = "hunter2-key"


class Server(ThreadingHTTPServer):
    """Remembers what it is asked; `figures` and `refuses` say how it answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.seen: set[str] = set()
        self.running = self.most_running = 0
        self.with_figures = True
        self.refused: bytes = b""  # content of an image that is refused
        self.redirect_to: str | None = None
        self.everyone = threading.Event()
        self.waits_for = 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        if self.server.redirect_to is not None:
            self.send_response(302)
            self.send_header("Location", self.server.redirect_to)
            self.end_headers()
        elif self.path == "/v1/models":
            self.reply(200, {"data": [{"id": "org/first"}, {"id": "org/second"}]})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            reused = 17 if url in server.seen else 0
            server.seen.add(url)
            if server.running >= server.waits_for:
                server.everyone.set()
        server.everyone.wait(20)
        with server.lock:
            server.running -= 1
        if server.refused and base64.b64decode(url.partition(",")[2]) == server.refused:
            self.reply(400, {"error": {"message": f"too large\nfor {KEY}", "code": 400}})
            return
        answer: dict[str, Any] = {"choices": [{"message": {"content": "x"}}]}
        answer["kv_transfer_params"] = (
            {"vlcache": {"reused_tokens": reused}} if server.with_figures else None
        )
        self.reply(200, answer)

    def reply(self, status: int, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "VLLM_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one of them below and one with a misleading name, and two other files."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for name, color in (("a.png", "red"), ("b.jpg", "green"), ("below/c.dat", "blue")):
        image_format = "WEBP" if name.endswith("dat") else None
        Image.new("RGB", (60, 40), color).save(folder / name, format=image_format)
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    return folder


def test_every_image_is_sent_as_it_is(
    server: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["warm", str(folder), "--url", server.url + "/v1/"]) == 0
    sent = {}
    for body in server.bodies:
        assert body["model"] == "org/first"
        assert body["max_tokens"] == 1
        assert "cache_salt" not in body
        [message] = body["messages"]
        image, text = message["content"]
        assert text == {"type": "text", "text": "Describe the image."}
        media_type, _, data = image["image_url"]["url"].partition(";base64,")
        sent[media_type] = base64.b64decode(data)
    assert sent == {
        "data:image/png": (folder / "a.png").read_bytes(),
        "data:image/jpeg": (folder / "b.jpg").read_bytes(),
        "data:image/webp": (folder / "below" / "c.dat").read_bytes(),
    }
    assert server.keys == {None}
    captured = capsys.readouterr()
    assert "3 sent, 0 of them reused what was stored, 0 failed, 2 skipped" in captured.out
    assert f"Skipped, no image: {folder / 'notes.txt'}" in captured.err
    assert f"Skipped, no image: {folder / 'broken.png'}" in captured.err


def test_options_reach_the_server(
    server: Server,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    options = ("--model", "org/second", "--text", "What?", "--salt", "tenant", "--json")
    command = ["warm", str(folder), "--url", server.url, *options]
    assert cli.main(command) == 0
    for body in server.bodies:
        assert body["model"] == "org/second"
        assert body["cache_salt"] == "tenant"
        assert body["messages"][0]["content"][1]["text"] == "What?"
    assert server.keys == {f"Bearer {KEY}"}
    first = json.loads(capsys.readouterr().out)
    assert (first["sent"], first["reused"], first["reused_tokens"]) == (3, 0, 0)
    assert first["failed"] == []
    assert first["skipped"] == [str(folder / "broken.png"), str(folder / "notes.txt")]
    assert cli.main(command) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["sent"], again["reused"], again["reused_tokens"]) == (3, 3, 51)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_requests_at_a_time(server: Server, folder: Path, concurrency: int) -> None:
    server.waits_for = concurrency
    options = ("--url", server.url, "--concurrency", str(concurrency))
    assert cli.main(["warm", str(folder), *options]) == 0
    assert server.most_running == concurrency


def test_a_server_without_figures(
    server: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.with_figures = False
    assert cli.main(["warm", str(folder), "--url", server.url, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["sent"], result["reused"], result["reused_tokens"]) == (3, None, None)


def test_what_is_refused_is_named(
    server: Server,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    server.refused = (folder / "a.png").read_bytes()
    assert cli.main(["warm", str(folder), "--url", server.url, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    problem = f"{server.url}: HTTP 400: too large for ***"
    assert result["failed"] == [{"file": str(folder / "a.png"), "problem": problem}]
    assert result["sent"] == 2
    assert cli.main(["warm", str(folder), "--url", server.url]) == 1
    captured = capsys.readouterr()
    assert f"Failed: {folder / 'a.png'}: {problem}" in captured.err
    assert "2 sent, 2 of them reused what was stored, 1 failed" in captured.out


# -- bad input ----------------------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert KEY not in line
    return line


def test_a_server_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert cli.main(["warm", str(folder), "--url", url]) == 1
    assert complaint(capsys) == f"vlcache warm: {url}: [Errno 111] Connection refused"


def test_a_key_goes_to_its_server_only(
    server: Server,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    server.redirect_to = f"http://127.0.0.1:{free_port()}/"
    assert cli.main(["warm", str(folder), "--url", server.url]) == 1
    assert "HTTP 302" in complaint(capsys)


def test_a_server_of_something_else(
    server: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["warm", str(folder), "--url", server.url + "/other"]) == 1
    assert "HTTP 404" in complaint(capsys)


def test_a_model_that_is_not_served(
    server: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["warm", str(folder), "--url", server.url, "--model", "x"]) == 1
    line = complaint(capsys)
    assert "--model=x: not served by" in line
    assert "served are: org/first, org/second" in line


def test_folders_without_images(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["warm", str(tmp_path / "missing"), "--url", server.url]) == 2
    assert f"{tmp_path / 'missing'}: no such folder" in complaint(capsys)
    assert cli.main(["warm", str(tmp_path), "--url", server.url]) == 1
    assert "there is no image in it" in complaint(capsys)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "127.0.0.1:8000", f"http://me:{KEY}@127.0.0.1", "http://x:99999"]
)
def test_urls_that_cannot_be(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["warm", ".", "--url", url])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "--url: only such as http://127.0.0.1:8000 is allowed" in shown
    assert KEY not in shown

"""Start vLLM's OpenAI server, send it chats with images, measure: what the scripts share."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).resolve().parent.parent
CELL_PX = 28
"""Edge of one cell of a test image: what one Qwen-VL image token covers."""

SERVER_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "LMCACHE_TRACK_USAGE": "false",
}
_LOG_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?([A-Z]+ \S+ \S+ (\[[^\]]*\] )?)?")
_ERROR_LINE = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt): |: error: ")

Part = dict[str, Any]
"""One part of a chat message's content, as the OpenAI API takes it."""


class ServerError(RuntimeError):
    """The server could not be started, died, or refused a request."""


# -- the server ---------------------------------------------------------------------------------


class VLLMServer:
    """`vllm serve` as a context manager, on 127.0.0.1 and a free port.

    It runs in a process group of its own. When the block is left, in whichever way, the server
    is asked to end (SIGINT), then its whole group is (SIGTERM), and whatever of the group is left
    after a grace period is killed.

    Args:
        model_dir: the checkpoint.
        connector: VLCache's options (`kv_connector_extra_config`), over a gate that is off:
            what reuse does is measured here, whatever was verified; None for plain vLLM.
        extra_args: more arguments of `vllm serve`.
        log_path: file for everything the server prints; replaced if it exists.
        env: more environment variables. `VLLM_CPU_KVCACHE_SPACE` is 1 (GiB) unless it is set
            here or in the environment.
        timeout: seconds until the server must be ready.
        grace: seconds it gets to end by itself.
        on_progress: called about twice a second while the server starts, with the seconds that
            passed and its newest log line.

    Attributes:
        base_url: of the server, without `/v1`.
        model: the name it serves the checkpoint under.
        log_path: see above.
        on_progress: see above; may be set until the block is entered.
        start_seconds: how long it took until it was ready.

    Raises:
        ServerError: on entering the block, when the server ends or the timeout passes.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *,
        connector: Mapping[str, Any] | None = None,
        extra_args: Sequence[str] = (),
        log_path: str | os.PathLike[str],
        env: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        grace: float = 20.0,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> None:
        self.model = "model"
        self.log_path = Path(log_path)
        self.base_url = ""
        self.start_seconds = 0.0
        self._model_dir = Path(model_dir)
        self._connector = connector
        self._extra_args = list(extra_args)
        self._env = dict(env or {})
        self._timeout = timeout
        self._grace = grace
        self.on_progress = on_progress
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VLLMServer:
        try:
            self._launch()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def process_group(self) -> int:
        """Id of the process group that holds the server's processes and no others.

        Raises:
            ServerError: the server is not running.
        """
        if self._process is None:
            raise ServerError("the vLLM server is not running")
        return self._process.pid

    def stop(self) -> None:
        """End the server and every process it started; does nothing when there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        gone = False
        try:
            # vLLM ends its own processes in order, if only the first one gets this signal.
            process.send_signal(signal.SIGINT)
            gone = _wait_for_group(process, self._grace)
            if not gone:
                _signal_group(process, signal.SIGTERM)
                gone = _wait_for_group(process, self._grace / 4)
        finally:
            # Also on a second Ctrl-C: never leave anything behind.
            if not gone:
                _signal_group(process, signal.SIGKILL)
                _wait_for_group(process, 10.0)

    def raise_if_dead(self) -> None:
        """Raises:
        ServerError: the server is no longer there; with its last log lines.
        """
        if self._process is None:
            raise ServerError("the vLLM server is not running")
        status = self._process.poll()
        if status is not None:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise ServerError(f"the vLLM server {how}\n{self.explain()}")

    def explain(self, lines: int = 25) -> str:
        """The log's first error and its last lines, for error messages."""
        first_error = None
        last: deque[str] = deque(maxlen=lines)
        for line in _lines_of(self.log_path):
            text = _LOG_PREFIX.sub("", line).strip()
            if first_error is None and _ERROR_LINE.search(text):
                first_error = text
            last.append(line)
        parts = [f"--- the last lines of {self.log_path}", *last]
        if first_error is not None:
            parts.append(f"--- the first error in it\n{first_error}")
        return "\n".join(parts)

    def command(self, port: int) -> list[str]:
        """The command line that serves on `port`."""
        command = [
            str(_vllm_command()),
            "serve",
            str(self._model_dir),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.model),
        ]
        if self._connector is not None:
            transfer = {
                "kv_connector": "VLCacheConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"gate": "off", **self._connector},
            }
            command += ["--kv-transfer-config", json.dumps(transfer)]
        return command + self._extra_args

    def _launch(self) -> None:
        port = _free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env | SERVER_ENV | self._env,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while True:
                self.raise_if_dead()
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.base_url}/health").status_code == httpx.codes.OK:
                        self.start_seconds = time.monotonic() - started
                        return
                elapsed = time.monotonic() - started
                if elapsed > self._timeout:
                    raise ServerError(
                        f"the vLLM server was not ready after {self._timeout:.0f} s\n"
                        + self.explain()
                    )
                if self.on_progress is not None:
                    self.on_progress(elapsed, self._newest_line())
                time.sleep(0.5)

    def _newest_line(self) -> str:
        newest = ""
        for line in _lines_of(self.log_path, last_bytes=4096):
            newest = _LOG_PREFIX.sub("", line).strip() or newest
        return newest


@contextlib.contextmanager
def start_together(servers: Mapping[str, VLLMServer]) -> Iterator[dict[str, ServerError]]:
    """Servers by name, alive inside the block; yields those that could not be started, and why.

    All are started before the first one is waited for.
    """
    failed: dict[str, ServerError] = {}
    with contextlib.ExitStack() as stack:
        for server in servers.values():
            stack.callback(server.stop)
            server._launch()
        for name, server in servers.items():
            try:
                server._wait_until_ready()
            except ServerError as error:
                server.stop()
                failed[name] = error
        yield failed


def _vllm_command() -> Path:
    """The `vllm` command of this Python's environment, else of `.venv`."""
    for folder in (Path(sys.executable).parent, ROOT / ".venv" / "bin"):
        if (folder / "vllm").exists():
            return folder / "vllm"
    raise ServerError("there is no vllm command: run scripts/setup.sh first")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _lines_of(path: Path, last_bytes: int | None = None) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, path.stat().st_size - last_bytes))
            for line in file:
                # A progress bar is one long line: of its states only the last one counts.
                yield line.decode(errors="replace").rstrip().rpartition("\r")[2]
    except OSError:
        return


def _signal_group(process: subprocess.Popen[bytes], sig: signal.Signals) -> None:
    # The group's id can't be another group's while one of its processes is alive.
    if _is_group_alive(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)


def _wait_for_group(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether `process` and all of its group are gone within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        process.poll()
        if not _is_group_alive(process.pid):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _is_group_alive(group: int) -> bool:
    """Whether a process of `group` still runs; ended ones that nobody waits for do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                return True
    return False


# -- what is sent -------------------------------------------------------------------------------


def make_image(seed: int, size: int) -> Image:
    """A coloured grid of 28 px cells, `size` px wide and high; the same for the same seed."""
    import numpy as np
    from PIL import Image

    if size < CELL_PX or size % CELL_PX:
        raise ValueError(f"size must be a positive multiple of {CELL_PX}, got {size}")
    cells = size // CELL_PX
    colours = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(CELL_PX, axis=0).repeat(CELL_PX, axis=1))


def image_part(image: Image) -> Part:
    """`image` as content, in a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> Part:
    """`text` as content."""
    return {"type": "text", "text": text}


# -- chats --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What came back for a chat.

    Attributes:
        text: of the answer.
        seconds: from sending the request to its end.
        ttft: seconds from sending the request to the first token; None when not streamed.
        prompt_tokens: of the prompt, images included.
        completion_tokens: of the answer.
        first_token: the first token, as `token_id:N`.
        first_logprobs: the most likely first tokens with their logprobs.
        kv_transfer_params: the connector's figures; None when streamed, or without a connector.
    """

    text: str
    seconds: float
    ttft: float | None
    prompt_tokens: int
    completion_tokens: int
    first_token: str
    first_logprobs: dict[str, float]
    kv_transfer_params: dict[str, Any] | None


def make_client(timeout: float = 300.0) -> httpx.Client:
    """An HTTP client for the functions below; no proxy stands before 127.0.0.1."""
    return httpx.Client(trust_env=False, timeout=timeout)


def counters(client: httpx.Client, server: VLLMServer) -> Counter[str]:
    """What vLLM counts on `/metrics`, summed over all labels but `tier` and `outcome`.

    Keys are `name`, `name/tier` and so on.
    """
    found: Counter[str] = Counter()
    response = client.get(f"{server.base_url}/metrics")
    _check_status(response)
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = (sample.labels[key] for key in ("tier", "outcome") if key in sample.labels)
            found["/".join((sample.name, *labels))] += sample.value
    return found


def reset_caches(client: httpx.Client, server: VLLMServer, *, connector: bool = True) -> None:
    """Empty the prefix cache, the encoder cache, and that of decoded images.

    The server needs `VLLM_SERVER_DEV_MODE`.

    Args:
        connector: let its KV connector forget what it has in memory, too.

    Raises:
        ServerError: it refused.
    """
    reset = f"reset_prefix_cache?reset_external={str(connector).lower()}"
    for path in (reset, "reset_encoder_cache", "reset_mm_cache"):
        with _explained(server):
            _check_status(client.post(f"{server.base_url}/{path}"))


def chat(
    client: httpx.Client,
    server: VLLMServer,
    content: Sequence[Part],
    *,
    max_tokens: int = 4,
    top_logprobs: int = 5,
    kv_transfer_params: Mapping[str, Any] | None = None,
) -> Answer:
    """Ask with one user message and wait for the whole answer; only this gives figures.

    Raises:
        ServerError: the request failed.
    """
    body = _body(server, content, max_tokens, top_logprobs, kv_transfer_params)
    started = time.perf_counter()
    with _explained(server):
        response = client.post(f"{server.base_url}/v1/chat/completions", json=body)
    seconds = time.perf_counter() - started
    _check_status(response)
    answer = response.json()
    choice = answer["choices"][0]
    first_token, first_logprobs = _first_token(choice["logprobs"])
    return Answer(
        text=choice["message"]["content"] or "",
        seconds=seconds,
        ttft=None,
        prompt_tokens=answer["usage"]["prompt_tokens"],
        completion_tokens=answer["usage"]["completion_tokens"],
        first_token=first_token,
        first_logprobs=first_logprobs,
        kv_transfer_params=answer.get("kv_transfer_params"),
    )


def chat_stream(
    client: httpx.Client,
    server: VLLMServer,
    content: Sequence[Part],
    *,
    max_tokens: int = 4,
    top_logprobs: int = 5,
    kv_transfer_params: Mapping[str, Any] | None = None,
) -> Answer:
    """As `chat`, streamed: measures the time to the first token.

    Raises:
        ServerError: the request failed.
    """
    body = _body(server, content, max_tokens, top_logprobs, kv_transfer_params)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    text: list[str] = []
    first: tuple[str, dict[str, float]] | None = None
    ttft: float | None = None
    usage: dict[str, int] = {}
    started = time.perf_counter()
    with (
        _explained(server),
        client.stream("POST", f"{server.base_url}/v1/chat/completions", json=body) as response,
    ):
        if response.is_error:
            response.read()
            _check_status(response)
        for chunk in _events(response):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content")
                logprobs = choice.get("logprobs")
                # The very first chunk only names the role.
                if ttft is None and (piece or (logprobs and logprobs["content"])):
                    ttft = time.perf_counter() - started
                    first = _first_token(logprobs)
                text.append(piece or "")
    seconds = time.perf_counter() - started
    if ttft is None or first is None or not usage:
        raise ServerError("the streamed answer ended without a token or without its usage")
    return Answer(
        text="".join(text),
        seconds=seconds,
        ttft=ttft,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        first_token=first[0],
        first_logprobs=first[1],
        kv_transfer_params=None,
    )


def _body(
    server: VLLMServer,
    content: Sequence[Part],
    max_tokens: int,
    top_logprobs: int,
    kv_transfer_params: Mapping[str, Any] | None,
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": list(content)}],
        "max_completion_tokens": max_tokens,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": top_logprobs,
        # Different tokens can read the same.
        "return_tokens_as_token_ids": True,
    }
    if kv_transfer_params is not None:
        body["kv_transfer_params"] = dict(kv_transfer_params)
    return body


@contextlib.contextmanager
def _explained(server: VLLMServer) -> Iterator[None]:
    """Turn a broken connection into an error that says what happened to the server."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise ServerError(f"no answer in time\n{server.explain()}") from error
    except httpx.TransportError as error:
        # A server that ends closes its connections a moment before it is gone.
        time.sleep(1.0)
        server.raise_if_dead()
        raise ServerError(f"the request failed: {error!r}\n{server.explain()}") from error


def _check_status(response: httpx.Response) -> None:
    if response.is_error:
        raise ServerError(f"the request failed: HTTP {response.status_code}: {response.text}")


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not data or data == line or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ServerError(f"the request failed: {event['error']}")
        yield event


def _first_token(logprobs: Mapping[str, Any] | None) -> tuple[str, dict[str, float]]:
    if not logprobs or not logprobs["content"]:
        raise ServerError("the server gave no logprobs for the first token")
    entry = logprobs["content"][0]
    return entry["token"], {top["token"]: top["logprob"] for top in entry["top_logprobs"]}

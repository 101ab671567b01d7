"""`vlcache warm`: a running server sees images ahead of its users, so that they are stored."""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ..config import ConfigError
from .console import CommandError, duration_text, in_parallel, out, positive, print_json, printable

API_KEY_VARIABLE = "VLLM_API_KEY"

_DEFAULT_TEXT = "Describe the image."
_ASK_SECONDS = 10.0
_ANSWER_SECONDS = 600.0
_SHOWN_CHARACTERS = 300
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises on files that are damaged, no images or far too large."""


def add_command(commands: Any) -> None:
    """Add `warm` to the commands."""
    command = commands.add_parser(
        "warm",
        help="send images through a running server, so that they are stored",
        description="Send every image of a folder, and of those below it, to a running vLLM with "
        "VLCache, one request each, so that their segments get stored.",
    )
    command.add_argument("folder", type=Path, metavar="FOLDER", help="folder of images")
    command.add_argument(
        "--url",
        required=True,
        type=_base_url,
        help="the server, such as http://127.0.0.1:8000; a key that it asks for comes from "
        f"{API_KEY_VARIABLE}",
    )
    command.add_argument(
        "--model", metavar="NAME", help="as the server calls it (default: the first it serves)"
    )
    command.add_argument(
        "--text",
        default=_DEFAULT_TEXT,
        help=f"the question behind the image (default: {_DEFAULT_TEXT})",
    )
    command.add_argument(
        "--salt", metavar="SALT", help="cache_salt of the requests that are to find the segments"
    )
    command.add_argument(
        "--concurrency", type=positive, default=4, metavar="N", help="requests at a time (4)"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run_warm)


def run_warm(args: argparse.Namespace) -> int:
    """Send the images."""
    types, skipped = _images(args.folder)
    server = _Server(args.url, os.environ.get(API_KEY_VARIABLE))
    model = server.choose_model(args.model)
    started = time.monotonic()

    def send(path: Path) -> _Sent | str:
        try:
            return server.send(path, types[path], model, args.text, args.salt)
        except (CommandError, OSError) as error:
            return str(error)

    answers = in_parallel("sending", send, list(types), args.concurrency)
    seconds = time.monotonic() - started
    failed = {path: a for path, a in zip(types, answers, strict=True) if isinstance(a, str)}
    sent = [answer for answer in answers if isinstance(answer, _Sent)]
    known = [answer.reused_tokens for answer in sent if answer.reused_tokens is not None]
    reused = sum(tokens > 0 for tokens in known) if known else None
    if args.json:
        print_json(
            {
                "url": args.url,
                "model": model,
                "sent": len(sent),
                "reused": reused,
                "reused_tokens": sum(known) if known else None,
                "failed": [{"file": str(p), "problem": why} for p, why in failed.items()],
                "skipped": [str(path) for path in skipped],
                "seconds": round(seconds, 3),
            }
        )
        return 1 if failed else 0
    for path in skipped:
        print(printable(f"Skipped, no image: {path}"), file=sys.stderr)
    for path, why in failed.items():
        print(printable(f"Failed: {path}: {why}"), file=sys.stderr)
    figures = "" if reused is None else f", {reused} of them reused what was stored"
    out().print(
        f"{len(sent)} sent{figures}, {len(failed)} failed, {len(skipped)} skipped, in "
        f"{duration_text(seconds)}"
    )
    return 1 if failed else 0


def _images(folder: Path) -> tuple[dict[Path, str], list[Path]]:
    """Images with their media types, and the other files."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    types: dict[Path, str] = {}
    others = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        media_type = _media_type(path)
        if media_type is None:
            others.append(path)
        else:
            types[path] = media_type
    if not types:
        raise CommandError(f"{folder}: there is no image in it")
    return types, others


def _media_type(path: Path) -> str | None:
    """By the file's header; None: no image."""
    try:
        with Image.open(path) as image:
            media_type = Image.MIME.get(image.format or "")
    except _UNREADABLE:
        return None
    return media_type if media_type is not None and media_type.startswith("image/") else None


def _base_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
        usable = usable and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or "@" in text:
        # Not shown: where there is an "@", there may be a password.
        raise argparse.ArgumentTypeError(
            f"only such as http://127.0.0.1:8000 is allowed; a key comes from {API_KEY_VARIABLE}"
        )
    return text.rstrip("/").removesuffix("/v1")


# -- the server ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sent:
    """An answer.

    Attributes:
        reused_tokens: as the connector says; None where it says nothing.
    """

    reused_tokens: int | None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for this server, and for no other."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


class _Server:
    """A server of the OpenAI API. Problems are raised as CommandError."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._key = api_key
        self._opener = urllib.request.build_opener(_NoRedirect)

    def choose_model(self, wanted: str | None) -> str:
        """`wanted`, if it is served; without, the first that is."""
        try:
            served = [str(model["id"]) for model in self._ask("/v1/models", None)["data"]]
        except (KeyError, TypeError):
            raise CommandError(f"{self._url}: what answers there is no OpenAI API") from None
        if not served or (wanted is not None and wanted not in served):
            given = f"--model={wanted}: not served by" if wanted is not None else "no model at"
            raise CommandError(f"{given} {self._url}; served are: {', '.join(served) or 'none'}")
        return served[0] if wanted is None else wanted

    def send(self, path: Path, media_type: str, model: str, text: str, salt: str | None) -> _Sent:
        """Have an image prefilled."""
        encoded = base64.b64encode(path.read_bytes()).decode()
        image = {"url": f"data:{media_type};base64,{encoded}"}
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": text}]
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0.0,
        }
        if salt is not None:
            body["cache_salt"] = salt
        answer = self._ask("/v1/chat/completions", body)
        tokens = None
        for key in ("kv_transfer_params", "vlcache", "reused_tokens"):
            tokens = answer = answer.get(key) if isinstance(answer, dict) else None
        return _Sent(tokens if isinstance(tokens, int) else None)

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        request = urllib.request.Request(self._url + path)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        seconds = _ASK_SECONDS if body is None else _ANSWER_SECONDS
        try:
            with self._opener.open(request, timeout=seconds) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                said = self._shown(error.read(1 << 16).decode(errors="replace"))
            raise CommandError(f"{self._url}: HTTP {error.code}: {said}") from None
        except urllib.error.URLError as error:
            raise CommandError(f"{self._url}: {error.reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise CommandError(f"{self._url}: {type(error).__name__}: {error}") from None

    def _shown(self, answer: str) -> str:
        """What an error answer says, in short."""
        try:
            said = json.loads(answer)
            answer = str((said.get("error") or said)["message"])
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        if self._key:
            answer = answer.replace(self._key, "***")
        return " ".join(answer.split())[:_SHOWN_CHARACTERS]

"""Fixtures: tiny models and engines, each made once and shared by all tests."""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from engine import IMAGE, Engine  # noqa: E402
from local_redis import LocalRedis, find_server  # noqa: E402
from make_tiny_model import make_tiny_model  # noqa: E402

MODELS = ROOT / ".cache" / "models"


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Path]:
    """Directory of a tiny model, by architecture."""

    def make(arch: str = "qwen2_5_vl") -> Path:
        return make_tiny_model(MODELS / f"{arch}-tiny", arch=arch)

    return make


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Callable[..., LocalRedis]]:
    """Starts servers, by their options."""
    if find_server() is None:
        pytest.skip("no redis-server")
    with contextlib.ExitStack() as servers:

        def start(**options: Any) -> LocalRedis:
            folder = tmp_path / f"redis-{uuid.uuid4().hex[:8]}"
            folder.mkdir()
            return servers.enter_context(LocalRedis(folder, **options))

        yield start


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """None from the environment of whoever runs the tests."""
    for variable in ("USERNAME", "PASSWORD", "CREDENTIALS_FILE"):
        monkeypatch.delenv(f"VLCACHE_REDIS_{variable}", raising=False)


@pytest.fixture(scope="session")
def image_placeholder() -> Callable[[str], str]:
    """The prompt text that stands for one image, by architecture."""
    return lambda arch: "<image>" if arch == "llava_onevision" else IMAGE


@pytest.fixture(scope="session")
def engines(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    """Engines by their arguments; the most recent ones stay alive."""
    alive: dict[str, Engine] = {}

    def get(connector: dict[str, Any] | None, arch: str = "qwen2_5_vl", **arguments: Any) -> Engine:
        key = json.dumps([connector, arch, arguments], sort_keys=True, default=str)
        if key not in alive:
            while len(alive) >= 4:
                alive.pop(next(iter(alive))).close()
            alive[key] = Engine(tiny_model(arch), connector, **arguments)
        # Kept in order of use.
        alive[key] = alive.pop(key)
        return alive[key]

    yield get
    for engine in alive.values():
        engine.close()

"""Fixtures: tiny models and engines, each made once and shared by all tests."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from local_redis import LocalRedis, find_server
from make_tiny_model import make_tiny_model
from tiny_architectures import ARCHITECTURES
from xdist.scheduler import LoadFileScheduling

from tests.helpers.engine import Engine
from tests.helpers.quick_start import KV_BLOCKS

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
ENGINES = 4
"""How many engines, of about 1.1 GB each, stay alive."""


# On a busy machine any example may take long.
hypothesis.settings.register_profile("vlcache", deadline=None)
hypothesis.settings.load_profile("vlcache")

FOLDERS = ("server", "scripts", "engine", "unit")
"""In the order in which they run: what takes longest first, so that processes end together."""


class Scheduling(LoadFileScheduling):
    """Tests of a file run in one process; so do all of `server/`, which share a server."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return "tests/server" if scope.startswith("tests/server/") else scope


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Which test runs in which process."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by its folder, and order them."""
    for item in items:
        path = item.path.relative_to(ROOT / "tests")
        item.add_marker(path.parts[0])
    items.sort(key=lambda item: FOLDERS.index(item.path.relative_to(ROOT / "tests").parts[0]))


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
    return lambda arch: ARCHITECTURES[arch].image


@pytest.fixture(scope="session")
def engines(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    """Engines by their arguments; those asked for most often stay alive."""
    alive: dict[str, Engine] = {}
    asked_for: Counter[str] = Counter()

    def get(connector: dict[str, Any] | None, arch: str = "qwen2_5_vl", **arguments: Any) -> Engine:
        key = json.dumps([connector, arch, arguments], sort_keys=True, default=str)
        if key not in alive:
            while len(alive) >= ENGINES:
                # The last one is still in use, to be compared with this one.
                *others, _ = alive
                alive.pop(min(others, key=lambda each: asked_for[each])).close()
            arguments.setdefault("num_gpu_blocks_override", KV_BLOCKS)
            alive[key] = Engine(tiny_model(arch), connector, **arguments)
        asked_for[key] += 1
        # Kept in order of use: among those asked for equally often, the latest one stays.
        alive[key] = alive.pop(key)
        return alive[key]

    yield get
    for engine in alive.values():
        engine.close()

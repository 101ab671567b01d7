"""Fixtures: servers of the tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import VLLMServer

from tests.helpers.deployment import CONFIGS, SMALL, with_options
from tests.helpers.quick_start import KV_BLOCKS, QUICK_START


@pytest.fixture(scope="session")
def serve(tiny_model: Callable[..., Path]) -> Callable[..., VLLMServer]:
    """A server of the tiny model, by its configuration and the file for its log."""

    def make(config: Path, log_path: Path, **env: str) -> VLLMServer:
        return VLLMServer(
            tiny_model(),
            extra_args=[
                *("--config", str(config), "--enforce-eager", "--max-model-len", "8192"),
                *("--num-gpu-blocks-override", str(KV_BLOCKS)),
            ],
            log_path=log_path,
            env=QUICK_START | env,
        )

    return make


@pytest.fixture(scope="package")
def cpu_server(
    serve: Callable[..., VLLMServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMServer]:
    """The tiny model, served with configs/cpu.yaml: for all tests that ask for no other server."""
    folder = tmp_path_factory.mktemp("cpu")
    config = with_options(CONFIGS / "cpu.yaml", folder, gate="off", **SMALL)
    with serve(config, folder / "server.log") as server:
        yield server

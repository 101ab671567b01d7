"""Fixtures: servers of the tiny model with the configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deployment import CONFIGS, SMALL, with_options
from serving import VLLMServer


@pytest.fixture(scope="package")
def serve(tiny_model: Callable[..., Path]) -> Callable[..., VLLMServer]:
    """A server of the tiny model, by its configuration and the file for its log."""

    def make(config: Path, log_path: Path, **env: str) -> VLLMServer:
        return VLLMServer(
            tiny_model(),
            extra_args=["--config", str(config), "--enforce-eager", "--max-model-len", "4096"],
            log_path=log_path,
            # Compiling the gathering of log-probs would take seconds.
            env={"TORCHDYNAMO_DISABLE": "1", **env},
        )

    return make


@pytest.fixture(scope="package")
def cpu_server(
    serve: Callable[..., VLLMServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMServer]:
    """The tiny model, served with configs/cpu.yaml."""
    folder = tmp_path_factory.mktemp("cpu")
    config = with_options(CONFIGS / "cpu.yaml", folder, **SMALL)
    with serve(config, folder / "server.log") as server:
        yield server

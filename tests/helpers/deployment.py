"""What the tests of the deployment files share."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml
from serving import ROOT

from vlcache_connector.metrics import Metric

CONFIGS = ROOT / "configs"
DOCKER = CONFIGS / "docker"
DOCKERFILES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SMALL = {"cpu_bytes": "128MiB", "encoder_cpu_bytes": "64MiB", "break_even": False}
"""In place of what is meant for real models: a tiny one computes faster than it loads."""
FROM_VLLM = (Metric("vllm:time_to_first_token_seconds", "histogram", "of vLLM itself"),)
"""Metrics of vLLM itself that the dashboard shows."""


def parse_command(args: list[str]) -> Any:
    """The arguments of `vllm serve`, read by its own parser (where vLLM 0.32 has it)."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(args)
    validate_parsed_serve_args(parsed)
    return parsed


def with_options(config: Path, folder: Path, **options: Any) -> Path:
    """A copy of a configuration in which some of VLCache's options are others."""
    content = yaml.safe_load(config.read_text())
    extra = content["kv-transfer-config"]["kv_connector_extra_config"]
    extra |= options
    copy = folder / config.name
    copy.write_text(yaml.safe_dump(content))
    return copy


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Name and arguments of a Dockerfile's instructions, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def arguments(dockerfile: Path, name: str) -> list[str]:
    return [rest for found, rest in instructions(dockerfile) if found == name]


def redis_options(command: list[str]) -> dict[str, str]:
    """Options of a redis-server by name, from its command line."""
    program, *rest = command
    assert program == "redis-server"
    return {
        name.removeprefix("--"): value or '""'
        for name, value in zip(rest[::2], rest[1::2], strict=True)
    }

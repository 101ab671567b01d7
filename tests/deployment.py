"""What the tests of the deployment files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from serving import ROOT
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

CONFIGS = ROOT / "configs"
SMALL = {"cpu_bytes": "128MiB", "encoder_cpu_bytes": "64MiB"}
"""In place of what is meant for real models."""


def parse_command(args: list[str]) -> Any:
    """The arguments of `vllm serve`, read by its own parser."""
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(args)
    validate_parsed_serve_args(parsed)
    return parsed


def with_options(config: Path, folder: Path, **options: Any) -> Path:
    """A copy of a configuration in which VLCache's options, all there already, are others."""
    content = yaml.safe_load(config.read_text())
    extra = content["kv-transfer-config"]["kv_connector_extra_config"]
    assert set(options) <= set(extra)
    extra |= options
    copy = folder / config.name
    copy.write_text(yaml.safe_dump(content))
    return copy

"""VLCache beside another KV connector, below vLLM's `MultiConnector`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.engine import IMAGE, Ask, Engine

A, B = (31, 448), (32, 448)
"""Each fills more than one of the blocks that vLLM's connector saves."""
ASKS = (
    Ask(f"the first about {IMAGE} here", (A,)),
    Ask(f"two of them {IMAGE} and {IMAGE}", (B, A)),
    Ask(f"known by now, and behind other text: {IMAGE} it is", (A,), max_tokens=3),
)


def example(folder: Path) -> dict[str, Any]:
    """vLLM's connector that writes all KV of a prompt to files, by its tokens and images."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def saved(folder: Path) -> Counter[tuple[str, str]]:
    """Files by name and content."""
    return Counter(
        (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*.safetensors")
    )


def test_a_producer_lets_nothing_approximate_out_through_its_siblings(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    vlcache = {
        "cpu_bytes": "64MiB",
        "encoder_cpu_bytes": "64MiB",
        "write_queue_bytes": "64MiB",
        "disk_path": str(tmp_path / "segments"),
        "break_even": False,
        "fetch_deadline_seconds": 20.0,
    }
    producer = {
        "kv_connector": "VLCacheConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": vlcache,
    }
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [producer, example(tmp_path / "both")]},
    }
    for folder in ("alone", "both"):
        (tmp_path / folder).mkdir()
    model = tiny_model()
    # Prefix hits would leave nothing to save; the connectors find what they have themselves.
    common = {"enable_prefix_caching": False}
    transfers = {"alone": example(tmp_path / "alone"), "both": both}
    answers = {}
    for name, transfer in transfers.items():
        engine = Engine(model, None, kv_transfer_config=transfer, **common)
        try:
            answers[name] = [engine.ask(ask)[0] for ask in ASKS]
        finally:
            engine.close()
    assert [a.tokens for a in answers["both"]] == [a.tokens for a in answers["alone"]]
    assert all((a.figures or {})["reused_tokens"] == 0 for a in answers["both"])
    assert saved(tmp_path / "both") == saved(tmp_path / "alone")
    assert len(saved(tmp_path / "both")) == len(ASKS) * 4  # layers

    # What it stored meanwhile is reused elsewhere.
    engine = Engine(model, vlcache)
    try:
        [warm] = engine.ask(ASKS[2])
    finally:
        engine.close()
    assert warm.figures is not None
    assert warm.figures["tier"] == "fs"
    assert warm.figures["reused_tokens"] > 0

"""Tests of scripts/simulate_nodes.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulate_nodes as simulation

GIB = simulation.GIB


def load(*requests: tuple[float, int, int]) -> simulation.Load:
    """Of (time, image, node)."""
    times, images, nodes = zip(*requests, strict=True)
    return simulation.Load(np.array(times), np.array(images), np.array(nodes))


def simulate(of: simulation.Load, upload: simulation.Upload, **options: Any) -> dict[str, Any]:
    store = simulation.Store(options.pop("store_bytes", GIB), 1 << 30)
    options = {"memory": "lru", "memory_bytes": GIB, **options}
    return simulation.simulate(of, simulation.Segments(), store=store, upload=upload, **options)


SHARED = load((0, 7, 0), (10, 7, 1), (20, 7, 0), (30, 7, 1), (40, 7, 2))
"""An image that three nodes are shown."""


@pytest.mark.parametrize(
    ("upload", "uploads", "store_hits"),
    [
        (simulation.Upload("", 1), 1, 2),  # the second node and the third load it
        (simulation.Upload("", 2), 1, 1),  # the second node computes it
        (simulation.Upload("", 2, only_absent=False), 2, 1),
        (simulation.Upload("", 2, by_all=True), 1, 1),
        (simulation.Upload("", 3), 0, 0),
    ],
)
def test_a_segment_is_uploaded_at_its_sight(
    upload: simulation.Upload, uploads: int, store_hits: int
) -> None:
    figures = simulate(SHARED, upload)
    assert figures["uploads_per_image"] == uploads
    assert figures["store_hits"] == store_hits / 4  # the first request can't be a hit
    assert figures["host_hits"] == 2 / 4
    assert figures["written_bytes"] * store_hits == figures["read_bytes"] * uploads


def test_who_computes_at_the_same_time_uploads_too() -> None:
    at_once = load((0, 7, 0), (0.001, 7, 1), (5, 7, 2))
    figures = simulate(at_once, simulation.Upload("", 1))
    assert figures["most_uploads"] == 2
    assert figures["store_hits"] == 1 / 2


def test_a_full_store_drops_what_was_not_used_for_longest() -> None:
    num_bytes = simulation.Segments()[1][1]
    twice = load((0, 1, 0), (5, 2, 0), (10, 1, 1))
    known = simulate(twice, simulation.Upload("", 1))
    small = simulate(twice, simulation.Upload("", 1), store_bytes=num_bytes)
    assert (known["store_hits"], small["store_hits"]) == (1.0, 0.0)


@pytest.mark.parametrize("name", simulation.MEMORIES)
def test_memory_keeps_to_its_budget(name: str) -> None:
    memory = simulation.MEMORIES[name](10)
    rng = np.random.default_rng(0)
    sizes = {key: int(rng.integers(1, 5)) for key in range(20)}
    for key in map(int, rng.integers(20, size=500)):
        if not memory.use(key):
            memory.add(key, sizes[key])
            assert memory.use(key)
        assert sum(sizes[key] for key in sizes if _is_there(memory, key)) <= 10


def _is_there(memory: Any, key: int) -> Any:
    if isinstance(memory, simulation.SegmentedLRU):
        return memory._index.is_ready(key)
    return key in memory._sizes


@pytest.mark.parametrize("name", ["slru", "arc"])
def test_one_offs_do_not_drive_out_what_comes_back(name: str) -> None:
    def survives(name: str) -> bool:
        memory = simulation.MEMORIES[name](10)
        memory.add("hot", 1)
        assert memory.use("hot")
        for number in range(50):
            memory.add(number, 1)
        return memory.use("hot")

    assert survives(name)
    assert not survives("lru")


def test_keys_are_those_of_segments() -> None:
    segments = simulation.Segments()
    (key, num_bytes), (other, _) = segments[1], segments[2]
    assert key != other
    assert key.model_name == "simulated"
    assert num_bytes > min(simulation.TOKENS) * 57_344


def test_reduced_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "nodes"
    words = ["--nodes", "5", "--requests", "500", "--images", "50", "--output", str(output)]
    assert simulation.main(words) == 0
    document = json.loads(output.with_suffix(".json").read_text())
    text = output.with_suffix(".md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert len(document["uploads"]) == 2 * len(simulation.ONE_OFFS) * len(simulation.UPLOADS)
    assert len(document["memory"]) == 3 * len(simulation.ONE_OFFS) * len(simulation.MEMORIES)
    for cell in (*document["uploads"], *document["memory"]):
        assert 0 <= cell["host_hits"] + cell["store_hits"] <= 1
    assert text.count("| one node alone |") == len(simulation.ONE_OFFS) * len(simulation.MEMORIES)


def test_wrong_command_lines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--nodes", "1"], ["--rate", "0"]):
        with pytest.raises(SystemExit):
            simulation.main(words)
    assert "at least two nodes" in capsys.readouterr().err

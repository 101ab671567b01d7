"""Tests of scripts/bench_tiers.py."""

import contextlib
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import bench_tiers as bench
import pytest
from PIL import Image

from tests.helpers.script import run_script
from vlcache_connector.config import ADAPTER_TYPES


def _tiers(px: int, pair: int, **ttft: float) -> list[Any]:
    return [bench.Sample("tiers", how, how, px, 16, pair, t) for how, t in ttft.items()]


def _gate(loads: bool, *rounds: tuple[float, float], source: str = "valkey") -> list[Any]:
    """Rounds of (TTFT with the KV loaded, with it computed)."""
    samples = []
    for pair, (load, compute) in enumerate(rounds):
        estimates = {"load": 0.25, "compute": 0.5} if pair else {"compute": 0.4}
        about = {"estimates": estimates, "gate_loads": loads}
        for how, ttft, more in (
            ("plain", 2.5, {}),
            ("compute", compute, about),
            ("load", load, about | {"read_seconds": 0.2}),
            ("memory", 0.1, {}),
        ):
            samples.append(bench.Sample("gate", source, how, 448, 256, pair, ttft, **more))
    return samples


def _document(samples: list[Any]) -> dict[str, Any]:
    return {
        "schema": bench.SCHEMA,
        "complete": False,
        "started": "2026-01-01T00:00:00+00:00",
        "command": "python scripts/bench_tiers.py",
        "git": {"commit": None, "changed": False},
        "versions": {"python": "3.11.0"},
        "machine": {"cpu": "CPU", "cores": 2},
        "settings": {"model": "model", "dtype": "float32"},
        "notes": [],
        "facts": {"tokens_per_second": 1000.0, "bytes_per_token": 16384},
        "bandwidth": [
            {"what": "fs: get", "streams": 1, "num_bytes": 10**6, "seconds": [0.001, 0.002, 0.004]},
            {"what": "fs: get", "streams": 1, "num_bytes": 10**7, "seconds": [0.01]},
            {"what": "fs: get", "streams": 4, "num_bytes": 4 * 10**7, "seconds": [0.02]},
        ],
        "decoding": [
            {"source": "fs", "pair": pair, "loads_per_second": rate, "gaps": gaps, "loads": loads}
            | {"num_bytes": 10**6 * loads}
            for pair in range(2)
            for rate, gaps, loads in ((0.0, [0.01] * 10, 0), (10.0, [0.012] * 9 + [0.1], 2))
        ],
        "samples": [bench.asdict(sample) for sample in samples],
    }


def test_ratios_are_taken_within_rounds() -> None:
    samples = [
        *_tiers(448, 0, cpu=1.0, valkey=2.0, cold=4.0),
        *_tiers(448, 1, cold=8.0, valkey=2.0, cpu=1.0),
        *_tiers(448, 2, valkey=100.0),  # interrupted
        *_tiers(224, 0, cold=1.0, device=0.5),
    ]
    cells = bench.tier_cells(samples)
    assert [(cell.image_px, cell.how, cell.rounds) for cell in cells] == [
        *((224, "cold", 1), (224, "device", 1)),
        *((448, "cold", 2), (448, "valkey", 2), (448, "cpu", 2)),
    ]
    assert cells[3].ratio == bench.Spread(0.375, 0.25, 0.5)
    assert cells[4].ttft == bench.Spread(1.0, 1.0, 1.0)


def test_the_gate_is_judged_by_what_was_faster() -> None:
    [cell] = bench.gate_cells(_gate(True, (1.1, 2.1), (2.1, 4.1), (0.6, 1.1)))
    assert (cell.load, cell.compute, cell.plain) == pytest.approx((1.0, 2.0, 2.4))
    assert (cell.estimated_load, cell.estimated_compute) == (0.25, 0.5)
    assert cell.read == 0.2
    assert cell.gate_loads
    assert (cell.verdict, cell.lost) == ("right", 0.0)

    [cell] = bench.gate_cells(_gate(False, (1.0, 4.0), (2.0, 4.0)))
    assert cell.verdict == "wrong"
    assert cell.lost == pytest.approx(1 - 0.375)
    [cell] = bench.gate_cells(_gate(True, (4.0, 1.0), (4.0, 1.0)))
    assert cell.verdict == "wrong"
    assert cell.lost == pytest.approx(0.75)
    [cell] = bench.gate_cells(_gate(False, (4.0, 1.0)))
    assert cell.verdict == "right"
    [cell] = bench.gate_cells(_gate(True, (1.0, 2.0), (2.1, 2.0), (1.0, 2.0)))
    assert cell.verdict == "close"


def test_plot_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [
        *_tiers(448, 0, cold=4.0, valkey=2.0, fs=1.5, cpu=1.0, device=0.5),
        *_gate(True, (1.0, 2.0)),
        *_gate(False, (1.0, 2.0), source="valkey at 2.0 MB/s"),
    ]
    path = tmp_path / "tiers.json"
    path.write_text(json.dumps(_document(samples)))
    command = ["--plot-only", "--output", str(tmp_path / "tiers")]
    assert bench.main(command) == 0
    page = (tmp_path / "tiers.md").read_text()
    assert page in capsys.readouterr().out
    assert "| fs: get | 1 | 500 (250-1000); 2.0 ms | 1000 (1000-1000); 10.0 ms |" in page
    assert "| fs: get | 4 |  | 2000 (2000-2000); 20.0 ms |" in page
    assert "| fs | 9.6 | 10 | 12.0 | 100.0 | 100.0 | 1.20 (1.20-1.20) |" in page
    assert "| 448 px | 16 | valkey | 1 | 2.000 (2.000-2.000) | 0.500 (0.500-0.500) |" in page
    assert "| valkey at 2.0 MB/s | 448 px | - | 0.200 | 0.900 | 0.400 | 1.900 | 2.400 " in page
    assert "| compute | **wrong**, 50% lost |" in page
    assert "1 right, 0 close, 1 wrong" in page
    assert "interrupted" in page
    with Image.open(tmp_path / "tiers.png") as picture:
        assert min(picture.size) > 400

    path.write_text('{"schema": 0}')
    assert bench.main(command) == 1
    assert "was not written by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "450"], "450 px: must be a multiple of 28, 112 to 1792"),
        (["--gate-sizes", "84"], "84 px: must be"),
        (["--rounds", "0"], "must be above 0"),
        (["--parts", "all"], "invalid choice"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_a_link_is_as_slow_for_all_connections_together() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                client, _ = server.accept()
                with client:
                    client.sendall(client.recv(10) * 20_000)

        threading.Thread(target=answer, daemon=True).start()
        with bench.Link(server.getsockname()[1], 1e6) as link:
            clients = [socket.create_connection(("127.0.0.1", link.port)) for _ in range(2)]
            started = time.monotonic()
            for client in clients:
                client.sendall(b"0123456789")
            received = [0, 0]
            for index, client in enumerate(clients):
                while data := client.recv(1 << 16):
                    received[index] += len(data)
                client.close()
            seconds = time.monotonic() - started
    assert received == [200_000, 200_000]
    assert 0.35 < seconds < 20


def _is_missing(name: str) -> bool:
    if name == "mooncake":
        return bench.find_master() is None
    return name in ("valkey", "resp") and not (bench.find_valkey() or bench.find_server())


@pytest.mark.parametrize("name", [None, *ADAPTER_TYPES])
def test_bandwidth(name: str | None, tmp_path: Path) -> None:
    if name is not None and _is_missing(name):
        pytest.skip(f"{name}: no server")
    with contextlib.ExitStack() as stack:
        servers = bench.Servers.start(stack, [name or ""], tmp_path)
        assert not servers.missing
        spec = servers.spec(name, tmp_path) if name else None
        results = bench.measure_bandwidth(spec, [1, 2], 2)
        if name in ("valkey", "resp"):
            assert servers.redis is not None
            assert servers.redis.client.dbsize() == 0
    left = [path for folder in tmp_path.glob("fs*") for path in folder.rglob("*.data")]
    assert left == []
    operations = {(result["what"], result["streams"]) for result in results}
    if name is None:
        places = [f"{place}: {what}" for place in ("host", "device") for what in ("put", "get")]
        assert operations == {*((what, 1) for what in places), ("copy", 1), ("copy", 4)}
    else:
        gets = ["get", "get, from the page cache"] if name.startswith("fs") else ["get"]
        assert operations == {(f"{name}: {what}", n) for what in ("put", *gets) for n in (1, 4)}
    assert len(results) == 2 * len(operations)
    assert all(len(result["seconds"]) == 2 and min(result["seconds"]) > 0 for result in results)
    sizes = {result["num_bytes"] / result["streams"] for result in results}
    assert len(sizes) == 2


def test_reduced_run(tmp_path: Path) -> None:
    output = tmp_path / "results" / "tiers"
    adapters = ["fs"] if _is_missing("valkey") else ["valkey", "fs"]
    arguments = [
        *("--size", "tiny", "--adapters", *adapters),
        *("--segments", "1", "--runs", "2", "--sizes", "224", "--rounds", "2"),
        *("--gate-sizes", "224", "448", "--gate-rounds", "1", "--link-speeds", "0.05"),
        *("--decoding-steps", "40"),
        *("--output", str(output), "--cache-dir", str(tmp_path / "cache")),
    ]
    run_script("bench_tiers.py", *arguments)

    document = json.loads(output.with_name("tiers.json").read_text())
    assert document["complete"] is True
    assert document["facts"]["bytes_per_token"] > 0
    samples = [bench.Sample(**entry) for entry in document["samples"]]
    cells = bench.tier_cells(samples)
    assert {cell.how for cell in cells} == {"cold", "cpu", "device", *adapters}
    assert all(cell.rounds == 2 and cell.image_tokens == 64 for cell in cells)
    gate = bench.gate_cells(samples)
    assert len({cell.source for cell in gate}) == (3 if "valkey" in adapters else 1)
    assert {cell.image_px for cell in gate} == {224, 448}
    assert all(cell.read and cell.estimated_load and cell.estimated_compute for cell in gate)
    # Twenty times slower than computing, over the same Redis.
    slow = [cell for cell in gate if " at " in cell.source]
    assert bool(slow) == ("valkey" in adapters)
    assert not any(cell.gate_loads for cell in slow)
    for cell in slow:
        assert cell.read is not None
        assert cell.estimated_compute is not None
        assert cell.read > 2 * cell.estimated_compute
    assert {entry["source"] for entry in document["decoding"]} == set(adapters)
    for entry in document["decoding"]:
        assert len(entry["gaps"]) == 40
        assert bool(entry["loads"]) == bool(entry["loads_per_second"])
    assert "## Break-even" in output.with_name("tiers.md").read_text()
    with Image.open(output.with_name("tiers.png")) as picture:
        assert picture.format == "PNG"
    left = [path for path in (tmp_path / "cache").iterdir() if path.name != "models"]
    assert left == []  # neither segments nor the server's folder

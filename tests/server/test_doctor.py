"""`vlcache doctor` on this machine, with real adapters, servers and disks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from local_redis import LocalRedis, free_port

from tests.helpers.triton_device import DEVICE, needs_triton
from vlcache_connector import cli, seams
from vlcache_connector.cli.checks import Options, kernel_problem
from vlcache_connector.config import ConfigError
from vlcache_connector.seams import Seam, check_seams

# LMCache's logging sets off a deprecation inside OpenTelemetry.
pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = {"cpu_bytes": "64MiB", "encoder_cpu_bytes": "64MiB", "write_queue_bytes": "64MiB"}
Doctor = Callable[..., tuple[int, dict[str, dict[str, str]], list[str]]]


def transfer(kv_role: str = "kv_both", **options: Any) -> str:
    extra = {**SMALL, **options}
    connector = "VLCacheConnector"
    return json.dumps(
        {"kv_connector": connector, "kv_role": kv_role, "kv_connector_extra_config": extra}
    )


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Exit status, rows of the result by their names, and the lines about failures."""

    def run(**options: Any) -> Any:
        status = cli.main(["doctor", "--json", "--kv-transfer-config", transfer(**options)])
        captured = capsys.readouterr()
        result = json.loads(captured.out)
        assert result["ok"] == (status == 0)
        for row in result["checks"]:
            assert set(row) == {"check", "found", "remedy", "result"}
            assert row["result"] in ("ok", "warning", "failure")
            assert bool(row["remedy"]) == (row["result"] != "ok")
        lines = [line for line in captured.err.splitlines() if line.startswith("vlcache doctor: ")]
        assert len(lines) == sum(row["result"] == "failure" for row in result["checks"])
        return status, {row["check"]: row for row in result["checks"]}, lines

    return run


def test_here_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--kv-transfer-config", transfer()]) == 0
    output = capsys.readouterr().out
    for name in ("python", "vllm", "lmcache", "torch", "triton", "plug-in", "seams", "platform"):
        assert re.search(rf"│ {name} +│ ok", output), name
    assert "what to do" in output
    assert "CPU_ATTN, wrapped" in output


def test_tiers_are_measured_and_left_as_they_were(
    doctor: Doctor, redis_server: Callable[..., LocalRedis], tmp_path: Path
) -> None:
    redis = redis_server(maxmemory="256mb", maxmemory_policy="allkeys-lru")
    (tmp_path / "native").mkdir()
    status, rows, lines = doctor(
        redis_url=redis.url,
        disk_path=str(tmp_path / "segments"),
        disk_bytes="1MiB",
        l2_adapters=[
            {"type": "fs_native", "base_path": str(tmp_path / "native")},
            {"type": "resp", "host": "127.0.0.1", "port": redis.port},
        ],
    )
    assert (status, lines) == (0, [])
    for tier in ("fs", "fs_native", "resp", "valkey"):
        for what in ("", " latency", " write", " bandwidth"):
            assert rows[f"{tier}{what}"]["result"] == "ok"
        assert float(rows[f"{tier} latency"]["found"].removesuffix(" ms")) > 0
        rates = re.findall(r"(\d+) MB/s", rows[f"{tier} bandwidth"]["found"])
        assert len(rates) == 2
        assert all(float(rate) > 0 for rate in rates)
    assert rows["valkey TLS"]["result"] == "ok"
    assert rows["valkey memory"]["found"] == "maxmemory 256.0 MiB, allkeys-lru"
    assert redis.dump() == {}
    assert [path.name for path in tmp_path.rglob("*") if "redis" not in str(path)] == ["native"]


def test_a_redis_that_will_be_full_is_a_warning(
    doctor: Doctor, redis_server: Callable[..., LocalRedis]
) -> None:
    status, rows, _ = doctor(redis_url=redis_server(maxmemory="256mb").url)
    assert status == 0
    assert rows["valkey memory"]["result"] == "warning"
    assert "allkeys-lru" in rows["valkey memory"]["remedy"]


def test_a_redis_that_is_full(doctor: Doctor, redis_server: Callable[..., LocalRedis]) -> None:
    status, rows, [line] = doctor(redis_url=redis_server(maxmemory="2mb").url)
    assert status == 1
    assert rows["valkey"]["result"] == "ok"
    assert line.startswith("vlcache doctor: valkey write: OutOfMemoryError: ")
    assert line.endswith("see that there is room")


@pytest.mark.parametrize("kind", ["valkey", "resp"])
def test_a_redis_that_is_not_there(doctor: Doctor, kind: str) -> None:
    port = free_port()
    if kind == "valkey":
        status, rows, [line] = doctor(redis_url=f"redis://127.0.0.1:{port}")
    else:
        status, rows, [line] = doctor(
            l2_adapters=[{"type": "resp", "host": "127.0.0.1", "port": port}]
        )
    assert status == 1
    assert f"{kind} write" not in rows
    assert line.startswith(f"vlcache doctor: {kind}: ")
    assert line.endswith("; see to it that it answers")


def test_a_wrong_password(
    doctor: Doctor, redis_server: Callable[..., LocalRedis], monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = redis_server(requirepass="hunter2", maxmemory="256mb", maxmemory_policy="allkeys-lru")
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", "wr0ng")
    status, rows, [line] = doctor(redis_url=redis.url)
    assert status == 1
    assert "put who to log in as into VLCACHE_REDIS_USERNAME and" in line
    assert not {"hunter2", "wr0ng"} & set(re.findall(r"\w+", line + str(rows)))
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", "hunter2")
    status, rows, _ = doctor(redis_url=redis.url)
    assert status == 0
    assert "hunter2" not in str(rows)


def test_a_user_that_may_only_read(
    doctor: Doctor, redis_server: Callable[..., LocalRedis], monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = redis_server()
    rules = {"passwords": ["+hunter2"], "keys": ["vlcache*"], "categories": ["+@all", "-@write"]}
    redis.client.acl_setuser("reader", enabled=True, **rules)
    monkeypatch.setenv("VLCACHE_REDIS_USERNAME", "reader")
    monkeypatch.setenv("VLCACHE_REDIS_PASSWORD", "hunter2")
    status, rows, [line] = doctor(redis_url=redis.url)
    assert status == 1
    assert line.startswith("vlcache doctor: valkey write: NoPermissionError")
    status, rows, _ = doctor(redis_url=redis.url, kv_role="kv_consumer")
    assert status == 0
    assert rows["valkey write"]["result"] == "warning"


def test_a_directory_that_is_not_fit(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, problem in (
        ("/proc/segments", "No such file"),
        (str(tmp_path / "file" / "segments"), "Not a directory"),
        (str(tmp_path), "it holds 'file', which is not ours"),
    ):
        status, _, [line] = doctor(disk_path=path)
        assert status == 1
        assert line.startswith(f"vlcache doctor: fs: disk_path={path!r}: {problem}")
        assert line.endswith("; name an empty directory, or one that does not exist yet")


def test_less_room_than_the_budget_is_a_warning(doctor: Doctor, tmp_path: Path) -> None:
    status, rows, _ = doctor(disk_path=str(tmp_path / "segments"), disk_bytes="1000TiB")
    assert status == 0
    assert rows["disk space"]["result"] == "warning"


def test_an_adapter_that_there_is_not(doctor: Doctor) -> None:
    status, _, [line] = doctor(l2_adapters=[{"type": "nonsense"}])
    assert status == 1
    assert "l2_adapters[0].type='nonsense'" in line


def test_budgets_above_memory(doctor: Doctor) -> None:
    status, _, [line] = doctor(cpu_bytes="100TiB")
    assert status == 1
    assert line.startswith("vlcache doctor: memory: cpu_bytes=")
    assert line.endswith("are available; lower them, unless the server runs here already")


def test_a_bad_key(doctor: Doctor) -> None:
    status, _, [line] = doctor(recompute_ratio=2)
    assert status == 1
    assert "recompute_ratio=2 is refused" in line


def test_an_unsupported_vllm(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    of = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.34.1" if name == "vllm" else of(name))
    status, rows, [line] = doctor()
    assert status == 1
    assert rows["vllm"]["result"] == "failure"
    wanted = seams.supported("vllm")
    assert line == f"vlcache doctor: vllm: 0.34.1; {wanted} is needed; pip install 'vllm{wanted}'"


@needs_triton
def test_the_kernel_is_tried() -> None:
    assert kernel_problem(DEVICE) is None
    assert kernel_problem(torch.device("meta")) is not None


def test_a_changed_seam(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "changes", lambda: check_seams([Seam("vllm.nowhere:X", "x.py")]))
    status, rows, [line] = doctor()
    assert status == 1
    assert line.startswith("vlcache doctor: seam: vllm.nowhere:X is not there (needed by x.py); ")
    assert rows["attention backend"]["found"] == "not checked"


def test_a_vllm_that_can_not_be_imported(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.config", None)
    status, rows, [line] = doctor(disk_path=str(tmp_path))
    assert status == 1
    assert line.startswith("vlcache doctor: vllm import: ModuleNotFoundError")
    assert rows["seams"]["found"] == rows["memory"]["found"] == "not checked"
    assert rows["fs bandwidth"]["result"] == "ok"


@pytest.mark.parametrize("name", ["gpu", "cpu", "redis", "consumer", "mooncake"])
def test_files_of_vllm_serve_are_read(name: str) -> None:
    options = Options.read(CONFIGS / f"{name}.yaml")
    assert options.transfer["kv_connector"] == "VLCacheConnector"
    assert options.num_ranks == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file or directory; name a file"),
        ("a: [", "no YAML: "),
        ("- a", "options as `key: value` are needed"),
        ("model: m", "no kv-transfer-config in it"),
        ("kv-transfer-config: '{'", "kv-transfer-config: "),
        ("kv-transfer-config: {}\ntensor-parallel-size: 0", "tensor-parallel-size=0: a number"),
    ],
)
def test_a_file_that_is_none(
    content: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(f"--config={path}: {expected}")):
        Options.read(path)
    assert cli.main(["doctor", "--config", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vlcache doctor: --config={path}: ")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_json_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--kv-transfer-config", text])
    assert ended.value.code == 2
    assert "argument --kv-transfer-config: " in capsys.readouterr().err.splitlines()[-1]

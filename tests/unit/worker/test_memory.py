"""Budgets against the memory that is there."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from vlcache_connector.config import ConfigError, VLCacheConfig
from vlcache_connector.worker import memory
from vlcache_connector.worker.memory import available_host_memory, check_memory, taking_turns

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """Of the control group."""
    values: dict[str, int | None] = {"limit": None, "usage": None}
    monkeypatch.setattr(memory, "get_cgroup_memory_limit", lambda: values["limit"])
    monkeypatch.setattr(memory, "get_cgroup_memory_usage", lambda: values["usage"])
    monkeypatch.setattr(memory, "_STATISTICS", ())
    return values


def test_available_memory_is_what_the_control_group_leaves(limits: dict[str, int | None]) -> None:
    total = psutil.virtual_memory().total
    assert 0 < available_host_memory() <= total
    limits["limit"] = 3 << 20
    assert available_host_memory() == 3 << 20
    limits["usage"] = 1 << 20
    assert available_host_memory() == 2 << 20
    limits["usage"] = 4 << 20
    assert available_host_memory() == 0
    limits["limit"] = 10 * total
    assert 0 < available_host_memory() <= total


def test_those_that_start_together_look_at_memory_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two engines of 3 GiB each, where 4 GiB are free: one starts, the other is told."""
    free = [4 * GIB]
    monkeypatch.setattr(memory, "available_host_memory", lambda: free[0])
    together = threading.Barrier(2, timeout=30)

    def start() -> bool:
        together.wait()
        try:
            with taking_turns():
                check_memory(VLCacheConfig(), 3 * GIB, CPU)
                time.sleep(0.1)  # taking so much, and touching it, takes its time
                free[0] -= 3 * GIB
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda _: start(), range(2))) == [False, True]


def test_nobody_is_waited_for_where_there_is_no_folder_for_a_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/nowhere")
    with taking_turns(), taking_turns():
        pass


def test_host_memory_that_is_not_there_is_refused(limits: dict[str, int | None]) -> None:
    limits["limit"] = GIB
    check_memory(VLCacheConfig(), GIB, CPU)
    with pytest.raises(ConfigError, match=r"take 1\.50 GiB .* 1\.00 GiB are available\. Lower"):
        check_memory(VLCacheConfig(), 3 * GIB // 2, CPU)


def test_device_memory_of_a_cpu_is_host_memory(limits: dict[str, int | None]) -> None:
    limits["limit"] = GIB
    with pytest.raises(ConfigError, match=f"device_bytes={GIB // 2} take 1.25 GiB"):
        check_memory(VLCacheConfig(device_bytes=GIB // 2), 3 * GIB // 4, CPU)


def test_device_memory_that_vllm_has_taken_is_refused(
    limits: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits["limit"] = GIB

    def mem_get_info(device: Any) -> tuple[int, int]:
        return 2 * GIB, 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    check_memory(VLCacheConfig(device_bytes=2 * GIB), GIB, CUDA)
    with pytest.raises(ConfigError, match=f"device_bytes={3 * GIB}: vLLM left 2.00 GiB"):
        check_memory(VLCacheConfig(device_bytes=3 * GIB), GIB, CUDA)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("anon 5\ninactive_file 3\nactive_file 9\n", 3),
        ("inactive_file 3\ntotal_inactive_file 7\n", 7),
        ("anon 5\n", 0),
        ("nonsense", 0),
        (None, 0),
    ],
)
def test_files_that_nobody_reads_are_no_memory_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: int
) -> None:
    statistics = tmp_path / "memory.stat"
    if text is not None:
        statistics.write_text(text)
    monkeypatch.setattr(memory, "_STATISTICS", (tmp_path / "absent", statistics))
    monkeypatch.setattr(memory, "get_cgroup_memory_limit", lambda: 100)
    monkeypatch.setattr(memory, "get_cgroup_memory_usage", lambda: 60)
    assert available_host_memory() == 40 + expected

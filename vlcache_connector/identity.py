"""The identity of a model as it is run: what a segment's numbers depend on but the item itself.

Segments are kept under keys that contain it, so that what other weights, another preprocessing or
another arithmetic made is never found.

vLLM seams: `VllmConfig` (`vllm/config`); the loaders (`vllm/model_executor/model_loader`), whose
way of finding a checkpoint is followed here; the multimodal registry
(`vllm/multimodal/registry.py`), asked for the processor that the model uses.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
import vllm.envs as envs
from huggingface_hub import snapshot_download
from vllm.logger import init_logger
from vllm.multimodal import MULTIMODAL_REGISTRY

from .config import ConfigError
from .keys import digest
from .support import PLAIN_KV_DTYPES, config_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_FILE_FORMATS = frozenset(
    {
        *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "pt"),
        *("npcache", "gguf", "bitsandbytes", "sharded_state"),
        *("runai_streamer", "runai_streamer_sharded"),
    }
)
"""Load formats that read files of a folder; others get weights from where nothing can be hashed."""

_READERS = 4
_PIECE = 16 << 20
_SETTLED_SECONDS = 2.0
"""A file that was written later than this before it was hashed may have changed unseen since: its
time stamp does not tell."""


_hashed: dict[Path, list[Any]] = {}
"""What this process has hashed, where nothing can be kept on disk."""


def model_fingerprint(vllm_config: VllmConfig) -> str:
    """Digest of all that a segment's numbers depend on but the item and its context.

    The same on every server that runs the same weights in the same way, wherever they lie.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    kv_dtype = vllm_config.cache_config.cache_dtype
    return digest(
        {
            "weights": weights_fingerprint(vllm_config),
            "dtype": str(model.dtype),
            # All layers but the first attend to what was quantised.
            "kv_cache_dtype": None if kv_dtype in PLAIN_KV_DTYPES else kv_dtype,
            "quantization": model.quantization,
            "tp": parallel.tensor_parallel_size,
            "preprocessing": _preprocessing(model),
        }
    )


def weights_fingerprint(vllm_config: VllmConfig) -> str | None:
    """Digest of a checkpoint: its dimensions and the content of its weight files.

    It does not depend on where the checkpoint lies or how it is run (dtype, ranks).

    Returns:
        None when the weights come from where they can't be hashed: an object store, a loader of
        its own.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    weights: Any
    if load.load_format == "dummy":
        weights = ["dummy", model.seed]
    else:
        files = _weight_files(vllm_config)
        if not files:
            return None
        weights = _hashes(files)
    return digest({"hf_config": _dimensions(model.hf_config.to_dict()), "weights": weights})


def check_identity(vllm_config: VllmConfig, *, is_loaded: bool) -> None:
    """Refuse tiers that engines share, where nothing tells these weights from others.

    Args:
        is_loaded: the checkpoint is here; otherwise it may have to be downloaded first.

    Raises:
        ConfigError: names the option, and what to do.
    """
    config, model, load = config_of(vllm_config), vllm_config.model_config, vllm_config.load_config
    shared = config.tier_keys
    if not shared or load.load_format == "dummy":
        return
    may_come = not is_loaded and _is_in_files(vllm_config) and not Path(model.model).exists()
    if may_come or _weight_files(vllm_config):
        return
    raise ConfigError(
        f"kv_connector_extra_config: {' and '.join(shared)} with model="
        f"{model.model_weights or model.model!r} and load_format={load.load_format}: the weights "
        "are in no local file that tells them from others, and KV of other weights must not be "
        f"found. Load them from a local folder or the hub's cache, or leave out {shared[0]}"
    )


def _preprocessing(model: ModelConfig) -> Any:
    """All between an item's bytes and its rows that is the server's choice."""
    multimodal = model.multimodal_config
    if multimodal is None:
        return None
    processor: Any = MULTIMODAL_REGISTRY.create_processor(model).info.get_hf_processor()
    scales = multimodal.mm_encoder_fp8_scale_path
    return {
        "processor": f"{type(processor).__module__}.{type(processor).__qualname__}",
        "source": _source_of(processor),
        "options": processor.to_dict(),
        "transformers": transformers.__version__,
        "kwargs": multimodal.mm_processor_kwargs,
        "media": multimodal.media_io_kwargs,
        "video": envs.VLLM_VIDEO_LOADER_BACKEND,
        "encoder": [
            multimodal.mm_device_do_normalize,
            multimodal.mm_encoder_attn_dtype,
            hashlib.sha256(Path(scales).read_bytes()).hexdigest() if scales else None,
        ],
    }


def _source_of(processor: Any) -> str | None:
    """Digest of the code of a processor that came with the checkpoint."""
    module = importlib.import_module(type(processor).__module__)
    if not module.__name__.startswith("transformers_modules."):
        return None
    files = sorted(Path(str(module.__file__)).parent.glob("*.py"))
    return digest({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})


def _dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hugging Face configuration without what says nothing about the numbers."""
    volatile = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"}
    return {
        key: _dimensions(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in volatile
    }


def _is_in_files(vllm_config: VllmConfig) -> bool:
    model, load = vllm_config.model_config, vllm_config.load_config
    return load.load_format in _FILE_FORMATS and not model.model_weights


def _weight_files(vllm_config: VllmConfig) -> dict[str, Path]:
    """Local weight files by their names in the checkpoint; none where there is no such file."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if not _is_in_files(vllm_config):
        return {}
    place = _local_checkpoint(model.model, model.revision, load.download_dir)
    if place is None:
        return {}
    if place.is_file():
        return {"": place}
    return {
        path.relative_to(place).as_posix(): path
        for path in sorted(place.rglob("*"))
        if path.suffix in _WEIGHTS and path.is_file()
    }


def _local_checkpoint(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """File or folder that vLLM's loaders read `model` from."""
    if Path(model).exists():
        return Path(model)
    try:
        if envs.VLLM_USE_MODELSCOPE:
            from modelscope.hub.snapshot_download import snapshot_download as from_modelscope

            # vLLM passes no `download_dir` on to ModelScope.
            return Path(from_modelscope(model, revision=revision, local_files_only=True))
        return Path(
            snapshot_download(
                model, revision=revision, cache_dir=download_dir, local_files_only=True
            )
        )
    except (ImportError, OSError, ValueError):
        return None


def _hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each file."""
    with ThreadPoolExecutor(_READERS, "vlcache-identity") as pool:
        return dict(zip(files, pool.map(_sha256, files.values()), strict=True))


def _sha256(path: Path) -> str:
    """Of a file's content: as the hub's cache has it, as it was hashed before, or anew."""
    real = path.resolve()
    # The hub's cache keeps large files under this very digest, and no file twice.
    if real.parent.name == "blobs" and len(real.name) == 64 and path.is_symlink():
        return real.name
    stat = real.stat()
    state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
    note = _notes() / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    known = _hashed.get(real) or _noted(note)
    if known is not None and known[:-1] == state:
        return str(known[-1])
    if stat.st_size > _PIECE:
        logger.info("VLCache: hashing %s (%d MiB), once", real, stat.st_size >> 20)
    began = time.time()
    hasher = hashlib.sha256()
    with real.open("rb") as file:
        while piece := file.read(_PIECE):
            hasher.update(piece)
    if began - stat.st_mtime > _SETTLED_SECONDS and real.stat().st_mtime_ns == stat.st_mtime_ns:
        _hashed[real] = [*state, hasher.hexdigest()]
        _take_note(note, _hashed[real])
    return hasher.hexdigest()


def _notes() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vlcache" / "weights"


def _noted(note: Path) -> list[Any] | None:
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, list) and len(known) == 5 else None


def _take_note(note: Path, known: Sequence[Any]) -> None:
    """Keep a digest for the next start; where that is not possible, files are hashed again."""
    work = note.with_suffix(f".{os.getpid()}.part")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        work.write_text(json.dumps(known))
        work.replace(note)
    except OSError as error:
        logger.warning("VLCache: digests of weight files can't be kept in %s: %s", note, error)

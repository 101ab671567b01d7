"""What VLCache can serve: checks at start-up, and the identity of the model as it is run.

vLLM seams: `VllmConfig` and `KVCacheConfig` (`vllm/config`, `vllm/v1/kv_cache_interface.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .config import ConfigError, VLCacheConfig
from .keys import digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

SUPPORTED_ARCHITECTURES = frozenset(
    {
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
    }
)
"""Model classes whose inputs, positions and deepstack buffers the sparse prefill is tested with."""

_PLAIN_KV_DTYPES = ("auto", "bfloat16", "float16", "float32")
_FLOAT8_KV_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""Of the paged cache: segments are kept as the model computes KV, and quantised when written."""


class UnsupportedError(ConfigError):
    """A vLLM option that VLCache can't serve together with; names the option and the way out."""


@dataclass(frozen=True)
class KVShape:
    """Shape of one rank's KV of one token.

    Attributes:
        num_layers: decoder layers with a KV cache.
        num_kv_heads: KV heads of this rank.
        head_dim: entries of a head.
        dtype: of K and V as the model computes them.
        block_size: tokens of a KV cache block.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int

    @property
    def bytes_per_token(self) -> int:
        """K and V over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def config_of(vllm_config: VllmConfig) -> VLCacheConfig:
    """VLCache's own configuration, from the KV half's flag or else from the encoder half's.

    Raises:
        ConfigError: a key is unknown, ill-typed or out of range.
    """
    kv = vllm_config.kv_transfer_config
    if kv is not None and kv.kv_connector == "VLCacheConnector":
        return VLCacheConfig.from_extra_config(kv.kv_connector_extra_config)
    ec = vllm_config.ec_transfer_config
    return VLCacheConfig.from_extra_config(ec.ec_connector_extra_config if ec is not None else {})


def check_supported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse options and models under which reuse would be wrong.

    Raises:
        UnsupportedError: one line per refused option, with what to do.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    speculative, lora = vllm_config.speculative_config, vllm_config.lora_config
    multimodal = model.multimodal_config
    kv_dtype = vllm_config.cache_config.cache_dtype
    refusals = [
        (
            parallel.pipeline_parallel_size > 1,
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}: the sparse prefill needs "
            "all layers in one worker; use --tensor-parallel-size instead",
        ),
        (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
            "context parallelism splits a segment's KV over ranks; set "
            "--prefill-context-parallel-size and --decode-context-parallel-size to 1",
        ),
        (
            parallel.data_parallel_size > 1 and parallel.is_moe_model is not False,
            f"data_parallel_size={parallel.data_parallel_size} with a mixture-of-experts model: "
            "ranks would wait for each other inside the sparse prefill; run separate servers",
        ),
        (parallel.enable_dbo, "enable_dbo: dual-batch overlap is not supported; leave it off"),
        (model.use_mla, "MLA models keep a compressed KV that can't be rotated; remove the flag"),
        (
            model.is_mm_prefix_lm,
            "this model attends bidirectionally inside images, which the sparse prefill does not; "
            "remove the flag",
        ),
        (
            kv_dtype not in _PLAIN_KV_DTYPES + _FLOAT8_KV_DTYPES,
            f"kv_cache_dtype={kv_dtype}: allowed are "
            + ", ".join(_PLAIN_KV_DTYPES + _FLOAT8_KV_DTYPES),
        ),
        (
            lora is not None and lora.enable_tower_connector_lora,
            "enable_tower_connector_lora: encoder outputs would differ per adapter; leave it off",
        ),
        (
            speculative is not None and (speculative.use_eagle() or speculative.uses_draft_model()),
            "speculative decoding with a draft model: the draft's own KV of reused tokens would "
            "be missing; use the ngram method or none",
        ),
        (
            multimodal is not None and bool(multimodal.video_pruning_rate),
            "video_pruning_rate: pruning changes positions after the prompt is planned; set it "
            "to 0",
        ),
    ]
    refusals.append(_refused_kv_groups(kv_cache_config))
    refusals += _refused_roles(vllm_config)
    lines = [text for refused, text in refusals if refused]
    if lines:
        raise UnsupportedError("VLCacheConnector can't run with:\n  " + "\n  ".join(lines))


def _refused_roles(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    kv, ec = vllm_config.kv_transfer_config, vllm_config.ec_transfer_config
    assert kv is not None  # else this connector would not run
    config = config_of(vllm_config)
    is_shared = config.disk_path is not None or config.redis_url is not None
    # An "ec_producer" runs no language model.
    fitting = ("ec_both", "ec_consumer") if kv.is_kv_producer else ("ec_consumer",)
    is_ours = ec is not None and ec.ec_connector == "VLCacheEncoderConnector"
    return [
        (
            kv.kv_role != "kv_both" and not is_shared,
            f"kv_role={kv.kv_role} without a tier that other servers share: set disk_path or "
            "redis_url, or kv_role=kv_both",
        ),
        (
            ec is not None and is_ours and ec.ec_role not in fitting,
            f"ec_role={ec and ec.ec_role} with kv_role={kv.kv_role}: set ec_role={fitting[0]}",
        ),
    ]


def _refused_kv_groups(kv_cache_config: KVCacheConfig) -> tuple[bool, str]:
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    plain = [
        type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and spec.head_size_v == spec.head_size
        for spec in specs
    ]
    kinds = ", ".join(type(spec).__name__ for spec in specs) or "none"
    return plain != [True], (
        "a KV cache that is not one group of plain full-attention layers (here: "
        f"{kinds}): sliding-window, hybrid and state-space models are not supported; remove the "
        "flag"
    )


def kv_shape(vllm_config: VllmConfig) -> KVShape:
    """Shape of the KV that segments are cut from, on one tensor-parallel rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return KVShape(
        num_layers=model.get_num_layers(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_dim=model.get_head_size(),
        dtype=model_dtype(vllm_config),
        block_size=vllm_config.cache_config.block_size,
    )


def model_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """dtype of the model's activations, which vLLM has resolved by now."""
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def inert_reason(vllm_config: VllmConfig) -> str | None:
    """Why VLCache leaves every request to plain vLLM, or None when it is active."""
    model = vllm_config.model_config
    if not config_of(vllm_config).enabled:
        return "enabled=false"
    if not model.is_multimodal_model:
        return "the model takes no images"
    if not SUPPORTED_ARCHITECTURES & set(model.architectures):
        return (
            f"architecture {', '.join(model.architectures)} is untested; tested ones are "
            f"{', '.join(sorted(SUPPORTED_ARCHITECTURES))}"
        )
    return None


def model_fingerprint(vllm_config: VllmConfig) -> str:
    """Digest of all that a segment's numbers depend on but the image and its context.

    The same on every server that runs the same weights in the same way, wherever they lie.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    kv_dtype = vllm_config.cache_config.cache_dtype
    return digest(
        {
            "weights": weights_fingerprint(vllm_config),
            "dtype": str(model.dtype),
            # All layers but the first attend to what was quantised.
            "kv_cache_dtype": None if kv_dtype in _PLAIN_KV_DTYPES else kv_dtype,
            "quantization": model.quantization,
            "tp": parallel.tensor_parallel_size,
            "mm_processor_kwargs": model.multimodal_config.mm_processor_kwargs
            if model.multimodal_config
            else None,
        }
    )


def weights_fingerprint(vllm_config: VllmConfig) -> str:
    """Digest of a checkpoint: its dimensions and samples of its weights.

    It does not depend on where the checkpoint lies or how it is run (dtype, ranks).
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy":
        weights: Any = ["dummy", model.seed]
    else:
        weights = _weight_samples(_checkpoint_folder(model.model, model.revision))
    return digest({"hf_config": _dimensions(model.hf_config.to_dict()), "weights": weights})


def _dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hugging Face configuration without what says nothing about the numbers."""
    volatile = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"}
    return {
        key: _dimensions(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in volatile
    }


def _checkpoint_folder(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _weight_samples(folder: Path | None) -> list[str]:
    """Digests of a few pieces of every weight file."""
    if folder is None:
        return []
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    samples = []
    for path in found:
        size, hasher = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            hasher.update(file.read(1 << 16))
            for piece in range(1, 16):
                file.seek(piece * size // 16)
                hasher.update(file.read(1 << 12))
        samples.append(f"{path.name}:{size}:{hasher.hexdigest()}")
    return samples


def engine_id(vllm_config: VllmConfig) -> str:
    """Names the engine inside a process, so that its KV half and encoder half find each other."""
    transfer = vllm_config.kv_transfer_config or vllm_config.ec_transfer_config
    assert transfer is not None
    assert transfer.engine_id is not None
    return transfer.engine_id

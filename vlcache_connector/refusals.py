"""What VLCache can't be served together with, and what it says about the rest at start.

vLLM seams: `VllmConfig` and `KVCacheConfig` (`vllm/config`, `vllm/v1/kv_cache_interface.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.config import CUDAGraphMode
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .attention.hook import WRAPPED_BACKENDS
from .support import (
    ENCODER_CONNECTOR,
    FLOAT8_KV_DTYPES,
    PLAIN_KV_DTYPES,
    UnsupportedError,
    config_of,
    may_reuse,
    own_transfer,
    transfers_of,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_SPECULATIVE_METHODS = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")
"""Those that keep no KV and read no hidden states of the prompt's tokens."""


@dataclass(frozen=True)
class Refusal:
    """An option under which reuse would be wrong, or would not happen.

    Attributes:
        option: its name in vLLM's or VLCache's configuration.
        refused: its value where that is refused, else None.
        reason: what would go wrong, and the way out.
    """

    option: str
    refused: Callable[[VllmConfig], Any]
    reason: str

    def line(self, vllm_config: VllmConfig) -> str | None:
        """The refusal as one line; None: the option is none to refuse."""
        value = self.refused(vllm_config)
        return None if value is None else f"{self.option}={value}: {self.reason}"


def _above_one(value: int) -> int | None:
    return value if value > 1 else None


def _on(value: Any) -> Any:
    return value or None


def _data_parallel_experts(config: VllmConfig) -> int | None:
    parallel = config.parallel_config
    return _above_one(parallel.data_parallel_size) if parallel.is_moe_model is not False else None


def _architecture(config: VllmConfig, is_refused: bool) -> str | None:
    return config.model_config.architecture if is_refused else None


def _kv_dtype(config: VllmConfig) -> str | None:
    dtype = config.cache_config.cache_dtype
    return dtype if dtype not in PLAIN_KV_DTYPES + FLOAT8_KV_DTYPES else None


def _backend(config: VllmConfig) -> str | None:
    backend = config.attention_config.backend
    return backend.name if backend is not None and backend.name not in WRAPPED_BACKENDS else None


def _speculative_method(config: VllmConfig) -> str | None:
    speculative = config.speculative_config
    if speculative is None or speculative.method in _SPECULATIVE_METHODS:
        return None
    return str(speculative.method)


def _tower_lora(config: VllmConfig) -> bool | None:
    lora = config.lora_config
    return _on(lora is not None and lora.enable_tower_connector_lora)


def _multimodal(config: VllmConfig, option: str) -> Any:
    return getattr(config.model_config.multimodal_config, option, None)


def _processor_cache(config: VllmConfig) -> str | None:
    kind = _multimodal(config, "mm_processor_cache_type")
    return kind if kind == "shm" else None


def _lonely_role(config: VllmConfig) -> str | None:
    kv, own = own_transfer(config), config_of(config)
    is_lonely = kv is not None and kv.kv_role != "kv_both" and not own.tier_keys
    return kv.kv_role if kv is not None and is_lonely else None


def _other_encoder_role(config: VllmConfig) -> str | None:
    kv, ec = own_transfer(config), config.ec_transfer_config
    if kv is None or ec is None or ec.ec_connector != ENCODER_CONNECTOR:
        return None
    # An "ec_producer" runs no language model.
    fitting = ("ec_both", "ec_consumer") if kv.is_kv_producer else ("ec_consumer",)
    return ec.ec_role if ec.ec_role not in fitting else None


def _siblings(config: VllmConfig) -> str | None:
    """Connectors beside ours, where they could see KV that is approximate or not a request's."""
    kv, everything = own_transfer(config), transfers_of(config.kv_transfer_config)
    if kv is None or len(everything) == 1:
        return None
    if not may_reuse(kv) and config_of(config).donor == "first_seen":
        return None
    return ", ".join(str(transfer.kv_connector) for transfer in everything)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "kv_offloading_size",
        lambda config: config.cache_config.kv_offloading_size,
        "vLLM would replace VLCacheConnector by a connector of its own; leave out "
        "--kv-offloading-size, and set cpu_bytes in kv_connector_extra_config instead",
    ),
    Refusal(
        "kv_connector_extra_config.connectors",
        _siblings,
        "what the others store of a prompt with a reused image would be taken for exact KV; "
        "use VLCacheConnector alone, or give it kv_role=kv_producer and donor=first_seen, which "
        "stores and reuses nothing",
    ),
    Refusal(
        "kv_role",
        _lonely_role,
        "no tier that other servers share; set disk_path, l2_adapters or redis_url, or "
        "kv_role=kv_both",
    ),
    Refusal(
        "ec_role",
        _other_encoder_role,
        "it does not go with the kv_role; leave out --ec-transfer-config, or set "
        "ec_role=ec_consumer",
    ),
    Refusal(
        "pipeline_parallel_size",
        lambda config: _above_one(config.parallel_config.pipeline_parallel_size),
        "the sparse prefill needs all layers in one worker; use --tensor-parallel-size instead",
    ),
    Refusal(
        "prefill_context_parallel_size",
        lambda config: _above_one(config.parallel_config.prefill_context_parallel_size),
        "it splits a segment's KV over ranks; set it to 1",
    ),
    Refusal(
        "decode_context_parallel_size",
        lambda config: _above_one(config.parallel_config.decode_context_parallel_size),
        "it splits a segment's KV over ranks; set it to 1",
    ),
    Refusal(
        "data_parallel_size",
        _data_parallel_experts,
        "with a mixture-of-experts model, ranks would wait for each other inside the sparse "
        "prefill; run separate servers",
    ),
    Refusal(
        "enable_dbo",
        lambda config: _on(config.parallel_config.enable_dbo),
        "the sparse prefill can't be split into microbatches; leave out --enable-dbo",
    ),
    Refusal(
        "ubatch_size",
        lambda config: _above_one(config.parallel_config.ubatch_size),
        "the sparse prefill can't be split into microbatches; leave out --ubatch-size",
    ),
    Refusal(
        "model",
        lambda config: _architecture(config, config.model_config.use_mla),
        "MLA models keep a compressed KV that can't be rotated; leave out VLCacheConnector",
    ),
    Refusal(
        "model",
        lambda config: _architecture(config, config.model_config.is_mm_prefix_lm),
        "it attends bidirectionally inside images, which the sparse prefill does not; leave out "
        "VLCacheConnector",
    ),
    Refusal(
        "kv_cache_dtype",
        _kv_dtype,
        "reused KV can't be quantised into this format; set --kv-cache-dtype to one of "
        + ", ".join(PLAIN_KV_DTYPES + FLOAT8_KV_DTYPES),
    ),
    Refusal(
        "attention_backend",
        _backend,
        "its KV writes can't be observed; set --attention-backend to one of "
        + ", ".join(WRAPPED_BACKENDS),
    ),
    Refusal(
        "pass_config.fuse_rope_kvcache",
        lambda config: _on(config.compilation_config.pass_config.fuse_rope_kvcache),
        "the fused kernel's KV writes can't be observed; set it to false in --compilation-config",
    ),
    Refusal(
        "pass_config.fuse_qk_norm_rope_kvcache",
        lambda config: _on(config.compilation_config.pass_config.fuse_qk_norm_rope_kvcache),
        "the fused kernel's KV writes can't be observed; set it to false in --compilation-config",
    ),
    Refusal(
        "enable_tower_connector_lora",
        _tower_lora,
        "encoder outputs would differ per adapter; leave it off",
    ),
    Refusal(
        "speculative_config.method",
        _speculative_method,
        "what it needs of reused tokens (KV or hidden states of its own) would be missing; use "
        f"one of {', '.join(_SPECULATIVE_METHODS)}, or none",
    ),
    Refusal(
        "video_pruning_rate",
        lambda config: _on(_multimodal(config, "video_pruning_rate")),
        "pruning changes positions after the prompt is planned; set it to 0",
    ),
    Refusal(
        "mm_processor_cache_type",
        _processor_cache,
        "the scheduler gets addresses of images instead of their sizes, and can't tell positions; "
        "set --mm-processor-cache-type lru",
    ),
)


def check_options(vllm_config: VllmConfig) -> None:
    """Refuse options and models under which reuse would be wrong, before a model is loaded.

    Raises:
        UnsupportedError: one line per refused option, with its value and what to do.
    """
    lines = [line for refusal in REFUSALS if (line := refusal.line(vllm_config)) is not None]
    if lines:
        raise UnsupportedError("VLCacheConnector can't run with:\n  " + "\n  ".join(lines))


def check_kv_cache(kv_cache_config: KVCacheConfig) -> None:
    """Refuse a KV cache that segments can't be cut from; known once the model is loaded.

    Raises:
        UnsupportedError: with what it is made of.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    plain = [
        type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and spec.head_size_v == spec.head_size
        for spec in specs
    ]
    if plain != [True]:
        kinds = ", ".join(type(spec).__name__ for spec in specs) or "none"
        raise UnsupportedError(
            f"kv_cache_groups={kinds}: VLCacheConnector needs one group of plain full-attention "
            "layers, not sliding-window, hybrid or state-space ones; leave it out"
        )


def uncaptured_steps(vllm_config: VllmConfig) -> str | None:
    """Which steps with images CUDA graphs keep from being captured; None: there are none."""
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    mixed = CUDAGraphMode.NONE if mode is None else mode.mixed_mode()
    is_split = compilation.splitting_ops_contain_kv_cache_update()
    if mixed == CUDAGraphMode.NONE or (mixed == CUDAGraphMode.PIECEWISE and is_split):
        return None
    way_out = (
        "set cudagraph_mode to FULL_AND_PIECEWISE"
        if mixed == CUDAGraphMode.FULL
        else "leave out use_inductor_graph_partition, VLLM_BATCH_INVARIANT and "
        "VLLM_USE_BREAKABLE_CUDAGRAPH"
    )
    return (
        f"cudagraph_mode={mode.name}: images in steps of up to "
        f"{compilation.max_cudagraph_capture_size} tokens are not stored, because CUDA graphs "
        f"replay the writes of their KV unseen; to have them stored, {way_out}"
    )

"""What VLCache is configured to do, and the model that it does it with.

vLLM seams: `VllmConfig` (`vllm/config`); `vllm/envs.py`, for another frontend than the one that is
patched (`content.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import vllm.envs as envs
from vllm.config import KVTransferConfig

from .config import ConfigError, VLCacheConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED_ARCHITECTURES = frozenset(
    {
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Glm4vForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
        "GlmOcrForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
    }
)
"""Model classes whose inputs, positions and deepstack buffers the sparse prefill is tested with."""

KV_CONNECTOR = "VLCacheConnector"
ENCODER_CONNECTOR = "VLCacheEncoderConnector"

PLAIN_KV_DTYPES = ("auto", "bfloat16", "float16", "float32")
FLOAT8_KV_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2")
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
    kv, ec = own_transfer(vllm_config), vllm_config.ec_transfer_config
    if kv is not None:
        return VLCacheConfig.from_extra_config(kv.kv_connector_extra_config)
    return VLCacheConfig.from_extra_config(ec.ec_connector_extra_config if ec is not None else {})


def uses_vlcache(vllm_config: VllmConfig) -> bool:
    """Whether the KV half or the encoder half is configured."""
    ec = vllm_config.ec_transfer_config
    is_ours = ec is not None and ec.ec_connector == ENCODER_CONNECTOR
    return is_ours or own_transfer(vllm_config) is not None


def can_store(vllm_config: VllmConfig) -> bool:
    """Whether new segments and encoder rows may be stored: the role is a producer's.

    Beside the KV half, its `kv_role` decides.
    """
    kv, ec = own_transfer(vllm_config), vllm_config.ec_transfer_config
    if kv is not None:
        return bool(kv.is_kv_producer)
    return ec is not None and bool(ec.is_ec_producer)


def own_transfer(vllm_config: VllmConfig) -> KVTransferConfig | None:
    """The KV half's configuration, which may be one of several below `MultiConnector`."""
    transfers = transfers_of(vllm_config.kv_transfer_config)
    return next((kv for kv in transfers if kv.kv_connector == KV_CONNECTOR), None)


def transfers_of(kv: KVTransferConfig | None) -> list[KVTransferConfig]:
    """The configurations of all KV connectors: those below `MultiConnector`, or the one."""
    if kv is None:
        return []
    if kv.kv_connector != "MultiConnector":
        return [kv]
    children = kv.kv_connector_extra_config.get("connectors", ())
    return [
        transfer
        for child in children
        for transfer in transfers_of(KVTransferConfig(**{"engine_id": kv.engine_id, **child}))
    ]


def may_reuse(kv: KVTransferConfig) -> bool:
    """Whether stored segments are reused; without, nothing approximate is ever written."""
    return kv.kv_role != "kv_producer"


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


def encoder_width(vllm_config: VllmConfig) -> int:
    """Entries of one encoder output row; deepstack models put several features side by side."""
    model = vllm_config.model_config
    vision = getattr(model.hf_config, "vision_config", None)
    levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return int(model.get_inputs_embeds_size()) * (1 + levels)


def inert_reason(vllm_config: VllmConfig) -> str | None:
    """Why VLCache leaves every request to plain vLLM, or None when it is active."""
    model = vllm_config.model_config
    if not config_of(vllm_config).enabled:
        return "enabled=false"
    if not model.is_multimodal_model:
        return "the model takes no images"
    # Not the checkpoint's, which `--model-impl transformers` runs with other classes.
    if model.architecture not in SUPPORTED_ARCHITECTURES:
        return (
            f"architecture {model.architecture} is untested; tested ones are "
            f"{', '.join(sorted(SUPPORTED_ARCHITECTURES))}"
        )
    return no_content_hashes(vllm_config)


def no_content_hashes(vllm_config: VllmConfig) -> str | None:
    """Why images come without a hash of their content that can be relied on; None: they do not."""
    if envs.VLLM_USE_RUST_FRONTEND:
        return (
            "VLLM_USE_RUST_FRONTEND=1: what that frontend calls an image may be a client's name; "
            "unset the variable"
        )
    multimodal, cache = vllm_config.model_config.multimodal_config, vllm_config.cache_config
    if multimodal is None or multimodal.mm_processor_cache_gb > 0 or cache.enable_prefix_caching:
        return None
    return (
        "enable_prefix_caching=False with mm_processor_cache_gb=0: vLLM then gives images no "
        "content hash; set --mm-processor-cache-gb above 0, or leave out --no-enable-prefix-caching"
    )

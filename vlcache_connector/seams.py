"""All that VLCache uses of vLLM, and whether this vLLM still has it.

`SEAMS` names every seam: where it is, what is needed of it, and which file uses it. The connectors'
classes are handed out only after all of it was found; where a seam has changed, the stand-ins of
`off.py` take their place. Importing this file imports nothing of vLLM.
"""

from __future__ import annotations

import ast
import dis
import functools
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

DISTRIBUTION = "vlcache-connector"


@dataclass(frozen=True)
class Seam:
    """What one of our files needs of vLLM.

    Attributes:
        where: "module:name", or "module:Class.method".
        user: our file.
        parameters: what a function takes, in that order, `self` left out; None: not looked at.
        is_exact: whether it must take nothing else, because what we wrote stands in its place.
            Otherwise all further parameters need defaults.
        fields: attributes, methods or members of a class or its objects.
        in_source: look into the file, which wants a GPU or takes long to import.
        since: the release that brought it, where not all do; in older ones nothing is looked for.
    """

    where: str
    user: str
    parameters: tuple[str, ...] | None = None
    is_exact: bool = False
    fields: tuple[str, ...] = ()
    in_source: bool = False
    since: str | None = None

    @property
    def is_due(self) -> bool:
        """Whether this vLLM should have it."""
        return self.since is None or Version(_find("vllm:__version__")) >= Version(self.since)


@dataclass(frozen=True)
class Change:
    """A seam that is not as it was, and how it differs."""

    seam: Seam
    problem: str

    def __str__(self) -> str:
        return f"{self.seam.where} {self.problem} (needed by {self.seam.user})"


def _is_there(user: str, *places: str) -> list[Seam]:
    return [Seam(where, user) for where in places]


def _takes(where: str, user: str, parameters: str) -> Seam:
    return Seam(where, user, tuple(parameters.split()))


def _has(where: str, user: str, fields: str) -> Seam:
    return Seam(where, user, fields=tuple(fields.split()))


def _replaced(owner: str, user: str, since: str | None = None, **methods: str) -> list[Seam]:
    """Methods that we override or patch, with their parameters."""
    return [
        Seam(f"{owner}.{method}", user, tuple(parameters.split()), is_exact=True, since=since)
        for method, parameters in methods.items()
    ]


_KV_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_EC_BASE = "vllm.distributed.ec_transfer.ec_connector.base"
_METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics"
_INTERFACES = "vllm.model_executor.models.interfaces"
_ROTARY = "vllm.model_executor.layers.rotary_embedding"
_BACKENDS = "vllm.v1.attention.backends"

SEAMS: tuple[Seam, ...] = (
    # -- the plug-in and its patches ------------------------------------------------------------
    _takes(
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.register_connector",
        "__init__.py",
        "name module_path class_name",
    ),
    _has(
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory",
        "__init__.py",
        "_registry",
    ),
    _takes(
        "vllm.distributed.ec_transfer.ec_connector.factory:ECConnectorFactory.register_connector",
        "__init__.py",
        "name module_path class_name",
    ),
    _has(
        "vllm.distributed.ec_transfer.ec_connector.factory:ECConnectorFactory",
        "__init__.py",
        "_registry",
    ),
    *_replaced(
        "vllm.config:VllmConfig",
        "frontend.py",
        _resolve_mm_embedding_inputs="",
        _post_init_kv_transfer_config="",
        _verify_kv_transfer_compat="",
    ),
    _has("vllm.config:KVTransferConfig", "frontend.py", "kv_connector is_kv_consumer"),
    _has(
        "vllm.config:VllmConfig",
        "frontend.py",
        "model_config kv_transfer_config ec_transfer_config",
    ),
    _has(
        "vllm.config:ECTransferConfig",
        "frontend.py",
        "ec_connector ec_role engine_id ec_connector_extra_config",
    ),
    *_replaced(
        "vllm.multimodal.processing.inputs:ProcessorInputs",
        "content.py",
        get_mm_hashes="model_id hash_algorithm",
    ),
    _has(
        "vllm.multimodal.processing.inputs:ProcessorInputs",
        "content.py",
        "mm_data_items mm_uuid_items cache",
    ),
    _has("vllm.multimodal.media:MediaWithBytes", "content.py", "media"),
    *_replaced(
        "vllm.multimodal.processing.processor:BaseMultiModalProcessor",
        "content.py",
        apply="inputs timing_ctx",
    ),
    _has("vllm.v1.engine.input_processor:InputProcessor", "content.py", "process_inputs"),
    *_replaced(
        "vllm.v1.engine.input_processor:InputProcessor",
        "content.py",
        inject_into_mm_cache="mm_hashes mm_kwargs",
    ),
    _has("vllm.v1.engine:EngineCoreRequest", "content.py", "mm_features sampling_params"),
    _has("vllm.v1.request:Request", "content.py", "sampling_params"),
    _has("vllm.sampling_params:SamplingParams", "content.py", "extra_args"),
    _has("vllm.multimodal.media:MEDIA_CONNECTOR_REGISTRY", "media.py", "name2class register"),
    *_replaced(
        "vllm.multimodal.media:MediaConnector",
        "media.py",
        load_from_url="url media_io fetch_timeout",
        load_from_url_async="url media_io fetch_timeout",
    ),
    *_is_there("media.py", "vllm.multimodal.media:MediaIO", "vllm.multimodal:hasher"),
    _takes("vllm.multimodal.media:ImageMediaIO.__init__", "media.py", "image_mode kwargs"),
    _has(
        "vllm.multimodal.media:ImageMediaIO", "media.py", "image_mode rgba_background_color kwargs"
    ),
    *_replaced("vllm.multimodal.media:ImageMediaIO", "media.py", load_bytes="data"),
    _takes("vllm.multimodal.media:MediaWithBytes", "media.py", "media original_bytes io_config"),
    Seam("vllm.multimodal.hasher:_get_image_id_bytes", "media.py", ("image",), is_exact=True),
    _takes(
        "vllm.multimodal.cache:BaseMultiModalProcessorCache.is_cached_item", "media.py", "mm_hash"
    ),
    _has(
        "vllm.multimodal.inputs:MultiModalFeatureSpec",
        "content.py",
        "identifier mm_position mm_hash",
    ),
    *_replaced(
        "vllm.v1.engine.core:EngineCore",
        "weights.py",
        collective_rpc="method timeout args kwargs",
        set_weight_version="weight_version",
    ),
    _takes(
        "vllm.model_executor.model_loader.weight_checksum:_weights",
        "worker/checksum.py",
        "model",
    ),
    *_replaced(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader",
        "worker/loaded.py",
        load_model="vllm_config model_config prefix",
    ),
    _takes(f"{_BACKENDS}.registry:register_backend", "attention/hook.py", "backend class_path"),
    _has(
        f"{_BACKENDS}.registry:AttentionBackendEnum",
        "attention/hook.py",
        "CPU_ATTN FLASH_ATTN FLASHINFER TRITON_ATTN is_overridden",
    ),
    _takes("vllm.utils.import_utils:resolve_obj_by_qualname", "attention/hook.py", "qualname"),
    _has("vllm.v1.attention.backend:AttentionBackend", "attention/hook.py", "get_impl_cls"),
    *(
        Seam(
            f"{_BACKENDS}.{module}.do_kv_cache_update",
            "attention/hook.py",
            ("layer", "key", "value", "kv_cache", "slot_mapping"),
            is_exact=True,
            in_source=True,
        )
        for module in (
            "cpu_attn:CPUAttentionBackendImpl",
            "flash_attn:FlashAttentionImpl",
            "flashinfer:FlashInferImpl",
            "triton_attn:TritonAttentionImpl",
        )
    ),
    # -- the connectors -------------------------------------------------------------------------
    *_is_there(
        "connector.py", f"{_KV_BASE}:KVConnectorMetadata", f"{_KV_BASE}:KVConnectorWorkerMetadata"
    ),
    _has(f"{_KV_BASE}:KVConnectorRole", "connector.py", "SCHEDULER WORKER"),
    _takes(
        f"{_KV_BASE}:KVConnectorBase_V1.__init__",
        "connector.py",
        "vllm_config role kv_cache_config",
    ),
    _has(
        f"{_KV_BASE}:KVConnectorBase_V1",
        "connector.py",
        "_vllm_config _kv_transfer_config _kv_cache_config _get_connector_metadata "
        "requires_kv_delivery",
    ),
    *_replaced(
        f"{_KV_BASE}:SupportsHMA", "connector.py", request_finished_all_groups="request block_ids"
    ),
    *_replaced(
        f"{_KV_BASE}:KVConnectorBase_V1", "connector.py", since="0.33", unregister_kv_caches=""
    ),
    *_replaced(
        f"{_KV_BASE}:KVConnectorBase_V1",
        "connector.py",
        register_kv_caches="kv_caches",
        bind_connector_metadata="connector_metadata",
        start_load_kv="forward_context kwargs",
        wait_for_layer_load="layer_name",
        save_kv_layer="layer_name kv_layer attn_metadata kwargs",
        finish_forward="",
        wait_for_save="",
        build_connector_worker_meta="",
        get_block_ids_with_load_errors="",
        shutdown="",
        bind_kv_cache_manager="kv_cache_manager",
        take_events="",
        on_new_request="request",
        get_num_new_matched_tokens="request num_computed_tokens",
        update_state_after_alloc="request blocks num_external_tokens",
        get_external_cache_hit_sources="request num_external_tokens",
        build_connector_meta="scheduler_output",
        update_connector_output="connector_output",
        request_finished="request block_ids",
        reset_cache="",
        get_kv_connector_stats="",
        build_kv_connector_stats="data",
        build_prom_metrics="vllm_config metric_types labelnames per_engine_labelvalues",
    ),
    _has(
        "vllm.v1.metrics.cache_hit_source:CacheHitSource",
        "connector.py",
        "HOST DISK EXTERNAL_UNSPECIFIED",
    ),
    _takes("vllm.logger:init_logger", "connector.py", "name"),
    _has("vllm.v1.core.kv_cache_manager:KVCacheBlocks", "connector.py", "get_block_ids"),
    _has("vllm.v1.outputs:KVConnectorOutput", "connector.py", "kv_connector_worker_meta"),
    _has(f"{_EC_BASE}:ECConnectorRole", "encoder_connector.py", "SCHEDULER WORKER"),
    _takes(f"{_EC_BASE}:ECConnectorBase.__init__", "encoder_connector.py", "vllm_config role"),
    _has(
        f"{_EC_BASE}:ECConnectorBase",
        "encoder_connector.py",
        "_vllm_config _get_connector_metadata",
    ),
    *_replaced(
        f"{_EC_BASE}:ECConnectorBase",
        "encoder_connector.py",
        shutdown="",
        bind_connector_metadata="connector_metadata",
        start_load_caches="encoder_cache kwargs",
        save_caches="encoder_cache mm_hash kwargs",
        build_connector_worker_meta="",
        has_cache_item="identifier",
        update_state_after_alloc="request index",
        build_connector_meta="scheduler_output",
        update_connector_output="connector_output",
    ),
    _has("vllm.v1.outputs:ECConnectorOutput", "encoder_connector.py", "ec_connector_worker_meta"),
    _has(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "encoder_connector.py",
        "total_num_scheduled_tokens",
    ),
    *_is_there("protocol.py", f"{_EC_BASE}:ECConnectorMetadata"),
    *_replaced(f"{_KV_BASE}:KVConnectorWorkerMetadata", "protocol.py", aggregate="other"),
    *_replaced(f"{_EC_BASE}:ECConnectorWorkerMetadata", "protocol.py", aggregate="other"),
    _has(f"{_METRICS}:KVConnectorStats", "metrics.py", "data"),
    *_replaced(
        f"{_METRICS}:KVConnectorStats",
        "metrics.py",
        reset="",
        aggregate="other",
        reduce="",
        is_empty="",
    ),
    *_replaced(
        f"{_METRICS}:KVConnectorPromMetrics",
        "metrics.py",
        __init__="vllm_config metric_types labelnames per_engine_labelvalues",
        observe="transfer_stats_data engine_idx",
    ),
    _has(f"{_METRICS}:KVConnectorPromMetrics", "metrics.py", "per_engine_labelvalues"),
    # -- the configuration ----------------------------------------------------------------------
    _has(
        "vllm.config:VllmConfig",
        "support.py",
        "model_config cache_config parallel_config scheduler_config load_config "
        "kv_transfer_config ec_transfer_config",
    ),
    _has(
        "vllm.config:KVTransferConfig",
        "support.py",
        "kv_connector kv_role engine_id is_kv_producer kv_connector_extra_config",
    ),
    _has("vllm.config:ParallelConfig", "support.py", "tensor_parallel_size"),
    _has(
        "vllm.config:ModelConfig",
        "support.py",
        "model dtype hf_config architecture multimodal_config is_multimodal_model uses_mrope "
        "get_num_layers get_num_kv_heads get_head_size get_inputs_embeds_size",
    ),
    _has("vllm.config:MultiModalConfig", "support.py", "mm_processor_cache_gb"),
    *_is_there("support.py", "vllm.envs:VLLM_USE_RUST_FRONTEND"),
    _has("vllm.config:CacheConfig", "support.py", "block_size enable_prefix_caching"),
    _has("vllm.config:ECTransferConfig", "support.py", "is_ec_producer"),
    _has("vllm.config:CacheConfig", "identity.py", "cache_dtype"),
    _has(
        "vllm.config:SchedulerConfig",
        "scheduler/budget.py",
        "max_num_batched_tokens max_num_encoder_input_tokens long_prefill_token_threshold",
    ),
    _has(
        "vllm.config:ModelConfig",
        "identity.py",
        "model model_weights revision seed dtype quantization hf_config multimodal_config",
    ),
    _has(
        "vllm.config:MultiModalConfig",
        "identity.py",
        "mm_processor_kwargs media_io_kwargs mm_device_do_normalize mm_encoder_attn_dtype "
        "mm_encoder_fp8_scale_path",
    ),
    _has("vllm.config:LoadConfig", "identity.py", "load_format download_dir"),
    *_is_there(
        "identity.py",
        "vllm.envs:VLLM_USE_MODELSCOPE",
        "vllm.envs:VLLM_VIDEO_LOADER_BACKEND",
        "vllm.multimodal:MULTIMODAL_REGISTRY",
    ),
    _takes(
        "vllm.multimodal.registry:MultiModalRegistry.create_processor",
        "identity.py",
        "model_config",
    ),
    _has(
        "vllm.multimodal.processing.context:BaseProcessingInfo", "identity.py", "get_hf_processor"
    ),
    _has(
        "vllm.config:VllmConfig",
        "refusals.py",
        "model_config cache_config parallel_config lora_config speculative_config "
        "attention_config compilation_config kv_transfer_config ec_transfer_config",
    ),
    _has("vllm.config:ModelConfig", "refusals.py", "architecture is_mm_prefix_lm use_mla"),
    _has("vllm.config:CacheConfig", "refusals.py", "cache_dtype kv_offloading_size"),
    _has(
        "vllm.config:ParallelConfig",
        "refusals.py",
        "pipeline_parallel_size data_parallel_size prefill_context_parallel_size "
        "decode_context_parallel_size is_moe_model enable_dbo ubatch_size",
    ),
    _has(
        "vllm.config:CompilationConfig",
        "refusals.py",
        "cudagraph_mode max_cudagraph_capture_size pass_config "
        "splitting_ops_contain_kv_cache_update",
    ),
    _has(
        "vllm.config.compilation:PassConfig",
        "refusals.py",
        "fuse_rope_kvcache fuse_qk_norm_rope_kvcache",
    ),
    _has("vllm.config:CUDAGraphMode", "refusals.py", "NONE PIECEWISE FULL mixed_mode"),
    _has("vllm.config:AttentionConfig", "refusals.py", "backend"),
    _has(
        "vllm.config:MultiModalConfig", "refusals.py", "video_pruning_rate mm_processor_cache_type"
    ),
    _has("vllm.config:LoRAConfig", "refusals.py", "enable_tower_connector_lora"),
    _has("vllm.config:SpeculativeConfig", "refusals.py", "method"),
    _has("vllm.v1.kv_cache_interface:KVCacheConfig", "refusals.py", "kv_cache_groups"),
    _has("vllm.v1.kv_cache_interface:KVCacheGroupSpec", "refusals.py", "kv_cache_spec"),
    _has(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "refusals.py",
        "sliding_window attention_chunk_size head_size head_size_v",
    ),
    _has("vllm.v1.kv_cache_interface:KVCacheConfig", "connector.py", "hash_block_size"),
    _has("vllm.v1.kv_cache_interface:KVCacheGroupSpec", "connector.py", "layer_names"),
    # -- the scheduler side ---------------------------------------------------------------------
    _has(
        "vllm.v1.request:Request",
        "scheduler/scheduler.py",
        "request_id status mm_features num_tokens num_computed_tokens num_preemptions "
        "prefill_stats skip_reading_prefix_cache block_hashes",
    ),
    _has("vllm.v1.request:RequestStatus", "scheduler/scheduler.py", "RUNNING"),
    _has(
        "vllm.v1.request:Request",
        "scheduler/budget.py",
        "num_tokens num_tokens_with_spec num_output_placeholders num_computed_tokens "
        "num_output_tokens",
    ),
    _takes(
        "vllm.v1.metrics.stats:PrefillStats.set",
        "scheduler/scheduler.py",
        "num_prompt_tokens num_local_cached_tokens num_external_cached_tokens",
    ),
    _has(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "scheduler/scheduler.py",
        "num_scheduled_tokens total_num_scheduled_tokens preempted_req_ids scheduled_new_reqs",
    ),
    _has(
        "vllm.v1.core.sched.output:NewRequestData",
        "scheduler/scheduler.py",
        "req_id mm_features",
    ),
    _takes(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids",
        "scheduler/scheduler.py",
        "request_id",
    ),
    _has("vllm.v1.core.kv_cache_manager:KVCacheManager", "scheduler/scheduler.py", "block_pool"),
    _has(
        "vllm.v1.request:Request",
        "scheduler/requests.py",
        "prompt_token_ids prompt_embeds lora_request pooling_params resumable cache_salt "
        "kv_transfer_params arrival_time num_prompt_tokens num_computed_tokens num_output_tokens "
        "num_preemptions",
    ),
    _takes(
        "vllm.multimodal.inputs:MultiModalFeatureSpec",
        "scheduler/requests.py",
        "data modality identifier mm_position",
    ),
    _has("vllm.multimodal.inputs:MultiModalKwargsItem", "scheduler/requests.py", "items"),
    _has(
        "vllm.multimodal.inputs:PlaceholderRange",
        "scheduler/requests.py",
        "offset length is_embed get_num_embeds",
    ),
    _has("vllm.v1.request:Request", "scheduler/encoder.py", "mm_features"),
    _takes("vllm.multimodal.inputs:PlaceholderRange.get_num_embeds", "scheduler/encoder.py", ""),
    _has(
        "vllm.v1.request:Request",
        "scheduler/fence.py",
        "request_id block_hashes _block_hasher update_block_hashes append_output_token_ids",
    ),
    _takes(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.find_longest_cache_hit",
        "scheduler/fence.py",
        "block_hashes max_cache_hit_length",
    ),
    _has("vllm.v1.core.kv_cache_manager:KVCacheManager", "scheduler/fence.py", "coordinator"),
    _takes(
        "vllm.v1.core.kv_cache_utils:get_request_block_hasher",
        "scheduler/fence.py",
        "hash_block_size caching_hash_fn",
    ),
    _takes("vllm.v1.core.kv_cache_utils:init_none_hash", "scheduler/fence.py", "hash_fn"),
    *_is_there(
        "scheduler/fence.py",
        "vllm.v1.core:kv_cache_utils",
        "vllm.v1.core.kv_cache_utils:BlockHash",
        "vllm.utils.hashing:sha256",
        "vllm.sampling_params:SamplingParams",
    ),
    _has("vllm.v1.core.block_pool:BlockPool", "scheduler/fence.py", "kv_event_queue"),
    _has(
        "vllm.distributed.kv_events:BlockStored",
        "scheduler/fence.py",
        "block_hashes token_ids block_size extra_keys",
    ),
    _has("vllm.distributed.kv_events:BlockRemoved", "scheduler/fence.py", "block_hashes"),
    *_is_there("scheduler/fence.py", "vllm.distributed.kv_events:AllBlocksCleared"),
    _takes(
        "vllm.distributed.kv_events:BlockStored",
        "scheduler/events.py",
        "block_hashes parent_block_hash token_ids block_size lora_id medium lora_name extra_keys",
    ),
    _takes("vllm.distributed.kv_events:BlockRemoved", "scheduler/events.py", "block_hashes medium"),
    _takes(
        "vllm.v1.core.kv_cache_utils:maybe_convert_block_hash", "scheduler/events.py", "hash_bytes"
    ),
    _has("vllm.config:VllmConfig", "connector.py", "kv_events_config"),
    _has("vllm.config:KVEventsConfig", "connector.py", "enable_kv_cache_events"),
    _takes(
        "vllm.v1.core.block_pool:BlockPool.get_new_blocks", "scheduler/canonical.py", "num_blocks"
    ),
    _takes(
        "vllm.v1.core.block_pool:BlockPool.free_blocks", "scheduler/canonical.py", "ordered_blocks"
    ),
    _takes("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks", "scheduler/canonical.py", ""),
    _takes(
        "vllm.multimodal.inputs:PlaceholderRange",
        "scheduler/canonical.py",
        "offset length is_embed",
    ),
    _takes(
        "vllm.tokenizers:cached_tokenizer_from_config", "scheduler/canonical.py", "model_config"
    ),
    # -- the worker side ------------------------------------------------------------------------
    *_is_there("worker/rank.py", "vllm.platforms:current_platform"),
    _has("vllm.platforms.interface:Platform", "worker/rank.py", "device_type"),
    _takes(
        "vllm.forward_context:set_forward_context",
        "worker/model.py",
        "attn_metadata vllm_config num_tokens cudagraph_runtime_mode slot_mapping",
    ),
    _has("vllm.config:CUDAGraphMode", "worker/model.py", "NONE"),
    _has("vllm.config:CompilationConfig", "worker/model.py", "static_forward_context"),
    _takes("vllm.model_executor.models.utils:extract_layer_index", "worker/model.py", "layer_name"),
    _takes(
        "vllm.multimodal.utils:group_and_batch_mm_kwargs", "worker/model.py", "mm_kwargs device"
    ),
    _takes(
        f"{_INTERFACES}:SupportsMultiModal.embed_input_ids",
        "worker/model.py",
        "input_ids multimodal_embeddings is_multimodal",
    ),
    _takes(f"{_INTERFACES}:SupportsMultiModal.embed_multimodal", "worker/model.py", "kwargs"),
    _takes(f"{_INTERFACES}:SupportsMultiModal.get_language_model", "worker/model.py", ""),
    _takes(
        f"{_INTERFACES}:SupportsMRoPE.get_mrope_input_positions",
        "worker/model.py",
        "input_tokens mm_features",
    ),
    Seam(
        "vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration",
        "worker/model.py",
        fields=(
            "deepstack_input_embeds",
            "deepstack_input_embeds_num_tokens",
            "_get_deepstack_input_embeds",
            "_set_deepstack_input_embeds",
            "_clear_deepstack_input_embeds",
        ),
        in_source=True,
    ),
    Seam(
        "vllm.lora.model_manager:LoRAModelManager",
        "worker/model.py",
        fields=("lora_manager", "lora_index_to_id", "_last_mapping"),
        in_source=True,
    ),
    Seam(
        "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping",
        "worker/model.py",
        ("mapping",),
        in_source=True,
    ),
    _takes(
        "vllm.lora.layers:LoRAMapping", "worker/model.py", "index_mapping prompt_mapping is_prefill"
    ),
    *_is_there(
        "worker/rotary.py",
        f"{_ROTARY}:DynamicNTKAlphaRotaryEmbedding",
        f"{_ROTARY}:DynamicNTKScalingRotaryEmbedding",
        f"{_ROTARY}:LinearScalingRotaryEmbedding",
        f"{_ROTARY}:Llama3RotaryEmbedding",
        f"{_ROTARY}:YaRNScalingRotaryEmbedding",
    ),
    _has(
        f"{_ROTARY}:RotaryEmbedding",
        "worker/rotary.py",
        "base head_size rotary_dim is_neox_style dtype",
    ),
    _takes(f"{_ROTARY}:RotaryEmbedding._compute_inv_freq", "worker/rotary.py", "base"),
    _has(
        f"{_ROTARY}:MRotaryEmbedding",
        "worker/rotary.py",
        "mrope_section mrope_interleaved scaling_factor",
    ),
    _takes("vllm.distributed.parallel_state:get_tp_group", "worker/ranks.py", ""),
    _has(
        "vllm.distributed.parallel_state:GroupCoordinator",
        "worker/ranks.py",
        "rank_in_group world_size cpu_group all_reduce",
    ),
    _takes("vllm.utils.cpu_resource_utils:get_cgroup_memory_limit", "worker/memory.py", ""),
    _takes("vllm.utils.cpu_resource_utils:get_cgroup_memory_usage", "worker/memory.py", ""),
    _takes(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "attention/metadata.py",
        "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens max_query_len "
        "max_seq_len block_table_tensor slot_mapping causal is_prefilling seq_lens_cpu_upper_bound",
    ),
    _takes(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__",
        "attention/metadata.py",
        "kv_cache_spec layer_names vllm_config device",
    ),
    _takes(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        "attention/metadata.py",
        "common_prefix_len common_attn_metadata",
    ),
    _has("vllm.v1.attention.backend:AttentionBackend", "attention/metadata.py", "get_builder_cls"),
    Seam(
        f"{_BACKENDS}.flash_attn:FlashAttentionMetadataBuilder",
        "attention/metadata.py",
        fields=("scheduler_metadata",),
        in_source=True,
    ),
    Seam(
        f"{_BACKENDS}.flashinfer:FlashInferMetadataBuilder",
        "attention/metadata.py",
        fields=("max_num_reqs",),
        in_source=True,
    ),
    _has(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "attention/metadata.py",
        "block_size copy_with_new_block_size",
    ),
    _takes(
        "vllm.v1.worker.utils:select_common_block_size",
        "attention/metadata.py",
        "kv_manager_block_size backends kv_cache_specs",
    ),
    _takes("vllm.config:set_current_vllm_config", "attention/metadata.py", "vllm_config"),
    _has(
        "vllm.model_executor.layers.attention:Attention",
        "attention/paged.py",
        "attn_type kv_sharing_target_layer_name kv_cache kv_cache_dtype num_kv_heads impl "
        "layer_name get_attn_backend",
    ),
    _has("vllm.platforms.interface:Platform", "attention/paged.py", "is_fp8_fnuz"),
)


def check_seams(seams: Iterable[Seam] = SEAMS) -> list[Change]:
    """The seams that are not as the table says; nothing of vLLM is changed by looking."""
    return [Change(seam, problem) for seam in seams if (problem := _problem(seam)) is not None]


@functools.cache
def changes() -> tuple[Change, ...]:
    """All that has changed in the vLLM of this process."""
    return tuple(check_seams() or (*_new_duties(), *_behaviour()))


def intact(user: str) -> bool:
    """Whether all that one of our files needs is there.

    Raises:
        ValueError: the table has no seams of such a file.
    """
    seams = [seam for seam in SEAMS if seam.user == user]
    if not seams:
        raise ValueError(f"no seams of {user!r}")
    return not check_seams(seams)


def explain(found: Iterable[Change]) -> str:
    """One line: what has changed, and what to do."""
    first, *others = found
    more = f", and {len(others)} more (`vlcache doctor` lists them)" if others else ""
    return (
        f"vLLM {_find('vllm:__version__')} is not the one that this VLCache was made for "
        f"({supported('vllm')}): {first}{more}. Install such a vLLM, or a VLCache for this one"
    )


def untested_version() -> str | None:
    """That this vLLM is of no version that VLCache is made for; None: it is."""
    version, range_ = _find("vllm:__version__"), supported("vllm")
    if range_.contains(version, prereleases=True):
        return None
    return f"vLLM {version} is untested, VLCache is made for {range_}"


def supported(package: str, by: str = DISTRIBUTION) -> SpecifierSet:
    """The versions of a package that a distribution asks for in its metadata.

    Raises:
        PackageNotFoundError: the distribution is not installed.
    """
    asked = map(Requirement, importlib.metadata.requires(by) or ())
    here = [r for r in asked if r.name == package and (r.marker is None or r.marker.evaluate())]
    return SpecifierSet(",".join(str(requirement.specifier) for requirement in here))


def _new_duties() -> list[Change]:
    """Methods that vLLM has come to ask of every connector."""
    found, known = [], {seam.where for seam in SEAMS}
    for base in (f"{_KV_BASE}:KVConnectorBase_V1", f"{_EC_BASE}:ECConnectorBase"):
        asked: frozenset[str] = _find(base).__abstractmethods__
        if new := [method for method in sorted(asked) if f"{base}.{method}" not in known]:
            found.append(Change(Seam(base, "connector.py"), f"asks for {', '.join(new)}"))
    return found


def _behaviour() -> list[Change]:
    """What no signature tells: whether a real request's block hashes can be fenced."""
    from .scheduler import fence

    try:
        fence.self_test()
    except RuntimeError as error:
        seam = Seam("vllm.v1.request:Request", "scheduler/fence.py")
        return [Change(seam, f"behaves differently: {error}")]
    return []


def _problem(seam: Seam) -> str | None:
    try:
        if not seam.is_due:
            return None
        taken, fields = (_written if seam.in_source else _imported)(seam)
    except (ImportError, AttributeError, OSError):
        return "is not there"
    except Exception as error:  # a module may raise anything while it is imported
        return f"can't be looked at: {type(error).__name__}: {error}"
    missing = [field for field in seam.fields if field not in fields]
    if missing:
        return f"has no {', '.join(missing)}"
    if seam.parameters is None or _fits(seam.parameters, taken, is_exact=seam.is_exact):
        return None
    return f"takes ({', '.join(taken)}), not ({', '.join(seam.parameters)})"


def _fits(needed: tuple[str, ...], taken: dict[str, bool], *, is_exact: bool) -> bool:
    """`taken`: names of parameters, and whether they may be left out."""
    if is_exact:
        return tuple(taken) == needed
    return needed == tuple(name for name in taken if name in needed) and all(
        is_optional for name, is_optional in taken.items() if name not in needed
    )


def _imported(seam: Seam) -> tuple[dict[str, bool], set[str]]:
    """Parameters and fields of the real thing."""
    target, taken = _find(seam.where), dict[str, bool]()
    if seam.parameters is not None:
        for parameter in inspect.signature(target).parameters.values():
            is_rest = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            taken[parameter.name] = is_rest or parameter.default is not parameter.empty
        taken.pop("self", None)
    fields = {field for field in seam.fields if hasattr(target, field)}
    if len(fields) < len(seam.fields):  # what only objects have
        for cls in inspect.getmro(target):
            fields |= inspect.get_annotations(cls).keys() | _set_by(cls.__dict__.get("__init__"))
    return taken, fields


def _set_by(constructor: Any) -> set[str]:
    """The fields that a constructor gives to its object."""
    if not inspect.isfunction(constructor):
        return set()
    code = dis.get_instructions(inspect.unwrap(constructor))
    return {step.argval for step in code if step.opname == "STORE_ATTR"}


def _find(where: str) -> Any:
    module, _, name = where.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def _written(seam: Seam) -> tuple[dict[str, bool], set[str]]:
    """The same, as the file has it."""
    module, _, name = seam.where.partition(":")
    class_name, _, method = name.partition(".")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(module)
    text = Path(spec.origin).read_text(encoding="utf-8")
    # Of large files only the class: parsing all of them takes long.
    found = re.search(rf"^class {class_name}\b.*?(?=^[@a-zA-Z#]|\Z)", text, re.M | re.S)
    if found is None:
        raise AttributeError(name)
    tree = ast.parse(found[0])
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if not method:
        return {}, attributes | functions.keys()
    if method not in functions:
        raise AttributeError(name)
    arguments = functions[method].args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    first_optional = len(names) - len(arguments.defaults)
    taken = {name: index >= first_optional for index, name in enumerate(names) if name != "self"}
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        taken[argument.arg] = default is not None
    return taken, set()

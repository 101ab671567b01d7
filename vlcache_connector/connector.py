"""`VLCacheConnector`: the KV half, a thin face over the scheduler side and the worker side.

vLLM seams: `KVConnectorBase_V1`, `SupportsHMA`
(`vllm/distributed/kv_transfer/kv_connector/v1/base.py`), `CacheHitSource`
(`vllm/v1/metrics/cache_hit_source.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from . import weights
from .calibration import load_for
from .identity import check_identity, model_fingerprint, weights_fingerprint
from .metrics import VLCachePromMetrics, VLCacheStats
from .protocol import StepPlan, StepReport
from .refusals import check_kv_cache, uncaptured_steps
from .scheduler.canonical import opening_tokens
from .scheduler.encoder import ENCODER_ROWS
from .scheduler.gate import allowed_relations
from .scheduler.index import ResidencyIndex
from .scheduler.scheduler import SchedulerSide
from .seams import untested_version
from .support import (
    can_store,
    config_of,
    inert_reason,
    kv_shape,
    may_reuse,
)
from .worker.loaded import loaded_model
from .worker.model import SparsePrefillModel
from .worker.rank import RANK, close_rank
from .worker.ranks import own_rank
from .worker.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)

_HIT_SOURCES = {
    "cpu": CacheHitSource.HOST,
    "fs": CacheHitSource.DISK,
    "fs_native": CacheHitSource.DISK,
}
"""vLLM has no name for what is remote, nor for claimed tokens that were computed."""


class VLCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """Position-independent reuse of image KV.

    Turned on by `--kv-transfer-config '{"kv_connector": "VLCacheConnector", "kv_role": "kv_both",
    "kv_connector_extra_config": {...}}'`; the options are those of `VLCacheConfig`.

    Raises:
        ConfigError: an option is not valid, or vLLM runs with one that can't be served together.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = config_of(vllm_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._inert = inert_reason(vllm_config)
        if self._inert is not None:
            logger.warning("VLCache is off, vLLM runs as without it: %s", self._inert)
            return
        check_kv_cache(kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            if untested := untested_version():
                logger.warning("VLCache: %s; all that it uses of it is there", untested)
            if uncaptured := uncaptured_steps(vllm_config):
                logger.warning("VLCache: %s", uncaptured)
            self._scheduler = self._make_scheduler_side()
            weights.listen(self._scheduler.reset)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is a miss later, never an error."""
        return False

    def _make_scheduler_side(self) -> SchedulerSide:
        vllm_config, events = self._vllm_config, self._vllm_config.kv_events_config
        check_identity(vllm_config, is_loaded=True)
        num_ranks = vllm_config.parallel_config.tensor_parallel_size
        shape = kv_shape(vllm_config)
        model = vllm_config.model_config.model
        calibration = load_for(
            model, self._config.calibration, weights_fingerprint(vllm_config), shape.num_layers
        )
        return SchedulerSide(
            self._config,
            shape,
            hash_block_size=self._kv_cache_config.hash_block_size or shape.block_size,
            fingerprint=model_fingerprint(vllm_config),
            limits=vllm_config.scheduler_config,
            segments=ResidencyIndex(self._config.cpu_bytes // num_ranks, num_ranks),
            encoder_rows=ENCODER_ROWS.get(vllm_config),
            schedules=calibration.schedules if calibration is not None else (),
            opening=opening_tokens(vllm_config.model_config)
            if self._config.donor == "canonical"
            else None,
            allowed=allowed_relations(self._config, calibration, model),
            can_store=can_store(vllm_config),
            can_reuse=may_reuse(self._kv_transfer_config),
            num_ranks=num_ranks,
            announces=bool(events is not None and events.enable_kv_cache_events),
        )

    # -- worker side ------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The model and its KV cache are ready."""
        if self._inert is not None:
            return
        device = next(iter(kv_caches.values())).device
        model = SparsePrefillModel(
            loaded_model(self._vllm_config),
            self._vllm_config,
            self._kv_cache_config.kv_cache_groups[0].layer_names,
            device,
        )
        rank = RANK.get(self._vllm_config)
        rank.has_kv_half = True
        self._worker = WorkerSide(
            model,
            kv_shape(self._vllm_config),
            rank.storage,
            rank.encoder_rows,
            rank=own_rank(),
            pace=rank.pace,
            vllm_config=self._vllm_config,
            kv_cache_config=self._kv_cache_config,
            device=device,
        )

    def unregister_kv_caches(self) -> None:
        """vLLM falls asleep and frees its device memory; from 0.33 on, it says so."""
        if self._worker is not None:
            self._worker.free_device_memory()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins. Without loads this is the last call before vLLM's own forward."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            assert isinstance(connector_metadata, StepPlan)
            self._worker.begin_step(connector_metadata)
            if not connector_metadata.reuse:
                self._worker.expect_captures(connector_metadata.captures)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Run the step's sparse prefill; vLLM's own forward comes next."""
        if self._worker is None:
            return
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan)
        if plan.reuse:
            self._worker.load(plan.reuse)
            self._worker.expect_captures(plan.captures)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Write a layer's reused KV, inside the sparse prefill."""
        if self._worker is not None:
            self._worker.wait_for_layer_load(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing: segments are captured where KV is written."""

    def finish_forward(self) -> None:
        """vLLM's own forward is over; model runner V2 says so before it samples."""
        if self._worker is not None:
            plan = self._get_connector_metadata()
            assert isinstance(plan, StepPlan)
            self._worker.end_forward(plan.num_tokens)

    def wait_for_save(self) -> None:
        """The step's forwards are over: store complete segments, compute canonical ones."""
        if self._worker is not None:
            plan = self._get_connector_metadata()
            assert isinstance(plan, StepPlan)
            self._worker.end_step(plan.num_tokens)
            self._worker.compute_canonical(plan.canonical)

    def build_connector_worker_meta(self) -> StepReport | None:
        """What this rank stored, lost and measured."""
        if self._worker is None:
            return None
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan)
        return self._worker.take_report(is_idle=plan.num_tokens == 0)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of claims that could be neither loaded nor computed."""
        return set() if self._worker is None else self._worker.take_invalid_blocks()

    def shutdown(self) -> None:
        """Give back memory and threads."""
        if self._scheduler is not None:
            ENCODER_ROWS.take(self._vllm_config)
        if self._worker is not None:
            self._worker.close()
            close_rank(self._vllm_config)

    # -- scheduler side ---------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """The manager that knows the blocks of requests."""
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._scheduler.bind_kv_cache_manager(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        """A request arrives."""
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens the sparse prefill fills; None: ask again in the next step."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """vLLM has taken the claim."""
        if self._scheduler is not None:
            self._scheduler.update_state_after_alloc(
                request, tuple(blocks.get_block_ids()[0]), num_external_tokens
            )

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """Where claimed tokens come from; computed ones come from none of vLLM's sources."""
        sources = Counter[CacheHitSource]()
        if self._scheduler is not None:
            for tier, count in self._scheduler.external_tokens(request).items():
                source = _HIT_SOURCES.get(tier or "", CacheHitSource.EXTERNAL_UNSPECIFIED)
                sources[source] += count
        return dict(sources)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepPlan:
        """The step's plan for the workers."""
        if self._scheduler is None:
            return StepPlan()
        return self._scheduler.build_step_plan(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Reports of the workers."""
        report = connector_output.kv_connector_worker_meta
        if self._scheduler is not None:
            # A step without news is over, too: requests that ended in it are forgotten.
            self._scheduler.update_from_report(
                report if isinstance(report, StepReport) else StepReport()
            )

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Which segments this node has got and lost since the last call."""
        return () if self._scheduler is None else self._scheduler.take_events()

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request ends; its figures go to the client."""
        if self._scheduler is None:
            return False, None
        return False, self._scheduler.request_finished(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`; there is one KV cache group."""
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool | None:
        """Drop all stored segments; vLLM asks for it when weights are about to change, too."""
        if self._scheduler is not None:
            weights.may_have_changed()
        return True

    # -- metrics ----------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> VLCacheStats | None:
        """What happened since the last call; all of it is counted on the scheduler side."""
        return None if self._scheduler is None else self._scheduler.statistics.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> VLCacheStats:
        """Stats that have travelled to a logger."""
        return VLCacheStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> VLCachePromMetrics:
        """The metrics of `metrics.METRICS`."""
        return VLCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

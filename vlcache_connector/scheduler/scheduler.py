"""The scheduler side: decides what is reused, recomputed, stored and evicted.

vLLM seams: the scheduler-side methods of `KVConnectorBase_V1`
(`vllm/distributed/kv_transfer/kv_connector/v1/base.py`), called by the scheduler
(`vllm/v1/core/sched/scheduler.py`); `Request.prefill_stats` (`vllm/v1/request.py`), which tells
clients and metrics how many tokens were cached.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from ..calibration import LayerSchedule, Relation
from ..config import VLCacheConfig
from ..protocol import Item, Outcome, PrefillFigures, ReusePlan, StepPlan, StepReport
from ..support import KVShape
from .canonical import CanonicalDonors
from .captures import CapturePlanner
from .donors import Donors
from .fence import PrefixFence, self_test
from .index import ResidencyIndex
from .options import OptionsPolicy
from .planner import plan_reuse
from .requests import TrackedRequest, refusal_of
from .staging import Staging
from .statistics import Statistics

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)


class SchedulerSide:
    """Plans reuse and capture for the requests of one engine.

    Args:
        config: VLCache's options.
        shape: of one token's KV on one rank.
        fingerprint: `support.model_fingerprint`.
        hash_block_size: tokens per hash of vLLM's prefix cache.
        max_batched_tokens: `max_num_batched_tokens`, the most the sparse prefills of one step
            may compute unless a single request needs more.
        encoder_row_bytes: bytes of one encoder output row.
        segments: index of the stored KV segments.
        encoder_rows: index of the stored encoder outputs, shared with the encoder half.
        schedules: of the `layer_aware` selector.
        opening: tokens in front of a canonical donor; None stores what requests compute.
        allowed: donor relations that the gate lets through.
        can_store: whether new segments may be stored (`kv_role` is a producer).
        can_reuse: whether stored segments may be reused (`kv_role` is a consumer).
        num_ranks: tensor-parallel ranks.
    """

    def __init__(
        self,
        config: VLCacheConfig,
        shape: KVShape,
        *,
        fingerprint: str,
        hash_block_size: int,
        max_batched_tokens: int,
        encoder_row_bytes: int,
        segments: ResidencyIndex,
        encoder_rows: ResidencyIndex,
        schedules: Sequence[LayerSchedule],
        opening: Sequence[int] | None,
        allowed: frozenset[Relation],
        can_store: bool,
        can_reuse: bool,
        num_ranks: int,
    ) -> None:
        self._config = config
        self._shape = shape
        self._fingerprint = fingerprint
        self._hash_block_size = hash_block_size
        self._max_batched_tokens = max_batched_tokens
        self._encoder_row_bytes = encoder_row_bytes
        self._segments = segments
        self._encoder_rows = encoder_rows
        self._can_reuse = can_reuse
        self._donors = Donors(segments, allowed=allowed, max_variants=config.donor_variants)
        self._is_gated = not allowed
        self._staging: Staging | None = None
        if (config.disk_path or config.redis_url) and can_reuse and allowed:
            self._staging = Staging(
                segments,
                encoder_rows,
                self._donors,
                num_ranks=num_ranks,
                deadline_seconds=config.fetch_deadline_seconds,
                max_bytes=config.cpu_bytes // num_ranks // 4,
            )
        self._canonical: CanonicalDonors | None = None
        if opening is not None:
            self._canonical = CanonicalDonors(
                opening, encoder_rows, block_size=shape.block_size, give_up=segments.discard
            )
        self._captures: CapturePlanner | None = None
        if can_store and allowed:
            self._captures = CapturePlanner(
                shape, segments, self._donors, self._canonical, config.min_segment_tokens
            )
        self._options = OptionsPolicy(config, shape.num_layers, schedules)
        self.statistics = Statistics({"kv": segments, "encoder": encoder_rows})
        self._live: dict[str, Request] = {}
        self._requests: dict[str, TrackedRequest] = {}
        self._finishing: dict[str, tuple[TrackedRequest, dict[str, Any]]] = {}
        self._step_reuse: list[ReusePlan] = []
        self._finished: list[str] = []
        self._kv_cache_manager: KVCacheManager | None = None
        self._fence: PrefixFence | None = None
        if not config.share_approximate_prefix:
            self_test()
            self._fence = PrefixFence(hash_block_size)

    def bind_kv_cache_manager(self, manager: KVCacheManager) -> None:
        """vLLM's KV cache manager, asked for the blocks of requests."""
        self._kv_cache_manager = manager

    def on_new_request(self, request: Request) -> None:
        """Start tracking a request."""
        self._live[request.request_id] = request
        if not request.mm_features:
            return
        try:
            refusal = refusal_of(request, self._config)
            if refusal is not None:
                self.statistics.happened(f"refused.{refusal}")
                return
            self._requests[request.request_id] = TrackedRequest.of(
                request, self._config, self._fingerprint, self._options.read
            )
        except Exception:
            self._failed("read", request.request_id)

    def _failed(self, what: str, req_id: str) -> None:
        """Count and log an exception that costs a request its reuse, and nothing else."""
        self.statistics.happened(f"failed.{what}")
        logger.exception("VLCache: can't %s request %s, left to plain vLLM", what, req_id)

    # -- claiming ---------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed: int
    ) -> tuple[int | None, bool]:
        """Tokens behind `num_computed` that the sparse prefill will fill; None: ask again."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return 0, False
        tracked.pending = None
        tracked.wanted = self._wanted(tracked, num_computed)
        try:
            if self._is_being_staged(tracked):
                return None, False
            plan = self._plan(tracked, num_computed)
        except Exception:
            self._failed("plan", request.request_id)
            plan = None
        if plan is None:
            if self._fence is not None:
                self._fence.lift(request, num_computed)
            return 0, False
        if self._prefix_is_in_flight(request, num_computed):
            return None, False
        in_step = sum(other.num_computed for other in self._step_reuse)
        if in_step and in_step + plan.num_computed > self._max_batched_tokens:
            return None, False
        if self._fence is not None and plan.first_reused is not None:
            self._fence.raise_at(request, plan.first_reused)
        tracked.pending = plan
        return len(plan.claim), False

    def update_state_after_alloc(
        self, request: Request, block_ids: tuple[int, ...], num_external: int
    ) -> None:
        """vLLM has allocated the claimed tokens: the plan is part of this step."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        plan, tracked.pending = tracked.pending, None
        if num_external == 0:
            plan = None
        self._take_lookups(tracked, plan)
        if plan is None:
            return
        if num_external != len(plan.claim):
            raise RuntimeError(
                f"vLLM took {num_external} of {len(plan.claim)} claimed tokens of request "
                f"{request.request_id}"
            )
        last_block = -(-plan.claim.end // self._shape.block_size)
        plan = replace(
            plan,
            block_ids=block_ids[:last_block],
            captures={} if self._captures is None else self._captures.in_claim(tracked, plan),
        )
        for item in self._items_in_runs(tracked, plan):
            # Does nothing where the rows are stored, and so will not be computed.
            self._encoder_rows.reserve(item.encoder_key, self._encoder_bytes(item))
        if request.prefill_stats is not None and request.num_preemptions == 0:
            # What the sparse prefill computes is not cached; vLLM counts all of the claim as such.
            request.prefill_stats.set(
                num_prompt_tokens=request.prefill_stats.num_prompt_tokens,
                num_local_cached_tokens=request.prefill_stats.num_local_cached_tokens,
                num_external_cached_tokens=plan.num_reused,
            )
        tracked.loading = plan
        self._step_reuse.append(plan)

    def _take_lookups(self, tracked: TrackedRequest, plan: ReusePlan | None) -> None:
        """The request is admitted: note where its items were found, and count those that were not.

        What the workers are to load is counted when they have.
        """
        req_id = tracked.request.request_id
        planned = {reuse.item for reuse in plan.reused} if plan is not None else set()
        if planned:
            tracked.tier, tracked.tiers = "cpu", dict.fromkeys(planned, "cpu")
        if self._staging is not None:
            tracked.fetch_seconds = self._staging.waited_seconds(req_id)
            if planned:
                tracked.tier = self._staging.tier_of(req_id) or "cpu"
        for item in tracked.wanted:
            tier, outcome = self._lookup(tracked, item)
            if item.index not in planned:
                # Found, and yet not in the plan: there was no room, or planning failed.
                self.statistics.looked_up(tier, "failed" if outcome == "hit" else outcome)
            elif outcome == "hit" and tier is not None:
                tracked.tiers[item.index] = tier
        tracked.wanted = []

    def _lookup(self, tracked: TrackedRequest, item: Item) -> tuple[str | None, Outcome]:
        """Where an item's KV is, and whether it may be had."""
        if self._is_gated:
            return None, "skipped"
        if self._donors.is_forbidden(item):
            return "cpu", "skipped"
        if self._staging is not None:
            tier, outcome = self._staging.lookup(tracked.request.request_id, item)
            if outcome != "miss":
                return tier, outcome
        return ("cpu", "hit") if self._donors.find(item) is not None else (None, "miss")

    def external_tokens(self, request: Request) -> dict[str | None, int]:
        """Claimed tokens of an admitted request: reused ones by their tier, as far as it is known
        before they are loaded, and computed ones under None."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.loading is None:
            return {}
        plan, tokens = tracked.loading, Counter[str | None]()
        for reuse in plan.reused:
            tokens[tracked.tiers[reuse.item]] += reuse.num_reused
        tokens[None] = len(plan.claim) - plan.num_reused
        return +tokens

    def _may_reuse(self, tracked: TrackedRequest) -> bool:
        # vLLM throws the claim away when it is not to read its prefix cache.
        return (
            self._can_reuse
            and tracked.options.enabled
            and not tracked.request.skip_reading_prefix_cache
        )

    def _wanted(self, tracked: TrackedRequest, num_computed: int) -> list[Item]:
        """Items that vLLM's prefix cache does not hold, and whose KV may be stored."""
        if not self._may_reuse(tracked):
            return []
        return [
            item
            for item in tracked.items
            if item.span.end > num_computed and len(item.span) >= self._config.min_segment_tokens
        ]

    def _is_being_staged(self, tracked: TrackedRequest) -> bool:
        """Whether what the request may reuse is still on its way into host memory."""
        if self._staging is None or not self._may_reuse(tracked):
            return False
        return self._staging.is_pending(
            tracked.request.request_id,
            tracked.wanted,
            self._segment_bytes,
            self._encoder_bytes,
            lambda item: self._options.saved_tokens(tracked.options, len(item.span)),
        )

    def _plan(self, tracked: TrackedRequest, num_computed: int) -> ReusePlan | None:
        request = tracked.request
        if not self._may_reuse(tracked):
            return None
        if self._is_gated or any(self._donors.is_forbidden(item) for item in tracked.items):
            tracked.is_gated = True
        plan = plan_reuse(
            request.request_id,
            tracked.items,
            num_computed=num_computed,
            num_tokens=request.num_tokens,
            find_donor=self._donors.find,
            select=functools.partial(self._options.select, tracked.options),
        )
        if plan is None:
            return None
        encoder_inputs = {}
        for item in tracked.items:
            if item.span.clip(plan.claim.start, plan.claim.end):
                feature = request.mm_features[item.index]
                if feature.data is None:
                    # What turns out to be missing on a worker could not be computed there.
                    return None
                encoder_inputs[item.index] = (feature.modality, feature.data)
        for item in self._items_in_runs(tracked, plan):
            if self._encoder_rows.is_ready(item.encoder_key):
                self._encoder_rows.promise(item.encoder_key)
        for reuse in plan.reused:
            self._segments.promise(reuse.donor)
        return replace(plan, encoder_inputs=encoder_inputs)

    @staticmethod
    def _items_in_runs(tracked: TrackedRequest, plan: ReusePlan) -> list[Item]:
        runs = plan.runs_at(0)
        return [
            item
            for item in tracked.items
            if any(item.span.clip(run.start, run.end) for run in runs)
        ]

    def _prefix_is_in_flight(self, request: Request, num_computed: int) -> bool:
        """Whether a block of the local prefix hit is computed only by this step's own forward.

        vLLM commits blocks when it schedules them, so a hit may rest on KV that the forward of
        this very step writes; the sparse prefill runs before it and would read nothing.
        """
        last = num_computed // self._hash_block_size - 1
        if last < 0:
            return False
        block_hash = request.block_hashes[last]
        end = (last + 1) * self._hash_block_size
        return any(
            other is not request
            and other.status == RequestStatus.RUNNING
            and other.num_computed_tokens < end
            and len(other.block_hashes) > last
            and other.block_hashes[last] == block_hash
            for other in self._live.values()
        )

    def _segment_bytes(self, item: Item) -> int:
        return len(item.span) * self._shape.bytes_per_token

    def _encoder_bytes(self, item: Item) -> int:
        return item.num_embeds * self._encoder_row_bytes

    # -- steps ------------------------------------------------------------------------------

    def build_step_plan(self, output: SchedulerOutput) -> StepPlan:
        """Everything the workers do in this step."""
        cancelled = []
        for req_id in output.preempted_req_ids or ():
            tracked = self._requests.get(req_id)
            if self._captures is not None and tracked is not None and tracked.capturing:
                self._captures.give_up(tracked)
                cancelled.append(req_id)
        plan = StepPlan(reuse=self._step_reuse, cancelled=cancelled, finished=self._finished)
        self._step_reuse, self._finished = [], []
        if self._captures is not None:
            assert self._kv_cache_manager is not None
            for req_id, num_scheduled in output.num_scheduled_tokens.items():
                tracked = self._requests.get(req_id)
                if tracked is None or not tracked.options.enabled or tracked.is_past_items:
                    continue
                block_ids = tuple(self._kv_cache_manager.get_block_ids(req_id)[0])
                plan.captures += self._captures.in_step(tracked, num_scheduled, block_ids)
        if self._canonical is not None:
            assert self._kv_cache_manager is not None
            is_quiet = all(count == 1 for count in output.num_scheduled_tokens.values())
            canonical = self._canonical.next_plan(
                self._kv_cache_manager.block_pool, is_quiet=is_quiet
            )
            if canonical is not None:
                plan.canonical.append(canonical)
        involved = [p.req_id for p in plan.reuse] + [p.req_id for p in plan.captures]
        for req_id in dict.fromkeys(involved):
            tracked = self._requests[req_id]
            if not tracked.context_sent:
                tracked.context_sent = True
                plan.contexts.append(tracked.context())
        plan.num_tokens = output.total_num_scheduled_tokens
        if self._staging is not None:
            plan.fetches, plan.admitted, plan.unwanted = self._staging.take_plans()
        self._segments.settle()
        self._encoder_rows.settle()
        plan.dropped_segments = self._segments.take_evicted()
        plan.dropped_encoder = self._encoder_rows.take_evicted()
        return plan

    def update_from_report(self, report: StepReport) -> None:
        """Take in what the workers stored, lost and measured."""
        if self._staging is not None:
            self._staging.update(report.fetched)
        for key, ranks in report.stored.items():
            self._segments.stored(key, ranks)
        if self._canonical is not None:
            assert self._kv_cache_manager is not None
            for key in {*report.stored, *report.lost}:
                self._canonical.finish(key, self._kv_cache_manager.block_pool)
        self.statistics.take_report(report)
        for key in report.lost:
            self._segments.lost(key)
        for key, ranks in report.encoder_stored.items():
            self._encoder_rows.stored(key, ranks)
        for key in report.encoder_lost:
            self._encoder_rows.lost(key)
        for req_id, figures in report.figures.items():
            tracked = self._requests.get(req_id)
            if tracked is not None:
                self._take_figures(tracked, figures)
            elif req_id in self._finishing:
                tracked, params = self._finishing[req_id]
                self._take_figures(tracked, figures)
                params.update(tracked.report())
            if tracked is not None:
                logger.debug("VLCache: request %s: %s", req_id, tracked.report())
        self._finishing.clear()

    def _take_figures(self, tracked: TrackedRequest, figures: PrefillFigures) -> None:
        tracked.figures = figures
        if tracked.tier == "cpu" and figures.reused and figures.on_device >= figures.reused.keys():
            tracked.tier = "device"
        for item, tier in tracked.tiers.items():
            if tier == "cpu" and item in figures.on_device:
                tracked.tiers[item] = "device"
        self.statistics.loaded(tracked)

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """Forget the request; its figures go back to the client."""
        self._live.pop(request.request_id, None)
        tracked = self._requests.pop(request.request_id, None)
        if self._fence is not None:
            self._fence.forget(request.request_id)
        if self._staging is not None:
            self._staging.forget(request.request_id)
        if tracked is None:
            return None
        if tracked.is_gated:
            self.statistics.happened("refused.gate")
        if self._captures is not None:
            self._captures.give_up(tracked)
        if tracked.context_sent:
            self._finished.append(request.request_id)
        params = tracked.report()
        # vLLM finishes a request before it hands over the same step's worker reports; the client
        # gets this very dict, filled in by then.
        self._finishing[request.request_id] = (tracked, params)
        return {"vlcache": params}

    def reset(self) -> None:
        """Drop everything that is stored."""
        if self._canonical is not None:
            self._canonical.clear()
        self._segments.clear()
        self._encoder_rows.clear()

"""The scheduler side: decides what is reused, recomputed, stored and evicted.

vLLM seams: the scheduler-side methods of `KVConnectorBase_V1`
(`vllm/distributed/kv_transfer/kv_connector/v1/base.py`), called by the scheduler
(`vllm/v1/core/sched/scheduler.py`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from ..config import VLCacheConfig
from ..protocol import CapturePlan, Item, PrefillFigures, ReusePlan, StepPlan, StepReport
from ..selection import SELECTORS, Budget
from ..support import KVShape
from .fence import PrefixFence, self_test
from .index import ResidencyIndex
from .planner import plan_reuse
from .requests import TrackedRequest

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
        can_store: whether new segments may be stored (`kv_role` is a producer).
        can_reuse: whether stored segments may be reused (`kv_role` is a consumer).
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
        can_store: bool,
        can_reuse: bool,
    ) -> None:
        self._config = config
        self._shape = shape
        self._fingerprint = fingerprint
        self._hash_block_size = hash_block_size
        self._max_batched_tokens = max_batched_tokens
        self._encoder_row_bytes = encoder_row_bytes
        self._segments = segments
        self._encoder_rows = encoder_rows
        self._can_store = can_store
        self._can_reuse = can_reuse
        self._selector = SELECTORS[config.selector]()
        self.failures: Counter[str] = Counter()
        """What went wrong, by kind; each cost only reuse."""
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
        try:
            tracked = TrackedRequest.of(request, self._fingerprint)
        except Exception:
            self._failed("request could not be read", request.request_id)
            return
        if tracked is not None:
            self._requests[request.request_id] = tracked

    def _failed(self, what: str, req_id: str) -> None:
        """Count and log an exception that costs a request its reuse, and nothing else."""
        self.failures[what] += 1
        logger.exception("VLCache: %s, left to plain vLLM: request %s", what, req_id)

    # -- claiming ---------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed: int
    ) -> tuple[int | None, bool]:
        """Tokens behind `num_computed` that the sparse prefill will fill; None: ask again."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return 0, False
        tracked.pending = None
        try:
            plan = self._plan(tracked, num_computed)
        except Exception:
            self._failed("reuse could not be planned", request.request_id)
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
        if self._fence is not None and plan.reused:
            self._fence.raise_at(request, plan.reused[0].span.start)
        tracked.pending = plan
        return len(plan.claim), False

    def update_state_after_alloc(
        self, request: Request, block_ids: tuple[int, ...], num_external: int
    ) -> None:
        """vLLM has allocated the claimed tokens: the plan is part of this step."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.pending is None:
            return
        plan, tracked.pending = tracked.pending, None
        if num_external == 0:
            return
        if num_external != len(plan.claim):
            raise RuntimeError(
                f"vLLM took {num_external} of {len(plan.claim)} claimed tokens of request "
                f"{request.request_id}"
            )
        last_block = -(-plan.claim.end // self._shape.block_size)
        plan = replace(
            plan, block_ids=block_ids[:last_block], captures=self._captures_in(tracked, plan)
        )
        for index in plan.encoder_inputs:
            item = tracked.item(index)
            self._encoder_rows.reserve(item.encoder_key, self._encoder_bytes(item))
        tracked.tier = "cpu"
        tracked.figures = PrefillFigures(
            reused_tokens=plan.num_reused,
            recomputed_tokens=plan.recomputed,
            computed_tokens=plan.num_computed,
        )
        self._step_reuse.append(plan)

    def _plan(self, tracked: TrackedRequest, num_computed: int) -> ReusePlan | None:
        request = tracked.request
        if not (self._can_reuse and tracked.options.enabled):
            return None
        if request.skip_reading_prefix_cache:
            # vLLM itself would then throw the claim away.
            return None
        ratio = tracked.options.recompute_ratio
        plan = plan_reuse(
            request.request_id,
            tracked.items,
            num_computed=num_computed,
            num_tokens=request.num_tokens,
            is_stored=lambda item: self._segments.is_ready(item.key),
            selector=self._selector,
            budget=Budget(
                ratio=self._config.recompute_ratio if ratio is None else ratio,
                min_tokens=self._config.min_recompute_tokens,
            ),
        )
        if plan is None:
            return None
        encoder_inputs = {}
        for item in self._items_in_runs(tracked, plan):
            if self._encoder_rows.is_ready(item.encoder_key):
                self._encoder_rows.promise(item.encoder_key)
                continue
            feature = request.mm_features[item.index]
            if feature.data is None:
                return None
            encoder_inputs[item.index] = (feature.modality, feature.data)
        for part in plan.reused:
            self._segments.promise(tracked.item(part.item).key)
        return replace(plan, encoder_inputs=encoder_inputs)

    @staticmethod
    def _items_in_runs(tracked: TrackedRequest, plan: ReusePlan) -> list[Item]:
        return [
            item
            for item in tracked.items
            if any(item.span.clip(run.start, run.end) for run in plan.runs)
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

    # -- storing ----------------------------------------------------------------------------

    def _captures_in(self, tracked: TrackedRequest, plan: ReusePlan) -> dict[int, str]:
        """Unknown items that the sparse prefill computes from first to last token."""
        return {
            item.index: item.key
            for item in self._items_in_runs(tracked, plan)
            if any(run.start <= item.span.start and item.span.end <= run.end for run in plan.runs)
            and self._reserve(item)
        }

    def _reserve(self, item: Item) -> bool:
        return (
            self._can_store
            and len(item.span) >= self._config.min_segment_tokens
            and self._segments.reserve(item.key, self._segment_bytes(item))
        )

    def _segment_bytes(self, item: Item) -> int:
        return len(item.span) * self._shape.bytes_per_token

    def _encoder_bytes(self, item: Item) -> int:
        return item.num_embeds * self._encoder_row_bytes

    def _plan_captures(self, tracked: TrackedRequest, num_scheduled: int) -> list[CapturePlan]:
        """Items that vLLM's own forward computes, in whole or in part, in this step."""
        assert self._kv_cache_manager is not None
        start = tracked.request.num_computed_tokens
        end = start + num_scheduled
        if start >= tracked.items[-1].span.end:
            return []
        req_id = tracked.request.request_id
        block_ids = tuple(self._kv_cache_manager.get_block_ids(req_id)[0])
        captures = []
        for item in tracked.items:
            part = item.span.clip(start, end)
            if not part:
                continue
            if part.start == item.span.start:
                if not self._reserve(item):
                    continue
            elif tracked.capturing.get(item.index) != part.start:
                continue
            tracked.capturing[item.index] = part.end
            if part.end == item.span.end:
                del tracked.capturing[item.index]
            last_block = -(-part.end // self._shape.block_size)
            captures.append(CapturePlan(req_id, item.index, item.key, part, block_ids[:last_block]))
        return captures

    def _give_up_captures(self, tracked: TrackedRequest) -> None:
        for index in tracked.capturing:
            self._segments.discard(tracked.item(index).key)
        tracked.capturing.clear()

    # -- steps ------------------------------------------------------------------------------

    def build_step_plan(self, output: SchedulerOutput) -> StepPlan:
        """Everything the workers do in this step."""
        cancelled = []
        for req_id in output.preempted_req_ids or ():
            tracked = self._requests.get(req_id)
            if tracked is not None and tracked.capturing:
                self._give_up_captures(tracked)
                cancelled.append(req_id)
        plan = StepPlan(reuse=self._step_reuse, cancelled=cancelled, finished=self._finished)
        self._step_reuse, self._finished = [], []
        if self._can_store:
            for req_id, num_scheduled in output.num_scheduled_tokens.items():
                tracked = self._requests.get(req_id)
                if tracked is not None and tracked.options.enabled:
                    plan.captures += self._plan_captures(tracked, num_scheduled)
        involved = [p.req_id for p in plan.reuse] + [p.req_id for p in plan.captures]
        for req_id in dict.fromkeys(involved):
            tracked = self._requests[req_id]
            if not tracked.context_sent:
                tracked.context_sent = True
                plan.contexts.append(tracked.context())
        self._segments.settle()
        self._encoder_rows.settle()
        plan.dropped_segments = self._segments.take_evicted()
        plan.dropped_encoder = self._encoder_rows.take_evicted()
        return plan

    def update_from_report(self, report: StepReport) -> None:
        """Take in what the workers stored, lost and measured."""
        for key, ranks in report.stored.items():
            self._segments.stored(key, ranks)
        self.failures.update(report.failures)
        for key in report.lost:
            self._segments.lost(key)
        for key, ranks in report.encoder_stored.items():
            self._encoder_rows.stored(key, ranks)
        for key in report.encoder_lost:
            self._encoder_rows.lost(key)
        for req_id, figures in report.figures.items():
            tracked = self._requests.get(req_id)
            if tracked is not None:
                tracked.figures = figures
            elif req_id in self._finishing:
                tracked, params = self._finishing[req_id]
                tracked.figures = figures
                params.update(tracked.report())
            if tracked is not None:
                logger.debug("VLCache: request %s: %s", req_id, tracked.report())
        self._finishing.clear()

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """Forget the request; its figures go back to the client."""
        self._live.pop(request.request_id, None)
        tracked = self._requests.pop(request.request_id, None)
        if self._fence is not None:
            self._fence.forget(request.request_id)
        if tracked is None:
            return None
        self._give_up_captures(tracked)
        if tracked.context_sent:
            self._finished.append(request.request_id)
        params = tracked.report()
        # vLLM finishes a request before it hands over the same step's worker reports; the client
        # gets this very dict, filled in by then.
        self._finishing[request.request_id] = (tracked, params)
        return {"vlcache": params}

    def reset(self) -> None:
        """Drop everything that is stored."""
        self._segments.clear()
        self._encoder_rows.clear()

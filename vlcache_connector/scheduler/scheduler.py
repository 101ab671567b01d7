"""The scheduler side: decides what is reused, recomputed, stored and evicted.

vLLM seams: the scheduler-side methods of `KVConnectorBase_V1`
(`vllm/distributed/kv_transfer/kv_connector/v1/base.py`), called by the scheduler
(`vllm/v1/core/sched/scheduler.py`); `Request.prefill_stats` (`vllm/v1/request.py`), which tells
clients and metrics how many tokens were cached.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from ..calibration import LayerSchedule, Relation
from ..config import RequestOptions, VLCacheConfig
from ..protocol import (
    Item,
    Layout,
    Outcome,
    ReusePlan,
    StepPlan,
    StepReport,
    inside,
    of_runs,
)
from ..support import KVShape
from .break_even import BreakEven
from .budget import Fit, StepBudget, Work
from .canonical import CanonicalDonors
from .captures import CapturePlanner
from .donors import Donors
from .encoder import EncoderRows
from .events import SegmentEvents
from .fence import PrefixFences, self_test
from .index import ResidencyIndex
from .options import OptionsPolicy
from .planner import plan_reuse
from .requests import Claimed, Lookup, Staged, TrackedRequest, refusal_of
from .staging import Staging
from .statistics import Statistics

if TYPE_CHECKING:
    from vllm.config.scheduler import SchedulerConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)

_LONGEST_WAY = 16
"""A known item is reached for across at most so many times its own number of tokens: the sparse
prefill would compute them all to save little."""


class SchedulerSide:
    """Plans reuse and capture for the requests of one engine.

    Args:
        config: VLCache's options.
        shape: of one token's KV on one rank.
        fingerprint: `identity.model_fingerprint`.
        hash_block_size: tokens per hash of vLLM's prefix cache.
        limits: vLLM's, on what a step computes.
        segments: index of the stored KV segments.
        encoder_rows: the stored encoder rows, shared with the encoder half.
        schedules: of the `layer_aware` selector.
        opening: tokens in front of a canonical donor; None stores what requests compute.
        allowed: donor relations that the gate lets through.
        can_store: whether new segments may be stored (`kv_role` is a producer).
        can_reuse: whether stored segments may be reused (`kv_role` is a consumer).
        num_ranks: tensor-parallel ranks.
        announces: vLLM publishes KV events.
    """

    def __init__(
        self,
        config: VLCacheConfig,
        shape: KVShape,
        *,
        fingerprint: str,
        hash_block_size: int,
        limits: SchedulerConfig,
        segments: ResidencyIndex,
        encoder_rows: EncoderRows,
        schedules: Sequence[LayerSchedule],
        opening: Sequence[int] | None,
        allowed: frozenset[Relation],
        can_store: bool,
        can_reuse: bool,
        num_ranks: int,
        announces: bool = False,
    ) -> None:
        self._config = config
        self._shape = shape
        self._fingerprint = fingerprint
        self._hash_block_size = hash_block_size
        self._segments = segments
        self._encoder_rows = encoder_rows
        self._can_reuse = can_reuse
        self._events = SegmentEvents() if announces else None
        self._donors = Donors(
            segments, allowed=allowed, max_variants=config.donor_variants, events=self._events
        )
        self._is_gated = not allowed
        self._staging: Staging | None = None
        if config.tier_keys and can_reuse and allowed:
            self._staging = Staging(
                segments,
                encoder_rows.index,
                self._donors,
                num_ranks=num_ranks,
                deadline_seconds=config.fetch_deadline_seconds,
                is_worth=self._is_worth_loading,
            )
        self._canonical: CanonicalDonors | None = None
        if opening is not None:
            self._canonical = CanonicalDonors(
                opening, encoder_rows.index, block_size=shape.block_size, give_up=segments.discard
            )
        self._options = OptionsPolicy(config, shape.num_layers, schedules)
        self_test()
        self._fences = PrefixFences(hash_block_size, has_events=announces)
        self._captures: CapturePlanner | None = None
        if can_store and allowed:
            self._captures = CapturePlanner(
                shape,
                segments,
                self._donors,
                self._canonical,
                config.min_segment_tokens,
                self._options.is_below_default,
                self._fences.first_approximate,
            )
        self.statistics = Statistics({"kv": segments, "encoder": encoder_rows.index})
        self._live: dict[str, Request] = {}
        self._budget = StepBudget(limits, self._live)
        self._break_even = BreakEven(is_on=config.break_even)
        self._requests: dict[str, TrackedRequest] = {}
        self._finishing: dict[str, tuple[TrackedRequest, dict[str, Any]]] = {}
        self._step_reuse: list[ReusePlan] = []
        self._finished: list[str] = []
        self._cancelled: list[str] = []
        """Requests whose captures were given up since the last step."""
        self._kv_cache_manager: KVCacheManager | None = None

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
            tracked = TrackedRequest.of(
                request, self._config, self._fingerprint, self._options.read
            )
            self._requests[request.request_id] = tracked
            # vLLM looks into its prefix cache before it asks for a claim.
            self._find_approximate_prefix(tracked)
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
            return self._nothing(request, num_computed), False
        tracked.staged = None
        try:
            if self._find_approximate_prefix(tracked):
                # A request of this very step has begun to compute it.
                return None, False
            if request.num_preemptions == 0:
                tracked.approximate_prefix_tokens = self._fences.num_hidden(request, num_computed)
            wanted = self._wanted(tracked, num_computed)
            if self._is_being_staged(tracked, wanted):
                return None, False
            tracked.staged = self._look_up(tracked, wanted)
            tracked.staged = self._plan(tracked, tracked.staged, num_computed)
        except Exception:
            self._failed("plan", request.request_id)
        layout = tracked.staged.layout if tracked.staged is not None else None
        if tracked.staged is None or layout is None:
            self._fences.lift(request, num_computed)
            return self._nothing(request, num_computed), False
        if self._prefix_is_in_flight(request, num_computed):
            return None, False
        if self._fit(request, tracked.staged) != "now":
            self._budget.wait()
            return None, False
        if layout.first_reused is not None:
            self._fences.raise_at(
                request, layout.first_reused, self._options.policy(tracked.options)
            )
        return len(layout.claim), False

    def _may_reuse(self, tracked: TrackedRequest) -> bool:
        """Whether a request takes KV that is not its own."""
        # vLLM throws the claim away when it is not to read its prefix cache.
        is_allowed = self._can_reuse and not tracked.request.skip_reading_prefix_cache
        return is_allowed and tracked.options.enabled

    def _find_approximate_prefix(self, tracked: TrackedRequest) -> bool:
        """Whether vLLM's prefix cache serves more of a request now than before: approximate blocks
        that requests like it have left there."""
        if not self._may_reuse(tracked):
            return False
        assert self._kv_cache_manager is not None
        policy = self._options.policy(tracked.options)
        return self._fences.find(tracked.request, policy, self._kv_cache_manager)

    def _wanted(self, tracked: TrackedRequest, num_computed: int) -> list[Item]:
        """Items that vLLM's prefix cache does not hold, and whose KV may be stored."""
        if not self._may_reuse(tracked):
            return []
        return [
            item
            for item in tracked.items
            if item.span.end > num_computed and len(item.span) >= self._config.min_segment_tokens
        ]

    def _is_being_staged(self, tracked: TrackedRequest, wanted: Sequence[Item]) -> bool:
        """Whether what the request may reuse is still on its way into host memory."""
        if self._staging is None or not wanted:
            return False
        return self._staging.is_pending(
            tracked.request.request_id,
            wanted,
            self._segment_bytes,
            self._encoder_bytes,
            lambda item: self._options.saved_tokens(tracked.options, len(item.span)),
        )

    def _is_worth_loading(self, tier: str, num_bytes: int, saved_tokens: int) -> bool:
        seconds = self.statistics.read_seconds(tier, num_bytes)
        speed = self.statistics.prefill_speed
        if not self._config.break_even or seconds is None or speed is None:
            return True
        if seconds < saved_tokens / speed:
            return True
        self.statistics.happened("refused.not_worth")
        return False

    def _look_up(self, tracked: TrackedRequest, wanted: Sequence[Item]) -> Staged:
        """Where the KV of the wanted items is."""
        lookups = tuple(self._look_for(tracked, item) for item in wanted)
        if self._staging is None:
            return Staged(lookups)
        req_id = tracked.request.request_id
        return Staged(lookups, self._staging.tier_of(req_id))

    def _look_for(self, tracked: TrackedRequest, item: Item) -> Lookup:
        """Where an item's KV is, and whether it may be had."""
        if self._is_gated:
            return Lookup(item, "skipped", held_back="gate")
        if self._donors.is_forbidden(item):
            return Lookup(item, "skipped", "cpu", held_back="gate")
        below = Lookup(item, "miss")
        if self._staging is not None:
            below = self._staging.lookup(tracked.request.request_id, item)
        donor = self._donors.find(item)
        if donor is not None:
            return Lookup(item, "hit", below.tier if below.outcome == "hit" else "cpu", donor)
        # Found, and yet not here: there was no room.
        return replace(below, outcome="failed") if below.outcome == "hit" else below

    def _plan(self, tracked: TrackedRequest, staged: Staged, num_computed: int) -> Staged:
        """The longest claim that a step has room for, of what was found."""
        request = tracked.request
        layout = plan_reuse(
            tracked.items,
            num_computed=num_computed,
            num_tokens=request.num_tokens,
            donors={look.item.index: look.donor for look in staged.lookups if look.donor},
            select=functools.partial(self._options.select, tracked.options),
        )
        while layout is not None:
            computed = self._items_in_runs(tracked, layout)
            encoded = tuple(
                item.index
                for item in computed
                if not self._encoder_rows.index.is_ready(item.encoder_key)
            )
            planned = replace(staged, layout=layout, encoded=encoded)
            inputs = self._encoder_inputs(tracked, layout)
            if not self._fits(request, planned, layout):
                staged = staged.without_last(layout, "budget")
            elif not self._pays(tracked, layout):
                staged = staged.without_last(layout, "break_even")
            elif all(data is not None for _, data in inputs.values()):
                for item in computed:
                    self._encoder_rows.promise(item.encoder_key)
                for reuse in layout.reused:
                    self._segments.promise(reuse.donor)
                return planned
            layout = layout.shorter()
        return staged

    @staticmethod
    def _encoder_inputs(tracked: TrackedRequest, layout: Layout) -> dict[int, tuple[str, Any]]:
        """See `ReusePlan`."""
        features = tracked.request.mm_features
        return {
            item.index: (features[item.index].modality, features[item.index].data)
            for item in inside(tracked.items, layout.claim)
        }

    @staticmethod
    def _items_in_runs(tracked: TrackedRequest, layout: Layout) -> list[Item]:
        return of_runs(tracked.items, layout.runs_at(0))

    def _fits(self, request: Request, staged: Staged, layout: Layout) -> bool:
        """Whether a claim may be filled some time, and its last item is worth the way to it."""
        if layout.tokens_before_last > _LONGEST_WAY * len(layout.reused[-1].span):
            return False
        return self._fit(request, staged) != "never"

    def _pays(self, tracked: TrackedRequest, layout: Layout) -> bool:
        """Whether computing all of a claim would take longer than filling it."""
        items = {item.index: item for item in tracked.items}
        saves_encoder = any(
            not self._encoder_rows.index.is_ready(items[reuse.item].encoder_key)
            for reuse in layout.reused
        )
        return saves_encoder or self._break_even.pays(
            layout.num_reused, self.statistics.prefill_speed
        )

    def _fit(self, request: Request, staged: Staged) -> Fit:
        return self._budget.fit(self._work(request, 0, staged), self._encoder_rows.num_encoded)

    def _nothing(self, request: Request, num_computed: int) -> int | None:
        """What a request that claims nothing is told: 0, or None where others claimed the step."""
        work = self._work(request, num_computed)
        return None if self._budget.is_spent_for(work, self._encoder_rows.num_encoded) else 0

    def _work(self, request: Request, num_computed: int, staged: Staged | None = None) -> Work:
        """What a claim, if there is one, and then vLLM compute of a request in this step."""
        tokens, encoded = 0, 0
        if staged is not None and staged.layout is not None:
            num_computed, tokens = staged.layout.claim.end, staged.layout.num_computed
            items = (request.mm_features[index] for index in staged.encoded)
            encoded = sum(feature.mm_position.get_num_embeds() for feature in items)
        rest = self._budget.chunk(request.num_tokens - num_computed)
        rest_encoded = sum(
            feature.mm_position.get_num_embeds()
            for feature in request.mm_features
            if feature.mm_position.offset < num_computed + rest
            and feature.mm_position.offset + feature.mm_position.length > num_computed
            and not self._encoder_rows.is_ready(feature.identifier)
        )
        return Work(tokens, rest, encoded, rest_encoded)

    def update_state_after_alloc(
        self, request: Request, block_ids: tuple[int, ...], num_external: int
    ) -> None:
        """vLLM has allocated the claimed tokens: the claim is part of this step."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        waited = self._staging.waited_seconds(request.request_id) if self._staging else None
        tracked.admitted(time.time(), waited)
        if tracked.staged is None:
            return
        staged, layout = tracked.staged, tracked.staged.layout
        if num_external == 0:
            layout = None
        reused = {reuse.item for reuse in layout.reused} if layout is not None else set()
        for look in staged.lookups:
            # What the workers are to load is counted when they have.
            if look.item.index not in reused:
                outcome: Outcome = "failed" if look.outcome == "hit" else look.outcome
                self.statistics.looked_up(look.tier, outcome)
        if layout is None:
            if request.num_preemptions == 0:
                self.statistics.waited_in_vain(tracked.seconds.get("staging", 0.0))
            return
        if num_external != len(layout.claim):
            raise RuntimeError(
                f"vLLM took {num_external} of {len(layout.claim)} claimed tokens of request "
                f"{request.request_id}"
            )
        for index in staged.encoded:
            self._encoder_rows.keep(request.mm_features[index])
        if request.prefill_stats is not None and request.num_preemptions == 0:
            # What the sparse prefill computes is not cached; vLLM counts all of the claim as such.
            request.prefill_stats.set(
                num_prompt_tokens=request.prefill_stats.num_prompt_tokens,
                num_local_cached_tokens=request.prefill_stats.num_local_cached_tokens,
                num_external_cached_tokens=layout.num_reused,
            )
        plan = ReusePlan(
            layout.claim,
            layout.reused,
            request.request_id,
            block_ids[: -(-layout.claim.end // self._shape.block_size)],
            {} if self._captures is None else self._captures.in_claim(tracked, layout),
            self._encoder_inputs(tracked, layout),
        )
        tiers = {look.item.index: look.tier or "cpu" for look in staged.lookups}
        tracked.claimed = Claimed(plan, {item: tiers[item] for item in reused}, staged)
        self._budget.claim(self._work(request, 0, staged))
        self._step_reuse.append(plan)

    def external_tokens(self, request: Request) -> dict[str | None, int]:
        """Claimed tokens of an admitted request: reused ones by their tier, as far as it is known
        before they are loaded, and computed ones under None."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.claimed is None:
            return {}
        plan, tokens = tracked.claimed.plan, Counter[str | None]()
        for reuse in plan.reused:
            tokens[tracked.claimed.tiers[reuse.item]] += reuse.num_reused
        tokens[None] = len(plan.claim) - plan.num_reused
        return +tokens

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
        return self._encoder_rows.num_bytes(item.num_embeds)

    # -- steps ------------------------------------------------------------------------------

    def build_step_plan(self, output: SchedulerOutput) -> StepPlan:
        """Everything the workers do in this step."""
        self._look_at_events()
        self._give_pixels_back(output)
        cancelled, self._cancelled = self._cancelled, []
        for req_id in output.preempted_req_ids or ():
            tracked = self._requests.get(req_id)
            if self._captures is not None and tracked is not None and tracked.capturing:
                self._captures.give_up(tracked)
                cancelled.append(req_id)
        plan = StepPlan(reuse=self._step_reuse, cancelled=cancelled, finished=self._finished)
        self._step_reuse, self._finished = [], []
        self._budget.end_step()
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
        scheduled = map(self._requests.get, output.num_scheduled_tokens)
        plan.prefilling = tuple(
            tracked.request.request_id
            for tracked in scheduled
            if tracked is not None and tracked.is_prefilling
        )
        if self._staging is not None:
            plan.lookups, plan.loads = self._staging.take_plans()
        self._segments.settle()
        plan.dropped_segments = self._segments.take_evicted()
        plan.encoder = self._encoder_rows.plan(output, fetches=bool(plan.lookups or plan.loads))
        return plan

    def _give_pixels_back(self, output: SchedulerOutput) -> None:
        """Let the workers have all of an image, although its tokens count as computed.

        vLLM leaves out its pixels then (`strip_covered_mm_data`), for good: a request that is
        preempted and finds neither blocks nor a segment when it goes on would end the engine.
        """
        for new in output.scheduled_new_reqs:
            tracked = self._requests.get(new.req_id)
            if tracked is not None:
                new.mm_features = tracked.request.mm_features

    def _look_at_events(self) -> None:
        """See to what vLLM is about to publish."""
        if self._events is not None:
            assert self._kv_cache_manager is not None
            if self._fences.silence(self._kv_cache_manager.block_pool):
                self._events.repeat()

    def take_events(self) -> list[KVCacheEvent]:
        """Which segments have come and gone, if somebody may have subscribed to that."""
        return [] if self._events is None else self._events.take()

    def update_from_report(self, report: StepReport) -> None:
        """Take in what the workers stored, lost and measured."""
        self._look_at_events()
        report.settle()
        if self._staging is not None:
            self._staging.update(report.found, report.loaded)
        for key, ranks in report.stored.items():
            self._segments.stored(key, ranks)
        self.statistics.take_report(report)
        for key in report.lost:
            self._segments.lost(key)
        self._encoder_rows.update_from_report(report.encoder)
        self._learn(report)
        for req_id, figures in report.figures.items():
            tracked = self._tracked(req_id)
            if tracked is not None:
                assert tracked.claimed is not None
                tracked.claimed = loaded = tracked.claimed.loaded(figures)
                waited = tracked.seconds.get("staging", 0.0)
                self.statistics.loaded(loaded, {"staging": waited, **report.seconds})
        for req_id in report.prefilling:
            tracked = self._tracked(req_id)
            if tracked is not None:
                tracked.took(report.seconds, has_claim=req_id in report.figures)
        for req_id, (tracked, params) in self._finishing.items():
            params.update(tracked.report())
            if tracked.request.num_output_tokens:
                self.statistics.answered(tracked.seconds, tracked.tier)
            logger.debug("VLCache: request %s: %s", req_id, params)
        self._finishing.clear()

    def _tracked(self, req_id: str) -> TrackedRequest | None:
        """A request that has not ended before the step whose report comes in."""
        ended, _ = self._finishing.get(req_id, (None, None))
        return ended or self._requests.get(req_id)

    def _learn(self, report: StepReport) -> None:
        """What a claim costs, where a step had one alone."""
        load, prefill = report.seconds.get("load"), report.seconds.get("sparse_prefill")
        if len(report.figures) != 1 or load is None or prefill is None:
            return
        [figures] = report.figures.values()
        if figures.fallback is None:
            self._break_even.learn(
                reused=figures.reused_tokens,
                computed=figures.computed_tokens,
                seconds=load + prefill,
                tokens_per_second=self.statistics.prefill_speed,
            )

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """Forget the request; its figures go back to the client."""
        self._live.pop(request.request_id, None)
        tracked = self._requests.pop(request.request_id, None)
        self._fences.forget(request.request_id)
        if self._staging is not None:
            self._staging.forget(request.request_id)
        if tracked is None:
            return None
        if tracked.staged is not None and tracked.staged.held_back is not None:
            self.statistics.happened(f"refused.{tracked.staged.held_back}")
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
        """Forget everything: what is stored, being stored and being fetched."""
        if self._canonical is not None:
            self._canonical.clear()
        if self._staging is not None:
            self._staging.reset()
        for req_id, tracked in self._requests.items():
            if self._captures is not None and tracked.capturing:
                self._captures.give_up(tracked)
                self._cancelled.append(req_id)
            if tracked.request.num_computed_tokens:
                # Its KV so far, which all that follows attends to, may be of other weights.
                tracked.options = RequestOptions(enabled=False)
        self._segments.clear()
        self._encoder_rows.reset()

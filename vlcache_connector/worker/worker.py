"""The worker side: carries out what the scheduler side planned, on one rank.

vLLM seams: the worker-side methods of `KVConnectorBase_V1`
(`vllm/distributed/kv_transfer/kv_connector/v1/base.py`), called by the model runners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from ..attention.hook import KVWriteHook, observe_kv_writes
from ..attention.metadata import MetadataFactory, slots_of
from ..protocol import (
    CanonicalPlan,
    CapturePlan,
    Found,
    Item,
    Loaded,
    PrefillFigures,
    RequestContext,
    ReusePlan,
    StepPlan,
    StepReport,
    WorkerState,
)
from ..storage.header import SegmentId
from ..storage.segment import KVWriter
from ..support import KVShape, UnsupportedError
from .capture import SegmentCapture
from .encoder import EncoderRows
from .fused_write import choose_write
from .loader import LoadedPlan, Loader
from .model import SparsePrefillModel
from .pace import Pace
from .ranks import agreed, all_ranks_have, in_lockstep
from .sparse_prefill import RequestInputs, SparsePrefill
from .stopwatch import Instant, Stopwatch, clock_of
from .storage import Storage

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(__name__)

_IDLE_SECONDS = 0.005
"""How long a step without work waits for a fetch, so that vLLM does not spin."""


class WorkerSide:
    """Captures segments, loads them and runs the sparse prefill on one rank.

    Whatever fails costs the reuse or the segment at hand, is counted and logged, and no more: not
    another request of the step, and not the step.

    Args:
        model: the loaded model.
        shape: of one token's KV on this rank.
        storage: this rank's segments.
        encoder_rows: those that are encoder rows.
        rank: this one, of the tensor-parallel ones.
        pace: told how long vLLM's own forwards take.
        device: of the model.

    Raises:
        UnsupportedError: the attention backend in use is not one that is wrapped.
    """

    def __init__(
        self,
        model: SparsePrefillModel,
        shape: KVShape,
        storage: Storage,
        encoder_rows: EncoderRows,
        *,
        rank: int,
        pace: Pace,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        device: torch.device,
    ) -> None:
        for layer in model.layers.values():
            if not isinstance(layer.impl, KVWriteHook):
                raise UnsupportedError(
                    f"attention backend {layer.get_attn_backend().get_name()} is not wrapped by "
                    "VLCache; choose --attention-backend FLASH_ATTN, FLASHINFER or TRITON_ATTN"
                )
        self._model = model
        self._shape = shape
        self._storage = storage
        self._encoder_rows = encoder_rows
        self._rank = rank
        self._pace = pace
        self._device = device
        write = choose_write(model.layers.values(), model.rotary, shape.dtype, device)
        self._loader = Loader(storage, encoder_rows, model, shape, device, write, self._inputs_of)
        self._capture = SegmentCapture(
            model.layer_names, shape, device, self._open_segment, storage.side
        )
        self._layer_index = {name: index for index, name in enumerate(model.layer_names)}
        self._prefill = SparsePrefill(
            model,
            MetadataFactory(vllm_config, kv_cache_config, model.layers, device),
            self._capture,
            capturing=self._capturing,
            max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            block_size=shape.block_size,
        )
        self._contexts: dict[str, RequestContext] = {}
        """Of requests whose positions nobody has asked for yet."""
        self._requests: dict[str, RequestInputs] = {}
        self._completed: list[tuple[str, int, str]] = []
        """(request, item, content key) of captures that end with this step."""
        self._report = StepReport()
        self._invalid_blocks: set[int] = set()
        self._stopwatch = Stopwatch(clock_of(device))
        self._forward_began: Instant | None = None
        """When vLLM's own forward did, while it runs."""
        self._prefilling: tuple[str, ...] = ()
        observe_kv_writes(self)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """What raises in here ends in here."""
        try:
            yield
        except Exception:
            self._report.failed(what)
            logger.exception("VLCache: %s failed", what)

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """The same, and the segments under capture are not stored."""
        try:
            yield
        except Exception:
            self._report.failed("capture")
            logger.exception("VLCache: capture failed; the segments are not stored")
            with suppress(Exception):
                self._capture.end_pass()

    def free_device_memory(self) -> None:
        """Forget the copies of segments in device memory; all of them are in host memory, too."""
        with self._guarded("device"):
            self._storage.free_device_memory()

    def begin_step(self, plan: StepPlan) -> None:
        """Before anything runs: forget what is over and take in what is new."""
        self._prefilling = plan.prefilling
        with self._guarded("pace"):
            self._stopwatch.restart()
        self._encoder_rows.begin_step(plan.encoder)
        for key in plan.dropped_segments:
            with self._guarded("drop"):
                self._storage.remove(SegmentId(key, "kv"))
        with self._guarded("settle"):
            for key, kind in self._storage.settle():
                if kind == "encoder":
                    self._encoder_rows.settled(key, is_stored=False)
                else:
                    self._report.lost.add(key)
        self._begin_fetches(plan)
        for req_id in (*plan.cancelled, *plan.finished):
            with self._capturing():
                self._capture.cancel(req_id)
        for req_id in plan.finished:
            self._contexts.pop(req_id, None)
            self._requests.pop(req_id, None)
        for context in plan.contexts:
            self._contexts[context.req_id] = context

    def _begin_fetches(self, plan: StepPlan) -> None:
        """What can't be begun ends at once: requests wait for it."""
        try:
            if plan.lookups:
                self._storage.look_up(plan.lookups)
        except Exception:
            self._report.failed("fetch")
            logger.exception("VLCache: a lookup failed")
            for lookup in plan.lookups:
                self._report.found[lookup.keys[0]] = Found(1, {}, "failed")
        for load in plan.loads:
            with self._guarded("fetch"):
                self._storage.load(load)
                continue
            self._report.loaded[load.key] = Loaded(1, is_here=False)

    def _inputs_of(self, req_id: str) -> RequestInputs:
        inputs = self._requests.get(req_id)
        if inputs is None:
            context = self._contexts[req_id]
            inputs = self._requests[req_id] = RequestInputs(
                token_ids=context.prompt_token_ids,
                positions=self._model.positions(
                    context.prompt_token_ids, context.position_features
                ),
                items={item.index: item for item in context.items},
            )
            del self._contexts[req_id]
        return inputs

    def expect_captures(self, captures: Sequence[CapturePlan]) -> None:
        """vLLM's own forward comes next: arm its captures."""
        with self._guarded("pace"):
            self._forward_began = self._stopwatch.start("forward")
        for capture in captures:
            with self._capturing():
                self._expect_capture(capture)
                continue
            self._report.lost.add(capture.key)

    def _expect_capture(self, capture: CapturePlan) -> None:
        inputs = self._inputs_of(capture.req_id)
        item = inputs.items[capture.item]
        slots = slots_of(capture.span, capture.block_ids, self._shape.block_size)
        self._capture.expect(
            capture.req_id,
            capture.item,
            capture.key,
            inputs.positions_of(item),
            offset=capture.span.start - item.span.start,
            slots=torch.from_numpy(slots),
        )
        if capture.span.end == item.span.end:
            self._completed.append((capture.req_id, capture.item, capture.key))

    def _open_segment(self, key: str, positions: torch.Tensor) -> KVWriter | None:
        try:
            return self._storage.open_kv(key, positions)
        except Exception:
            logger.exception("VLCache: no room could be made for segment %s", key[:16])
            return None

    def load(self, plans: Sequence[ReusePlan]) -> None:
        """Fill the KV of all claims, before vLLM's own forward.

        What can't be filled as planned is computed instead, one request at a time, so that a
        request pays for nobody else. Only when that is impossible, too, its claim's blocks are
        reported as failed to load.
        """
        with self._guarded("pace"):
            self._stopwatch.start("load")
        loaded = [LoadedPlan(plan) for plan in plans]
        try:
            with in_lockstep():
                self._fetch(loaded)
                with self._guarded("pace"):
                    self._stopwatch.start("sparse_prefill")
                if self._fill(loaded):
                    return
                for entry in loaded:
                    if len(loaded) > 1 and self._fill([entry]):
                        continue
                    entry.compute_everything("error")
                    if not self._fill([entry]):
                        self._give_up(entry.plan)
        finally:
            with self._guarded("release"):
                self._loader.finish(loaded)

    def _fetch(self, loaded: Sequence[LoadedPlan]) -> None:
        """Open what is reused; items without a segment on every rank are to be computed."""
        for entry in loaded:
            with self._guarded("load"):
                self._loader.fetch(entry)
                continue
            entry.fallback = "error"
        wanted = [(entry, reuse) for entry in loaded for reuse in entry.plan.reused]
        usable = all_ranks_have([reuse.item in entry.placed for entry, reuse in wanted])
        for ok, (entry, reuse) in zip(usable, wanted, strict=True):
            if ok:
                continue
            logger.warning(
                "VLCache: segment %s of request %s is missing or of another shape; recomputing",
                reuse.donor[:16],
                entry.plan.req_id,
            )
            if reuse.item not in entry.placed and entry.fallback != "error":
                self._report.lost.add(reuse.donor)
            entry.compute_instead(reuse.item, "segment lost")
        with self._guarded("load"):
            self._loader.stage(loaded)

    def _fill(self, loaded: Sequence[LoadedPlan]) -> bool:
        """Run the sparse prefill of some plans; whether all went well, on all ranks."""
        try:
            computed = self._compute(loaded)
        except Exception:
            self._report.failed("sparse prefill")
            logger.exception("VLCache: the sparse prefill of %d request(s) failed", len(loaded))
            for entry in loaded:
                with self._capturing():
                    self._capture.cancel(entry.plan.req_id)
            return False
        for entry, by_layer in zip(loaded, computed, strict=True):
            plan = entry.plan
            self._report.figures[plan.req_id] = PrefillFigures(
                reused={reuse.item: reuse.num_reused for reuse in plan.reused},
                recomputed_tokens=plan.num_recomputed,
                computed_by_layer=by_layer,
                on_device=frozenset(entry.on_device),
                fallback=entry.fallback,
            )
            self._completed += [(plan.req_id, item, key) for item, key in plan.captures.items()]
        return True

    def _compute(self, loaded: Sequence[LoadedPlan]) -> list[tuple[int, ...]]:
        """Run the sparse prefill of some plans.

        Returns:
            Per plan the tokens that each layer computed.

        Raises:
            Exception: something failed, on all ranks; they may go on with other plans.
        """
        with in_lockstep():
            with agreed():
                needed = [
                    (entry, item) for entry in loaded for item in self._loader.open_rows(entry)
                ]
            here = [item.index in entry.encoder_rows for entry, item in needed]
            everywhere = all_ranks_have(here)
            self._encode([pair for pair, ok in zip(needed, everywhere, strict=True) if not ok])
            with agreed():
                jobs = [self._loader.job(entry) for entry in loaded]
                injection = self._loader.injection(jobs, self._stopwatch)
            return self._prefill.run(jobs, injection)

    def _encode(self, missing: Sequence[tuple[LoadedPlan, Item]]) -> None:
        """Run the vision encoder for items whose rows are not stored on every rank."""
        with agreed():
            inputs = [entry.plan.encoder_inputs[item.index] for entry, item in missing]
        known: dict[str, torch.Tensor] = {}
        for (entry, item), (modality, data) in zip(missing, inputs, strict=True):
            key = item.encoder_key
            if key not in known:
                known[key] = self._model.encode(modality, data)
                with self._guarded("store"):
                    self._encoder_rows.put(key, known[key])
            entry.encoder_rows[item.index] = [known[key]]

    def compute_canonical(self, plans: Sequence[CanonicalPlan]) -> None:
        """Compute and store new images in a clean context, after vLLM's own forward.

        A failure costs the segment, nothing else.
        """
        for canonical in plans:
            context, plan = canonical.context, canonical.plan
            self._contexts[context.req_id] = context
            loaded = [LoadedPlan(plan)]
            try:
                with self._guarded("canonical"):
                    self._compute(loaded)
                    [(item, key)] = plan.captures.items()
                    self._store_captured(context.req_id, item, key)
                    continue
                self._report.lost.update(plan.captures.values())
            finally:
                with self._guarded("release"):
                    self._loader.finish(loaded)
                with self._capturing():
                    self._capture.cancel(context.req_id)
                self._contexts.pop(context.req_id, None)
                self._requests.pop(context.req_id, None)

    def on_kv_write(
        self, layer_name: str, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Capture what was expected; see `attention.hook.KVWriteObserver`."""
        index = self._layer_index.get(layer_name)
        if index is not None:
            self._prefill.on_kv_write(index, key)
        if self._capture.is_armed:
            with self._capturing():
                self._capture.on_kv_write(layer_name, key, value, slots)

    def _give_up(self, plan: ReusePlan) -> None:
        first = plan.claim.start // self._shape.block_size
        self._invalid_blocks.update(plan.block_ids[first:])
        self._report.lost.update(plan.captures.values())
        self._report.figures[plan.req_id] = PrefillFigures(fallback="failed")

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Called in each attention layer: write this layer's reused KV."""
        index = self._layer_index.get(layer_name)
        if index is not None:
            self._prefill.before_layer(index, self._model.layers[layer_name])

    def end_forward(self, num_tokens: int) -> None:
        """vLLM's own forward is over, or queued on the device.

        Args:
            num_tokens: that it computed.
        """
        began, self._forward_began = self._forward_began, None
        with self._guarded("pace"):
            if began is not None:
                self._pace.add(num_tokens, began, self._stopwatch.start(None))

    def end_step(self, num_tokens: int) -> None:
        """After the step's forwards: store the segments that are complete.

        Args:
            num_tokens: tokens that vLLM's own forward computed.
        """
        self.end_forward(num_tokens)
        with self._capturing():
            self._capture.end_pass()
        completed, self._completed = self._completed, []
        for req_id, item, key in completed:
            self._store_captured(req_id, item, key)

    def _store_captured(self, req_id: str, item: int, key: str) -> None:
        try:
            captured = self._capture.finish(req_id, item)
            stored = captured is not None and self._storage.keep_kv(captured.writer, captured.valid)
        except Exception:
            logger.exception("VLCache: segment of request %s could not be stored", req_id)
            stored = False
        if stored:
            self._report.stored[key] = 1
        else:
            self._report.failed("store")
            self._report.lost.add(key)

    def take_report(self, *, is_idle: bool) -> StepReport | None:
        """What this step stored, lost and measured.

        Args:
            is_idle: nothing was computed; all requests wait for something.
        """
        with self._guarded("report"):
            waits = _IDLE_SECONDS if is_idle else 0.0
            found, loaded = self._storage.take_answers(waits)
            self._report.found |= found
            self._report.loaded |= loaded
            self._report.events |= self._storage.take_events()
        with self._guarded("report"):
            self._report.encoder = self._encoder_rows.take_report()
        with self._guarded("report"):
            # With speculative decoding, model runner V1 asks before it says that the forward ended.
            self._report.laps = self._stopwatch.laps
            self._report.prefilling = self._prefilling
        report, self._report = self._report, StepReport()
        if report.is_empty():
            return None
        with self._guarded("report"):
            state = WorkerState(self._pace.tokens_per_second, self._storage.tier_states())
            report.states[self._rank] = state
        return report

    def take_invalid_blocks(self) -> set[int]:
        """KV blocks of claims that could not be filled."""
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def close(self) -> None:
        """Stop observing KV writes."""
        observe_kv_writes(None)

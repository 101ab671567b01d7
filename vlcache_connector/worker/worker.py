"""The worker side: carries out what the scheduler side planned, on one rank.

vLLM seams: the worker-side methods of `KVConnectorBase_V1`
(`vllm/distributed/kv_transfer/kv_connector/v1/base.py`), called by the model runners.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from ..attention.hook import KVWriteHook, observe_kv_writes
from ..attention.metadata import MetadataFactory, slots_of
from ..protocol import (
    CanonicalPlan,
    CapturePlan,
    PrefillFigures,
    RequestContext,
    ReusePlan,
    StepPlan,
    StepReport,
    WorkerState,
)
from ..store import KVWriter, SegmentId
from ..support import KVShape, UnsupportedError
from .capture import SegmentCapture
from .encoder import EncoderRows
from .fused_write import choose_write
from .injection import Injection
from .loader import LoadedPlan, Loader
from .model import SparsePrefillModel
from .pace import Pace
from .sparse_prefill import RequestInputs, SparsePrefill
from .storage import Storage

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(__name__)

_IDLE_SECONDS = 0.005
"""How long a step without work waits for a fetch, so that vLLM does not spin."""


class WorkerSide:
    """Captures segments, loads them and runs the sparse prefill on one rank.

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
        self._loader = Loader(storage, encoder_rows, model, shape, device, write)
        self._capture = SegmentCapture(
            model.layer_names, shape, device, self._open_segment, storage.side
        )
        self._layer_index = {name: index for index, name in enumerate(model.layer_names)}
        self._prefill = SparsePrefill(
            model,
            MetadataFactory(vllm_config, kv_cache_config, model.layers, device),
            self._capture,
            max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            block_size=shape.block_size,
        )
        self._requests: dict[str, RequestInputs] = {}
        self._injection: Injection | None = None
        self._completed: list[tuple[str, int, str]] = []
        """(request, item, content key) of captures that end with this step."""
        self._report = StepReport()
        self._invalid_blocks: set[int] = set()
        observe_kv_writes(self)

    def begin_step(self, plan: StepPlan) -> None:
        """Before anything runs: forget what is over and take in what is new."""
        self._encoder_rows.begin_step(plan.encoder)
        for key in plan.dropped_segments:
            self._storage.remove(SegmentId(key, "kv"))
        for admission in self._storage.settle(plan.admitted, plan.unwanted):
            key, kind = admission.id
            if kind == "encoder":
                self._encoder_rows.settled(key, is_stored=admission.is_stored)
            elif not admission.is_stored:
                self._report.lost.add(key)
        for fetch in plan.fetches:
            self._storage.fetch(fetch)
        for req_id in (*plan.cancelled, *plan.finished):
            self._capture.cancel(req_id)
        for req_id in plan.finished:
            self._requests.pop(req_id, None)
        for context in plan.contexts:
            try:
                self._requests[context.req_id] = self._inputs_of(context)
            except Exception:
                self._report.failed("positions")
                logger.exception("VLCache: no positions for request %s", context.req_id)

    def _inputs_of(self, context: RequestContext) -> RequestInputs:
        return RequestInputs(
            token_ids=torch.tensor(context.prompt_token_ids, dtype=torch.int64),
            positions=self._model.positions(context.prompt_token_ids, context.position_features),
            items={item.index: item for item in context.items},
        )

    def expect_captures(self, captures: Sequence[CapturePlan]) -> None:
        """vLLM's own forward comes next: arm its captures."""
        self._pace.begin()
        for capture in captures:
            if capture.req_id not in self._requests:
                self._report.lost.add(capture.key)
                continue
            inputs = self._requests[capture.req_id]
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

        Whatever fails here ends in tokens that are computed instead of reused; only when that is
        impossible too, the claims' blocks are reported as failed to load.
        """
        loaded: list[LoadedPlan] = []
        try:
            start = time.perf_counter()
            loaded = self._loader.fetch(plans, self._requests, self._report)
            fetch_seconds = time.perf_counter() - start
            try:
                self._fill(loaded, fetch_seconds)
            except Exception:
                self._report.failed("sparse prefill")
                logger.exception("VLCache: the sparse prefill failed; again without reuse")
                for entry in loaded:
                    entry.compute_everything("error")
                self._fill(loaded, fetch_seconds)
        except Exception:
            self._report.failed("load")
            logger.exception("VLCache: nothing could be computed; the claimed blocks are invalid")
            for plan in plans:
                self._give_up(plan)
        finally:
            self._injection = None
            self._loader.finish(loaded)

    def _fill(self, loaded: Sequence[LoadedPlan], fetch_seconds: float) -> None:
        filled, jobs = [], []
        for entry in loaded:
            job = self._loader.job(entry)
            if job is None:
                self._give_up(entry.plan)
            else:
                filled.append(entry)
                jobs.append(job)
        start = time.perf_counter()
        injection = self._injection = self._loader.injection(filled)
        computed = self._prefill.run(jobs, injection)
        # What no forward's layers have asked for.
        for name, layer in self._model.layers.items():
            injection.write_layer(self._layer_index[name], layer)
        self._injection = None
        compute_seconds = time.perf_counter() - start - injection.seconds
        for entry, by_layer in zip(filled, computed, strict=True):
            plan = entry.plan
            self._report.figures[plan.req_id] = PrefillFigures(
                reused={reuse.item: reuse.num_reused for reuse in plan.reused},
                recomputed_tokens=plan.num_recomputed,
                computed_by_layer=by_layer,
                load_seconds=fetch_seconds + injection.seconds,
                sparse_prefill_seconds=compute_seconds,
                on_device=frozenset(entry.on_device),
                fallback=entry.fallback,
            )
            self._completed += [(plan.req_id, item, key) for item, key in plan.captures.items()]

    def compute_canonical(self, plans: Sequence[CanonicalPlan]) -> None:
        """Compute and store new images in a clean context, after vLLM's own forward.

        A failure costs the segment, nothing else.
        """
        for canonical in plans:
            context, plan = canonical.context, canonical.plan
            try:
                inputs = {context.req_id: self._inputs_of(context)}
                [loaded] = self._loader.fetch([plan], inputs, self._report)
                try:
                    job = self._loader.job(loaded)
                    if job is None:
                        raise RuntimeError("the image's encoder rows are gone")
                    self._prefill.run([job], Injection(self._shape.num_layers))
                finally:
                    self._loader.finish([loaded])
                [(item, key)] = plan.captures.items()
                self._store_captured(context.req_id, item, key)
            except Exception:
                logger.exception("VLCache: canonical donor not computed")
                self._report.failed("canonical")
                self._report.lost.update(plan.captures.values())
            finally:
                self._capture.cancel(context.req_id)

    def on_kv_write(
        self, layer_name: str, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Capture what was expected; see `attention.hook.KVWriteObserver`."""
        if self._injection is not None:
            self._prefill.on_kv_write(self._layer_index.get(layer_name, -1), key)
        if not self._capture.is_armed:
            return
        try:
            self._capture.on_kv_write(layer_name, key, value, slots)
        except Exception:
            # vLLM's own forward is running: it must not notice.
            self._capture_failed()
            self._end_captures()

    def _end_captures(self) -> None:
        try:
            self._capture.end_pass()
        except Exception:
            self._capture_failed()

    def _capture_failed(self) -> None:
        self._report.failed("capture")
        logger.exception("VLCache: capture failed; the segments are not stored")

    def _give_up(self, plan: ReusePlan) -> None:
        first = plan.claim.start // self._shape.block_size
        self._invalid_blocks.update(plan.block_ids[first:])
        self._capture.cancel(plan.req_id)
        self._report.lost.update(plan.captures.values())
        self._report.figures[plan.req_id] = PrefillFigures(fallback="failed")

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Called in each attention layer: write this layer's reused KV."""
        index = self._layer_index.get(layer_name)
        if self._injection is not None and index is not None:
            self._injection.write_layer(index, self._model.layers[layer_name])

    def end_step(self, num_tokens: int) -> None:
        """After the step's forwards: store the segments that are complete.

        Args:
            num_tokens: tokens that vLLM's own forward computed.
        """
        self._pace.end(num_tokens)
        self._end_captures()
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
        report, self._report = self._report, StepReport()
        report.fetched = dict(self._storage.take_fetched(_IDLE_SECONDS if is_idle else 0.0))
        report.events |= self._storage.take_events()
        report.encoder = self._encoder_rows.take_report()
        if report.is_empty():
            return None
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

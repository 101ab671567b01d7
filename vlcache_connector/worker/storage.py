"""What a worker stores its segments in: host memory, device memory above, adapters below.

The scheduler side decides what host memory holds. Device memory has copies of what was used last;
the adapters get a copy of everything that is stored, and give it back on demand.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ..identity import check_identity, digest, model_fingerprint
from ..protocol import Found, Loaded, LoadPlan, LookupPlan, TierState
from ..storage.adapters import encryption_key, open_adapters, require_adapters
from ..storage.engine import Lookup, SegmentEngine
from ..storage.header import SegmentId
from ..storage.layout import SegmentLayout, Space
from ..storage.names import Namespace
from ..storage.segment import KVWriter, Segment
from ..streams import Leaving, Side, make_side
from ..support import can_store, config_of, encoder_width, kv_shape, model_dtype
from .device import DeviceSegments
from .loaded import holds_what_was_loaded
from .memory import check_memory, host_memory, taking_turns
from .ranks import all_ranks_have, own_rank

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ..storage.disk import Janitor

logger = init_logger(__name__)

_LAST_MOMENT_SECONDS = 5.0
_POLL_SECONDS = 0.0005


class Storage:
    """All tiers of one rank; used from one thread.

    Args:
        engine: host memory, and what is below it.
        num_layers: of a KV segment.
        device: copies in device memory, if any are to be kept.
        side: a stream for copies beside the model's own, if there is one.
        leaving: what is read by copies is released through it.
        janitor: of the directory of `disk_path`, if there is one.
        is_unchanged: whether the weights are those that were loaded; by its result all ranks go.
    """

    def __init__(
        self,
        engine: SegmentEngine,
        num_layers: int,
        *,
        device: DeviceSegments | None = None,
        side: Side | None = None,
        leaving: Leaving | None = None,
        janitor: Janitor | None = None,
        is_unchanged: Callable[[], bool] = lambda: True,
    ) -> None:
        self.engine = engine
        self.side = side
        self.leaving = leaving or Leaving(side, torch.device("cpu"))
        self._num_layers = num_layers
        self._device = device
        self._janitor = janitor
        self._is_unchanged = is_unchanged
        self._generation = 0

    def follow(self, generation: int) -> None:
        """The weights may have changed: below host memory is what the loaded ones made.

        Args:
            generation: of the weights, see `weights.generation`.
        """
        if generation == self._generation:
            return
        self._generation = generation
        if not self.engine.tiers:
            return
        try:
            is_same = self._is_unchanged()
        except Exception:
            logger.exception("VLCache: what the weights are now is not known")
            is_same = False
        [is_same] = all_ranks_have([is_same])
        for tier in self.engine.tiers:
            if tier.is_open != is_same:
                logger.warning(
                    "VLCache: the weights are %s: %s is %s",
                    "those that were loaded again" if is_same else "not those that were loaded",
                    tier.name,
                    "in use" if is_same else "left alone, what it holds is of those",
                )
            tier.set_open(is_same)

    def open_kv(self, key: str, positions: Tensor) -> KVWriter | None:
        """Begin to store a KV segment, see `SegmentEngine.open_kv`; `keep_kv` ends it."""
        self._forget_copy(key)
        return self.engine.open_kv(key, positions)

    def keep_kv(self, writer: KVWriter, valid: Tensor) -> bool:
        """Store a segment that was written, see `KVWriter.finish`; whether it is."""
        self._forget_copy(writer.key)
        return writer.finish(valid) > 0

    def put_encoder(self, key: str, rows: Tensor) -> bool:
        """Store encoder rows, see `SegmentEngine.put_encoder`; whether there was room."""
        return self.engine.put_encoder(key, rows) > 0

    def get(self, segment: SegmentId) -> Segment | None:
        """Open a segment in device or host memory; the caller has to release it."""
        if self._device is None or segment.kind != "kv":
            return self.engine.get(segment)
        found = self._device.get(segment.key)
        if found is None:
            found = self.engine.get(segment)
            if found is not None:
                found = self._device.promote(found, self._num_layers)
        return found

    def free_device_memory(self) -> None:
        """Forget the copies in device memory."""
        if self._device is not None:
            self._device.clear()

    def is_on_device(self, key: str) -> bool:
        """Whether `get` needs no copy from host memory."""
        return self._device is not None and key in self._device

    def remove(self, segment: SegmentId) -> None:
        """Forget a segment in device and host memory."""
        if segment.kind == "kv":
            self._forget_copy(segment.key)
        self.engine.remove(segment)

    def _forget_copy(self, key: str) -> None:
        if self._device is not None:
            self._device.remove(key)

    def look_up(self, plans: Sequence[LookupPlan]) -> None:
        """Look for segments below host memory; `take_answers` tells what there is."""
        lookups = []
        for plan in plans:
            segments = [SegmentId(key, plan.kind) for key in plan.keys]
            lookups.append(Lookup(plan.keys[0], segments, plan.num_tokens))
        self.engine.look_up(lookups)

    def load(self, plan: LoadPlan) -> None:
        """Bring a segment to host memory; `take_answers` tells how that went."""
        deadline = time.monotonic() + plan.seconds_left
        self.engine.load(SegmentId(plan.key, plan.kind), plan.num_tokens, deadline)

    def take_answers(self, wait_seconds: float) -> tuple[dict[str, Found], dict[str, Loaded]]:
        """Lookups that ended, by name, and loads that ended, by content key.

        Args:
            wait_seconds: how long to wait for one while any is on its way.
        """
        until = time.monotonic() + wait_seconds
        while True:
            found = {
                answer.name: Found(1, answer.tiers, answer.no_answer)
                for answer in self.engine.take_looked_up()
            }
            loaded = {end.id.key: Loaded(1, end.is_here) for end in self.engine.take_loaded()}
            if found or loaded or not self.engine.is_busy or time.monotonic() >= until:
                return found, loaded
            time.sleep(_POLL_SECONDS)

    def settle(self) -> list[SegmentId]:
        """Take in what has been copied by now; what of it could not be stored after all."""
        self.leaving.poll()
        return [segment for segment, is_stored in self.engine.settle() if not is_stored]

    def take_events(self) -> Counter[str]:
        """What happened in the tiers below since the last call, by kind."""
        return self.engine.take_events()

    def tier_states(self) -> dict[str, TierState]:
        """What is known of the tiers below, by name."""
        return {tier.name: tier.state() for tier in self.engine.tiers}

    def flush(self, seconds: float) -> bool:
        """Wait until the adapters have what was stored; whether they have."""
        return self.engine.flush(seconds)

    def close(self) -> None:
        """Release all memory and threads, after a last moment for what is still to be written."""
        self.leaving.close()
        self.flush(_LAST_MOMENT_SECONDS)
        if self._janitor is not None:
            self._janitor.close()
        self.engine.close()


def _segment_layout(vllm_config: VllmConfig, stored_as: str, rank: int) -> SegmentLayout:
    """How a rank's segments become objects."""
    config, shape, model = config_of(vllm_config), kv_shape(vllm_config), vllm_config.model_config
    namespace = Namespace(config.deployment, stored_as)
    return SegmentLayout(
        Space(str(namespace), rank, vllm_config.parallel_config.tensor_parallel_size),
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        kv_dtype=shape.dtype,
        positions_rows=3 if model.uses_mrope else 1,
        encoder_width=encoder_width(vllm_config),
        encoder_dtype=model_dtype(vllm_config),
    )


def _stored_as(vllm_config: VllmConfig) -> str:
    """Fingerprint of a model as it stands in names of objects: who has another encryption key never
    meets what can't be decrypted, and stores its own beside it."""
    fingerprint, key = model_fingerprint(vllm_config), encryption_key(config_of(vllm_config))
    return fingerprint if key is None else digest({"model": fingerprint, "key": key.id})


def open_storage(vllm_config: VllmConfig) -> Storage:
    """The tiers that a configuration asks for, of this worker's rank.

    Raises:
        ConfigError: there is not as much memory, or a tier can't be used.
    """
    # It imports LMCache, which has modules that vLLM's start of a worker can't look at.
    from ..storage.disk import Janitor, check_directory

    check_identity(vllm_config, is_loaded=True)
    stored_as = _stored_as(vllm_config)
    logger.info("VLCache: segments are stored as of model %s", stored_as)
    config, shape = config_of(vllm_config), kv_shape(vllm_config)
    device = torch.device(current_platform.device_type)
    rank, stores = own_rank(), can_store(vllm_config)
    if config.disk_path is not None:
        check_directory(config.disk_path, can_store=stores)
    adapters = open_adapters(config, can_store=stores)
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    budget, quota = host_memory(config, num_ranks), config.salt_quota_bytes
    side = make_side(device)
    with taking_turns():
        check_memory(config, budget, device)
        engine = SegmentEngine(
            _segment_layout(vllm_config, stored_as, rank),
            budget,
            adapters,
            side=side,
            salt_quota_bytes=None if quota is None else quota // num_ranks,
        )
    try:
        require_adapters(config, [tier.adapter for tier in engine.tiers])
    except BaseException:
        engine.close()
        raise
    janitor = None
    if config.disk_path is not None:
        janitor = Janitor(config.disk_path, config.disk_bytes, config.ttl_seconds, can_store=stores)
        # `disk_path` is the nearest; what each rank reads of it counts as used.
        nearest = engine.tiers[0].adapter
        assert nearest is not None
        nearest.register_listener(janitor)
        if rank == 0:
            janitor.start()
    leaving = Leaving(side, device)
    copies = None
    if config.device_bytes:
        copies = DeviceSegments(config.device_bytes, device, side, leaving)
    return Storage(
        engine,
        shape.num_layers,
        device=copies,
        side=side,
        leaving=leaving,
        janitor=janitor,
        is_unchanged=functools.partial(holds_what_was_loaded, vllm_config),
    )

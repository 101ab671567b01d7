"""What a worker stores its segments in: host memory, device memory above, disk and Redis below.

The scheduler side decides what host memory holds. Device memory has copies of what was used last;
disk and Redis get a copy of everything that is stored, and give it back on demand.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ..identity import check_identity, model_fingerprint
from ..protocol import Fetched, FetchPlan, TierState
from ..storage.header import SegmentId
from ..storage.segment import KVWriter, Segment
from ..store import LMCacheSegmentStore, SegmentStore
from ..streams import Leaving, Side, make_side
from ..support import config_of, kv_shape
from ..tiers import open_tiers
from .device import DeviceSegments
from .loaded import holds_what_was_loaded
from .memory import check_memory, host_memory, taking_turns
from .pace import Pace
from .ranks import all_ranks_have, own_rank
from .transfers import Admission, Transfers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class Storage:
    """All tiers of one rank; used from one thread.

    Args:
        host: segments in host memory.
        num_layers: of a KV segment.
        device: copies in device memory, if any are to be kept.
        transfers: to and from the tiers below host memory, if there are any.
        side: a stream for copies beside the model's own, if there is one.
        leaving: what is read by copies is released through it.
        is_unchanged: whether the weights are those that were loaded; by its result all ranks go.
    """

    def __init__(
        self,
        host: SegmentStore,
        num_layers: int,
        *,
        device: DeviceSegments | None = None,
        transfers: Transfers | None = None,
        side: Side | None = None,
        leaving: Leaving | None = None,
        is_unchanged: Callable[[], bool] = lambda: True,
    ) -> None:
        self.host = host
        self.side = side
        self.leaving = leaving or Leaving(side, torch.device("cpu"))
        self._failed: list[Admission] = []
        self._num_layers = num_layers
        self._device = device
        self._transfers = transfers
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
        if self._transfers is not None:
            try:
                is_same = self._is_unchanged()
            except Exception:
                logger.exception("VLCache: what the weights are now is not known")
                is_same = False
            [is_same] = all_ranks_have([is_same])
            self._transfers.set_open(is_same)

    def open_kv(self, key: str, positions: Tensor) -> KVWriter | None:
        """Begin to store a KV segment, see `SegmentStore.open_kv`; `keep_kv` ends it."""
        self._forget_copy(key)
        return self.host.open_kv(key, positions)

    def keep_kv(self, writer: KVWriter, valid: Tensor) -> bool:
        """Store a segment that was written, see `KVWriter.finish`; whether it is."""
        return self._put(writer.key, writer.finish(valid))

    def put_encoder(self, key: str, rows: Tensor) -> bool:
        """Store encoder rows, see `SegmentStore.put_encoder`; whether there was room."""
        return self._put(key, self.host.put_encoder(key, rows))

    def _put(self, key: str, num_bytes: int) -> bool:
        self._forget_copy(key)
        self._take_in()
        return num_bytes > 0

    def _take_in(self, *, waits: bool = False) -> None:
        """Hand on what host memory has complete by now."""
        for segment, is_stored in self.host.settle(waits=waits):
            if not is_stored:
                self._failed.append(Admission(segment, is_stored=False))
            elif self._transfers is not None:
                self._transfers.write(segment)

    def get(self, segment: SegmentId) -> Segment | None:
        """Open a segment in device or host memory; the caller has to release it."""
        if self._device is None or segment.kind != "kv":
            return self.host.get(segment)
        found = self._device.get(segment.key)
        if found is None:
            found = self.host.get(segment)
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
        self.host.remove(segment)

    def _forget_copy(self, key: str) -> None:
        if self._device is not None:
            self._device.remove(key)

    def fetch(self, plan: FetchPlan) -> None:
        """Look for a segment below host memory; `take_fetched` tells how that went."""
        if self._transfers is not None:
            self._transfers.fetch(plan)

    def take_fetched(self, wait_seconds: float) -> list[tuple[str, Fetched]]:
        """Fetches that ended, by name; waits for one as long as that, if any is running."""
        return [] if self._transfers is None else self._transfers.take_ended(wait_seconds)

    def settle(self, admitted: Sequence[str], unwanted: Sequence[str]) -> list[Admission]:
        """Move fetched segments to host memory, or throw them away.

        Returns:
            What became of those that were admitted, and what is not stored after all.
        """
        self.leaving.poll()
        self._take_in()
        failed, self._failed = self._failed, []
        if self._transfers is None:
            return failed
        self._transfers.release_written()
        for name in unwanted:
            self._transfers.discard(name)
        admissions = (self._transfers.admit(name) for name in admitted)
        return [*failed, *(admission for admission in admissions if admission is not None)]

    def take_events(self) -> Counter[str]:
        """What happened in the tiers below since the last call, by kind."""
        return Counter() if self._transfers is None else self._transfers.take_events()

    def tier_states(self) -> dict[str, TierState]:
        """What is known of the tiers below, by name."""
        return {} if self._transfers is None else self._transfers.tier_states()

    def flush(self, seconds: float) -> bool:
        """Wait until disk and Redis have what was stored; whether they have."""
        self._take_in(waits=True)
        return self._transfers is None or self._transfers.flush(seconds)

    def close(self) -> None:
        """Release all memory and threads."""
        self.leaving.close()
        if self._transfers is not None:
            self._take_in(waits=True)
            self._transfers.close()
        self.host.close()


def open_storage(vllm_config: VllmConfig, pace: Pace) -> Storage:
    """The tiers that a configuration asks for, of this worker's rank.

    Args:
        pace: of this worker, which loads are weighed against.

    Raises:
        ConfigError: there is not as much memory, or a tier can't be used.
    """
    check_identity(vllm_config, is_loaded=True)
    config, shape = config_of(vllm_config), kv_shape(vllm_config)
    rank = own_rank()
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    model, fingerprint = vllm_config.model_config.model, model_fingerprint(vllm_config)
    device = torch.device(current_platform.device_type)
    tiers = open_tiers(config, fingerprint, model)
    budget = host_memory(config, num_ranks)
    side = make_side(device)
    with taking_turns():
        check_memory(config, budget, device)
        host = LMCacheSegmentStore(
            model_name=model,
            fingerprint=fingerprint,
            rank=rank,
            world_size=num_ranks,
            budget_bytes=budget,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            kv_dtype=shape.dtype,
            # This process wrote or checked the memory itself: a checksum over each read would only
            # cost time.
            verify=False,
            side=side,
        )
    transfers = None
    if tiers:
        transfers = Transfers(
            host,
            tiers,
            rank=rank,
            num_ranks=num_ranks,
            read_seconds=config.fetch_deadline_seconds,
            queue_bytes=config.write_queue_bytes,
            pace=pace if config.break_even else None,
        )
    leaving = Leaving(side, device)
    copies = None
    if config.device_bytes:
        copies = DeviceSegments(config.device_bytes, device, side, leaving)
    return Storage(
        host,
        shape.num_layers,
        device=copies,
        transfers=transfers,
        side=side,
        leaving=leaving,
        is_unchanged=functools.partial(holds_what_was_loaded, vllm_config),
    )

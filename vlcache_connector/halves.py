"""Where the KV half and the encoder half of an engine meet.

vLLM makes the two connectors apart from each other, in the scheduler's process and in each
worker's, and hands both nothing but the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from vllm.config import VllmConfig

T = TypeVar("T")


class OnePerEngine(Generic[T]):
    """What both halves of an engine use in a process.

    Args:
        make: called for the half that asks first.
    """

    def __init__(self, make: Callable[[VllmConfig], T]) -> None:
        self._make = make
        self._made: dict[str, T] = {}

    def get(self, vllm_config: VllmConfig) -> T:
        """The engine's own."""
        name = _engine_id(vllm_config)
        if name not in self._made:
            self._made[name] = self._make(vllm_config)
        return self._made[name]

    def take(self, vllm_config: VllmConfig) -> T | None:
        """Give up the engine's own: it is the caller's to close; None for the half that is late."""
        return self._made.pop(_engine_id(vllm_config), None)


def _engine_id(vllm_config: VllmConfig) -> str:
    transfer = vllm_config.kv_transfer_config or vllm_config.ec_transfer_config
    assert transfer is not None
    assert transfer.engine_id is not None
    return transfer.engine_id

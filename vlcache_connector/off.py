"""Stands in for the connectors where vLLM has changed under them: nothing is stored or reused.

vLLM seams: `KVConnectorBase_V1`, `SupportsHMA`, `ECConnectorBase`, as in the connectors. Arguments
are taken as they come, for they may be what has changed.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger

from . import seams

logger = init_logger(__name__)


@functools.cache
def _log_once() -> None:
    logger.error("VLCache is off, vLLM runs as without it: %s", seams.explain(seams.changes()))


class VLCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """Claims nothing, keeps nothing."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            _log_once()

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is a miss, never an error."""
        return False

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins; its plan is empty, or the scheduler side would be one that is on."""
        assert type(connector_metadata) is KVConnectorMetadata
        super().bind_connector_metadata(connector_metadata)

    def start_load_kv(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def wait_for_layer_load(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def save_kv_layer(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def wait_for_save(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def get_num_new_matched_tokens(self, *_: Any, **__: Any) -> tuple[int, bool]:
        """No tokens."""
        return 0, False

    def update_state_after_alloc(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def build_connector_meta(self, *_: Any, **__: Any) -> KVConnectorMetadata:
        """An empty plan."""
        return KVConnectorMetadata()

    def request_finished_all_groups(self, *_: Any, **__: Any) -> tuple[bool, None]:
        """The blocks are free at once."""
        return False, None


class VLCacheEncoderConnector(ECConnectorBase):
    """Has nothing, keeps nothing."""

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        if role == ECConnectorRole.SCHEDULER:
            _log_once()

    def start_load_caches(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def save_caches(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def has_cache_item(self, *_: Any, **__: Any) -> bool:
        """Nowhere."""
        return False

    def update_state_after_alloc(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def build_connector_meta(self, *_: Any, **__: Any) -> ECConnectorMetadata:
        """An empty plan."""
        return ECConnectorMetadata()

"""What is put right before vLLM starts, in its frontend.

Configurations without VLCache are left as they are.

vLLM seams, patched:

- `VllmConfig._resolve_mm_embedding_inputs` (`vllm/config/vllm.py`), for two things. The KV half's
  flag turns on the encoder half as well: model runner V2 builds encoder connectors before KV
  connectors exist. And the frontend stays as strict as without VLCache: vLLM takes any KV or
  encoder consumer for the decoding half of a split deployment, whose clients send embeddings
  instead of images and may leave out the tensor. VLCache serves images: with that door open, one
  request without its tensor would end the engine. `KVTransferConfig.is_kv_consumer`
  (`vllm/config/kv_transfer.py`), which this and vLLM's scheduler go by, says no for VLCache.
- `VllmConfig._post_init_kv_transfer_config`, the last step before `--kv-offloading-size` replaces
  the connector: options that can't be served together are refused here.
- `VllmConfig._verify_kv_transfer_compat`, which refuses PyTorch's `expandable_segments` beside any
  connector, because many register the KV cache's memory with a network card. VLCache does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.config import ECTransferConfig, KVTransferConfig, VllmConfig

from .content import identify_items
from .identity import check_identity
from .media import skip_decoding_known_images
from .refusals import check_options
from .support import (
    ENCODER_CONNECTOR,
    KV_CONNECTOR,
    config_of,
    inert_reason,
    own_transfer,
    uses_vlcache,
)


def prepare_configurations() -> None:
    """Patch `VllmConfig`, once per process: see the first seam."""
    _before(VllmConfig, "_resolve_mm_embedding_inputs", _resolve_mm_embedding_inputs)
    _before(VllmConfig, "_post_init_kv_transfer_config", _post_init_kv_transfer_config)
    _before(VllmConfig, "_verify_kv_transfer_compat", _verify_kv_transfer_compat)


def _before(owner: type, name: str, ours: Callable[[Any, Callable[[Any], None]], None]) -> None:
    """Let `ours` stand in front of a method, which it is given."""
    original = getattr(owner, name)
    if hasattr(original, "_vlcache_original"):
        return

    @functools.wraps(original)
    def method(self: Any) -> None:
        ours(self, original)

    method._vlcache_original = original  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _resolve_mm_embedding_inputs(
    config: VllmConfig, original: Callable[[VllmConfig], None]
) -> None:
    if config.model_config is None or not uses_vlcache(config):
        original(config)
        return
    identify_items()
    if inert_reason(config) is None and config_of(config).lazy_decoding:
        skip_decoding_known_images()
    kv, ec = config.kv_transfer_config, config.ec_transfer_config
    # vLLM takes our halves for what they are not: it decides as if they were not there.
    if kv is not None and kv.kv_connector == KV_CONNECTOR:
        config.kv_transfer_config = None
    if ec is not None and ec.ec_connector == ENCODER_CONNECTOR:
        config.ec_transfer_config = None
    try:
        original(config)
    finally:
        config.kv_transfer_config, config.ec_transfer_config = kv, ec
    if kv is not None and kv.kv_connector == KV_CONNECTOR:
        config.kv_transfer_config = OrderedTransfer(**vars(kv))
    own = own_transfer(config)
    if own is not None and ec is None and inert_reason(config) is None:
        config.ec_transfer_config = ECTransferConfig(
            ec_connector=ENCODER_CONNECTOR,
            # For a producer vLLM encodes an image of the largest size at every start, to learn a
            # width that this connector does not use; whether rows are stored is up to `kv_role`.
            ec_role="ec_consumer",
            engine_id=own.engine_id,
        )


def _post_init_kv_transfer_config(
    config: VllmConfig, original: Callable[[VllmConfig], None]
) -> None:
    # Everything else is resolved by now, and our connector is not replaced yet.
    if config.model_config is not None and uses_vlcache(config) and inert_reason(config) is None:
        if own_transfer(config) is not None:
            check_options(config)
        check_identity(config, is_loaded=False)
    original(config)


def _verify_kv_transfer_compat(config: VllmConfig, original: Callable[[VllmConfig], None]) -> None:
    kv = config.kv_transfer_config
    if kv is None or kv.kv_connector != KV_CONNECTOR:
        original(config)


class OrderedTransfer(KVTransferConfig):
    """A KV connector whose loads run on the model's own stream, in order with its forwards.

    To vLLM a "consumer" is one that may fill a block while an earlier step still writes to it:
    its scheduler then keeps the blocks of ended requests until the steps in flight are over.
    """

    @property
    def is_kv_consumer(self) -> bool:
        """Not in this sense; see `support.may_reuse`."""
        return False

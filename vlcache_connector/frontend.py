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
- `ProcessorInputs.get_mm_hashes` (`vllm/multimodal/processing/inputs.py`). Clients may name an
  image (`multi_modal_uuids`), and vLLM takes the name for its content hash. Such names are marked,
  so that nothing is stored or found under what a client says an image is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.config import ECTransferConfig, KVTransferConfig, VllmConfig
from vllm.multimodal.processing.inputs import ProcessorInputs

from .refusals import check_options
from .support import (
    ENCODER_CONNECTOR,
    KV_CONNECTOR,
    inert_reason,
    own_transfer,
    uses_vlcache,
)

_CLIENT_CHOSEN = "client-chosen:"
"""No content hash begins like this."""


def is_content_hash(identifier: str) -> bool:
    """Whether vLLM's identifier of an item was computed from the item.

    Adapters put their own name in front, so the mark is looked for anywhere.
    """
    return _CLIENT_CHOSEN not in identifier


def mark_client_chosen_names() -> None:
    """Patch `ProcessorInputs`, once per process."""
    original = ProcessorInputs.get_mm_hashes
    if hasattr(original, "_vlcache_original"):
        return

    @functools.wraps(original)
    def get_mm_hashes(self: ProcessorInputs, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        hashes = original(self, *args, **kwargs)
        named = self.mm_uuid_items or {}
        return {
            modality: [
                of_item if name is None else _CLIENT_CHOSEN + of_item
                for of_item, name in zip(
                    of_items, named.get(modality) or [None] * len(of_items), strict=True
                )
            ]
            for modality, of_items in hashes.items()
        }

    get_mm_hashes._vlcache_original = original  # type: ignore[attr-defined]
    ProcessorInputs.get_mm_hashes = get_mm_hashes  # type: ignore[method-assign]


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
    mark_client_chosen_names()
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
    if (
        config.model_config is not None
        and own_transfer(config) is not None
        and inert_reason(config) is None
    ):
        check_options(config)
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

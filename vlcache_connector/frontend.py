"""What is put right before vLLM starts, in its frontend.

vLLM seams, patched:

- `VllmConfig._resolve_mm_embedding_inputs` (`vllm/config/vllm.py`), for two things. The KV half's
  flag turns on the encoder half as well: model runner V2 builds encoder connectors before KV
  connectors exist. And the frontend stays as strict as without VLCache: vLLM takes any KV or
  encoder consumer for the decoding half of a split deployment, whose clients send embeddings
  instead of images and may leave out the tensor. VLCache serves images: with that door open, one
  request without its tensor would end the engine.
- `ProcessorInputs.get_mm_hashes` (`vllm/multimodal/processing/inputs.py`). Clients may name an
  image (`multi_modal_uuids`), and vLLM takes the name for its content hash. Such names are marked,
  so that nothing is stored or found under what a client says an image is.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import ECTransferConfig, VllmConfig
from vllm.multimodal.processing.inputs import ProcessorInputs

from .support import inert_reason

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


def resolve_encoder_half() -> None:
    """Patch `VllmConfig`, once per process: see the first seam."""
    original = VllmConfig._resolve_mm_embedding_inputs
    if hasattr(original, "_vlcache_original"):
        return

    @functools.wraps(original)
    def resolve(self: VllmConfig) -> None:
        multimodal = self.model_config.multimodal_config if self.model_config else None
        if multimodal is None or not _is_vlcache_alone(self):
            original(self)
            return
        _turn_on_encoder_half(self)
        asked_for = multimodal.enable_mm_embeds
        original(self)
        multimodal.enable_mm_embeds = asked_for
        multimodal.allow_missing_mm_embeddings = False

    resolve._vlcache_original = original  # type: ignore[attr-defined]
    VllmConfig._resolve_mm_embedding_inputs = resolve  # type: ignore[method-assign]


def _turn_on_encoder_half(config: VllmConfig) -> None:
    kv = config.kv_transfer_config
    if kv is None or config.ec_transfer_config is not None or inert_reason(config) is not None:
        return
    config.ec_transfer_config = ECTransferConfig(
        ec_connector="VLCacheEncoderConnector",
        # For a producer vLLM encodes an image of the largest size at every start, to learn a width
        # that this connector does not use; whether rows are stored is up to `kv_role`.
        ec_role="ec_consumer",
        engine_id=kv.engine_id,
    )


def _is_vlcache_alone(config: VllmConfig) -> bool:
    kv, ec = config.kv_transfer_config, config.ec_transfer_config
    names = {kv.kv_connector if kv else None, ec.ec_connector if ec else None} - {None}
    return bool(names) and names <= {"VLCacheConnector", "VLCacheEncoderConnector"}

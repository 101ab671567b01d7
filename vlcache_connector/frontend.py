"""What is put right before vLLM starts, in its frontend.

vLLM seam, patched: `VllmConfig._resolve_mm_embedding_inputs` (`vllm/config/vllm.py`), for two
things. The KV half's flag turns on the encoder half as well: model runner V2 builds encoder
connectors before KV connectors exist. And the frontend stays as strict as without VLCache: vLLM
takes any KV or encoder consumer for the decoding half of a split deployment, whose clients send
embeddings instead of images and may leave out the tensor. VLCache serves images: with that door
open, one request without its tensor would end the engine.
"""

from __future__ import annotations

import functools

from vllm.config import ECTransferConfig, VllmConfig

from .content import identify_items
from .identity import check_identity
from .support import inert_reason


def resolve_encoder_half() -> None:
    """Patch `VllmConfig`, once per process."""
    original = VllmConfig._resolve_mm_embedding_inputs
    if hasattr(original, "_vlcache_original"):
        return

    @functools.wraps(original)
    def resolve(self: VllmConfig) -> None:
        multimodal = self.model_config.multimodal_config if self.model_config else None
        if multimodal is None or not _is_vlcache_alone(self):
            original(self)
            return
        identify_items()
        if inert_reason(self) is None:
            check_identity(self, is_loaded=False)
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

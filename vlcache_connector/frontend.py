"""Keeps vLLM's frontend as strict with the connector as it is without.

vLLM seam, patched: `VllmConfig._resolve_mm_embedding_inputs` (`vllm/config/vllm.py`). vLLM takes
any KV or encoder consumer for the decoding half of a split deployment, whose clients send
embeddings instead of images and may leave out the tensor. VLCache serves images: with that door
open, one request without its tensor would end the engine.
"""

from __future__ import annotations

import functools

from vllm.config import VllmConfig


def refuse_missing_embeddings() -> None:
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
        asked_for = multimodal.enable_mm_embeds
        original(self)
        multimodal.enable_mm_embeds = asked_for
        multimodal.allow_missing_mm_embeddings = False

    resolve._vlcache_original = original  # type: ignore[attr-defined]
    VllmConfig._resolve_mm_embedding_inputs = resolve  # type: ignore[method-assign]


def _is_vlcache_alone(config: VllmConfig) -> bool:
    kv, ec = config.kv_transfer_config, config.ec_transfer_config
    names = {kv.kv_connector if kv else None, ec.ec_connector if ec else None} - {None}
    return bool(names) and names <= {"VLCacheConnector", "VLCacheEncoderConnector"}

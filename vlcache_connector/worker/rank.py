"""What the two halves of an engine share in a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

from ..halves import OnePerEngine
from ..support import config_of
from .encoder import EncoderRows
from .pace import Pace
from .storage import Storage, open_storage

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class Rank:
    """One rank's memory and what is known of its speed.

    Attributes:
        storage: all that this rank holds.
        encoder_rows: those of it that are encoder rows.
        pace: how fast this worker computes.
        has_kv_half: whether the KV half runs; its reports then tell of encoder rows as well.
    """

    storage: Storage
    encoder_rows: EncoderRows
    pace: Pace
    has_kv_half: bool = False


def _open(vllm_config: VllmConfig) -> Rank:
    device = torch.device(current_platform.device_type)
    pace = Pace(config_of(vllm_config).prefill_tokens_per_second)
    storage = open_storage(vllm_config)
    return Rank(storage, EncoderRows(storage, device), pace)


RANK = OnePerEngine(_open)


def close_rank(vllm_config: VllmConfig) -> None:
    """Release the rank's memory and threads; nothing for the half that is late."""
    rank = RANK.take(vllm_config)
    if rank is not None:
        rank.storage.close()

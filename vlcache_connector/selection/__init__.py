"""Recompute-token selectors: which tokens of a reused segment are computed anew."""

from __future__ import annotations

from collections.abc import Sequence

from ..calibration import LayerSchedule
from ..config import SelectorName
from .base import Budget, RecomputeSelector, Selection
from .cacheblend import CacheBlend
from .first_k import FirstK
from .full import FullRecompute
from .layer_aware import LayerAware, first_k_by_layer
from .none import NoRecompute
from .random_k import RandomK


def make_selectors(
    num_layers: int, schedules: Sequence[LayerSchedule]
) -> dict[SelectorName, RecomputeSelector]:
    """All selectors that a model of `num_layers` decoder layers can be served with.

    Args:
        schedules: of `layer_aware`, which is left out without any.
    """
    selectors: dict[SelectorName, RecomputeSelector] = {
        "first_k": FirstK(),
        "none": NoRecompute(),
        "full": FullRecompute(),
        "random_k": RandomK(),
        "cacheblend": CacheBlend(num_layers),
    }
    if schedules:
        selectors["layer_aware"] = LayerAware(schedules)
    return selectors


__all__ = [
    "Budget",
    "CacheBlend",
    "FirstK",
    "FullRecompute",
    "LayerAware",
    "NoRecompute",
    "RandomK",
    "RecomputeSelector",
    "Selection",
    "first_k_by_layer",
    "make_selectors",
]

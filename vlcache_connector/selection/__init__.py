"""Recompute-token selectors: which tokens of a reused segment are computed anew."""

from .base import Budget, RecomputeSelector
from .first_k import FirstK
from .full import FullRecompute
from .none import NoRecompute

SELECTORS: dict[str, type[RecomputeSelector]] = {
    "first_k": FirstK,
    "full": FullRecompute,
    "none": NoRecompute,
}

__all__ = ["SELECTORS", "Budget", "FirstK", "FullRecompute", "NoRecompute", "RecomputeSelector"]

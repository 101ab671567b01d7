"""The gate: under which donor relations this model may reuse KV."""

from __future__ import annotations

from vllm.logger import init_logger

from ..calibration import RELATIONS, Calibration, Relation, Verification
from ..config import VLCacheConfig

logger = init_logger(__name__)

_EVERYTHING: frozenset[Relation] = frozenset(RELATIONS)


def allowed_relations(
    config: VLCacheConfig, calibration: Calibration | None, model: str
) -> frozenset[Relation]:
    """What the gate lets through; says so in the log, once per start."""
    if config.gate == "off":
        return _EVERYTHING
    verification = calibration.verification if calibration is not None else None
    problem = _problem(config, verification)
    if problem is not None:
        advice = f"run `vlcache verify --model {model}` to measure it"
        if config.gate == "require":
            logger.error("VLCache: reuse is off (gate=require): %s; %s", problem, advice)
            return frozenset()
        logger.warning(
            "VLCache: how good this model's answers are with reused KV is not known: %s; %s",
            problem,
            advice,
        )
        return _EVERYTHING
    assert verification is not None
    logger.info(
        "VLCache: verified on this model, verdict %r; reuse under the relations %s",
        verification.verdict,
        ", ".join(sorted(verification.allowed)) or "none",
    )
    return verification.allowed


def _problem(config: VLCacheConfig, verification: Verification | None) -> str | None:
    """Why a verification says nothing about this configuration."""
    if verification is None:
        return "there is no verification of it"
    if config.selector == "full" or (
        config.selector == verification.selector
        and config.recompute_ratio >= verification.recompute_ratio
    ):
        return None
    return (
        f"it was verified with selector={verification.selector} and "
        f"recompute_ratio={verification.recompute_ratio}, not with {config.selector} and "
        f"{config.recompute_ratio}"
    )

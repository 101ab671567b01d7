"""The gate: under which donor relations this model may reuse KV."""

from __future__ import annotations

from vllm.logger import init_logger

from ..calibration import RELATIONS, Calibration, Relation, Verification
from ..config import VLCacheConfig

logger = init_logger(__name__)

_EVERYTHING: frozenset[Relation] = frozenset(RELATIONS)
_SMALL_RISK: frozenset[Relation] = frozenset({"single_image", "same_ordinal"})
"""As many images in front of the donor as of the target."""


def allowed_relations(
    config: VLCacheConfig, calibration: Calibration | None, model: str
) -> frozenset[Relation]:
    """What the gate lets through; says so in one line of the log, once per start."""
    if config.gate == "off":
        logger.warning("VLCache: reuse under every relation (gate=off), verified or not")
        return _EVERYTHING
    verification = calibration.verification if calibration is not None else None
    problem = _problem(config, verification)
    if problem is None:
        assert verification is not None
        logger.info(
            "VLCache: verified on this model, verdict %r; reuse under the relations %s",
            verification.verdict,
            _listed(verification.allowed),
        )
        return verification.allowed
    advice = f"run `vlcache verify --model {model}` to measure it"
    if config.gate == "require":
        logger.error("VLCache: reuse is off (gate=require): %s; %s", problem, advice)
        return frozenset()
    # What failed with other settings is not taken for safe with these.
    allowed = _SMALL_RISK & (verification.allowed if verification is not None else _EVERYTHING)
    logger.warning(
        "VLCache: how good this model's answers are with reused KV is not known (%s): reuse only "
        "under the relations of small risk, here %s; to allow more, %s, or set gate=off in "
        "kv_connector_extra_config",
        problem,
        _listed(allowed),
        advice,
    )
    return allowed


def _listed(relations: frozenset[Relation]) -> str:
    return ", ".join(sorted(relations)) or "none"


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

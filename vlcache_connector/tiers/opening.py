"""Opens the tiers that a configuration asks for."""

from __future__ import annotations

from ..config import ConfigError, VLCacheConfig
from .base import TIER_NAMES, Deadline, Tier, TierError, TierName
from .breaker import CircuitBreaker
from .disk import DiskTier
from .guarded import GuardedTier
from .redis import RedisTier
from .redis_url import LOGIN_HINT

_START_SECONDS = 5.0
_KEYS: dict[TierName, str] = {"disk": "disk_path", "redis": "redis_url"}


def open_tiers(config: VLCacheConfig, fingerprint: str, model_name: str) -> list[GuardedTier]:
    """The tiers below host memory, fastest first.

    Args:
        fingerprint: of the model, which is noted in the tiers together with its name.

    Raises:
        ConfigError: a setting is malformed, the disk can't be written to, or Redis does not answer.
    """
    opened = []
    for tier in [open_tier(config, name) for name in configured(config)]:
        breaker = CircuitBreaker(tier.name, slow_seconds=config.fetch_deadline_seconds)
        opened.append(GuardedTier(tier, breaker))
        opened[-1].record_model(fingerprint, model_name, Deadline(_START_SECONDS))
    return opened


def configured(config: VLCacheConfig) -> list[TierName]:
    """Names of the tiers that a configuration asks for, fastest first."""
    return [name for name in TIER_NAMES if getattr(config, _KEYS[name]) is not None]


def open_tier(config: VLCacheConfig, name: TierName) -> Tier:
    """A tier that answers.

    Raises:
        ConfigError: as `open_tiers`.
    """
    key = _KEYS[name]
    tier: Tier
    try:
        if name == "disk":
            assert config.disk_path is not None
            tier = DiskTier(
                config.disk_path, config.deployment, config.disk_bytes, config.ttl_seconds
            )
        else:
            assert config.redis_url is not None
            tier = RedisTier(
                config.redis_url,
                config.deployment,
                config.ttl_seconds,
                tls_ca_file=config.redis_tls_ca_file,
            )
    except ValueError as error:
        message = str(error).replace("tls_ca_file=", "redis_tls_ca_file=")
        raise ConfigError(f"kv_connector_extra_config: {message}") from None
    try:
        tier.models(Deadline(_START_SECONDS))
    except TierError as error:
        remedy = LOGIN_HINT if error.fault == "auth" else "see to it that it can"
        raise ConfigError(
            f"kv_connector_extra_config: {key}={getattr(config, key)!r} can't be used: {error} "
            f"({error.fault}); {remedy}, or leave {key} out"
        ) from None
    return tier

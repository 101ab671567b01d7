"""Opens the tiers that a configuration asks for."""

from __future__ import annotations

from ..config import ConfigError, VLCacheConfig
from .base import Deadline, Tier, TierError
from .breaker import CircuitBreaker
from .disk import DiskTier
from .guarded import GuardedTier, TransferTime
from .redis import RedisTier

_START_SECONDS = 5.0


def open_tiers(config: VLCacheConfig, fingerprint: str, model_name: str) -> list[GuardedTier]:
    """The tiers below host memory, fastest first.

    Args:
        fingerprint: of the model, which is noted in the tiers together with its name.

    Raises:
        ConfigError: a setting is malformed, the disk can't be written to, or Redis does not answer.
    """
    tiers: list[tuple[Tier, int | None]] = []
    try:
        if config.disk_path is not None:
            disk = DiskTier(
                config.disk_path, config.deployment, config.disk_bytes, config.ttl_seconds
            )
            tiers.append((disk, config.disk_bytes_per_second))
        if config.redis_url is not None:
            redis = RedisTier(
                config.redis_url,
                config.deployment,
                config.ttl_seconds,
                tls_ca_file=config.redis_tls_ca_file,
            )
            tiers.append((redis, config.redis_bytes_per_second))
    except ValueError as error:
        message = str(error).replace("tls_ca_file=", "redis_tls_ca_file=")
        raise ConfigError(f"kv_connector_extra_config: {message}") from None
    for tier, _ in tiers:
        try:
            tier.models(Deadline(_START_SECONDS))
        except TierError as error:
            key = "disk_path" if tier.name == "disk" else "redis_url"
            raise ConfigError(
                f"kv_connector_extra_config: {key}={getattr(config, key)!r} can't be used: {error} "
                f"({error.fault}); see to it that it can, or leave {key} out"
            ) from None
    opened = []
    for tier, speed in tiers:
        latency = None if speed is None else 0.0
        opened.append(
            GuardedTier(
                tier,
                CircuitBreaker(tier.name, slow_seconds=config.fetch_deadline_seconds),
                read_time=TransferTime(latency, speed),
            )
        )
        opened[-1].record_model(fingerprint, model_name, Deadline(_START_SECONDS))
    return opened

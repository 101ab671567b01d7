"""Where segments live below host memory: a local disk, and a Redis that processes share."""

from .base import (
    FAULTS,
    TIER_NAMES,
    Deadline,
    Entry,
    Fault,
    Name,
    NoAnswer,
    Tier,
    TierError,
    TierName,
    TierUsage,
)
from .breaker import BreakerState, CircuitBreaker
from .disk import DiskTier
from .guarded import GuardedTier, Operation, TierCounters, TransferTime
from .opening import configured, open_tier, open_tiers
from .redis import RedisTier
from .redis_url import Credentials, RedisAddress

__all__ = [
    "FAULTS",
    "TIER_NAMES",
    "BreakerState",
    "CircuitBreaker",
    "Credentials",
    "Deadline",
    "DiskTier",
    "Entry",
    "Fault",
    "GuardedTier",
    "Name",
    "NoAnswer",
    "Operation",
    "RedisAddress",
    "RedisTier",
    "Tier",
    "TierCounters",
    "TierError",
    "TierName",
    "TierUsage",
    "TransferTime",
    "configured",
    "open_tier",
    "open_tiers",
]

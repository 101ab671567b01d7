"""The worker's segment store: KV and encoder rows by content key, in host memory."""

from vlcache_connector.store.base import EncodedSegment, SegmentStore, StoreCounters, StoreUsage
from vlcache_connector.store.lmcache_store import LMCacheSegmentStore

__all__ = [
    "EncodedSegment",
    "LMCacheSegmentStore",
    "SegmentStore",
    "StoreCounters",
    "StoreUsage",
]

"""The worker's segment store: KV and encoder rows by content key, in host memory."""

from vlcache_connector.store.base import (
    EncodedSegment,
    KVWriter,
    Segment,
    SegmentInfo,
    SegmentStore,
    StoreCounters,
    StoreUsage,
)
from vlcache_connector.store.codec import Kind, RefusalReason, RefusedObject, SegmentId
from vlcache_connector.store.lmcache_store import LMCacheSegmentStore

__all__ = [
    "EncodedSegment",
    "KVWriter",
    "Kind",
    "LMCacheSegmentStore",
    "RefusalReason",
    "RefusedObject",
    "Segment",
    "SegmentId",
    "SegmentInfo",
    "SegmentStore",
    "StoreCounters",
    "StoreUsage",
]

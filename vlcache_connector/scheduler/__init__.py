"""The scheduler side: plans what is reused, recomputed, stored and evicted."""

"""The worker side: captures segments, loads them, runs the sparse prefill."""

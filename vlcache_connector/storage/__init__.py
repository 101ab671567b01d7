"""Segments in LMCache's storage engine: host memory, and what LMCache can reach below it."""

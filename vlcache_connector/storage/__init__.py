"""Segments in LMCache's storage engine: host memory, and what LMCache can reach below it."""

import os

# LMCache reads them when it is imported. A full pool and a slow server are business as usual here.
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")

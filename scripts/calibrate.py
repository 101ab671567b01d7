#!/usr/bin/env python
"""Make a model's recompute schedules: `vlcache calibrate`, from a checkout."""

from __future__ import annotations

import sys

from vlcache_connector.cli import main

if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))

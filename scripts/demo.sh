#!/usr/bin/env bash
# Installs what is missing, then serves a small model with and without VLCache and compares the
# two over the OpenAI API. Arguments go to demo.py: see `scripts/demo.sh --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
exec .venv/bin/python scripts/demo.py "$@"

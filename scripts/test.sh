#!/usr/bin/env bash
# Installs what is missing, checks the style, runs the tests in two processes.
#
#   scripts/test.sh            everything
#   scripts/test.sh fast       unit tests, and exactness on one real engine
#   scripts/test.sh next       contracts, exactness and a server, on vLLM 0.33
#   scripts/test.sh ARGUMENTS  what pytest is told to run (tests/README.md)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
read -r _ device <.venv/setup.stamp

export VLLM_CPU_KVCACHE_SPACE=1
export HF_HUB_OFFLINE=1
export VLLM_NO_USAGE_STATS=1
export DO_NOT_TRACK=1
export LMCACHE_TRACK_USAGE=false
# Two processes share the cores: more threads of theirs would only spin beside each other.
export OMP_NUM_THREADS=1
export VLLM_CPU_OMP_THREADS_BIND=nobind
# Dozens of processes import vLLM: none has to compile its modules anew.
unset PYTHONDONTWRITEBYTECODE
# Without a GPU, Triton kernels run in Triton's interpreter.
if [ "$device" = cpu ]; then export TRITON_INTERPRET=1; fi

case ${1:-} in
fast)
    shift
    set -- -m "unit or fast" "$@"
    ;;
next)
    shift
    overlay=$(.venv/bin/python scripts/overlay_vllm.py 0.33.0)
    export PYTHONPATH=$overlay
    set -- tests/unit/test_seams.py tests/unit/test_content.py tests/unit/test_media.py \
        tests/engine/test_contracts.py tests/engine/test_exactness.py \
        tests/engine/test_lifecycle.py tests/engine/test_encoder_rows.py \
        tests/engine/test_vllm_features.py tests/server/test_serve.py "$@"
    ;;
esac

status=0
.venv/bin/ruff check || status=$?
.venv/bin/ruff format --check || status=$?
.venv/bin/python -m pytest -n 2 "$@" || status=$?
printf 'scripts/test.sh took %d min %d s\n' $((SECONDS / 60)) $((SECONDS % 60))
exit "$status"

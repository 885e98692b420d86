#!/usr/bin/env bash
# Make sure of a Python that has all that bcn_mm and its tests need.
#
#   bash tools/setup_env.sh           # make or check the environment, say which
#   bash tools/setup_env.sh --plan    # say what would be made, and make nothing
#
# The active environment is used as it is if it has everything, and the stack
# that MM_STACK names, if it is set; else one is made in the repository, with
# the versions of requirements/lock*.txt. Running it again costs a second.
#
#   MM_STACK    openmmlab   torch 2.13, mmcv 2.1.0 compiled for it; .venv
#               classic     torch 2.1.2, the newest that OpenMMLab ships mmcv 2.1.0
#                           for, and numpy 1; .venv-classic
#               onedl       OpenMMLab's maintained fork, compiled; .venv-onedl
#               Without it: openmmlab; where there is an NVIDIA GPU, but no nvcc
#               that fits it, classic, which compiles nothing there
#   DEVICE      cpu, or cuda, for mmcv's operators     (what nvidia-smi finds)
#   PYTHON      the interpreter to make it with        (python3.11, python3)
#   VENV        the environment to make
#   TORCH_SPEC  what pip installs as torch             (torch==2.13.0 or 2.1.2)
#   MMCV_SPEC   what pip installs as mmcv              (mmcv==2.1.0, onedl-mmcv==2.3.6)
#               compiled here, unless PIP_FIND_LINKS names a folder with a wheel
#   CUDA_HOME   the CUDA toolkit to compile with       (that of nvcc)
#   TORCH_CUDA_ARCH_LIST   the cards to compile for    (those that nvidia-smi finds)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '[setup] %s\n' "$*" >&2; }

# die WHAT HINT: one line that says what failed and what to do next
die() {
    printf '[setup] error: %s. %s\n' "$1" "$2" >&2
    exit 1
}

# -- what to make --------------------------------------------------------------

# find_gpu: sets CARDS, the compute capabilities of the GPUs here, and DRIVER,
# the newest CUDA that their driver runs; both are empty where there is none
find_gpu() {
    CARDS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        sort -Vu | paste -sd';') || CARDS=
    DRIVER=
    [ -z "$CARDS" ] || DRIVER=$(nvidia-smi | grep -oE 'CUDA Version: *[0-9.]+' | grep -oE '[0-9.]+$') || true
}

# find_nvcc: sets NVCC, its version, and CUDA_HOME; NVCC is empty without one
find_nvcc() {
    local nvcc
    nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
    nvcc=${nvcc:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
    NVCC=$("$nvcc" --version 2>/dev/null | grep -oE 'release [0-9.]+' | grep -oE '[0-9.]+$') || NVCC=
    [ -z "$NVCC" ] || export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$nvcc")")}
}

major() { echo "${1%%.*}"; }

# choose: sets STACK, DEVICE, and all that they stand for
choose() {
    local seen=
    find_gpu
    DEVICE=${DEVICE:-$([ -n "$CARDS" ] && echo cuda || echo cpu)}
    case "$DEVICE" in
    cpu) ;;
    cuda) find_nvcc && seen="${CARDS:+GPU of compute capability $CARDS, driver for CUDA ${DRIVER:-?}; }${NVCC:+nvcc $NVCC}" ;;
    *) die "there is no DEVICE '$DEVICE'" "Set it to cpu or cuda" ;;
    esac
    STACK=${MM_STACK:-openmmlab}
    # torch 2.13 is built with CUDA 13.0
    if [ "$DEVICE" = cuda ] && [ -z "${MM_STACK:-}" ] &&
        [ "$(major "${NVCC:-0}")" != 13 -o "$(major "${DRIVER:-13}")" -lt 13 ]; then
        STACK=classic
    fi
    LOCKS=("$ROOT/requirements/lock.txt" "$ROOT/requirements/lock-$STACK.txt")
    case "$STACK" in
    openmmlab) VENV=${VENV:-$ROOT/.venv} MMCV=mmcv==2.1.0 TORCH=torch==2.13.0 ;;
    classic)
        VENV=${VENV:-$ROOT/.venv-classic} MMCV=mmcv==2.1.0 TORCH=torch==2.1.2
        LOCKS=("$ROOT/requirements/lock-classic.txt") # numpy 1 rules out others
        ;;
    onedl) VENV=${VENV:-$ROOT/.venv-onedl} MMCV=onedl-mmcv==2.3.6 TORCH=torch==2.13.0 ;;
    *) die "there is no MM_STACK '$STACK'" "Set it to openmmlab, classic or onedl" ;;
    esac
    TORCH_SPEC=${TORCH_SPEC:-$TORCH} MMCV_SPEC=${MMCV_SPEC:-$MMCV}
    PREBUILT= HOW="compiled for $DEVICE"
    if [ "$DEVICE" = cuda ] && [ "$STACK" = classic ] && [ "$TORCH_SPEC" = "$TORCH" ]; then
        # torch 2.1.2 is built with CUDA 12.1, for cards up to 9.0
        PREBUILT=https://download.openmmlab.com/mmcv/dist/cu121/torch2.1.0/index.html
        HOW="prebuilt by OpenMMLab"
    fi
    [ -z "$seen" ] || say "$seen: stack $STACK," \
        "$TORCH_SPEC, $MMCV_SPEC $HOW (MM_STACK and DEVICE choose otherwise)"
}

# check_cuda: can what was chosen run and be compiled here?
check_cuda() {
    local card hint="MM_STACK and DEVICE choose otherwise"
    [ "$DEVICE" = cuda ] || return 0
    if [ -n "$PREBUILT" ]; then
        for card in ${CARDS//;/ }; do
            [ "$(major "$card")" -lt 10 ] ||
                die "stack classic makes no code for cards of compute capability $card" \
                    "Install the CUDA toolkit 13 (nvcc), which stack openmmlab is compiled with; $hint"
        done
        [ "$(major "${DRIVER:-12}")" -ge 12 ] ||
            die "torch 2.1.2 needs a driver for CUDA 12, but this one is for $DRIVER" \
                "Update the driver; $hint"
    elif [ -z "$NVCC" ]; then
        die "stack $STACK compiles mmcv for the GPU, and there is no nvcc" \
            "Install the CUDA toolkit that torch was built with, or set CUDA_HOME to it; MM_STACK=classic compiles nothing; $hint"
    elif [ -z "${TORCH_CUDA_ARCH_LIST:=$CARDS}" ]; then
        die "nvidia-smi finds no GPU to compile mmcv for" \
            "Set TORCH_CUDA_ARCH_LIST, to 9.0 for instance; $hint"
    fi
}

# -- whether it is there -------------------------------------------------------

# complete PYTHON [STACK]: does this interpreter have everything (of this stack)?
complete() {
    "$1" - "${2:-}" <<'PY' >/dev/null 2>&1
import sys, importlib.metadata as m, importlib.util as u
try:
    m.version('onedl-mmengine')
    stack = 'onedl'
except m.PackageNotFoundError:
    classic = tuple(map(int, m.version('torch').split('.')[:2])) < (2, 2)
    stack = 'classic' if classic else 'openmmlab'
needed = ['torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain',
          'ftfy', 'regex', 'matplotlib', 'rich', 'pytest', 'pytest_timeout',
          'xdist', 'hypothesis', 'onnxruntime', 'onnxscript', 'sklearn',
          'sphinx', 'myst_parser', 'furo', 'sphinx_copybutton', 'vermin']
needed += [] if stack == 'onedl' else ['pkg_resources']
if any(u.find_spec(name) is None for name in needed):
    raise SystemExit(1)
import torch, mmcv._ext  # it may have been built for another torch
raise SystemExit(sys.argv[1] not in ('', stack))
PY
}

# wanted: what is to be in VENV
wanted() {
    cat "${LOCKS[@]}"
    cat "$ROOT/setup.py" "$ROOT"/csrc/* | cksum # the kernels are compiled from these
    echo "$TORCH_SPEC $MMCV_SPEC $DEVICE"
}

# step WHAT HINT COMMAND...: run quietly; every 15 s tell how long it has taken
# and, where ninja compiles, how far it is
step() {
    local what=$1 hint=$2 log start=$SECONDS pid status
    shift 2
    log=$(mktemp)
    say "$what ..."
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        if (((SECONDS - start) % 15 == 0 && SECONDS > start)); then
            say "  $((SECONDS - start)) s" \
                "$(grep -aoE '^ *\[[0-9]+/[0-9]+\]' "$log" | tail -n 1)"
        fi
    done
    status=0
    wait "$pid" || status=$?
    if ((status)); then
        tail -n 15 "$log" >&2
        die "$what failed (the log is $log)" "$hint"
    fi
    rm -f "$log"
    say "  done in $((SECONDS - start)) s"
}

# -- making it -----------------------------------------------------------------

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python}; do
        if "$candidate" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 found, which the versions in requirements/ are for" \
        "Install python3.11 with its venv module and headers, or set PYTHON to one; an environment of another Python that has OpenMMLab takes bcn_mm with pip install -e ."
}

# ask_torch EXPRESSION: of the torch in VENV
ask_torch() { "$VENV/bin/python" -c "import torch; print($1)"; }

# install_mmcv PIP...: from a wheel where one fits, else compiled
install_mmcv() {
    local cuda cache hint options=() how=()
    cuda=$(ask_torch 'torch.version.cuda or ""')
    # pip names what it has built after mmcv alone, but it fits one torch
    cache=$("$VENV/bin/python" -m pip cache dir 2>/dev/null) &&
        options+=(--cache-dir "$cache/mmcv-of-torch-$(ask_torch torch.__version__)-$DEVICE${TORCH_CUDA_ARCH_LIST:+-${TORCH_CUDA_ARCH_LIST//[; ]/-}}")
    if [ -n "$PREBUILT" ]; then
        step "installing $MMCV_SPEC, $HOW" \
            "Check that $PREBUILT can be reached; MM_STACK=openmmlab compiles mmcv instead" \
            "$@" --only-binary mmcv -f "$PREBUILT" "$MMCV_SPEC"
        return
    fi
    command -v c++ >/dev/null || command -v g++ >/dev/null ||
        say "no C++ compiler found: mmcv can then only come as a wheel (PIP_FIND_LINKS)"
    # -g0: debug information would make the library 40 times larger and the
    # build twice as long; given at all, these replace Python's own flags
    how=(MMCV_WITH_OPS=1 CFLAGS="-O3 -DNDEBUG -g0 ${CFLAGS:-}" CXXFLAGS="-O3 -DNDEBUG -g0 ${CXXFLAGS:-}")
    hint="Install g++ and python3.11's headers, or put a wheel of mmcv into a folder and name that in PIP_FIND_LINKS"
    if [ "$DEVICE" = cuda ]; then
        [ -n "$cuda" ] ||
            die "$TORCH_SPEC is a build without CUDA here" \
                "Set TORCH_SPEC and PIP_EXTRA_INDEX_URL to one with, or DEVICE=cpu"
        [ "$(major "$cuda")" = "$(major "$NVCC")" ] ||
            die "nvcc is of CUDA $NVCC, but torch was built with $cuda" \
                "Install the CUDA toolkit $cuda, or set CUDA_HOME to it"
        # torch brings headers that a trimmed toolkit lacks
        how+=(FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$TORCH_CUDA_ARCH_LIST"
            CPATH="$(ask_torch "':'.join(__import__('glob').glob(torch.__path__[0] + '/../nvidia/*/include'))")${CPATH:+:$CPATH}")
    else
        how+=(FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=)
    fi
    if [ "$(ask_torch 'tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)')" = True ]; then
        # torch's headers need C++20 since 2.14, and mmcv asks for C++17
        printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "${CXX:-c++}" >"$VENV/bin/c++20"
        chmod +x "$VENV/bin/c++20"
        how+=(CXX="$VENV/bin/c++20" NVCC_APPEND_FLAGS="-std=c++20 ${NVCC_APPEND_FLAGS:-}")
    fi
    set -- env "${how[@]}" "$@" "${options[@]}" -v --no-build-isolation
    step "installing $MMCV_SPEC, $HOW (compiling its operators takes 5 to 10 minutes on 2 cores, for a GPU an hour, once)" \
        "$hint" "$@" "$MMCV_SPEC"
    if ! "$VENV/bin/python" -c 'import torch, mmcv._ext' 2>/dev/null; then
        say "the wheel of mmcv that pip found is of another torch"
        step "compiling $MMCV_SPEC" "$hint" \
            "$@" --no-binary "${MMCV_SPEC%%[=<>]*}" --force-reinstall --no-deps "$MMCV_SPEC"
    fi
}

make_venv() {
    local python pip net lock locks=()
    check_cuda
    python=$(find_python)
    net="Check the network and the pip settings, then run this again: it goes on where it stopped"
    [ -x "$VENV/bin/python" ] ||
        step "making $VENV with $python" "Install python3.11-venv, or set PYTHON" \
            "$python" -m venv "$VENV"
    pip=("$VENV/bin/python" -m pip install --disable-pip-version-check)
    for lock in "${LOCKS[@]}"; do
        if [ "$TORCH_SPEC" != "$TORCH" ]; then
            # which brings a Triton of its own if it is built for GPUs
            grep -v '^triton==' "$lock" >"$VENV/${lock##*/}"
            lock=$VENV/${lock##*/}
        fi
        locks+=("$lock")
        pip+=(-c "$lock")
    done
    step "installing build tools" "$net" \
        "${pip[@]}" setuptools wheel ninja
    step "installing $TORCH_SPEC" "$net; set TORCH_SPEC for another build" \
        "${pip[@]}" "$TORCH_SPEC" numpy
    install_mmcv "${pip[@]}"
    step "installing the rest of $STACK and the tests' tools" "$net" \
        "${pip[@]}" "${locks[@]/#/-r}"
    step "installing bcn_mm" "Report this with the log" \
        "${pip[@]}" --no-deps --no-build-isolation -e "$ROOT"
    complete "$VENV/bin/python" "$STACK" ||
        die "$VENV is still incomplete" "Remove it and run this again"
}

# ensure_env: sets PY, the interpreter to use
ensure_env() {
    local active
    active=$(command -v python || command -v python3 || true)
    if [ -n "$active" ] && complete "$active" "${MM_STACK:-}"; then
        PY=$active
        say "using the active environment: $PY"
    else
        choose
        if ! complete "$VENV/bin/python" "$STACK" ||
            ! cmp -s "$VENV/bcn_mm.lock" <(wanted); then
            make_venv
            wanted >"$VENV/bcn_mm.lock"
        fi
        PY=$VENV/bin/python
        say "using $PY"
    fi
    # the tools find bcn_mm also where an active environment has not installed it
    export PY PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

# plan: say what would be made
plan() {
    choose
    check_cuda
    say "$VENV: $TORCH_SPEC, $MMCV_SPEC $HOW, and ${LOCKS[*]##*/}"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    case "${1:-}" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" ;;
    --plan) plan ;;
    '') ensure_env ;;
    *) die "there is no option $1" "--help says which there are" ;;
    esac
fi

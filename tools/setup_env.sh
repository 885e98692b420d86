#!/usr/bin/env bash
# Make sure of a Python that has all that bcn_mm and its tests need.
#
#   bash tools/setup_env.sh        # make or check the environment, say which
#
# The active environment is used as it is if it has everything, and the stack
# that MM_STACK names, if it is set; else .venv is made in the repository, with
# the versions of requirements/lock.txt and lock-STACK.txt. Running it again
# costs a second.
#
#   MM_STACK    openmmlab, or onedl: its maintained fork (openmmlab)
#   PYTHON      the interpreter to make .venv with       (python3.11, python3)
#   VENV        the environment to make                  (.venv; .venv-onedl)
#   TORCH_SPEC  what pip installs as torch               (torch==2.13.0)
#               a CUDA build:  TORCH_SPEC=torch==2.13.0+cu130, with
#               PIP_EXTRA_INDEX_URL naming the index of such builds
#   MMCV_SPEC   what pip installs as mmcv (mmcv==2.1.0; onedl-mmcv==2.3.6)
#               compiled here, unless PIP_FIND_LINKS names a folder with a wheel
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}

say() { printf '[setup] %s\n' "$*" >&2; }

# die WHAT HINT: one line that says what failed and what to do next
die() {
    printf '[setup] error: %s. %s\n' "$1" "$2" >&2
    exit 1
}

case "${MM_STACK:=}" in
'' | openmmlab) STACK=openmmlab VENV=${VENV:-$ROOT/.venv} MMCV=mmcv==2.1.0 ;;
onedl) STACK=onedl VENV=${VENV:-$ROOT/.venv-onedl} MMCV=onedl-mmcv==2.3.6 ;;
*) die "there is no MM_STACK '$MM_STACK'" "Set it to openmmlab or onedl" ;;
esac
MMCV_SPEC=${MMCV_SPEC:-$MMCV}
LOCKS=("$ROOT/requirements/lock.txt" "$ROOT/requirements/lock-$STACK.txt")

# complete PYTHON [STACK]: does this interpreter have everything (of this stack)?
complete() {
    "$1" - "${2:-}" <<'PY' >/dev/null 2>&1
import sys, importlib.metadata as m, importlib.util as u
fork = 'onedl-mmengine' in m.packages_distributions()['mmengine']
needed = ['torch', 'mmengine', 'mmcv._ext', 'mmdet', 'mmseg', 'mmpretrain',
          'ftfy', 'regex', 'matplotlib', 'rich', 'pytest', 'pytest_timeout',
          'xdist', 'hypothesis', 'onnxruntime', 'onnxscript', 'sklearn']
needed += [] if fork else ['pkg_resources']
raise SystemExit(any(u.find_spec(name) is None for name in needed)
                 or sys.argv[1] not in ('', 'onedl' if fork else 'openmmlab'))
PY
}

# wanted: what is to be in VENV
wanted() {
    cat "${LOCKS[@]}"
    echo "$TORCH_SPEC $MMCV_SPEC"
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

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python}; do
        if "$candidate" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 found" \
        "Install python3.11 with its venv module and headers, or set PYTHON to one"
}

make_venv() {
    local python pip net
    python=$(find_python)
    net="Check the network and the pip settings, then run this again: it goes on where it stopped"
    [ -x "$VENV/bin/python" ] ||
        step "making $VENV with $python" "Install python3.11-venv, or set PYTHON" \
            "$python" -m venv "$VENV"
    pip=("$VENV/bin/python" -m pip install --disable-pip-version-check
        -c "${LOCKS[0]}" -c "${LOCKS[1]}")
    step "installing build tools" "$net" \
        "${pip[@]}" setuptools wheel ninja
    step "installing $TORCH_SPEC" "$net; set TORCH_SPEC for another build" \
        "${pip[@]}" "$TORCH_SPEC"
    command -v c++ >/dev/null || command -v g++ >/dev/null ||
        say "no C++ compiler found: mmcv can then only come as a wheel (PIP_FIND_LINKS)"
    # debug information would make the library 40 times larger and the build
    # twice as long
    step "installing $MMCV_SPEC (compiling its operators takes 5 to 10 minutes on 2 cores, once)" \
        "Install g++ and python3.11's headers, or put a wheel of mmcv into a folder and name that in PIP_FIND_LINKS" \
        env MMCV_WITH_OPS=1 CFLAGS="${CFLAGS:-} -g0" CXXFLAGS="${CXXFLAGS:-} -g0" \
        "${pip[@]}" -v --no-build-isolation "$MMCV_SPEC"
    step "installing the rest of $STACK and the tests' tools" "$net" \
        "${pip[@]}" -r "${LOCKS[0]}" -r "${LOCKS[1]}"
    step "installing bcn_mm" "Report this with the log" \
        "${pip[@]}" --no-deps --no-build-isolation -e "$ROOT"
    complete "$VENV/bin/python" "$STACK" ||
        die "$VENV is still incomplete" "Remove it and run this again"
}

# ensure_env: sets PY, the interpreter to use
ensure_env() {
    local active
    active=$(command -v python || command -v python3 || true)
    if [ -n "$active" ] && complete "$active" "$MM_STACK"; then
        PY=$active
        say "using the active environment: $PY"
    else
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

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    case "${1:-}" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" ;;
    *) ensure_env ;;
    esac
fi

#!/usr/bin/env bash
# Set up the environment (see tools/setup_env.sh), lint, and run the tests.
#
#   bash tools/run_tests.sh                    # everything
#   bash tools/run_tests.sh -m "not slow"      # further words go to pytest
#
#   WORKERS     how many files are tested at a time      (2)
set -euo pipefail
case "${1:-}" in
-h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    exit
    ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
ensure_env
cd "$ROOT"
# lint TOOL WORDS...: where it is installed
lint() {
    if "$PY" -m "$1" --version >/dev/null 2>&1; then
        "$PY" -m "$@"
    else
        say "$1 is not installed here: what it checks is not checked"
    fi
}
lint ruff check .
lint ruff format --check --quiet .
lint mypy
# Files are shared out among workers, each with one core's threads. They go in the
# order of their names: xdist would begin with those that have the most tests, and
# end with one worker at the few long ones while the other idles.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PY" -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# From an empty machine to metrics: environment, data, training, pictures.
#
#   bash tools/quickstart.sh                  # Mask R-CNN with BCN + WS
#   bash tools/quickstart.sh --task seg       # DeepLabV3
#   bash tools/quickstart.sh --compare        # beside BN and GN + WS
#   bash tools/quickstart.sh --help           # all options
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
ensure_env
cd "$ROOT"
exec "$PY" tools/quickstart.py "$@"

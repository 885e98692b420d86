#!/usr/bin/env bash
# Train on several processes, one per GPU; without a GPU, on gloo.
#
#   bash tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
#
# On several machines, run it on each with the same config and, in the
# environment, NNODES (how many machines), NODE_RANK (which one this is, from
# 0), MASTER_ADDR (the address of machine 0) and PORT (a free one there,
# 29500); PROCESSES is the number on each machine.
set -euo pipefail
if [ $# -lt 2 ] || [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    [[ "${1:-}" = -h || "${1:-}" = --help ]]
    exit
fi
config=$1
processes=$2
shift 2
if [[ ! $processes =~ ^([1-9][0-9]*|auto|cpu|gpu)$ ]]; then
    echo "error: PROCESSES must be a number, but got $processes" >&2
    exit 1
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${PORT:-29500}" --nproc-per-node "$processes" \
    "$(dirname "${BASH_SOURCE[0]}")/train.py" "$config" \
    --launcher pytorch "$@"

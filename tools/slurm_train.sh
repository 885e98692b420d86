#!/usr/bin/env bash
# Train under Slurm, one task per GPU.
#
#   bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
#
# In the environment: GPUS (of all nodes, 8), GPUS_PER_NODE (8; 0 for CPUs
# only, on gloo), TASKS_PER_NODE (GPUS_PER_NODE), CPUS_PER_TASK (5) and
# SRUN_ARGS, further words for srun.
set -euo pipefail
if [ $# -lt 4 ] || [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    [[ "${1:-}" = -h || "${1:-}" = --help ]]
    exit
fi
partition=$1
job=$2
config=$3
work_dir=$4
shift 4
per_node=${GPUS_PER_NODE:-8}
gres=()
[ "$per_node" = 0 ] || gres=(--gres "gpu:$per_node")
read -ra more <<<"${SRUN_ARGS:-}"
exec srun --partition "$partition" --job-name "$job" "${gres[@]}" \
    --ntasks "${GPUS:-8}" --ntasks-per-node "${TASKS_PER_NODE:-$per_node}" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 "${more[@]}" \
    "${PYTHON:-python}" -u "$(dirname "${BASH_SOURCE[0]}")/train.py" \
    "$config" --work-dir "$work_dir" --launcher slurm "$@"

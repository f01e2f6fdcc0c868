#!/usr/bin/env bash
# Starts torchrun on this node: examples/launch.sh RECIPE [FLAG ...]
#   GPUS_PER_NODE=8  NNODES=1  NODE_RANK=0  MASTER_ADDR=localhost  MASTER_PORT=29500   the job's shape (Slurm script sets it)
#   DATA_PATH, VALID_DATA_PATH, TOKENIZER_MODEL, JUDGE_MODEL, PRETRAINED             in place of the recipe's paths
#   DRY_RUN=1   only check: sizes, batches, judge calls, what is missing; needs no GPU
set -euo pipefail
recipe=${1:?usage: examples/launch.sh RECIPE [FLAG ...]}
shift
caller=$PWD
cd "$(dirname "$0")/.."
# Everything runs in the repository's folder; a recipe may stand where the caller is.
[[ ! -f $recipe && -f $caller/$recipe ]] && recipe=$caller/$recipe

gpus=${GPUS_PER_NODE:-8}
nodes=${NNODES:-1}

flags=(--config "$recipe")
# Paths may hold several words: a blend is "weight path weight path ...".
[[ -n ${DATA_PATH:-} ]] && read -ra words <<<"$DATA_PATH" && flags+=(--data-path "${words[@]}")
[[ -n ${VALID_DATA_PATH:-} ]] && read -ra words <<<"$VALID_DATA_PATH" && flags+=(--valid-data-path "${words[@]}")
[[ -n ${TOKENIZER_MODEL:-} ]] && flags+=(--tokenizer-model "$TOKENIZER_MODEL")
[[ -n ${JUDGE_MODEL:-} ]] && flags+=(--judge-model "$JUDGE_MODEL")
[[ -n ${PRETRAINED:-} ]] && flags+=(--pretrained-checkpoint "$PRETRAINED")

if [[ -n ${DRY_RUN:-} ]]; then
    exec "${PYTHON:-python}" pretrain_sip.py "${flags[@]}" "$@" --dry-run --dry-run-world-size $((gpus * nodes))
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Tensor and sequence parallel overlap communication and computation only in this launch order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# torchrun passes SIGTERM on and kills the ranks 30 s later, unless told otherwise: a step and a save may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
exec torchrun --nproc-per-node "$gpus" --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
    pretrain_sip.py "${flags[@]}" "$@"

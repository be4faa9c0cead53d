#!/usr/bin/env bash
# Trains on GPUs under Slurm, one process a GPU, and goes on by itself after preemption and at the end of its time.
#
#   sbatch --nodes 4 launch/slurm.sh --config configs/imagenet_w720.py --workdir /shared/w720 [--config.key value ...]
#   bash launch/slurm.sh --dry-run --config ... --workdir ...     # what it would do
#
# Submit it from the checkout, where .venv has `pip install -e '.[cuda13]'`, or with IMAGE=qbheat.sif, an Apptainer image of
# docker/cuda.Dockerfile (docs/docker.md); options of sbatch overrule those below. The workdir
# must be one that all nodes see. jax finds the other processes by Slurm's own variables; each takes the GPU of its
# number on the node, so tasks and GPUs a node must be as many, and --gpus-per-task must not be set.
#
#SBATCH --job-name=qbheat
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
set -euo pipefail

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -eq 0 ]; then
  echo "usage: sbatch $0 --config FILE --workdir DIR [--config.key value ...]" >&2
  exit 2
fi
run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Slurm runs a copy of this script from elsewhere.
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -d .venv/bin ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
qbheat=(qbheat)
if [ -n "${IMAGE:-}" ]; then qbheat=(apptainer run --nv "$IMAGE"); fi

code=0
run srun --kill-on-bad-exit=0 --wait=300 "${qbheat[@]}" pretrain "$@" || code=$?
if [ -n "$dry" ]; then
  echo "# and where that ends with 143 (stopped by SIGTERM, saved; see qbheat_jax/errors.py), to go on:"
  code=143
fi
if [ "$code" -eq 143 ]; then
  run scontrol requeue "${SLURM_JOB_ID:-JOB}"
  exit 0
fi
exit "$code"

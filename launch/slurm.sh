#!/usr/bin/env bash
# Train on GPUs under Slurm with one process per GPU. The job requeues itself after preemption and at its time limit.
#
#   sbatch --nodes 4 launch/slurm.sh --config configs/imagenet_w720.py --workdir /shared/w720 [--config.key value ...]
#   bash launch/slurm.sh --dry-run --config ... --workdir ...     # print the commands
#
# Submit it from a checkout whose .venv has `pip install -e '.[cuda13]'`, or set IMAGE=qbheat.sif, an Apptainer image of
# docker/cuda.Dockerfile (docs/docker.md). Options of sbatch override those below. All nodes must see the workdir.
# jax finds the other processes by Slurm's variables. Each process uses the GPU of its index on the node, so a node needs as
# many tasks as GPUs, and --gpus-per-task must not be set.
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

# Slurm runs a copy of this script from another directory.
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -d .venv/bin ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
qbheat=(qbheat)
if [ -n "${IMAGE:-}" ]; then qbheat=(apptainer run --nv "$IMAGE"); fi

code=0
run srun --kill-on-bad-exit=0 --wait=300 "${qbheat[@]}" pretrain "$@" || code=$?
if [ -n "$dry" ]; then
  echo "# if that ends with exit code 143 (saved after SIGTERM, see qbheat_jax/errors.py), resume by:"
  code=143
fi
if [ "$code" -eq 143 ]; then
  run scontrol requeue "${SLURM_JOB_ID:-JOB}"
  exit 0
fi
exit "$code"

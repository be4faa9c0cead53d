#!/usr/bin/env bash
# Pre-train QB-Heat on real photographs, probe it, and write an HTML page. It takes a few minutes on two CPU cores.
#
#   bash launch/quickstart.sh [--config.key value ...]
#
# Arguments override the pre-training config. The same command resumes an interrupted run.
# Environment variables:
#   SEED=N       seed of pre-training, probes and the untrained encoder (default: 0)
#   WORKDIR=DIR  directory of the run (default: runs/photos)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv photos,report
workdir=${WORKDIR:-runs/photos}
seed=(--config.seed "${SEED:-0}")

qbheat pretrain --config configs/photos.py --workdir "$workdir" "${seed[@]}" "$@" >/dev/null
qbheat probe --config configs/photos_lin.py configs/photos_tran1.py --init "$workdir" random histogram pixels \
  --workdir "$workdir/probe" "${seed[@]}"
echo
echo "The page: $(qbheat report --workdir "$workdir")"

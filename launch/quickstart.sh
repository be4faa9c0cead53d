#!/usr/bin/env bash
# Pre-trains QB-Heat on real photographs, probes it, and writes a page to look at: a few minutes on two CPU cores.
# Run again it goes on where it stopped. SEED=1 takes another seed, for pre-training, probes and the untrained encoder;
# WORKDIR=DIR puts the run elsewhere than runs/photos; arguments are config overrides of the pre-training.
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

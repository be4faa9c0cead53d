#!/usr/bin/env bash
# Pre-train QB-Heat, MoCo-v2 and SimMIM for 100 epochs of CIFAR-10 on one GPU, side by side with one encoder, and probe them.
# It is made for about twelve minutes of an H100, in parts: a part ends after --limit seconds, and the same command goes on.
#
#   bash launch/evidence_gpu.sh FOLDER [--out DIR] [--limit SECONDS] [--config.key value ...]
#
# FOLDER holds {train,test}/CLASS/*.png, see configs/cifar10.py. Results are in DIR/result.json and DIR/table.md (default:
# runs/evidence_gpu). Other arguments go to `qbheat compare`, such as --config.all.total_epochs 1 for a test. It runs from the
# checkout with $PYTHON, else .venv/bin/python, else python3. TensorFlow is not needed.
# Exit code: 0 finished, 75 the time was up and the same command goes on, else an error.
set -euo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  echo "evidence_gpu: error: give the folder of CIFAR-10 as the first argument" >&2
  exit 2
fi
folder=$(realpath -- "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=runs/evidence_gpu limit=340 rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --out | --limit)
      if [ $# -lt 2 ]; then
        echo "evidence_gpu: error: $1 takes a value" >&2
        exit 2
      fi
      if [ "$1" = --out ]; then out=$2; else limit=$2; fi
      shift 2
      ;;
    *)
      rest+=("$1")
      shift
      ;;
  esac
done
python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi

status=0
timeout --signal TERM --kill-after 60 "$limit" "$python" -m qbheat_jax compare --config configs/compare/cifar10_gpu.py \
  --workdir "$out" --config.all.data.source "folder:$folder" ${rest[@]+"${rest[@]}"} || status=$?
if [ "$status" = 124 ]; then
  echo "evidence_gpu: the $limit seconds were up and everything is saved; the same command goes on" >&2
  exit 75
fi
exit "$status"

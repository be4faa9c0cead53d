#!/usr/bin/env bash
# Train on a TPU VM slice. The script creates the slice, installs the last commit on all workers, and trains on all of them.
# After a preemption it creates a new slice and resumes from the last checkpoint. At the end it deletes the slice.
#
#   bash launch/tpu_vm.sh [--dry-run] NAME ZONE TYPE --config FILE --workdir gs://BUCKET/DIR [--config.key value ...]
#   bash launch/tpu_vm.sh my-slice us-west4-a v5litepod-16 --config configs/imagenet_w720.py --workdir gs://my-bucket/w720
#
# Requirements: gcloud, logged in, with a project. --dry-run prints the commands without running them.
# Environment variables:
#   SPOT=1       use a preemptible slice
#   KEEP=1       keep the slice at the end
#   VERSION=...  runtime version of the TPU VM
set -euo pipefail

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 5 ] || [[ "$1$2$3" == *--* ]]; then
  echo "usage: $0 [--dry-run] NAME ZONE TYPE --config FILE --workdir gs://BUCKET/DIR [--config.key value ...]" >&2
  exit 2
fi
name=$1 zone=$2 type=$3
shift 3
if [[ " $* " != *" gs://"* && " $* " != *"=gs://"* ]]; then
  echo "--workdir must be a gs:// path, because a slice's disks are lost with it; got: $*" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case $type in
  v5litepod-*) version="v2-alpha-tpuv5-lite" ;;
  v5p-*) version="v2-alpha-tpuv5" ;;
  v6e-*) version="v2-alpha-tpuv6e" ;;
  *) version="tpu-ubuntu2204-base" ;;
esac
tpu=(gcloud compute tpus tpu-vm)
where=("$name" "--zone=$zone")

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
everywhere() { # COMMAND: run it on all workers
  run "${tpu[@]}" ssh "${where[@]}" --worker=all --command="$1"
}
state() { # print READY, PREEMPTED, ..., or nothing if there is no such slice
  if [ -z "$dry" ]; then
    "${tpu[@]}" describe "${where[@]}" --format='value(state)' 2>/dev/null || true
  fi
}

create() {
  local spot=()
  if [ -n "${SPOT:-}" ]; then spot=(--spot); fi
  run "${tpu[@]}" create "${where[@]}" "--accelerator-type=$type" "--version=${VERSION:-$version}" "${spot[@]}"
}

install() {
  local archive=qbheat_jax.tar.gz
  if [ -z "$dry" ]; then archive=$(mktemp -d)/$archive; fi
  run git archive --format=tar.gz "--output=$archive" HEAD
  run "${tpu[@]}" scp "$archive" "$name:qbheat_jax.tar.gz" "--zone=$zone" --worker=all
  # The images' Python is too old for jax, so uv installs another one.
  everywhere "mkdir -p qbheat_jax && tar -xzf qbheat_jax.tar.gz -C qbheat_jax && python3 -m pip install --quiet --user uv &&
    ~/.local/bin/uv venv --allow-existing --python 3.12 ~/venv &&
    ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e './qbheat_jax[tpu]'"
}

arguments=$(printf ' %q' "$@")
while true; do
  case $(state) in
    READY) ;;
    "") create ;;
    *) # preempted or broken; it does not recover by itself
      run "${tpu[@]}" delete "${where[@]}" --quiet
      until create; do sleep 300; done # capacity may be missing for a while
      ;;
  esac
  install
  # Workers find each other by the slice's metadata (--coordinator auto).
  if everywhere "cd qbheat_jax && ~/venv/bin/qbheat pretrain --coordinator auto$arguments"; then break; fi
  if [ "$(state)" = READY ]; then
    echo "The run failed, but the slice is ready; see the errors above. The same command resumes from the last checkpoint." >&2
    exit 1
  fi
  echo "The slice is lost; creating it again and resuming from the last checkpoint." >&2
  sleep 60
done
if [ -n "$dry" ]; then echo "# after a preemption: delete the slice and repeat all of the above"; fi
if [ -z "${KEEP:-}" ]; then run "${tpu[@]}" delete "${where[@]}" --quiet; fi

#!/usr/bin/env bash
# Trains on a TPU VM slice: creates it, installs this checkout on all its workers, runs on all of them, and where the slice is
# preempted creates it anew and goes on from the last checkpoint. At the end the slice is deleted.
#
#   bash launch/tpu_vm.sh [--dry-run] NAME ZONE TYPE --config FILE --workdir gs://BUCKET/DIR [--config.key value ...]
#   bash launch/tpu_vm.sh my-slice us-west4-a v5litepod-16 --config configs/imagenet_w720.py --workdir gs://my-bucket/w720
#
# Needs gcloud, logged in, with a project. SPOT=1 takes a preemptible slice, KEEP=1 leaves it at the end, VERSION=... overrules
# the runtime. What is committed is what is installed. --dry-run prints the commands.
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
  echo "--workdir must be a gs:// path: the disks of a slice are gone with it" >&2
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
everywhere() { # COMMAND: on all workers
  run "${tpu[@]}" ssh "${where[@]}" --worker=all --command="$1"
}
state() { # READY, PREEMPTED, ..., or nothing where there is no such slice
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
  # The images' own Python is older than what jax takes, so uv brings one.
  everywhere "mkdir -p qbheat_jax && tar -xzf qbheat_jax.tar.gz -C qbheat_jax && python3 -m pip install --quiet --user uv &&
    ~/.local/bin/uv venv --allow-existing --python 3.12 ~/venv &&
    ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e './qbheat_jax[tpu]'"
}

arguments=$(printf ' %q' "$@")
while true; do
  case $(state) in
    READY) ;;
    "") create ;;
    *) # preempted, or broken: it never comes back by itself
      run "${tpu[@]}" delete "${where[@]}" --quiet
      until create; do sleep 300; done # there may be none to be had for a while
      ;;
  esac
  install
  # Workers meet through the slice's metadata (--coordinator auto).
  if everywhere "cd qbheat_jax && ~/venv/bin/qbheat pretrain --coordinator auto$arguments"; then break; fi
  if [ "$(state)" = READY ]; then
    echo "The run ended on a slice that is well; the lines above say why. The same command goes on from the last checkpoint." >&2
    exit 1
  fi
  echo "The slice is gone: once more, from the last checkpoint." >&2
  sleep 60
done
if [ -n "$dry" ]; then echo "# where the slice was preempted: delete it, and all of the above again"; fi
if [ -z "${KEEP:-}" ]; then run "${tpu[@]}" delete "${where[@]}" --quiet; fi

#!/usr/bin/env bash
# Train with several processes on this machine, as several hosts would: to test such a run, or to give each GPU a process.
#
#   bash launch/local_processes.sh [--dry-run] N pretrain --config FILE --workdir DIR [--config.key value ...]
#
# SIGTERM is forwarded to all processes. If one fails, the others are stopped, and its exit code is returned. The same command
# resumes the run.
#
# Environment variables:
#   DEVICES=N  give each process N virtual CPU devices
#   LOGS=DIR   append the output of process I to DIR/I.log (default: all output goes to the terminal)
#   PORT=N     port of process 0 (default: a random port)
set -euo pipefail

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo "usage: $0 [--dry-run] N pretrain --config FILE --workdir DIR [--config.key value ...]" >&2
  exit 2
fi
count=$1
shift
port=${PORT:-$((20000 + RANDOM % 12000))}
if [ -n "${DEVICES:-}" ]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi

pids=()
stop() { # SIGNAL: send it to all running processes
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
trap 'stop TERM' TERM
trap 'stop INT' INT

for ((i = 0; i < count; i++)); do
  command=(qbheat "$@" --coordinator "127.0.0.1:$port" --processes "$count" --process "$i")
  if [ -n "$dry" ]; then
    printf '%q ' "${command[@]}"
    printf '&\n'
  elif [ -n "${LOGS:-}" ]; then
    mkdir -p "$LOGS"
    "${command[@]}" >>"$LOGS/$i.log" 2>&1 &
    pids+=($!)
  else
    "${command[@]}" &
    pids+=($!)
  fi
done

code=0
while [ ${#pids[@]} -gt 0 ]; do
  sleep 0.2
  left=()
  found=0
  for pid in "${pids[@]}"; do
    status=0
    if kill -0 "$pid" 2>/dev/null; then left+=("$pid"); else wait "$pid" || status=$?; fi
    # A process that loses another one aborts (134). If both ended since the last check, the other's status is the cause.
    if [ "$status" -ne 0 ] && { [ "$found" -eq 0 ] || [ "$found" -eq 134 ]; }; then found=$status; fi
  done
  if [ "$found" -ne 0 ] && [ "$code" -eq 0 ]; then
    code=$found
    # After SIGTERM (143) all processes save at the same step, so let them end. Otherwise the rest would wait for the lost one.
    if [ "$code" -ne 143 ]; then stop KILL; fi
  fi
  pids=("${left[@]}")
done
exit "$code"

#!/usr/bin/env bash
# One training run by several processes of this machine, as several hosts would make it: to try that out, or for one process a GPU.
#
#   bash launch/local_processes.sh [--dry-run] N pretrain --config FILE --workdir DIR [--config.key value ...]
#
# DEVICES=4 gives each process four virtual CPU devices. SIGTERM goes on to all of them. Where one ends otherwise than well, the
# others are stopped, since they could only wait for it; the exit code is that of the first. The same command goes on from
# where it stopped. LOGS=DIR keeps what each process says in DIR/I.log; without it all goes to the terminal.
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
stop() { # SIGNAL: to all that still run
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
    # One that hears of another's end aborts (134): the other's status, found in the same look, is the reason.
    if [ "$status" -ne 0 ] && { [ "$found" -eq 0 ] || [ "$found" -eq 134 ]; }; then found=$status; fi
  done
  if [ "$found" -ne 0 ] && [ "$code" -eq 0 ]; then
    code=$found
    # Those that were asked to stop save first, all at the same step; of any other end they would only hear late.
    if [ "$code" -ne 143 ]; then stop KILL; fi
  fi
  pids=("${left[@]}")
done
exit "$code"

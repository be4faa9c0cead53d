#!/usr/bin/env bash
# Train on a TPU slice of GKE. The script builds docker/tpu.Dockerfile from the last commit, pushes the image, and applies
# gke_jobset.yaml, which restarts preempted runs from the last checkpoint.
#
#   bash launch/gke.sh [--dry-run] NAME ACCELERATOR TOPOLOGY IMAGE --config FILE --workdir gs://BUCKET/DIR [--config.key value ...]
#   bash launch/gke.sh w720 tpu-v5-lite-podslice 4x4 REGION-docker.pkg.dev/PROJECT/REPO/qbheat --config configs/imagenet_w720.py \
#     --workdir gs://my-bucket/w720
#
# Requirements: docker, kubectl with the cluster's credentials, JobSet in the cluster, and a node pool of that accelerator and
# topology whose service account can write to the bucket. CHIPS=N sets the chips per host (default: 4). --dry-run prints the
# commands and the manifest without running them.
set -euo pipefail

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 6 ] || [[ "$1$2$3$4" == *--* ]] || ! [[ "$3" =~ ^[0-9]+(x[0-9]+)+$ ]]; then
  echo "usage: $0 [--dry-run] NAME ACCELERATOR TOPOLOGY IMAGE --config FILE --workdir gs://BUCKET/DIR [--config.key value ...]" >&2
  exit 2
fi
name=$1 accelerator=$2 topology=$3 image=$4
shift 4
cd "$(dirname "${BASH_SOURCE[0]}")/.."

chips=${CHIPS:-4}
total=$((${topology//x/*}))
hosts=$((total / chips))
if [ "$hosts" -lt 1 ] || [ $((hosts * chips)) -ne "$total" ]; then
  echo "TOPOLOGY $topology has $total chips, which must be a multiple of the chips per host, CHIPS=$chips" >&2
  exit 2
fi

# Print the arguments as a YAML list of quoted strings.
quoted() {
  local list='"pretrain"' item
  for item in "$@"; do
    item=${item//\\/\\\\}
    list+=", \"${item//\"/\\\"}\""
  done
  printf '%s' "$list"
}
arguments=$(quoted "$@")
manifest() {
  local line
  while IFS= read -r line; do
    case $line in
      \#*) continue ;;
      *"image: IMAGE"*) line=${line/IMAGE/"$image"} ;;
      *"[ARGUMENTS]"*) line=${line/ARGUMENTS/"$arguments"} ;;
    esac
    line=${line/: NAME/": $name"}
    line=${line/: HOSTS/": $hosts"}
    line=${line/: ACCELERATOR/": $accelerator"}
    line=${line/: TOPOLOGY/": $topology"}
    line=${line/: CHIPS/": $chips"}
    printf '%s\n' "$line"
  done <launch/gke_jobset.yaml
}
dockerfile=launch/docker/tpu.Dockerfile

if [ -n "$dry" ]; then
  printf '# git archive HEAD | tar -x -C CONTEXT\n'
  printf '# docker build --tag %q --file CONTEXT/%s CONTEXT, which is:\n' "$image" "$dockerfile"
  sed 's/^/#   /' "$dockerfile"
  printf '# docker push %q\n# kubectl apply --filename - <<END\n' "$image"
  manifest
  printf '# END\n# kubectl logs --follow --selector jobset.sigs.k8s.io/jobset-name=%q\n' "$name"
  exit
fi
# Build from an archive of the last commit, so that no other file of the checkout gets into the image.
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
git archive HEAD | tar -x -C "$context"
docker build --tag "$image" --file "$context/$dockerfile" "$context"
docker push "$image"
manifest | kubectl apply --filename -
echo "kubectl logs --follow --selector jobset.sigs.k8s.io/jobset-name=$name" >&2

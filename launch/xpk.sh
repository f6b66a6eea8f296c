#!/usr/bin/env bash
# A run on a GKE cluster made with xpk, restarted by it when a slice is lost.
#
#   CLUSTER=tpus PROJECT=p ZONE=us-west4-a IMAGE=REGISTRY/o1jax:tpu launch/xpk.sh [--print] \
#     --config configs/quickstart.yaml run.dir=/runs/a mesh.data=-1
#
# Further settings (environment): NAME (o1jax), TYPE (v5litepod-8), SLICES (1), RESTARTS (20),
# XLA_PRESET (none). run.dir lies on storage that the cluster mounts into every pod.
# --print shows the command and does not run it.
set -euo pipefail
cd "$(dirname "$0")/.."
print=0
if [[ "${1:-}" == --print ]]; then print=1; shift; fi
: "${CLUSTER:?set CLUSTER}" "${PROJECT:?set PROJECT}" "${ZONE:?set ZONE}" "${IMAGE:?set IMAGE}"
[[ $# -gt 0 ]] || { echo 'give the arguments of o1jax.train: --config FILE ...' >&2; exit 2; }
preset="$(launch/xla_preset.sh "${XLA_PRESET:-}")"
arguments="$(printf '%q ' "$@")"
command=(
  xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
  --workload="${NAME:-o1jax}" --tpu-type="${TYPE:-v5litepod-8}" --num-slices="${SLICES:-1}"
  --max-restarts="${RESTARTS:-20}" --docker-image="$IMAGE"
  --command="exec python -m o1jax.train ${arguments% }"
)
[[ -z "$preset" ]] || command+=(--env="$preset")
if ((print)); then printf '%q ' "${command[@]}"; echo; else exec "${command[@]}"; fi

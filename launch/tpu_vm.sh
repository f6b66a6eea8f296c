#!/usr/bin/env bash
# A run on a Cloud TPU slice that is asked for as a queued resource, started on all of its workers,
# and asked for again when it is preempted. The same command goes on from the last checkpoint.
#
#   ZONE=us-west4-a MOUNT='sudo mount 10.0.0.2:/runs /mnt/runs' launch/tpu_vm.sh [--print] \
#     --config configs/quickstart.yaml run.dir=/mnt/runs/a mesh.data=-1
#
# Settings (environment): ZONE; MOUNT, a command that mounts the lasting folder of run.dir on a
# worker; NAME (o1jax), TYPE (v5litepod-8), VERSION (v2-alpha-tpuv5-lite), SPOT (1), TRIES (20
# starts in all), POLL_S (60 seconds between looks at the queue), XLA_PRESET (none).
# --print shows every command of an undisturbed run and runs none.
# Exit codes: that of the run; 1 if TRIES are spent.
set -euo pipefail
cd "$(dirname "$0")/.."
print=0
if [[ "${1:-}" == --print ]]; then print=1; shift; fi
: "${ZONE:?set ZONE, e.g. ZONE=us-west4-a}" "${MOUNT:?set MOUNT: a preempted slice loses its disks}"
NAME="${NAME:-o1jax}" TYPE="${TYPE:-v5litepod-8}" VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
[[ $# -gt 0 ]] || { echo 'give the arguments of o1jax.train: --config FILE ...' >&2; exit 2; }
preset="$(launch/xla_preset.sh "${XLA_PRESET:-}")"

call() {
  if ((print)); then printf '%q ' "$@"; echo; else "$@"; fi
}

queue() { call gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }

on_all() {
  call gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

state() {
  if ((print)); then echo ACTIVE; return; fi
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || echo GONE
}

create() {
  local spot=()
  [[ "${SPOT:-1}" == 1 ]] && spot=(--spot)
  queue create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" "${spot[@]}"
}

remove() { queue delete --force --quiet || true; }  # it may be gone already

# Waits for the slice; fails if the request can no longer be filled.
wait_for_slice() {
  while true; do
    case "$(state)" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | GONE) return 1 ;;
      *) sleep "${POLL_S:-60}" ;;
    esac
  done
}

# `&&` throughout: called in a condition, where `set -e` is off.
set_up() {
  local archive=/tmp/o1jax-$$.tar.gz
  call git archive --output="$archive" HEAD &&
    call gcloud compute tpus tpu-vm scp "$archive" "$NAME:o1jax.tar.gz" --zone="$ZONE" --worker=all &&
    on_all "mkdir -p o1jax && tar -xzf o1jax.tar.gz -C o1jax && cd o1jax && python3 -m venv .venv && .venv/bin/pip install -q -e . 'jax[tpu]'" &&
    on_all "$MOUNT"
}

arguments="$(printf '%q ' "$@")"
assignment=""
[[ -z "$preset" ]] || assignment="$(printf 'env %q ' "$preset")"
train="cd o1jax && ${assignment}.venv/bin/python -m o1jax.train ${arguments}"

ready=0 code=1
for ((start = 1; start <= ${TRIES:-20}; start++)); do
  if ((!ready)); then
    create
    if wait_for_slice && set_up; then ready=1; else remove; continue; fi
  fi
  code=0
  on_all "$train" || code=$?
  # 2 is a fault of the config: it would be the same everywhere.
  if ((code == 0 || code == 2)); then remove; exit "$code"; fi
  if [[ "$(state)" != ACTIVE ]]; then
    echo "start $start: preempted (exit $code); asking for the slice again" >&2
    remove
    ready=0
  else
    echo "start $start: exit $code on a slice that stands; the same command again" >&2
  fi
done
echo "gave up after ${TRIES:-20} starts, last exit $code; remove the slice with:" >&2
echo "  gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force" >&2
exit 1

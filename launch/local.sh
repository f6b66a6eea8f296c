#!/usr/bin/env bash
# The quickstart on this machine, over 8 virtual CPU devices: 4-way data, 2-way tensor parallel.
# The same program, mesh and sharding rules as on 8 accelerators; on 2 cores it is slower than the
# plain quickstart, and shows that the layout works.
#
#   launch/local.sh [section.key=value ...] [--stages a,b] [--dry-run]
#   DEVICES=4 launch/local.sh mesh.data=2
#   PROCESSES=2 launch/local.sh            as on two hosts: 2 processes of 4 devices each
#   XLA_PRESET=cpu_fast_compile launch/local.sh
#
# Settings (environment): CONFIG (configs/quickstart.yaml), DEVICES (8, of all processes together),
# PROCESSES (1), PORT (12355, of the coordinator on 127.0.0.1), PYTHON (python3), XLA_PRESET (none).
# Exit code: that of the run, of several processes the largest. Ctrl-C reaches several as SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/.."
processes="${PROCESSES:-1}" devices="${DEVICES:-8}"
if ((processes < 1 || devices % processes)); then
  echo "DEVICES=$devices do not divide over PROCESSES=$processes" >&2
  exit 2
fi
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$((devices / processes))"
preset="$(launch/xla_preset.sh "${XLA_PRESET:-}")"
[[ -z "$preset" ]] || export "${preset?}"
command=("${PYTHON:-python3}" -m o1jax.train --config "${CONFIG:-configs/quickstart.yaml}"
  run.dir=runs/local mesh.data=-1 mesh.tensor=2 "$@")
if ((processes == 1)); then exec "${command[@]}"; fi

export JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-12355}" JAX_NUM_PROCESSES="$processes"
pids=()
# What a script starts in the background ignores SIGINT.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID="$i" "${command[@]}" &
  pids+=("$!")
done
code=0
for pid in "${pids[@]}"; do
  last=0
  # A signal to this shell ends the wait, not the process.
  while wait "$pid" || last=$?; kill -0 "$pid" 2>/dev/null; do last=0; done
  if ((last > code)); then code="$last"; fi
done
exit "$code"

#!/usr/bin/env bash
# The quickstart on this machine, over 8 virtual CPU devices: 4-way data, 2-way tensor parallel.
# The same program, mesh and sharding rules as on 8 accelerators; on 2 cores it is slower than the
# plain quickstart, and shows that the layout works.
#
#   launch/local.sh [section.key=value ...] [--stages a,b] [--dry-run]
#   DEVICES=4 launch/local.sh mesh.data=2
#   XLA_PRESET=cpu_fast_compile launch/local.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-8}"
preset="$(launch/xla_preset.sh "${XLA_PRESET:-}")"
[[ -z "$preset" ]] || export "${preset?}"
exec "${PYTHON:-python3}" -m o1jax.train --config configs/quickstart.yaml \
  run.dir=runs/local mesh.data=-1 mesh.tensor=2 "$@"

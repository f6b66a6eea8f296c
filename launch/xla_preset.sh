#!/usr/bin/env bash
# The environment assignment of a preset in xla_flags.env, one line; nothing without a name.
#
#   launch/xla_preset.sh gpu_overlap   ->  XLA_FLAGS=--xla_gpu_...
set -euo pipefail
name="${1:-}"
[[ -z "$name" ]] && exit 0
file="$(dirname "$0")/xla_flags.env"
flags="$(sed -n "s/^${name}=//p" "$file")"
if [[ -z "$flags" ]]; then
  echo "XLA_PRESET=$name is not in $file; choose from $(sed -n 's/^\([a-z_]*\)=.*/\1/p' "$file" | tr '\n' ' ')" >&2
  exit 2
fi
case "$name" in
  tpu_*) echo "LIBTPU_INIT_ARGS=$flags" ;;
  *) echo "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$flags" ;;
esac

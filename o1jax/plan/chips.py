"""Chips and topologies to plan for. Imports no JAX at its head: what JAX reads is set here first.

The figures are the makers' (sources in docs/scale.md), save the memory of TPUs: that is what their
compiler gives a program, a little less than what the chip has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import MutableMapping
from importlib import metadata
from typing import Any

import psutil
from packaging.requirements import Requirement

from o1jax.config import ConfigError, closest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device; None where it is not known."""

  name: str
  platform: str  # 'tpu': compiled for it; 'cpu': compiled for virtual CPU devices in its place
  traced_for: str  # 'tpu', 'gpu' or 'cpu': its own form of a program
  memory: int | None  # bytes for a program; None: a share of the machine's
  bf16: float | None  # peak FLOP/s of bfloat16 products
  f32: float | None  # of float32 products at JAX's default precision
  bandwidth: float | None  # bytes/s of its memory
  link: float | None  # bytes/s it sends to both neighbours on one axis of the interconnect

  def flops(self, dtype: str) -> float | None:
    """Peak FLOP/s of products of arrays of `dtype`."""
    return self.f32 if dtype == 'float32' else self.bf16


# TPUs multiply float32 arrays in one bfloat16 pass by default, H100 in TF32.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v5e', 'tpu', 'tpu', int(15.75 * GIB), 197e12, 197e12, 819e9, 100e9),
    Chip('v5p', 'tpu', 'tpu', int(95.74 * GIB), 459e12, 459e12, 2765e9, 200e9),
    Chip('v6e', 'tpu', 'tpu', int(31.25 * GIB), 918e12, 918e12, 1600e9, 200e9),
    Chip('h100', 'cpu', 'gpu', 80 * 10**9, 989.4e12, 494.7e12, 3350e9, 450e9),
    Chip('cpu', 'cpu', 'cpu', None, None, None, None, None),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many chips of a kind, as the command line names them: `v5e:4x4`, `h100:8`."""

  chip: Chip
  shape: str  # '4x4', '8'

  @property
  def name(self) -> str:
    """As the command line has it."""
    return f'{self.chip.name}:{self.shape}'

  @property
  def count(self) -> int:
    """Devices."""
    return math.prod(map(int, self.shape.split('x')))

  @property
  def memory(self) -> int:
    """Bytes that a program may take on one device."""
    return self.chip.memory or psutil.virtual_memory().total // self.count


def parse(text: str) -> Topology:
  """Reads `CHIP:SHAPE`.

  Raises:
    ConfigError: an unknown chip, or no shape of positive sizes.
  """
  name, _, shape = text.partition(':')
  if name not in CHIPS:
    known = f'there are {", ".join(CHIPS)}'
    raise _fault(f'no chip {name!r}{closest(name, CHIPS)}; {known}, as in v5e:4x4 or h100:8')
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){0,2}', shape):
    what = 'the slice, as in v5e:4x4' if CHIPS[name].platform == 'tpu' else f'as in {name}:8'
    raise _fault(f'{text!r} has no shape of devices; give {what}')
  return Topology(CHIPS[name], shape)


def prepare(topology: Topology, environ: MutableMapping[str, str] = os.environ) -> None:
  """Sets what JAX reads when it starts: no accelerator, as many virtual CPU devices as it takes."""
  environ['JAX_PLATFORMS'] = 'cpu'
  # No TPU is asked for what it is, and several plans may run at once.
  quiet = {
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_STDERR_LOG_LEVEL': '3',
  }
  for name, value in (quiet | {'TPU_MIN_LOG_LEVEL': '3'}).items():
    environ.setdefault(name, value)
  if topology.chip.platform == 'cpu' and 'device_count' not in environ.get('XLA_FLAGS', ''):
    # What is compiled here is never run: compiling it well would only take longer.
    flags = '--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0'
    environ['XLA_FLAGS'] = f'{environ.get("XLA_FLAGS", "")} {flags.format(topology.count)}'.strip()


def devices(topology: Topology) -> list[Any]:
  """Devices to compile for, without the hardware: of a TPU's description, or virtual CPUs.

  Raises:
    ConfigError: no libtpu, a slice that there is not, or JAX started with fewer virtual devices.
  """
  import jax
  from jax.experimental import topologies

  if topology.chip.platform == 'cpu':
    found = jax.devices('cpu')
    if len(found) < topology.count:
      flag = f'XLA_FLAGS=--xla_force_host_platform_device_count={topology.count}'
      raise _fault(f'{topology.name}: JAX has {len(found)} CPU devices; start it with {flag}')
    return found[: topology.count]
  if importlib.util.find_spec('libtpu') is None:
    raise _fault(
      f'{topology.name}: planning for a TPU takes its compiler, libtpu (no TPU is needed); '
      "pip install 'o1jax[tpu-plan]'"
    )
  try:
    described = topologies.get_topology_desc(platform='tpu', topology_name=topology.name)
  except jax.errors.JaxRuntimeError as error:
    raise _fault(f'{topology.name} is no slice: {str(error).splitlines()[0]}') from None
  if len(described.devices) != topology.count:
    text = f'{len(described.devices)} devices where {topology.count} chips were asked for'
    raise _fault(f'{topology.name}: libtpu describes {text}')
  return list(described.devices)


def unfit_libtpu() -> str | None:
  """What to say of a libtpu of another version than the one that this JAX was made with.

  Its programs may have instructions that JAX's own XLA does not know.
  """
  with contextlib.suppress(metadata.PackageNotFoundError):
    there = metadata.version('libtpu')
    for line in metadata.requires('jax') or ():
      wanted = Requirement(line)
      if wanted.name == 'libtpu' and there not in wanted.specifier:
        text = f'libtpu {there} is not the one for jax {metadata.version("jax")}'
        return f"{text} ({wanted.specifier}); pip install 'o1jax[tpu-plan]'"
  return None


def _fault(text: str) -> ConfigError:
  return ConfigError('--topology', [text])

"""Compiles a step and says what it takes: memory, interconnect, time at the roofline, what fits."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from o1jax.parallel.platform import planned_for
from o1jax.plan.chips import Topology
from o1jax.plan.flops import Flops
from o1jax.plan.hlo import Program
from o1jax.plan.step import Step

# JaxRuntimeError of a compiler that knows the memory: "... Used 21.3G of 15.75G hbm", and others.
_EXHAUSTED = 'RESOURCE_EXHAUSTED'
_USED = re.compile(r'(?:Used|temporaries \(|required \w+ )\s*\(?([\d.]+)([KMGT])')
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of one call if each resource were used at its peak; the longest sets the time."""

  compute: float
  memory: float
  interconnect: float

  @property
  def seconds(self) -> float:
    """At least so long: everything overlaps with everything."""
    return max(self.compute, self.memory, self.interconnect)

  @property
  def bound(self) -> str:
    """What sets the time."""
    times = dataclasses.asdict(self)
    return max(times, key=times.get)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What one step takes on one device, where not said otherwise."""

  step: str
  rows: int
  width: int
  peak_bytes: int | None  # None: the compiler gave up without a figure
  there_bytes: int
  beside_bytes: int  # of parameters that the run holds beside the step's arguments
  fits: bool
  flops: Flops  # of one call, over all devices
  sent_bytes: float | None = None  # to other devices, by collectives
  traffic_bytes: float | None = None  # to and from its memory
  argument_bytes: int | None = None
  largest: tuple[tuple[str, int, str], ...] = ()  # shape, bytes, where it comes from
  roofline: Roofline | None = None
  compile_s: float = 0.0
  largest_rows: int | None = None  # where it does not fit: the most rows that do, 0 for none
  key: str = ''  # the setting that says how many rows


def estimate(
  step: Step,
  topology: Topology,
  dtype: str,
  rows: int = 0,
  beside: int = 0,
  keep: Callable[[str], None] = lambda text: None,
) -> Estimate:
  """Compiles a step and reads what came out.

  Args:
    step: of the run.
    topology: to compile for.
    dtype: of the model, which the peak of the products depends on.
    rows: as many; 0 for the run's.
    beside: bytes of a device that the run holds beside the step.
    keep: is handed the compiled program's text.
  """
  rows = rows or step.rows
  sizes = {'peak_bytes': None, 'there_bytes': topology.memory, 'beside_bytes': beside}
  plain = Estimate(step.name, rows, step.width, fits=False, flops=step.flops(rows), **sizes)
  plain = dataclasses.replace(plain, key=step.key)
  started = time.monotonic()
  try:
    with planned_for(topology.chip.traced_for):
      lowered = step.lower(rows)
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if _EXHAUSTED not in str(error):
      raise
    seconds = time.monotonic() - started
    return dataclasses.replace(plain, peak_bytes=_used(str(error)), compile_s=seconds)
  seconds = time.monotonic() - started
  memory = compiled.memory_analysis()
  peak = peak_bytes(memory, topology.chip.platform)
  known = {'peak_bytes': peak, 'fits': peak + beside <= topology.memory, 'compile_s': seconds}
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError:  # libtpu writes some programs that this XLA cannot read
    return dataclasses.replace(plain, **known)
  keep(text)
  program = Program(text, unknown_trips=step.trips)
  traffic = program.traffic
  if topology.chip.platform == 'cpu':
    # The CPU's fusions are not the chip's: no less than to read what is given and write the result.
    traffic = memory.argument_size_in_bytes + memory.output_size_in_bytes
    traffic *= step.trips
  largest = [(str(shape), shape.bytes, origin) for shape, origin in program.largest(3)]
  return dataclasses.replace(
    plain,
    **known,
    sent_bytes=program.sent,
    traffic_bytes=traffic,
    argument_bytes=memory.argument_size_in_bytes,
    largest=tuple(largest),
    roofline=_roofline(topology, dtype, plain.flops, traffic, program.sent),
  )


def largest_rows(
  step: Step,
  topology: Topology,
  dtype: str,
  beside: int = 0,
  say: Callable[[str], None] = lambda text: None,
) -> int:
  """The most rows that fit, fewer than the run's, by bisection; 0 if not even the fewest do."""
  low, high = 0, step.rows // step.unit
  while high - low > 1:
    middle = (low + high) // 2
    found = estimate(step, topology, dtype, middle * step.unit, beside)
    verdict = 'fits' if found.fits else 'does not fit'
    say(f'{step.name}: {middle * step.unit} rows: {verdict} ({found.compile_s:.0f} s to compile)')
    low, high = (middle, high) if found.fits else (low, middle)
  return low * step.unit


def peak_bytes(memory: Any, platform: str) -> int:
  """The most that lies in a device's memory at once, arguments included.

  Args:
    memory: `compiled.memory_analysis()`.
    platform: 'tpu', whose compiler says it; for 'cpu', whose peak leaves temporaries out, the sum.
  """
  if platform == 'tpu':
    return memory.peak_memory_in_bytes
  kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes


def _roofline(
  topology: Topology, dtype: str, flops: Flops, traffic: float, sent: float
) -> Roofline | None:
  chip = topology.chip
  if chip.flops(dtype) is None:
    return None
  compute = flops.computed / topology.count / chip.flops(dtype)
  return Roofline(compute, traffic / chip.bandwidth, sent / chip.link)


def _used(text: str) -> int | None:
  """Bytes that a compiler says it would have needed."""
  found = [float(n) * _UNITS[unit] for n, unit in _USED.findall(text)]
  return int(max(found)) if found else None

"""One jitted function of a run, ready to be compiled for so many rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from o1jax.models import lora
from o1jax.plan.arguments import Arguments
from o1jax.plan.flops import Flops


@dataclasses.dataclass(frozen=True)
class Step:
  """One jitted function of the run at the run's shapes."""

  name: str
  key: str  # the setting that says how many rows
  rows: int
  unit: int  # rows are a multiple of this
  width: int  # tokens of a row
  lower: Callable[[int], jax.stages.Lowered]  # for so many rows
  flops: Callable[[int], Flops]  # of one call with so many rows
  trips: int = 1  # of a loop that ends when its data says so: at most
  copies: int = 0  # bytes of a device that parameters in a layout of their own take besides


def step(
  given: Arguments, name: str, key: str, rows: int, width: int, lower, count, **more
) -> Step:
  """A `Step` traced within its mesh; `more` are its `unit`, times the ways, and `trips`."""

  def within(n: int) -> jax.stages.Lowered:
    with jax.set_mesh(given.mesh):
      return lower(n)

  unit = given.ways * more.pop('unit', 1)
  return Step(name, key, rows, unit, width, within, count, **more)


def factors(given: Arguments, role: str) -> int:
  """Numbers in the factors of all adapters that a token goes through."""
  found = 0
  names = {'rl': ('policy',), 'prm': ('policy', 'prm')}.get(role, (role,))
  for section in (getattr(given.config.lora, name) for name in names):
    if section.rank:
      spec = lora.Spec(section.rank, section.alpha, section.modules)
      found += lora.factor_count(given.model.shapes(), spec)
  return found

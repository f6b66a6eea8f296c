"""The plan of a run: an estimate of every step, and what they add up to."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from o1jax.config import Config, ConfigError, closest
from o1jax.models import hf, lora
from o1jax.models.transformer import Model
from o1jax.parallel.mesh import make_mesh
from o1jax.plan import chips, counts, measure, steps
from o1jax.plan.arguments import Arguments, device_bytes
from o1jax.plan.chips import GIB, Topology
from o1jax.plan.measure import Estimate
from o1jax.run.progress import Progress
from o1jax.stages.setup import model_folder


@dataclasses.dataclass(frozen=True)
class Plan:
  """What was found."""

  config: Config
  topology: Topology
  model: Model
  mesh: dict[str, int]
  estimates: list[Estimate]
  calls: dict[str, float]  # of each step, over the run
  efficiency: float  # share of the roofline that hours and cost suppose
  price: float | None  # dollars for a chip and hour

  @property
  def hours(self) -> float | None:
    """Of all steps that were estimated; None if one has no time."""
    times = [found.roofline and found.roofline.seconds for found in self.estimates]
    if None in times:
      return None
    pairs = zip(self.estimates, times, strict=True)
    return sum(self.calls[found.step] * t for found, t in pairs) / 3600 / self.efficiency

  @property
  def chip_hours(self) -> float | None:
    """Hours of all chips together."""
    return None if self.hours is None else self.hours * self.topology.count

  @property
  def cost(self) -> float | None:
    """Dollars, at the price given."""
    return None if None in (self.chip_hours, self.price) else self.chip_hours * self.price


def make(
  config: Config,
  topology: Topology,
  *,
  model_config: str | None = None,
  wanted: Sequence[str] | None = None,
  search: bool = True,
  efficiency: float = 1.0,
  price: float | None = None,
  dump: str | None = None,
) -> Plan:
  """Compiles the steps of a run and adds them up.

  Args:
    config: of the run.
    topology: what it shall run on.
    model_config: a Hub config.json in place of that of `model.path`.
    wanted: names of steps; None for all.
    search: look for the most rows of a step that does not fit.
    efficiency: share of the roofline that hours and cost suppose.
    price: dollars for a chip and hour.
    dump: a folder for the compiled programs' text (HLO), a file a step.

  Raises:
    ConfigError: a model, mesh, batch or step that cannot be, or no compiler for the topology.
  """
  progress = Progress(sys.stderr)
  if topology.chip.platform == 'tpu' and (unfit := chips.unfit_libtpu()):
    progress.say(unfit)
  try:
    model = model_of(config, model_config)
    mesh = make_mesh(config.mesh.axes, chips.devices(topology))
    found = steps.of_run(config, model, mesh, topology.memory)
  except (ValueError, OSError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError('plan', [str(error)]) from None
  found, given = _chosen(found, wanted), Arguments(config, model, mesh)
  estimates = []
  for step in found:
    progress.say(f'{step.name}: compiling for {topology.name}')
    beside = beside_bytes(given, step.name) + step.copies
    keep = functools.partial(_write, dump, step.name)
    got = measure.estimate(step, topology, model.config.dtype, beside=beside, keep=keep)
    if search and not got.fits:
      most = measure.largest_rows(step, topology, model.config.dtype, beside, progress.say)
      got = dataclasses.replace(got, largest_rows=most)
    estimates.append(got)
    jax.clear_caches()  # programs of large models take memory that the next one needs
  called = counts.calls(config, found)
  return Plan(config, topology, model, dict(mesh.shape), estimates, called, efficiency, price)


def model_of(config: Config, model_config: str | None = None) -> Model:
  """The run's model, without weights; of the file `model_config` if there is one.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it describes a model that is not implemented.
  """
  path = pathlib.Path(model_config) if model_config else model_folder(config)
  if model_config and path.suffix != '.json':
    raise ValueError(f'--model-config={model_config!r}: expected a Hub config.json')
  model = hf.read_model(path, dtype=config.model.dtype)
  return dataclasses.replace(model, remat=config.model.remat, attention=config.model.attention)


def beside_bytes(given: Arguments, step: str) -> int:
  """Bytes of a device that parameters take which are no arguments of the step."""

  def own(role: str) -> int:
    tree = given.params(role)
    shared = lora.is_adapted(tree)  # its base is there once, and an argument of every step
    return device_bytes(lora.partition(tree)[0] if shared else tree)

  sets = counts.kept(given.config, step)
  sizes = {role: own(role) for role in ('tcg', 'policy', 'prm')}
  sizes |= {'base': 0 if given.config.lora.used else device_bytes(given.base())}
  sizes |= {'moments': own('rl')}
  return sum(n * sizes[role] for role, n in sets.items())


def _write(folder: str | None, step: str, text: str) -> None:
  if folder is not None:
    path = pathlib.Path(folder, f'{step.replace("/", "_")}.hlo.txt')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _chosen(found: list[steps.Step], wanted: Sequence[str] | None) -> list[steps.Step]:
  names = [step.name for step in found]
  unknown = [name for name in wanted or () if name not in names]
  if unknown:
    faults = [f'no step {name!r}{closest(name, names)}' for name in unknown]
    raise ConfigError('--steps', [*faults, f'this run has {", ".join(names)}'])
  return [step for step in found if wanted is None or step.name in wanted]


def to_json(plan: Plan) -> dict[str, Any]:
  """The plan as plain values: bytes, seconds, dollars."""
  rows = []
  for found in plan.estimates:
    row = dataclasses.asdict(found)
    if found.roofline is not None:
      row['roofline'] |= {'seconds': found.roofline.seconds, 'bound': found.roofline.bound}
    rows.append(row | {'calls': plan.calls[found.step]})
  chip = plan.topology.chip
  return {
    'topology': plan.topology.name,
    'devices': plan.topology.count,
    'compiled_for': 'tpu' if chip.platform == 'tpu' else 'virtual CPU devices',
    'mesh': plan.mesh,
    'model': dataclasses.asdict(plan.model.config) | {'remat': plan.model.remat},
    'parameters': sum(x.size for x in jax.tree.leaves(plan.model.shapes())),
    'jax': jax.__version__,
    'steps': rows,
    'run': {
      'tokens_trained': _tokens_trained(plan),
      'tokens_generated': counts.generated(plan.config),
      'hours': plan.hours,
      'chip_hours': plan.chip_hours,
      'cost_usd': plan.cost,
      'efficiency': plan.efficiency,
      'price_usd': plan.price,
    },
  }


def _tokens_trained(plan: Plan) -> int:
  updates = counts.trained(plan.config)
  return sum(
    updates[found.step] * found.rows * found.width
    for found in plan.estimates
    if found.step in updates
  )


def show(plan: Plan) -> None:
  """The plan as tables."""
  progress, topology = Progress(), plan.topology
  count = sum(x.size for x in jax.tree.leaves(plan.model.shapes()))
  mesh = ' '.join(f'{axis}={size}' for axis, size in plan.mesh.items())
  remat = ', layers recomputed' if plan.model.remat else ''
  there = f'{topology.memory / GIB:.2f} GiB each'
  progress.say(f'{topology.name}, {topology.count} devices of {there}, mesh {mesh}')
  progress.say(f'{count:,} parameters in {plan.model.config.dtype}{remat}')
  if topology.chip.platform != 'tpu':
    progress.say(
      'compiled for virtual CPU devices: collectives are those of the same layout; peak memory is '
      "by the CPU's compiler, memory traffic no less than arguments and results once a call"
    )
  columns = ('step', 'rows x tokens', 'peak GiB', 'beside', 'fits', 'TFLOP', 'sent MiB')
  columns += ('compute ms', 'memory ms', 'network ms', 'bound', 'MFU', 'calls')
  progress.table(
    'One call of each step, a device', columns, [_row(plan, e) for e in plan.estimates]
  )
  for found in plan.estimates:
    if not found.fits:
      progress.say(_misfit(found))
    elif found.roofline is None and plan.topology.chip.platform == 'tpu':
      progress.say(f'{found.step}: memory is known; its program could not be read for the rest')
  _show_run(plan, progress)


def _row(plan: Plan, found: Estimate) -> list[Any]:
  line, devices = found.roofline, plan.topology.count
  sizes = [None if n is None else n / GIB for n in (found.peak_bytes, found.beside_bytes)]
  fits = 'yes' if found.fits else 'NO'
  sent = None if found.sent_bytes is None else found.sent_bytes / 2**20
  work = [found.flops.computed / 1e12, sent]
  times, mfu = [None] * 3, None
  if line is not None:
    times = [1e3 * t for t in (line.compute, line.memory, line.interconnect)]
    rate = plan.topology.chip.flops(plan.model.config.dtype) * devices
    mfu = found.flops.useful / line.seconds / rate
  row = [found.step, f'{found.rows} x {found.width}', *sizes, fits, *work, *times]
  row += [line and line.bound, mfu, plan.calls[found.step]]
  return [round(x) if isinstance(x, float) and x >= 100 else x for x in row]


def _misfit(found: Estimate) -> str:
  text = f'{found.step}: {found.rows} rows do not fit'
  if found.largest_rows is None:
    return f'{text} ({found.key})'
  if not found.largest_rows:
    remedy = 'use more chips, model.remat or shorter rows'
    remedy = 'lower search.pool_tokens' if found.step == 'expand' else remedy
    return f'{text}, and not the fewest either; {remedy}'
  return f'{text}; the most that do are {found.largest_rows} ({found.key})'


def _show_run(plan: Plan, progress: Progress) -> None:
  rows = [
    ['tokens trained on', f'{_tokens_trained(plan):,}'],
    ['tokens generated, at most', f'{counts.generated(plan.config):,}'],
  ]
  if plan.hours is not None:
    share = f' at {plan.efficiency:.0%} of the roofline'
    rows += [[f'hours{share}', f'{plan.hours:,.2f}'], ['chip-hours', f'{plan.chip_hours:,.1f}']]
  if plan.cost is not None:
    rows.append([f'cost at ${plan.price:g} a chip-hour', f'${plan.cost:,.0f}'])
  whose = 'the steps above' if len(plan.calls) == len(plan.estimates) else 'the run'
  progress.table(f'The run ({whose}; programs are executed beside it)', ('', 'total'), rows)

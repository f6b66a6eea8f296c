"""From a config to a `Run`, with everything checked before the first step."""

from __future__ import annotations

import dataclasses
import importlib.resources
import logging
import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh

from o1jax.config import Config, ConfigError
from o1jax.data.paths import PathEncoder
from o1jax.data.problems import load_split
from o1jax.data.tokens import Tokenizer
from o1jax.models import hf, lora, nf4
from o1jax.models.backends import choose
from o1jax.models.transformer import Model
from o1jax.parallel import distributed
from o1jax.parallel.join import join
from o1jax.parallel.mesh import make_mesh, meshes_that_fit, start_cpu_devices
from o1jax.parallel.sharding import batch_faults, model_faults, param_shardings, row_faults
from o1jax.run import stop
from o1jax.run.compiled import keep_compiled
from o1jax.run.metrics import Metrics
from o1jax.run.progress import Progress
from o1jax.run.store import Store, check_folder
from o1jax.sandbox.pool import Pool
from o1jax.sandbox.protocol import Limits, SandboxError
from o1jax.stages.context import Run, Workbench
from o1jax.stages.execute import Executor
from o1jax.stages.layout import sampling_faults
from o1jax.types import Problem

logger = logging.getLogger(__name__)


def model_folder(config: Config) -> pathlib.Path:
  """The Hub folder of the base model."""
  if config.model.path == 'embedded':
    return pathlib.Path(str(importlib.resources.files('o1jax') / 'base_model'))
  return pathlib.Path(config.model.path)


@contextmanager
def opened(config: Config, wanted: Sequence[str], force: bool = False) -> Iterator[Run]:
  """A run that is ready for its first stage; closes files and sandbox at the end.

  Raises:
    ConfigError: with every fault of model, mesh, batches, problems and sandbox.
  """
  join(config.distributed)
  start_cpu_devices(config.mesh.axes)
  keep_compiled(config.run.compile_cache)
  mesh, model, tokenizer = distributed.together(lambda: _checked(config))
  with (
    stop.noting(),
    _ambient(mesh),
    Store(config, force) as store,
    Metrics(store.local, config.metrics.tensorboard) as metrics,
    distributed.together(lambda: _pool(config)) as pool,
    _log_file(store.local / 'run.log'),
  ):
    bench = Workbench(store, metrics, Progress(), mesh, config.run.log_every)
    base = distributed.together(lambda: _base(config, mesh))
    encoder = PathEncoder(tokenizer)
    splits = distributed.together(lambda: _splits(config, encoder))
    hosts = f', {distributed.count()} processes' if distributed.count() > 1 else ''
    bench.progress.say(
      f'sandbox tier {pool.tier}; {jax.device_count()} {jax.default_backend()} device{hosts}'
    )
    yield Run(
      config,
      bench,
      tokenizer,
      encoder,
      model,
      base,
      **splits,
      executor=Executor(pool, config.sandbox.headroom),
      wanted=frozenset(wanted) | ({'tcg_tests'} if 'tcg' in wanted else set()),
    )


def dry_run(config: Config, force: bool = False) -> None:
  """Checks files, shapes, memory and the sandbox, says what it found, and does nothing."""
  join(config.distributed)
  start_cpu_devices(config.mesh.axes)
  distributed.from_first(lambda: check_folder(config, force))
  mesh, model, tokenizer = distributed.together(lambda: _checked(config))
  read_split(config, 'dev', PathEncoder(tokenizer))
  progress = Progress()
  with _pool(config) as pool:
    shapes = jax.tree.leaves(model.shapes())
    progress.say(f'model: {sum(x.size for x in shapes):,} parameters, {model.config.architecture}')
    progress.say(f'mesh: {dict(mesh.shape)} of {jax.device_count()} {jax.default_backend()}')
    progress.say(f'largest step: about {step_bytes(config, model) / 2**20:.0f} MiB')
    progress.say(f'sandbox: tier {pool.tier}, {", ".join(pool.layers)}')
    progress.say('dry run: all checks passed, nothing was written')


@contextmanager
def _ambient(mesh: Mesh) -> Iterator[None]:
  """Sampling, search and scoring over the mesh; one device goes without."""
  if mesh.size == 1:
    yield
    return
  with jax.set_mesh(mesh):
    yield


def _base(config: Config, mesh: Mesh) -> Any:
  """The base model's parameters over the mesh; each device reads its own slices.

  Where roles share them they are laid out over a mesh of one device too, once for all.
  """
  place = None
  if mesh.size > 1 or config.lora.used:
    place = lambda model: param_shardings(mesh, model, model.shapes())  # noqa: E731
  _, base = hf.load(model_folder(config), place, dtype=config.model.dtype)
  return lora.quantised(base) if config.lora.base == 'nf4' else base


def _splits(config: Config, encoder: PathEncoder) -> dict[str, tuple[Problem, ...]]:
  found = {name: read_split(config, name, encoder) for name in ('train', 'dev', 'test')}
  train, judge = held_back(config, found['train'])
  return found | {'train': train, 'judge': judge}


def held_back(
  config: Config, problems: tuple[Problem, ...]
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
  """Train problems for all, and those for the PRM alone: the last `data.judge_problems`.

  Raises:
    ConfigError: there are hardly more than are held back.
  """
  data = config.data
  count = len(problems) - data.judge_problems
  if data.judge_problems and count < min(data.judge_problems, data.train_problems):
    raise ConfigError(
      'data',
      [
        f'data.judge_problems={data.judge_problems} of the {len(problems)} train problems of '
        f'data.source={data.source!r} leave {count} to the policy; lower it'
      ],
    )
  return problems[:count], problems[count:]


def step_bytes(config: Config, model: Model) -> int:
  """Rough bytes of the largest training step: state, activations, scores of attention, logits."""
  arch, each = model.config, jnp.dtype(model.config.dtype).itemsize
  width = 14 * arch.hidden_size + 4 * arch.intermediate_size
  kept = 1 if model.remat else arch.num_layers  # layers whose insides are there at once

  def activations(rows: int, columns: int) -> int:
    inside = rows * columns * width * each + 8 * rows * arch.num_heads * columns**2
    return kept * inside + arch.num_layers * rows * columns * arch.hidden_size * each

  columns = config.data.max_prompt_tokens + config.data.max_path_tokens
  optims = [(config.policy_sft.optim, columns, 1), (config.prm.optim, columns, 1)]
  optims += [(config.tcg.sft, config.tcg.row_tokens, 1), (config.tcg.dpo, config.tcg.row_tokens, 2)]
  shapes = [(sides * o.batch // o.accumulate, t) for o, t, sides in optims]
  rows, columns = max([*shapes, (config.rl.minibatch, columns)], key=lambda s: activations(*s))
  logits = min(rows * columns * arch.vocab_size * 4, 64 << 20) * 3
  return state_bytes(config, model) + activations(rows, columns) + logits


def state_bytes(config: Config, model: Model) -> int:
  """Bytes of weights, their gradients and two moments, in the role that needs most.

  The base is there beside the adapters, or beside the weights that a role without one trains.
  """
  shapes = model.shapes()
  each = jnp.dtype(model.config.dtype).itemsize
  whole = sum(x.size for x in jax.tree.leaves(shapes)) * each
  base = whole
  if config.lora.base == 'nf4':  # 4 bits and a float32 for 64 weights
    projections = sum(shapes['layers'][name].size for name in lora.PROJECTIONS)
    base -= int(projections * (each - 0.5 - 4 / nf4.BLOCK))
  needs = []
  for section in (config.lora.policy, config.lora.tcg, config.lora.prm):
    spec = lora.Spec(section.rank, section.alpha, section.modules)
    needs.append(16 * lora.factor_count(shapes, spec) if section.rank else 4 * whole)
  return max(needs) + (base if config.lora.used else 0)


@contextmanager
def _log_file(path: pathlib.Path) -> Iterator[None]:
  """What the project logs while the run is open, the sandbox's tier at every batch included.

  Everything goes into the file, warnings to stderr as well; of several processes, those of the
  others go to their stderr alone.
  """
  logger = logging.getLogger('o1jax')
  stderr = logging.StreamHandler()
  file = (
    logging.FileHandler(path, encoding='utf-8') if distributed.is_first() else logging.NullHandler()
  )
  file.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
  stderr.setLevel(logging.WARNING)
  before = logger.level, logger.propagate
  logger.addHandler(file)
  logger.addHandler(stderr)
  logger.setLevel(logging.INFO)
  logger.propagate = False  # where a library has given the root a handler, it would print all
  try:
    yield
  finally:
    logger.level, logger.propagate = before
    logger.removeHandler(stderr)
    logger.removeHandler(file)
    file.close()


def _checked(config: Config):
  """Mesh, model and tokenizer; all faults of the three in one error."""
  faults: list[str] = []
  mesh = model = tokenizer = None
  folder = model_folder(config)
  try:
    model = hf.read_model(folder, dtype=config.model.dtype)
    model = dataclasses.replace(model, remat=config.model.remat, attention=config.model.attention)
    choose(model.attention, model.config, config.data.max_prompt_tokens)
    tokenizer = Tokenizer(folder, chat=config.model.chat)
    _ = tokenizer.step_end_id, tokenizer.action_ids
  except (ValueError, OSError) as error:
    faults.append(f'model.path={config.model.path!r}: {error}')
  try:
    mesh = make_mesh(config.mesh.axes)
  except ValueError as error:
    faults.append(str(error))
  if mesh is not None:
    faults += _undivided(config, model, mesh)
  if mesh is not None and model is not None:
    faults += sampling_faults(config, model, mesh)
    faults += _attention_faults(config, model, mesh)
    faults += _too_large(config, model, mesh)
  if faults:
    raise ConfigError('run', faults)
  return mesh, model, tokenizer


def _undivided(config: Config, model: Model | None, mesh) -> list[str]:
  """What does not divide over the mesh, and at the end the meshes over which all of it does."""
  faults = _shape_faults(config, model, mesh)
  if not faults:
    return []
  fit = meshes_that_fit(mesh.size, lambda other: not _shape_faults(config, model, other))
  return [*faults, f'for the model and all batches use the mesh {fit}']


def _attention_faults(config: Config, model: Model, mesh) -> list[str]:
  tokens, ways = config.data.max_prompt_tokens, mesh.shape['sequence']
  try:
    choose(model.attention, model.config, tokens, sequence=ways)
  except ValueError as error:
    return [f'model.{error}']
  return []


def row_widths(config: Config) -> dict[str, int]:
  """Tokens of a row in training, by the settings that they come from."""
  data = config.data
  path = data.max_prompt_tokens + data.max_path_tokens
  return {'data.max_prompt_tokens + max_path_tokens': path, 'tcg.row_tokens': config.tcg.row_tokens}


def _shape_faults(config: Config, model: Model | None, mesh) -> list[str]:
  # DPO trains on pairs: half as many rows on either side.
  halves = 2 if config.rl.algorithm == 'dpo' else 1
  sizes = {
    'policy_sft.optim': config.policy_sft.optim.batch,
    'prm.optim': config.prm.optim.batch,
    'tcg.sft': config.tcg.sft.batch,
    'tcg.dpo': config.tcg.dpo.batch,
    'rl.minibatch': max(1, config.rl.minibatch // halves),
  }
  faults = [f'{key}: {fault}' for key, n in sizes.items() for fault in batch_faults(mesh, n)]
  for key, tokens in row_widths(config).items():
    faults += [f'{key}: {fault}' for fault in row_faults(mesh, tokens)]
  return faults if model is None else faults + model_faults(mesh, model, model.shapes())


def _too_large(config: Config, model: Model, mesh) -> list[str]:
  if jax.default_backend() != 'cpu':
    return []  # device memory is the compiler's to judge
  need, there = step_bytes(config, model), psutil.virtual_memory().available
  if need <= there:
    return []
  return [
    f'the largest training step needs about {need / 2**30:.1f} GiB, {there / 2**30:.1f} GiB are '
    'free; lower policy_sft.optim.batch, prm.optim.batch or rl.minibatch, or raise accumulate'
  ]


def read_split(config: Config, name: str, encoder: PathEncoder) -> tuple[Problem, ...]:
  """A split's first problems whose prompts the run can read; the others are counted and told."""
  limit = config.data.max_prompt_tokens
  long: list[int] = []  # tokens of the prompts that are too long
  tagged: list[str] = []  # statements with text that would be read as a control token

  def usable(problem: Problem) -> bool:
    if (token := encoder.tokenizer.control_text(problem.statement)) is not None:
      tagged.append(f'{problem.id} spells out {token!r}')
      return False
    length = len(encoder.prompt(problem))
    if length > limit:
      long.append(length)
    return length <= limit

  def left_out() -> str:
    texts = [f'{len(long)} have more than data.max_prompt_tokens={limit} tokens'] if long else []
    texts[:1] = [f'{text} (from {min(long)} to {max(long)})' for text in texts]
    texts += [f'{len(tagged)} spell out a special token ({tagged[0]})'] if tagged else []
    return f'{name}: {len(long) + len(tagged)} problems left out: {"; ".join(texts)}'

  count = getattr(config.data, f'{name}_problems')
  count += config.data.judge_problems if name == 'train' else 0
  try:
    found = load_split(config.data.source, name, count, seed=0, usable=usable)
  except (ValueError, OSError) as error:
    faults = [left_out()] if long or tagged else []
    raise ConfigError('data', [*faults, str(error)]) from None
  if long or tagged:
    logger.warning('%s', left_out())
  return found


def _pool(config: Config) -> Pool:
  section = config.sandbox
  limits = Limits(
    cpu_s=section.cpu_s,
    wall_factor=section.wall_factor,
    memory_bytes=section.memory_mb << 20,
    output_bytes=section.output_kb << 10,
  )
  try:
    return Pool(section.workers, limits, allow_unsafe=section.allow_unsafe, url=section.url or '')
  except (SandboxError, ValueError) as error:
    raise ConfigError('sandbox', [str(error)]) from None

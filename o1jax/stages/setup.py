"""From a config to a `Run`, with everything checked before the first step."""

from __future__ import annotations

import dataclasses
import importlib.resources
import logging
import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import psutil
from jax.sharding import Mesh

from o1jax.config import Config, ConfigError
from o1jax.data.paths import PathEncoder
from o1jax.data.problems import load_split
from o1jax.data.tokens import Tokenizer
from o1jax.models import hf
from o1jax.models.transformer import Model, Params
from o1jax.parallel import distributed
from o1jax.parallel.join import join
from o1jax.parallel.mesh import make_mesh, meshes_that_fit
from o1jax.parallel.sharding import batch_faults, model_faults, param_shardings
from o1jax.run import stop
from o1jax.run.metrics import Metrics
from o1jax.run.progress import Progress
from o1jax.run.store import Store, check_folder
from o1jax.sandbox.pool import Pool
from o1jax.sandbox.protocol import Limits, SandboxError
from o1jax.stages.context import Run, Workbench
from o1jax.stages.execute import Executor
from o1jax.types import Problem


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
  mesh, model, tokenizer = distributed.together(lambda: _checked(config))
  with (
    stop.noting(),
    _ambient(mesh),
    Store(config, force) as store,
    Metrics(store.dir, config.metrics.tensorboard) as metrics,
    distributed.together(lambda: _pool(config)) as pool,
    _log_file(store.dir / 'run.log'),
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
  distributed.from_first(lambda: check_folder(config, force))
  mesh, model, tokenizer = distributed.together(lambda: _checked(config))
  splits = {name: _split(config, name) for name in ('dev',)}
  _check_prompts(config, PathEncoder(tokenizer), splits)
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


def _base(config: Config, mesh: Mesh) -> Params:
  """The base model's parameters over the mesh; each device reads its own slices."""
  placed = None
  if mesh.size > 1:
    placed = lambda model: param_shardings(mesh, model, model.shapes())  # noqa: E731
  return hf.load(model_folder(config), placed)[1]


def _splits(config: Config, encoder: PathEncoder) -> dict[str, tuple[Problem, ...]]:
  splits = {name: _split(config, name) for name in ('train', 'dev', 'test')}
  _check_prompts(config, encoder, splits)
  return splits


def step_bytes(config: Config, model: Model) -> int:
  """Rough bytes of the largest training step: state, activations and logits in float32."""
  arch = model.config
  weights = sum(x.size for x in jax.tree.leaves(model.shapes())) * 4
  tokens = (config.data.max_prompt_tokens + config.data.max_path_tokens) * max(
    config.policy_sft.optim.batch // config.policy_sft.optim.accumulate,
    config.prm.optim.batch // config.prm.optim.accumulate,
    config.rl.minibatch,
  )
  width = 14 * arch.hidden_size + 4 * arch.intermediate_size
  activations = tokens * arch.num_layers * width * 4
  logits = min(tokens * arch.vocab_size * 4, 64 << 20) * 3
  return 4 * weights + activations + logits


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
    model = dataclasses.replace(hf.read_model(folder), remat=config.model.remat)
    tokenizer = Tokenizer(folder)
    _ = tokenizer.step_end_id, tokenizer.action_ids
  except (ValueError, OSError) as error:
    faults.append(f'model.path={config.model.path!r}: {error}')
  try:
    mesh = make_mesh(config.mesh.model_dump())
  except ValueError as error:
    faults.append(str(error))
  if mesh is not None:
    faults += _undivided(config, model, mesh)
  if mesh is not None and model is not None:
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


def _split(config: Config, name: str) -> tuple[Problem, ...]:
  count = getattr(config.data, f'{name}_problems')
  try:
    return load_split(config.data.source, name, count, seed=0)
  except (ValueError, OSError) as error:
    raise ConfigError('data', [str(error)]) from None


def _check_prompts(config: Config, encoder: PathEncoder, splits) -> None:
  limit = config.data.max_prompt_tokens
  for name, problems in splits.items():
    try:
      longest = max(len(encoder.prompt(p)) for p in problems)
    except ValueError as error:
      raise ConfigError('data', [f'{name}: {error}']) from None
    if longest > limit:
      text = f'data.max_prompt_tokens={limit}, but a {name} prompt has {longest}; use {longest}'
      raise ConfigError('data', [text])


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

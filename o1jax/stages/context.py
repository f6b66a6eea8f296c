"""What every stage is handed: the run's folder, its model, its problems, its sandbox."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from o1jax.config import Config
from o1jax.data.paths import PathEncoder
from o1jax.data.tokens import Tokenizer
from o1jax.models import lora
from o1jax.models.transformer import Model
from o1jax.parallel import distributed
from o1jax.parallel.sharding import param_shardings, replicated, shard
from o1jax.run import bucket, files, stop
from o1jax.run.metrics import Metrics
from o1jax.run.progress import Progress
from o1jax.run.store import Store
from o1jax.sampling.keys import stable_id
from o1jax.stages import layout
from o1jax.stages.execute import Executor
from o1jax.types import Problem


class NotAsked(Exception):
  """The loop reached a stage that `--stages` leaves out and that is not finished."""


@dataclasses.dataclass(frozen=True)
class Workbench:
  """Where a stage writes and how it shows what it does; enough to train on."""

  store: Store
  metrics: Metrics
  progress: Progress
  mesh: Mesh
  log_every: int = 10


@dataclasses.dataclass(frozen=True)
class Run:
  """A whole run; immutable, passed to every stage."""

  config: Config
  bench: Workbench
  tokenizer: Tokenizer
  encoder: PathEncoder
  model: Model
  base: Any  # parameters of the base model
  train: tuple[Problem, ...]
  dev: tuple[Problem, ...]
  test: tuple[Problem, ...]
  judge: tuple[Problem, ...]  # train problems for the PRM alone
  executor: Executor
  wanted: frozenset[str]  # names from --stages; the others must be finished already

  @property
  def row_tokens(self) -> int:
    """Tokens of a row that holds one prompt and one path."""
    return self.config.data.max_prompt_tokens + self.config.data.max_path_tokens

  def new_problems(self, round_: int) -> tuple[Problem, ...]:
    """The training problems that a round searches: the next `data.per_round`, or all for 0."""
    each, count = self.config.data.per_round, len(self.train)
    if not each:
      return self.train
    return tuple(self.train[(round_ * each + i) % count] for i in range(min(each, count)))

  def known_problems(self, round_: int) -> tuple[Problem, ...]:
    """Those of the round and of all rounds before it."""
    each = self.config.data.per_round
    return self.train[: (round_ + 1) * each] if each else self.train

  def adapted(self, params: Any, role: str) -> Any:
    """`params` as `role` ('policy', 'tcg' or 'prm') trains them: with an adapter, where it has one.

    A PRM's is new and lies above the policy's; the others go on with the one that is there.
    """
    return adapted(self.config, params, role)

  def save(self, stage: str, name: str, params: Any) -> None:
    """Keeps what a stage trained; of a tree with adapters these alone."""
    self.bench.store.save_params(stage, name, lora.detached(params))

  def load(self, stage: str, name: str) -> Any:
    """What `save` kept, over the mesh, adapters over the arrays of `base`.

    Raises:
      FileNotFoundError: nothing was kept by that name.
    """
    mesh = self.bench.mesh

    def placed(saved):
      if lora.is_detached(saved):  # factors alone: small, and laid out with the whole below
        return jax.tree.map(lambda _: replicated(mesh), saved)
      return param_shardings(mesh, self.model, saved)

    saved = self.bench.store.load_params(stage, name, placed if mesh.size > 1 else None)
    params = lora.attached(self.base, saved)
    if not lora.is_adapted(params):
      return params
    return shard(params, param_shardings(mesh, self.model, params))

  @contextmanager
  def sampling(self, *trees: Any) -> Iterator[tuple[Any, ...]]:
    """Parameters laid out for sampling, within the mesh that they lie over; see `layout`."""
    mesh = self.bench.mesh
    found = None
    if mesh.size > 1:
      memory = layout.device_memory() if self.config.mesh.sampling == 'auto' else 0
      found = layout.sampling_mesh(self.config, self.model, mesh, trees, memory)
    if found is None:
      yield trees
      return
    with jax.set_mesh(found):
      yield tuple(shard(tree, param_shardings(found, self.model, tree)) for tree in trees)

  def stage(self, name: str, text: str, body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of stage `name`, from its marker or by running `body`.

    `name` is `kind` or `roundN/kind`. The result gains `seconds`, those of
    the session that finished it.

    Raises:
      NotAsked: the stage is not finished and was not asked for.
    """
    store = self.bench.store
    done = store.done(name)
    if done is not None:
      self.bench.progress.say(f'{name}: done already')
      return done
    if name.rsplit('/', 1)[-1] not in self.wanted:
      raise NotAsked(f'stopped before {name}: it is not finished and not in --stages')
    self.bench.progress.stage(name, text)
    stop.pause()
    with timed() as clock:
      result = body()
    result = result | {'seconds': round(clock(), 2)}
    store.finish(name, result)
    if distributed.count() > 1:
      result = store.done(name)  # as the first process, whose clock and record these are, has it
    shown = {k: v for k, v in result.items() if isinstance(v, int | float | str)}
    told = ', '.join(
      f'{k} {v:.3g}' if isinstance(v, float) else f'{k} {v}' for k, v in shown.items()
    )
    self.bench.progress.say(f'{name}: {told}')
    return result

  def seconds(self) -> dict[str, float]:
    """Wall seconds of every finished stage."""
    return distributed.from_first(self._seconds)

  def _seconds(self) -> dict[str, float]:
    folder = self.bench.store.dir / 'stages'
    found = {}
    markers = [path for path in bucket.files_below(folder) if path.name == 'done.json']
    for marker in sorted(markers, key=bucket.modified):
      name = marker.parent.relative_to(folder).as_posix()
      found[name] = files.read_json(marker)['seconds']
    return found

  def write_summary(self, summary: dict[str, Any]) -> None:
    """Writes `summary.json` into the run's folder, in one move; process 0 does."""
    if distributed.is_first():
      files.write_json(self.bench.store.dir / 'summary.json', summary)


def adapted(config: Config, params: Any, role: str) -> Any:
  """See `Run.adapted`."""
  section = getattr(config.lora, role)
  if not section.rank:
    return lora.merged(params) if role == 'prm' and lora.is_adapted(params) else params
  if role != 'prm' and lora.is_adapted(params):
    return params
  spec = lora.Spec(section.rank, section.alpha, section.modules)
  key = jax.random.fold_in(jax.random.key(config.run.seed), stable_id(role))
  return lora.adapt(params, spec, key)


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
  """Wall seconds since entry, by the yielded function."""
  started = time.monotonic()
  yield lambda: time.monotonic() - started

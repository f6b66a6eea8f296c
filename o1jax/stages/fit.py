"""The training loop of every stage: batches in, a trained state out, resumable."""

from __future__ import annotations

from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from o1jax.config import OptimConfig
from o1jax.data.pipeline import Batches
from o1jax.learn.optim import make_optimizer
from o1jax.learn.state import TrainState, init_state
from o1jax.learn.update import LossFn, make_update
from o1jax.models import lora
from o1jax.parallel import distributed
from o1jax.parallel.sharding import batch_sharding, own_rows, param_shardings, shard, shard_own
from o1jax.run.metrics import Lagged
from o1jax.run.stop import deferred
from o1jax.stages.context import Workbench

# A run of batches that all blow up is a fault of the settings, not bad luck.
_MAX_SKIPPED = 20


def optimizer(config: OptimConfig):
  """The optax optimiser that an `OptimConfig` describes."""
  return make_optimizer(
    config.lr,
    steps=config.steps,
    schedule=config.schedule,
    warmup=config.warmup,
    weight_decay=config.weight_decay,
    clip=config.clip or None,
    optimizer=config.optimizer,
  )


def stop_if_broken(label: str, skipped: float) -> None:
  """Raises FloatingPointError if more than 20 updates of `label` were not finite."""
  if skipped > _MAX_SKIPPED:
    raise FloatingPointError(
      f'{label}: {skipped:.0f} updates were not finite and skipped; lower its lr'
    )


def place(bench: Workbench, model, params: Any) -> Any:
  """`params` laid out over the mesh; what is trained of them is a copy, safe to be donated."""
  placed = shard(params, param_shardings(bench.mesh, model, params))
  trained, frozen = lora.partition(placed)
  return lora.combine(jax.tree.map(jnp.copy, trained), frozen)


def over_frozen(loss_fn: LossFn) -> LossFn:
  """The loss as a function of what is trained: `(trained, batch, frozen)`; see `lora.partition`."""
  return lambda trained, batch, frozen: loss_fn(lora.combine(trained, frozen), batch)


def _placed(mesh: Mesh, data: Any, step: int) -> Any:
  """Batch `step` over the mesh; each host reads its own rows where the data can be read so."""
  if distributed.count() == 1 or not isinstance(data, Batches):
    return shard(data[step], batch_sharding(mesh))
  rows = own_rows(mesh, data.batch)
  return shard_own(data.rows(step, rows), mesh, data.batch)


def fit(
  bench: Workbench,
  stage: str,
  name: str,
  model,
  params: Any,
  loss_fn: LossFn,
  data: Batches | grain.MapDataset,
  config: OptimConfig,
) -> tuple[Any, dict[str, float]]:
  """Trains `params` for `config.steps` batches of `data`.

  Batch i is a pure function of i, and the state is saved every
  `run.checkpoint_every_s` seconds and at the step boundary after SIGTERM or SIGINT, so
  a killed stage goes on from its last save and ends with the same parameters.

  Args:
    bench: where to write.
    stage: the stage whose folder holds the checkpoints.
    name: of this training within the stage, for checkpoints, metrics and the bar.
    model: gives the parameters' logical axes.
    params: start; copied, not donated. With adapters only these are trained, and saved.
    loss_fn: see `learn.update`.
    data: element i is batch i, a pytree of NumPy arrays with rows on axis 0.
    config: optimiser, schedule, steps.

  Returns:
    The trained parameters and the last logged metrics.

  Raises:
    FloatingPointError: more than 20 batches gave a loss or gradient that is not finite.
    Stopped: after a save, if a signal asked for it.
  """
  tx = optimizer(config)
  trained, frozen = lora.partition(place(bench, model, params))
  state: TrainState = init_state(trained, tx)
  update = make_update(over_frozen(loss_fn), tx, accumulate=config.accumulate)
  label = f'{stage}/{name}'
  latest: dict[str, float] = {}

  def emit(step: int, values: dict[str, float]) -> None:
    latest.update(values)
    bench.metrics.write(label, step, values)
    stop_if_broken(label, values['skipped'])

  with deferred() as stop, bench.store.checkpoints(stage, name) as saves:
    found = saves.restore(state)
    start = 0
    if found is not None:
      start, state, meta = found
      latest.update(meta.get('latest', {}))  # nothing is logged again if the last step was saved
    bench.metrics.begin(label, after=start)
    with Lagged(emit) as lagged, bench.progress.bar(label, config.steps, start) as bar:
      for step in range(start, config.steps):
        state, scalars = update(state, _placed(bench.mesh, data, step), frozen)
        if (step + 1) % bench.log_every == 0 or step + 1 == config.steps:
          lagged.push(step + 1, scalars)
          bar.update(step + 1, f'loss {latest["loss"]:.4f}' if latest else '')
        if stop.agree(saves.due(), wait=step + 1 == config.steps):
          lagged.flush()
          saves.save(step + 1, state, {'latest': dict(latest)})
        stop.check()
  return lora.combine(state.params, frozen), latest

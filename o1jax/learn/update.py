"""One jitted train step for every loss.

A loss function says what to minimise: `loss_fn(params, batch, *consts) -> (sum, count,
metrics)`, where `metrics` maps a name to another (sum, count). Sums are added over
devices and microbatches and divided by the added counts once, so accumulation changes
nothing but memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from o1jax.batch import StepBatch
from o1jax.learn import microbatch
from o1jax.learn.state import TrainState, state_shardings
from o1jax.parallel.ambient import ambient_ways, sum_over_data

Metrics = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]]


def make_update(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  donate: bool = True,
) -> Update:
  """Build the train step `(state, batch, *consts) -> (state, metrics)`.

  A step whose loss or gradient is not finite leaves parameters and optimiser as they are
  and is counted in `state.skipped`; so does one whose batch has nothing to learn (count
  0), which is counted in `state.empty`.

  `metrics` holds float32 scalars still on the device: `loss`, `grad_norm` (before any
  clip), `count`, `skipped` and `empty` (so far), and those of the loss. Read them one step late and
  the host never waits for the device.

  Args:
    loss_fn: as above; `consts` are passed whole to every microbatch.
    tx: optimiser, from `optim.make_optimizer` or optax.
    accumulate: microbatches a step, on a CPU at least; the batch's rows must divide by it.
    donate: reuse the memory of the state passed in, which is gone afterwards.

  Raises:
    ValueError: `accumulate` is not positive; on the first call, rows do not divide.
  """
  if accumulate < 1:
    raise ValueError(f'accumulate={accumulate} is not a number of microbatches; use 1 or more')

  def step(state: TrainState, batch: Any, *consts: Any) -> tuple[TrainState, Metrics]:
    parts = microbatch.parts_in_cache((state.params, consts), batch, accumulate)
    sums = _accumulated(loss_fn, state.params, batch, consts, parts)
    return _apply(tx, state, *sums)

  return Update(step, donate)


class Update:
  """A jitted train step that keeps a sharded state where it is.

  Without pinned output shardings the compiler may lay the new state out differently,
  and the next call compiles again.
  """

  def __init__(self, step: Callable[..., tuple[TrainState, Metrics]], donate: bool):
    self._step = step
    self._donate = donate
    self._jitted: dict[Any, Callable[..., tuple[TrainState, Metrics]]] = {}

  def __call__(self, state: TrainState, batch: Any, *consts: Any) -> tuple[TrainState, Metrics]:
    """One step; see `make_update`."""
    return self._for(state)(state, batch, *consts)

  def lower(self, state: TrainState, batch: Any, *consts: Any) -> jax.stages.Lowered:
    """Lower for ahead-of-time compilation; `jax.ShapeDtypeStruct`s with shardings will do."""
    return self._for(state).lower(state, batch, *consts)

  def _for(self, state: TrainState) -> Any:
    shardings = state_shardings(state)
    key = None if shardings is None else tuple(jax.tree.leaves(shardings))
    if key not in self._jitted:
      pinned = {} if shardings is None else {'out_shardings': (shardings, None)}
      donated = (0,) if self._donate else ()
      self._jitted[key] = jax.jit(self._step, donate_argnums=donated, **pinned)
    return self._jitted[key]


def run_updates(
  update: Callable[..., tuple[TrainState, Metrics]],
  state: TrainState,
  batches: Iterable[Any],
  *,
  max_kl: float | None = None,
) -> tuple[TrainState, dict[str, float], int]:
  """Updates on the minibatches of one set of rollouts, until the policy has moved enough.

  The metric `old_kl` of `objectives.ppo_loss`, the mean KL of a token from the sampling to
  the present policy (estimator k3, on the minibatch before its update), is held against
  `max_kl`: the update that shows it passed is the last one. Each update is awaited.

  Args:
    update: from `make_update`.
    state: where to start.
    batches: minibatches in order, at least one.
    max_kl: nats a token; None for no limit.

  Returns:
    (state, metrics of the last update, how many had a loss or gradient that is not finite).
    The metrics have `updates` beside them: how many were made.

  Raises:
    ValueError: no minibatch, or a limit on a loss that does not measure `old_kl`.
  """
  made, broken, scalars = 0, 0, {}
  for batch in batches:
    state, metrics = update(state, batch)
    scalars = {name: float(value) for name, value in metrics.items()}
    made += 1
    broken += not (math.isfinite(scalars['loss']) and math.isfinite(scalars['grad_norm']))
    if max_kl is not None:
      if 'old_kl' not in scalars:
        raise ValueError(f'max_kl={max_kl} needs a loss with the metric old_kl; use None')
      if scalars['old_kl'] > max_kl:
        break
  if not made:
    raise ValueError('batches is empty: there is nothing to learn from')
  return state, scalars | {'updates': float(made)}, broken


def _sums(loss_fn: LossFn, params: Any, batch: Any, consts: tuple[Any, ...]) -> Any:
  """(gradient of the summed loss, loss sum, count, metrics) of one microbatch."""

  def total(params):
    loss, count, metrics = loss_fn(params, batch, *consts)
    return loss, (count, metrics)

  (loss, (count, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(params)
  return gradient, loss, count, metrics


def _accumulated(
  loss_fn: LossFn, params: Any, batch: Any, consts: tuple[Any, ...], parts: int
) -> Any:
  """`_sums` of the whole batch, computed one microbatch at a time."""
  if parts == 1:
    return _sums(loss_fn, params, batch, consts)
  rows = [len(x) for x in jax.tree.leaves(batch)]
  # The rows of a `StepBatch` are compared with one another, whoever has them.
  if isinstance(batch, StepBatch) or any(n % (ambient_ways() * parts) for n in rows):
    return _in_turn(loss_fn, params, batch, consts, parts)
  own = lambda batch, params, consts: _in_turn(loss_fn, params, batch, consts, parts)  # noqa: E731
  return sum_over_data(own, batch, params, consts)


def _in_turn(loss_fn: LossFn, params: Any, batch: Any, consts: tuple[Any, ...], parts: int) -> Any:
  batches = microbatch.split(batch, parts)
  first = jax.tree.map(lambda x: x[0], batches)
  shapes = jax.eval_shape(lambda b: _sums(loss_fn, params, b, consts), first)
  # float32: many small bfloat16 gradients would round away one another.
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

  def add(sums, part):
    more = _sums(loss_fn, params, part, consts)
    return jax.tree.map(lambda s, x: s + x.astype(jnp.float32), sums, more), None

  sums, _ = jax.lax.scan(add, zeros, batches)
  return jax.tree.map(lambda s, x: s.astype(x.dtype), sums, shapes)


def _apply(
  tx: optax.GradientTransformation,
  state: TrainState,
  gradient: Any,
  loss: jax.Array,
  count: jax.Array,
  metrics: dict[str, tuple[jax.Array, jax.Array]],
) -> tuple[TrainState, Metrics]:
  """Divide, check, and move the state one step on."""
  divisor = jnp.where(count > 0, count, 1.0)
  gradient = jax.tree.map(lambda g: (g / divisor).astype(g.dtype), gradient)
  norm = optax.tree.norm(gradient)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  good = finite & (count > 0)

  def move(params, opt_state):
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  params, opt_state = jax.lax.cond(
    good, move, lambda params, opt_state: (params, opt_state), state.params, state.opt_state
  )
  state = dataclasses.replace(
    state,
    params=params,
    opt_state=opt_state,
    step=state.step + 1,
    skipped=state.skipped + jnp.where(finite, 0, 1),
    empty=state.empty + jnp.where(finite & ~good, 1, 0),
  )
  own = {'loss': loss / divisor, 'grad_norm': norm, 'count': count}
  own |= {'skipped': state.skipped, 'empty': state.empty}
  means = {name: total / jnp.where(n > 0, n, 1.0) for name, (total, n) in metrics.items()}
  return state, {k: jnp.asarray(v, jnp.float32) for k, v in {**means, **own}.items()}

"""What a train step carries from one batch to the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, optimiser and counters, one pytree to save and to restore."""

  params: Any
  opt_state: optax.OptState
  step: jax.Array  # [] int32, batches seen, the skipped and the empty ones included
  skipped: jax.Array  # [] int32, batches whose loss or gradient was not finite
  empty: jax.Array  # [] int32, batches with nothing to learn


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
  """A fresh state around `params`, laid out over the same mesh as they are.

  The state takes the arrays over: an update that donates its state deletes them, so
  copy what is needed later (a reference policy, say) with `jax.tree.map(jnp.copy, params)`.
  """
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(params, tx.init(params), zero, jnp.copy(zero), jnp.copy(zero))
  meshes = {x.sharding.mesh for x in jax.tree.leaves(params) if _is_named(x)}
  if not meshes:
    return state
  # Optimiser moments inherit their parameter's layout; counters are born on one device
  # and would not go through one jitted call with the rest.
  everywhere = jax.sharding.NamedSharding(meshes.pop(), jax.sharding.PartitionSpec())
  return jax.tree.map(lambda x: x if _is_named(x) else jax.device_put(x, everywhere), state)


def state_shardings(state: TrainState) -> TrainState | None:
  """The layout of a state over its mesh, or None if any part of it has none."""
  leaves, tree = jax.tree.flatten(state)
  if not all(_is_named(x) for x in leaves):
    return None
  return jax.tree.unflatten(tree, [x.sharding for x in leaves])


def _is_named(x: Any) -> bool:
  return isinstance(getattr(x, 'sharding', None), jax.sharding.NamedSharding)

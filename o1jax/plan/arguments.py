"""Abstract arguments of a run's steps: shapes in the layout that the run gives them.

Nothing is allocated. Legend: B rows, T tokens of a row, M steps of a path, P pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from o1jax.batch import PairBatch, RolloutBatch, StepBatch, TokenBatch
from o1jax.config import Config
from o1jax.learn.state import TrainState
from o1jax.models import lora
from o1jax.models.heads import ScalarHead, StepHead, TokenHead
from o1jax.models.transformer import Model
from o1jax.parallel.sharding import RULES, batch_sharding, param_shardings, replicated
from o1jax.stages import prm
from o1jax.stages.context import adapted


@dataclasses.dataclass(frozen=True)
class Arguments:
  """What a run hands to its jitted functions. Hashable by identity of its parts."""

  config: Config
  model: Model
  mesh: Mesh

  @property
  def ways(self) -> int:
    """Devices that share a batch."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']

  @property
  def width(self) -> int:
    """Tokens of a row that holds one prompt and one path."""
    return self.config.data.max_prompt_tokens + self.config.data.max_path_tokens

  def base(self) -> Any:
    """The base model's parameters."""
    shapes = self.model.shapes()
    if self.config.lora.base == 'nf4':
      shapes = jax.eval_shape(lora.quantised, shapes)
    return self.placed(shapes)

  def params(self, role: str) -> Any:
    """Parameters of 'policy', 'tcg', 'prm' or of the RL's loss, 'rl', as they are trained."""
    return getattr(self, f'_{role}')

  @functools.cached_property
  def _policy(self) -> Any:
    return self._adapted(self.base(), 'policy')

  @functools.cached_property
  def _tcg(self) -> Any:
    return self._adapted(self.base(), 'tcg')

  @functools.cached_property
  def _prm(self) -> Any:
    c, readout = self.model.config, self.config.prm.readout
    trunk = self._adapted(self._policy, 'prm')
    if readout == 'value':
      head = jax.eval_shape(lambda: StepHead.init(c))
    else:
      output = self.model.output_rows
      head = jax.eval_shape(lambda trunk: TokenHead.init(output(trunk), 0, 1), trunk)
    return self.placed({'trunk': trunk, 'head': head})

  @functools.cached_property
  def _rl(self) -> Any:
    policy, config = self._policy, self.config.rl
    if config.algorithm != 'ppo':
      return policy
    head = jax.eval_shape(lambda: ScalarHead.init(self.model.config))
    critic = {'trunk': policy, 'head': head} if config.critic == 'own' else head
    return self.placed({'policy': policy, 'critic': critic})

  def _adapted(self, params: Any, role: str) -> Any:
    return self.placed(jax.eval_shape(lambda tree: adapted(self.config, tree, role), params))

  def state(self, role: str, tx: optax.GradientTransformation) -> tuple[TrainState, Any]:
    """A train state of what a role trains, and what stays frozen beside it."""
    trained, frozen = lora.partition(self.params(role))
    whole, like = replicated(self.mesh), jax.tree.structure(trained)

    def laid_out(node):  # moments lie as their parameters do, counters whole
      if jax.tree.structure(node) != like:
        return at(node, whole)
      return jax.tree.map(lambda x, y: at(x, y.sharding), node, trained)

    moments = jax.eval_shape(tx.init, trained)
    moments = jax.tree.map(laid_out, moments, is_leaf=lambda x: jax.tree.structure(x) == like)
    count = at(jax.ShapeDtypeStruct((), jnp.int32), whole)
    return TrainState(trained, moments, count, count, count), frozen

  def placed(self, tree: Any) -> Any:
    """Parameters, or a tree around them, in the run's layout."""
    return jax.tree.map(at, tree, param_shardings(self.mesh, self.model, tree))

  def rows(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array of rows over `data` and `fsdp`."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

  def whole(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array that lies whole on every device."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

  def by_rows(self, tree: Any, rows: int) -> Any:
    """Arrays of so many rows over `data` and `fsdp`, everything else whole."""
    split, whole = batch_sharding(self.mesh), replicated(self.mesh)
    return jax.tree.map(lambda x: at(x, split if x.shape[:1] == (rows,) else whole), tree)

  def by_heads(self, tree: Any, first: Any) -> Any:
    """Arrays whose first axis lies as `first` says, the second, of key heads, over `tensor`."""
    ways = self.mesh.shape[RULES['kv_heads']]
    heads = RULES['kv_heads'] if self.model.config.num_kv_heads % ways == 0 else None
    layout = NamedSharding(self.mesh, PartitionSpec(first, heads))
    return jax.tree.map(lambda x: at(x, layout), tree)

  def token_batch(self, rows: int, width: int) -> TokenBatch:
    """For SFT, and for what only reads."""
    ids = self.rows(rows, width)
    return TokenBatch(ids, ids, ids, self.rows(rows, width, dtype=jnp.float32))

  def pair_batch(self, rows: int, width: int) -> PairBatch:
    """For DPO."""
    side, sums = self.token_batch(rows, width), self.rows(rows, dtype=jnp.float32)
    return PairBatch(side, side, sums, sums)

  def step_batch(self, rows: int, width: int) -> StepBatch:
    """For the PRM."""
    ids, pairs = self.rows(rows, width), prm.PAIRS_A_ROW * rows
    labels = self.rows(rows, self.config.search.depth_limit, dtype=jnp.float32)
    weights = self.rows(pairs, dtype=jnp.float32)
    return StepBatch(ids, ids, ids, ids, labels, labels, self.rows(pairs, 3), weights)

  def rollout_batch(self, rows: int, width: int) -> RolloutBatch:
    """For PPO."""
    ids, values = self.rows(rows, width), self.rows(rows, width, dtype=jnp.float32)
    floats = [values] * 6  # mask, two log-probs, old values, advantages, returns
    weights = self.rows(rows, dtype=jnp.float32)
    return RolloutBatch(*(ids, ids, ids, ids), *floats, weights, self.rows(rows))


def at(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  """The shape of `x` with a layout."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def device_bytes(tree: Any) -> int:
  """Bytes of a tree on one device."""
  leaves = jax.tree.leaves(tree)
  return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)

"""Adds returns to the nodes they were seen below."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from o1jax.search.tree import NO_PARENT, SearchTree, at_node


@jax.jit
def backup(tree: SearchTree, nodes: jax.Array, values: jax.Array, valid: jax.Array) -> SearchTree:
  """Adds each return to its node and every ancestor, the root included.

  Args:
    tree: B trees.
    nodes: [B, K] int32, where each return was seen; a node may stand there twice.
    values: [B, K] float32, the returns, in [0, 1].
    valid: [B, K] bool. False for cut or masked roll-outs and for nodes that were
      not made: such a return changes nothing, whatever its value (NaN included).

  Returns:
    The trees with `visits` and `value_sum` raised.
  """
  rows = jnp.arange(tree.shape[0])[:, None]
  values = jnp.where(valid, values, 0.0).astype(jnp.float32)

  def upwards(carry):
    visits, value_sum, node = carry
    into = rows, jnp.where(node == NO_PARENT, tree.shape[1], node)  # out of range: dropped
    visits = visits.at[into].add(1, mode='drop')
    value_sum = value_sum.at[into].add(values, mode='drop')
    parent = at_node(tree.parent, jnp.maximum(node, 0))
    return visits, value_sum, jnp.where(node == NO_PARENT, NO_PARENT, parent)

  visits, value_sum, _ = jax.lax.while_loop(
    lambda carry: (carry[2] != NO_PARENT).any(),
    upwards,
    (tree.visits, tree.value_sum, jnp.where(valid & (nodes >= 0), nodes, NO_PARENT)),
  )
  return dataclasses.replace(tree, visits=visits, value_sum=value_sum)

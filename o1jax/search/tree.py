"""The forest: one search tree per problem, all of them in one frozen pytree.

Legend: B trees, N nodes a tree (its capacity), K children a node. Node `ROOT`
is the state after the prompt; every other node is the state after one more
step. Shapes are fixed: a tree that runs out of nodes is marked `full` and
expands no further.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

ROOT = 0  # index of every tree's root
NO_PARENT = -1  # parent of the root
UNVISITED = -1  # a child slot with no node behind it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchTree:
  """B search trees. A node's value is its mean return, `value_sum / visits`.

  A node is `closed` when nothing below it can be expanded: it is terminal, it
  was cut, or all its children are closed. Selection never enters a closed node,
  so no simulation is spent on what is known already.
  """

  visits: jax.Array  # [B, N] int32, returns backed up through the node
  picks: jax.Array  # [B, N] int32, expansions at the node and below it
  value_sum: jax.Array  # [B, N] float32, their sum
  children: jax.Array  # [B, N, K] int32 node indices or UNVISITED
  parent: jax.Array  # [B, N] int32 node index or NO_PARENT
  identity: jax.Array  # [B, N] int32, equal for equal steps of one parent
  logprob: jax.Array  # [B, N] float32, log-prob of the step that leads here
  prior: jax.Array  # [B, N] float32, softmax of `logprob` over the siblings
  score: jax.Array  # [B, N] float32, the process reward of that step, 0 if unknown
  gumbel: jax.Array  # [B, N] float32, noise of the node, for Gumbel's root
  depth: jax.Array  # [B, N] int32, steps from the root
  terminal: jax.Array  # [B, N] bool, the step is the program
  cut: jax.Array  # [B, N] bool, at the depth limit: marked, not scored
  closed: jax.Array  # [B, N] bool
  size: jax.Array  # [B] int32, nodes in use
  full: jax.Array  # [B] bool, an expansion was refused for want of nodes

  @property
  def shape(self) -> tuple[int, int, int]:
    """(B trees, N nodes, K children)."""
    return self.children.shape

  @property
  def means(self) -> jax.Array:
    """Mean return of each node, [B, N] float32; 0 where there are no visits."""
    return self.value_sum / jnp.maximum(self.visits, 1)

  @property
  def expanded(self) -> jax.Array:
    """Which nodes have children, [B, N] bool."""
    return (self.children != UNVISITED).any(-1)


def empty_tree(batch: int, capacity: int, width: int) -> SearchTree:
  """`batch` trees of a root each, with room for `capacity` nodes of `width` children.

  Raises:
    ValueError: the capacity does not hold the root and its children.
  """
  if capacity < 1 + width:
    raise ValueError(
      f'capacity={capacity} nodes cannot hold a root and its width={width} children; '
      f'use 1 + width * simulations'
    )
  nodes = (batch, capacity)
  return SearchTree(
    visits=jnp.zeros(nodes, jnp.int32),
    picks=jnp.zeros(nodes, jnp.int32),
    value_sum=jnp.zeros(nodes, jnp.float32),
    children=jnp.full((*nodes, width), UNVISITED, jnp.int32),
    parent=jnp.full(nodes, NO_PARENT, jnp.int32),
    identity=jnp.zeros(nodes, jnp.int32),
    logprob=jnp.zeros(nodes, jnp.float32),
    prior=jnp.zeros(nodes, jnp.float32),
    score=jnp.zeros(nodes, jnp.float32),
    gumbel=jnp.zeros(nodes, jnp.float32),
    depth=jnp.zeros(nodes, jnp.int32),
    terminal=jnp.zeros(nodes, bool),
    cut=jnp.zeros(nodes, bool),
    closed=jnp.zeros(nodes, bool),
    size=jnp.ones(batch, jnp.int32),
    full=jnp.zeros(batch, bool),
  )


def at_node(field: jax.Array, node: jax.Array) -> jax.Array:
  """`field[b, node[b]]` for every tree; node is [B] or [B, K], field [B, N, ...]."""
  rows = jnp.arange(field.shape[0]).reshape(-1, *(1,) * (node.ndim - 1))
  return field[rows, node]

"""Adds the sampled steps of a leaf to its tree; equal steps become one node."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from o1jax.search.tree import NO_PARENT, UNVISITED, SearchTree, at_node


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewChildren:
  """K sampled steps for one leaf of each of B trees."""

  identity: jax.Array  # [B, K] int32, equal for equal steps of one leaf
  logprob: jax.Array  # [B, K] float32, log-prob of the step
  score: jax.Array  # [B, K] float32, process reward, 0 if unknown
  terminal: jax.Array  # [B, K] bool
  cut: jax.Array  # [B, K] bool, not terminal and at the depth limit
  valid: jax.Array  # [B, K] bool, False: no such child


@jax.jit
def expand(tree: SearchTree, leaf: jax.Array, new: NewChildren) -> tuple[SearchTree, jax.Array]:
  """Gives `leaf` its children. A node is expanded once.

  Siblings of equal `identity` are one node (its returns add up in `backup`).
  Nothing is added to a leaf that is closed or has children, nor to a tree
  without room for K more nodes, which is marked `full`.

  Args:
    tree: B trees.
    leaf: [B] int32, the node to expand in each.
    new: its children.

  Returns:
    The trees and the node of every child, [B, K] int32; UNVISITED where none was made.
  """
  batch, capacity, width = tree.shape
  wanted = ~at_node(tree.expanded, leaf) & ~at_node(tree.closed, leaf) & new.valid.any(-1)
  room = tree.size + width <= capacity
  valid = new.valid & (wanted & room)[:, None]

  earlier = jnp.tril(jnp.ones((1, width, width), bool))  # [., k, j]: j <= k
  equal = (new.identity[:, :, None] == new.identity[:, None, :]) & valid[:, None, :] & earlier
  first = jnp.argmax(equal, -1)  # [B, K], the first sibling that is the same step
  unique = valid & (first == jnp.arange(width)[None])
  index = tree.size[:, None] + jnp.cumsum(unique, -1) - 1
  nodes = jnp.where(valid, jnp.take_along_axis(index, first, -1), UNVISITED)

  rows = jnp.arange(batch)
  into = rows[:, None], jnp.where(unique, nodes, capacity)  # out of range: dropped
  scaled = jnp.where(unique, new.logprob, -jnp.inf)
  prior = jax.nn.softmax(jnp.where(unique.any(-1, keepdims=True), scaled, 0.0), -1)

  def write(field, value):
    return field.at[into].set(value, mode='drop')

  slots = jnp.where(unique, nodes, at_node(tree.children, leaf))
  tree = dataclasses.replace(
    tree,
    children=tree.children.at[rows, leaf].set(slots),
    parent=write(tree.parent, leaf[:, None]),
    logprob=write(tree.logprob, new.logprob),
    prior=write(tree.prior, prior),
    score=write(tree.score, new.score),
    depth=write(tree.depth, at_node(tree.depth, leaf)[:, None] + 1),
    terminal=write(tree.terminal, new.terminal),
    cut=write(tree.cut, new.cut),
    closed=write(tree.closed, new.terminal | new.cut),
    size=tree.size + unique.sum(-1, dtype=jnp.int32),
    full=tree.full | (wanted & ~room),
  )
  return _close(tree, leaf), nodes.astype(jnp.int32)


def _close(tree: SearchTree, leaf: jax.Array) -> SearchTree:
  """Closes `leaf` and its ancestors as far up as all children are closed."""
  rows = jnp.arange(leaf.shape[0])

  def exhausted(closed, node):
    slots = at_node(tree.children, node)
    child_closed = at_node(closed, jnp.maximum(slots, 0)) | (slots == UNVISITED)
    return (slots != UNVISITED).any(-1) & child_closed.all(-1)

  def upwards(carry):
    closed, node = carry
    here = (node != NO_PARENT) & exhausted(closed, jnp.maximum(node, 0))
    into = rows, jnp.where(here, node, tree.shape[1])
    closed = closed.at[into].set(True, mode='drop')
    return closed, jnp.where(here, at_node(tree.parent, jnp.maximum(node, 0)), NO_PARENT)

  closed, _ = jax.lax.while_loop(
    lambda carry: (carry[1] != NO_PARENT).any(), upwards, (tree.closed, leaf)
  )
  return dataclasses.replace(tree, closed=closed)

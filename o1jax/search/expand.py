"""Adds the sampled steps of a leaf to its tree; equal steps become one node."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from o1jax.search.tree import NO_PARENT, UNVISITED, SearchTree, at_node


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewChildren:
  """k sampled steps for one leaf of each of B trees."""

  identity: jax.Array  # [B, k] int32, equal for equal steps of one leaf
  logprob: jax.Array  # [B, k] float32, log-prob of the step
  score: jax.Array  # [B, k] float32, process reward, 0 if unknown
  gumbel: jax.Array  # [B, k] float32, noise
  terminal: jax.Array  # [B, k] bool
  cut: jax.Array  # [B, k] bool, not terminal and at the depth limit
  valid: jax.Array  # [B, k] bool, False: no such child


@functools.partial(jax.jit, static_argnames='widen')
def expand(
  tree: SearchTree, leaf: jax.Array, new: NewChildren, *, widen: bool = False
) -> tuple[SearchTree, jax.Array]:
  """Gives `leaf` its children. A node is expanded once, or more often with `widen`.

  Siblings of equal `identity` are one node (its returns add up in `backup`).
  Nothing is added to a leaf that is closed or (without `widen`) has children, nor to a tree
  without room for k more nodes, which is marked `full`.

  Args:
    tree: B trees of K children a node.
    leaf: [B] int32, the node to expand in each.
    new: its children, k of K; with `widen` those beyond the leaf's free slots are dropped.
    widen: a leaf may have children, to which these come; such a node is closed when
      all its slots are taken and all children are closed.

  Returns:
    The trees and the node of every child, [B, k] int32; UNVISITED where there is none.
  """
  batch, capacity, slots = tree.shape
  width = new.valid.shape[1]
  wanted = ~at_node(tree.closed, leaf) & new.valid.any(-1)
  if not widen:
    wanted &= ~at_node(tree.expanded, leaf)
  room = tree.size + width <= capacity
  valid = new.valid & (wanted & room)[:, None]
  old = at_node(tree.children, leaf)  # [B, K]

  matches = (at_node(tree.identity, jnp.maximum(old, 0))[:, None] == new.identity[:, :, None]) & (
    old != UNVISITED
  )[:, None]  # [B, k, K]
  known = valid & matches.any(-1)
  fresh, first = _first_of_equals(new.identity, valid & ~known)
  rank = jnp.cumsum(fresh, -1) - 1  # [B, k], the fresh ones counted
  free = (old == UNVISITED).sum(-1, keepdims=True)
  fresh &= rank < free
  made = jnp.where(fresh, tree.size[:, None] + rank, UNVISITED)
  nodes = jnp.take_along_axis(made, first, -1)
  nodes = jnp.where(known, jnp.take_along_axis(old, matches.argmax(-1), -1), nodes)
  nodes = jnp.where(valid, nodes, UNVISITED)

  rows = jnp.arange(batch)
  into = rows[:, None], jnp.where(fresh, made, capacity)  # out of range: dropped
  taken = slots - free  # children stand in the first slots
  children = tree.children.at[
    rows[:, None], leaf[:, None], jnp.where(fresh, taken + rank, slots)
  ].set(made, mode='drop')

  def write(field, value):
    return field.at[into].set(value, mode='drop')

  tree = dataclasses.replace(
    tree,
    children=children,
    parent=write(tree.parent, leaf[:, None]),
    identity=write(tree.identity, new.identity),
    logprob=write(tree.logprob, new.logprob),
    score=write(tree.score, new.score),
    gumbel=write(tree.gumbel, new.gumbel),
    depth=write(tree.depth, at_node(tree.depth, leaf)[:, None] + 1),
    terminal=write(tree.terminal, new.terminal),
    cut=write(tree.cut, new.cut),
    closed=write(tree.closed, new.terminal | new.cut),
    size=tree.size + fresh.sum(-1, dtype=jnp.int32),
    full=tree.full | (wanted & ~room),
  )
  tree = _with_priors(tree, leaf)
  tree = dataclasses.replace(tree, picks=_picked(tree, leaf, valid.any(-1)))
  return _close(tree, leaf, widen), nodes.astype(jnp.int32)


def _first_of_equals(identity: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Which of k are the first of their kind [B, k], and where the first like each is [B, k]."""
  width = identity.shape[1]
  earlier = jnp.tril(jnp.ones((1, width, width), bool))  # [., k, j]: j <= k
  equal = (identity[:, :, None] == identity[:, None, :]) & valid[:, None, :] & earlier
  first = jnp.argmax(equal, -1)
  return valid & (first == jnp.arange(width)[None]), first


def _with_priors(tree: SearchTree, leaf: jax.Array) -> SearchTree:
  """The priors of the children of `leaf`: softmax of their log-probs."""
  rows = jnp.arange(leaf.shape[0])[:, None]
  slots = at_node(tree.children, leaf)
  there = slots != UNVISITED
  logprob = jnp.where(there, at_node(tree.logprob, jnp.maximum(slots, 0)), -jnp.inf)
  prior = jax.nn.softmax(jnp.where(there.any(-1, keepdims=True), logprob, 0.0), -1)
  into = rows, jnp.where(there, slots, tree.shape[1])
  return dataclasses.replace(tree, prior=tree.prior.at[into].set(prior, mode='drop'))


def _picked(tree: SearchTree, leaf: jax.Array, expanded: jax.Array) -> jax.Array:
  """Picks [B, N] with one more of `leaf` and all its ancestors, where it was expanded."""
  rows = jnp.arange(leaf.shape[0])

  def upwards(carry):
    picks, node = carry
    picks = picks.at[rows, jnp.where(node == NO_PARENT, tree.shape[1], node)].add(1, mode='drop')
    parent = at_node(tree.parent, jnp.maximum(node, 0))
    return picks, jnp.where(node == NO_PARENT, NO_PARENT, parent)

  picks, _ = jax.lax.while_loop(
    lambda carry: (carry[1] != NO_PARENT).any(),
    upwards,
    (tree.picks, jnp.where(expanded, leaf, NO_PARENT)),
  )
  return picks


def _close(tree: SearchTree, leaf: jax.Array, widen: bool) -> SearchTree:
  """Closes `leaf` and its ancestors as far up as all children are closed."""
  rows = jnp.arange(leaf.shape[0])

  def exhausted(closed, node):
    slots = at_node(tree.children, node)
    there = slots != UNVISITED
    enough = there.all(-1) if widen else there.any(-1)
    return enough & (at_node(closed, jnp.maximum(slots, 0)) | ~there).all(-1)

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

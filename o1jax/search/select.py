"""Which leaf to look at next: UCT (Kocsis & Szepesvari 2006) and PUCT (Silver et al. 2017).

A rule maps what is known of a node's children to a score per child; selection
walks down by the best score. Rules and schedules are plain functions: pass your own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from o1jax.search.tree import ROOT, UNVISITED, SearchTree, at_node


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChildStats:
  """What a rule may look at: the children of one node in each of B trees."""

  visits: jax.Array  # [B, K] int32
  means: jax.Array  # [B, K] float32, mean return, 0 where unvisited
  prior: jax.Array  # [B, K] float32, sums to 1 over the siblings
  score: jax.Array  # [B, K] float32, process reward
  parent_visits: jax.Array  # [B] int32


Rule = Callable[[ChildStats, jax.Array], jax.Array]  # (children, c) -> [B, K]


def uct(children: ChildStats, c: jax.Array) -> jax.Array:
  """`Q/N + c sqrt(ln N_parent / N)`, infinite for a child without visits; [B, K]."""
  visits = jnp.maximum(children.visits, 1)
  log_parent = jnp.log(jnp.maximum(children.parent_visits, 1).astype(jnp.float32))
  scores = children.means + c * jnp.sqrt(log_parent[:, None] / visits)
  return jnp.where(children.visits == 0, jnp.inf, scores)


def puct(children: ChildStats, c: jax.Array) -> jax.Array:
  """`Q/N + c P sqrt(N_parent) / (1 + N)`; the process reward stands in for Q/N of an
  unvisited child; [B, K].
  """
  parent = jnp.sqrt(jnp.maximum(children.parent_visits, 1).astype(jnp.float32))
  value = jnp.where(children.visits == 0, children.score, children.means)
  return value + c * children.prior * parent[:, None] / (1 + children.visits)


def constant(progress: float) -> float:
  """Exploration factor 1 throughout."""
  del progress
  return 1.0


def linear(progress: float) -> float:
  """From 1 to a tenth in a straight line; `progress` in [0, 1]."""
  return 1.0 - 0.9 * progress


def exponential(progress: float) -> float:
  """From 1 to a tenth geometrically; `progress` in [0, 1]."""
  return 0.1**progress


@functools.partial(jax.jit, static_argnames='rule')
def select(tree: SearchTree, rule: Rule, c: jax.Array | float = 2.0) -> jax.Array:
  """Walks from the root to a node without children by the best score at every node.

  Closed children are never entered and ties go to the earlier child. Where the
  root itself is closed there is nothing to select: its own index comes back.

  Returns:
    [B] int32, the chosen leaf of each tree.
  """

  def descend(node):
    slots = at_node(tree.children, node)  # [B, K]
    child = jnp.maximum(slots, 0)
    stats = ChildStats(
      visits=at_node(tree.visits, child),
      means=at_node(tree.means, child),
      prior=at_node(tree.prior, child),
      score=at_node(tree.score, child),
      parent_visits=at_node(tree.visits, node),
    )
    open_ = (slots != UNVISITED) & ~at_node(tree.closed, child)
    scores = jnp.where(open_, rule(stats, c), -jnp.inf)
    best = jnp.take_along_axis(slots, jnp.argmax(scores, -1)[:, None], -1)[:, 0]
    return jnp.where(open_.any(-1), best, node)

  def inner(node):
    return (at_node(tree.expanded, node) & ~at_node(tree.closed, node)).any()

  start = jnp.full(tree.size.shape, ROOT, jnp.int32)
  return jax.lax.while_loop(inner, descend, start)

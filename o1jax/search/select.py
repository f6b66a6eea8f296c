"""Which leaf to look at next: UCT (Kocsis & Szepesvari 2006) and PUCT (Silver et al. 2017).

A rule maps what is known of a node's children to a score per child; selection
walks down by the best score. Rules and schedules are plain functions: pass your own.
Gumbel's rules are in `gumbel`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from o1jax.search.tree import ROOT, UNVISITED, SearchTree, at_node


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChildStats:
  """What a rule may look at: the children of one node in each of B trees."""

  exists: jax.Array  # [B, K] bool, a slot with a child in it; the rest of the row is arbitrary
  visits: jax.Array  # [B, K] int32
  picks: jax.Array  # [B, K] int32, selections that went through the child
  means: jax.Array  # [B, K] float32, mean return, 0 where unvisited
  prior: jax.Array  # [B, K] float32, sums to 1 over the siblings
  score: jax.Array  # [B, K] float32, process reward
  gumbel: jax.Array  # [B, K] float32, the child's noise
  parent_visits: jax.Array  # [B] int32
  parent_score: jax.Array  # [B] float32


Rule = Callable[[ChildStats, jax.Array], jax.Array]  # (children, c) -> [B, K]
Allowed = Callable[[jax.Array], jax.Array]  # visits of nodes -> children they may have, [B] each


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


@functools.cache
def widening(factor: float, power: float) -> Allowed:
  """Progressive widening (Couetoux et al. 2011): a node of n visits may have
  `factor * n^power` children, rounded up.

  Raises:
    ValueError: `factor` is not positive, or `power` not in [0, 1).
  """
  if not (factor > 0 and 0 <= power < 1 and math.isfinite(factor)):
    raise ValueError(
      f'widening of factor={factor} and power={power}; use factor > 0, power in [0, 1)'
    )
  # A hair less, so that 4 visits to the power of .5 are 2 children whatever the rounding.
  return lambda visits: jnp.ceil(
    factor * jnp.maximum(visits, 1).astype(jnp.float32) ** power - 1e-4
  )


@functools.partial(jax.jit, static_argnames=('rule', 'root_rule', 'allowed'))
def select(
  tree: SearchTree,
  rule: Rule,
  c: jax.Array | float = 2.0,
  *,
  root_rule: Rule | None = None,
  allowed: Allowed | None = None,
) -> jax.Array:
  """Walks from the root to a node without children by the best score at every node.

  Closed children are never entered and ties go to the earlier child. Where the
  root itself is closed there is nothing to select: its own index comes back.

  Args:
    tree: B trees.
    rule: scores children.
    c: its exploration constant.
    root_rule: scores the root's children, if otherwise.
    allowed: with progressive widening, how many children a node may have. The walk ends at a node
      that has room for more, or whose children are all closed; `expand` must be told so too.

  Returns:
    [B] int32, the chosen leaf of each tree.
  """

  def descend(node):
    slots = at_node(tree.children, node)  # [B, K]
    child = jnp.maximum(slots, 0)
    stats = ChildStats(
      exists=slots != UNVISITED,
      visits=at_node(tree.visits, child),
      picks=at_node(tree.picks, child),
      means=at_node(tree.means, child),
      prior=at_node(tree.prior, child),
      score=at_node(tree.score, child),
      gumbel=at_node(tree.gumbel, child),
      parent_visits=at_node(tree.visits, node),
      parent_score=at_node(tree.score, node),
    )
    open_ = stats.exists & ~at_node(tree.closed, child)
    scores = rule(stats, c)
    if root_rule is not None:
      scores = jnp.where((node == ROOT)[:, None], root_rule(stats, c), scores)
    scores = jnp.where(open_, scores, -jnp.inf)
    # A child of score -inf is still one to enter, where no other is open.
    best = jnp.argmax(
      jnp.where(open_ & jnp.isneginf(scores), jnp.finfo(jnp.float32).min, scores), -1
    )
    best = jnp.take_along_axis(slots, best[:, None], -1)[:, 0]
    return jnp.where(open_.any(-1) & ~stays(node), best, node)

  def stays(node):
    if allowed is None:
      return jnp.zeros(node.shape, bool)
    slots = at_node(tree.children, node)
    count = (slots != UNVISITED).sum(-1)
    none_open = ~((slots != UNVISITED) & ~at_node(tree.closed, jnp.maximum(slots, 0))).any(-1)
    wider = (count < slots.shape[1]) & (none_open | (count < allowed(at_node(tree.visits, node))))
    return at_node(tree.expanded, node) & wider

  def inner(node):
    return (at_node(tree.expanded, node) & ~at_node(tree.closed, node) & ~stays(node)).any()

  start = jnp.full(tree.size.shape, ROOT, jnp.int32)
  return jax.lax.while_loop(inner, descend, start)

"""Gumbel's rules (Danihelka et al. 2022, "Policy improvement by planning with Gumbel").

At the root sequential halving: a budget of simulations goes in equal shares to the children of the
largest `gumbel + log prior + sigma(q)`, of which fewer stay in play as it is spent. Below it the
child whose share of the picks lies farthest behind the improved policy. Good with few simulations.

Departure from the paper: the children are the K steps that were sampled, not a draw without
replacement from all actions, so the noise only breaks what the sampling has left equal.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from o1jax.search.select import ChildStats, Rule

VALUE_SCALE, VISIT_OFFSET = 0.1, 50.0  # of the paper


def considered_visits(considered: int, simulations: int) -> tuple[int, ...]:
  """For each simulation, how many picks a child must have had to be picked now.

  Args:
    considered: children in play at first.
    simulations: the budget, at least 1.
  """
  if considered <= 1:
    return tuple(range(simulations))
  rounds = math.ceil(math.log2(considered))
  sequence: list[int] = []
  picks, in_play = 0, considered
  while len(sequence) < simulations:
    for _ in range(max(1, simulations // (rounds * in_play))):
      sequence += [picks] * in_play
      picks += 1
    in_play = max(2, in_play // 2)
  return tuple(sequence[:simulations])


@functools.cache
def gumbel_root(simulations: int) -> Rule:
  """Sequential halving over all children of the root, for `select(root_rule=...)`.

  Children that are closed early leave their share to the best of the others. Scores are places, 0
  for the best.
  """

  def rule(children: ChildStats, c: jax.Array) -> jax.Array:
    del c
    width = children.picks.shape[1]
    table = jnp.array([considered_visits(n, simulations) for n in range(width + 1)])
    spent = jnp.where(children.exists, children.picks, 0).sum(-1)
    now = table[children.exists.sum(-1), jnp.minimum(spent, simulations - 1)]
    logits = jnp.where(children.exists, jnp.log(children.prior), -jnp.inf)
    logits -= logits.max(-1, keepdims=True)
    scores = children.gumbel + logits + completed(children)
    # Places, not scores less a large number: in float32 that would make all of them equal.
    place = (scores[:, None, :] > scores[:, :, None]).sum(-1)
    return -(place + jnp.where(children.picks == now[:, None], 0, width)).astype(jnp.float32)

  return rule


def gumbel_interior(children: ChildStats, c: jax.Array) -> jax.Array:
  """`pi' - N / (1 + sum N)` with pi' the improved policy, softmax(log prior + sigma(q)); [B, K]."""
  del c
  logits = jnp.where(children.exists, jnp.log(children.prior) + completed(children), -jnp.inf)
  picks = jnp.where(children.exists, children.picks, 0)
  return jax.nn.softmax(logits, -1) - picks / (1 + picks.sum(-1, keepdims=True))


def completed(children: ChildStats) -> jax.Array:
  """sigma(q): q, completed, on a scale from 0 to 1 over the siblings, times a weight that grows
  with the picks; [B, K].

  A child without visits has the mixed value of its parent: its process reward and the visited
  children's means, weighted by their priors.
  """
  seen = children.exists & (children.visits > 0)
  prior = jnp.where(seen, jnp.maximum(children.prior, jnp.finfo(jnp.float32).tiny), 0.0)
  total = prior.sum(-1)
  weighted = (prior * children.means).sum(-1) / jnp.where(total > 0, total, 1.0)
  picks = jnp.where(children.exists, children.picks, 0)
  mixed = (children.parent_score + picks.sum(-1) * weighted) / (picks.sum(-1) + 1)
  values = jnp.where(seen, children.means, mixed[:, None])
  low = jnp.where(children.exists, values, jnp.inf).min(-1, keepdims=True)
  high = jnp.where(children.exists, values, -jnp.inf).max(-1, keepdims=True)
  values = jnp.where(children.exists, (values - low) / jnp.maximum(high - low, 1e-8), 0.0)
  return (VISIT_OFFSET + picks.max(-1, keepdims=True)) * VALUE_SCALE * values

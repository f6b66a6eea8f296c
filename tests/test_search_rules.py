"""PUCT and Gumbel's rules against mctx (golden/make_mctx.py), widening against a plain tree."""

import dataclasses
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.search import (
  ROOT,
  UNVISITED,
  NewChildren,
  backup,
  empty_tree,
  expand,
  gumbel_interior,
  gumbel_root,
  puct,
  select,
  uct,
  widening,
)
from o1jax.search.gumbel import considered_visits

GOLDEN = pathlib.Path(__file__).parent / 'golden'
sys.path.insert(0, str(GOLDEN))
import toy_tree as toy  # noqa: E402

MCTX = json.loads((GOLDEN / 'mctx.json').read_text())


def toy_search(rule, c, root_rule=None, noise=None):
  """Root visits [TREES, ACTIONS] of our search where mctx searched."""
  nodes = 1 + toy.ACTIONS * (toy.SIMULATIONS + 1)
  trees, every = jnp.arange(toy.TREES), jnp.ones((toy.TREES, toy.ACTIONS), bool)
  tree = empty_tree(toy.TREES, nodes, toy.ACTIONS)
  states = jnp.zeros((toy.TREES, nodes), jnp.uint32).at[:, ROOT].set(toy.roots())
  tree = dataclasses.replace(tree, score=tree.score.at[:, ROOT].set(toy.value(toy.roots())))

  @jax.jit
  def simulate(tree, states):
    leaf = select(tree, rule, c, root_rule=root_rule)
    state = states[trees, leaf]
    below = toy.child(state[:, None], jnp.arange(toy.ACTIONS)[None])
    new = NewChildren(
      identity=jnp.tile(jnp.arange(toy.ACTIONS), (toy.TREES, 1)),
      logprob=toy.logits(state),
      score=toy.value(below),
      gumbel=every * 1.0 if noise is None else noise,
      terminal=~every,
      cut=~every,
      valid=every,
    )
    tree, made = expand(tree, leaf, new)
    values = toy.value(state)[:, None]
    return backup(tree, leaf[:, None], values, every[:, :1]), states.at[trees[:, None], made].set(
      below
    )

  for _ in range(toy.SIMULATIONS + 1):  # mctx has expanded the root before it begins
    tree, states = simulate(tree, states)
  return tree, np.asarray(tree.visits)[
    np.arange(toy.TREES)[:, None], np.asarray(tree.children)[:, ROOT]
  ]


def test_puct_visits_are_those_of_mctx():
  tree, visits = toy_search(puct, MCTX['c'])
  np.testing.assert_array_equal(visits, MCTX['puct'])
  assert tree.visits[:, ROOT].tolist() == [toy.SIMULATIONS + 1] * toy.TREES
  assert not tree.full.any() and tree.depth.max() > 4


def test_gumbel_visits_are_those_of_mctx():
  rule = gumbel_root(toy.SIMULATIONS)
  tree, visits = toy_search(gumbel_interior, 0.0, rule, jnp.array(MCTX['noise']))
  np.testing.assert_array_equal(visits, MCTX['gumbel'])
  np.testing.assert_array_equal(tree.picks[:, ROOT], tree.visits[:, ROOT])


@pytest.mark.parametrize('children, simulations', [(1, 5), (2, 8), (5, 64), (8, 16), (16, 3)])
def test_sequential_halving_shares_its_budget(children, simulations):
  sequence = considered_visits(children, simulations)
  assert len(sequence) == simulations
  picks = [0] * children  # to pick a child is to raise its count; one with that count is there
  for wanted in sequence:
    assert wanted in picks
    picks[picks.index(wanted)] += 1
  assert sum(picks) == simulations
  assert picks == sorted(picks, reverse=True)


def plain_widening_search(rng, rule_c, factor, power, simulations, width, slots):
  """UCT with progressive widening as a textbook writes it; (children by node, visits)."""
  nodes = [{'visits': 0, 'total': 0.0, 'children': [], 'parent': None, 'identity': None}]
  drawn = []
  for _ in range(simulations):
    at = 0
    while True:
      node = nodes[at]
      allowed = math.ceil(factor * max(node['visits'], 1) ** power - 1e-4)
      room = len(node['children']) < min(slots, allowed) or not node['children']
      if room:
        break

      def score(i, node=node):
        child = nodes[i]
        if not child['visits']:
          return math.inf
        bonus = rule_c * math.sqrt(math.log(node['visits']) / child['visits'])
        return child['total'] / child['visits'] + bonus

      at = max(node['children'], key=score)
    steps = [int(x) for x in rng.integers(0, 6, width)]
    values = [float(x) / 8 for x in rng.integers(0, 9, width)]
    drawn.append((at, steps, values))
    for step, value in zip(steps, values, strict=True):
      known = [i for i in nodes[at]['children'] if nodes[i]['identity'] == step]
      if not known and len(nodes[at]['children']) == slots:
        continue
      if not known:
        nodes.append({'visits': 0, 'total': 0.0, 'children': [], 'parent': at, 'identity': step})
        nodes[at]['children'].append(len(nodes) - 1)
        known = [len(nodes) - 1]
      up = known[0]
      while up is not None:
        nodes[up]['visits'] += 1
        nodes[up]['total'] += value
        up = nodes[up]['parent']
  return nodes, drawn


@pytest.mark.parametrize('seed', range(4))
def test_progressive_widening_equals_a_plain_tree(seed):
  width, slots, simulations = 2, 5, 14
  nodes, drawn = plain_widening_search(
    np.random.default_rng(seed), 1.0, 1.0, 0.5, simulations, width, slots
  )
  tree = empty_tree(1, 1 + width * simulations, slots)
  for leaf, steps, values in drawn:
    chosen = select(tree, uct, 1.0, allowed=widening(1.0, 0.5))
    assert chosen.tolist() == [leaf]
    new = NewChildren(
      identity=jnp.array([steps]),
      logprob=-jnp.array([steps], jnp.float32),
      score=jnp.zeros((1, width)),
      gumbel=jnp.zeros((1, width)),
      terminal=jnp.zeros((1, width), bool),
      cut=jnp.zeros((1, width), bool),
      valid=jnp.ones((1, width), bool),
    )
    tree, made = expand(tree, chosen, new, widen=True)
    tree = backup(tree, made, jnp.array([values]), made != UNVISITED)
  assert tree.size.tolist() == [len(nodes)]
  for i, node in enumerate(nodes):
    assert [c for c in tree.children[0, i].tolist() if c != UNVISITED] == node['children']
    assert tree.visits[0, i] == node['visits']
    np.testing.assert_allclose(tree.value_sum[0, i], node['total'], atol=1e-5)
  widths = [len(n['children']) for n in nodes if n['children']]
  assert max(widths) > width  # some were widened
  prior = np.asarray(tree.prior[0])
  for node in nodes:
    if node['children']:
      np.testing.assert_allclose(prior[node['children']].sum(), 1.0, atol=1e-6)


def test_a_widened_node_is_closed_only_when_it_is_full():
  tree = empty_tree(1, 9, 3)
  yes, zeros = jnp.ones((1, 2), bool), jnp.zeros((1, 2))
  for identity, closed in (([0, 1], False), ([0, 2], True)):
    leaf = select(tree, uct, allowed=widening(1.0, 0.5))
    assert leaf.tolist() == [ROOT]  # no child is open, so it is widened
    new = NewChildren(jnp.array([identity]), zeros, zeros, zeros, yes, ~yes, yes)
    tree, _ = expand(tree, leaf, new, widen=True)
    assert tree.closed[0, ROOT] == closed
  assert tree.size.tolist() == [4]
  with pytest.raises(ValueError, match=r'power=1\.5'):
    widening(1.0, 1.5)

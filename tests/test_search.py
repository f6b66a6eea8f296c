"""The forest against a tree of plain Python objects, and the rules against hand numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_tree import (
  PlainTree,
  plain_gumbel_interior,
  plain_gumbel_root,
  plain_puct,
  plain_uct,
)

from o1jax.search import (
  NO_PARENT,
  ROOT,
  UNVISITED,
  ChildStats,
  NewChildren,
  backup,
  constant,
  empty_tree,
  expand,
  exponential,
  gumbel_interior,
  gumbel_root,
  linear,
  puct,
  select,
  uct,
)

TREES, CAPACITY, WIDTH = 3, 16, 3
SHAPES = ((TREES, CAPACITY, WIDTH), (1, 9, 2), (4, 21, 5))  # each compiles once
SIMULATIONS = 6
RULES = {  # ours and the plain tree's, each with the rule at the root where it is another
  'uct': ((uct, None), (plain_uct, None)),
  'puct': ((puct, None), (plain_puct, None)),
  'gumbel': (
    (gumbel_interior, gumbel_root(SIMULATIONS)),
    (plain_gumbel_interior, plain_gumbel_root(SIMULATIONS)),
  ),
}


def draw_steps(rng, width):
  """One leaf's K sampled steps and the returns of their roll-outs (NaN: masked)."""
  steps = [
    {
      'identity': int(rng.integers(4)),
      'logprob': float(-rng.integers(1, 40) / 8),
      'score': float(rng.integers(0, 64) / 64),
      'gumbel': float(rng.gumbel()),
      'terminal': bool(rng.random() < 0.15),
      'cut': False,
    }
    for _ in range(width)
  ]
  for step in steps:  # equal steps are equal in all they are
    first = next(s for s in steps if s['identity'] == step['identity'])
    step.update(first)
  values = [float('nan') if rng.random() < 0.1 else float(rng.integers(0, 5) / 4) for _ in steps]
  return steps, values


def stack(rows):
  fields = {k: jnp.array([[s[k] for s in row] for row in rows]) for k in rows[0][0]}
  return NewChildren(**fields, valid=jnp.ones((len(rows), len(rows[0])), bool))


def run_both(seeds, name, capacity=CAPACITY, width=WIDTH):
  """Runs the forest and plain trees side by side; returns both after checking every step."""
  (rule, root_rule), (plain_rule, plain_root) = RULES[name]
  tree = empty_tree(len(seeds), capacity, width)
  plain = [PlainTree(capacity) for _ in seeds]
  rngs = [np.random.default_rng(seed) for seed in seeds]
  for _ in range(SIMULATIONS):
    leaf = select(tree, rule, 1.25, root_rule=root_rule)
    leaves = [p.select(plain_rule, 1.25, plain_root) for p in plain]
    assert leaf.tolist() == [p.nodes.index(n) for p, n in zip(plain, leaves, strict=True)]
    drawn = [draw_steps(rng, width) for rng in rngs]
    tree, nodes = expand(tree, leaf, stack([steps for steps, _ in drawn]))
    values = jnp.array([v for _, v in drawn])
    tree = backup(tree, nodes, values, ~jnp.isnan(values))
    for p, node, (steps, returns) in zip(plain, leaves, drawn, strict=True):
      for child, value in zip(p.expand(node, steps), returns, strict=True):
        if child is not None and not math.isnan(value):
          p.backup(child, value)
  return tree, plain


def assert_same(tree, plain):
  tree = jax.tree.map(np.asarray, tree)
  for b, p in enumerate(plain):
    n = len(p.nodes)
    index = {id(node): i for i, node in enumerate(p.nodes)}
    assert tree.size[b] == n
    assert tree.visits[b, :n].tolist() == [x.visits for x in p.nodes]
    assert tree.picks[b, :n].tolist() == [x.picks for x in p.nodes]
    np.testing.assert_allclose(tree.value_sum[b, :n], [x.total for x in p.nodes], atol=1e-5)
    np.testing.assert_allclose(tree.prior[b, :n], [x.prior for x in p.nodes], atol=1e-5)
    assert tree.depth[b, :n].tolist() == [x.depth for x in p.nodes]
    assert tree.closed[b, :n].tolist() == [x.closed for x in p.nodes]
    assert tree.parent[b, 0] == NO_PARENT
    for i, node in enumerate(p.nodes):
      slots = [s for s in tree.children[b, i] if s != UNVISITED]
      assert slots == [index[id(c)] for c in node.children]
    assert not tree.visits[b, n:].any()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**31), st.sampled_from(sorted(RULES)))
def test_forest_equals_plain_trees(shape, seed, name):
  trees, capacity, width = shape
  tree, plain = run_both(range(seed, seed + trees), name, capacity, width)
  assert_same(tree, plain)
  assert tree.full.tolist() == [p.full for p in plain]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2**31), min_size=TREES, max_size=TREES))
def test_visits_add_up(seeds):
  tree, plain = run_both(seeds, 'uct')
  visits, children = np.asarray(tree.visits), np.asarray(tree.children)
  for b in range(TREES):
    below = [sum(visits[b, c] for c in children[b, i] if c != UNVISITED) for i in range(CAPACITY)]
    own = [node.own for node in plain[b].nodes]
    own += [0] * (CAPACITY - len(own))
    assert visits[b].tolist() == np.add(below, own).tolist()
    assert own[ROOT] == 0  # the root has no return of its own
    terminal = np.asarray(tree.terminal)[b]
    assert all(below[i] == 0 for i in range(CAPACITY) if terminal[i])


def test_rows_are_independent():
  both, _ = run_both([1, 2, 3], 'uct')
  other, _ = run_both([1, 77, 3], 'uct')
  for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(np.asarray(a)[[0, 2]], np.asarray(b)[[0, 2]])
  assert not np.array_equal(np.asarray(both.value_sum)[1], np.asarray(other.value_sum)[1])


def test_equal_siblings_are_one_node_and_masked_returns_count_nothing():
  tree = empty_tree(1, CAPACITY, WIDTH)
  step = {'logprob': math.log(0.2), 'score': 0.5, 'terminal': False, 'cut': False, 'gumbel': 0.0}
  rows = [[step | {'identity': 7}, step | {'identity': 7}, step | {'identity': 9}]]
  tree, nodes = expand(tree, jnp.array([ROOT]), stack(rows))
  assert nodes.tolist() == [[1, 1, 2]]
  assert tree.children[0, ROOT].tolist() == [1, 2, UNVISITED]
  np.testing.assert_allclose(tree.prior[0, 1:3], 0.5, atol=1e-6)
  values = jnp.array([[1.0, 0.5, jnp.nan]])
  tree = backup(tree, nodes, values, ~jnp.isnan(values))
  assert tree.visits[0, :3].tolist() == [2, 2, 0]
  np.testing.assert_allclose(tree.means[0, :3], [0.75, 0.75, 0.0])
  again, refused = expand(tree, jnp.array([ROOT]), stack(rows))
  assert refused.tolist() == [[UNVISITED] * WIDTH] and again.size.tolist() == [3]


def test_a_full_tree_is_marked_and_keeps_its_nodes():
  tree = empty_tree(1, 1 + WIDTH, WIDTH)
  step = {'logprob': -1.0, 'score': 0.0, 'terminal': False, 'cut': False, 'gumbel': 0.0}
  rows = [[step | {'identity': i} for i in range(WIDTH)]]
  tree, _ = expand(tree, jnp.array([ROOT]), stack(rows))
  assert not tree.full[0]
  after, nodes = expand(tree, jnp.array([1]), stack(rows))
  assert after.full.tolist() == [True] and nodes.tolist() == [[UNVISITED] * WIDTH]
  np.testing.assert_array_equal(after.children, tree.children)
  with pytest.raises(ValueError, match='capacity=3'):
    empty_tree(1, 3, 3)


def test_cut_leaves_are_never_selected_and_close_their_parents():
  tree = empty_tree(1, CAPACITY, WIDTH)
  step = {'logprob': -1.0, 'score': 0.0, 'terminal': False, 'gumbel': 0.0}
  rows = [[step | {'identity': i, 'cut': i != 1} for i in range(WIDTH)]]
  tree, _ = expand(tree, jnp.array([ROOT]), stack(rows))
  assert select(tree, uct).tolist() == [2]
  rows = [[step | {'identity': 0, 'cut': True}] * WIDTH]
  tree, _ = expand(tree, jnp.array([2]), stack(rows))
  assert tree.closed[0, ROOT] and select(tree, uct).tolist() == [ROOT]
  assert not tree.visits.any()  # cut, so not scored


def test_rules_against_hand_numbers():
  children = ChildStats(
    exists=jnp.ones((1, 3), bool),
    visits=jnp.array([[4, 1, 0]]),
    picks=jnp.array([[4, 1, 0]]),
    means=jnp.array([[0.5, 1.0, 0.0]]),
    prior=jnp.array([[0.5, 0.3, 0.2]]),
    score=jnp.array([[0.9, 0.9, 0.6]]),
    gumbel=jnp.zeros((1, 3)),
    parent_visits=jnp.array([5]),
    parent_score=jnp.array([0.5]),
  )
  np.testing.assert_allclose(
    uct(children, 2.0)[0, :2], [0.5 + 2 * 0.6343182, 1.0 + 2 * 1.2686363], rtol=1e-6
  )
  assert jnp.isinf(uct(children, 2.0)[0, 2])
  np.testing.assert_allclose(  # sqrt(5) = 2.236068
    puct(children, 1.5)[0],
    [0.5 + 1.5 * 0.5 * 2.236068 / 5, 1.0 + 1.5 * 0.3 * 2.236068 / 2, 0.6 + 1.5 * 0.2 * 2.236068],
    rtol=1e-6,
  )


def test_schedules_end_at_a_tenth():
  for schedule in (linear, exponential):
    np.testing.assert_allclose([schedule(0.0), schedule(1.0)], [1.0, 0.1])
  np.testing.assert_allclose([linear(0.5), exponential(0.5)], [0.55, math.sqrt(0.1)])
  assert constant(0.7) == 1.0

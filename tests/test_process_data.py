"""Prefix trees, the PRM's batches of them, and trajectories on disk."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learn_cases import CASES, V, assert_close
from test_data import BAD, CODE, GOOD, ODD, PLAN, WRONG, FakeTokenizer

from o1jax.data import steps as steps_lib
from o1jax.data import stepwise
from o1jax.data.paths import PathEncoder
from o1jax.data.prefix_tree import PrefixTree, by_problem
from o1jax.data.step_batches import StepBatchShape, step_batches
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.types import (
  ACCEPTED,
  SANDBOX_FAILURE,
  WRONG_ANSWER,
  Problem,
  Step,
  StepLabel,
  TestResult,
  Trajectory,
  Verdict,
)


def rollout(*steps: Step, reward: float | None, problem: str = 'p') -> Trajectory:
  return Trajectory(problem, steps, reward=reward)


def small_tree() -> PrefixTree:
  """PLAN is visited 5 times (mean .5), GOOD 3 (5/6), BAD 2 (0); the cut-off path not at all."""
  return PrefixTree(
    [
      rollout(PLAN, GOOD, CODE, reward=1.0),
      rollout(PLAN, GOOD, CODE, reward=1.0),
      rollout(PLAN, GOOD, WRONG, reward=0.5),
      rollout(PLAN, BAD, WRONG, reward=0.0),
      rollout(PLAN, BAD, CODE, reward=0.0),
      rollout(PLAN, ODD, reward=None),
    ]
  )


# --- prefix trees ---


def test_a_node_is_the_mean_of_the_rewards_that_passed_through_it():
  tree = small_tree()
  seen = {prefix: (node.value, node.visits) for prefix, node in tree.nodes.items()}
  assert seen == {
    (PLAN,): (0.5, 5),
    (PLAN, GOOD): (pytest.approx(5 / 6), 3),
    (PLAN, GOOD, CODE): (1.0, 2),
    (PLAN, GOOD, WRONG): (0.5, 1),
    (PLAN, BAD): (0.0, 2),
    (PLAN, BAD, WRONG): (0.0, 1),
    (PLAN, BAD, CODE): (0.0, 1),
  }
  assert len(tree.paths) == 4  # equal paths are one


def test_a_roll_out_counts_by_its_weight():
  right = Trajectory('p', (PLAN, CODE), reward=1.0, weight=1.5)
  wrong = Trajectory('p', (PLAN, WRONG), reward=0.0, weight=0.5)
  tree = PrefixTree([right, wrong, rollout(ODD, reward=0.0)])
  assert tree.valued(right).values == (0.75, 1.0) and tree.valued(right).visits == (2, 1)
  assert tree.valued(wrong).values == (0.75, 0.0)


def test_siblings_are_children_of_one_prefix():
  groups = {frozenset(p[-1] for p in group): group for group in small_tree().sibling_groups()}
  assert set(groups) == {frozenset([GOOD, BAD]), frozenset([CODE, WRONG])}
  for group in small_tree().sibling_groups():
    assert len({p[:-1] for p in group}) == 1


def test_labels_are_the_nodes():
  labels = small_tree().labels('p')
  assert StepLabel('p', (PLAN,), BAD, 0.0, 2) in labels
  assert StepLabel('p', (), PLAN, 0.5, 5) in labels
  assert len(labels) == 7


def test_pairs_are_siblings_further_apart_than_the_margin():
  def named(margin):
    return {(p.prefix, p.win, p.lose): p.margin for p in small_tree().pairs('p', margin)}

  wide = {((PLAN,), GOOD, BAD): pytest.approx(5 / 6)}
  narrow = {((PLAN, GOOD), CODE, WRONG): 0.5}
  assert named(0.0) == wide | narrow  # the two programs below BAD are equally bad
  assert named(0.5) == wide
  assert named(0.9) == {}


def test_valued_puts_the_trees_values_on_a_trajectory():
  tree = small_tree()
  path = tree.valued(rollout(PLAN, GOOD, WRONG, reward=0.5))
  assert path.values == (0.5, pytest.approx(5 / 6), 0.5) and path.visits == (5, 3, 1)
  cut = rollout(PLAN, ODD, reward=None)
  assert tree.valued(cut) == cut  # the tree does not know its last step


def test_by_problem_keeps_problems_apart():
  trees = by_problem(
    [
      rollout(PLAN, reward=1.0, problem='b'),
      rollout(PLAN, reward=0.0, problem='a'),
      rollout(PLAN, reward=0.0, problem='b'),
    ]
  )
  assert [(i, t.nodes[PLAN,].value) for i, t in trees.items()] == [('b', 0.5), ('a', 0.0)]


# --- PRM batches ---


def build(trees, shape, **options):
  problems = {i: Problem(i, f'Print {i}.') for i in trees}
  encoder = PathEncoder(FakeTokenizer())
  rng = np.random.default_rng(options.pop('seed', 0))
  options = {'margin': 0.15} | options
  return step_batches(trees, problems, encoder, shape, rng=rng, **options)


def rows_of(batch) -> list[tuple[str, tuple[Step, ...]]]:
  """(prompt, steps) of each filled row, read back from its tokens and step ids."""
  found = []
  for ids, steps, segments in zip(batch.tokens, batch.step_ids, batch.segments, strict=True):
    if segments.any():
      text = [
        FakeTokenizer().decode(ids[(steps == j) & (segments == 1)]) for j in range(steps.max() + 1)
      ]
      path = tuple(step for part in text[1:] for step in steps_lib.parse(part))
      assert len(path) == steps.max()
      found.append((text[0], path))
  return found


SHAPE = StepBatchShape(rows=8, tokens=100, steps=4, pairs=6)


def forest(count: int) -> dict[str, PrefixTree]:
  return {f'p{i}': small_tree() for i in range(count)}


def test_rows_hold_every_path_with_its_step_ids():
  found = build(forest(5), SHAPE)
  rows = [row for batch in found for row in rows_of(batch)]
  expected = [(f'Print p{i}.\n', path) for i in range(5) for path in small_tree().paths]
  key = lambda row: (row[0], steps_lib.render(row[1]))  # noqa: E731
  assert sorted(rows, key=key) == sorted(expected, key=key)
  assert all(b.tokens.shape == (8, 100) and b.pairs.shape == (6, 3) for b in found)
  for batch in found:
    assert (batch.positions == np.arange(100)).all()
    assert not batch.step_ids[batch.segments == 0].any()


@pytest.mark.parametrize('hard', [False, True])
def test_labels_are_node_values_and_weights_sum_to_the_root_of_the_visits(hard):
  tree = small_tree()
  for batch in build(forest(4), SHAPE, hard=hard):
    totals: dict = {}
    for row, (prompt, path) in enumerate(rows_of(batch)):
      for j in range(len(path)):
        value = tree.nodes[path[: j + 1]].value
        assert batch.labels[row, j] == pytest.approx(float(value > 0) if hard else value)
        name = prompt, path[: j + 1]
        totals[name] = totals.get(name, 0.0) + batch.weights[row, j]
      assert not batch.weights[row, len(path) :].any()
    assert not batch.weights[len(rows_of(batch)) :].any()
    for (_, prefix), total in totals.items():
      assert total == pytest.approx(tree.nodes[prefix].visits ** 0.5)


def test_pairs_point_to_rows_that_part_at_the_step():
  tree, seen = small_tree(), 0
  for batch in build(forest(4), SHAPE):
    rows = rows_of(batch)
    for (win, lose, step), weight in zip(batch.pairs, batch.pair_weights, strict=True):
      if weight == 0:
        continue
      seen += 1
      (prompt_a, a), (prompt_b, b) = rows[win], rows[lose]
      assert prompt_a == prompt_b and a[: step - 1] == b[: step - 1] and a[step - 1] != b[step - 1]
      better, worse = tree.nodes[a[:step]], tree.nodes[b[:step]]
      assert better.value - worse.value > 0.15
      assert weight == pytest.approx(min(better.visits, worse.visits) ** 0.5)
  assert seen == 8  # two pairs in each of four trees


@pytest.mark.parametrize('parts', [2, 4])
def test_siblings_share_a_microbatch_and_accumulation_changes_nothing(parts):
  shape = StepBatchShape(rows=16, tokens=100, steps=4, pairs=12, parts=parts)
  found = build(forest(6), shape)
  rows = [row for batch in found for row in rows_of(batch)]
  assert len(rows) == len(set(rows)) == 6 * min(len(small_tree().paths), 16 // parts)
  assert sum((b.pair_weights > 0).sum() for b in found) >= 6
  loss, make, _ = CASES['prm']
  tx = optax.sgd(1.0)
  for batch in found:
    assert (batch.pairs[:, 0] % parts == batch.pairs[:, 1] % parts).all()
    batch = dataclasses.replace(batch, tokens=batch.tokens % V)
    start = make()
    moved = [
      make_update(loss, tx, accumulate=n, donate=False)(init_state(start, tx), batch)[0].params
      for n in (1, parts)
    ]
    whole, cut = (jax.tree.leaves(jax.tree.map(jnp.subtract, start, after)) for after in moved)
    largest = max(float(jnp.abs(g).max()) for g in whole)
    assert_close(*([g / largest for g in side] for side in (whole, cut)), 1e-6)


def test_more_pairs_than_fit_are_drawn_among_and_fewer_are_padded():
  few = StepBatchShape(rows=8, tokens=100, steps=4, pairs=3)
  assert [(b.pair_weights > 0).sum() for b in build(forest(2), few)] == [3]
  many = StepBatchShape(rows=8, tokens=100, steps=4, pairs=9)
  assert [(b.pair_weights > 0).sum() for b in build(forest(2), many)] == [4]


def test_paths_that_do_not_fit_are_left_out():
  short = StepBatchShape(rows=8, tokens=100, steps=2, pairs=6)
  assert build(forest(1), short) == []
  assert build(forest(1), StepBatchShape(rows=8, tokens=20, steps=4, pairs=6)) == []


def test_a_problem_with_more_paths_than_rows_is_cut_to_them():
  (batch,) = build(forest(1), StepBatchShape(rows=3, tokens=100, steps=4, pairs=6))
  assert len(rows_of(batch)) == 3
  (batch,) = build(forest(1), SHAPE, paths_per_problem=2)
  assert len(rows_of(batch)) == 2


def test_step_batches_depend_on_the_generators_seed_only():
  first, again, other = (build(forest(6), SHAPE, seed=s) for s in (0, 0, 1))
  assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
  assert any((a.tokens != b.tokens).any() for a, b in zip(first, other, strict=True))


# --- D_process on disk and the records ---

JUDGED = Verdict(WRONG_ANSWER, (TestResult(ACCEPTED), TestResult(WRONG_ANSWER)))


@pytest.mark.parametrize(
  'trajectory',
  [
    Trajectory('p', (PLAN, CODE), (0.25, 0.5), (4, 2), JUDGED, 0.5, 3, 'round1/synthesis'),
    Trajectory('p', (PLAN, GOOD), weight=0.25),
    Trajectory('p', (PLAN, WRONG), (0.5, 0.0), (2, 1), Verdict(SANDBOX_FAILURE), None),
  ],
  ids=['judged', 'cut off', 'masked'],
)
def test_a_trajectory_survives_its_row(trajectory):
  row = json.loads(json.dumps(stepwise.to_row(trajectory, 'Print one.\n')))
  assert stepwise.from_row(row) == trajectory
  assert row['prompt'] == 'Print one.\n'


def test_a_row_labels_as_good_what_ever_led_to_a_reward():
  row = stepwise.to_row(Trajectory('p', (PLAN, CODE), (0.125, 0.0), (8, 1), JUDGED, 0.0), '')
  assert row['labels'] == [True, False] and row['values'] == [0.125, 0.0]
  assert row['completions'] == [PLAN.text, CODE.text] and row['actions'] == [1, 3]


def test_a_verdict_counts_its_tests_and_a_masked_one_says_nothing():
  assert (JUDGED.passed, JUDGED.pass_rate, JUDGED.compiled, JUDGED.masked) == (1, 0.5, True, False)
  failed = Verdict(SANDBOX_FAILURE)
  assert failed.masked and not failed.compiled and failed.pass_rate == 0.0
  assert Trajectory('p', (), verdict=Verdict(ACCEPTED)).accepted
  assert not Trajectory('p', (), verdict=JUDGED).accepted and not Trajectory('p', ()).accepted

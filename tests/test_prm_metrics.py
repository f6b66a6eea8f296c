"""PRM metrics against definitions written out, on random ragged groups."""

import math
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from o1jax.config import Config
from o1jax.data.prefix_tree import by_problem
from o1jax.data.steps import program_step
from o1jax.learn import prm_metrics
from o1jax.stages import prm
from o1jax.types import Problem, Step, Trajectory

SEEDS = st.integers(0, 10**6)
few = settings(max_examples=40, deadline=None)


def steps(seed):
  """Scores with ties, soft values, and a group for each of some steps."""
  rng = np.random.default_rng(seed)
  n = int(rng.integers(1, 30))
  return rng.integers(-6, 7, n) / 2.0, rng.integers(0, 5, n) / 4.0, rng.integers(0, 5, n)


def share(scores, values, groups, margin):
  wins = []
  for i in range(len(scores)):
    for j in range(len(scores)):
      if groups[i] == groups[j] and values[i] - values[j] > margin:
        wins.append(1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
  return sum(wins) / len(wins) if wins else math.nan


@few
@given(SEEDS, st.sampled_from([0.0, 0.3, 2.0]))
def test_order_metrics_count_pairs(seed, margin):
  scores, values, groups = steps(seed)
  good = values > 0.5
  expected = share(scores, values, groups, margin)
  np.testing.assert_allclose(
    prm_metrics.pair_accuracy(scores, values, groups, margin), expected, rtol=1e-12
  )
  expected = share(scores, good.astype(float), groups, 0.0)
  np.testing.assert_allclose(
    prm_metrics.within_group_auc(scores, good, groups), expected, rtol=1e-12
  )
  expected = share(scores, good.astype(float), np.zeros(len(scores)), 0.0)
  np.testing.assert_allclose(prm_metrics.auc(scores, good), expected, rtol=1e-12)


@few
@given(SEEDS)
def test_the_stage_compares_siblings_with_the_log_probability(seed):
  """Two problems' trees with random returns, against the metrics of flat arrays."""
  rng = np.random.default_rng(seed)
  found = [
    Trajectory(
      f'p{i % 2}',
      (*(Step(2, str(x)) for x in rng.integers(0, 3, 2)), program_step(str(i % 3))),
      reward=float(rng.integers(0, 2)),
    )
    for i in range(24)
  ]
  trees = by_problem(found)
  keys = [(p, prefix) for p, tree in trees.items() for prefix in tree.nodes]
  drawn = rng.normal(size=(2, len(keys))).tolist()
  scores, logprobs = (dict(zip(keys, row, strict=True)) for row in drawn)
  values = np.array([trees[p].nodes[prefix].value for p, prefix in keys])
  groups = [str((p, prefix[:-1])) for p, prefix in keys]

  def scored(run, prm, problems, paths):
    pairs = zip(problems, paths, strict=True)
    return [[scores[p.id, path[:j]] for j in range(1, len(path) + 1)] for p, path in pairs]

  run = types.SimpleNamespace(config=Config())
  problems = [Problem(p, '') for p in trees]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prm, 'score_paths', scored)
    told = prm.sibling_metrics(run, None, problems, trees, logprobs)
  margin = run.config.prm.pair_margin
  for prefix, table in (('', scores), ('logprob_', logprobs)):
    flat = np.array([table[k] for k in keys])
    # Good and bad are those with a success and those without one.
    expected = {
      'sibling_auc': prm_metrics.within_group_auc(flat, values > 0, groups),
      'pair_accuracy': prm_metrics.pair_accuracy(flat, values, groups, margin),
      'auc': prm_metrics.auc(flat, values > 0),
    }
    for name, value in expected.items():
      np.testing.assert_allclose(told[prefix + name], np.nan_to_num(value), rtol=1e-9, err_msg=name)
  lead = told['sibling_auc'] - told['logprob_sibling_auc']
  np.testing.assert_allclose(told['sibling_auc_lead'], lead, atol=1e-12)
  won = np.sum(told['wins'], axis=0)
  expected = told['sibling_auc'], told['logprob_sibling_auc']
  np.testing.assert_allclose(won[:2] / max(won[2], 1), expected, atol=1e-12)
  assert len(told['wins']) == len(problems)


def test_the_lead_is_resampled_by_problem():
  # Two pairs of the first problem and one of the second; the third has none.
  ours, theirs = np.array([[2.0, 2], [0.0, 1], [0.0, 0]]), np.array([[0.0, 2], [1.0, 1], [0.0, 0]])
  lead, (low, high) = prm_metrics.auc_lead(ours, theirs, 2000)
  assert lead == 1 / 3
  assert (low, high) == (-1.0, 1.0)  # draws of the second problem alone, and of the first
  assert prm_metrics.auc_lead(ours, ours, 100) == (0.0, (0.0, 0.0))
  none = np.zeros((2, 2))
  assert np.isnan(prm_metrics.auc_lead(none, none, 100)[0])
  many = np.tile(ours[:2], (500, 1)), np.tile(theirs[:2], (500, 1))
  lead, (low, high) = prm_metrics.auc_lead(*many, 2000)
  assert 0.2 < low < lead < high < 0.45


def test_a_shift_of_whole_groups_spoils_the_pooled_auc_and_not_the_one_within():
  good = np.array([True, False, True, False])
  scores, groups = np.array([9.0, 8.0, 2.0, 1.0]), np.array(['easy', 'easy', 'hard', 'hard'])
  assert prm_metrics.within_group_auc(scores, good, groups) == 1.0
  assert prm_metrics.auc(scores, good) == 0.75


@few
@given(SEEDS)
def test_log_loss_accuracy_and_calibration_are_their_formulas(seed):
  scores, labels, _ = steps(seed)
  r = [1.0 / (1.0 + math.exp(-s)) for s in scores]
  loss = [-(v * math.log(p) + (1 - v) * math.log(1 - p)) for p, v in zip(r, labels, strict=True)]
  np.testing.assert_allclose(prm_metrics.log_loss(scores, labels), np.mean(loss), rtol=1e-9)
  right = [(p > 0.5) == (v > 0.5) for p, v in zip(r, labels, strict=True)]
  assert prm_metrics.accuracy(scores, labels) == np.mean(right)
  curve, error = prm_metrics.calibration(scores, labels, bins=4), 0.0
  for i in range(4):
    here = [k for k, p in enumerate(r) if min(int(p * 4), 3) == i]
    assert curve.counts[i] == len(here)
    if here:
      said, seen = np.mean([r[k] for k in here]), np.mean(labels[here])
      np.testing.assert_allclose((curve.predicted[i], curve.observed[i]), (said, seen), rtol=1e-9)
      error += len(here) * abs(said - seen) / len(r)
    else:
      assert math.isnan(curve.predicted[i]) and math.isnan(curve.observed[i])
  np.testing.assert_allclose(curve.error, error, atol=1e-12)


def test_an_honest_judge_is_calibrated_and_a_boastful_one_is_not():
  rng = np.random.default_rng(0)
  scores = rng.normal(0, 2, 20_000)
  labels = (rng.random(20_000) < 1 / (1 + np.exp(-scores))).astype(float)
  assert prm_metrics.calibration(scores, labels).error < 0.02
  assert prm_metrics.calibration(5 * scores, labels).error > 0.1
  assert prm_metrics.log_loss(scores, labels) < prm_metrics.log_loss(5 * scores, labels)


def test_saturated_scores_stay_finite():
  scores, labels = np.array([-2000.0, 2000.0]), np.array([1.0, 1.0])
  assert prm_metrics.log_loss(scores, labels) == 1000.0
  curve = prm_metrics.calibration(scores, labels)
  assert (curve.counts[0], curve.counts[-1], curve.error) == (1, 1, 0.5)


def test_what_does_not_match_is_refused_and_nothing_to_compare_is_nan():
  with pytest.raises(ValueError, match=r'\(3,\).*\(2,\)'):
    prm_metrics.log_loss(np.zeros(3), np.zeros(2))
  with pytest.raises(ValueError, match='empty'):
    prm_metrics.accuracy(np.zeros(0), np.zeros(0))
  assert math.isnan(prm_metrics.auc(np.zeros(2), np.array([True, True])))

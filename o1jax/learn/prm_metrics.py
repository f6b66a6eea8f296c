"""How good a process reward model's judgement is: NumPy, float64, no device.

Scores are log-odds, as the heads give them; `r = sigmoid(score)`. The policy's own
log-probability of a step can stand in for the score where only the order counts
(`auc`, `within_group_auc`, `pair_accuracy`), which is the baseline to beat.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Calibration:
  """The calibration curve: in each bin of r, what was said and what came true."""

  counts: np.ndarray  # [bins] int64, steps whose r lies in [i / bins, (i + 1) / bins)
  predicted: np.ndarray  # [bins] float64, mean r; NaN where the bin is empty
  observed: np.ndarray  # [bins] float64, mean label; NaN where the bin is empty

  @property
  def error(self) -> float:
    """Expected calibration error: `sum_i n_i |predicted_i - observed_i| / n`."""
    full = self.counts > 0
    gaps = np.abs(self.predicted[full] - self.observed[full])
    return float(np.sum(self.counts[full] * gaps) / max(self.counts.sum(), 1))


def log_loss(scores: np.ndarray, labels: np.ndarray) -> float:
  """Mean of `-[v log r + (1 - v) log(1 - r)]` in nats.

  Args:
    scores: [N] log-odds.
    labels: [N] v in [0, 1], hard or soft.

  Raises:
    ValueError: no step, or the two do not match.
  """
  scores, labels = _matched(scores, labels)
  # softplus(s) - v s, which is exact where the sigmoid saturates.
  return float(np.mean(np.logaddexp(0.0, scores) - labels * scores))


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
  """Share of steps where r > 0.5 says what v > 0.5 says; arguments as `log_loss`."""
  scores, labels = _matched(scores, labels)
  return float(np.mean((scores > 0) == (labels > 0.5)))


def calibration(scores: np.ndarray, labels: np.ndarray, bins: int = 10) -> Calibration:
  """The calibration curve over equal bins of r; arguments as `log_loss`.

  r = 1 belongs to the last bin.
  """
  scores, labels = _matched(scores, labels)
  r = np.exp(-np.logaddexp(0.0, -scores))
  place = np.minimum((r * bins).astype(np.int64), bins - 1)
  counts = np.bincount(place, minlength=bins)
  with np.errstate(invalid='ignore'):
    predicted, observed = (np.bincount(place, x, bins) / counts for x in (r, labels))
  return Calibration(counts, predicted, observed)


def auc(scores: np.ndarray, good: np.ndarray) -> float:
  """Chance that a good step scores above a bad one, ties counting half; NaN without both.

  Args:
    scores: [N], any that only need an order.
    good: [N] bool.
  """
  scores, good = _matched(scores, good)
  _, place = np.unique(scores, return_inverse=True)
  bad = np.bincount(place, 1.0 - good)  # by score, from the lowest on
  below = np.cumsum(bad) - 0.5 * bad
  pairs = good.sum() * (1.0 - good).sum()
  return float((good * below[place]).sum() / pairs) if pairs else float('nan')


def within_group_auc(scores: np.ndarray, good: np.ndarray, groups: np.ndarray) -> float:
  """`auc` over the (good, bad) pairs whose two steps stand in one group.

  With the group a prefix, the pairs are siblings: the choice that search makes. Pooled
  over groups, so a group counts by its pairs.

  Args:
    scores: [N], any that only need an order within a group.
    good: [N] bool.
    groups: [N] ids of any kind that `==` compares.
  """
  values = np.asarray(good, np.float64)
  return _order(scores, values, groups, margin=0.0)


def wins(
  scores: np.ndarray, good: np.ndarray, groups: np.ndarray, problems: np.ndarray, count: int
) -> np.ndarray:
  """What `within_group_auc` is made of: [count, 2] float64, pairs won and pairs of each problem.

  Args:
    scores: [N], any that only need an order within a group.
    good: [N] bool.
    groups: [N] ids; a group belongs to one problem.
    problems: [N] numbers below `count`.
    count: problems, also those without a pair.
  """
  better, worse = pairs(np.asarray(good, np.float64), groups)
  scores, of = np.asarray(scores, np.float64), np.asarray(problems)[better]
  won = _won(scores[better], scores[worse])
  return np.stack([np.bincount(of, x, count) for x in (won, np.ones_like(won))], axis=1)


def auc_lead(
  ours: np.ndarray, theirs: np.ndarray, resamples: int
) -> tuple[float, tuple[float, float]]:
  """By how much one `within_group_auc` is above another, and the 95 % interval of it.

  Problems are resampled, each with all of its pairs. NaN where there is no pair.

  Args:
    ours: [P, 2] of `wins`.
    theirs: [P, 2] of `wins` over the same pairs.
    resamples: of the bootstrap.
  """
  lead = np.stack([ours[:, 0] - theirs[:, 0], ours[:, 1]], axis=1)
  rng = np.random.default_rng(0)
  picks = rng.integers(0, len(lead), (resamples, len(lead)))
  with np.errstate(invalid='ignore'):
    mean, drawn = (x[..., 0] / x[..., 1] for x in (lead.sum(axis=0), lead[picks].sum(axis=1)))
  drawn = drawn[np.isfinite(drawn)]  # of few pairs a draw can have none
  low, high = np.percentile(drawn, [2.5, 97.5]) if drawn.size else (mean, mean)
  return float(mean), (float(low), float(high))


def pair_accuracy(
  scores: np.ndarray, values: np.ndarray, groups: np.ndarray, margin: float = 0.0
) -> float:
  """Share of a group's pairs in the order of their values, ties of scores counting half.

  Args:
    scores: [N], any that only need an order within a group.
    values: [N] mean returns.
    groups: [N] ids.
    margin: only pairs whose values differ by more are counted.

  Returns:
    A share, or NaN if there is no such pair.
  """
  return _order(scores, values, groups, margin)


def pairs(
  values: np.ndarray, groups: np.ndarray, margin: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
  """Steps (better [M], worse [M]) of one group whose values [N] differ by more than `margin`."""
  values, found = np.asarray(values, np.float64), [np.zeros((2, 0), np.int64)]
  for members in _members(groups):
    own = values[members]
    found.append(members[np.stack(np.nonzero(own[:, None] - own[None, :] > margin))])
  better, worse = np.concatenate(found, axis=1)
  return better, worse


def _matched(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
  if scores.shape != labels.shape or scores.ndim != 1 or not scores.size:
    raise ValueError(
      f'scores {scores.shape} and labels {labels.shape} must be one-dimensional, alike, not empty'
    )
  return scores, labels


def _order(scores: np.ndarray, values: np.ndarray, groups: np.ndarray, margin: float) -> float:
  scores, values = _matched(scores, values)
  better, worse = (scores[steps] for steps in pairs(values, groups, margin))
  return float(np.mean(_won(better, worse))) if len(better) else float('nan')


def _won(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
  """1 for each pair in the order of its values, half for a tie of scores."""
  return (better > worse) + 0.5 * (better == worse)


def _members(groups: np.ndarray) -> list[np.ndarray]:
  """Row numbers of each group."""
  _, place = np.unique(np.asarray(groups), return_inverse=True)
  order = np.argsort(place, kind='stable')
  return np.split(order, np.flatnonzero(np.diff(place[order])) + 1)

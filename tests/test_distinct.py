"""Paths without replacement: which they are, and how likely."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import EOS, MAX_NEW, MODEL, PROMPTS, forward_of, tiny_params

from o1jax.sampling import Distinct, Drawing, Sampler
from o1jax.sampling.distinct import Explored, NewPath, NewPaths

SAMPLER = Sampler(MODEL, max_new=MAX_NEW, stop_ids=(EOS,), rows=32)


def draw(count, prompts=PROMPTS, sampler=SAMPLER, **settings):
  return Distinct(sampler, count)(tiny_params(), prompts, **settings)


def test_paths_differ_and_are_whole():
  found = draw(20)
  assert [p.problem for p in found.paths] == [p for p in range(len(PROMPTS)) for _ in range(20)]
  assert len({(p.problem, p.tokens) for p in found.paths}) == 20 * len(PROMPTS)
  for path in found.paths:
    assert len(path.tokens) == len(path.logprobs) <= MAX_NEW
    assert EOS not in path.tokens[:-1]
    assert path.stopped == (path.tokens[-1] == EOS)
    assert path.stopped or len(path.tokens) == MAX_NEW
  assert any(p.left_at for p in found.paths)
  # Nothing that a path takes over is drawn again; what is cut at the limit was drawn.
  own = sum(len(p.tokens) - p.left_at for p in found.paths)
  cut = sum(p.left_at for p in found.paths if not p.stopped)
  assert own <= found.generated <= own + cut


def test_logprobs_are_those_of_the_full_forward():
  found = draw(12).paths
  rows = [[*PROMPTS[p.problem], *p.tokens] for p in found]
  full = forward_of(32)(rows)
  for path, logprobs, row in zip(found, full, rows, strict=True):
    at = range(len(PROMPTS[path.problem]) - 1, len(row) - 1)
    want = [logprobs[t, row[t + 1]] for t in at]
    np.testing.assert_allclose(path.logprobs, want, atol=1e-4)


def test_all_paths_of_two_tokens_are_found_once():
  vocabulary = MODEL.config.vocab_size
  found = draw(2000, PROMPTS[:2], dataclasses.replace(SAMPLER, max_new=2))
  for problem in range(2):
    mine = [p for p in found.paths if p.problem == problem]
    # A path that ends at once, and all of two tokens that do not; but for the least likely ones.
    everything = {
      (EOS,),
      *itertools.product([t for t in range(vocabulary) if t != EOS], range(vocabulary)),
    }
    assert len({p.tokens for p in mine}) == len(mine) <= len(everything)
    assert {p.tokens for p in mine} <= everything
    assert sum(math.exp(sum(p.logprobs)) for p in mine) == pytest.approx(1, abs=2e-3)


def test_the_second_path_is_drawn_from_what_the_first_left():
  """Counts of first and second tokens over many draws, against p(a) p(b) / (1 - p(a))."""
  count = 3000
  one = dataclasses.replace(SAMPLER, max_new=1, rows=512)
  found = draw(2, [PROMPTS[0]] * count, one, ids=np.arange(count))
  p = np.exp(forward_of(32)([PROMPTS[0]])[0, len(PROMPTS[0]) - 1].astype(np.float64))
  pairs = collections.Counter(
    (a.tokens[0], b.tokens[0]) for a, b in zip(found.paths[::2], found.paths[1::2], strict=True)
  )
  want = count * p[:, None] * p[None] / (1 - p[:, None])
  np.fill_diagonal(want, 0)
  got = np.zeros_like(want)
  for pair, n in pairs.items():
    got[pair] = n
  assert want.sum() == pytest.approx(count)
  likely = want > 5
  deviation = (got - want)[likely] / np.sqrt(want[likely])
  assert likely.sum() > 20
  assert np.mean(deviation**2) < 1.5  # 1 in the mean; the standard error of it is below .2


def test_what_follows_is_drawn_anew():
  """How often two paths of two tokens that begin differently end alike, against chance."""
  count, vocabulary = 2000, MODEL.config.vocab_size
  two = dataclasses.replace(SAMPLER, max_new=2, rows=512)
  found = draw(2, [PROMPTS[0]] * count, two, ids=np.arange(count)).paths
  rows = [[*PROMPTS[0], t] for t in range(vocabulary)]
  p = np.exp(forward_of(32)(rows)[:, len(PROMPTS[0])].astype(np.float64))  # of the second token
  alike = [
    (a.tokens[1] == b.tokens[1], p[a.tokens[0]] @ p[b.tokens[0]])
    for a, b in zip(found[::2], found[1::2], strict=True)
    if len(a.tokens) == len(b.tokens) == 2 and a.tokens[0] != b.tokens[0]
  ]
  seen, chance = np.array(alike, float).T
  assert len(seen) > 500
  assert abs(seen.sum() - chance.sum()) < 4 * np.sqrt((chance * (1 - chance)).sum())


def test_a_problem_draws_the_same_in_any_batch():
  together = draw(6, seed=3)
  for p in range(len(PROMPTS)):
    alone = draw(6, PROMPTS[p : p + 1], seed=3, ids=np.array([p]))
    assert [x.tokens for x in alone.paths] == [x.tokens for x in together.paths if x.problem == p]
  other = draw(6, seed=4)
  assert [x.tokens for x in other.paths] != [x.tokens for x in together.paths]


def test_more_problems_than_rows():
  few = dataclasses.replace(SAMPLER, rows=16)
  prompts = PROMPTS * 10
  found = draw(3, prompts, few)
  wide = draw(3, prompts)
  assert [p.tokens for p in found.paths] == [p.tokens for p in wide.paths]


def test_weights_of_paths_that_are_unlikelier_than_a_float_can_be():
  def path(problem, logprob):
    return NewPath(problem, (5, EOS), (logprob, 0.0), 0, True)

  found = NewPaths((path(0, -2000.0), path(0, -2000.0 + math.log(3)), path(1, -1.0)), 0, 0)
  assert found.weights() == pytest.approx([0.5, 1.5, 1.0])
  far = NewPaths((path(0, -1.0), path(0, -2000.0)), 0, 0).weights()
  assert far[0] == pytest.approx(2) and 0 < far[1] < 1e-6


def test_a_truncated_distribution_is_refused():
  with pytest.raises(ValueError, match='temperature 1'):
    Distinct(dataclasses.replace(SAMPLER, how=Drawing(0.7)), 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 3))
def test_the_tree_knows_what_is_left(seed, vocabulary, depth):
  """Every path of a random tree of probabilities, in whatever order, is gone in the end."""
  rng = np.random.default_rng(seed)
  at = {}

  def probabilities(prefix):
    return at.setdefault(prefix, rng.dirichlet(np.ones(vocabulary)))

  tree, left = Explored(), set(itertools.product(range(vocabulary), repeat=depth))
  mass = 0.0
  while left:
    where = tree.leave(rng)
    if where is None:  # what is left is too unlikely to tell
      break
    prefix, logprobs, banned = where
    p = [probabilities(prefix[:d])[t] for d, t in enumerate(prefix)]
    np.testing.assert_allclose(np.exp(logprobs), p)
    known = {p for p in itertools.product(range(vocabulary), repeat=depth)} - left
    assert set(banned) == {p[len(prefix)] for p in known if p[: len(prefix)] == prefix}
    while len(prefix) < depth:
      choice = [t for t in range(vocabulary) if t not in banned]
      prefix, banned = (*prefix, int(rng.choice(choice))), ()
    assert prefix in left
    left.remove(prefix)
    p = [probabilities(prefix[:d])[t] for d, t in enumerate(prefix)]
    mass += math.prod(p)
    tree.add(prefix, [math.log(x) for x in p])
    assert tree.gone == pytest.approx(mass, abs=1e-9)
  assert tree.gone == pytest.approx(1, abs=1e-4)

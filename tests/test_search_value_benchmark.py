"""What the benchmark of search makes of paths and outcomes, by hand."""

import pathlib
import types

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'


@pytest.fixture
def value(monkeypatch):
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  import search_value

  return search_value


def found(value, paths, logprobs):
  return value.Found(paths, logprobs, generated=sum(len(p) for each in paths for p in each))


def test_a_vote_is_by_behaviour_and_errors_have_none(value):
  printed = {(1,): b'a', (2,): b'b', (3,): b'b', (4,): None, (5,): None, (6,): None}
  case = types.SimpleNamespace(
    problems=['p'], behaviours=lambda problem, paths: [printed[p] for p in paths]
  )
  some = found(value, [[(1,), (2,), (3,), (4,), (5,), (6,)]], [[-1.0, -3.0, -2.0, -0.1, 0.0, 0.0]])
  ones = [[1.0] * 6]
  assert value.voted(case, some, ones, some.logprobs) == [(3,)]  # two print b, the likelier of them
  assert value.voted(case, some, [[5.0, 1.0, 1.0, 9.0, 9.0, 9.0]], some.logprobs) == [(1,)]
  assert value.chosen(case, some, some.logprobs) == [(5,)]
  first = some.first(2)
  assert first.paths == [[(1,), (2,)]] and first.generated == 2


def test_a_path_found_twice_votes_twice_and_one_bad_step_spoils_a_product(value):
  printed = {(1,): b'a', (2,): b'b', (3,): b'b'}
  case = types.SimpleNamespace(
    problems=['p'],
    behaviours=lambda problem, paths: [printed[p] for p in paths],
    accepted=lambda answers: np.array([printed[a] == b'a' for a in answers], float),
  )
  some = found(value, [[(1,), (2,), (3,), (3,)]], [[-1.0] * 4])
  some.steps = [[[0.5, 0.9], [0.3, 0.3], [0.2, 0.4], [0.2, 0.4]]]
  assert some.judged() == [[0.5, 0.3, 0.2, 0.2]]
  assert value.answered(case, some, 'majority') == [0.0]
  assert value.answered(case, some, 'prm') == [1.0]
  assert value.answered(case, some, 'prm_vote') == [0.0]  # .3 + .2 + .2 are more than .5
  assert value.answered(case, some, 'prm_product') == [1.0]  # .45 is more than .09 + .08 + .08
  assert value.answered(case, some.first(3), 'prm_vote') == [1.0]  # a tie: to the best path


def test_leads_are_paired_and_over_the_best_of_each_kind(value):
  def outcomes(*solved):
    row = {'tokens': 10.0, 'outcomes': list(solved)}
    return {name: row for name in value.BASELINES + value.WITH_PRM + ('any sample',)} | {
      name: {'tokens': 20.0, 'outcomes': [1.0] * len(solved)} for name in value.RULES
    }

  best = {'majority': {'tokens': 10.0, 'outcomes': [1.0, 1.0, 1.0, 0.0]}}
  runs = [{'test': {'base': {'100': outcomes(1.0, 0.0, 0.0, 0.0) | best}}}] * 2
  got = value.compare(runs)['base']['100']
  assert got['majority'] == {'tokens': 10, 'solved': 0.75}
  over = got['guided']['over']
  assert list(over) == ['majority', 'prm']
  assert over['majority'][0] == 0.25 and over['majority'][1] == 0.0  # one problem in four
  assert over['prm'][0] == 0.75 and np.less_equal(over['prm'][1], 0.75)
  of_samples = got['prm_vote']['over']
  assert list(of_samples) == ['majority'] and of_samples['majority'][0] < 0

"""Near-duplicates and overlap with evaluation sets, against sets of tuples."""

import random

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reader_cases import WORDS

from o1jax.data import overlap
from o1jax.types import Problem


def as_problem(i, text):
  return Problem(f'q{i}', text)


def exact(a, b, signs):
  """Shared and all shingles of two texts, by sets of tuples."""
  sets = []
  for text in (a, b):
    cut = text.casefold()
    found = ''.join(f' {c} ' if not c.isalnum() else c for c in cut).split()
    found = found if signs else [w for w in found if w.isalnum()]
    n = min(overlap.WORDS, len(found))
    sets.append({tuple(found[i : i + n]) for i in range(len(found) - n + 1)} if found else set())
  return sets


TEXTS = st.lists(st.sampled_from(['a', 'b', 'C', '(', ',', 'dd']), max_size=30).map(' '.join)


@given(TEXTS, TEXTS, st.booleans())
def test_shingles_are_sets_of_runs(a, b, signs):
  left, right = exact(a, b, signs)
  hashed = [set(overlap.shingles(text, signs).tolist()) for text in (a, b)]
  assert [len(h) for h in hashed] == [len(left), len(right)]
  assert len(hashed[0] & hashed[1]) == len(left & right)


@given(TEXTS, TEXTS)
def test_resemblance_is_exact(a, b):
  unique = overlap.Unique(resemblance=1e-9)
  assert unique.drop(as_problem(0, a)) is None
  match = unique.drop(as_problem(1, b))
  left, right = exact(a, b, signs=True)
  if match is not None and left | right:
    assert match.similarity == pytest.approx(len(left & right) / len(left | right))
  if left == right and left:
    assert match is not None and match.similarity == 1


@given(TEXTS, TEXTS)
def test_containment_is_exact(told, tested):
  match = overlap.Evaluation([as_problem(0, tested)], 1e-9).drop(as_problem(1, told))
  left, right = exact(told, tested, signs=False)
  share = len(left & right) / len(right) if right else 0
  assert (match.similarity if match else 0) == pytest.approx(share)


def test_near_duplicates_are_found_among_many():
  rng, unique, missed, seen = random.Random(0), overlap.Unique(), [], 0
  for i in range(400):
    text = [rng.choice(WORDS) for _ in range(100)]
    assert unique.drop(as_problem(i, ' '.join(text))) is None
    for place in rng.sample(range(100), 3):
      text[place] = 'changed'
    twin = ' '.join(text)
    match = unique.drop(as_problem(f'{i}b', twin))
    seen += match is not None
    if match is not None and match.other != f'q{i}':
      missed.append(match)
  # Three changed words of a hundred touch at most 15 of 96 shingles: 81 / 111 = 0.73.
  assert seen == 400 and missed == []


def test_one_sign_tells_problems_apart_but_not_from_a_test():
  a, b = (
    f'brackets is a string of "{x}" and "{y}", say whether it closes' for x, y in ('<>', '()')
  )
  unique = overlap.Unique()
  assert unique.drop(as_problem(0, a)) is None and unique.drop(as_problem(1, b)) is None
  assert overlap.Evaluation([as_problem(0, a)]).drop(as_problem(1, b)).similarity == 1


def test_memory_of_the_index_does_not_grow_with_the_problems(monkeypatch):
  monkeypatch.setattr(overlap, '_CACHE_KIB', 256)
  unique, process, count = overlap.Unique(), psutil.Process(), 600
  for i in range(count + 100):
    if i == 100:  # what Python and NumPy keep is there by now
      before = process.memory_info().rss
    text = ' '.join(random.Random(i).choices(WORDS, k=5000))
    assert unique.drop(as_problem(i, text)) is None
  # The shingles alone are 8 bytes each.
  assert process.memory_info().rss - before < count * 5000 * 8 / 2

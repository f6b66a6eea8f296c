"""O1-CODER's step labels: rows written here, and real files."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reader_cases import (
  PRM,
)

from o1jax.data import o1coder
from o1jax.data.readers import (
  Faults,
)
from o1jax.data.readers.faults import BadRow
from o1jax.types import Step

STEP_TEXT = st.text(st.characters(blacklist_categories=['Cs']), max_size=30).map(str.strip)


@given(
  st.lists(st.tuples(st.sampled_from([1, 2]), STEP_TEXT), max_size=4),
  st.booleans(),
  st.floats(0, 1),
)
def test_step_labels_come_back(steps, final, value):
  path = [Step(action, text) for action, text in steps if not text.endswith('###')]
  path.append(Step(3, '```python\nprint(1)\n```') if final else Step(1, 'plan'))
  row = json.loads(json.dumps(o1coder.to_row('Do it.', path[:-1], path[-1], value)))
  label = o1coder.to_label(row)
  assert (*label.prefix, label.step) == tuple(path)
  assert label.value == value and label.visits == 1


@pytest.mark.parametrize(
  'change, reason',
  [
    ({'label': ['good']}, "label 'good'"),
    ({'label': [1.5]}, 'label 1.5'),
    ({'label': [True]}, 'label True'),
    ({'label': [1, 0]}, 'has 2 values'),
    ({'response': 'no steps'}, 'holds no step'),
    ({'has_final_step': True}, "'has_final_step' is True"),
  ],
)
def test_bad_step_labels(change, reason):
  row = o1coder.to_row('Do it.', [], Step(1, 'plan'), 'negative')
  assert o1coder.to_label(row).value == 0
  with pytest.raises(BadRow, match=reason):
    o1coder.to_label(row | change)


def test_steps_of_a_released_response():
  response = 'Step 1: <Action 1> plan\n\n### Step 2: <Action 2> refine  \nmore\n\n###'
  assert o1coder.parse_response(response) == [Step(1, 'plan'), Step(2, 'refine  \nmore')]
  coded = '### Step 1: <Action 2> code\n```python\nprint(1)\n```\n\n### Step 2: <Action 2> no'
  (step,) = o1coder.parse_response(coded)
  assert step.terminal and 'print(1)' in step.text


@pytest.mark.parametrize('path', PRM, ids=lambda p: p.name)
def test_real_step_labels(path):
  if not path.exists():
    pytest.skip(f'{path} is not there')
  labels = list(o1coder.read_labels(path, Faults(strict=True)))
  raw = json.loads(path.read_text())
  assert len(labels) == len(raw) == 5
  for label, row in zip(labels, raw, strict=True):
    assert label.step.terminal == row['has_final_step']
    assert [s.action for s in (*label.prefix, label.step)][:2] == [1, 2]
    assert label.value == {'positive': 1, 'negative': 0}.get(row['label'][0], row['label'][0])
  assert labels[0].problem_id == labels[1].problem_id

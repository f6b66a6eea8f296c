"""O1-CODER's files for process reward models, read and written.

A row is `prompt, response, has_final_step, label`: the steps up to one of them, headed
`### Step 2: <Action 1> ...`, and the label of the last, `["positive"]`, `["negative"]` or a mean
return `[0.875]`. They say nothing about the number of roll-outs behind a label.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Sequence

from o1jax.data import steps as steps_lib
from o1jax.data.readers import fields
from o1jax.data.readers.faults import BadRow, Fault, Faults
from o1jax.data.readers.rows import rows_of
from o1jax.types import Step, StepLabel

NEEDS = frozenset({'prompt', 'response', 'has_final_step', 'label'})

_HEAD = re.compile(r'^[#* ]*Step \d+:[* ]*(?=<Action [123]>)', re.MULTILINE)
_ACTION = re.compile(r'<Action ([123])>')
_QUESTION = re.compile(r'### Description\n(.*?)\s*### Solution\s*\Z', re.DOTALL)
_HARD = {'positive': 1.0, 'negative': 0.0}


def read_labels(path: str | pathlib.Path, faults: Faults) -> Iterator[StepLabel]:
  """The labelled steps of a file, one at a time; rows that hold none go to `faults`.

  A problem's id is a digest of its statement, which stands in the prompt between `### Description`
  and `### Solution`; `visits` is 1.
  """
  path = pathlib.Path(path)
  for row in rows_of(path):
    try:
      if row.value is None:
        raise BadRow(row.fault)
      yield to_label(row.value)
    except BadRow as bad:
      faults.add(Fault(path, row.number, str(bad)))


def to_label(row: dict) -> StepLabel:
  """The step that a row labels; raises BadRow where the row and its response disagree."""
  steps = parse_response(fields.text(row, 'response'))
  if not steps:
    raise BadRow("'response' holds no step; expected lines such as '### Step 1: <Action 1>'")
  labels = fields.parsed(row, 'label', list)
  if len(labels) != 1:
    raise BadRow(f"'label' has {len(labels)} values; one, of the last step, is expected")
  value = _HARD.get(labels[0]) if isinstance(labels[0], str) else labels[0]
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
    raise BadRow(f"label {labels[0]!r} is neither 'positive', 'negative' nor a number in [0, 1]")
  if bool(row.get('has_final_step')) != steps[-1].terminal:
    ending = 'is' if steps[-1].terminal else 'is not'
    raise BadRow(f"'has_final_step' is {row.get('has_final_step')}, but the last step {ending} one")
  question = statement_of(fields.text(row, 'prompt'))
  name = f'o1coder/{fields.digest(question)}'
  return StepLabel(name, tuple(steps[:-1]), steps[-1], float(value), 1)


def statement_of(prompt: str) -> str:
  """The problem within a prompt of the released code; any other prompt as it is."""
  match = _QUESTION.search(prompt)
  return match.group(1).strip() if match else prompt.strip()


def parse_response(response: str) -> list[Step]:
  """The steps of a response, without their numbers; what follows a terminal step is its text."""
  steps = []
  for part in _HEAD.split(response)[1:]:
    action = int(_ACTION.match(part).group(1))
    text = part[len(steps_lib.ACTIONS[0]) :].strip().removesuffix('###').rstrip()
    step = Step(action, text)
    terminal = step.terminal or steps_lib.program_of([Step(3, text)]) is not None
    steps.append(Step(3, text) if terminal else step)
    if terminal:
      break
  return steps


def to_row(prompt: str, prefix: Sequence[Step], step: Step, label: str | float) -> dict:
  """A row for the released PRM trainer; `to_label` reads it back."""
  path = (*prefix, step)
  response = '\n\n'.join(
    f'### Step {i}: {steps_lib.ACTIONS[s.action - 1]} {s.text}' for i, s in enumerate(path, 1)
  )
  return {
    'prompt': prompt,
    'response': response,
    'has_final_step': step.terminal,
    'label': [label],
  }

"""The reasoning format: actions as text, and text back into actions.

A path is a run of steps, `<Action k>` + text + `<Step_End>` each. Action 1 lays
out the structure, action 2 refines one part, action 3 holds the program in a
fenced `python` block and ends the path (O1-CODER, section 3.2). Models that were
not fine-tuned on this format often write `<Step_Begin>` and `[Pseudo Start]` ...
`[Pseudo End]` as the released prompts show; both are read and dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from o1jax.types import Step

STEP_END = '<Step_End>'
ACTIONS = ('<Action 1>', '<Action 2>', '<Action 3>')
TAGS = (*ACTIONS, STEP_END, '<Step_Begin>')
FENCE = '```python\n'

_STEP = re.compile(r'<Action ([123])>(.*?)(?:<Step_End>|(?=<Action [123]>)|\Z)', re.DOTALL)
_CODE = re.compile(r'```python\n(.*?)(?:\n)?```', re.DOTALL)
_NOISE = re.compile(r'<Step_Begin>|\[Pseudo Start\]|\[Pseudo End\]')


def render_step(step: Step) -> str:
  """One step as the model writes it."""
  return f'{ACTIONS[step.action - 1]}{step.text}{STEP_END}'


def render(steps: Iterable[Step]) -> str:
  """A path as the model writes it; `parse` reads it back."""
  return ''.join(map(render_step, steps))


def parse(text: str) -> tuple[Step, ...]:
  """The steps in `text`; everything after the first terminal step is dropped.

  A step that contains a fenced program is terminal whatever its action says
  (the paper's rule), so a model that never learnt the tags still ends.
  """
  steps = []
  for match in _STEP.finditer(_NOISE.sub('', text)):
    action, body = int(match.group(1)), match.group(2)
    terminal = action == 3 or _CODE.search(body) is not None
    steps.append(Step(3 if terminal else action, body))
    if terminal:
      break
  return tuple(steps)


def program_of(steps: Iterable[Step]) -> str | None:
  """The program of the terminal step, or None where there is none to run."""
  for step in steps:
    if step.terminal:
      match = _CODE.search(step.text)
      return match.group(1) if match else None
  return None


def program_step(code: str) -> Step:
  """The terminal step that holds `code`."""
  return Step(3, f'{FENCE}{code}\n```')


def prompt_of(statement: str) -> str:
  """What the policy reads before it writes its first step.

  Raises:
    ValueError: the statement contains one of the step tags, which would be
      taken for reasoning (the released PRM's " Rating" fault).
  """
  for tag in TAGS:
    if tag in statement:
      raise ValueError(
        f'the problem statement contains the step tag {tag!r}; escape it or drop the problem'
      )
  return statement + '\n'

"""The specification of a problem, and everything that follows from it without chance.

A `Spec` is a form, a kind of item and the clauses in order, the last of which is the read-out.
Statement, program, reasoning steps, answers and traces are functions of it; so is the id of its
problem, from which `spec_of` reads the spec back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from o1jax.data.family.ops import ANY, HIGHEST, INT, LOWEST, OPS, READOUTS, STR, Readout
from o1jax.data.family.phrases import (
  CONTEXT_PHRASES,
  HEADS,
  OP_PHRASES,
  READOUT_PHRASES,
  VERBS,
)
from o1jax.types import Step

FORMS = ('stdin', 'function')
KINDS = ('ints', 'words')
RAISES = (TypeError, IndexError, ValueError, AttributeError)  # what misread programs raise
LONGEST = 8  # items that a list may have at any point, so that traces stay short
_READ = {
  'ints': 'a = list(map(int, input().split()))',
  'words': 'a = input().split()',
}


class Clause(NamedTuple):
  """One clause: the operation it stands for and how it is said.

  `context` is '' for a clause that names its operation, else a key of `CONTEXT_PHRASES`; `op`
  and `k` are resolved either way.
  """

  op: str
  k: int | None
  phrase: int  # index into the phrases of `op`, or of `context`
  context: str = ''

  @property
  def key(self) -> str:
    """What the phrase belongs to: the operation, or the kind of context clause."""
    return self.context or self.op


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
  """A whole problem: `form` stdin or function, `kind` ints or words, clauses with the read-out."""

  form: str
  kind: str
  clauses: tuple[Clause, ...]


Values = list  # of int or of str: the list that a program works on


def phrases_of(clause: Clause) -> tuple[str, ...]:
  """The phrases that the clause could have been said with."""
  if clause.context:
    return CONTEXT_PHRASES[clause.context]
  return (OP_PHRASES if clause.op in OPS else READOUT_PHRASES)[clause.op]


def statement(spec: Spec) -> str:
  """The problem as the model reads it: a head and the numbered clauses, on one line."""
  parts = [HEADS[spec.form, spec.kind]]
  for number, clause in enumerate(spec.clauses[:-1], 1):
    phrase = phrases_of(clause)[clause.phrase]
    parts.append(f'{number}) {phrase.replace("{k}", str(clause.k))}')
  last = READOUT_PHRASES[spec.clauses[-1].op][spec.clauses[-1].phrase]
  parts.append(f'{len(spec.clauses)}) {VERBS[spec.form]}{last}')
  return ' '.join(parts)


def pseudo(clause: Clause) -> str:
  """The canonical pseudocode of the clause, the text of its `<Action 2>` step."""
  template = (OPS.get(clause.op) or READOUTS[clause.op]).pseudo
  return template.replace('{k}', str(clause.k))


def program(spec: Spec) -> str:
  """The reference program: one short line per clause, no newline at the end."""
  lines = ['def solve(a):' if spec.form == 'function' else _READ[spec.kind]]
  indent = '    ' if spec.form == 'function' else ''
  for clause in spec.clauses[:-1]:
    lines.append(indent + OPS[clause.op].code.replace('{k}', str(clause.k)))
  readout = READOUTS[spec.clauses[-1].op]
  if spec.form == 'function':
    lines.append(f'{indent}return {readout.expression}')
  else:
    lines.append(f'print({"*" if readout.name == "list" else ""}{readout.expression})')
  return '\n'.join(lines)


def plan(spec: Spec) -> str:
  """The text of the `<Action 1>` step."""
  return f'{spec.form} {spec.kind} {len(spec.clauses) - 1} ops {VERBS[spec.form].strip()}'


def reference_steps(spec: Spec) -> tuple[Step, ...]:
  """The path to the program: the plan, one step a clause, the program in a fenced block."""
  refine = [Step(2, pseudo(clause)) for clause in spec.clauses]
  return (Step(1, plan(spec)), *refine, Step(3, f'```python\n{program(spec)}\n```'))


def composition(spec: Spec) -> tuple[str, ...]:
  """The names of the operations and of the read-out, in order, without parameters."""
  return tuple(clause.op for clause in spec.clauses)


def resolve(context: str, op: str, k: int | None, new_k: int | None) -> tuple[str, int | None]:
  """The operation that a context clause means after `op` with parameter `k`.

  Raises:
    ValueError: no such kind of context clause.
  """
  if context == 'again':
    return op, k
  if context == 'same':
    return op, new_k
  if context == 'opposite':
    return OPS[op].opposite, k
  if context == 'more':
    return op, k + 1
  raise ValueError(f'context={context!r}: use one of {", ".join(CONTEXT_PHRASES)}')


def types_of(spec: Spec) -> list[str] | None:
  """The item type (`int` or `str`) before each clause; None where a clause cannot read it."""
  now = INT if spec.kind == 'ints' else STR
  seen = []
  for clause in spec.clauses:
    op = OPS.get(clause.op) or READOUTS[clause.op]
    if op.takes not in (ANY, now):
      return None
    seen.append(now)
    if op.takes != ANY and isinstance(gives := getattr(op, 'gives', None), str):
      now = gives
  return seen


def confused(clause: Clause) -> Clause:
  """The clause with its confusion in the place of its operation."""
  op = OPS.get(clause.op) or READOUTS[clause.op]
  return clause._replace(op=op.confusion)


def chain_of(clauses: Sequence[Clause]) -> list[tuple[Callable, int | None]]:
  """The meaning of each clause with its parameter, ready to be applied in order."""
  return [((OPS.get(c.op) or READOUTS[c.op]).fn, c.k) for c in clauses]


def in_range(values: Values) -> bool:
  """True for a list that a program of the family may have: not empty, short, numbers in range."""
  if not 0 < len(values) <= LONGEST:
    return False
  return values[0].__class__ is str or (min(values) >= LOWEST and max(values) <= HIGHEST)


def answerable(readout: Readout, values: Values) -> bool:
  """True where the list has the items that the read-out needs and its values stay in range."""
  if len(values) < readout.needs:
    return False
  return readout.running is None or in_range(readout.running(values))


def run(chain: Sequence[tuple[Callable, int | None]], readout: Readout, values: Values):
  """The lists before each clause and the answer: `(states, answer)`.

  None where the input does not suit the clauses: a list that runs empty, grows beyond `LONGEST`
  items or leaves LOWEST..HIGHEST, or an answer that needs more items.

  Args:
    chain: `chain_of` the clauses, read-out included.
    readout: the read-out.
    values: the input list.
  """
  states = [values]
  *body, (answer, _) = chain
  for fn, k in body:
    values = fn(values, k)
    if not in_range(values):
      return None
    states.append(values)
  if not answerable(readout, values):
    return None
  return states, answer(values, None)


def trace(spec: Spec, values: Values) -> tuple[list[tuple[str, Values]], int | str | Values]:
  """What happens to an input: `(entries, answer)`.

  An entry is a clause's pseudocode with the list after it; for a read-out, with the values that
  lead to the answer. Read-outs that only copy (list, joined, first, last) have no entry.

  Raises:
    ValueError: the input does not suit the spec (see `run`).
  """
  readout = READOUTS[spec.clauses[-1].op]
  result = run(chain_of(spec.clauses), readout, values)
  if result is None:
    raise ValueError(f'input {values} leaves what {problem_id(spec)} allows; draw another input')
  states, answer = result
  entries = [(pseudo(c), s) for c, s in zip(spec.clauses, states[1:], strict=False)]
  if readout.running is not None:
    entries.append((pseudo(spec.clauses[-1]), readout.running(states[-1])))
  return entries, answer


def encode_input(spec: Spec, values: Values) -> str:
  """The input as the test case holds it: a line, or the JSON list of arguments."""
  return json.dumps([values]) if spec.form == 'function' else ' '.join(map(str, values))


def encode_output(spec: Spec, answer: int | str | Values) -> str:
  """The output as the test case holds it: printed text, or the JSON of the returned value."""
  if spec.form == 'function':
    return json.dumps(answer)
  return ' '.join(map(str, answer)) if isinstance(answer, list) else str(answer)


def problem_id(spec: Spec) -> str:
  """The id of the spec's problem: letters, digits, `.`, `_` and `-` only."""
  codes = [
    f'{c.op}.{"" if c.k is None else c.k}.{c.phrase}' + (f'.{c.context}' if c.context else '')
    for c in spec.clauses
  ]
  return '-'.join(['family', spec.form, spec.kind, *codes])


def spec_of(identifier: str) -> Spec:
  """The spec that a problem id stands for.

  Raises:
    ValueError: the id is not one of this family.
  """
  try:
    family, form, kind, *codes = identifier.split('-')
    clauses = []
    for code in codes:
      op, k, phrase, *context = code.split('.')
      clauses.append(Clause(op, int(k) if k else None, int(phrase), *context))
    spec = Spec(form, kind, tuple(clauses))
    known = family == 'family' and form in FORMS and kind in KINDS and len(clauses) > 1
    if not known or types_of(spec) is None or problem_id(spec) != identifier:
      raise ValueError('unknown form, kind or order of operations')
    statement(spec)
  except (ValueError, KeyError, IndexError, TypeError) as error:
    raise ValueError(
      f'{identifier!r} is not a problem of the family: {error}; use an id made by problems()'
    ) from error
  return spec


def uniform(values: Sequence[int | str] | int | str) -> str:
  """A list or an answer as the test part writes it: items behind a space each."""
  items = values if isinstance(values, list | tuple) else [values]
  return ''.join(f' {item}' for item in items)

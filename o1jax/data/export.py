"""What a run found, as rows that other trainers read.

All formats are made from one prefix tree a problem over every roll-out of the run: the value of a
step is its mean return over all of them, and equal paths appear once.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

from o1jax.data import o1coder, stepwise
from o1jax.data import steps as steps_lib
from o1jax.data.prefix_tree import PrefixTree
from o1jax.data.readers.faults import BadRow, Fault, Faults, ReadError
from o1jax.data.readers.rows import rows_of

MARGIN = 0.0  # siblings have to differ by more than this to be a pair

Forest = dict[str, tuple[str, PrefixTree]]  # of a problem's id: its prompt and tree


def read_run(run: str | pathlib.Path, faults: Faults) -> Forest:
  """Every judged trajectory of a run's folder, in order of first appearance.

  Raises:
    ReadError: the folder holds no trajectories.
    FileNotFoundError: there is no such folder.
  """
  folder = pathlib.Path(run)
  if not folder.is_dir():
    raise FileNotFoundError(f'{str(folder)!r}: no such folder; name the run.dir of a run')
  paths = sorted(folder.glob('stages/**/trajectories/*.jsonl'))
  if not paths:
    raise ReadError(f'{str(folder)!r} has no stages/**/trajectories/*.jsonl; name a run folder')
  forest: Forest = {}
  for path in paths:
    for row in rows_of(path):
      try:
        if row.value is None:
          raise BadRow(row.fault)
        _add(forest, row.value)
      except BadRow as bad:
        faults.add(Fault(path, row.number, str(bad)))
  return forest


def _add(forest: Forest, row: dict) -> None:
  try:
    trajectory, prompt = stepwise.from_row(row), row['prompt']
  except (KeyError, TypeError, ValueError) as error:
    raise BadRow(f'no trajectory: {error!r}') from None
  forest.setdefault(trajectory.problem_id, (prompt, PrefixTree()))[1].add(trajectory)


def sft(forest: Forest) -> Iterator[dict]:
  """`prompt, completion`: each distinct path whose program passes every test."""
  for prompt, tree in forest.values():
    for steps, trajectory in tree.paths.items():
      if trajectory.accepted:
        yield {'prompt': prompt, 'completion': steps_lib.render(steps)}


def preference(forest: Forest) -> Iterator[dict]:
  """`prompt, chosen, rejected`: sibling steps whose mean returns differ, after their prefix."""
  for name, (prompt, tree) in forest.items():
    for pair in tree.pairs(name, MARGIN):
      yield {
        'prompt': prompt + steps_lib.render(pair.prefix),
        'chosen': steps_lib.render_step(pair.win),
        'rejected': steps_lib.render_step(pair.lose),
      }


def stepwise_rows(forest: Forest) -> Iterator[dict]:
  """`prompt, completions, labels`, and beside them `values, visits, actions, problem_id`.

  A step is labelled good if a roll-out through it ever earned something.
  """
  for name, (prompt, tree) in forest.items():
    for steps, trajectory in tree.paths.items():
      valued = tree.valued(trajectory)
      yield {
        'prompt': prompt,
        'completions': [step.text for step in steps],
        'labels': [value > 0 for value in valued.values],
        'values': [round(value, 6) for value in valued.values],
        'visits': list(valued.visits),
        'actions': [step.action for step in steps],
        'problem_id': name,
      }


def o1coder_rows(forest: Forest) -> Iterator[dict]:
  """`prompt, response, has_final_step, label`: every step with its mean return."""
  for name, (prompt, tree) in forest.items():
    for label in tree.labels(name):
      yield o1coder.to_row(prompt, label.prefix, label.step, round(label.value, 6))


def o1coder_hard_rows(forest: Forest) -> Iterator[dict]:
  """As `o1coder_rows`, with 'positive' for a value above 0 and 'negative' for 0."""
  for row in o1coder_rows(forest):
    yield row | {'label': ['positive' if row['label'][0] > 0 else 'negative']}


def trees(forest: Forest) -> Iterator[dict]:
  """`problem_id, prompt, nodes`, a tree a row; a node's `parent` is its place in `nodes`, or -1."""
  for name, (prompt, tree) in forest.items():
    index = {(): -1} | {prefix: i for i, prefix in enumerate(tree.nodes)}
    nodes = [
      {
        'parent': index[prefix[:-1]],
        'action': prefix[-1].action,
        'text': prefix[-1].text,
        'value': round(node.value, 6),
        'visits': node.visits,
      }
      for prefix, node in tree.nodes.items()
    ]
    if nodes:
      yield {'problem_id': name, 'prompt': prompt, 'nodes': nodes}


EXPORTS: dict[str, Callable[[Forest], Iterator[dict]]] = {
  'sft': sft,
  'preference': preference,
  'stepwise': stepwise_rows,
  'o1coder': o1coder_rows,
  'o1coder-hard': o1coder_hard_rows,
  'trees': trees,
}

"""Searched trees on disk: one compressed file a problem, read back with NumPy alone.

A file is an `.npz` of the fields of `TreeFile`, nodes trimmed to those in use; ragged lists of
tokens stand as one array and the ends of its parts. It records what was executed, so that a search
can be replayed without running a program (`recorded`).
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

VERSION = 1
_RAGGED = ('steps', 'rollouts')
_FLAGS = ('terminal', 'cut', 'closed', 'masked')


@dataclasses.dataclass(frozen=True)
class TreeFile:
  """One tree: n nodes, node 0 the root; m roll-outs."""

  problem_id: str
  prompt: np.ndarray  # token ids
  parent: np.ndarray  # [n] int32, -1 for the root
  visits: np.ndarray  # [n] int32
  value_sum: np.ndarray  # [n] float32, of returns in [0, 1]
  logprob: np.ndarray  # [n] float32, of the node's step
  prior: np.ndarray  # [n] float32
  score: np.ndarray  # [n] float32, process reward
  depth: np.ndarray  # [n] int32
  terminal: np.ndarray  # [n] bool
  cut: np.ndarray  # [n] bool, at the depth limit
  closed: np.ndarray  # [n] bool
  masked: np.ndarray  # [n] bool, a roll-out through it could not be judged
  steps: tuple[tuple[int, ...], ...]  # [n] tokens of each node's own step, () for the root
  rollouts: tuple[tuple[int, ...], ...]  # [m] tokens of whole paths after the prompt
  rollout_node: np.ndarray  # [m] int32, node of the first step after the leaf, or -1
  rollout_value: np.ndarray  # [m] float32, return; NaN: cut or masked


def tree_of(forest: Any, problem: int, problem_id: str, prompt: Sequence[int]) -> TreeFile:
  """The tree of one problem of a `Forest`."""
  tree, size = forest.tree, int(forest.tree.size[problem])
  mine = [r for r in forest.rollouts if r.problem == problem]
  fields = ('parent', 'visits', 'value_sum', 'logprob', 'prior', 'score', 'depth', *_FLAGS[:3])
  return TreeFile(
    problem_id=problem_id,
    prompt=np.array(prompt, np.int32),
    **{name: np.asarray(getattr(tree, name))[problem, :size] for name in fields},
    masked=forest.masked[problem, :size],
    steps=tuple(forest.step(problem, node) for node in range(size)),
    rollouts=tuple(r.path for r in mine),
    rollout_node=np.array([r.node for r in mine], np.int32),
    rollout_value=np.array([r.value for r in mine], np.float32),
  )


def to_bytes(tree: TreeFile) -> bytes:
  """The file of a tree."""
  arrays: dict[str, np.ndarray] = {'version': np.array(VERSION)}
  for field in dataclasses.fields(tree):
    value = getattr(tree, field.name)
    if field.name in _RAGGED:
      arrays[field.name] = np.array(sum(value, ()), np.int32)
      arrays[f'{field.name}_ends'] = np.cumsum([len(part) for part in value], dtype=np.int32)
    elif field.name in _FLAGS:
      arrays[field.name] = np.packbits(value)
    else:
      arrays[field.name] = np.asarray(value)
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  return buffer.getvalue()


def read(path: pathlib.Path) -> TreeFile:
  """The tree of a file of `to_bytes`.

  Raises:
    ValueError: the file is of another version.
  """
  with np.load(path, allow_pickle=False) as file:
    arrays = dict(file)
  version = int(arrays.pop('version', -1))
  if version != VERSION:
    raise ValueError(f'{path} is of version {version}; this is made for {VERSION}: search again')
  nodes = len(arrays['parent'])
  for name in _RAGGED:
    tokens, ends = arrays[name].tolist(), arrays.pop(f'{name}_ends').tolist()
    starts = [0, *ends[:-1]]
    arrays[name] = tuple(tuple(tokens[a:b]) for a, b in zip(starts, ends, strict=True))
  for name in _FLAGS:
    arrays[name] = np.unpackbits(arrays[name], count=nodes).astype(bool)
  return TreeFile(**arrays | {'problem_id': str(arrays['problem_id'])})


def recorded(trees: Iterable[TreeFile]) -> Callable[[Sequence[tuple[int, Any]]], list[float]]:
  """A judge for `mcts.Search` that knows the recorded returns and runs nothing.

  Args:
    trees: one for each problem of the search, in its order.

  Raises:
    KeyError: (when called) a path is not recorded: it is not the same search.
  """
  known = [dict(zip(t.rollouts, map(float, t.rollout_value), strict=True)) for t in trees]

  def evaluate(jobs: Sequence[tuple[int, Any]]) -> list[float]:
    if strange := [job for job in jobs if job[1] not in known[job[0]]]:
      raise KeyError(
        f'problem {strange[0][0]}: a path of {len(strange[0][1])} tokens is not recorded'
      )
    return [known[problem][path] for problem, path in jobs]

  return evaluate

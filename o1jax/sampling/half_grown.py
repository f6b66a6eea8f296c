"""A tree search half done, as flat arrays: what it takes to go on and find the same trees.

Keys and values are not in it. A search that goes on has an empty pool, which reads what it is asked
for; draws are named by (seed, problem, node, child), so nothing depends on when they are made.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from o1jax.sampling.forest import Rollout
from o1jax.search import SearchTree

Saved = dict[str, np.ndarray]  # names of parts and fields, 'part0.tree.visits', -> arrays
_TREE = tuple(field.name for field in dataclasses.fields(SearchTree))
Steps = Sequence[tuple[int, ...]]


def packed(growing: Sequence[Any]) -> Saved:
  """The state of the parts of a forest (`mcts`), after the values under way are backed up."""
  with contextlib.ExitStack() as pause:
    for part in growing:
      pause.enter_context(part.lock)
      part.settle()
    counts = [(part.pool.computed, part.pool.read_again) for part in growing]
    found = {'pool': np.sum(counts, axis=0)}
    for i, part in enumerate(growing):
      found |= {f'part{i}.{name}': array for name, array in _packed(part).items()}
  return found


def problems_of(saved: Saved) -> list[np.ndarray]:
  """The problems of each part."""
  count = sum(name.endswith('.problems') for name in saved)
  return [saved[f'part{i}.problems'] for i in range(count)]


def restore(growing: Sequence[Any], saved: Saved) -> None:
  """Brings the parts, new and of the problems of `problems_of`, to where `packed` saw them."""
  first = growing[0].pool  # which counts for all
  first.computed, first.read_again = saved['pool'].tolist()
  for i, part in enumerate(growing):
    prefix = f'part{i}.'
    mine = {n.removeprefix(prefix): a for n, a in saved.items() if n.startswith(prefix)}
    _restore(part, mine)


def _packed(part: Any) -> Saved:
  nodes = [(b, n, path) for b, of in enumerate(part.nodes) for n, path in enumerate(of)]
  numbered = [(b, n, step) for b, n, path in nodes for step in part.numbers.get(path, ())]
  rollouts = [r for _, r in part.rollouts]
  found = {f'tree.{name}': np.asarray(getattr(part.tree, name)) for name in _TREE}
  found |= {'problems': part.problems, 'masked': part.masked.copy(), 'closed': part.closed}
  found |= _flat('step', [path[-1] for _, n, path in nodes if n])
  found |= {'drawn': np.array([part.drawn[path] for _, _, path in nodes])}
  found |= {'number_at': np.array([(b, n) for b, n, _ in numbered]).reshape(-1, 2)}
  found |= _flat('number', [step for _, _, step in numbered])
  found |= {'rollout_at': _table((s, r.problem, r.leaf, r.node) for s, r in part.rollouts)}
  found |= {'rollout_value': np.array([r.value for r in rollouts])}
  found |= _flat('rollout', [r.tokens for r in rollouts])
  logprobs = [x for r in rollouts for x in r.logprobs]
  found |= {'logprobs': np.array(logprobs, np.float32)}
  found |= {'counts': np.array([part.simulations, part.generated, part.computed])}
  return found | {'seconds': np.array([part.waited_s, part.tree_s])}


def _restore(part: Any, saved: Saved) -> None:
  part.tree = SearchTree(**{name: jnp.asarray(saved[f'tree.{name}']) for name in _TREE})
  part.masked, part.closed = saved['masked'], saved['closed']
  part.simulations, part.generated, part.computed = saved['counts'].tolist()
  part.waited_s, part.tree_s = saved['seconds'].tolist()
  steps = iter(_ragged('step', saved))
  for b, size in enumerate(saved['tree.size']):
    for parent in saved['tree.parent'][b, 1:size]:
      part.nodes[b].append((*part.nodes[b][parent], next(steps)))
  nodes = [path for of in part.nodes for path in of]
  part.drawn.update(dict(zip(nodes, saved['drawn'].tolist(), strict=True)))
  for (b, n), step in zip(saved['number_at'], _ragged('number', saved), strict=True):
    known = part.numbers.setdefault(part.nodes[b][n], {})
    known[step] = len(known)
  tokens = _ragged('rollout', saved)
  ends = np.cumsum([len(t) for t in tokens])
  logprobs = np.split(saved['logprobs'], ends[:-1])[: len(tokens)]
  values = saved['rollout_value'].tolist()
  rows = zip(saved['rollout_at'].tolist(), tokens, logprobs, values, strict=True)
  for (simulation, b, leaf, node), own, each, value in rows:
    path = part.nodes[b][leaf]
    prefix = sum(path[1:], ())
    told = tuple(each.tolist())
    rollout = Rollout(b, leaf, node, len(path) - 1, prefix, own, told, value)
    part.rollouts.append((simulation, rollout))
    if part.whole(rollout.tokens):
      part.returns[b, rollout.path] = value


def _table(rows: Iterable[tuple[int, ...]]) -> np.ndarray:
  return np.array(list(rows), np.int64).reshape(-1, 4)


def _flat(name: str, parts: Steps) -> Saved:
  """Ragged tokens as one array and the ends of its parts."""
  ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
  return {name: np.array([t for part in parts for t in part], np.int32), f'{name}_ends': ends}


def _ragged(name: str, saved: Saved) -> Steps:
  tokens, ends = saved[name].tolist(), saved[f'{name}_ends'].tolist()
  return [tuple(tokens[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=bool(ends))]

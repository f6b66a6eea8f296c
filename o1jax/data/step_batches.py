"""Prefix trees as batches for the process reward model.

Rows of one problem stay together, so a batch holds both sides of its sibling
pairs and one forward pass serves the point-wise and the pair-wise loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from o1jax.batch import StepBatch
from o1jax.data.paths import PathEncoder
from o1jax.data.prefix_tree import Prefix, PrefixTree
from o1jax.types import Problem


@dataclasses.dataclass(frozen=True)
class StepBatchShape:
  """Fixed shape of every batch: rows, tokens a row, steps a row, pairs, microbatches."""

  rows: int
  tokens: int
  steps: int
  pairs: int
  parts: int = 1  # microbatches of `learn.microbatch.split`, which divide the rows


@dataclasses.dataclass(frozen=True)
class _Group:
  """Some paths of one problem and the siblings among them."""

  problem: Problem
  paths: list[Prefix]
  tree: PrefixTree


def step_batches(
  trees: Mapping[str, PrefixTree],
  problems: Mapping[str, Problem],
  encoder: PathEncoder,
  shape: StepBatchShape,
  *,
  rng: np.random.Generator,
  margin: float,
  hard: bool = False,
  paths_per_problem: int = 16,
) -> list[StepBatch]:
  """All trees as fixed-shape batches of NumPy arrays, in random order.

  A node's label is its mean return (or whether it is > 0, if `hard`), its weight
  the root of its visits, split over the rows that pass through it. Paths that
  do not fit `shape` are left out; of the others at most `paths_per_problem` (and at most
  `shape.rows / shape.parts`) are drawn, for the siblings of a problem share one microbatch.
  """
  room = shape.rows // shape.parts
  limit = min(paths_per_problem, room)
  groups = []
  for problem_id, tree in trees.items():
    paths = [p for p in tree.paths if len(p) <= shape.steps]
    paths = [p for p in paths if len(encoder.document(problems[problem_id], p).ids) <= shape.tokens]
    if len(paths) > limit:
      paths = [paths[i] for i in rng.permutation(len(paths))[:limit]]
    if paths:
      groups.append(_Group(problems[problem_id], paths, tree))
  order = [groups[i] for i in rng.permutation(len(groups))]
  return [_build(p, encoder, shape, rng, margin, hard) for p in _placed(order, shape.parts, room)]


def _placed(groups: Sequence[_Group], parts: int, room: int) -> list[list[tuple[int, _Group]]]:
  """Batches of (microbatch, group): each group where it first fits, or in a new batch."""
  batches: list[list[tuple[int, _Group]]] = []
  sizes = [room + 1]  # of the last batch's microbatches: at first there is none
  for group in groups:
    free = [part for part, size in enumerate(sizes) if size + len(group.paths) <= room]
    if not free:
      batches.append([])
      sizes = [0] * parts
    part = free[0] if free else 0
    batches[-1].append((part, group))
    sizes[part] += len(group.paths)
  return batches


def _build(placed, encoder, shape, rng, margin, hard) -> StepBatch:
  tokens = np.zeros((shape.rows, shape.tokens), np.int32)
  step_ids = np.zeros_like(tokens)
  segments = np.zeros_like(tokens)
  labels = np.zeros((shape.rows, shape.steps), np.float32)
  weights = np.zeros_like(labels)
  pairs: list[tuple[int, int, int, float]] = []
  free = list(range(shape.parts))  # next row of each microbatch, which has every `parts`-th
  for part, group in placed:
    rows_of: dict[Prefix, list[int]] = {}
    for path in group.paths:
      row, free[part] = free[part], free[part] + shape.parts
      ids = list(encoder.prompt(group.problem))
      for j, step in enumerate(path, start=1):
        new = encoder.step(step)
        step_ids[row, len(ids) : len(ids) + len(new)] = j
        ids += new
        rows_of.setdefault(path[:j], []).append(row)
      tokens[row, : len(ids)] = ids
      segments[row, : len(ids)] = 1
    for prefix, rows in rows_of.items():
      node = group.tree.nodes[prefix]
      labels[rows, len(prefix) - 1] = float(node.value > 0) if hard else node.value
      weights[rows, len(prefix) - 1] = math.sqrt(node.visits) / len(rows)
    pairs += _pairs(group.tree, rows_of, margin)
  pair_rows, pair_weights = _choose(pairs, shape.pairs, rng)
  positions = np.broadcast_to(np.arange(shape.tokens, dtype=np.int32), tokens.shape)
  return StepBatch(
    tokens, positions.copy(), segments, step_ids, labels, weights, pair_rows, pair_weights
  )


def _pairs(tree: PrefixTree, rows_of: Mapping[Prefix, Sequence[int]], margin: float):
  """(win row, lose row, step, weight) of the siblings that are both in the batch."""
  found = []
  for group in tree.sibling_groups():
    present = [p for p in group if p in rows_of]
    for i, a in enumerate(present):
      for b in present[i + 1 :]:
        gap = tree.nodes[a].value - tree.nodes[b].value
        win, lose = (a, b) if gap > 0 else (b, a)
        if abs(gap) > margin:
          fewer = min(tree.nodes[a].visits, tree.nodes[b].visits)
          found.append((rows_of[win][0], rows_of[lose][0], len(win), math.sqrt(fewer)))
  return found


def _choose(pairs, limit: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  if len(pairs) > limit:
    pairs = [pairs[i] for i in rng.choice(len(pairs), limit, replace=False)]
  rows = np.zeros((limit, 3), np.int32)
  rows[:, 2] = 1
  weights = np.zeros(limit, np.float32)
  for i, (win, lose, step, weight) in enumerate(pairs):
    rows[i] = win, lose, step
    weights[i] = weight
  return rows, weights

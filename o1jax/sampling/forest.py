"""What a tree search has found: trees, paths of their nodes, roll-outs."""

from __future__ import annotations

import dataclasses

import numpy as np

from o1jax.search import ROOT, SearchTree


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One sampled continuation of a leaf to its end."""

  problem: int
  leaf: int  # node it starts from
  node: int  # node of its first step, UNVISITED if the tree had no room
  depth: int  # steps of the leaf
  prefix: tuple[int, ...]  # path tokens of the leaf
  tokens: tuple[int, ...]  # sampled after it, end of document included
  logprobs: tuple[float, ...]  # of those, untruncated at temperature 1
  value: float  # return in [0, 1]; NaN: cut or masked, in no mean

  @property
  def path(self) -> tuple[int, ...]:
    """All tokens after the prompt."""
    return self.prefix + self.tokens


@dataclasses.dataclass(frozen=True)
class Forest:
  """Searched trees (NumPy arrays), the path of every node, and what it cost."""

  tree: SearchTree
  paths: tuple[tuple[tuple[int, ...], ...], ...]  # [B][node] tokens after the prompt, root ()
  rollouts: tuple[Rollout, ...]  # in order of simulation, problem, child
  masked: np.ndarray  # [B, N] bool, nodes with a roll-out that the judge could not judge
  generated: int  # tokens drawn
  computed: int  # positions that went through the model: prompts, padding and dead rows too
  read_again: int = 0  # tokens of prefixes that were read more than once
  waited_s: float = 0.0  # seconds in which nothing was left to do but to wait for the judge
  tree_s: float = 0.0  # of the parts that grew: selection, expansion, backup, and their wait for it

  def step(self, problem: int, node: int) -> tuple[int, ...]:
    """Tokens of the node's own step; () for the root."""
    parent = int(self.tree.parent[problem, node])
    path = self.paths[problem][node]
    return path[len(self.paths[problem][parent]) :] if node != ROOT else path


def halves(count: int) -> list[np.ndarray]:
  """The problems of the two parts of a forest, or of its only one."""
  middle = (count + 1) // 2
  return [part for part in (np.arange(middle), np.arange(middle, count)) if len(part)]

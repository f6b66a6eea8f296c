"""Every roll-out of a problem as one prefix tree: step values, labels, siblings.

A roll-out is worth its reward to every prefix of it. Keeping all of them, from
search and from RL alike, is what lets the process reward model keep up with a
policy that improves: the loop's small search trees alone were not enough.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from o1jax.types import Step, StepLabel, StepPair, Trajectory

Prefix = tuple[Step, ...]


@dataclasses.dataclass(slots=True)
class Node:
  """Sum and number of the returns of all roll-outs through one prefix."""

  value_sum: float = 0.0  # each return by its roll-out's weight
  weight: float = 0.0
  visits: int = 0

  @property
  def value(self) -> float:
    """Mean return of the roll-outs through the prefix, by their weights."""
    return self.value_sum / self.weight


class PrefixTree:
  """The tree of one problem's roll-outs; cut-off and masked ones stay out."""

  def __init__(self, trajectories: Iterable[Trajectory] = ()):
    self.nodes: dict[Prefix, Node] = {}
    self.children: dict[Prefix, list[Prefix]] = collections.defaultdict(list)
    self.paths: dict[Prefix, Trajectory] = {}  # one for each distinct whole path
    for trajectory in trajectories:
      self.add(trajectory)

  def add(self, trajectory: Trajectory) -> None:
    """Backs the trajectory's reward up along its prefixes."""
    if trajectory.reward is None or not trajectory.steps:
      return
    steps = trajectory.steps
    for depth in range(1, len(steps) + 1):
      prefix = steps[:depth]
      if prefix not in self.nodes:
        self.nodes[prefix] = Node()
        self.children[prefix[:-1]].append(prefix)
      node = self.nodes[prefix]
      node.value_sum += trajectory.weight * trajectory.reward
      node.weight += trajectory.weight
      node.visits += 1
    self.paths.setdefault(steps, trajectory)

  def valued(self, trajectory: Trajectory) -> Trajectory:
    """The trajectory with this tree's step values and visits."""
    nodes = [self.nodes.get(trajectory.steps[:d]) for d in range(1, len(trajectory.steps) + 1)]
    if None in nodes:
      return trajectory
    return dataclasses.replace(
      trajectory,
      values=tuple(n.value for n in nodes),
      visits=tuple(n.visits for n in nodes),
    )

  def sibling_groups(self) -> Iterator[list[Prefix]]:
    """Children of one prefix, for every prefix with at least two."""
    return (group for group in self.children.values() if len(group) > 1)

  def labels(self, problem_id: str) -> list[StepLabel]:
    """One label for every node."""
    return [
      StepLabel(problem_id, prefix[:-1], prefix[-1], node.value, node.visits)
      for prefix, node in self.nodes.items()
    ]

  def pairs(self, problem_id: str, margin: float) -> list[StepPair]:
    """Sibling pairs whose mean returns differ by more than `margin`."""
    pairs = []
    for group in self.sibling_groups():
      for a, b in itertools.combinations(group, 2):
        win, lose = (a, b) if self.nodes[a].value >= self.nodes[b].value else (b, a)
        gap = self.nodes[win].value - self.nodes[lose].value
        if gap > margin:
          pairs.append(StepPair(problem_id, win[:-1], win[-1], lose[-1], gap))
    return pairs


def by_problem(trajectories: Sequence[Trajectory]) -> dict[str, PrefixTree]:
  """One prefix tree a problem, in order of first appearance."""
  trees: dict[str, PrefixTree] = {}
  for trajectory in trajectories:
    trees.setdefault(trajectory.problem_id, PrefixTree()).add(trajectory)
  return trees

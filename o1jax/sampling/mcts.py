"""Monte-Carlo tree search over steps with roll-outs, for many problems at once.

Each simulation picks a leaf in every tree, continues it K times to the end in
one batch, judges the K programs, and backs every return up through the first
step of its roll-out, which becomes a node. The sandbox comes in as a function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models.transformer import Params
from o1jax.sampling.guided import StepIds
from o1jax.sampling.sampler import Sampler, Samples
from o1jax.search import (
  ROOT,
  UNVISITED,
  NewChildren,
  Rule,
  SearchTree,
  backup,
  constant,
  empty_tree,
  expand,
  select,
  uct,
)

# (problem index, path tokens after the prompt) -> returns in [0, 1], NaN for masked.
Evaluate = Callable[[Sequence[tuple[int, tuple[int, ...]]]], Sequence[float]]


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
  """Searched trees (NumPy arrays), the path of every node, and all roll-outs."""

  tree: SearchTree
  paths: tuple[tuple[tuple[int, ...], ...], ...]  # [B][node] tokens after the prompt, root ()
  rollouts: tuple[Rollout, ...]  # in order of simulation, problem, child
  generated: int  # tokens drawn
  computed: int  # tokens that went through the model, re-read prefixes included

  def step(self, problem: int, node: int) -> tuple[int, ...]:
    """Tokens of the node's own step; () for the root."""
    parent = int(self.tree.parent[problem, node])
    path = self.paths[problem][node]
    return path[len(self.paths[problem][parent]) :] if node != ROOT else path


@dataclasses.dataclass(frozen=True)
class Search:
  """Settings of a search.

  `sampler` must stop at `steps.eos` only: roll-outs go to the end. `width` is K,
  `max_depth` the deepest node (deeper steps are rolled out, not kept as nodes).
  `c` times `schedule(progress)` is the exploration constant.
  """

  sampler: Sampler
  steps: StepIds
  width: int = 3
  simulations: int = 4
  max_depth: int = 10
  rule: Rule = uct
  c: float = 2.0
  schedule: Callable[[float], float] = constant

  def __call__(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    evaluate: Evaluate,
    *,
    score: Evaluate | None = None,
    seed: int = 0,
    ids: np.ndarray | None = None,
  ) -> Forest:
    """Searches the trees of all prompts.

    Args:
      params: the policy's parameters.
      prompts: token ids, none empty.
      evaluate: judges whole paths; called once a simulation with what is new.
      score: process rewards in [0, 1] of paths that end in a new node, for `puct`.
      seed: with `ids` it decides every draw.
      ids: [prompts] or [prompts, P] ints that name the problems; None for 0, 1, 2, ...
    """
    ids = np.arange(len(prompts)) if ids is None else np.asarray(ids)
    ids = ids.reshape(len(prompts), -1)
    growing = _Growing(self, params, prompts, evaluate, score, seed, ids)
    for simulation in range(self.simulations):
      progress = simulation / max(1, self.simulations - 1)
      if not growing.simulate(self.c * self.schedule(progress)):
        break
    return growing.forest()


class _Growing:
  """The forest while it grows."""

  def __init__(self, search: Search, params, prompts, evaluate, score, seed: int, ids: np.ndarray):
    self.search, self.params, self.prompts = search, params, prompts
    self.evaluate, self.score, self.seed, self.ids = evaluate, score, seed, ids
    self.batch = len(prompts)
    self.tree = empty_tree(self.batch, 1 + search.width * search.simulations, search.width)
    self.paths: list[list[tuple[int, ...]]] = [[()] for _ in prompts]  # from the prompt's end
    self.rollouts: list[Rollout] = []
    self.judged: dict[tuple[int, tuple[int, ...]], float] = {}
    self.generated = self.computed = 0

  def simulate(self, c: float) -> bool:
    """One simulation in every tree that is not exhausted; False if all are."""
    leaf = np.asarray(select(self.tree, self.search.rule, c))
    going = np.flatnonzero(~np.asarray(self.tree.closed)[:, ROOT])
    if not going.size:
      return False
    rollouts = self._roll_out(going, leaf)
    self.tree, nodes = expand(self.tree, jnp.asarray(leaf), self._children(going, rollouts))
    nodes = np.asarray(nodes)
    values = np.full((self.batch, self.search.width), np.nan, np.float32)
    for b, siblings in zip(going, rollouts, strict=True):
      for k, rollout in enumerate(siblings):
        node, values[b, k] = int(nodes[b, k]), rollout.value
        if node == len(self.paths[b]):  # else it is the same step as an earlier sibling
          self.paths[b].append(rollout.prefix + self._first_step(rollout))
        self.rollouts.append(dataclasses.replace(rollout, node=node))
    self.tree = backup(self.tree, jnp.asarray(nodes), jnp.asarray(values), ~np.isnan(values))
    return True

  def _roll_out(self, going: np.ndarray, leaf: np.ndarray) -> list[list[Rollout]]:
    """K judged roll-outs from the leaf of each tree in `going`."""
    width = self.search.width
    samples = self._continue(going, leaf)
    depth = np.asarray(self.tree.depth)
    rollouts = []
    for row in range(len(going) * width):
      b = int(going[row // width])
      rollouts.append(
        Rollout(
          problem=b,
          leaf=int(leaf[b]),
          node=UNVISITED,
          depth=int(depth[b, leaf[b]]),
          prefix=self.paths[b][leaf[b]],
          tokens=tuple(samples.ids(row)),
          logprobs=tuple(samples.logprobs[row, : samples.lengths[row]].tolist()),
          value=math.nan,
        )
      )
    whole = [(r.problem, r.path) for r in rollouts if r.tokens[-1] == self.search.steps.eos]
    fresh = [job for job in dict.fromkeys(whole) if job not in self.judged]
    if fresh:
      self.judged.update(zip(fresh, map(float, self.evaluate(fresh)), strict=True))
    rollouts = [
      dataclasses.replace(r, value=self.judged.get((r.problem, r.path), math.nan)) for r in rollouts
    ]
    return [rollouts[i : i + width] for i in range(0, len(rollouts), width)]

  def _continue(self, going: np.ndarray, leaf: np.ndarray) -> Samples:
    """K continuations of every leaf, its prefix read again for all K together."""
    samples = self.search.sampler(
      self.params,
      [(*self.prompts[b], *self.paths[b][leaf[b]]) for b in going],
      seed=self.seed,
      ids=np.column_stack([self.ids[going], leaf[going]]),
      samples=self.search.width,
    )
    self.generated += samples.generated
    self.computed += samples.computed
    return samples

  def _first_step(self, rollout: Rollout) -> tuple[int, ...]:
    end = self.search.steps.step_end
    tokens = rollout.tokens
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens

  def _children(self, going: np.ndarray, rollouts: list[list[Rollout]]) -> NewChildren:
    """The first steps of the roll-outs as new nodes; trees that do not grow get none."""
    steps = [[self._first_step(r) for r in siblings] for siblings in rollouts]
    ends = self.search.steps
    terminal = [[ends.is_terminal(s) and s[-1] in ends.stops for s in row] for row in steps]
    whole = [[s[-1] in ends.stops for s in row] for row in steps]
    room = [[r.depth + 1 < self.search.max_depth for r in row] for row in rollouts]
    terminal_ = np.array(terminal)

    def spread(rows, dtype):
      out = np.zeros((self.batch, self.search.width), dtype)
      out[going] = rows
      return jnp.asarray(out)

    return NewChildren(
      # The first sibling that is the same step: equal exactly where the steps are.
      identity=spread([[row.index(s) for s in row] for row in steps], np.int32),
      logprob=spread(
        [
          [sum(r.logprobs[: len(s)]) for r, s in zip(*pair, strict=True)]
          for pair in zip(rollouts, steps, strict=True)
        ],
        np.float32,
      ),
      score=spread(self._scores(rollouts, steps), np.float32),
      terminal=spread(terminal_, bool),
      cut=spread(~terminal_ & ~(np.array(whole) & np.array(room)), bool),
      valid=spread(np.ones_like(terminal_), bool),
    )

  def _scores(self, rollouts, steps) -> np.ndarray:
    if self.score is None:
      return np.zeros((len(rollouts), self.search.width), np.float32)
    jobs = [
      (r.problem, r.prefix + s)
      for pair in zip(rollouts, steps, strict=True)
      for r, s in zip(*pair, strict=True)
    ]
    return np.reshape(self.score(jobs), (len(rollouts), self.search.width))

  def forest(self) -> Forest:
    """What has grown, on the host."""
    return Forest(
      tree=jax.tree.map(np.asarray, self.tree),
      paths=tuple(tuple(p) for p in self.paths),
      rollouts=tuple(self.rollouts),
      generated=self.generated,
      computed=self.computed,
    )

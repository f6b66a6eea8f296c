"""A part of a forest while it grows: select, continue, judge, expand, back up.

`mcts.Search` has the settings and grows the parts in turn.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np

from o1jax.sampling.forest import Rollout
from o1jax.sampling.paths import Path, Paths
from o1jax.sampling.sampler import Samples
from o1jax.search import (
  ROOT,
  UNVISITED,
  NewChildren,
  SearchTree,
  backup,
  empty_tree,
  expand,
  select,
)

if TYPE_CHECKING:
  from o1jax.sampling.mcts import Search


class Growing:
  """A part of the forest while it grows: b counts its trees, `problems[b]` the caller's."""

  def __init__(
    self, search: Search, paths: Paths, problems: np.ndarray, judge, evaluate, score, seed, ids
  ):
    self.search, self.pool, self.problems = search, paths, problems
    self.judge, self.evaluate, self.score = judge, evaluate, score
    self.seed, self.ids = seed, ids[problems]
    self.batch = len(problems)
    capacity = 1 + search.width * search.simulations
    slots = min(max(search.slots, search.width), capacity - 1)
    self.tree = empty_tree(self.batch, capacity, slots)
    self.masked = np.zeros((self.batch, capacity), bool)
    self.closed = np.zeros(self.tree.shape[:2], bool)
    self.nodes: list[list[Path]] = [[(int(p),)] for p in problems]  # paths of the nodes
    self.rollouts: list[tuple[int, Rollout]] = []  # with the simulation
    self.numbers: dict[Path, dict[tuple[int, ...], int]] = {}  # of the steps drawn after a path
    self.drawn: collections.Counter[Path] = collections.Counter()  # steps drawn after it
    self.returns: dict[tuple[int, tuple[int, ...]], float] = {}
    self.waiting: Callable[[], None] | None = None
    self.simulations = 0  # that have been grown
    self.generated = self.computed = 0
    self.waited_s = self.tree_s = 0.0

  def grow(self, simulation: int, c: float) -> None:
    """Continues a leaf in every tree that is not exhausted, and hands the programs to the judge."""
    self.simulations = simulation + 1
    started = time.perf_counter()
    search = self.search
    leaf = np.asarray(
      select(self.tree, search.rule, c, root_rule=search.root_rule, allowed=search.allowed)
    )
    self.tree_s += time.perf_counter() - started
    going = np.flatnonzero(~self.closed[:, ROOT])
    if not going.size:
      return
    samples = self._continue(going, leaf)
    rollouts = self._rollouts(going, leaf, samples)
    steps = [self._first_step(r) for r in rollouts]
    scores = self._scores(rollouts, steps)
    started = time.perf_counter()
    new = self._children(going, rollouts, steps, scores)
    widen = search.allowed is not None
    self.tree, nodes = expand(self.tree, leaf, new, widen=widen)
    nodes = np.asarray(nodes)[going].reshape(-1)
    self.tree_s += time.perf_counter() - started
    for r, step, node in zip(rollouts, steps, nodes, strict=True):
      known = self.nodes[r.problem]
      if node == len(known):  # else it is the same step as an earlier sibling, or no node
        known.append((*known[r.leaf], step))
    self._retire_closed()
    rollouts = [
      dataclasses.replace(r, node=int(node)) for r, node in zip(rollouts, nodes, strict=True)
    ]
    whole = [(r.problem, r.path) for r in rollouts if self.whole(r)]
    fresh = [job for job in dict.fromkeys(whole) if job not in self.returns]
    jobs = [(int(self.problems[b]), path) for b, path in fresh]
    verdicts = self.judge.submit(self.evaluate, jobs) if jobs else None
    self.waiting = lambda: self._settle(simulation, going, rollouts, scores, fresh, verdicts)

  def settle(self) -> None:
    """Backs up the values of what was continued last, once they are there."""
    if self.waiting is not None:
      self.waiting()
      self.waiting = None

  def _settle(self, simulation, going, rollouts: list[Rollout], scores, fresh, verdicts) -> None:
    started = time.perf_counter()
    values = verdicts.result() if verdicts is not None else ()
    self.waited_s += time.perf_counter() - started
    self.returns.update(zip(fresh, map(float, values), strict=True))
    rollouts = [
      dataclasses.replace(r, value=self.returns.get((r.problem, r.path), math.nan))
      for r in rollouts
    ]
    for r in rollouts:
      if r.node != UNVISITED and self.whole(r) and math.isnan(r.value):
        self.masked[r.problem, r.node] = True
    kept = [r for r in rollouts if self.search.mix < 1 or self.whole(r)]
    self.rollouts += [(simulation, r) for r in kept]
    width = self.search.width
    nodes, backed = (np.full((self.batch, width), fill) for fill in (UNVISITED, np.nan))
    nodes[going] = np.reshape([r.node for r in rollouts], (-1, width))
    tree = jax.tree.map(np.asarray, self.tree) if self.search.mix else self.tree
    backed[going] = np.reshape(
      [self._value(tree, r, s) for r, s in zip(rollouts, scores, strict=True)], (-1, width)
    )
    started = time.perf_counter()
    self.tree = jax.block_until_ready(
      backup(self.tree, nodes, backed.astype(np.float32), ~np.isnan(backed))
    )
    self.tree_s += time.perf_counter() - started
    self._close_decided()

  def _close_decided(self) -> None:
    """Trees of which `Search.enough` has seen enough grow no more."""
    if self.search.enough is None:
      return
    so_far: list[list[Rollout]] = [[] for _ in range(self.batch)]
    for _, rollout in self.rollouts:
      so_far[rollout.problem].append(rollout)
    going = np.flatnonzero(~self.closed[:, ROOT])
    decided = [b for b in going if self.search.enough(so_far[b])]
    if decided:
      closed = np.array(self.tree.closed)
      closed[decided, ROOT] = True
      self.tree = dataclasses.replace(self.tree, closed=closed)
      self._retire_closed()

  def _value(self, tree: SearchTree, rollout: Rollout, score: float) -> float:
    """What a step is worth: the return of its roll-out, its process reward, or their mix."""
    mix = self.search.mix
    if not mix or rollout.node == UNVISITED or tree.terminal[rollout.problem, rollout.node]:
      return rollout.value
    if mix == 1:  # a step at the depth limit leads nowhere, whatever it promises
      return math.nan if tree.cut[rollout.problem, rollout.node] else score
    return (1 - mix) * rollout.value + mix * score

  def whole(self, rollout: Rollout) -> bool:
    """Whether it came to the end: there is something to judge."""
    steps = self.search.steps
    if self.search.mix == 1:
      return steps.is_terminal(rollout.tokens) and rollout.tokens[-1] in steps.stops
    return rollout.tokens[-1] == steps.eos

  def _continue(self, going: np.ndarray, leaf: np.ndarray) -> Samples:
    """K continuations of every leaf; those first steps that can be continued go into the pool."""
    search, width = self.search, self.search.width
    sampler = search.sampler
    if search.mix == 1:
      sampler = dataclasses.replace(sampler, stop_ids=search.steps.stops)
    rows = np.repeat(going, width)
    todo = [self.nodes[b][leaf[b]] for b in rows]
    child = [self.drawn[p] + k % width for k, p in enumerate(todo)]  # a widened leaf draws anew
    self.drawn.update(todo)
    names = [self.ids[rows], leaf[rows, None], np.array(child)[:, None]]
    samples = search.extend(
      sampler,
      self.pool,
      todo,
      seed=self.seed,
      ids=np.column_stack(names),
      marks=search.steps.stops,
      keep=lambda path: not search.steps.is_terminal(path[-1]) and len(path) - 1 < search.max_depth,
    )
    self.generated += samples.generated
    self.computed += samples.computed
    return samples

  def _rollouts(self, going: np.ndarray, leaf: np.ndarray, samples: Samples) -> list[Rollout]:
    """The continuations, not judged and without their nodes."""
    found = []
    for row in range(len(going) * self.search.width):
      b = int(going[row // self.search.width])
      path = self.nodes[b][leaf[b]]
      found.append(
        Rollout(
          problem=b,
          leaf=int(leaf[b]),
          node=UNVISITED,
          depth=len(path) - 1,
          prefix=sum(path[1:], ()),
          tokens=tuple(samples.ids(row)),
          logprobs=tuple(samples.logprobs[row, : samples.lengths[row]].tolist()),
          value=math.nan,
        )
      )
    return found

  def _first_step(self, rollout: Rollout) -> tuple[int, ...]:
    end = self.search.steps.step_end
    tokens = rollout.tokens
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens

  def _children(self, going: np.ndarray, rollouts: list[Rollout], steps, scores) -> NewChildren:
    """The first steps of the roll-outs as new nodes; trees that do not grow get none."""
    ends, width = self.search.steps, self.search.width
    whole = np.array([s[-1] in ends.stops for s in steps])
    terminal = np.array([ends.is_terminal(s) for s in steps]) & whole
    room = np.array([r.depth + 1 < self.search.max_depth for r in rollouts])
    identity = []  # equal exactly where the steps of a leaf are
    for r, step in zip(rollouts, steps, strict=True):
      known = self.numbers.setdefault(self.nodes[r.problem][r.leaf], {})
      identity.append(known.setdefault(step, len(known)))

    def spread(values, dtype):
      out = np.zeros((self.batch, width), dtype)
      out[going] = np.reshape(values, (-1, width))
      return out  # handed to the device with the call: quicker than by itself

    logprobs = [sum(r.logprobs[: len(s)]) for r, s in zip(rollouts, steps, strict=True)]
    return NewChildren(
      identity=spread(identity, np.int32),
      logprob=spread(logprobs, np.float32),
      score=spread(scores, np.float32),
      gumbel=spread(self._noise(rollouts), np.float32),
      terminal=spread(terminal, bool),
      cut=spread(~terminal & ~(whole & room), bool),
      valid=spread(np.ones_like(terminal), bool),
    )

  def _noise(self, rollouts: list[Rollout]) -> list[float]:
    """Gumbel noise of the root's children, by the names of their draws."""
    if self.search.root_rule is None:
      return [0.0] * len(rollouts)
    names = [
      [self.seed, *map(int, self.ids[r.problem]), r.leaf, k % self.search.width]
      for k, r in enumerate(rollouts)
    ]
    return [np.random.default_rng(name).gumbel() for name in names]

  def _scores(self, rollouts: list[Rollout], steps) -> np.ndarray:
    """Process rewards of the first steps, each distinct one asked for once."""
    if self.score is None:
      return np.zeros(len(rollouts), np.float32)
    paths = [(*self.nodes[r.problem][r.leaf], s) for r, s in zip(rollouts, steps, strict=True)]
    distinct = list(dict.fromkeys(paths))
    known = dict(zip(distinct, self.score(distinct), strict=True))
    return np.array([known[p] for p in paths], np.float32)

  def _retire_closed(self) -> None:
    """Nothing is continued from a closed node again: its keys and values can go first."""
    closed = np.asarray(self.tree.closed)
    for b, node in np.argwhere(closed & ~self.closed):
      self.pool.retire(self.nodes[b][node])
    self.closed = closed

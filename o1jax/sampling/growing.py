"""A part of a forest while it grows: select, continue, judge, expand, back up.

`mcts.Search` has the settings and grows the parts in turn.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from o1jax.sampling.forest import Rollout
from o1jax.sampling.paths import Path, Paths
from o1jax.sampling.sampler import Samples
from o1jax.search import (
  ROOT,
  UNVISITED,
  NewChildren,
  backup,
  empty_tree,
  expand,
  select,
)

if TYPE_CHECKING:
  from o1jax.sampling.mcts import Search


class Drawn(NamedTuple):
  """A continuation of a leaf."""

  problem: int
  leaf: int
  path: Path  # of the leaf
  tokens: tuple[int, ...]
  logprobs: list[float]
  step: tuple[int, ...]  # the first of the tokens

  @property
  def child(self) -> Path:
    """The path of its first step."""
    return (*self.path, self.step)


class Waits:
  """For how long nothing but the judge works, where `working` parts grow at once."""

  def __init__(self, working: int):
    self._working, self._since = working, 0.0
    self._lock = threading.Lock()

  def begin(self) -> None:
    """A part waits for the judge, or is at its end."""
    with self._lock:
      self._working -= 1
      if not self._working:
        self._since = time.perf_counter()

  def end(self) -> float:
    """A part goes on. Seconds in which none did, until now."""
    with self._lock:
      seconds = 0.0 if self._working else time.perf_counter() - self._since
      self._working += 1
      return seconds


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
    self.lock = threading.Lock()  # held while it grows
    self.waits = Waits(1)
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
    drawn = self._continuations(going, leaf, self._continue(going, leaf))
    scores = self._scores(drawn)
    started = time.perf_counter()
    new = self._children(going, drawn, scores)
    widen = search.allowed is not None
    self.tree, nodes = expand(self.tree, leaf, new, widen=widen)
    nodes = np.asarray(nodes)[going].reshape(-1)
    self.tree_s += time.perf_counter() - started
    for d, node in zip(drawn, nodes.tolist(), strict=True):
      known = self.nodes[d.problem]
      if node == len(known):  # else it is the same step as an earlier sibling, or no node
        known.append(d.child)
    self._retire_closed()
    jobs = [self._job(d) if self.whole(d.tokens) else None for d in drawn]
    fresh = [job for job in dict.fromkeys(jobs) if job and job not in self.returns]
    asked = [(int(self.problems[b]), path) for b, path in fresh]
    verdicts = self.judge.submit(self.evaluate, asked) if asked else None
    self.waiting = lambda: self._settle(simulation, drawn, jobs, nodes, scores, fresh, verdicts)

  def settle(self) -> None:
    """Backs up the values of what was continued last, once they are there."""
    if self.waiting is not None:
      self.waiting()
      self.waiting = None

  def _settle(self, simulation, drawn: list[Drawn], jobs, nodes, scores, fresh, verdicts) -> None:
    self.waits.begin()
    found = verdicts.result() if verdicts is not None else ()
    self.waited_s += self.waits.end()
    self.returns.update(zip(fresh, map(float, found), strict=True))
    values = [self.returns.get(job, math.nan) for job in jobs]
    returns = np.array(values)
    whole = np.array([job is not None for job in jobs])
    rows = np.array([d.problem for d in drawn])
    lost = whole & np.isnan(returns) & (nodes != UNVISITED)
    self.masked[rows[lost], nodes[lost]] = True
    kept = range(len(drawn)) if self.search.mix < 1 else np.flatnonzero(whole).tolist()
    self.rollouts += [(simulation, self._rollout(drawn[i], int(nodes[i]), values[i])) for i in kept]
    width = self.search.width
    where, backed = (np.full((self.batch, width), fill) for fill in (UNVISITED, np.nan))
    going = rows[::width]
    where[going] = nodes.reshape(-1, width)
    backed[going] = self._values(rows, nodes, returns, scores).reshape(-1, width)
    started = time.perf_counter()
    self.tree = jax.block_until_ready(
      backup(self.tree, where, backed.astype(np.float32), ~np.isnan(backed))
    )
    self.tree_s += time.perf_counter() - started
    self._close_decided()

  def _job(self, drawn: Drawn) -> tuple[int, tuple[int, ...]]:
    """What is judged: the tree and the path tokens after the prompt."""
    return drawn.problem, sum(drawn.path[1:], ()) + drawn.tokens

  def _rollout(self, drawn: Drawn, node: int, value: float) -> Rollout:
    path = drawn.path
    return Rollout(
      problem=drawn.problem,
      leaf=drawn.leaf,
      node=node,
      depth=len(path) - 1,
      prefix=sum(path[1:], ()),
      tokens=drawn.tokens,
      logprobs=tuple(drawn.logprobs),
      value=value,
    )

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

  def _values(self, rows, nodes, returns, scores) -> np.ndarray:
    """What each step is worth: the return of its roll-out, its process reward, or their mix."""
    mix = self.search.mix
    if not mix:
      return returns
    terminal, cut = (np.asarray(x)[rows, nodes] for x in (self.tree.terminal, self.tree.cut))
    # A step at the depth limit leads nowhere, whatever it promises.
    promised = np.where(cut, math.nan, scores)
    mixed = promised if mix == 1 else (1 - mix) * returns + mix * scores
    return np.where((nodes == UNVISITED) | terminal, returns, mixed)

  def whole(self, tokens: tuple[int, ...]) -> bool:
    """Whether a continuation came to the end: there is something to judge."""
    steps = self.search.steps
    if self.search.mix == 1:
      return steps.is_terminal(tokens) and tokens[-1] in steps.stops
    return tokens[-1] == steps.eos

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

  def _continuations(self, going: np.ndarray, leaf: np.ndarray, samples: Samples) -> list[Drawn]:
    """The continuations, K of each leaf."""
    end, found = self.search.steps.step_end, []
    leaves = [(b, int(leaf[b]), self.nodes[b][leaf[b]]) for b in going.tolist()]
    drawn = (samples.tokens.tolist(), samples.logprobs.tolist(), samples.lengths.tolist())
    for row, (tokens, logprobs, length) in enumerate(zip(*drawn, strict=True)):
      b, node, path = leaves[row // self.search.width]
      own = tuple(tokens[:length])
      step = own[: own.index(end) + 1] if end in own else own
      found.append(Drawn(b, node, path, own, logprobs[:length], step))
    return found

  def _children(self, going: np.ndarray, drawn: list[Drawn], scores) -> NewChildren:
    """The first steps of the continuations as new nodes; trees that do not grow get none."""
    ends, width = self.search.steps, self.search.width
    whole = np.array([d.step[-1] in ends.stops for d in drawn])
    terminal = np.array([ends.is_terminal(d.step) for d in drawn]) & whole
    room = np.array([len(d.path) < self.search.max_depth for d in drawn])
    identity = []  # equal exactly where the steps of a leaf are
    for d in drawn:
      known = self.numbers.setdefault(d.path, {})
      identity.append(known.setdefault(d.step, len(known)))

    def spread(values, dtype):
      out = np.zeros((self.batch, width), dtype)
      out[going] = np.reshape(values, (-1, width))
      return out  # handed to the device with the call: quicker than by itself

    logprobs = [sum(d.logprobs[: len(d.step)]) for d in drawn]
    return NewChildren(
      identity=spread(identity, np.int32),
      logprob=spread(logprobs, np.float32),
      score=spread(scores, np.float32),
      gumbel=spread(self._noise(drawn), np.float32),
      terminal=spread(terminal, bool),
      cut=spread(~terminal & ~(whole & room), bool),
      valid=spread(np.ones_like(terminal), bool),
    )

  def _noise(self, drawn: list[Drawn]) -> list[float]:
    """Gumbel noise of the root's children, by the names of their draws."""
    if self.search.root_rule is None:
      return [0.0] * len(drawn)
    names = [
      [self.seed, *map(int, self.ids[d.problem]), d.leaf, k % self.search.width]
      for k, d in enumerate(drawn)
    ]
    return [np.random.default_rng(name).gumbel() for name in names]

  def _scores(self, drawn: list[Drawn]) -> np.ndarray:
    """Process rewards of the first steps, each distinct one asked for once."""
    if self.score is None:
      return np.zeros(len(drawn), np.float32)
    paths = [d.child for d in drawn]
    distinct = list(dict.fromkeys(paths))
    known = dict(zip(distinct, self.score(distinct), strict=True))
    return np.array([known[p] for p in paths], np.float32)

  def _retire_closed(self) -> None:
    """Nothing is continued from a closed node again: its keys and values can go first."""
    closed = np.asarray(self.tree.closed)
    for b, node in np.argwhere(closed & ~self.closed):
      self.pool.retire(self.nodes[b][node])
    self.closed = closed

"""Monte-Carlo tree search over steps, for many problems at once.

Each simulation picks a leaf in every tree, samples K continuations of it in one batch (to the end
of a program, or one step, see `Search.mix`), judges the programs, and backs every value up through
the first step of its continuation, which becomes a node. The judge comes in as a function; while
it works on one half of the forest the device continues the other.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from o1jax.models.transformer import Params
from o1jax.sampling import half_grown
from o1jax.sampling.forest import Forest, Rollout
from o1jax.sampling.guided import StepIds
from o1jax.sampling.paged import continue_paths, widest
from o1jax.sampling.paths import Path, Paths, check_memory
from o1jax.sampling.sampler import Sampler, Samples, check_prompts
from o1jax.search import (
  ROOT,
  UNVISITED,
  Allowed,
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
# (problem index, *steps of the path) -> process rewards in [0, 1] of the last steps.
Score = Callable[[Sequence[Path]], Sequence[float]]
# A function that waits for the judge and gives the state of the search, to be called or not.
Boundary = Callable[[Callable[[], half_grown.Saved]], None]


@dataclasses.dataclass(frozen=True)
class Search:
  """Settings of a search.

  `sampler` must stop at `steps.eos` only: roll-outs go to the end. `width` is K,
  `max_depth` the deepest node (deeper steps are rolled out, not kept as nodes).
  `c` times `schedule(progress)` is the exploration constant.

  `root_rule` chooses among the root's children, if otherwise (Gumbel's needs `simulations` - 1,
  since the first one makes them). With `allowed` a node may be widened to `slots` children, K in
  each simulation that ends there.

  `mix` is the share of the process reward in the value of a step that is not terminal: 0 for the
  return of its roll-out, 1 for the process reward alone, for which nothing is rolled out.
  `pool_tokens` bounds the tokens whose keys and values are kept; 0 for all that the search can
  have. With `overlap` the judge works on half of the forest while the other half grows; it
  changes no tree. `extend` continues paths.
  """

  sampler: Sampler
  steps: StepIds
  width: int = 3
  simulations: int = 4
  max_depth: int = 10
  rule: Rule = uct
  c: float = 2.0
  schedule: Callable[[float], float] = constant
  root_rule: Rule | None = None
  allowed: Allowed | None = None
  slots: int = 0
  mix: float = 0.0
  pool_tokens: int = 0
  overlap: bool = True
  extend: Callable[..., Samples] = continue_paths

  def __post_init__(self):
    if not 0 <= self.mix <= 1:
      raise ValueError(f'mix={self.mix} must be in [0, 1]: the share of the process reward')
    if self.allowed is not None and self.slots <= self.width:
      raise ValueError(f'slots={self.slots} leave no room to widen; use more than {self.width}')

  def __call__(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    evaluate: Evaluate,
    *,
    score: Score | None = None,
    seed: int = 0,
    ids: np.ndarray | None = None,
    saved: half_grown.Saved | None = None,
    boundary: Boundary = lambda state: None,
  ) -> Forest:
    """Searches the trees of all prompts.

    Args:
      params: the policy's parameters.
      prompts: token ids, none empty.
      evaluate: judges whole paths; called in another thread, one call at a time, with what is new.
      score: process rewards in [0, 1] of paths that end in a new node, for `puct` and `mix`.
      seed: with `ids` it decides every draw.
      ids: [prompts] or [prompts, P] ints that name the problems; None for 0, 1, 2, ...
      saved: what `boundary` was given by this search when it was stopped: it goes on from there.
      boundary: called whenever a part of the forest has been continued.

    Raises:
      ValueError: the keys and values do not fit into memory, see `check_memory`; or `mix` without
        `score`.
    """
    if self.mix and score is None:
      raise ValueError(f'mix={self.mix} needs a score, which gives the process rewards')
    ids = np.arange(len(prompts)) if ids is None else np.asarray(ids)
    check_prompts(prompts, ids)
    ids = ids.reshape(len(prompts), -1)
    paths = self.paths_for(params, prompts)
    middle = (len(prompts) + 1) // 2 if self.overlap else len(prompts)
    parts = [np.arange(middle), np.arange(middle, len(prompts))]
    if saved is not None:  # by as many processes as there were then
      parts = half_grown.problems_of(saved)
    settings = (evaluate, score, seed, ids)
    with concurrent.futures.ThreadPoolExecutor(1) as judge:
      growing = [_Growing(self, paths, part, judge, *settings) for part in parts if len(part)]
      if saved is not None:
        half_grown.restore(growing, paths, saved)
      for simulation in range(self.simulations):
        progress = simulation / max(1, self.simulations - 1)
        for part in growing:  # whose programs ran while the other part was continued
          if simulation < part.simulations:
            continue
          part.settle()
          part.grow(simulation, self.c * self.schedule(progress))
          if not self.overlap:
            part.settle()
          boundary(lambda: half_grown.packed(growing, paths))
      for part in growing:
        part.settle()
    return _joined(growing, paths)

  def paths_for(self, params: Params, prompts: Sequence[Sequence[int]]) -> Paths:
    """The pool of a search over these prompts, if it fits."""
    nodes = 1 + self.width * self.simulations
    longest = max(map(len, prompts))
    # Roll-outs of max_new tokens begin at every depth, so a path may be longer than one.
    needed = sum(map(len, prompts)) + len(prompts) * (nodes - 1) * self.sampler.max_new
    slots = min(self.pool_tokens or needed, needed)
    states = len(prompts) * nodes
    columns = widest(self.sampler, longest + self.sampler.max_new)
    model, rows = self.sampler.model, self.sampler.rows
    check_memory(model, slots=slots, states=states, rows=rows, columns=columns)
    return Paths(model, params, prompts, slots=slots, states=states, rows=rows)


class _Growing:
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
    if self.search.mix == 1:
      self.rollouts += [(simulation, r) for r in rollouts if self.whole(r)]
    else:
      self.rollouts += [(simulation, r) for r in rollouts]
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


def _joined(growing: list[_Growing], paths: Paths) -> Forest:
  """What has grown, on the host."""
  found = [
    (simulation, dataclasses.replace(r, problem=int(part.problems[r.problem])))
    for part in growing
    for simulation, r in part.rollouts
  ]
  found.sort(key=lambda pair: (pair[0], pair[1].problem))  # stable: children keep their order
  return Forest(
    tree=jax.tree.map(lambda *parts: np.concatenate(parts), *(part.tree for part in growing)),
    paths=tuple(tuple(sum(p[1:], ()) for p in nodes) for part in growing for nodes in part.nodes),
    rollouts=tuple(r for _, r in found),
    masked=np.concatenate([part.masked for part in growing]),
    generated=sum(part.generated for part in growing),
    computed=paths.computed + sum(part.computed for part in growing),
    read_again=paths.read_again,
    waited_s=sum(part.waited_s for part in growing),
    tree_s=sum(part.tree_s for part in growing),
  )

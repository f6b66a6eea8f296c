"""Monte-Carlo tree search over steps, for many problems at once.

Each simulation picks a leaf in every tree, samples K continuations of it in one batch (to the end
of a program, or one step, see `Search.mix`), judges the programs, and backs every value up through
the first step of its continuation, which becomes a node. The judge comes in as a function; while
it works on one half of the forest the device continues the other.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Sequence

import jax
import numpy as np

from o1jax.models.transformer import Params
from o1jax.sampling import half_grown
from o1jax.sampling.forest import Forest, Rollout, halves
from o1jax.sampling.growing import Growing, Waits
from o1jax.sampling.guided import StepIds
from o1jax.sampling.memory import check_memory
from o1jax.sampling.paged import continue_paths, widest
from o1jax.sampling.paths import Path, Paths
from o1jax.sampling.sampler import Sampler, Samples, named
from o1jax.search import Allowed, Rule, constant, uct

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
  have. With `overlap` two halves of the forest grow on their own, and the judge works on one while
  the other grows; it changes no tree. `enough` says of the roll-outs of a problem so far whether
  its tree need not grow on. `extend` continues paths.
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
  enough: Callable[[Sequence[Rollout]], bool] | None = None
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
      score: process rewards in [0, 1] of paths that end in a new node, for `puct` and `mix`; called
        in two threads at once.
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
    ids = named(prompts, ids)
    parts = halves(len(prompts)) if self.overlap else [np.arange(len(prompts))]
    if saved is not None:  # by as many processes as there were then
      parts = half_grown.problems_of(saved)
    pools = self._pools(params, prompts, parts)
    settings = (evaluate, score, seed, ids)
    with concurrent.futures.ThreadPoolExecutor(1) as judge:
      growing = [
        Growing(self, pool, part, judge, *settings) for pool, part in zip(pools, parts, strict=True)
      ]
      if saved is not None:
        half_grown.restore(growing, saved)
      grow = _side_by_side if self._together(params) else _in_turn
      grow(self, growing, lambda: boundary(lambda: half_grown.packed(growing)))
    return _joined(growing)

  def progress_c(self, simulation: int) -> float:
    """The exploration constant of a simulation."""
    return self.c * self.schedule(simulation / max(1, self.simulations - 1))

  def _together(self, params: Params) -> bool:
    """Whether parts grow at the same time: over a mesh all devices take the same steps in turn."""
    arrays = (x for x in jax.tree.leaves(params) if isinstance(x, jax.Array))
    return self.overlap and all(len(x.sharding.device_set) == 1 for x in arrays)

  def _pools(
    self, params: Params, prompts: Sequence[Sequence[int]], parts: Sequence[np.ndarray]
  ) -> list[Paths]:
    """A pool for each part of the forest, if they fit."""
    nodes = 1 + self.width * self.simulations
    longest = max(map(len, prompts))
    # Roll-outs of max_new tokens begin at every depth, so a path may be longer than one.
    own = (nodes - 1) * self.sampler.max_new
    needed = [sum(len(prompts[i]) + own for i in part) for part in parts]
    share = min(1.0, (self.pool_tokens or sum(needed)) / sum(needed))
    slots = [math.ceil(share * count) for count in needed]
    columns = widest(self.sampler, longest + self.sampler.max_new)
    model, rows = self.sampler.model, self.sampler.rows
    states = len(prompts) * nodes
    at_once = rows * (len(parts) if self._together(params) else 1)
    check_memory(model, slots=sum(slots), states=states, rows=at_once, columns=columns)
    return [
      Paths(model, params, prompts, slots=count, states=len(part) * nodes, rows=rows)
      for count, part in zip(slots, parts, strict=True)
    ]


def _in_turn(search: Search, growing: Sequence[Growing], after: Callable[[], None]) -> None:
  """Grows one part after the other; programs of one run while the other is continued."""
  for simulation in range(search.simulations):
    for part in growing:
      if simulation < part.simulations:
        continue
      part.settle()
      part.grow(simulation, search.progress_c(simulation))
      if not search.overlap:
        part.settle()
      after()
  for part in growing:
    part.settle()


def _side_by_side(search: Search, growing: Sequence[Growing], after: Callable[[], None]) -> None:
  """Grows each part in a thread of its own.

  What the host does for one part is hidden behind what the device does for another. Only where the
  device is one, see `Search._together`. `after` is called in the caller's own thread.
  """
  said: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False at a part's end
  ending = threading.Event()
  mesh = jax.sharding.get_mesh()  # which a thread does not inherit
  waits = Waits(len(growing))
  for part in growing:
    part.waits = waits

  def work(part: Growing) -> None:
    try:
      with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
        for simulation in range(part.simulations, search.simulations):
          if ending.is_set():
            return
          with part.lock:
            part.settle()
            part.grow(simulation, search.progress_c(simulation))
          said.put(True)
        with part.lock:
          part.settle()
    except BaseException:
      ending.set()
      raise
    finally:
      waits.begin()
      said.put(False)

  with concurrent.futures.ThreadPoolExecutor(len(growing)) as hands:
    futures = [hands.submit(work, part) for part in growing]
    try:
      going = len(growing)
      while going:
        if said.get():
          after()
        else:
          going -= 1
    finally:
      ending.set()
    for future in futures:
      future.result()


def _joined(growing: Sequence[Growing]) -> Forest:
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
    computed=sum(part.pool.computed + part.computed for part in growing),
    read_again=sum(part.pool.read_again for part in growing),
    waited_s=sum(part.waited_s for part in growing),
    tree_s=sum(part.tree_s for part in growing),
  )

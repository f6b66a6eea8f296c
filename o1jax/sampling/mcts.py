"""Monte-Carlo tree search over steps, for many problems at once.

Each simulation picks a leaf in every tree, samples K continuations of it in one batch (to the end
of a program, or one step, see `Search.mix`), judges the programs, and backs every value up through
the first step of its continuation, which becomes a node. The judge comes in as a function; while
it works on one half of the forest the device continues the other.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from o1jax.models.transformer import Params
from o1jax.sampling import half_grown
from o1jax.sampling.forest import Forest, Rollout
from o1jax.sampling.growing import Growing
from o1jax.sampling.guided import StepIds
from o1jax.sampling.paged import continue_paths, widest
from o1jax.sampling.paths import Path, Paths, check_memory
from o1jax.sampling.sampler import Sampler, Samples, check_prompts
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
  have. With `overlap` the judge works on half of the forest while the other half grows; it
  changes no tree. `enough` says of the roll-outs of a problem so far whether its tree need not grow
  on. `extend` continues paths.
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
      growing = [Growing(self, paths, part, judge, *settings) for part in parts if len(part)]
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


def _joined(growing: list[Growing], paths: Paths) -> Forest:
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

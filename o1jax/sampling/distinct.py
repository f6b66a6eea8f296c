"""Whole paths without replacement: no path of a problem is drawn twice.

What a policy is sure of it samples again and again. Here each path is drawn as the policy would,
given that it is none of those before: an exact sample without replacement, one path at a time (Shi,
Bieber and Sutton 2020, "Incremental Sampling Without Replacement for Sequence Models",
arXiv 2002.09067). The paths so far are a tree over tokens with the policy's probabilities at its
edges; a new path leaves it at a node chosen by how much is left there, by a token that is not among
the node's children, so that tokens are drawn behind that node alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models.transformer import Model, Params
from o1jax.parallel.distributed import fetch
from o1jax.sampling.draw import SAMPLE, draw
from o1jax.sampling.memory import check_memory
from o1jax.sampling.paged import continue_paths, widest
from o1jax.sampling.paths import Path, Paths
from o1jax.sampling.rows import NONE
from o1jax.sampling.sampler import FEWEST, Sampler, Samples, named, power_of_two

LEAST = 1e-6  # less probability than this is none: float32 sums do not tell
LIGHTEST = 1e-9  # weight of a path: means over paths that weigh nothing would have no value
Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class NewPath:
  """A path that was found."""

  problem: int  # index of its prompt
  tokens: Tokens  # all after the prompt, end of document included
  logprobs: tuple[float, ...]  # of those, at temperature 1
  left_at: int  # the tokens before this one were taken over from other paths of the problem
  stopped: bool  # ended by a stop token, not by the limit

  @property
  def logprob(self) -> float:
    """Log-prob of the whole path."""
    return sum(self.logprobs)


@dataclasses.dataclass(frozen=True)
class NewPaths:
  """The paths by problem, each in the order of its draws, and what they cost."""

  paths: tuple[NewPath, ...]
  generated: int  # tokens drawn
  computed: int  # positions that went through the model, padding and dead rows too

  def weights(self) -> list[float]:
    """Of each path, how many of as many samples it would be: they add up to a problem's number.

    By its probability among the paths of its problem, so that weighted means are the policy's as
    far as they hold all that is likely.
    """
    of = collections.defaultdict(list)
    for path in self.paths:
      of[path.problem].append(path.logprob)
    # Over the likeliest: the probability of a long path may be none that a float can hold.
    mass = {p: sum(math.exp(x - max(each)) for x in each) for p, each in of.items()}
    share = lambda p: math.exp(p.logprob - max(of[p.problem])) / mass[p.problem]  # noqa: E731
    return [max(len(of[p.problem]) * share(p), LIGHTEST) for p in self.paths]


@dataclasses.dataclass(frozen=True)
class Distinct:
  """Draws `count` different paths of every prompt, or all that the policy has.

  `sampler` says where paths end; it must draw from the whole distribution at temperature 1.
  """

  sampler: Sampler
  count: int

  def __post_init__(self):
    if self.sampler.how != SAMPLE:
      raise ValueError(
        f'paths without replacement are drawn from the whole distribution at temperature 1, not '
        f'by {self.sampler.how}; use Drawing()'
      )

  def __call__(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    ids: np.ndarray | None = None,
  ) -> NewPaths:
    """Draws the paths of all prompts, one of each at a time.

    Args:
      params: the policy's parameters.
      prompts: token ids, none empty.
      seed: with `ids` it decides every draw.
      ids: [prompts] or [prompts, P] ints that name the problems; None for 0, 1, 2, ...

    Raises:
      ValueError: a prompt and twice the sampler's `max_new` exceed the model's positions, or what
        is kept exceeds memory.
    """
    run = _Drawing(self.sampler, params, prompts, seed, named(prompts, ids))
    for attempt in range(self.count):
      if not run.draw(attempt):
        break
    found = tuple(path for paths in run.found for path in paths)
    return NewPaths(found, run.generated, run.paths.computed + run.computed)


class Explored:
  """The paths so far of one problem: a node of their tree over tokens."""

  __slots__ = ('children', 'gone')

  def __init__(self):
    self.children: dict[int, tuple[float, Explored]] = {}  # token -> its probability here, node
    self.gone = 0.0  # probability of the paths so far, given that one is here

  def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
    """Takes a path out of what is left."""
    nodes = [self]
    for token, logprob in zip(tokens, logprobs, strict=True):
      children = nodes[-1].children
      if token not in children:
        children[token] = math.exp(logprob), Explored()
      nodes.append(children[token][1])
    nodes[-1].gone = 1.0
    for node in reversed(nodes[:-1]):
      node.gone = sum(p * child.gone for p, child in node.children.values())

  def leave(self, rng: np.random.Generator) -> tuple[Tokens, tuple[float, ...], Tokens] | None:
    """Where a new path leaves the tree; None where nothing is left.

    Returns:
      The tokens up to there, their log-probs, and the tokens that may not follow.
    """
    node, tokens, logprobs = self, (), ()
    while True:
      children = list(node.children.items())
      left = [p * (1.0 - c.gone) if 1.0 - c.gone > LEAST else 0.0 for _, (p, c) in children]
      rest = 1.0 - sum(p for _, (p, _) in children)  # for all other tokens
      left = np.array([*left, rest if rest > LEAST else 0.0])
      if not left.any():
        return None
      pick = int(rng.choice(len(left), p=left / left.sum()))
      if pick == len(children):
        return tokens, logprobs, tuple(node.children)
      token, (p, node) = children[pick]
      tokens, logprobs = (*tokens, token), (*logprobs, math.log(p))


@dataclasses.dataclass(frozen=True)
class _Leaving:
  """Where the next path of a problem leaves its tree."""

  problem: int
  prefix: Tokens
  logprobs: tuple[float, ...]  # of the prefix
  banned: Tokens
  uniform: float  # draws the token behind the prefix

  @property
  def path(self) -> Path:
    """Up to there."""
    return (self.problem, self.prefix) if self.prefix else (self.problem,)


class _Drawing:
  """The problems side by side."""

  def __init__(self, sampler: Sampler, params: Params, prompts, seed: int, ids: np.ndarray):
    self.sampler, self.params, self.seed, self.ids = sampler, params, seed, ids
    self.explored = [Explored() for _ in prompts]
    self.found: list[list[NewPath]] = [[] for _ in prompts]
    self.generated = self.computed = 0
    # Of every problem its prompt, the path up to where it leaves, and the token by which it does.
    slots = sum(map(len, prompts)) + len(prompts) * sampler.max_new
    model, states = sampler.model, 3 * len(prompts)
    columns = widest(sampler, max(map(len, prompts)) + sampler.max_new)
    check_memory(model, slots=slots, states=states, rows=sampler.rows, columns=columns)
    self.paths = Paths(model, params, prompts, slots=slots, states=states, rows=sampler.rows)

  def draw(self, attempt: int) -> bool:
    """One more path of every problem that has one; False if none has."""
    leaving = []
    for problem, tree in enumerate(self.explored):
      rng = np.random.default_rng([self.seed, *map(int, self.ids[problem]), attempt])
      if (where := tree.leave(rng)) is not None:
        leaving.append(_Leaving(problem, *where, rng.random(dtype=np.float32)))
    for first in range(0, len(leaving), self.sampler.rows):
      self._draw(leaving[first : first + self.sampler.rows], attempt)
    return bool(leaving)

  def _draw(self, leaving: list[_Leaving], attempt: int) -> None:
    """Paths of different problems, to their ends."""
    new = self._first_tokens(leaving)
    on = [r for r, x in enumerate(new) if not x.stopped and len(x.tokens) < self.sampler.max_new]
    if on:
      todo = [(*leaving[r].path, new[r].tokens[-1:]) for r in on]
      names = [(*self.ids[new[r].problem], attempt) for r in on]
      # The first token is there, so that no path goes on for as many as the sampler's.
      sampler = dataclasses.replace(self.sampler, max_new=self.sampler.max_new - 1)
      drawn = continue_paths(sampler, self.paths, todo, seed=self.seed, ids=np.array(names))
      self.generated += drawn.generated
      self.computed += drawn.computed
      for row, r in enumerate(on):
        new[r] = self._ended(new[r], drawn, row)
    for path in new:
      self.explored[path.problem].add(path.tokens, path.logprobs)
      self.found[path.problem].append(path)

  def _first_tokens(self, leaving: list[_Leaving]) -> list[NewPath]:
    """The paths up to the token by which they leave."""
    paths = [where.path for where in leaving]
    self.paths.read(paths)
    rows = max(FEWEST, power_of_two(len(paths)))
    most = max(len(where.banned) for where in leaving)
    banned = np.full((rows, power_of_two(most)), NONE, np.int32)
    for row, where in zip(banned, leaving, strict=False):
      row[: len(where.banned)] = where.banned
    uniform = np.zeros(rows, np.float32)
    uniform[: len(paths)] = [where.uniform for where in leaving]
    hidden = self.paths.hidden(paths, rows)
    found = fetch(_leave(self.sampler.model, self.params, hidden, banned, uniform))
    self.generated += len(paths)
    tokens, logprobs = (x[: len(paths)].tolist() for x in found)
    return [
      NewPath(
        x.problem,
        (*x.prefix, token),
        (*x.logprobs, logprob),
        left_at=len(x.prefix),
        stopped=token in self.sampler.stop_ids,
      )
      for x, token, logprob in zip(leaving, tokens, logprobs, strict=True)
    ]

  def _ended(self, path: NewPath, drawn: Samples, row: int) -> NewPath:
    """A path and what was drawn behind it, up to the limit."""
    tokens = path.tokens + tuple(drawn.ids(row))
    logprobs = path.logprobs + tuple(drawn.logprobs[row, : drawn.lengths[row]].tolist())
    limit = self.sampler.max_new
    return dataclasses.replace(
      path,
      tokens=tokens[:limit],
      logprobs=logprobs[:limit],
      stopped=bool(drawn.stopped[row]) and len(tokens) <= limit,
    )


@functools.partial(jax.jit, static_argnames='model')
def _leave(
  model: Model, params: Params, hidden: jax.Array, banned: jax.Array, uniform: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Draws tokens that are not banned, and says their log-probs among all.

  Args:
    model: the decoder.
    params: its parameters.
    hidden: [R, D], each the state before the token.
    banned: [R, M] int32, padded with NONE.
    uniform: [R] float32 in [0, 1).

  Returns:
    [R] int32 and [R] float32.
  """
  logits = model.logits(params, hidden)
  rows = jnp.arange(len(logits))[:, None]
  banned = jnp.where(banned == NONE, logits.shape[-1], banned)  # beyond the last: dropped
  token, _ = draw(logits.at[rows, banned].set(-jnp.inf, mode='drop'), uniform, SAMPLE)
  logprobs = jax.nn.log_softmax(logits)
  return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]

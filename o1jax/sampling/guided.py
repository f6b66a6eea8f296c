"""Guided descent: at every step sample K candidates and keep the one the scorer likes best.

A beam of one through the tree of steps, for many problems at once. Every
sibling is recorded, the ones not taken too: they are training data for the
process reward model. Legend: P problems of a batch, K children, t tokens of
the longest step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models.transformer import Model, Params
from o1jax.parallel.distributed import fetch
from o1jax.sampling.draw import GREEDY, SAMPLE, Drawing
from o1jax.sampling.paged import continue_paths
from o1jax.sampling.paths import Path, Paths
from o1jax.sampling.sampler import Sampler, Samples, length_batches, named, pad_prompts
from o1jax.sampling.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class StepIds:
  """The token ids that delimit a path."""

  step_end: int  # the last token of every step
  terminal: int  # the first token of a terminal step, `<Action 3>`
  eos: int  # the end of a document

  @property
  def stops(self) -> tuple[int, int]:
    """What ends the generation of a step."""
    return self.step_end, self.eos

  def is_terminal(self, step: Sequence[int]) -> bool:
    """Whether nothing follows this step: it is the program, or the document ends in it."""
    return step[0] == self.terminal or step[-1] == self.eos

  def split(self, path: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The steps of a path; what follows its last delimiter is one."""
    ends = [i + 1 for i, token in enumerate(path) if token in self.stops]
    ends = [*ends, len(path)] if not ends or ends[-1] != len(path) else ends
    return tuple(tuple(path[a:b]) for a, b in zip([0, *ends], ends, strict=False) if b > a)


@dataclasses.dataclass(frozen=True)
class Child:
  """A candidate step; equal ones of a node are one child."""

  tokens: tuple[int, ...]  # `<Step_End>` included, unless the step was cut
  logprob: float  # of the whole step, untruncated at temperature 1
  score: float  # the scorer's log-odds; NaN where it was not asked
  count: int  # how many of the K draws gave this step
  cut: bool  # the length limit ended it: never chosen before a whole one


@dataclasses.dataclass(frozen=True)
class Choice:
  """A node of the descent: its candidates and the one taken."""

  children: tuple[Child, ...]
  chosen: int
  greedy: bool = False  # written greedily, one candidate


@dataclasses.dataclass(frozen=True)
class Descent:
  """One path from the prompt, with everything that was considered on the way."""

  choices: tuple[Choice, ...]
  finished: bool  # ended by a terminal step; False: cut by the depth or length limit

  @property
  def tokens(self) -> tuple[int, ...]:
    """The path after the prompt."""
    return sum((c.children[c.chosen].tokens for c in self.choices), ())

  @property
  def logprob(self) -> float:
    """Log-prob of the path."""
    return sum(c.children[c.chosen].logprob for c in self.choices)

  @property
  def score(self) -> float:
    """The scorer's log-odds of the last step."""
    last = self.choices[-1]
    return last.children[last.chosen].score


@dataclasses.dataclass(frozen=True)
class Descents:
  """Descents in the caller's order, and what they cost in tokens."""

  descents: tuple[Descent, ...]
  generated: int  # tokens drawn, siblings not taken included
  computed: int  # tokens that went through the policy: prompts and padding too
  scored: int  # tokens the scorer read: prompts and distinct candidates


@dataclasses.dataclass(frozen=True)
class Guided:
  """Guided descent under fixed limits.

  `children` is K; `max_step` and `max_program` are token limits of a sampled
  step (of sampled programs too) and of a greedy program; `max_depth` the most
  steps of a path. With
  `greedy_program` the terminal step is written greedily, one candidate, as soon
  as it is the likeliest thing to come. `pick_temperature` above 0 picks a child
  with probability softmax(score / pick_temperature) instead of the best, so that
  several descents of one problem (with different ids) differ. `prior` is the weight of a
  step's log-prob beside its score in that choice: for a policy that has outgrown its scorer.
  """

  model: Model
  steps: StepIds
  how: Drawing = SAMPLE
  children: int = 6
  max_step: int = 32
  max_program: int = 96
  max_depth: int = 10
  greedy_program: bool = True
  score_program: bool = True
  pick_temperature: float = 0.0
  prior: float = 0.0
  rows: int = 512

  def __post_init__(self):
    if not 1 <= self.children <= self.rows:
      raise ValueError(f'children={self.children} must be in 1..rows={self.rows}; raise rows')

  def __call__(
    self,
    params: Params,
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    ids: np.ndarray | None = None,
  ) -> Descents:
    """One descent for every prompt.

    Args:
      params: the policy's parameters.
      scorer: judges the steps, e.g. a `PrmScorer`.
      prompts: token ids, none empty; a prompt may stand there several times.
      seed: with `ids` it decides every draw.
      ids: [prompts] or [prompts, I] ints that name each descent, e.g. (problem,
        attempt); None for 0, 1, 2, ...
    """
    ids = named(prompts, ids)
    descents: list[Descent | None] = [None] * len(prompts)
    costs = np.zeros(3, int)
    for batch in length_batches(prompts, self.rows // self.children):
      run = _Batch(self, params, scorer, [prompts[i] for i in batch], seed, ids[batch])
      for i, descent in zip(batch, run.descend(), strict=True):
        descents[i] = descent
      costs += (run.generated, run.computed, run.scored)
    return Descents(tuple(descents), *costs.tolist())


class _Batch:
  """P descents side by side; `path[p]` is how far problem p has come."""

  def __init__(self, rule: Guided, params, scorer: Scorer, prompts, seed: int, ids: np.ndarray):
    self.rule, self.params, self.scorer, self.seed, self.ids = rule, params, scorer, seed, ids
    self.choices: list[list[Choice]] = [[] for _ in prompts]
    self.finished = [False] * len(prompts)
    self.generated = self.drawn = 0
    tokens, lengths = pad_prompts(prompts, rule.rows // rule.children)
    self.scored = int(lengths[: len(prompts)].sum())
    self.judge = scorer.start(tokens, lengths)
    self.judged_rows = len(tokens)
    # The path of every problem, and beside it the children that it chooses from.
    count, steps = len(prompts), rule.max_depth + rule.children
    slots = self.scored + count * steps * rule.max_step
    states = count * (1 + steps)
    self.paths = Paths(rule.model, params, prompts, slots=slots, states=states, rows=rule.rows)
    self.path: list[Path] = [(p,) for p in range(count)]

  @property
  def computed(self) -> int:
    """Positions that went through the policy."""
    return self.paths.computed + self.drawn

  def descend(self) -> list[Descent]:
    rule = self.rule
    going, waiting = list(range(len(self.choices))), []  # waiting for their program
    for depth in range(rule.max_depth):
      if rule.greedy_program:
        ready = self._ready(going)
        waiting += [p for p in going if p in ready]
        going = [p for p in going if p not in ready]
      if not going:
        break
      going = self._step(depth, going)
    if waiting:
      self._write_programs(waiting)
    return [Descent(tuple(c), f) for c, f in zip(self.choices, self.finished, strict=True)]

  def _ready(self, going: list[int]) -> set[int]:
    """Problems whose likeliest next token begins a program."""
    rule, paths = self.rule, [self.path[p] for p in going]
    if not paths:
      return set()
    self.paths.read(paths)
    states = self.paths.hidden(paths, self.judged_rows)
    likeliest = fetch(_likeliest(rule.model, self.params, states))
    return {p for p, token in zip(going, likeliest, strict=False) if token == rule.steps.terminal}

  def _step(self, depth: int, going: list[int]) -> list[int]:
    """One step of the problems `going`, of which those that go on further come back."""
    rule, k = self.rule, self.rule.children
    sampler = Sampler(rule.model, rule.max_step, rule.steps.stops, rule.how, rule.rows)
    slots = np.repeat(going, k)
    child = np.tile(np.arange(k), len(going))
    names = np.column_stack([self.ids[slots], np.full(len(slots), depth), child])
    nodes = merge(self._sample(sampler, slots, names), k)
    self._score(going, nodes)
    taken: list[tuple[int, ...]] = [()] * self.judged_rows
    on = []
    for p, children in zip(going, nodes, strict=True):
      pick = self._pick(children, p, depth)
      self.choices[p].append(Choice(tuple(children), pick))
      step = children[pick]
      self.finished[p] = not step.cut and rule.steps.is_terminal(step.tokens)
      if not (step.cut or self.finished[p]):
        on.append(p)
        taken[p] = step.tokens
      for other in children:
        if other is not step or p not in on:
          self.paths.retire((*self.path[p], other.tokens))
      self.path[p] = (*self.path[p], step.tokens)
    if on:
      self.judge = self.scorer.advance(self.judge, taken)
    return on

  def _sample(self, sampler: Sampler, problems: np.ndarray, names: np.ndarray) -> Samples:
    """Continues the paths of problems; what may be chosen goes into the pool."""
    ends = self.rule.steps
    samples = continue_paths(
      sampler,
      self.paths,
      [self.path[p] for p in problems],
      seed=self.seed,
      ids=names,
      marks=ends.stops,
      keep=lambda path: not ends.is_terminal(path[-1]),
    )
    self.generated += samples.generated
    self.drawn += samples.computed
    return samples

  def _score(self, problems: list[int], nodes: list[list[Child]]) -> None:
    """Fills in the scores; equal siblings are read once."""
    slots = np.repeat(problems, [len(children) for children in nodes])
    steps = [child.tokens for children in nodes for child in children]
    scores = iter(self.scorer.score(self.judge, slots, steps))
    self.scored += sum(map(len, steps))
    for children in nodes:
      children[:] = [dataclasses.replace(c, score=float(next(scores))) for c in children]

  def _pick(self, children: list[Child], problem: int, depth: int) -> int:
    prior = self.rule.prior
    scores = np.array([-np.inf if c.cut else c.score + prior * c.logprob for c in children])
    temperature = self.rule.pick_temperature
    if not temperature or np.isneginf(scores).all():
      return int(np.argmax(scores))
    rng = np.random.default_rng([self.seed, *map(int, self.ids[problem]), depth])
    weights = np.exp((scores - scores.max()) / temperature)
    return int(rng.choice(len(children), p=weights / weights.sum()))

  def _write_programs(self, waiting: list[int]) -> None:
    """The terminal steps of the waiting problems, greedily, one candidate each."""
    rule = self.rule
    writer = Sampler(rule.model, rule.max_program, rule.steps.stops, GREEDY, rule.rows)
    unread = np.zeros((len(waiting), 1))  # greedy rows draw nothing
    nodes = merge(self._sample(writer, np.array(waiting), unread), 1)
    if rule.score_program:
      self._score(waiting, nodes)
    for p, children in zip(waiting, nodes, strict=True):
      self.choices[p].append(Choice(tuple(children), 0, greedy=True))
      self.finished[p] = not children[0].cut


@functools.partial(jax.jit, static_argnames='model')
def _likeliest(model: Model, params: Params, hidden: jax.Array) -> jax.Array:
  """The mode of the next token in each of the states [R, D], [R]."""
  return jnp.argmax(model.logits(params, hidden), -1)


def merge(samples: Samples, width: int) -> list[list[Child]]:
  """The distinct children of every node, whose `width` draws follow each other; not scored."""
  nodes = []
  for first in range(0, len(samples.lengths), width):
    rows = range(first, first + width)
    steps = [tuple(samples.ids(r)) for r in rows]
    nodes.append(
      [
        Child(
          tokens=step,
          logprob=float(samples.logprobs[first + steps.index(step)].sum()),
          score=float('nan'),
          count=steps.count(step),
          cut=not samples.stopped[first + steps.index(step)],
        )
        for step in dict.fromkeys(steps)
      ]
    )
  return nodes

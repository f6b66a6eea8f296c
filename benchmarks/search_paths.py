"""Ways to whole paths for `search_value`: sampling, also without replacement, descents, trees.

A `Case` is a policy before some problems; each way takes one and finds paths for every problem. No
test of a problem is run on the way, save where `Trees` is handed a judge.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from o1jax import search
from o1jax.data import steps as steps_lib
from o1jax.sampling import Distinct, PrmScorer, Search, TreeScorer
from o1jax.sampling.draw import GREEDY, SAMPLE, Drawing
from o1jax.sampling.forest import Forest
from o1jax.sandbox import wire
from o1jax.sandbox.judge import request_for
from o1jax.sandbox.protocol import Job, Limits
from o1jax.sandbox.zygote import Zygote
from o1jax.stages.context import Run
from o1jax.stages.evaluate import name_ids, sampler, step_ids
from o1jax.stages.synthesis import guided
from o1jax.stages.test_time import Decided
from o1jax.types import Problem

SEED = 177  # of all draws of seed 0, the same for every policy
POOL_TOKENS = 2000  # of one problem: more than any budget draws
Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Policy:
  """A policy of a run and the PRM that searches with it."""

  params: Any
  prm: Any


@dataclasses.dataclass
class Found:
  """Whole paths of P problems, and what they cost."""

  paths: list[list[Tokens]]
  logprobs: list[list[float]]  # under the policy
  generated: int  # tokens drawn for all of them
  steps: list[list[list[float]]] = dataclasses.field(default_factory=list)  # see `Case.score`

  def first(self, count: int) -> Found:
    """With the first `count` paths of each problem; the tokens are theirs."""
    paths = [each[:count] for each in self.paths]
    generated = sum(len(path) for each in paths for path in each)
    cut = lambda rows: [each[:count] for each in rows]  # noqa: E731
    return Found(paths, cut(self.logprobs), generated, cut(self.steps))

  def judged(self, over: Callable = min) -> list[list[float]]:
    """One number a path, `over` the PRM's probabilities of its steps."""
    return [[over(steps) for steps in each] for each in self.steps]


@dataclasses.dataclass(frozen=True)
class Case:
  """A policy before some problems."""

  run: Run
  policy: Policy
  problems: Sequence[Problem]
  zygote: Zygote
  printed: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)  # by id and code

  @property
  def seed(self) -> int:
    """Of the draws, which are named by problem: runs of other seeds have others."""
    return SEED + 1000 * self.run.config.run.seed

  @property
  def prompts(self) -> list[Tokens]:
    """Token ids."""
    return [tuple(self.run.encoder.prompt(p)) for p in self.problems]

  def sample(self, count: int, how: Drawing = SAMPLE) -> Found:
    """Whole paths, drawn from the start; one that has no end is none."""
    draw = sampler(self.run, how, self.run.config.eval.rows)
    ids = name_ids(self.problems)
    drawn = draw(self.policy.params, self.prompts, seed=self.seed, ids=ids, samples=count)
    rows = range(len(drawn.lengths))
    paths = [tuple(drawn.ids(r)) for r in rows]
    logprobs = drawn.logprobs.sum(1).tolist()
    fold = lambda values: [values[r : r + count] for r in rows[::count]]  # noqa: E731
    return Found(fold(paths), fold(logprobs), drawn.generated)

  def scorer(self) -> TreeScorer:
    """The PRM over the paths of these problems."""
    count = len(self.problems)
    tokens = sum(map(len, self.prompts)) + count * POOL_TOKENS
    nodes = count * POOL_TOKENS // 4
    steps = step_ids(self.run)
    return TreeScorer(
      self.run.model, self.policy.prm, self.prompts, steps, tokens=tokens, nodes=nodes
    )

  def score(self, found: Found, scorer: TreeScorer) -> None:
    """Fills in the PRM's probabilities of the steps of every path."""
    count = [len(each) for each in found.paths]
    jobs = [(p, path) for p, each in enumerate(found.paths) for path in each]
    told = iter(scorer.of_steps(jobs))
    found.steps = [[next(told) for _ in range(n)] for n in count]

  def program(self, path: Tokens) -> str | None:
    """The program that a path ends in."""
    return steps_lib.program_of(self.run.encoder.steps_of(path))

  def accepted(self, answers: Sequence[Tokens]) -> np.ndarray:
    """Whether one path of each problem passes all of its tests, [P]."""
    paths = [self.run.encoder.steps_of(path) for path in answers]
    verdicts = self.run.executor.judge(self.problems, paths)
    return np.array([v is not None and v.status == 'accepted' for v in verdicts], float)

  def outcomes(self, jobs: Sequence[tuple[int, Tokens]]) -> list[float]:
    """Judges paths of problems, by number: the share of tests passed, NaN without a verdict."""
    paths = [self.run.encoder.steps_of(tokens) for _, tokens in jobs]
    verdicts = self.run.executor.judge([self.problems[i] for i, _ in jobs], paths)
    return [math.nan if v is None or v.masked else v.pass_rate for v in verdicts]

  def behaviours(self, problem: Problem, paths: Sequence[Tokens]) -> list[Any]:
    """What the programs print on the inputs of the problem's tests; None without a program."""
    codes = [self.program(path) for path in paths]
    for code in {code for code in codes if (problem.id, code) not in self.printed} - {None}:
      self.printed[problem.id, code] = self._printed(problem, code)
    return [self.printed.get((problem.id, code)) for code in codes]

  def _printed(self, problem: Problem, code: str) -> tuple[bytes, ...] | None:
    request = request_for(wire.BATCH, self._job(problem, code), Limits(), list(problem.tests))
    records = self.zygote.ask(request).records
    printed = tuple(payload for kind, _, _, payload in records if kind == wire.OUTPUT)
    return printed if len(printed) == len(problem.tests) else None

  @staticmethod
  def _job(problem: Problem, code: str) -> Job:
    return Job(code, problem.tests, problem.entry_point)


@dataclasses.dataclass(frozen=True)
class Descents:
  """`descents` guided descents, each step the PRM's choice among `children`."""

  children: int
  descents: int = 1
  temperature: float = 0.0  # of the choice
  prior: float = 0.0  # weight of the policy's log-prob in it

  def __call__(self, case: Case, scorer: TreeScorer) -> Found:
    del scorer  # a descent reads for itself
    told = {'pick_temperature': self.temperature, 'prior': self.prior}
    rule = guided(case.run, self.children, **told)
    count = self.descents
    prompts = [p for p in case.prompts for _ in range(count)]
    attempts = np.tile(np.arange(count, dtype=np.uint32), len(case.problems))
    ids = np.column_stack([np.repeat(name_ids(case.problems), count), attempts])
    prm = PrmScorer(case.run.model, case.policy.prm)
    found = rule(case.policy.params, prm, prompts, seed=case.seed + 1, ids=ids)
    each = range(0, len(prompts), count)
    paths = [[d.tokens for d in found.descents[i : i + count]] for i in each]
    logprobs = [[d.logprob for d in found.descents[i : i + count]] for i in each]
    return Found(paths, logprobs, found.generated)


@dataclasses.dataclass(frozen=True)
class Different:
  """`count` different paths, drawn without replacement."""

  count: int

  def __call__(self, case: Case, scorer: TreeScorer | None) -> Found:
    del scorer
    draw = Distinct(sampler(case.run, SAMPLE, case.run.config.search.rows), self.count)
    ids = name_ids(case.problems)
    found = draw(case.policy.params, case.prompts, seed=case.seed + 3, ids=ids)
    paths: list[list[Tokens]] = [[] for _ in case.problems]
    logprobs: list[list[float]] = [[] for _ in case.problems]
    for path in found.paths:
      paths[path.problem].append(path.tokens)
      logprobs[path.problem].append(path.logprob)
    return Found(paths, logprobs, found.generated)


@dataclasses.dataclass(frozen=True)
class Trees:
  """Tree search; a whole path is worth what the PRM says of its worst step, or `judge`."""

  rule: search.Rule
  width: int
  simulations: int
  mix: float
  c: float = 1.0
  lead: int = 0  # see `Decided`
  how: Drawing = SAMPLE

  def __call__(self, case: Case, scorer: TreeScorer | None, judge=None) -> Found:
    gumbel = self.rule is search.gumbel_interior
    run, count = case.run, len(case.problems)
    grow = Search(
      sampler(run, self.how, run.config.search.rows),
      step_ids(run),
      width=self.width,
      simulations=self.simulations,
      max_depth=run.config.search.depth_limit,
      rule=self.rule,
      root_rule=search.gumbel_root(max(1, self.simulations - 1)) if gumbel else None,
      c=self.c,
      mix=self.mix,
      pool_tokens=sum(map(len, case.prompts)) + count * POOL_TOKENS,
      enough=Decided(self.lead, step_ids(run)) if self.lead else None,
    )
    judge = judge or (lambda jobs: [min(steps) for steps in scorer.of_steps(jobs)])
    draws = {'seed': case.seed + 2, 'ids': name_ids(case.problems)}
    forest = grow(case.policy.params, case.prompts, judge, score=scorer, **draws)
    paths: list[list[Tokens]] = [[] for _ in case.problems]
    for r in forest.rollouts:
      if not math.isnan(r.value):
        paths[r.problem].append(r.path)
    return _finished(case, forest, paths)


def _finished(case: Case, forest: Forest, paths: list[list[Tokens]]) -> Found:
  """The paths, and a greedy end of the best node where there is none."""
  open_ = [p for p, each in enumerate(paths) if not each]
  generated = forest.generated
  if open_:
    begun = [forest.paths[p][_best_leaf(forest.tree, p)] for p in open_]
    draw = sampler(case.run, GREEDY, case.run.config.eval.rows)
    prompts = [(*case.prompts[p], *path) for p, path in zip(open_, begun, strict=True)]
    drawn = draw(case.policy.params, prompts)
    generated += drawn.generated
    for row, (p, path) in enumerate(zip(open_, begun, strict=True)):
      paths[p].append((*path, *drawn.ids(row)))
  return Found(paths, [], generated)


def _best_leaf(tree: search.SearchTree, problem: int) -> int:
  """Down by the best mean; nodes where nothing can follow are passed over."""
  node = search.ROOT
  means = tree.value_sum / np.maximum(tree.visits, 1)
  while True:
    slots = tree.children[problem, node]
    on = [int(c) for c in slots if c != search.UNVISITED and not tree.closed[problem, c]]
    if not on:
      return node
    node = max(on, key=lambda c: means[problem, c])

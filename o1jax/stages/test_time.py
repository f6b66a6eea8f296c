"""Search at test time: one path a problem by the PRM's word, before any program has run.

Two ways. A descent asks the PRM at every step and takes what it likes best: its one path is as good
as the PRM. A tree of roll-outs lets the policy vote: equal programs stand together, and each
roll-out has the product of the PRM's probabilities of its steps for a vote (weighted
self-consistency, Li et al. 2023, arXiv 2206.02336, with a process reward model as the verifier). It
is wrong where both models are.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

from o1jax import search
from o1jax.sampling.forest import Rollout
from o1jax.sampling.guided import StepIds
from o1jax.sampling.mcts import Search
from o1jax.sampling.scorer import PrmScorer
from o1jax.sampling.tree_scorer import TreeScorer
from o1jax.stages.context import Run
from o1jax.stages.evaluate import name_ids, sampler, step_ids
from o1jax.stages.synthesis import drawing, guided, score_rows
from o1jax.types import Problem

CHUNK = 100  # problems whose trees are in memory together
# Chosen on dev: values between two programs lie closer together than outcomes.
EXPLORATION = 0.3
Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Found:
  """What a search answers, and what it cost in tokens."""

  paths: list[Tokens]  # of each problem; () where no roll-out came to its end
  generated: int
  scored: int  # read by the PRM


def searched(run: Run, policy: Any, prm: Any, problems: Sequence[Problem], seed: int) -> Found:
  """An answer to each problem, by `eval.search`.

  Args:
    run: gives the settings.
    policy: parameters that draw.
    prm: parameters that judge.
    problems: any number, searched in chunks.
    seed: with the problems' ids it decides every draw.
  """
  if run.config.eval.search == 'guided':
    return _descended(run, policy, prm, problems, seed)
  parts = [problems[i : i + CHUNK] for i in range(0, len(problems), CHUNK)]
  found = [_voted(run, policy, prm, part, seed) for part in parts]
  paths = [path for part in found for path in part.paths]
  return Found(paths, sum(part.generated for part in found), sum(part.scored for part in found))


def elected(programs: Sequence[Hashable], weights: Sequence[float], ties: Sequence[float]) -> int:
  """Which answer to one problem a vote chooses: the best of those that agree with most weight.

  Args:
    programs: what each answer comes to; equal ones vote together, and None has no vote.
    weights: of each answer's vote.
    ties: decides among the answers that are elected together, and between equal weights.
  """
  total = dict.fromkeys(programs, 0.0)
  for program, weight in zip(programs, weights, strict=True):
    total[program] += weight
  total[None] = -1.0
  rank = [(total[program], tie) for program, tie in zip(programs, ties, strict=True)]
  return max(range(len(rank)), key=rank.__getitem__)


@dataclasses.dataclass(frozen=True)
class Decided:
  """Whether a program leads by so many votes, each roll-out one: a vote that may stop.

  Adaptive consistency (Aggarwal et al. 2023, arXiv 2305.11860): what all roll-outs agree on needs
  few of them, and the tokens go where they do not.
  """

  lead: int
  steps: StepIds

  def __call__(self, rollouts: Sequence[Rollout]) -> bool:
    """Of the roll-outs of one problem; those without an end have no vote."""
    programs = [self.steps.split(r.path)[-1] for r in rollouts if not math.isnan(r.value)]
    votes = [n for _, n in collections.Counter(programs).most_common(2)]
    return bool(votes) and votes[0] - sum(votes[1:]) >= self.lead


def _descended(run: Run, policy: Any, prm: Any, problems: Sequence[Problem], seed: int) -> Found:
  config = run.config.eval
  prompts = [run.encoder.prompt(p) for p in problems]
  rule = guided(run, config.search_children, prior=config.search_prior)
  with run.sampling(policy, prm) as (params, judge):
    scorer = PrmScorer(run.model, judge, score_rows(run.config.search))
    found = rule(params, scorer, prompts, seed=seed, ids=name_ids(problems))
  return Found([d.tokens for d in found.descents], found.generated, found.scored)


def _voted(run: Run, policy: Any, prm: Any, problems: Sequence[Problem], seed: int) -> Found:
  config, limits = run.config.eval, run.config.search
  prompts, steps = [run.encoder.prompt(p) for p in problems], step_ids(run)
  how = dataclasses.replace(drawing(limits), temperature=config.search_temperature)
  grow = Search(
    sampler(run, how, limits.rows),
    steps,
    width=config.search_children,
    simulations=config.search_simulations,
    max_depth=limits.depth_limit,
    rule=search.uct,
    c=EXPLORATION,
    pool_tokens=limits.pool_tokens,
    enough=Decided(config.search_lead, steps) if config.search_lead else None,
    overlap=False,  # the judge is on the device too
  )
  rollouts = len(problems) * grow.width * grow.simulations
  tokens = limits.pool_tokens or sum(map(len, prompts)) + rollouts * grow.sampler.max_new
  nodes = len(problems) + rollouts * (limits.depth_limit + 1)
  held = {'tokens': tokens, 'nodes': nodes, 'rows': score_rows(limits)}
  with run.sampling(policy, prm) as (params, judge):
    scorer = TreeScorer(run.model, judge, prompts, steps, **held)
    worst = lambda new: [min(values) for values in scorer.of_steps(new)]  # noqa: E731
    forest = grow(params, prompts, worst, seed=seed, ids=name_ids(problems))
    whole = [(r.problem, r.path) for r in forest.rollouts if not math.isnan(r.value)]
    values = scorer.of_steps(whole)
  answers: list[Tokens] = [()] * len(problems)
  for problem in {p for p, _ in whole}:
    own = [i for i, (p, _) in enumerate(whole) if p == problem]
    programs = [steps.split(whole[i][1])[-1] for i in own]
    best = elected(programs, [math.prod(values[i]) for i in own], [min(values[i]) for i in own])
    answers[problem] = whole[own[best]][1]
  return Found(answers, forest.generated, scorer.scored)

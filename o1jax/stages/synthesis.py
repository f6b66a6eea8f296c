"""Steps 2 and 6: reasoning data by tree search, judged by executed programs.

Round 0 has no process reward model: UCT over sampled steps with roll-outs to the
end. Later rounds descend with the PRM, which a prototype found to solve 1.7 times
as many problems as sampling at equal tokens, where plain UCT equalled sampling. Other
ways, by `search.rule`: trees in every round, with the PRM where there is one, and whole
paths by the policy alone, none of them twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from o1jax import rewards, search
from o1jax.config import SearchConfig
from o1jax.data import steps as steps_lib
from o1jax.data import stepwise, trees
from o1jax.data.prefix_tree import by_problem
from o1jax.parallel import distributed
from o1jax.run import files
from o1jax.run.stop import deferred
from o1jax.sampling.distinct import Distinct
from o1jax.sampling.draw import SAMPLE, Drawing
from o1jax.sampling.guided import Guided
from o1jax.sampling.keys import stable_id
from o1jax.sampling.mcts import Search
from o1jax.sampling.scorer import PrmScorer
from o1jax.sampling.tree_scorer import TreeScorer
from o1jax.stages.context import Run
from o1jax.stages.evaluate import answer, name_ids, sampler, step_ids
from o1jax.stages.half_saved import HalfSaved
from o1jax.types import Problem, Step, Trajectory, Verdict

CHUNK = 100  # problems searched between two saves


def drawing(config: SearchConfig) -> Drawing:
  """How search samples steps."""
  return Drawing(
    config.temperature, config.top_k or None, None if config.top_p == 1 else config.top_p
  )


def reward_of(run: Run, verdict: Verdict | None) -> float | None:
  """Terminal reward of a verdict; None for cut-off or masked paths."""
  if verdict is None or verdict.masked:
    return None
  weight = run.config.search.compile_weight
  return rewards.terminal_reward(verdict.compiled, verdict.pass_rate, weight)


def as_trajectories(
  run: Run,
  problems: Sequence[Problem],
  paths: Sequence[tuple[Step, ...]],
  *,
  origin: str,
  version: int,
  weights: Sequence[float] | None = None,
) -> list[Trajectory]:
  """Judged paths with the values of their own prefix trees; `weights` are 1 if not given."""
  verdicts = run.executor.judge(problems, paths)
  plain = [
    Trajectory(
      problem.id,
      path,
      verdict=verdict,
      reward=reward_of(run, verdict),
      policy_version=version,
      origin=origin,
      weight=weight,
    )
    for problem, path, verdict, weight in zip(
      problems, paths, verdicts, weights or [1.0] * len(paths), strict=True
    )
    if path
  ]
  trees = by_problem(plain)
  return [trees[t.problem_id].valued(t) for t in plain]


def synthesize(
  run: Run, round_: int, policy: Any, prm: Any | None, known: Sequence[Trajectory] = ()
) -> list[Trajectory]:
  """Searches the round's training problems; returns all roll-outs, good and bad.

  They are kept as stepwise-supervision JSONL in the stage's folder, a file a chunk. `known` are
  the roll-outs of earlier rounds, only to tell how many problems were never solved before.
  """
  name = f'round{round_}/synthesis'
  chunks = run.bench.store.chunks(name, 'trajectories')
  rule = run.config.search.rule
  if rule == 'guided' and not run.config.search.guided_descents:
    prm = None
  descend = rule == 'guided' and prm is not None
  if rule == 'distinct':
    find, title = _distinct(run, policy), 'paths without replacement'
  elif descend:
    find, title = _guided(run, policy, prm), 'descent guided by the PRM'
  else:
    find = _trees(run, policy, prm, name)
    title = f'{"UCT" if rule == "guided" else rule.upper()} search'

  def body() -> dict[str, Any]:
    new = run.new_problems(round_)
    parts = [new[i : i + CHUNK] for i in range(0, len(new), CHUNK)]
    done = chunks.done()
    with run.bench.progress.bar(name, len(parts), len(done)) as bar:
      for index, part in enumerate(parts):
        if index in done:
          continue
        seed = run.config.run.seed * 1000 + round_
        new_paths = find(part, seed)
        told = {'weights': new_paths.weights, 'origin': name, 'version': round_}
        found = as_trajectories(run, new_paths.problems, new_paths.paths, **told)
        by_id = {p.id: steps_lib.prompt_of(p.statement) for p in part}
        rows = [stepwise.to_row(t, by_id[t.problem_id]) for t in found]
        share = new_paths.generated / max(1, len(rows))  # none where no path was one
        chunks.write(index, [r | {'share_tokens': share} for r in rows])
        run.bench.store.drop_checkpoints(name)  # of the chunk's search, which is over
        bar.update(index + 1)
    before = {t.problem_id for t in known if t.accepted}
    return _summary(
      run, round_, policy, chunks, before, control=rule == 'distinct' or prm is not None
    )

  run.stage(name, title, body)
  return [stepwise.from_row(row) for row in chunks.rows()]


def _summary(
  run: Run, round_: int, policy: Any, chunks, before: set[str], *, control: bool
) -> dict[str, Any]:
  rows = list(chunks.rows())
  solved = {r['problem_id'] for r in rows if r['status'] == 'accepted'}
  tokens = sum(r['share_tokens'] for r in rows)  # a chunk's tokens stand split over its rows
  result = {
    'trajectories': len(rows),
    'problems': len(run.new_problems(round_)),
    'solved': len(solved),
    'first_solved': len(solved - before),
    'tokens': int(tokens),
  }
  if control and run.config.eval.sampling_control:
    sampled = _sampling_control(run, round_, policy, tokens, before)
    rest = max(sampled['sampling_solved'], 1)
    result |= sampled | {
      'over_sampling': round(len(solved) / rest, 3),
      'at_most': round(result['problems'] / rest, 3),  # where every problem were solved
    }
  return result


def _sampling_control(
  run: Run, round_: int, policy: Any, tokens: float, before: set[str]
) -> dict[str, Any]:
  """Plain sampling of the same problems with the same number of tokens."""
  seed = run.config.run.seed * 1000 + round_ + 500
  problems = run.new_problems(round_)
  probe = answer(run, policy, problems[:100], SAMPLE, samples=1, seed=seed)
  each = probe.generated / len(probe.paths)
  samples = max(1, round(tokens / len(problems) / each))
  drawn = answer(run, policy, problems, SAMPLE, samples=samples, seed=seed)
  solved = drawn.accepted.max(axis=1) > 0
  new = np.array([p.id not in before for p in problems])
  return {
    'sampling_solved': int(solved.sum()),
    'sampling_first_solved': int((solved & new).sum()),
    'sampling_tokens': drawn.generated,
    'sampling_each': samples,
  }


@dataclasses.dataclass(frozen=True)
class Found:
  """Paths that a search has found."""

  problems: list[Problem]  # of each path
  paths: list[tuple[Step, ...]]
  generated: int  # tokens
  weights: list[float] | None = None  # see `Trajectory`


Find = Callable[[Sequence[Problem], int], Found]  # problems, seed

_SCHEDULES = {
  'constant': search.constant,
  'linear': search.linear,
  'exponential': search.exponential,
}


def _trees(run: Run, policy: Any, prm: Any | None, name: str) -> Find:
  config = run.config.search
  mcts = _search(run, with_prm=prm is not None)
  folder = run.bench.store.path(name, 'trees')

  def find(part: Sequence[Problem], seed: int):
    def evaluate(new: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
      paths = (run.encoder.steps_of(tokens) for _, tokens in new)
      verdicts = run.executor.judge([part[i] for i, _ in new], paths)
      values = [reward_of(run, v) for v in verdicts]
      return [math.nan if v is None else v for v in values]

    prompts = [run.encoder.prompt(p) for p in part]
    judges = () if prm is None else (prm,)
    with run.sampling(policy, *judges) as (params, *judges), deferred() as stop:
      score = None
      for judge in judges:
        nodes = len(part) * (1 + mcts.width * mcts.simulations)
        tokens = config.pool_tokens or sum(map(len, prompts)) + nodes * config.max_step_tokens
        held = {'tokens': tokens, 'nodes': nodes, 'rows': score_rows(config)}
        score = TreeScorer(run.model, judge, prompts, mcts.steps, **held)
      half = HalfSaved(run, name, part, seed, stop)
      forest = mcts(
        params,
        prompts,
        evaluate,
        score=score,
        seed=seed,
        ids=name_ids(part),
        saved=half.read(),
        boundary=half.boundary,
      )
    if config.keep_trees:
      for b, problem in enumerate(part):
        tree = trees.tree_of(forest, b, problem.id, prompts[b])
        file = folder / f'{stable_id(problem.id):08x}.npz'
        files.write_bytes(file, trees.to_bytes(tree))
    problems = [part[r.problem] for r in forest.rollouts]
    paths = [run.encoder.steps_of(r.path) for r in forest.rollouts]
    return Found(problems, paths, forest.generated)

  return find


def _search(run: Run, with_prm: bool) -> Search:
  """The tree search of the run's settings."""
  config = run.config.search
  simulations = math.ceil(config.simulations / config.children)
  rules = {'guided': search.uct, 'uct': search.uct, 'puct': search.puct}
  return Search(
    sampler(run, drawing(run.config.search), config.rows),
    step_ids(run),
    width=config.children,
    simulations=simulations,
    max_depth=config.depth_limit,
    rule=rules.get(config.rule, search.gumbel_interior),
    # The first simulation makes the children that the root's rule chooses from.
    root_rule=search.gumbel_root(max(1, simulations - 1)) if config.rule == 'gumbel' else None,
    c=config.c,
    schedule=_SCHEDULES[config.c_schedule],
    allowed=search.widening(config.widening, 0.5) if config.widening else None,
    slots=(config.most_children or 4 * config.children) if config.widening else 0,
    mix=config.mix if with_prm else 0.0,
    pool_tokens=config.pool_tokens,
    overlap=distributed.count() == 1,  # several processes judge together, in one order of calls
  )


def _distinct(run: Run, policy: Any) -> Find:
  config = run.config.search
  draw = Distinct(sampler(run, drawing(config), config.rows), config.simulations)

  def find(part: Sequence[Problem], seed: int):
    prompts = [run.encoder.prompt(p) for p in part]
    with run.sampling(policy) as (params,):
      found = draw(params, prompts, seed=seed, ids=name_ids(part))
    paths = [run.encoder.steps_of(path.tokens) for path in found.paths]
    problems = [part[path.problem] for path in found.paths]
    return Found(problems, paths, found.generated, found.weights())

  return find


def score_rows(config: SearchConfig) -> int:
  """Steps that the PRM reads at once: no more than are decoded."""
  return min(PrmScorer.rows, config.rows)


def guided(run: Run, children: int, *, pick_temperature: float = 0.0, prior: float = 0.0) -> Guided:
  """Guided descent under the run's limits."""
  return Guided(
    run.model,
    step_ids(run),
    how=drawing(run.config.search),
    children=children,
    max_step=run.config.search.max_step_tokens,
    max_program=run.config.data.max_path_tokens,
    max_depth=run.config.search.depth_limit,
    pick_temperature=pick_temperature,
    prior=prior,
    score_program=False,
    rows=run.config.search.rows,
  )


def _guided(run: Run, policy: Any, prm: Any) -> Find:
  config = run.config.search
  # Log-odds of good and bad steps lie several apart: 0.5 explores near ties only.
  rule = guided(run, config.guided_children, pick_temperature=0.5)

  def find(part: Sequence[Problem], seed: int):
    repeated = [p for p in part for _ in range(config.guided_descents)]
    attempts = np.tile(np.arange(config.guided_descents, dtype=np.uint32), len(part))
    ids = np.column_stack([name_ids(repeated), attempts])
    prompts = [run.encoder.prompt(p) for p in repeated]
    with run.sampling(policy, prm) as (params, judge):
      scorer = PrmScorer(run.model, judge, score_rows(config))
      descents = rule(params, scorer, prompts, seed=seed, ids=ids)
    paths = [run.encoder.steps_of(d.tokens) for d in descents.descents]
    return Found(repeated, paths, descents.generated)

  return find

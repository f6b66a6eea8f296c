"""Paths that RL samples, and their programs, which run while the device goes on.

The paths of an iteration are drawn when it begins, or up to `rl.staleness` iterations before: an
older policy has then written them, which the importance weights of `losses.ppo` make up for.
Programs run in a thread of their own: those of one iteration while the next is drawn, while the PRM
scores, and, by the problems' own tests, while the policy learns.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from o1jax.config import RlConfig
from o1jax.parallel import distributed
from o1jax.sampling.draw import Drawing
from o1jax.stages.context import Run
from o1jax.stages.evaluate import name_ids, sampler
from o1jax.types import Problem, Step, TestCase, Trajectory, Verdict

SOLVED_WEIGHT = 0.05  # of a problem whose latest roll-outs all succeeded, beside 1.05 if all failed

Later = Callable[[Callable[[], Any]], concurrent.futures.Future]
Verdicts = list[Verdict | None]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Drawn:
  """The paths of one iteration: rows `i * group .. (i + 1) * group` answer problem i."""

  problems: list[Problem]
  tokens: np.ndarray  # [B, N] int32, 0 after the end
  logprobs: np.ndarray  # [B, N] float32, of the policy that drew them
  lengths: np.ndarray  # [B] int32
  version: int  # iterations that this policy had learnt from
  rng: np.random.Generator  # for what is still to be drawn of the iteration
  paths: list[tuple[Step, ...]]
  # From when their programs are on their way to the sandbox:
  verdicts: concurrent.futures.Future[Verdicts] | None = None  # by the tests that are paid for
  own: concurrent.futures.Future[Verdicts] | None = None  # by the problems' own tests

  @property
  def repeated(self) -> list[Problem]:
    """The problem of each row."""
    group = len(self.paths) // len(self.problems)
    return [p for p in self.problems for _ in range(group)]


def draw_problems(
  config: RlConfig,
  problems: Sequence[Problem],
  seen: Iterable[Trajectory],
  rng: np.random.Generator,
) -> list[Problem]:
  """`rl.problems` different ones, or all of fewer.

  All have the same chance, or with `rl.prioritised` one that falls with their latest success.
  `seen` are roll-outs in the order of their making; those of one problem, origin and policy
  belong together, and the last of them count. One that was never tried counts as failed.
  """
  weights = np.ones(len(problems))
  if config.prioritised:
    groups: dict[str, tuple[Any, list[bool]]] = {}
    for t in seen:
      made_by = (t.origin, t.policy_version)
      if groups.get(t.problem_id, (None,))[0] != made_by:
        groups[t.problem_id] = (made_by, [])
      groups[t.problem_id][1].append(t.accepted)
    solved = [np.mean(groups[p.id][1]) if p.id in groups else 0.0 for p in problems]
    weights += SOLVED_WEIGHT - np.array(solved)
  count = min(config.problems, len(problems))
  picked = rng.choice(len(problems), count, replace=False, p=weights / weights.sum())
  return [problems[i] for i in picked]


@contextmanager
def background() -> Iterator[Later]:
  """Calls that run one after the other in a thread, or at once where several processes agree.

  Several processes judge together, and would do so in different orders.
  """
  if distributed.count() > 1:
    yield _at_once
    return
  with concurrent.futures.ThreadPoolExecutor(1, 'programs') as pool:
    yield pool.submit


def _at_once(call: Callable[[], Any]) -> concurrent.futures.Future:
  future: concurrent.futures.Future = concurrent.futures.Future()
  future.set_result(call())
  return future


class Ahead:
  """Draws the iterations of one RL stage, at most `rl.staleness` of them ahead."""

  def __init__(
    self, run: Run, round_: int, tests: Mapping[str, tuple[TestCase, ...]], later: Later
  ):
    """Problems are those of the round that `tests` judges; `later` runs their programs."""
    self._run = run
    self._round = round_
    self._tests = tests
    self._later = later
    self._problems = [p for p in run.known_problems(round_) if p.id in tests]
    self._queue: deque[Drawn] = deque()
    self._next = 0  # the iteration to be drawn next
    self._refuted: dict[str, list[int]] = {}  # own tests that are paid for too, by problem

  def take(self, iteration: int, policy: Any, seen: Sequence[Trajectory]) -> Drawn:
    """The paths of `iteration`; while their programs run, `policy` draws ahead what it may.

    Args:
      iteration: one more than the time before.
      policy: parameters, as they are before the iteration's updates.
      seen: what decides which problems are drawn.
    """
    config = self._run.config.rl
    if self._next == iteration:
      self._draw(iteration, policy, seen)
    drawn = self._sent(self._queue.popleft())
    while self._next <= min(iteration + config.staleness, config.iterations - 1):
      self._draw(iteration, policy, seen)
    return drawn

  @property
  def refuted(self) -> dict[str, list[int]]:
    """Problem id -> numbers of its own tests that are paid for beside the generated ones."""
    return self._refuted

  def refute(self, problem: Problem, failed: int) -> None:
    """From the next iteration on a program of `problem` is paid only if it passes this own test."""
    known = self._refuted.setdefault(problem.id, [])
    if failed not in known:
      known.append(failed)

  def saved(self) -> Arrays:
    """What is drawn and not taken, in arrays of fixed shapes for a checkpoint; {} on policy."""
    if not self._run.config.rl.staleness:
      return {}
    arrays, numbers = self.blank(), {p.id: i for i, p in enumerate(self._problems)}
    for slot, drawn in enumerate(self._queue):
      arrays['problems'][slot] = [numbers[p.id] for p in drawn.problems]
      arrays['version'][slot] = drawn.version
      for name in ('tokens', 'logprobs', 'lengths'):
        arrays[name][slot] = getattr(drawn, name)
    return arrays

  def blank(self) -> Arrays:
    """Arrays like those of `saved`."""
    config = self._run.config.rl
    if not config.staleness:
      return {}
    problems = min(config.problems, len(self._problems))
    shape = config.staleness, problems * config.group
    width = self._run.config.data.max_path_tokens
    return {
      'problems': np.zeros((config.staleness, problems), np.int32),
      'version': np.zeros(config.staleness, np.int32),
      'tokens': np.zeros((*shape, width), np.int32),
      'logprobs': np.zeros((*shape, width), np.float32),
      'lengths': np.zeros(shape, np.int32),
    }

  def restore(self, iteration: int, arrays: Arrays, refuted: Mapping[str, list[int]]) -> None:
    """Takes over what `saved` and `refuted` were before `iteration`."""
    config = self._run.config.rl
    self._next, self._refuted = iteration, {key: list(found) for key, found in refuted.items()}
    for slot in range(min(config.staleness, config.iterations - iteration)):
      problems = [self._problems[i] for i in arrays['problems'][slot]]
      rows = [np.asarray(arrays[name][slot]) for name in ('tokens', 'logprobs', 'lengths')]
      version = int(arrays['version'][slot])
      self._push(problems, *rows, version, self._rng(self._next))

  def _seed(self, iteration: int) -> int:
    return (self._run.config.run.seed * 1000 + self._round) * 1000 + iteration

  def _rng(self, iteration: int) -> np.random.Generator:
    """Of the order of learning, for paths that may have to be restored."""
    return np.random.default_rng((self._seed(iteration), 1))

  def _draw(self, version: int, policy: Any, seen: Sequence[Trajectory]) -> None:
    run, seed = self._run, self._seed(self._next)
    config, rng = run.config.rl, np.random.default_rng(seed)
    problems = draw_problems(config, self._problems, seen, rng)
    prompts = [run.encoder.prompt(p) for p in problems]
    draw = sampler(run, Drawing(config.temperature), run.config.search.rows)
    with run.sampling(policy) as (policy,):
      found = draw(policy, prompts, seed=seed, ids=name_ids(problems), samples=config.group)
    rng = self._rng(self._next) if config.staleness else rng
    self._push(problems, found.tokens, found.logprobs, found.lengths, version, rng)

  def _push(self, problems, tokens, logprobs, lengths, version, rng) -> None:
    ids = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    paths = [self._run.encoder.steps_of(row) for row in ids]
    self._queue.append(Drawn(problems, tokens, logprobs, lengths, version, rng, paths))
    self._next += 1

  def _sent(self, drawn: Drawn) -> Drawn:
    """With its programs on their way to the sandbox."""
    judge, problems = self._run.executor.judge, drawn.repeated
    own = {p.id: tuple(p.tests[i] for i in self._refuted.get(p.id, ())) for p in drawn.problems}
    paid = [self._tests[p.id] + own[p.id] for p in problems]
    return dataclasses.replace(
      drawn,
      verdicts=self._later(lambda: judge(problems, drawn.paths, paid)),
      own=self._later(lambda: judge(problems, drawn.paths)),
    )

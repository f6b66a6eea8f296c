"""What a policy solves: greedy and sampled pass@1, with bootstrap intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from o1jax.sampling.draw import GREEDY, Drawing
from o1jax.sampling.guided import StepIds
from o1jax.sampling.keys import stable_id
from o1jax.sampling.sampler import Sampler, Samples
from o1jax.stages.context import Run
from o1jax.types import Problem, Step


def step_ids(run: Run) -> StepIds:
  """The delimiters of a path in the run's tokenizer."""
  tokenizer = run.tokenizer
  return StepIds(tokenizer.step_end_id, tokenizer.action_ids[2], tokenizer.eos_id)


def name_ids(problems: Sequence[Problem]) -> np.ndarray:
  """[n] numbers that name problems in random keys, the same in every run."""
  return np.array([stable_id(p.id) for p in problems], np.uint32)


def sampler(run: Run, how: Drawing, rows: int) -> Sampler:
  """Continues prompts to the end of the document."""
  limit = run.config.data.max_path_tokens
  return Sampler(run.model, limit, (run.tokenizer.eos_id,), how, rows)


@dataclasses.dataclass(frozen=True)
class Answers:
  """Sampled paths of problems, `[problems][samples]`, and whether each is right."""

  paths: list[list[tuple[Step, ...]]]
  accepted: np.ndarray  # [problems, samples] float32
  logprobs: np.ndarray  # [problems, samples] float32, of the whole path
  generated: int  # tokens


def answer(
  run: Run, params: Any, problems: Sequence[Problem], how: Drawing, *, samples: int, seed: int
) -> Answers:
  """Samples and judges whole paths by the problems' own tests."""
  prompts = [run.encoder.prompt(p) for p in problems]
  rows = run.config.eval.rows
  with run.sampling(params) as (params,):
    drawn: Samples = sampler(run, how, rows)(
      params, prompts, seed=seed, ids=name_ids(problems), samples=samples
    )
  count = len(problems) * samples
  flat = [run.encoder.steps_of(drawn.ids(i)) for i in range(count)]
  repeated = [p for p in problems for _ in range(samples)]
  verdicts = run.executor.judge(repeated, flat)
  accepted = np.array([v is not None and v.status == 'accepted' for v in verdicts], np.float32)
  shape = (len(problems), samples)
  paths = [flat[i * samples : (i + 1) * samples] for i in range(len(problems))]
  logprobs = drawn.logprobs.sum(axis=1).reshape(shape)
  return Answers(paths, accepted.reshape(shape), logprobs, drawn.generated)


def pass_at_1(run: Run, params: Any, problems: Sequence[Problem], *, seed: int) -> dict[str, Any]:
  """Greedy and sampled pass@1 with 95 % intervals, and the per-problem outcomes."""
  config = run.config.eval
  greedy = answer(run, params, problems, GREEDY, samples=1, seed=seed)
  how = Drawing(temperature=config.temperature)
  sampled = answer(run, params, problems, how, samples=config.samples, seed=seed)
  outcomes = {'greedy': greedy.accepted[:, 0], 'sampled': sampled.accepted.mean(axis=1)}
  means = {name: float(values.mean()) for name, values in outcomes.items()}
  ci95 = {name: interval(values, config.bootstrap) for name, values in outcomes.items()}
  tokens = greedy.generated / len(problems)
  return means | {'ci95': ci95, 'greedy_tokens': tokens, 'outcomes': outcomes}


def interval(values: np.ndarray, resamples: int) -> list[float]:
  """Percentile bootstrap 95 % interval of a mean over problems."""
  rng = np.random.default_rng(0)
  picks = rng.integers(0, len(values), (resamples, len(values)))
  low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
  return [round(float(low), 4), round(float(high), 4)]


def brief(run: Run, params: Any, *, seed: int) -> dict[str, float]:
  """Dev-split pass@1 for a stage's closing line."""
  found = pass_at_1(run, params, run.dev, seed=seed)
  return {'dev_greedy': found['greedy'], 'dev_sampled': found['sampled']}

"""Step 1: the test-case generator (TCG), and the tests that it writes for RL.

SFT on real test cases, then DPO against the same inputs with shuffled outputs (O1-CODER, section
3.1), with the NLL term that keeps the chosen side likely (Pang et al. 2024, arXiv 2404.19733).
Beside it the control: the same pairs and as many steps, the chosen side alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from o1jax.batch import PairBatch, TokenBatch
from o1jax.config import TcgConfig
from o1jax.data import family, test_parts
from o1jax.data.pack import Document, pack
from o1jax.data.pipeline import batches
from o1jax.data.steps import program_step
from o1jax.learn.logprobs import sequence_logprobs
from o1jax.learn.objectives import dpo_loss, sft_loss
from o1jax.learn.update import LossFn
from o1jax.models.transformer import Model
from o1jax.parallel.ambient import spread
from o1jax.parallel.distributed import fetch
from o1jax.sampling.draw import GREEDY, Drawing
from o1jax.sampling.sampler import Sampler
from o1jax.stages.context import Run
from o1jax.stages.evaluate import interval, name_ids
from o1jax.stages.execute import Executor
from o1jax.stages.fit import fit
from o1jax.types import ACCEPTED, Problem, TestCase

STAGE = 'tcg'
_TESTS = 'tcg_tests'  # the folder of what `write_tests` keeps; made within the stage

Cases = tuple[TestCase, ...]


def train_tcg(run: Run) -> Any:
  """The generator's parameters after SFT and DPO.

  Also writes the tests of `write_tests`, so that the stage's line tells how many there are.
  """
  config, seed = run.config.tcg, run.config.run.seed

  def body() -> dict[str, Any]:
    parts = test_parts.draw_parts(
      run.train[: config.problems], draws=config.draws, bare=config.question_share, seed=seed
    )
    documents = test_parts.documents(run.tokenizer, parts, config.row_tokens)
    sft = _saved(run, 'sft', lambda: _fit_sft(run, documents))

    @functools.cache
    def pairs() -> PairBatch:  # only where DPO or its control is still to be trained
      return draw_pairs(run, sft, parts)

    dpo = _saved(run, 'dpo', lambda: _fit_pairs(run, 'dpo', sft, pairs(), preference=1.0))
    if config.control:
      _saved(run, 'control', lambda: _fit_pairs(run, 'control', sft, pairs(), preference=0.0))
    result: dict[str, Any] = {'documents': len(documents)}
    for name, params in (('sft', sft), ('dpo', dpo)):
      found = tcg_quality(run, params, run.dev[: config.eval_problems], seed=seed)
      result |= {f'dev_{name}_{key}': found[key] for key in ('parse_rate', 'correct')}
    tests = write_tests(run, dpo)
    without = len(run.train) - len(tests)
    return result | {'tested_problems': len(tests), 'untested_problems': without}

  run.stage(STAGE, 'test-case generator: SFT, then DPO on shuffled outputs', body)
  return run.load(STAGE, 'dpo')


def tcg_table(run: Run) -> list[dict[str, Any]]:
  """Quality on the test split after each training: rows of `tcg_quality` with their `stage`.

  `stage` is base, sft, sft_control (SFT, then the chosen sides alone) or dpo.
  """
  config = run.config.tcg
  saved = {'sft': 'sft', 'sft_control': 'control', 'dpo': 'dpo'}
  if not config.control:
    del saved['sft_control']
  problems = run.test[: config.eval_problems]
  rows = []
  for stage in ('base', *saved):
    params = run.base if stage == 'base' else run.load(STAGE, saved[stage])
    rows.append({'stage': stage} | tcg_quality(run, params, problems, seed=run.config.run.seed))
  return rows


def tcg_quality(run: Run, params: Any, problems: Sequence[Problem], *, seed: int) -> dict[str, Any]:
  """Samples one test part for each problem, reference code in view, and counts; see `quality`."""
  problems = [p for p in problems if p.solutions]
  parts = generate(run, params, problems, samples=1, seed=seed)
  return quality(run.executor, problems, parts, run.config.eval.bootstrap)


def quality(
  executor: Executor, problems: Sequence[Problem], parts: Sequence[Cases | None], resamples: int
) -> dict[str, Any]:
  """How many generated cases say what the reference program says.

  Args:
    executor: runs the reference programs.
    problems: with a reference program each.
    parts: one for each problem; None for text that is no test part.
    resamples: of the interval.

  Returns:
    `parse_rate`, the share of parts that are three whole cases; `correct`, the share of the
    cases of those whose output is what the reference gives, and `ci95`, its bootstrap interval
    over problems; `correct_of_all`, the same share where a part that does not parse counts as
    three wrong cases; `n`, the problems. Parts that the sandbox failed to judge are not counted.
  """
  right = confirm(executor, problems, parts)
  judged = [flags for flags, part in zip(right, parts, strict=True) if flags or part is None]
  shares = np.array([np.mean(flags) for flags in judged if flags])
  n, parsed = len(judged), len(shares)
  correct = float(shares.mean()) if parsed else 0.0
  return {
    'parse_rate': parsed / n if n else 0.0,
    'correct': correct,
    'ci95': interval(shares, resamples) if parsed else [0.0, 0.0],
    'correct_of_all': correct * parsed / n if n else 0.0,
    'n': n,
  }


def write_tests(run: Run, params: Any) -> dict[str, Cases]:
  """Generated tests of the train problems, by problem id, which the reference confirms.

  From `tcg.samples` parts a problem; an input occurs once, and at most `tcg.max_tests` are kept.
  Problems with fewer than `tcg.min_tests`, or with tests that an idle program passes, are left out:
  there is nothing to fall back to, and RL goes without them. What was written in an earlier session
  is read, not sampled again.
  """
  config, chunks = run.config.tcg, run.bench.store.chunks(_TESTS, 'tests')
  problems = [p for p in run.train if p.solutions]
  size = max(1, run.config.eval.rows // config.samples)
  firsts = range(0, len(problems), size)
  done = chunks.done()
  with run.bench.progress.bar(_TESTS, len(firsts), len(done)) as bar:
    for index, first in enumerate(firsts):
      if index not in done:
        chunks.write(index, _confirmed_rows(run, params, problems[first : first + size]))
        bar.update(index + 1)
  kept = {
    row['problem_id']: tuple(TestCase(**case) for case in row['tests']) for row in chunks.rows()
  }
  return {
    key: cases
    for key, cases in kept.items()
    if len(cases) >= config.min_tests and not idle_program_passes(cases)
  }


def idle_program_passes(cases: Cases) -> bool:
  """Whether a program passes that computes nothing: it prints a constant, or what it is given."""
  constant = len({case.output for case in cases}) == 1
  return constant or all(case.input in (case.output, f'[{case.output}]') for case in cases)


def _confirmed_rows(run: Run, params: Any, problems: Sequence[Problem]) -> list[dict[str, Any]]:
  config = run.config.tcg
  seed = run.config.run.seed * 1000 + 1  # other draws than the evaluation's
  parts = generate(run, params, problems, samples=config.samples, seed=seed)
  repeated = [p for p in problems for _ in range(config.samples)]
  kept: dict[str, dict[str, TestCase]] = {p.id: {} for p in problems}
  for problem, part, flags in zip(
    repeated, parts, confirm(run.executor, repeated, parts), strict=True
  ):
    for case, right in zip(part or (), flags, strict=False):
      if right and len(kept[problem.id]) < config.max_tests:
        kept[problem.id].setdefault(case.input, case)
  return [{'problem_id': key, 'tests': list(cases.values())} for key, cases in kept.items()]


def generate(
  run: Run, params: Any, problems: Sequence[Problem], *, samples: int, seed: int
) -> list[Cases | None]:
  """Samples test parts, problem-major; None where the text is not three whole cases.

  Prompts of more than `tcg.row_tokens`, which training has left out, are not tried: None.
  """
  config, tokenizer = run.config.tcg, run.tokenizer
  prompts = [tokenizer.prompt_ids(family.tcg_prompt(p, p.solutions[0])) for p in problems]
  tried = [i for i, prompt in enumerate(prompts) if len(prompt) <= config.row_tokens]
  parts: list[Cases | None] = [None] * (len(problems) * samples)
  if not tried:
    return parts
  how = Drawing(config.temperature) if config.temperature else GREEDY
  draw = Sampler(run.model, config.max_tokens, (tokenizer.eos_id,), how, run.config.eval.rows)
  names = name_ids(problems)[tried]
  with run.sampling(params) as (params,):
    drawn = draw(params, [prompts[i] for i in tried], seed=seed, ids=names, samples=samples)
  for row in np.flatnonzero(drawn.stopped):
    at, number = tried[row // samples], row % samples
    text = tokenizer.decode(drawn.ids(row))
    parts[at * samples + number] = test_parts.read_cases(problems[at], text)
  return parts


def confirm(
  executor: Executor, problems: Sequence[Problem], parts: Sequence[Cases | None]
) -> list[tuple[bool, ...]]:
  """For each case of each part, whether the problem's reference program agrees.

  Empty for a part that is None and for one that the sandbox failed to judge.
  """
  found = [i for i, part in enumerate(parts) if part is not None]
  verdicts = executor.judge(
    [dataclasses.replace(problems[i], test_code='') for i in found],
    [(program_step(problems[i].solutions[0]),) for i in found],
    [parts[i] for i in found],
  )
  flags: list[tuple[bool, ...]] = [()] * len(parts)
  for i, verdict in zip(found, verdicts, strict=True):
    if not verdict.masked:
      flags[i] = tuple(test.status == ACCEPTED for test in verdict.tests)
  return flags


def draw_pairs(run: Run, reference: Any, parts: Sequence[test_parts.Part]) -> PairBatch:
  """As many pairs as `tcg.dpo` can read once: NumPy rows with the reference's log-probs."""
  config = run.config.tcg
  chosen, rejected = test_parts.shuffled_pairs(
    run.tokenizer,
    parts,
    longest=config.row_tokens,
    most=config.dpo.steps * config.dpo.batch,
    seed=run.config.run.seed,
  )
  size = config.dpo.batch  # an update reads as many, and they divide over the mesh
  logprobs = [reference_logprobs(run.model, reference, rows, size) for rows in (chosen, rejected)]
  return PairBatch(chosen, rejected, *logprobs)


def reference_logprobs(model: Model, params: Any, rows: TokenBatch, size: int) -> np.ndarray:
  """Summed log-prob of each row's answer, [N] float32, computed in blocks of `size` rows."""
  count, found = len(rows.tokens), []
  for first in range(0, count, size):
    index = np.minimum(np.arange(first, first + size), count - 1)
    block = jax.tree.map(lambda x, index=index: x[index], rows)
    found.append(fetch(answer_logprobs(model, params, spread(block))))
  return np.concatenate(found)[:count] if found else np.zeros(0, np.float32)


answer_logprobs = jax.jit(sequence_logprobs, static_argnums=0)


def _fit_sft(run: Run, documents: Sequence[Document]) -> Any:
  config, start = run.config.tcg, run.adapted(run.base, 'tcg')
  if not documents:
    run.bench.progress.say(
      f'{STAGE}/sft: skipped: no training problem has three tests of its own that fit '
      f'tcg.row_tokens={config.row_tokens}; the generator stays as it was'
    )
    return start
  rows = pack(documents, config.row_tokens)
  data = batches(rows, batch=config.sft.batch, seed=run.config.run.seed)
  loss = sft_loss(run.model)
  return fit(run.bench, STAGE, 'sft', run.model, start, loss, data, config.sft)[0]


def pair_loss(model: Model, config: TcgConfig, preference: float) -> LossFn:
  """DPO's loss, or with `preference` 0 that of its control."""
  return dpo_loss(
    model,
    config.beta,
    nll=config.nll if preference else 1.0,
    preference=preference,
    label_smoothing=config.label_smoothing,
    ipo=config.ipo,
    length_normalised=config.length_normalised,
  )


def _fit_pairs(run: Run, name: str, start: Any, pairs: PairBatch, *, preference: float) -> Any:
  """DPO, or with `preference` 0 its control, which has nothing but the NLL term."""
  config = run.config.tcg
  if not len(pairs.chosen.tokens):
    run.bench.progress.say(f'{STAGE}/{name}: skipped: there are no pairs; it stays as SFT left it')
    return start
  data = batches(pairs, batch=config.dpo.batch, seed=run.config.run.seed)
  loss = pair_loss(run.model, config, preference)
  return fit(run.bench, STAGE, name, run.model, start, loss, data, config.dpo)[0]


def _saved(run: Run, name: str, train: Callable[[], Any]) -> Any:
  """Parameters that an earlier session saved as `name`, or else those of `train`, saved."""
  try:
    return run.load(STAGE, name)
  except FileNotFoundError:
    run.save(STAGE, name, train())
    return run.load(STAGE, name)  # laid out as a resumed session finds them

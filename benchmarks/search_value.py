"""What search is worth beside sampling, at equal generated tokens; last line one JSON object.

    python benchmarks/search_value.py RUN [RUN ...] [--out DIR] [--problems 200] [--tune]
        [--policies NAME ...] [--ways NAME ...]

RUN are folders of finished runs (`python -m o1jax.train --config configs/quickstart.yaml`), one a
seed; they are only read. The base and the SFT policy of round 0 are searched with round 0's PRM,
the last policy with the PRM that it learnt from, and where there is one (`prm.renew`) with
that made after it. A rule finds whole paths within a budget of generated tokens and answers with
the one that the PRM likes best: no program is executed before it is judged. The baselines get as
many samples as fit into what the costliest rule has drawn, rounded up, at temperature 1 and, as
'cooler', at .7. Votes are by behaviour (Li et al. 2022, "AlphaCode"): programs that print the same
on the inputs of the problem's tests vote together, so that here, alone, programs run first.

On training problems of round 1, which policies and PRM of round 0 have not seen (and for the last
policy, which has seen all, on dev), programs are executed: problems solved by guided descents, by
UCT on outcome and by paths without replacement, each beside sampling with as many tokens.

Outcomes are kept in `--out`, a file for each run, and not measured again. `--policies` leaves out
those that are not named, as the tables name them ('base', 'round0/sft', ...), `--ways` the ways
that are not, and `--splits` test or train problems; `--problems` are the first of the test split,
whatever the run's own report had. `--tune` tries settings on the dev split instead and prints what
each solves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import numpy as np
from loop import ranged, short, table
from search_paths import Case, Found, Policy, Tokens, Trees
from search_settings import BUDGETS, COOLER, GRID, RULES, SYNTHESIS, VOTED, Way

from o1jax import config as config_lib
from o1jax.run import checkpoints, files
from o1jax.sampling.draw import GREEDY
from o1jax.sandbox.zygote import Zygote, strongest
from o1jax.stages.context import Run
from o1jax.stages.evaluate import interval
from o1jax.stages.setup import opened
from o1jax.stages.test_time import elected

RESAMPLES = 2000
BASELINES = ('greedy', 'majority', 'logprob', 'majority, cooler', 'logprob, cooler')
# Samples of which the PRM chooses: the best, or by votes that its view of the worst step or of all
# steps weighs.
SCORED = ('prm', 'prm_vote', 'prm_product')
WITH_PRM = (*SCORED, *(f'{how}, cooler' for how in SCORED))


def policies(run: Run, folder: pathlib.Path) -> dict[str, Callable[[], Policy]]:
  """Base, SFT and last policy of a finished run, the last with the PRMs of its round."""
  load = lambda name: checkpoints.load_tree(folder / 'stages' / name)  # noqa: E731
  last = f'round{run.config.run.rounds - 1}'
  final = lambda prm: Policy(load(f'{last}/rl/policy'), prm)  # noqa: E731
  found = {
    'base': lambda: Policy(run.base, load('round0/prm/prm')),
    'round0/sft': lambda: Policy(load('round0/policy_sft/policy'), load('round0/prm/prm')),
    f'{last}/rl': lambda: final(load(f'{last}/prm/prm')),
  }
  if (folder / 'stages' / last / 'renewed/prm/done.json').exists():
    found[f'{last}/rl, renewed PRM'] = lambda: final(load(f'{last}/renewed/prm/prm'))
  return found


def chosen(case: Case, found: Found, values: Sequence[Sequence[float]]) -> list[Tokens]:
  """Of each problem the path of the largest value."""
  return [paths[int(np.argmax(v))] for paths, v in zip(found.paths, values, strict=True)]


def voted(case: Case, found: Found, weights: Sequence[Sequence[float]], ties) -> list[Tokens]:
  """The best path, by `ties`, among those of the behaviour that has most weight.

  A path that was found several times has as many votes.
  """
  answers = []
  for problem, paths, weight, tie in zip(case.problems, found.paths, weights, ties, strict=True):
    answers.append(paths[elected(case.behaviours(problem, paths), weight, tie)])
  return answers


def answered(case: Case, found: Found, how: str) -> np.ndarray:
  """Outcomes [P] of the answer that one way to choose among the paths gives."""
  worst = found.judged()
  if how == 'prm':
    answers = chosen(case, found, worst)
  elif how == 'prm_vote':
    answers = voted(case, found, worst, worst)
  elif how == 'prm_product':
    answers = voted(case, found, found.judged(math.prod), worst)
  elif how == 'logprob':
    answers = chosen(case, found, found.logprobs)
  else:  # majority
    ones = [[1.0] * len(paths) for paths in found.paths]
    answers = voted(case, found, ones, found.logprobs)
  return case.accepted(answers)


def picks(case: Case, found: Found) -> dict[str, np.ndarray]:
  """Outcomes [P] of every way to choose among the paths."""
  ways = (*SCORED, 'majority', 'logprob') if found.logprobs else SCORED
  return {how: answered(case, found, how) for how in ways}


def measure(case: Case, rules: Mapping[str, dict[int, Way]]) -> dict[str, Any]:
  """For each budget: tokens a problem and outcomes of the rules and baselines."""
  count, scorer = len(case.problems), case.scorer()
  greedy = case.sample(1, GREEDY)
  each = greedy.generated / count
  result: dict[str, Any] = {}
  for budget in BUDGETS:
    rows = {}
    for name, ways in rules.items():
      found = ways[budget](case, scorer)
      case.score(found, scorer)
      how = 'prm_product' if name in VOTED else 'prm'
      rows[name] = row(case, found, answered(case, found, how))
    most = max(r['tokens'] for r in rows.values())
    result[str(budget)] = rows, math.ceil(most / each)
  most = max(n for _, n in result.values())
  samples, cooler = case.sample(most), case.sample(most, COOLER)
  for drawn in (samples, cooler):
    case.score(drawn, scorer)
  for budget, (rows, n) in result.items():
    for drawn, which in ((cooler, ', cooler'), (samples, '')):
      found = drawn.first(n)
      outcomes = picks(case, found)
      rows |= {f'{how}{which}': row(case, found, each) for how, each in outcomes.items()}
    rows['greedy'] = row(case, greedy, case.accepted([paths[0] for paths in greedy.paths]))
    result[budget] = rows | {'any sample': row(case, found, solved(case, found))}
  return result


def row(case: Case, found: Found, outcomes: np.ndarray) -> dict[str, Any]:
  """What a way drew for a problem, and what came of it."""
  return {'tokens': found.generated / len(case.problems), 'outcomes': outcomes.tolist()}


def solved(case: Case, found: Found) -> np.ndarray:
  """Whether any path of each problem is right, [P]."""
  most = max(map(len, found.paths))
  padded = [[paths[i % len(paths)] for paths in found.paths] for i in range(most)]
  return np.max([case.accepted(answers) for answers in padded], axis=0)


def synthesis(case: Case) -> dict[str, Any]:
  """Training problems solved by search that is told outcomes, and by as many sampled tokens."""
  rows: dict[str, Any] = {}
  for name, way in SYNTHESIS.items():
    found = way(case, None, case.outcomes) if isinstance(way, Trees) else way(case, None)
    rows[name] = row(case, found, solved(case, found))
  most = max(r['tokens'] for r in rows.values())
  each = case.sample(1).generated / len(case.problems)
  samples = case.sample(math.ceil(most / each))
  for name in SYNTHESIS:
    found = samples.first(max(1, round(rows[name]['tokens'] / each)))
    rows[name]['sampling'] = row(case, found, solved(case, found))
  return rows


def one_run(
  folder: pathlib.Path,
  problems: int,
  zygote: Zygote,
  out: pathlib.Path,
  wanted: Sequence[str],
  splits: Sequence[str],
  rules: Mapping[str, dict[int, Way]],
) -> None:
  """Adds to the file `out` what it lacks of the figures of a finished run."""
  found = files.read_json(out) or {'test': {}, 'train': {}}
  with reopened(folder, problems) as run:
    for split, there in [(split, found[split]) for split in splits]:
      for name, policy in policies(run, folder).items():
        unwanted = wanted and name not in wanted
        if unwanted or name in there or (split == 'train' and name.endswith('PRM')):
          continue
        start = time.perf_counter()
        if split == 'test':
          there[name] = measure(Case(run, policy(), run.test[:problems], zygote), rules)
        else:
          new = run.new_problems(1) if name in ('base', 'round0/sft') else run.dev
          there[name] = synthesis(Case(run, policy(), new[:problems], zygote))
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(out, found)
        seconds = time.perf_counter() - start
        print(f'{split} {name}: {seconds:.0f} s', file=sys.stderr, flush=True)


@contextlib.contextmanager
def reopened(folder: pathlib.Path, problems: int) -> Iterator[Run]:
  """The problems, base model and sandbox of a run, with another folder to write to.

  It holds out as many problems as are asked for; the first are those that the run held out.
  """
  with tempfile.TemporaryDirectory() as scratch:
    held_out = [f'data.{split}_problems={problems}' for split in ('dev', 'test')]
    overrides = [f'run.dir={scratch}/run', 'metrics.tensorboard=false', *held_out]
    with opened(config_lib.load(folder / 'config.yaml', overrides), ()) as run:
      yield run


def tune(folder: pathlib.Path, problems: int, zygote: Zygote, wanted: Sequence[str]) -> None:
  """What settings solve on dev, by policy, and which way to choose is best for each."""
  with reopened(folder, problems) as run:
    for policy, made in policies(run, folder).items():
      if wanted and policy not in wanted:
        continue
      case = Case(run, made(), run.dev[:problems], zygote)
      scorer = case.scorer()
      rows = []
      for name, way in GRID.items():
        found = way(case, scorer)
        case.score(found, scorer)
        rows.append((name, found, picks(case, found)))
      samples = case.sample(12)
      case.score(samples, scorer)
      for n in (3, 6, 12):
        part = samples.first(n)
        rows.append((f'{n} samples', part, picks(case, part)))
      table(
        f'{policy} on dev, {problems} problems',
        ('setting', 'tokens', *PICKS),
        [
          (name, round(found.generated / problems), *(_mean(got.get(key)) for key in PICKS))
          for name, found, got in rows
        ],
      )


PICKS = (*SCORED, 'majority', 'logprob')


def _mean(outcomes: np.ndarray | None) -> float | str:
  return '' if outcomes is None else float(outcomes.mean())


def compare(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Means over the runs of every way, and what each rule is over the best of the others.

  `over` are the best baseline, and for the rules the best of samples from which the PRM chooses:
  difference and its 95 % interval, paired by problem.
  """
  found: dict[str, Any] = {}
  for policy, budgets in runs[0]['test'].items():
    for budget in budgets:
      same = [run['test'][policy][budget] for run in runs]
      mean = {name: np.mean([r[name]['outcomes'] for r in same], axis=0) for name in same[0]}
      there = [[n for n in names if n in mean] for names in (BASELINES, WITH_PRM)]
      best = [max(names, key=lambda n: mean[n].mean()) for names in there]
      rows = {}
      for name, outcomes in mean.items():
        tokens = float(np.mean([r[name]['tokens'] for r in same]))
        rows[name] = {'tokens': round(tokens), 'solved': round(float(outcomes.mean()), 4)}
        rivals = best if name in RULES else best[:1] if name in WITH_PRM else ()
        if rivals:
          leads = {rival: outcomes - mean[rival] for rival in rivals}
          rows[name]['over'] = {
            n: [round(float(v.mean()), 4), *interval(v, RESAMPLES)] for n, v in leads.items()
          }
      found.setdefault(policy, {})[budget] = rows
  return found


def compare_synthesis(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Solved by every search and by sampling as many tokens, means over the runs."""
  found: dict[str, Any] = {}
  for policy, rows in runs[0]['train'].items():
    for name in rows:
      same = [run['train'][policy][name] for run in runs]
      ours = np.mean([r['outcomes'] for r in same], axis=0)
      rest = np.mean([r['sampling']['outcomes'] for r in same], axis=0)
      found.setdefault(policy, {})[name] = {
        'tokens': round(float(np.mean([r['tokens'] for r in same]))),
        'sampling_tokens': round(float(np.mean([r['sampling']['tokens'] for r in same]))),
        'solved': round(float(ours.mean()), 4),
        'sampling_solved': round(float(rest.mean()), 4),
        'ratio': round(float(ours.mean() / rest.mean()), 2),
        'lead_ci95': interval(ours - rest, RESAMPLES),
      }
  return found


def show(test: dict[str, Any], train: dict[str, Any]) -> None:
  """Both as Markdown."""
  known = {name for budgets in test.values() for ways in budgets.values() for name in ways}
  names = [n for n in (*BASELINES, *WITH_PRM, 'any sample', *RULES) if n in known]
  solved_rows, lead_rows = [], []
  for policy, budgets in test.items():
    for budget, ways in budgets.items():
      cells = [f'{short(ways[n]["solved"])} ({ways[n]["tokens"]})' for n in names]
      solved_rows.append((policy, budget, *cells))
      for name in (n for n in names if 'over' in ways[n]):
        over = ways[name]['over'].items()
        leads = [f'{mean:+.3f} [{low:+.3f}, {high:+.3f}] {n}' for n, (mean, low, high) in over]
        lead_rows.append((policy, budget, name, *leads, *[''] * (2 - len(leads))))
  table('Test problems solved (tokens a problem)', ('policy', 'budget', *names), solved_rows)
  head = ('policy', 'budget', 'rule', 'over the best baseline', 'over samples with the PRM')
  table('Search over the best of the others, 95 %', head, lead_rows)
  keys = ('tokens', 'solved', 'sampling_tokens', 'sampling_solved', 'ratio')
  table(
    'Training problems',
    ('policy', 'search', *(key.replace('_', ' ') for key in keys), 'difference, 95 %'),
    [
      (policy, name, *(r[key] for key in keys), ranged(r['lead_ci95']))
      for policy, found in train.items()
      for name, r in found.items()
    ],
  )


def main() -> None:
  """Measures what is missing, and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('runs', nargs='+', type=pathlib.Path, metavar='RUN')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/search_value'))
  parser.add_argument('--problems', type=int, default=200)
  parser.add_argument('--policies', nargs='+', default=[], metavar='NAME')
  parser.add_argument('--ways', nargs='+', default=[*RULES], choices=RULES, metavar='NAME')
  parser.add_argument('--splits', nargs='+', default=['test', 'train'], choices=['test', 'train'])
  parser.add_argument('--tune', action='store_true')
  options = parser.parse_args()
  rules = {name: RULES[name] for name in options.ways}
  zygote, _ = strongest()
  with contextlib.closing(zygote):
    if options.tune:
      tune(options.runs[0], options.problems, zygote, options.policies)
      return
    found = []
    for folder in options.runs:
      file = options.out / f'{folder.resolve().name}.json'
      one_run(folder, options.problems, zygote, file, options.policies, options.splits, rules)
      found.append(files.read_json(file))
  test, train = compare(found), compare_synthesis(found)
  show(test, train)
  print(json.dumps({'benchmark': 'search_value', 'runs': len(found), 'test': test, 'train': train}))


if __name__ == '__main__':
  main()

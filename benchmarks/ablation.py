"""What each part of RL adds: round 0's RL of finished quickstart runs, again without it.

    python benchmarks/loop.py --seeds 0 1 2
    python benchmarks/ablation.py --seeds 0 1 2

Every variant starts from the SFT policy, the PRM and the tests of its seed's run, and samples as
many roll-outs as the run's own RL, which is the row `full`; `expert iteration` is its control. A
finished variant is not made again. With `--problems N` all are judged anew on N test problems, of
which the first are those of the runs. Prints a Markdown table of the held-out test problems and,
last, one line of JSON. Differences are paired by problem, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from o1jax import cli
from o1jax.config import Config, load
from o1jax.train import loop

VARIANTS = {
  'outcome reward only': ('rl.alpha_end=1',),
  'process reward only': ('rl.alpha_start=0', 'rl.alpha_end=0'),
  'no replay': ('rl.replay=0',),
  'all problems alike': ('rl.prioritised=false',),
  'PPO with a critic': ('rl.algorithm=ppo',),
  'DPO': ('rl.algorithm=dpo',),
}
# Rows that the runs have made themselves, by their stage in the report.
MADE = {'SFT, no RL': 'round0/sft', 'expert iteration': 'control/expert_iteration'}
POLICIES = {'full': 'round0/rl', 'SFT, no RL': 'round0/policy_sft'}  # by the stage that made them
BEFORE = (  # stages that a variant's RL stands on
  'tcg',
  'round0/synthesis',
  'round0/policy_sft',
  'round0/rollouts/prm',
  'round0/held_back/prm',
  'round0/prm',
)
OPTIONAL = 'round0/held_back/prm'  # of runs with `data.judge_problems`
ROW = 'stages/test_round0_rl/report/done.json'
SPENT = 'stages/round0/rl/done.json'


def prepared(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes `folder` a run that has finished everything before round 0's RL, like `source`.

  Raises:
    SystemExit: `source` has not come so far.
  """
  if folder.exists():
    return
  half = folder.with_name(f'{folder.name}.half')
  shutil.rmtree(half, ignore_errors=True)
  for stage in BEFORE:
    if stage == OPTIONAL and not (source / 'stages' / stage).exists():
      continue
    if not (source / 'stages' / stage / 'done.json').exists():
      raise SystemExit(f'{source}: {stage} is not finished; run benchmarks/loop.py first')
    shutil.copytree(source / 'stages' / stage, half / 'stages' / stage)
  shutil.copytree(source / 'stages/tcg_tests', half / 'stages/tcg_tests')
  shutil.copy(source / 'run.json', half)
  half.rename(folder)


def make(config: Config) -> None:
  """Round 0's RL and its row of the report, in the folder of the config."""
  from o1jax.stages.context import NotAsked
  from o1jax.stages.report import Candidate, policy_row
  from o1jax.stages.setup import opened

  with opened(config, ['rl'], force=True) as run:
    with contextlib.suppress(NotAsked):  # the loop ends behind round 0's RL
      loop(run)
    reporting = dataclasses.replace(run, wanted=frozenset({'report'}))
    policy_row(reporting, Candidate('round0/rl', run.load('round0/rl', 'policy')))


def variant(source: pathlib.Path, folder: pathlib.Path, overrides: Sequence[str]) -> None:
  """Makes a variant in a process of its own, if it is not there."""
  if (folder / ROW).exists():
    return
  prepared(source, folder)
  always = (f'run.dir={folder}', 'run.rounds=1', 'rl.control=false')
  config = load(source / 'config.yaml', [*always, *overrides])
  child = multiprocessing.get_context('spawn').Process(target=make, args=(config,))
  child.start()
  child.join()
  if child.exitcode:
    raise SystemExit(f'{folder}: the run ended with {child.exitcode}; the same command goes on')


def own_rows(source: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Rows of a finished run: `full` and those of `MADE`, with the tokens that each sampled."""
  path = source / 'summary.json'
  if not path.exists():
    raise SystemExit(f'{source}: no summary.json; run benchmarks/loop.py first')
  by_stage = {row['stage']: row for row in json.loads(path.read_text())['policy']}
  made = {'full': 'round0/rl', **MADE}
  rows = {name: by_stage[stage] for name, stage in made.items() if stage in by_stage}
  spent = {'full': 'round0/rl', 'expert iteration': 'expert_iteration/rl'}
  for name in spent.keys() & rows.keys():
    stage = spent[name]
    rows[name]['tokens'] = _read(source / 'stages' / stage / 'done.json')['sampled_tokens']
  return rows


def variant_row(folder: pathlib.Path) -> dict[str, Any]:
  """The row of a finished variant."""
  return _read(folder / ROW) | {'tokens': _read(folder / SPENT)['sampled_tokens']}


def judged_anew(
  source: pathlib.Path, policies: Mapping[str, pathlib.Path], problems: int
) -> dict[str, dict[str, Any]]:
  """Rows as `own_rows` and `variant_row` have them, of policies saved in folders.

  Of test problems that a run of the seed of `source` holds out, as many as are asked for.
  """
  from search_value import reopened

  from o1jax.run import checkpoints
  from o1jax.stages.evaluate import pass_at_1
  from o1jax.stages.report import SEED

  with reopened(source, problems) as run:
    return {
      name: pass_at_1(run, checkpoints.load_tree(policy), run.test, seed=SEED)
      for name, policy in policies.items()
    }


def pooled(rows: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """One variant over its seeds beside `full`: outcomes averaged over seeds, then compared.

  Args:
    rows: of the variant, one a seed.
    full: of the full RL, of the same seeds.
  """
  from o1jax.stages.report import gains

  means = [
    {key: np.mean([row['outcomes'][key] for row in side], axis=0) for key in ('greedy', 'sampled')}
    for side in (full, rows)
  ]
  result = {key: round(float(values.mean()), 4) for key, values in means[1].items()}
  result |= {'by_seed': [[round(row[key], 4) for key in result] for row in rows]}
  spent = [row['tokens'] for row in rows if 'tokens' in row]
  return result | {
    'sampled_tokens': round(float(np.mean(spent))) if spent else 0,
    'over_full': gains(*means, 2000),
  }


def _read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text())


def _show(results: Mapping[str, Mapping[str, Any]]) -> None:
  """The Markdown table."""
  short = lambda value: f'{value:+.3f}'.replace('0.', '.', 1)  # noqa: E731
  print('| variant | greedy | sampled | greedy, over full | sampled, over full | sampled tokens |')
  print(f'|{"---|" * 6}')
  for name, row in results.items():
    cells = [name, *(short(row[key]).lstrip('+') for key in ('greedy', 'sampled'))]
    change = row['over_full']
    for key in ('greedy', 'sampled'):
      low, high = map(short, change['ci95'][key])
      cells.append('' if name == 'full' else f'{short(change[key])} [{low}, {high}]')
    print(f'| {" | ".join(cells)} | {row["sampled_tokens"]:,} |')


def main() -> None:
  """Makes what is missing and prints."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--runs', default='runs/quickstart', help='finished runs are RUNS-SEED')
  parser.add_argument('--dir', default='runs/ablation', help='variants go to DIR-SEED/')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--variants', nargs='+', default=list(VARIANTS), choices=VARIANTS)
  parser.add_argument('--problems', type=int, default=0, help='of the test split, judged anew')
  parser.add_argument('overrides', nargs='*', metavar='section.key=value')
  options = parser.parse_intermixed_args()
  sources = {seed: pathlib.Path(f'{options.runs}-{seed}') for seed in options.seeds}
  folders = {
    (seed, name): pathlib.Path(f'{options.dir}-{seed}') / name.replace(' ', '_').replace(',', '')
    for seed in options.seeds
    for name in options.variants
  }
  for (seed, name), folder in folders.items():
    print(f'seed {seed}: {name}', file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    variant(sources[seed], folder, [*VARIANTS[name], *options.overrides])
  made = {seed: own_rows(source) for seed, source in sources.items()}
  there = set.intersection(*(set(rows) for rows in made.values()))  # a run may have no control
  rows = {name: [made[s][name] for s in options.seeds] for name in ('full', *MADE) if name in there}
  for name in options.variants:
    rows[name] = [variant_row(folders[seed, name]) for seed in options.seeds]
  if options.problems:
    for i, seed in enumerate(options.seeds):
      stages = sources[seed] / 'stages'
      policies = {name: stages / path / 'policy' for name, path in POLICIES.items()}
      policies |= {
        name: folders[seed, name] / 'stages/round0/rl/policy' for name in options.variants
      }
      for name, row in judged_anew(sources[seed], policies, options.problems).items():
        rows[name][i] |= row
    rows = {name: rows[name] for name in policies}
  results = {name: pooled(found, rows['full']) for name, found in rows.items()}
  _show(results)
  settings = {'seeds': options.seeds, 'overrides': options.overrides}
  print(f'\n{json.dumps({"benchmark": "ablation", **settings, "variants": results})}')


if __name__ == '__main__':
  cli.restart_with_huge_pages()
  main()

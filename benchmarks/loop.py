"""The quickstart over several seeds: the tables of docs/benchmarks.md.

    python benchmarks/loop.py --seeds 0 1 2

Runs `python -m o1jax.train --config configs/quickstart.yaml` for each seed, one after the other
(a finished run is not run again), prints their tables as Markdown and, last, one line of JSON with
the figures over all seeds. Everything is read from the runs' `summary.json` and `done.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from o1jax.learn.prm_metrics import auc_lead
from o1jax.stages.report import judged_rows

RESAMPLES = 2000


def short(value: float) -> str:
  """.612 for 0.6123."""
  return f'{value:.3f}'.replace('0.', '.', 1)


def ranged(ci95: Sequence[float]) -> str:
  """[.567, .655]."""
  return f'[{short(ci95[0])}, {short(ci95[1])}]'


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
  """Prints a Markdown table under a heading."""
  print(f'\n### {title}\n\n| {" | ".join(head)} |\n|{"---|" * len(head)}')
  for row in rows:
    cells = [short(cell) if isinstance(cell, float) else str(cell) for cell in row]
    print(f'| {" | ".join(cells)} |')


def train(config: str, folder: pathlib.Path, seed: int, overrides: Sequence[str]) -> dict:
  """The summary of a seed's run, which is made or finished first if need be."""
  summary = folder / 'summary.json'
  if not summary.exists():
    command = [sys.executable, '-m', 'o1jax.train', '--config', config, f'run.dir={folder}']
    subprocess.run([*command, f'run.seed={seed}', *overrides], check=True, stdout=sys.stderr)
  return json.loads(summary.read_text())


def policy_tables(runs: dict[int, dict]) -> None:
  """pass@1 by seed and stage, and what each stage gained over the one before."""
  rows = []
  for seed, run in runs.items():
    for row in run['policy']:
      gain = row.get('gain')
      gained = [
        f'{short(gain[key])} {ranged(gain["ci95"][key])}' if gain else ''
        for key in ('greedy', 'sampled')
      ]
      cells = [f'{short(row[key])} {ranged(row["ci95"][key])}' for key in ('greedy', 'sampled')]
      rows.append((seed, row['stage'], *cells, *gained))
  head = ('seed', 'after', 'greedy', 'sampled', 'greedy gain', 'sampled gain')
  table('Policy, pass@1', head, rows)


def pooled_gains(runs: dict[int, dict]) -> list[dict]:
  """For each stage the gain over the one before: mean over seeds, problems resampled."""
  rng = np.random.default_rng(0)
  found = []
  first = next(iter(runs.values()))['policy']
  for number, row in enumerate(first):
    same = [run['policy'][number] for run in runs.values()]
    result = {'stage': row['stage']}
    for key in ('greedy', 'sampled'):
      result[key] = round(float(np.mean([r[key] for r in same])), 4)
    if 'gain' in row:
      over = [r['stage'] for r in first].index(row['gain']['over'])
      result['over'] = row['gain']['over']
      for key in ('greedy', 'sampled'):
        change = np.mean(
          [
            np.subtract(
              run['policy'][number]['outcomes'][key], run['policy'][over]['outcomes'][key]
            )
            for run in runs.values()
          ],
          axis=0,
        )
        picks = rng.integers(0, len(change), (RESAMPLES, len(change)))
        ci95 = np.percentile(change[picks].mean(axis=1), [2.5, 97.5])
        result[f'{key}_gain'] = round(float(change.mean()), 4)
        result[f'{key}_gain_ci95'] = [round(float(x), 4) for x in ci95]
    found.append(result)
  return found


def pooled_prms(runs: dict[int, dict]) -> dict[tuple[int, str], dict]:
  """Of each round and policy the AUC over the pairs of all seeds; problems are resampled."""
  found = {}
  for row in next(iter(runs.values()))['prm']:
    for whose, _ in judged_rows(row):
      same = [dict(judged_rows(run['prm'][row['round']]))[whose] for run in runs.values()]
      ours, theirs, all_ = np.sum([part['wins'] for part in same], axis=0).T
      sides = np.stack([ours, all_], axis=1), np.stack([theirs, all_], axis=1)
      lead, ci95 = auc_lead(*sides, RESAMPLES)
      found[row['round'], whose] = {
        'sibling_auc': float(ours.sum() / all_.sum()),
        'logprob_sibling_auc': float(theirs.sum() / all_.sum()),
        'lead': lead,
        'ci95': ci95,
      }
  return found


def other_tables(runs: dict[int, dict], stages: dict[int, dict[str, dict]]) -> None:
  """Test-case generator, process reward model, test time, synthesis, seconds."""
  table(
    'Test-case generator',
    ('seed', 'stage', 'parse rate', 'correct', '95 %', 'n'),
    [
      (seed, r['stage'], r['parse_rate'], r['correct'], ranged(r['ci95']), r['n'])
      for seed, run in runs.items()
      for r in run['tcg']
    ],
  )
  keys = ('sibling_auc', 'logprob_sibling_auc', 'pair_accuracy', 'logprob_pair_accuracy')
  head = ('sibling AUC', 'log-prob', 'pair accuracy', 'log-prob', 'AUC over log-prob, 95 %')
  table(
    'Process reward model',
    ('seed', 'round', 'roll-outs of', *head),
    [
      (seed, r['round'], whose, *(part[key] for key in keys), ranged(part['lead_ci95']))
      for seed, run in runs.items()
      for r in run['prm']
      for whose, part in judged_rows(r)
    ],
  )
  table(
    'Process reward model, all seeds',
    ('round', 'roll-outs of', 'sibling AUC', 'log-prob', 'over log-prob', '95 %'),
    [
      (*place, *(r[key] for key in keys[:2]), r['lead'], ranged(r['ci95']))
      for place, r in pooled_prms(runs).items()
    ],
  )
  keys = ('greedy', 'majority', 'logprob', 'search_prm', 'lead_over_best')
  head = ('greedy', 'majority', 'log-prob best-of-n', 'search with PRM', 'lead over the best')
  table(
    'Test time, at equal generated tokens',
    ('seed', 'policy', 'tokens a problem', 'PRM tokens a problem', *head, '95 %'),
    [
      (
        seed,
        r['policy'],
        round(r['tokens_per_problem']),
        round(r['prm_tokens_per_problem']),
        *(r[key] for key in keys),
        ranged(r['lead_ci95']),
      )
      for seed, run in runs.items()
      for r in run['search']
    ],
  )
  keys = ('solved', 'first_solved', 'tokens', 'sampling_solved', 'sampling_first_solved')
  table(
    'Synthesis beside sampling',
    ('seed', 'stage', *(key.replace('_', ' ') for key in keys), 'sampling tokens', 'at most'),
    [
      (seed, name, *(result[key] for key in (*keys, 'sampling_tokens')), _most(result))
      for seed, found in stages.items()
      for name, result in found.items()
      if 'sampling_solved' in result
    ],
  )
  names = [name for name in next(iter(runs.values()))['seconds'] if not name.endswith('report')]
  table(
    'Seconds',
    ('seed', *names, 'report', 'total'),
    [(seed, *_seconds(run, names)) for seed, run in runs.items()],
  )


def _most(result: dict) -> str:
  """How many times what sampling solved there was to solve."""
  return f'{result["problems"] / max(result["sampling_solved"], 1):.2f} times'


def _seconds(run: dict, names: Sequence[str]) -> list[int]:
  seconds = run['seconds']
  report = sum(s for name, s in seconds.items() if name.endswith('report'))
  return [round(s) for s in (*(seconds[name] for name in names), report, run['total_seconds'])]


def stage_results(folder: pathlib.Path) -> dict[str, dict]:
  """Name of a stage -> its `done.json`."""
  stages = folder / 'stages'
  return {
    marker.parent.relative_to(stages).as_posix(): json.loads(marker.read_text())
    for marker in sorted(stages.rglob('done.json'))
  }


def main() -> None:
  """Runs and prints."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', default='configs/quickstart.yaml')
  parser.add_argument('--dir', default='runs/quickstart', help='run folders are DIR-SEED')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('overrides', nargs='*', metavar='section.key=value')
  # Behind `--seeds 0 1 2` argparse would take an override for a seed.
  arguments = sorted(sys.argv[1:], key=lambda x: x.startswith('-') or '=' not in x)
  options = parser.parse_intermixed_args(arguments)
  folders = {seed: pathlib.Path(f'{options.dir}-{seed}') for seed in options.seeds}
  runs = {s: train(options.config, f, s, options.overrides) for s, f in folders.items()}
  policy_tables(runs)
  other_tables(runs, {s: stage_results(f) for s, f in folders.items()})
  pooled = pooled_gains(runs)
  columns = ('greedy', 'sampled', 'greedy_gain', 'greedy_gain_ci95', 'sampled_gain_ci95')
  head = ('after', 'greedy', 'sampled', 'over', 'greedy gain', '95 %', 'sampled gain 95 %')
  table(
    f'Mean of {len(runs)} seeds',
    head,
    [
      (
        r['stage'],
        *(r[key] for key in columns[:2]),
        r.get('over', ''),
        *(
          (r['greedy_gain'], *(ranged(r[key]) for key in columns[3:])) if 'over' in r else [''] * 3
        ),
      )
      for r in pooled
    ],
  )
  base, last = pooled[0], pooled[-1]
  result = {
    'benchmark': 'loop',
    'config': options.config,
    'seeds': options.seeds,
    'overrides': options.overrides,
    'total_seconds': [run['total_seconds'] for run in runs.values()],
    'peak_memory_bytes': max(run['peak_memory_bytes'] for run in runs.values()),
    'policy': pooled,
    'final_over_base': {k: round(last[k] / base[k], 2) for k in ('greedy', 'sampled')},
    'prm': [{'round': i, 'of': whose} | r for (i, whose), r in pooled_prms(runs).items()],
    'tcg_correct': [run['tcg'][-1]['correct'] for run in runs.values()],
  }
  print(f'\n{json.dumps(result)}')


if __name__ == '__main__':
  main()

"""The control of `data.judge_problems`: the policy learns from the held-back problems instead.

    python benchmarks/held_back.py RUN [RUN ...] [--problems 1000]

RUN are folders of finished runs with held-back problems (`python -m o1jax.train --config
configs/quickstart.yaml`), one a seed; they are only read. From the last policy's own roll-outs of
those problems, which its renewed PRM has learnt from, the policy is fine-tuned on the verified
ones, by the settings of `policy_sft`: pass@1 on the test split before and behind, paired by
problem. What the same roll-outs are worth to the PRM tells `benchmarks/search_value.py`. Last line
one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import numpy as np
from loop import ranged, short, table
from search_value import RESAMPLES, reopened

from o1jax.data import stepwise
from o1jax.run import checkpoints
from o1jax.run.files import Chunks
from o1jax.stages.evaluate import interval, pass_at_1
from o1jax.stages.policy_sft import finetune_policy
from o1jax.stages.report import SEED

KEYS = ('greedy', 'sampled')


def one_run(folder: pathlib.Path, problems: int) -> dict[str, dict[str, np.ndarray]]:
  """Outcomes [P] of the last policy of a run, `before` and `behind` its SFT.

  Raises:
    SystemExit: the run has held nothing back.
  """
  with reopened(folder, problems) as run:
    last = f'round{run.config.run.rounds - 1}'
    stage = folder / 'stages' / last
    rows = list(Chunks(stage / 'unseen/prm/trajectories').rows())
    if not rows:
      raise SystemExit(f'{folder}: no roll-outs of held-back problems; set data.judge_problems')
    policy = checkpoints.load_tree(stage / 'rl/policy')
    learning = dataclasses.replace(
      run, train=(*run.train, *run.judge), wanted=frozenset({'policy_sft'})
    )
    tuned = finetune_policy(
      learning, run.config.run.rounds, policy, [stepwise.from_row(row) for row in rows]
    )
    return {
      name: pass_at_1(run, params, run.test[:problems], seed=SEED)['outcomes']
      for name, params in (('before', policy), ('behind', tuned))
    }


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('runs', nargs='+', type=pathlib.Path, metavar='RUN')
  parser.add_argument('--problems', type=int, default=1000)
  options = parser.parse_args()
  found = [one_run(folder, options.problems) for folder in options.runs]
  result: dict[str, Any] = {'benchmark': 'held_back', 'runs': len(found)}
  lines = []
  for key in KEYS:
    before, behind = (np.mean([run[when][key] for run in found], axis=0) for when in found[0])
    gain, ci95 = float((behind - before).mean()), interval(behind - before, RESAMPLES)
    result[key] = {'before': before.mean().item(), 'behind': behind.mean().item()}
    result[key] |= {'gain': gain, 'ci95': ci95}
    lines.append((key, before.mean().item(), behind.mean().item(), short(gain), ranged(ci95)))
  head = ('pass@1', 'last policy', 'fine-tuned on the held-back problems', 'gain', '95 %')
  table(f'{options.problems} test problems, mean of {len(found)} runs', head, lines)
  print(json.dumps(result))


if __name__ == '__main__':
  main()

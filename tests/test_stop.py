"""SIGTERM and SIGINT: noted while there is something to save, saved, and gone on from."""

import io
import os
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from o1jax import config as config_lib
from o1jax.config import OptimConfig
from o1jax.parallel import make_mesh
from o1jax.run.checkpoints import load_tree, save_tree
from o1jax.run.metrics import Metrics
from o1jax.run.progress import Progress
from o1jax.run.stop import Stopped, deferred, raising
from o1jax.run.store import Store
from o1jax.stages import fit as fit_module
from o1jax.stages.context import Workbench


def send(signum):
  os.kill(os.getpid(), signum)


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_check_and_the_handlers_come_back(signum):
  before = signal.getsignal(signum)
  done = []
  with pytest.raises(Stopped) as caught, raising(), deferred() as stop:
    assert not stop.asked
    send(signum)
    done.append('the step')
    assert stop.asked
    stop.check()
    done.append('too far')
  assert done == ['the step'] and caught.value.signum == signum
  assert signal.getsignal(signum) is before


def test_a_signal_after_the_last_check_is_not_lost():
  with pytest.raises(Stopped), deferred() as stop:
    stop.check()
    send(signal.SIGTERM)


def test_outside_a_training_loop_it_stops_where_it_stands():
  done = []
  with pytest.raises(Stopped), raising():
    send(signal.SIGTERM)
    done.append('too far')
  assert not done


class Ending:
  """Is sent a signal as it is destroyed, where Python passes over what is raised."""

  def __del__(self):
    send(signal.SIGTERM)


def test_a_signal_that_python_passed_over_is_raised_again():
  with pytest.raises(Stopped), raising():
    Ending()
    threading.Event().wait(5)  # until it is


def test_a_signal_in_the_save_of_a_result_waits_for_it(tmp_path, monkeypatch):
  done = []
  wait = ocp.StandardCheckpointer.wait_until_finished

  def interrupted(self):
    if not done:
      send(signal.SIGTERM)
    wait(self)
    done.append('waited')

  monkeypatch.setattr(ocp.StandardCheckpointer, 'wait_until_finished', interrupted)
  tree = {'w': jnp.arange(3.0)}
  with pytest.raises(Stopped), raising():
    save_tree(tmp_path / 'policy', tree)
  assert done[0] == 'waited'
  np.testing.assert_array_equal(load_tree(tmp_path / 'policy')['w'], tree['w'])


SECOND = """
import os, signal
from o1jax.run.stop import deferred
with deferred():
  for _ in range(2):
    os.kill(os.getpid(), signal.SIGTERM)
  print('too far', flush=True)
"""


def test_a_second_signal_ends_at_once():
  got = subprocess.run([sys.executable, '-c', SECOND], capture_output=True, text=True)
  assert (got.returncode, got.stdout) == (143, '')


class Line:
  """A model of one matrix, for a training that takes no time."""

  def logical_axes(self):
    return {'w': ('embed', 'mlp')}


def square(params, batch):
  return jnp.sum((params['w'] - batch) ** 2), jnp.float32(1), {}


class Data:
  """Batch i is full of i; asking for batch `stop_at` sends SIGTERM."""

  def __init__(self, stop_at=None):
    self.stop_at = stop_at
    self.asked = []

  def __getitem__(self, i):
    self.asked.append(i)
    if i == self.stop_at:
      send(signal.SIGTERM)
    return np.full((4, 4), i, np.float32)


def trained(folder, data):
  free = {'checkpoint_every_s': 1000.0}  # no save of its own
  told = {'run': {'dir': str(folder), **free}, 'metrics': {'tensorboard': False}}
  config = config_lib.check(told)
  mesh = make_mesh({'data': 1}, jax.devices()[:1])
  with Store(config) as store, Metrics(store.dir, tensorboard=False) as metrics:
    bench = Workbench(store, metrics, Progress(io.StringIO()), mesh, log_every=1)
    optim = OptimConfig(steps=8, warmup=1, batch=4)
    start = {'w': jnp.zeros((4, 4))}
    end, last = fit_module.fit(bench, 'stage', 'line', Line(), start, square, data, optim)
    return end, last, [row['step'] for row in metrics.rows('stage/line')]


@pytest.mark.parametrize('stop_at', [3, 7])  # 7: the last batch, so that none is left
def test_a_training_saves_at_the_step_boundary_and_goes_on_from_there(tmp_path, stop_at):
  calm, metrics, steps = trained(tmp_path / 'calm', Data())
  first, second = Data(stop_at), Data()
  with pytest.raises(Stopped):
    trained(tmp_path / 'stopped', first)
  assert first.asked == list(range(stop_at + 1))
  end, last, told = trained(tmp_path / 'stopped', second)
  assert second.asked == list(range(stop_at + 1, 8))
  assert told == steps == list(range(1, 9))
  assert last['loss'] == metrics['loss']
  jax.tree.map(np.testing.assert_array_equal, end, calm)

"""Meshes and shardings on eight virtual devices: parity of loss and gradients, and errors."""

import functools
import io
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from o1jax import config as config_lib
from o1jax.batch import TokenBatch
from o1jax.config import OptimConfig
from o1jax.data.pipeline import batches
from o1jax.learn.objectives import sft_loss
from o1jax.learn.update import make_update
from o1jax.models import Model, ModelConfig, StepHead
from o1jax.parallel import (
  batch_faults,
  batch_sharding,
  make_mesh,
  meshes_that_fit,
  model_faults,
  own_rows,
  param_shardings,
  repeated,
  replicated,
  shard,
)
from o1jax.parallel.mesh import cpu_devices
from o1jax.parallel.sharding import shard_own
from o1jax.run.checkpoints import load_tree, save_tree
from o1jax.run.metrics import Metrics
from o1jax.run.progress import Progress
from o1jax.run.store import Store
from o1jax.stages import fit as fit_module
from o1jax.stages.context import Workbench

COUNT = 'xla_force_host_platform_device_count'
MODEL = Model(ModelConfig(64, 32, 2, 4, 2, 48, initializer_range=0.2, max_position=32))
MESHES = ({}, {'data': 2}, {'data': 4, 'fsdp': 2}, {'data': 2, 'fsdp': 2, 'tensor': 2})


def mesh_of(shape):
  return make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])


@jax.jit
@jax.value_and_grad
def loss(params, tokens, positions, segments):
  logits = MODEL.logits(params, MODEL.hidden(params, tokens, positions, segments)[:, :-1])
  chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def inputs():
  params = jax.jit(MODEL.init)(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
  positions = np.tile(np.arange(12, dtype=np.int32), (8, 1))
  return jax.device_get(params), (tokens, positions, np.ones_like(tokens))


def test_loss_and_gradients_do_not_depend_on_the_mesh():
  params, batch = inputs()
  expected, expected_grads = loss(params, *batch)
  for shape in MESHES:
    mesh = mesh_of(shape)
    placed = shard(params, param_shardings(mesh, MODEL, params))
    value, grads = loss(placed, *shard(batch, batch_sharding(mesh, 8)))
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


def test_decoding_runs_on_sharded_parameters():
  params, (tokens, positions, _) = inputs()
  valid, column = np.ones((8, 12), bool), jnp.int32(0)
  extend = jax.jit(MODEL.extend)
  expected, _ = extend(params, MODEL.empty_cache(8, 12), tokens, positions, column, valid)
  mesh = mesh_of(MESHES[-1])
  rows = batch_sharding(mesh, 8)
  cache, *batch = shard((MODEL.empty_cache(8, 12), tokens, positions, valid), rows)
  placed = shard(params, param_shardings(mesh, MODEL, params))
  hidden, _ = extend(placed, cache, *batch[:2], column, batch[2])
  np.testing.assert_allclose(hidden, expected, atol=1e-5)


def test_shardings_follow_the_table():
  params, _ = inputs()
  mesh = mesh_of({'data': 2, 'fsdp': 2, 'tensor': 2})
  # A PRM and a pair of moments: model trees are found wherever they are; the rest is whole.
  head = StepHead.init(MODEL.config)
  tree = {'trunk': params, 'head': head, 'moments': (params, jnp.int32(0))}
  specs = jax.tree.map(lambda s: s.spec, param_shardings(mesh, MODEL, tree))
  layers = specs['trunk']['layers']
  assert layers['q'] == P(None, 'fsdp', 'tensor', None)
  assert layers['down'] == P(None, 'tensor', 'fsdp')
  assert specs['trunk']['embed'] == P('tensor', 'fsdp')
  assert specs['moments'] == (specs['trunk'], P())
  assert set(specs['head'].values()) == {P()}
  placed = shard(params, param_shardings(mesh, MODEL, params))
  part = placed['layers']['gate'].addressable_shards[0].data
  assert part.shape == (2, 16, 24)
  assert replicated(mesh).spec == P()


def test_one_key_head_is_repeated_over_tensor():
  model = Model(ModelConfig(63, 32, 2, 4, 1, 48))
  specs = param_shardings(mesh_of({'tensor': 2}), model, model.shapes())
  assert specs['layers']['k'].spec == P(None, None, None, None)
  assert specs['layers']['q'].spec == P(None, None, 'tensor', None)
  assert specs['embed'].spec == P(None, None)  # 63 rows


@pytest.mark.parametrize(
  ('shape', 'cores', 'expected'),
  [
    ({}, 6, 1),
    ({'data': 2, 'tensor': 2}, 1, 4),
    ({'data': -1, 'tensor': 2}, 7, 6),
    ({'data': -1, 'tensor': 4}, 2, 4),
    ({'data': -1, 'fsdp': -1}, 8, 1),
    ({'data': 0}, 8, 1),
  ],
)
def test_a_mesh_asks_for_its_cpu_devices(shape, cores, expected):
  assert cpu_devices(shape, cores) == expected


@pytest.mark.parametrize(('flags', 'devices'), [('', 3), (f'--{COUNT}=2', 2)])
def test_a_cpu_starts_the_devices_of_the_mesh_unless_told_a_number(flags, devices):
  code = (
    'import os; from o1jax.parallel.mesh import start_cpu_devices; start_cpu_devices({"data": 3});'
    'import jax; print(jax.device_count(), os.environ["XLA_FLAGS"])'
  )
  env = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  said = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
  one_thread = '--xla_cpu_multi_thread_eigen=false'
  assert said.stdout.split() == [str(devices), flags or one_thread], said.stderr


def test_mesh_errors_propose_meshes_that_fit():
  with pytest.raises(
    ValueError,
    match='data=3 fsdp=1 sequence=1 tensor=1 needs 3 devices, found 8; use data=8',
  ):
    make_mesh({'data': 3})
  with pytest.raises(ValueError, match=r"unknown mesh axes \['model'\]"):
    make_mesh({'model': 8})
  with pytest.raises(ValueError, match='8 devices do not divide over 3'):
    make_mesh({'data': -1, 'tensor': 3})
  with pytest.raises(ValueError, match='at most one may be -1'):
    make_mesh({'data': -1, 'fsdp': -1})
  filled = make_mesh({'data': -1, 'sequence': 2, 'tensor': 2})
  assert dict(filled.shape) == {'data': 2, 'fsdp': 1, 'sequence': 2, 'tensor': 2}


def test_batch_and_model_errors_name_both_numbers():
  mesh = mesh_of({'data': 2, 'fsdp': 2})
  with pytest.raises(
    ValueError, match=r'batch=6 does not divide over data\*fsdp=4; use a multiple'
  ):
    batch_sharding(mesh, 6)
  with pytest.raises(ValueError, match='or the mesh data=2 tensor=2 or '):
    batch_sharding(mesh, 6)
  told = r'heads=4 does not divide over tensor=8; use data=8 or fsdp=8 or data=4 fsdp=2$'
  with pytest.raises(ValueError, match=told):
    param_shardings(mesh_of({'tensor': 8}), MODEL, MODEL.shapes())
  wrong = MODEL.shapes() | {'layers': {}}
  with pytest.raises(ValueError, match='do not have the structure of the model'):
    param_shardings(mesh, MODEL, wrong)


def test_proposed_meshes_pass_the_check_that_failed():
  assert meshes_that_fit(8, lambda m: m.shape['data'] == 1) == 'fsdp=8 or fsdp=4 tensor=2 or ' + (
    'fsdp=2 tensor=4'
  )
  odd = Model(ModelConfig(64, 36, 2, 3, 1, 48))  # 3 heads, width 36: no fsdp=8, no tensor=2
  with pytest.raises(ValueError, match='embed=36 does not divide over fsdp=8; use data=8 or'):
    param_shardings(mesh_of({'fsdp': 8}), odd, odd.shapes())
  rows = functools.partial(batch_faults, batch=7)
  assert meshes_that_fit(8, lambda m: not rows(m) and not model_faults(m, odd, odd.shapes())) == (
    'data=7 on 7 of the 8 devices'
  )


@pytest.mark.parametrize('shape', [{'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_a_training_stage_repeats_no_large_array(tmp_path, monkeypatch, shape):
  """Through the stages' own training loop: what every train step is handed, and gives back."""
  seen = []

  def spying(*args, **kwargs):
    update = make_update(*args, **kwargs, donate=False)

    def spy(state, batch, *consts):
      after, scalars = update(state, batch, *consts)
      seen.append((state, batch, after))
      return after, scalars

    return spy

  monkeypatch.setattr(fit_module, 'make_update', spying)
  params, (tokens, positions, segments) = inputs()
  rows = TokenBatch(tokens, positions, segments, np.ones(tokens.shape, np.float32))
  config = config_lib.check({'run': {'dir': str(tmp_path)}, 'metrics': {'tensorboard': False}})
  optim = OptimConfig(steps=2, warmup=1, batch=8)
  with Store(config) as store, Metrics(store.dir, tensorboard=False) as metrics:
    bench = Workbench(store, metrics, Progress(io.StringIO()), mesh_of(shape))
    data = batches(rows, batch=8, seed=0)
    fit_module.fit(bench, 'stage', 'lm', MODEL, params, sft_loss(MODEL), data, optim)
  large = 8 * 12 * 4  # bytes of one leaf of the batch; all weight matrices are larger, norms not
  assert len(seen) == 2
  assert repeated(seen, large) == []
  moments = [x for x in jax.tree.leaves(seen[-1][2].opt_state) if x.nbytes >= large]
  assert len(moments) == 2 * sum(x.nbytes >= large for x in jax.tree.leaves(params))
  whole = shard(params, replicated(mesh_of(shape)))
  assert len(repeated(whole, large)) == len(moments) // 2  # and it would have been noticed


def test_saved_parameters_are_read_over_the_mesh(tmp_path):
  params, _ = inputs()
  save_tree(tmp_path / 'prm', {'trunk': params, 'head': StepHead.init(MODEL.config)})
  mesh = mesh_of({'data': 2, 'fsdp': 2, 'tensor': 2})
  found = load_tree(tmp_path / 'prm', placed=functools.partial(param_shardings, mesh, MODEL))
  assert repeated(found['trunk'], 8 * 12 * 4) == []
  assert all(x.sharding == replicated(mesh) for x in jax.tree.leaves(found['head']))
  jax.tree.map(np.testing.assert_array_equal, found['trunk'], params)


def test_hosts_read_rows_of_their_own():
  """What `fit` does over several hosts, here with all devices on one."""
  mesh = mesh_of({'data': 2, 'fsdp': 2, 'tensor': 2})
  tree = {'index': np.arange(20), 'square': np.arange(20)[:, None] ** 2}
  data = batches(tree, batch=8, seed=1)
  assert own_rows(mesh, 8).tolist() == list(range(8))
  placed = shard_own(data.rows(3, own_rows(mesh, 8)), mesh, 8)
  jax.tree.map(np.testing.assert_array_equal, placed, data[3])
  assert placed['square'].sharding == batch_sharding(mesh)
  some = data.rows(3, np.array([5, 2]))
  np.testing.assert_array_equal(some['square'], data[3]['square'][[5, 2]])

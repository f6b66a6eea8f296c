"""Loss, gradients and updates of every train step, in float32, are the same over every mesh."""

import contextlib
import math

import jax
import numpy as np
import optax
import pytest
from learn_cases import CASES, MODEL, mean_loss_and_gradient

from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.parallel import batch_sharding, make_mesh, param_shardings, replicated, shard
from o1jax.plan.hlo import Program

MESHES = {
  '8': {'data': 8},
  '4x2': {'data': 4, 'fsdp': 2},
  '2x2x2': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'tokens': {'fsdp': 2, 'sequence': 2, 'tensor': 2},
}


def over(mesh, batch):
  """Rows over the mesh; what is not a row of the batch (four pairs) whole."""
  rows = batch_sharding(mesh)
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  return jax.tree.map(lambda x: shard(x, replicated(mesh) if len(x) % ways else rows), batch)


@pytest.mark.parametrize('name', ['sft', 'dpo', 'prm', 'ppo_critic'])
def test_loss_and_gradients_do_not_depend_on_the_mesh(name):
  loss_fn, make, build = CASES[name]
  (loss, _), gradient = mean_loss_and_gradient(loss_fn, make(), build())
  largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient))
  for label, shape in MESHES.items():
    mesh = make_mesh(shape)
    params = shard(make(), param_shardings(mesh, MODEL, make()))
    with jax.set_mesh(mesh) if 'sequence' in shape else contextlib.nullcontext():
      (value, _), found = mean_loss_and_gradient(loss_fn, params, over(mesh, build()))
    np.testing.assert_allclose(value, loss, rtol=1e-5, atol=1e-5, err_msg=label)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest, err_msg=label)


# Microbatches of a device's own rows over `data` alone; over 8 there is one row for two of them.
@pytest.mark.parametrize('shape', [{'data': 2}, {'data': 8}, MESHES['2x2x2']], ids=str)
@pytest.mark.parametrize('name', ['sft', 'dpo', 'prm', 'ppo_critic'])
def test_an_accumulated_update_does_not_depend_on_the_mesh(name, shape):
  loss_fn, make, build = CASES[name]
  update = make_update(loss_fn, optax.sgd(1.0), accumulate=2, donate=False)
  alone, told = update(init_state(make(), optax.sgd(1.0)), build())
  mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
  params = shard(make(), param_shardings(mesh, MODEL, make()))
  with jax.set_mesh(mesh):
    moved, measured = update(init_state(params, optax.sgd(1.0)), over(mesh, build()))
  for key, value in told.items():
    np.testing.assert_allclose(measured[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
  gradient = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), alone.params, make())
  largest = max(jax.tree.leaves(gradient))
  for a, b in zip(jax.tree.leaves(moved.params), jax.tree.leaves(alone.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def test_gradients_of_microbatches_are_summed_over_devices_once():
  loss_fn, make, build = CASES['sft']
  mesh, tx = make_mesh({'data': 2}, jax.devices()[:2]), optax.sgd(1.0)
  params = shard(make(), param_shardings(mesh, MODEL, make()))
  update = make_update(loss_fn, tx, accumulate=4, donate=False)
  with jax.set_mesh(mesh):
    lowered = update.lower(init_state(params, tx), over(mesh, build()))
  program = Program(lowered.compile().as_text())
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  summed = [c for c in program.collectives if c.kind == 'all-reduce']
  assert weights <= sum(c.payload * c.times for c in summed) <= 1.05 * weights

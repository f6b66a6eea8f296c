"""Loss and gradients of every train step, in float32, are the same over every mesh."""

import contextlib

import jax
import numpy as np
import pytest
from learn_cases import CASES, MODEL, mean_loss_and_gradient

from o1jax.parallel import batch_sharding, make_mesh, param_shardings, replicated, shard

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

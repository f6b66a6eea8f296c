"""Logits in pieces over a mesh: the loss and gradients of one device, each byte sent once."""

import functools

import jax
import numpy as np
import pytest

from o1jax.batch import TokenBatch
from o1jax.learn.objectives import sft_loss
from o1jax.models import Model, ModelConfig
from o1jax.parallel import batch_sharding, make_mesh, param_shardings, shard
from o1jax.plan.hlo import Program

ARCH = ModelConfig(64, 32, 1, 4, 2, 48, initializer_range=0.2, max_position=32)


@functools.cache
def inputs(model: Model):
  params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
  tokens = np.random.default_rng(0).integers(0, 64, (8, 13)).astype(np.int32)
  places = np.tile(np.arange(13, dtype=np.int32), (8, 1))
  mask = np.ones(tokens.shape, np.float32)
  return params, TokenBatch(tokens, places, np.ones_like(tokens), mask)


def stepped(model: Model, chunk: int):
  def loss(params, batch):
    total, count, _ = sft_loss(model, chunk=chunk)(params, batch)
    return total / count

  return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize('shape', [{'fsdp': 8}, {'data': 4, 'fsdp': 2}, {'fsdp': 4, 'tensor': 2}])
def test_pieces_over_a_mesh_give_what_one_device_gives(shape):
  model = Model(ARCH)
  params, batch = inputs(model)
  expected, gradients = stepped(model, 99)(params, batch)
  mesh = make_mesh(shape, jax.devices()[:8])
  with jax.set_mesh(mesh):
    placed = shard(params, param_shardings(mesh, model, params))
    value, found = stepped(model, 5)(placed, shard(batch, batch_sharding(mesh)))
  np.testing.assert_allclose(value, expected, atol=1e-6)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_more_pieces_send_no_more():
  model = Model(ARCH)
  params, batch = inputs(model)
  mesh = make_mesh({'fsdp': 8}, jax.devices()[:8])
  sent = []
  with jax.set_mesh(mesh):
    placed = shard(params, param_shardings(mesh, model, params))
    for chunk in (6, 1):  # 2 pieces, 12 pieces
      lowered = stepped(model, chunk).lower(placed, shard(batch, batch_sharding(mesh)))
      sent.append(Program(lowered.compile().as_text()).sent)
  assert sent[1] == sent[0]


def test_rows_that_do_not_divide_are_read_all_the_same():
  model = Model(ARCH)
  params, batch = inputs(model)
  three = jax.tree.map(lambda x: x[:3], batch)
  expected, _ = stepped(model, 99)(params, three)
  with jax.set_mesh(make_mesh({'fsdp': 8}, jax.devices()[:8])):
    value, _ = stepped(model, 5)(params, three)
  np.testing.assert_allclose(value, expected, atol=1e-6)

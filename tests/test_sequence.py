"""Tokens of a row over the mesh axis `sequence`: the same numbers, less memory on each device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.config import ConfigError, check
from o1jax.learn.logprobs import states, token_logprobs
from o1jax.models import Model, ModelConfig
from o1jax.parallel import batch_sharding, make_mesh, param_shardings, shard
from o1jax.parallel.sharding import row_faults
from o1jax.stages.setup import _checked

CONFIG = ModelConfig(40, 16, 2, 4, 2, 24, initializer_range=0.3, max_position=64)
MODELS = {
  'plain': Model(CONFIG),
  'window': Model(dataclasses.replace(CONFIG, sliding_window=5, sliding_layers=(False, True))),
  'scanned': Model(dataclasses.replace(CONFIG, num_layers=9), remat=True),
}


def rows(width):
  """Two documents and padding in each of four rows, parted elsewhere than the devices are."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 40, (4, width)).astype(np.int32)
  cuts = np.array([[5, width - 3], [width // 2 + 1, width], [1, width - 1], [width, width]])
  place = np.arange(width)
  segments = np.where(place >= cuts[:, 1:], 0, np.where(place >= cuts[:, :1], 2, 1))
  positions = np.where(segments == 2, place - cuts[:, :1], place)
  return tokens, positions.astype(np.int32), segments.astype(np.int32)


def over(mesh, model, width, chunk=None):
  """Log-probabilities and their gradient, compiled over a mesh."""
  params = jax.jit(model.init)(jax.random.key(1))
  batch = rows(width)

  def total(params, *batch):
    found = token_logprobs(model, params, *batch, chunk)
    return jnp.sum(found * jnp.cos(jnp.arange(width))[None]), found

  with jax.set_mesh(mesh):
    params = shard(params, param_shardings(mesh, model, params))
    batch = shard(batch, batch_sharding(mesh))
    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params, *batch)
  return jax.device_get((found, gradient))


@pytest.mark.parametrize(('name', 'chunk'), [('plain', None), ('window', 3), ('scanned', 3)])
def test_logprobs_and_gradients_are_those_of_one_device(name, chunk):
  model, one = MODELS[name], make_mesh({}, jax.devices()[:1])
  found, gradient = over(make_mesh({'data': 2, 'sequence': 4}), model, 16, chunk)
  expected, expected_gradient = over(one, model, 16)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_gradient))
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
    np.testing.assert_allclose(a / largest, b / largest, atol=1e-5)


def test_rows_that_do_not_divide_are_read_whole():
  mesh, one = make_mesh({'data': 2, 'sequence': 4}), make_mesh({}, jax.devices()[:1])
  np.testing.assert_allclose(
    over(mesh, MODELS['plain'], 15)[0], over(one, MODELS['plain'], 15)[0], atol=1e-5
  )
  assert row_faults(mesh, 15) == ['rows of 15 tokens do not divide over sequence=4']
  assert row_faults(mesh, 16) == []


def test_a_device_holds_its_own_tokens():
  """States and scores of a long row are a quarter on each of four devices."""
  model, width = MODELS['plain'], 1024

  def peak(shape):
    mesh = make_mesh(shape, jax.devices()[: 4 if shape else 1])
    params = jax.tree.map(
      lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
      model.shapes(),
      param_shardings(mesh, model, model.shapes()),
    )
    batch = [jax.ShapeDtypeStruct((1, width), jnp.int32, sharding=batch_sharding(mesh))] * 3
    with jax.set_mesh(mesh):
      compiled = jax.jit(lambda p, *batch: states(model, p, *batch)).lower(params, *batch).compile()
    spec = compiled.output_shardings.spec
    return compiled.memory_analysis().temp_size_in_bytes, spec

  whole, _ = peak({})
  own, spec = peak({'sequence': 4})
  scores = 4 * width * width * 4  # bytes, of four heads
  assert whole > scores  # a device alone leaves out what no query sees
  assert own < 0.3 * 2 * scores  # scores and weights
  assert spec[1] == 'sequence'


def test_a_kernel_that_cannot_split_a_row_is_refused():
  model = dataclasses.replace(MODELS['plain'], attention='splash')
  with pytest.raises(ValueError, match=r'attention=splash: rows are split over mesh.sequence=4'):
    over(make_mesh({'data': 2, 'sequence': 4}), model, 16)


def test_a_run_says_what_does_not_divide_before_it_starts():
  config = check({'mesh': {'data': 2, 'sequence': 4}, 'data': {'max_path_tokens': 65}})
  with pytest.raises(ConfigError, match='tokens do not divide over sequence=4') as error:
    _checked(config)
  assert 'data.max_prompt_tokens + max_path_tokens: rows of' in str(error.value)

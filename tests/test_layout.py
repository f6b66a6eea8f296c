"""Weights in a layout of their own while they sample: which, the same tokens, none gathered."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mesh_sampling import MODEL, PROMPTS, SAMPLER, weights

from o1jax.config import Config, ConfigError
from o1jax.models import Model, ModelConfig
from o1jax.parallel import make_mesh, param_shardings, shard
from o1jax.sampling import decode
from o1jax.sampling.cache import prefill
from o1jax.sampling.draw import SAMPLE
from o1jax.stages import layout, setup
from o1jax.stages.context import Run

FSDP = {'data': 2, 'fsdp': 4}
# Cut out for one property each: 12 query heads divide over 4, 2 key heads over 2.
SHAPE = Model(ModelConfig(64, 48, 2, 12, 2, 96))
WHOLE = 4 * sum(x.size for x in jax.tree.leaves(SHAPE.shapes()))


def config_of(**sampling):
  return Config.model_validate(
    {'mesh': sampling, 'run': {'rounds': 1}, 'search': {'rows': 8}, 'eval': {'rows': 8}}
  )


def ways(mesh, memory, **sampling):
  found = layout.sampling_mesh(config_of(**sampling), SHAPE, mesh, SHAPE.shapes(), memory)
  return None if found is None else dict(found.shape)


def test_whole_where_it_fits_else_the_fewest_ways_else_as_trained():
  mesh = make_mesh(FSDP)
  need = lambda n: layout.device_bytes(config_of(), SHAPE, mesh, n, SHAPE.shapes()) / 0.85  # noqa: E731
  assert ways(mesh, need(1) + 2) == {'data': 8, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
  assert ways(mesh, need(1) - 2) == {'data': 4, 'fsdp': 1, 'sequence': 1, 'tensor': 2}
  assert need(4) > need(2)  # two key heads do not split four ways: their cache is repeated
  assert ways(mesh, need(2) - 2) is None
  assert ways(mesh, 0, sampling=4) == {'data': 2, 'fsdp': 1, 'sequence': 1, 'tensor': 4}
  assert ways(mesh, 1e12, sampling='train') is None
  assert ways(make_mesh({'data': 4, 'tensor': 2}), 1e12) is None  # nothing to gather there
  # Five sets of parameters over fsdp=4, one whole, the keys and values of 8 rows over 8 devices.
  columns = config_of().data.max_prompt_tokens + config_of().data.max_path_tokens
  cache = 2 * SHAPE.config.num_layers * 2 * SHAPE.config.head_dim * 4 * columns
  assert layout.device_bytes(config_of(), SHAPE, mesh, 1, SHAPE.shapes()) == (
    5 * WHOLE // 4 + WHOLE + cache
  )


def test_numbers_that_do_not_divide_are_refused_before_the_start(tmp_path):
  given = {'mesh': FSDP | {'sampling': 3}, 'run': {'dir': str(tmp_path / 'run')}}
  with pytest.raises(ConfigError, match=r'mesh\.sampling=3 does not divide 8 devices; use auto'):
    setup._checked(Config.model_validate(given))
  faults = layout.sampling_faults(config_of(sampling=8), SHAPE, make_mesh(FSDP))
  assert faults == ['mesh.sampling: heads=12 does not divide over tensor=8; use auto']


def test_paths_that_a_search_has_no_positions_for_are_refused_before_the_start():
  short = Model(dataclasses.replace(SHAPE.config, max_position=96 + 2 * 96))  # config's defaults
  assert layout.sampling_faults(config_of(), short, make_mesh(FSDP)) == []
  short = Model(dataclasses.replace(SHAPE.config, max_position=96 + 2 * 96 - 1))
  (fault,) = layout.sampling_faults(config_of(), short, make_mesh(FSDP))
  assert 'twice data.max_path_tokens=96 are 288 tokens' in fault and 'max_position=287' in fault


@pytest.mark.parametrize('sampling', [1, 2])
def test_the_same_tokens_as_in_the_layout_of_training(sampling):
  mesh, params = make_mesh(FSDP), weights()['trunk']
  trained = shard(params, param_shardings(mesh, MODEL, params))
  with jax.set_mesh(mesh):
    want = SAMPLER(trained, PROMPTS, seed=3, samples=3)
  over = layout.sampling_mesh(config_of(sampling=sampling), MODEL, mesh, params, 0)
  with jax.set_mesh(over):
    laid_out = shard(trained, param_shardings(over, MODEL, trained))
    found = SAMPLER(laid_out, PROMPTS, seed=3, samples=3)
  np.testing.assert_array_equal(found.tokens, want.tokens)
  np.testing.assert_allclose(found.logprobs, want.logprobs, rtol=1e-4, atol=1e-4)


def test_a_stage_samples_within_its_mesh_and_leaves_it():
  mesh, params = make_mesh(FSDP), weights()
  trained = shard(params, param_shardings(mesh, MODEL, params))
  config = config_of(sampling=2)
  run = types.SimpleNamespace(config=config, model=MODEL, bench=types.SimpleNamespace(mesh=mesh))
  with jax.set_mesh(mesh):
    with Run.sampling(run, trained['trunk'], trained) as (policy, prm):
      within = jax.sharding.get_mesh()
      assert dict(within.shape) == {'data': 4, 'fsdp': 1, 'sequence': 1, 'tensor': 2}
      for tree in (policy, prm):
        assert {x.sharding.mesh for x in jax.tree.leaves(tree)} == {within}
    assert jax.sharding.get_mesh() == mesh
  up = policy['layers']['up']
  assert up.sharding.shard_shape(up.shape)[-2:] == (16, 16)  # whole but for the half of its width
  jax.tree.map(np.testing.assert_array_equal, prm, params)
  run.config = config_of(sampling='train')
  with Run.sampling(run, trained) as (same,):
    assert same is trained


def gathered(mesh, model):
  """Numbers that each all-gather of the compiled decoding loop makes whole."""
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    model.shapes(),
    param_shardings(mesh, model, model.shapes()),
  )
  with jax.set_mesh(mesh):
    ids = jax.ShapeDtypeStruct((16, 8), jnp.int32)
    read = lambda p, t, n: prefill(model, p, t, n, columns=32)  # noqa: E731
    state = jax.eval_shape(read, model.shapes(), ids, jax.ShapeDtypeStruct((16,), jnp.int32))
    rows = lambda state: decode.begin(  # noqa: E731
      state, jax.random.split(jax.random.key(0), 16), jnp.ones(16, bool), max_new=8
    )
    going = jax.eval_shape(rows, state)
    lowered = decode.run.lower(model, params, going, stop_ids=(1,), how=SAMPLE)
    text = lowered.compile().as_text()
  found = re.findall(r'= \(?\w+\[([\d,]*)\]\S* all-gather(?:-start)?\(', text)
  return [int(np.prod([int(n) for n in shape.split(',') if n])) for shape in found]


def test_decoding_gathers_no_weights():
  mesh, model = make_mesh(FSDP), Model(ModelConfig(512, 256, 1, 8, 4, 512))
  kernel = 256 * 256  # the smallest of a layer that is not of key heads
  assert max(gathered(mesh, model)) >= kernel
  for sampling in (1, 4):
    over = layout.sampling_mesh(config_of(sampling=sampling), model, mesh, model.shapes(), 0)
    assert max(gathered(over, model), default=0) < kernel // 4

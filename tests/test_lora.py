"""Adapters: they begin as nothing, add what a merge adds, train alone, and share one base."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learn_cases import assert_trees_equal

from o1jax.batch import TokenBatch
from o1jax.learn.objectives import sft_loss
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.models import Model, ModelConfig, StepHead, hf, lora, nf4, peft_folder
from o1jax.parallel import make_mesh, param_shardings, shard
from o1jax.run import checkpoints
from o1jax.stages.fit import over_frozen

CONFIG = ModelConfig(
  61, 32, 2, 4, 2, 64, initializer_range=0.2, max_position=64, qkv_bias=True, dtype='float32'
)
MODEL = Model(dataclasses.replace(CONFIG, architecture='Qwen2ForCausalLM', tie_embeddings=False))
SCANNED = Model(dataclasses.replace(CONFIG, num_layers=9, architecture='Qwen2ForCausalLM'))
PAPER_TCG = lora.Spec(1, 2.0)
PAPER_PRM = lora.Spec(8, 32.0, ('q_proj', 'v_proj'))
hidden_of = jax.jit(Model.hidden, static_argnums=0)
extend = jax.jit(Model.extend, static_argnums=0)


def inputs(rows=3, length=12, seed=0):
  tokens = np.random.default_rng(seed).integers(0, 61, (rows, length)).astype(np.int32)
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return tokens, positions, np.ones_like(tokens)


@functools.cache
def base(model=MODEL):
  return model.init(jax.random.key(0))


def moved(params, seed=1):
  """What is trained of a tree, drawn anew and far from zero."""
  trained, frozen = lora.partition(params)
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype)  # noqa: E731
  return lora.combine(jax.tree.map(draw, trained), frozen)


def policy(model=MODEL, spec=PAPER_TCG, quantised=False):
  params = lora.quantised(base(model)) if quantised else base(model)
  return moved(lora.adapt(params, spec, jax.random.key(1)))


def prm_trunk(model=MODEL, quantised=False):
  """An adapter of the PRM's above the policy's."""
  below = policy(model, lora.Spec(2, 3.0, ('q_proj', 'down_proj')), quantised)
  return moved(lora.adapt(below, PAPER_PRM, jax.random.key(2)), seed=2)


def test_a_new_adapter_changes_nothing():
  params = lora.adapt(base(), PAPER_TCG, jax.random.key(1))
  assert [k for k, v in params['layers'].items() if isinstance(v, lora.Adapted)] == [
    *('down', 'gate', 'k', 'o', 'q', 'up', 'v')
  ]
  np.testing.assert_array_equal(
    hidden_of(MODEL, params, *inputs()), hidden_of(MODEL, base(), *inputs())
  )


@pytest.mark.parametrize(
  'model, quantised', [(MODEL, False), (SCANNED, True)], ids=['unrolled', 'scanned']
)
def test_an_adapted_model_is_the_merged_one(model, quantised):
  params = prm_trunk(model, quantised)
  whole = lora.merged(params)
  assert jax.tree.map(jnp.shape, whole) == jax.tree.map(lambda x: x.shape, model.shapes())
  plain, got = (hidden_of(model, p, *inputs()) for p in (whole, params))
  np.testing.assert_allclose(got, plain, atol=2e-4)
  assert np.abs(got - hidden_of(model, base(model), *inputs())).max() > 0.1


def test_decoding_with_a_cache_is_the_full_pass():
  params, (tokens, positions, _) = prm_trunk(quantised=True), inputs()
  cache, found = MODEL.empty_cache(3, 12), []
  valid = np.zeros((3, 12), bool)
  for start, stop in ((0, 11), (11, 12)):
    valid[:, :stop] = True
    part = (tokens[:, start:stop], positions[:, start:stop], start, valid)
    hidden, cache = extend(MODEL, params, cache, *part)
    found.append(hidden)
  expected = hidden_of(MODEL, params, *inputs())
  np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-4)


def test_only_the_factors_added_last_are_trained():
  params = {'trunk': prm_trunk(quantised=True), 'head': StepHead.init(MODEL.config)}
  trained, frozen = lora.partition(params)
  assert_trees_equal(lora.combine(trained, frozen), params)
  factors = lora.factor_count(MODEL.shapes(), PAPER_PRM)
  count = sum(x.size for x in jax.tree.leaves(trained))
  assert count == factors + sum(x.size for x in jax.tree.leaves(params['head']))
  # A model without adapters is trained whole, and so it is stored whole.
  assert_trees_equal(lora.partition(base())[0], base())
  assert_trees_equal(lora.detached(base()), base())


def test_training_moves_the_adapter_and_nothing_else():
  params = lora.adapt(lora.quantised(base()), PAPER_TCG, jax.random.key(1))
  trained, frozen = lora.partition(params)
  before = jax.tree.map(np.asarray, frozen)
  tokens, positions, segments = inputs()
  batch = TokenBatch(tokens, positions, segments, np.ones(tokens.shape, np.float32))
  state = init_state(jax.tree.map(jnp.copy, trained), optax.adam(3e-2))
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  assert moments == 2 * sum(x.size for x in jax.tree.leaves(trained)) + 1
  update = make_update(over_frozen(sft_loss(MODEL)), optax.adam(3e-2), accumulate=3)
  losses = []
  for _ in range(30):
    state, metrics = update(state, batch, frozen)
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] - 0.3
  assert_trees_equal(frozen, before)


def test_gradients_are_those_of_the_merged_model():
  """By the chain rule: dA and dB from the dense model's gradient of its kernel."""
  params = policy()
  trained, frozen = lora.partition(params)
  weight = jnp.asarray(np.random.default_rng(3).normal(0, 1, (3, 12, 32)), jnp.float32)
  loss = lambda p: jnp.sum(weight * MODEL.hidden(p, *inputs()))  # noqa: E731
  got = jax.jit(jax.grad(lambda t: loss(lora.combine(t, frozen))))(trained)['layers']
  dense = jax.jit(jax.grad(loss))(lora.merged(params))['layers']
  for name, (_, axes) in lora.PROJECTIONS.items():
    kernel = params['layers'][name]
    a, b = (x.reshape(2, *s) for x, s in ((kernel.a, (-1, 1)), (kernel.b, (1, -1))))
    dw = 2.0 * dense[name].reshape(2, a.shape[1], b.shape[2])
    np.testing.assert_allclose(got[name].a.reshape(a.shape), dw @ b.mT, atol=2e-3, rtol=2e-3)
    np.testing.assert_allclose(got[name].b.reshape(b.shape), a.mT @ dw, atol=2e-3, rtol=2e-3)
    assert axes == kernel.a.ndim - 2


def test_a_checkpoint_holds_the_factors_and_every_role_shares_the_base(tmp_path):
  shared = lora.quantised(base())
  below = moved(lora.adapt(shared, lora.Spec(2, 3.0, ('q_proj', 'down_proj')), jax.random.key(1)))
  trunk = moved(lora.adapt(below, PAPER_PRM, jax.random.key(2)), seed=2)
  params = {'trunk': trunk, 'head': StepHead.init(MODEL.config)}
  saved = lora.detached(params)
  assert set(saved['trunk']) == {'layers'} and set(saved['trunk']['layers']) == {'q', 'v', 'down'}
  checkpoints.save_tree(tmp_path / 'prm', saved)
  again = lora.attached(shared, checkpoints.load_tree(tmp_path / 'prm'))
  assert_trees_equal(again, params)
  held = {id(x) for x in jax.tree.leaves(shared)}
  for tree in (below, again['trunk'], lora.adapt(shared, PAPER_TCG, jax.random.key(4))):
    _, frozen = lora.partition(tree)
    assert held <= {id(x) for x in jax.tree.leaves(frozen)}


def test_factors_of_another_model_are_refused():
  saved = lora.detached(policy())
  with pytest.raises(ValueError, match=r'factors \(2, 64, 1\).*are not of a kernel \(9, 64, 32\)'):
    lora.attached(base(SCANNED), {'layers': {'down': saved['layers']['down']}})


def test_a_blend_is_a_share_of_the_weights():
  start = {
    'trunk': lora.adapt(policy(), PAPER_PRM, jax.random.key(2)),
    'head': StepHead.init(MODEL.config),
  }
  end = moved(start)
  got = lora.merged(lora.blended(start, end, 0.35))
  a, b = lora.merged(start), lora.merged(end)
  expected = jax.tree.map(lambda x, y: x + 0.35 * (y - x), a, b)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, expected)


@pytest.mark.parametrize('quantised', [False, True])
def test_over_a_mesh_it_computes_the_same(quantised):
  params = prm_trunk(quantised=quantised)
  mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  placed = shard(params, param_shardings(mesh, MODEL, params))
  q = placed['layers']['q']
  assert q.a.sharding.spec[1] == 'fsdp' and q.base.b.sharding.spec[2] == 'tensor'
  if quantised:
    assert not q.base.base.codes.sharding.is_fully_replicated
  np.testing.assert_allclose(
    hidden_of(MODEL, placed, *inputs(4)), hidden_of(MODEL, params, *inputs(4)), atol=1e-4
  )


def test_four_bits_are_the_nearest_of_sixteen_values():
  kernel = jax.random.normal(jax.random.key(0), (3, 128, 4, 6))
  packed = nf4.quantise(kernel, 1)
  assert packed.codes.nbytes == kernel.size // 2 and packed.scales.shape == (3, 2, 4, 6)
  back = np.asarray(nf4.dequantise(packed, 1))
  blocks = np.asarray(kernel).reshape(3, 2, 64, 4, 6)
  scales = np.abs(blocks).max(2, keepdims=True)
  nearest = nf4.VALUES[np.abs(blocks[..., None] / scales[..., None] - nf4.VALUES).argmin(-1)]
  np.testing.assert_allclose(back, (nearest * scales).reshape(kernel.shape), rtol=1e-6)
  np.testing.assert_array_equal(nf4.dequantise(nf4.quantise(jnp.zeros((1, 8, 2)), 1), 1), 0.0)
  with pytest.raises(ValueError, match='5 inputs cannot be packed'):
    nf4.quantise(jnp.ones((1, 5, 2)), 1)


def test_four_bits_are_those_of_qwix():
  qwix = pytest.importorskip('qwix')
  kernel = jax.random.normal(jax.random.key(1), (128, 6))
  theirs = qwix.quantize(kernel, 'nf4', channelwise_axes=(1,), tiled_axes={0: 64})
  ours = nf4.quantise(kernel, 1, lead=0)
  np.testing.assert_array_equal(theirs.qvalue.astype(jnp.uint8)[::2], ours.codes & 15)
  np.testing.assert_array_equal(theirs.qvalue.astype(jnp.uint8)[1::2], ours.codes >> 4)
  np.testing.assert_allclose(qwix.dequantize(theirs), nf4.dequantise(ours), rtol=1e-6)


@pytest.mark.parametrize('trained', [policy, prm_trunk])
def test_peft_opens_the_folder_with_the_same_logits(trained, tmp_path):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  import transformers

  params = trained()
  hf.save(tmp_path / 'base', MODEL, base())
  peft_folder.save(tmp_path / 'adapter', params, tmp_path / 'base')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base').eval()
  tokens, positions, segments = inputs()
  ids = torch.from_numpy(tokens).long()
  with torch.no_grad():
    plain = theirs(input_ids=ids).logits.numpy()
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / 'adapter').eval()
    expected = adapted(input_ids=ids).logits.numpy()
  got = MODEL.logits(params, hidden_of(MODEL, params, tokens, positions, segments))
  np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))
  assert np.abs(expected - plain).max() > 0.1


def test_a_model_without_adapters_makes_no_such_folder(tmp_path):
  with pytest.raises(ValueError, match='has no adapters'):
    peft_folder.save(tmp_path / 'adapter', base(), tmp_path)
  assert not (tmp_path / 'adapter').exists()

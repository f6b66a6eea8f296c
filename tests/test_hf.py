"""Hub folders: parity with transformers, bit-exact round trips, and every kind of bad folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from o1jax.models import Model, ModelConfig, RopeScaling, hf, weights
from o1jax.parallel import make_mesh, param_shardings

BASE = ModelConfig(61, 32, 2, 4, 2, 48, initializer_range=0.2, max_position=64)
QWEN2 = dataclasses.replace(BASE, architecture='Qwen2ForCausalLM', qkv_bias=True)
CONFIGS = {
  'llama': dataclasses.replace(BASE, bos_token_id=1, eos_token_id=(2, 3)),
  'llama_bias': dataclasses.replace(BASE, qkv_bias=True, o_bias=True, tie_embeddings=False),
  'llama3': dataclasses.replace(
    BASE, rope_scaling=RopeScaling('llama3', 8.0, 1.0, 4.0, 16), num_kv_heads=1
  ),
  'deepseek': dataclasses.replace(
    BASE, rope_scaling=RopeScaling('linear', 4.0), rope_theta=1e5, num_kv_heads=4
  ),
  'qwen2': QWEN2,
  'qwen2_sliding': dataclasses.replace(
    QWEN2, sliding_window=4, sliding_layers=(False, True), tie_embeddings=False
  ),
  'qwen3': dataclasses.replace(
    BASE, architecture='Qwen3ForCausalLM', qk_norm=True, head_dim=12, tie_embeddings=False
  ),
  'mistral': dataclasses.replace(BASE, architecture='MistralForCausalLM', sliding_window=4),
}


def make(config, seed=0):
  model, rng = Model(config), np.random.default_rng(seed)

  def draw(shape):
    return jnp.asarray(rng.normal(0.5, 0.3, shape.shape), shape.dtype)

  return model, jax.tree.map(draw, model.shapes())


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize('name', CONFIGS)
def test_round_trip_is_bit_exact(name, tmp_path):
  model, params = make(CONFIGS[name])
  hf.save(tmp_path, model, params)
  assert hf.load(tmp_path)[0] == model
  assert_equal(hf.load(tmp_path)[1], params)


def test_bfloat16_round_trip_and_conversion(tmp_path):
  model, params = make(dataclasses.replace(BASE, dtype='bfloat16'))
  hf.save(tmp_path, model, params)
  assert_equal(hf.load(tmp_path)[1], params)
  wide_model, wide = hf.load(tmp_path, dtype='float32')
  assert wide_model.config.dtype == 'float32'
  assert_equal(wide, jax.tree.map(lambda a: a.astype(jnp.float32), params))


def split_in_two(folder):
  """The same checkpoint in the sharded form: two files and their index."""
  tensors = load_file(folder / hf.WEIGHTS)
  (folder / hf.WEIGHTS).unlink()
  names, weight_map = sorted(tensors), {}
  for i, part in enumerate((names[::2], names[1::2])):
    file = f'model-{i + 1:05d}-of-00002.safetensors'
    save_file({name: tensors[name] for name in part}, folder / file)
    weight_map |= dict.fromkeys(part, file)
  (folder / hf.INDEX).write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))


def test_sharded_files_onto_a_mesh(tmp_path):
  """Each device gets its own slices, of every tensor, from either form of the checkpoint."""
  model, params = make(CONFIGS['llama_bias'])
  hf.save(tmp_path, model, params)
  split_in_two(tmp_path)
  mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  place = lambda model: param_shardings(mesh, model, model.shapes())  # noqa: E731
  _, placed = hf.load(tmp_path, place)
  assert_equal(placed, params)
  assert placed['layers']['o'].sharding == place(model)['layers']['o']
  assert placed['layers']['o'].addressable_shards[0].data.shape == (2, 2, 8, 16)


@pytest.mark.parametrize('name', ['llama_bias', 'qwen3'])
def test_layers_sent_one_by_one_are_the_same(name, tmp_path, monkeypatch):
  """The way to devices that do not share the host's memory, taken on CPU."""
  monkeypatch.setattr(hf, '_is_remote', lambda placed: True)
  model, params = make(CONFIGS[name])
  hf.save(tmp_path, model, params)
  assert_equal(hf.load(tmp_path)[1], params)
  mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  place = lambda model: param_shardings(mesh, model, model.shapes())  # noqa: E731
  _, placed = hf.load(tmp_path, place)
  assert_equal(placed, params)
  assert placed['layers']['q'].sharding == place(model)['layers']['q']


def test_a_device_reads_its_slice_and_no_more(tmp_path, monkeypatch):
  model, params = make(CONFIGS['llama_bias'])
  hf.save(tmp_path, model, params)
  mesh, read = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 4}), []

  def record(self, name, region, out):
    read.append((name, tuple(part.stop - part.start for part in region)))
    original(self, name, region, out)

  original = hf.Weights.read
  monkeypatch.setattr(hf.Weights, 'read', record)
  hf.load(tmp_path, lambda model: param_shardings(mesh, model, model.shapes()))
  shapes = {shape for name, shape in read if name == 'model.layers.1.self_attn.q_proj.weight'}
  assert shapes == {(8, 16)}  # of [32, 32]: heads over tensor, width over fsdp


def test_blocks_of_a_large_tensor_fit_together(tmp_path, monkeypatch):
  monkeypatch.setattr(weights, '_BLOCK_BYTES', 300)  # 2 rows of 32 float32
  model, params = make(CONFIGS['llama_bias'])
  hf.save(tmp_path, model, params)
  assert_equal(hf.load(tmp_path)[1], params)


def test_old_and_new_spellings_read_the_same():
  new = CONFIGS['llama3'].to_hub()
  new.pop('rope_theta'), new.pop('rope_scaling'), new.pop('torch_dtype')
  old = CONFIGS['llama3'].to_hub()
  old.pop('rope_parameters'), old.pop('dtype')
  older = json.loads(json.dumps(old))
  older['rope_scaling']['type'] = older['rope_scaling'].pop('rope_type')
  assert ModelConfig.from_hub(new) == ModelConfig.from_hub(old) == CONFIGS['llama3']
  assert ModelConfig.from_hub(older) == CONFIGS['llama3']


def test_family_defaults():
  hub = {'architectures': ['Qwen2ForCausalLM'], 'vocab_size': 9, 'hidden_size': 64}
  hub |= {'num_hidden_layers': 3, 'num_attention_heads': 32, 'intermediate_size': 8}
  config = ModelConfig.from_hub(hub)
  assert config.qkv_bias and not config.o_bias and not config.tie_embeddings
  assert config.num_kv_heads == 32 and config.head_dim == 2 and config.rope_theta == 10000.0
  assert config.sliding_window is None
  windowed = hub | {'use_sliding_window': True, 'sliding_window': 7, 'max_window_layers': 2}
  assert ModelConfig.from_hub(windowed).windows == (None, None, 7)
  # A window that is not used, as published Qwen2 configs have it, is no window.
  assert ModelConfig.from_hub(windowed | {'use_sliding_window': False}) == config


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'architectures': ['GPT2LMHeadModel']}, "architecture 'GPT2LMHeadModel'.*LlamaForCausalLM"),
    ({'architectures': None}, 'architecture None'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu' is not implemented"),
    ({'mlp_bias': True, 'vocab_size': None}, 'vocab_size is missing; mlp_bias=True'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}, "rope type 'yarn'"),
    ({'rope_scaling': {'rope_type': 'linear', 'rope_theta': 1e4}}, "'linear' needs a factor"),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'num_local_experts': 8}, 'num_local_experts=8'),
    ({'sliding_window': 5}, 'sliding_window=5 is not implemented for llama'),
    ({'dtype': 'int8'}, "dtype='int8'"),
  ],
)
def test_config_that_would_change_the_numbers_is_an_error(change, message, tmp_path):
  (tmp_path / hf.CONFIG).write_text(json.dumps(BASE.to_hub() | change))
  with pytest.raises(ValueError, match=message):
    hf.read_model(tmp_path)


def test_every_wrong_tensor_is_named_at_once(tmp_path):
  hf.save(tmp_path, *make(BASE))
  tensors = load_file(tmp_path / hf.WEIGHTS)
  tensors.pop('model.norm.weight')
  tensors['model.layers.0.mlp.up_proj.weight'] = np.zeros((48, 31), np.float32)
  tensors['model.layers.1.self_attn.q_proj.bias'] = np.zeros((32,), np.float32)
  tensors['model.layers.0.mlp.down_proj.weight'] = np.zeros((32, 48), np.int8)
  tensors['lm_head.weight'] = np.zeros((61, 32), np.float32)  # tied: not read, not a fault
  save_file(tensors, tmp_path / hf.WEIGHTS)
  with pytest.raises(ValueError) as error:
    hf.load(tmp_path)
  for part in (
    'missing model.norm.weight [32]',
    'model.layers.0.mlp.up_proj.weight is [48, 31], the config asks for [48, 32]',
    'unexpected model.layers.1.self_attn.q_proj.bias [32]',
    'model.layers.0.mlp.down_proj.weight is I8, none of F64, F32, F16, BF16',
  ):
    assert part in str(error.value)
  assert 'lm_head' not in str(error.value)


def test_incomplete_folders(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'nowhere/config\.json does not exist'):
    hf.load(tmp_path / 'nowhere')
  hf.save(tmp_path, *make(BASE))
  (tmp_path / hf.WEIGHTS).write_bytes(b'\x00' * 20)
  with pytest.raises(ValueError, match='not a readable safetensors file'):
    hf.load(tmp_path)
  (tmp_path / hf.WEIGHTS).unlink()
  with pytest.raises(FileNotFoundError, match=r'has no weights: neither model\.safetensors'):
    hf.load(tmp_path)
  (tmp_path / hf.INDEX).write_text(json.dumps({'weight_map': {'a': 'gone.safetensors'}}))
  with pytest.raises(FileNotFoundError, match=r'lacks gone\.safetensors'):
    hf.load(tmp_path)
  (tmp_path / hf.INDEX).write_text('{"metadata": {}}')
  with pytest.raises(ValueError, match=r'index\.json is no index of safetensors files'):
    hf.load(tmp_path)
  (tmp_path / hf.CONFIG).write_text('{')
  with pytest.raises(ValueError, match='is not JSON'):
    hf.load(tmp_path)


def test_save_copies_the_tokenizer_and_generation_config(tmp_path):
  source, target = tmp_path / 'a', tmp_path / 'b'
  source.mkdir()
  (source / 'tokenizer.model').write_bytes(b'pieces')
  (source / 'notes.txt').write_text('no tokenizer file')
  hf.save(target, *make(CONFIGS['llama']), source, {'temperature': 0.7})
  assert (target / 'tokenizer.model').read_bytes() == b'pieces'
  assert not (target / 'notes.txt').exists()
  generation = json.loads((target / hf.GENERATION).read_text())
  assert generation == {'bos_token_id': 1, 'eos_token_id': [2, 3], 'temperature': 0.7}
  with pytest.raises(FileNotFoundError, match='has no tokenizer files'):
    hf.save(target, *make(BASE), tmp_path)


def test_switches_the_architecture_cannot_spell_are_not_saved(tmp_path):
  with pytest.raises(ValueError, match='LlamaForCausalLM cannot express'):
    hf.save(tmp_path / 'x', *make(dataclasses.replace(BASE, qk_norm=True)))
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('name', CONFIGS)
def test_parity_with_transformers(name, tmp_path):
  """Ours -> transformers -> its own spelling -> ours: the same logits on ragged rows."""
  torch = pytest.importorskip('torch')
  import transformers

  model, params = make(CONFIGS[name])
  hf.save(tmp_path / 'ours', model, params)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours').eval()
  theirs.save_pretrained(tmp_path / 'theirs')
  model, params = hf.load(tmp_path / 'theirs')
  tokens = np.random.default_rng(1).integers(4, 61, (3, 14)).astype(np.int32)
  segments = (np.arange(14)[None] < np.array([14, 9, 5])[:, None]).astype(np.int32)
  positions = np.tile(np.arange(14, dtype=np.int32), (3, 1))
  run = jax.jit(lambda p, *batch: model.logits(p, model.hidden(p, *batch)))
  logits = run(params, tokens, positions, segments)
  with torch.no_grad():
    expected = theirs(
      input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(segments).long()
    ).logits.numpy()
  seen = segments > 0
  scale = np.abs(expected[seen]).max()
  np.testing.assert_allclose(np.asarray(logits)[seen], expected[seen], atol=1e-4 * max(1, scale))

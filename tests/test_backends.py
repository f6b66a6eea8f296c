"""Every attention backend is the plain one: padding, segments, window, grouped heads, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.models import Model, ModelConfig, attention, backends
from o1jax.parallel import make_mesh
from o1jax.parallel.platform import planned_for

CONFIG = ModelConfig(61, 32, 1, 4, 2, 48, head_dim=16, initializer_range=0.2, max_position=256)
WINDOWED = dataclasses.replace(CONFIG, sliding_window=5)
MIXED = dataclasses.replace(
  CONFIG,
  architecture='Qwen2ForCausalLM',
  qkv_bias=True,
  num_layers=9,
  sliding_window=5,
  sliding_layers=(True, False) * 4 + (True,),
)


def rows(columns):
  """Packed rows: documents of several lengths, then padding; positions restart."""
  segments = np.zeros((2, columns), np.int32)
  positions = np.zeros_like(segments)
  for row, lengths in enumerate(((4, columns - 7), (columns // 2, 1, 3))):
    start = 0
    for number, length in enumerate(lengths, start=1):
      segments[row, start : start + length] = number
      positions[row, start : start + length] = np.arange(length)
      start += length
  return jnp.asarray(positions), jnp.asarray(segments)


def heads(config, columns, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
  shape = lambda n: (2, columns, n, config.head_dim)  # noqa: E731
  return [2 * jax.random.normal(k, shape(n), dtype) for k, n in zip(keys, counts, strict=True)]


def compared(fn, config, columns, dtype='float32'):
  """Output and gradients of `fn(q, k, v, mask, segments, positions)` beside the plain ones."""
  positions, segments = rows(columns)
  real = (segments > 0)[:, :, None, None]
  masks = attention.full_masks(config, positions, segments)
  mask = masks.layer(config.sliding_window)
  weight = jax.random.normal(jax.random.key(1), (2, columns, config.num_heads, config.head_dim))

  def loss(attend, q, k, v):
    out = jnp.where(real, attend(q, k, v).astype(jnp.float32), 0.0)
    return jnp.sum(weight * out), out

  args = heads(config, columns, dtype)
  found = []
  for attend in (
    lambda q, k, v: attention.attend(q, k, v, mask),
    lambda q, k, v: fn(q, k, v, mask, segments, positions),
  ):
    run = jax.jit(jax.value_and_grad(lambda *x, a=attend: loss(a, *x), (0, 1, 2), has_aux=True))
    (_, out), gradients = run(*args)
    found.append((out, *gradients))
  return found


def assert_close(plain, found, dtype):
  """To 1e-4 in float32, in bfloat16 to 2 % of the largest entry; nothing is NaN."""
  for expected, got in zip(plain, found, strict=True):
    expected, got = np.float32(expected), np.float32(got)
    tolerance = 1e-4 if dtype == 'float32' else 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=tolerance)


@pytest.mark.parametrize(
  'config, kv_heads', [(CONFIG, 1), (WINDOWED, 2), (CONFIG, 4)], ids=['mqa', 'gqa_window', 'mha']
)
def test_splash_is_the_plain_one(config, kv_heads):
  """Interpreted; 40 columns are padded to a block of 128."""
  config = dataclasses.replace(config, num_kv_heads=kv_heads)

  def splash(q, k, v, mask, segments, positions):
    attend = backends.attend('splash', config, positions, segments)
    return attend(q, k, v, config.sliding_window is not None)

  assert_close(*compared(splash, config, 40), 'float32')


@pytest.mark.parametrize('kv_heads', [1, 2])
def test_splash_over_a_mesh_is_the_plain_one(kv_heads):
  """Rows over data, key heads over tensor; one key head is whole on both of its devices."""
  config = dataclasses.replace(CONFIG, num_kv_heads=kv_heads)
  mesh = make_mesh({'data': 2, 'fsdp': 1, 'tensor': 2}, jax.devices()[:4])

  def splash(q, k, v, mask, segments, positions):
    return backends.attend('splash', config, positions, segments)(q, k, v, False)

  with jax.set_mesh(mesh):
    text = jax.jit(lambda q, k, v: splash(q, k, v, None, *rows(40)[::-1])).lower(
      *heads(config, 40, 'float32')
    )
    assert 'sdy.manual_computation' in text.as_text()
    assert_close(*compared(splash, config, 40), 'float32')


@pytest.mark.parametrize('config, dtype', [(CONFIG, 'float32'), (WINDOWED, 'bfloat16')])
def test_flash_is_asked_for_the_plain_one(config, dtype):
  """What cuDNN is given, computed by XLA: an odd number of columns, rows that see nothing."""

  def flash(q, k, v, mask, segments, positions):
    return backends.flash(q, k, v, mask, implementation='xla')

  assert_close(*compared(flash, config, 41, dtype), dtype)


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('config', [CONFIG, WINDOWED], ids=['full', 'window'])
@pytest.mark.parametrize('columns', [128, 41])
def test_cudnn_is_the_plain_one(config, columns):
  def flash(q, k, v, mask, segments, positions):
    return backends.flash(q, k, v, mask)

  assert_close(*compared(flash, config, columns, 'bfloat16'), 'bfloat16')


def test_a_scanned_model_takes_the_window_by_layer():
  model, (positions, segments) = Model(MIXED), rows(24)
  params = model.init(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 61)
  hidden_of = jax.jit(Model.hidden, static_argnums=0)
  plain, found = (
    np.asarray(hidden_of(dataclasses.replace(model, attention=name), params, *rest))
    for name in ('xla', 'splash')
    for rest in [(tokens, positions, segments)]
  )
  real = np.asarray(segments) > 0
  np.testing.assert_allclose(found[real], plain[real], atol=1e-3)


def test_the_choice_is_by_platform_and_shape():
  wide = dataclasses.replace(CONFIG, head_dim=128, dtype='bfloat16')
  cases = [
    (CONFIG, 512, 'cpu', 1, 'xla'),
    (wide, 512, 'gpu', 8, 'cudnn'),
    (dataclasses.replace(wide, dtype='float32'), 512, 'gpu', 1, 'xla'),
    (dataclasses.replace(wide, head_dim=256), 512, 'gpu', 1, 'xla'),
    (wide, 512, 'tpu', 1, 'splash'),
    (wide, 96, 'tpu', 1, 'xla'),
    (CONFIG, 512, 'tpu', 1, 'xla'),
    (wide, 512, 'tpu', 4, 'xla'),
  ]
  for config, columns, platform, devices, expected in cases:
    assert backends.choose('auto', config, columns, platform, devices) == expected
    assert backends.choose('xla', config, columns, platform, devices) == 'xla'
  assert backends.choose('splash', wide, 512, 'tpu', 4) == 'splash'
  with planned_for('tpu'):
    assert backends.choose('auto', wide, 512, devices=1) == 'splash'
    assert backends.choose('auto', wide, 512) == 'xla'  # eight devices
  with planned_for('gpu'):  # compiled for CPUs in its place
    assert backends.choose('auto', wide, 512, devices=1) == 'xla'


@pytest.mark.parametrize(
  'wanted, platform, text',
  [
    ('cudnn', 'cpu', 'attention=cudnn: it needs an NVIDIA GPU, found cpu; use auto or xla'),
    ('cudnn', 'gpu', 'it takes bfloat16 or float16, the model is float32'),
    ('splash', 'gpu', 'it is for TPUs'),
    ('flash', 'cpu', "attention='flash' is none of auto, xla, cudnn, splash"),
  ],
)
def test_what_cannot_run_says_why(wanted, platform, text):
  with pytest.raises(ValueError, match=text):
    backends.choose(wanted, CONFIG, 512, platform)


@pytest.mark.parametrize('kv_heads', [1, 2])
def test_attention_in_parts_and_its_gradient(kv_heads):
  """Three parts of 32 queries, packed and padded rows, beside the softmax that JAX derives."""
  q, k, v, weight = (
    jax.random.normal(jax.random.key(i), (2, 96, heads, 8))
    for i, heads in enumerate((4, kv_heads, kv_heads, 4))
  )
  segments = jnp.repeat(jnp.array([[1, 1, 2], [1, 2, 0]]), 32, axis=1)
  same = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
  mask = jnp.tril(same)

  def plain(q, k, v, mask):
    k, v = (jnp.repeat(x, 4 // kv_heads, axis=2) for x in (k, v))
    scores = jnp.einsum('btnh,bsnh->bnts', q, k) * 8**-0.5
    return jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(scores, -1, where=mask[:, None]), v)

  def found(attend):
    def loss(q, k, v):
      out = jnp.where(segments[:, :, None, None] > 0, attend(q, k, v, mask), 0.0)
      return jnp.sum(weight * out), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  expected = found(plain)
  for attend in (attention.attend, attention.attend_causal):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found(attend), expected
    )

"""Attention of whole rows by the kernel that suits the platform; a cache is read by plain XLA.

- `xla`: `attention.attend_causal`, everywhere; its scores [B, N, T, T] are in memory.
- `cudnn`: cuDNN's flash attention on NVIDIA GPUs; the mask is there as a bias [B, 1, T, T].
- `splash`: Pallas splash attention on TPUs, segments and window given to the kernel, no mask at
  all; over a mesh each device runs it for its own rows and key heads. Elsewhere than on a TPU it is
  interpreted, which is slow and for tests.

All agree with `xla` where `segments` is not 0, gradients too: to 1e-4 in float32, in bfloat16 to
2 % of the largest entry. A window counts positions, which the kernel of `splash` takes to be
consecutive within a segment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from o1jax.models import attention
from o1jax.models.config import ModelConfig
from o1jax.parallel.ambient import first_token, on_own_parts, whole_tokens
from o1jax.parallel.platform import platform as traced_for

BACKENDS = ('auto', 'xla', 'cudnn', 'splash')
_LANES = 128  # columns of a TPU block, and the width that its kernels are made for
_CUDNN_DTYPES = ('bfloat16', 'float16')
_CUDNN_WIDTH = 128  # largest head that every GPU with flash attention takes

# (q [B, T, N, H], k and v [B, T, K, H], sliding) -> [B, T, N, H]; `sliding`, a bool or a traced
# one, says whether the layer has the window.
Attend = Callable[[jax.Array, jax.Array, jax.Array, bool | jax.Array], jax.Array]


def choose(
  wanted: str,
  config: ModelConfig,
  columns: int,
  platform: str | None = None,
  devices: int = 0,
  sequence: int = 1,
) -> str:
  """The backend for rows of `columns` tokens: what is `wanted`, or for 'auto' the fastest.

  Args:
    wanted: one of `BACKENDS`.
    config: of the model.
    columns: T.
    platform: 'cpu', 'gpu' or 'tpu'; default is JAX's own, or a TPU that is planned for.
    devices: of the run; default is all that JAX sees, or those of a larger ambient mesh. 'auto'
      takes splash attention on one only: over a mesh it has not been tried on hardware.
    sequence: devices that share the tokens of a row, which XLA's attention alone can.

  Raises:
    ValueError: what is wanted cannot run here; says why.
  """
  if platform is None:
    platform = 'tpu' if traced_for() == 'tpu' else jax.default_backend()
  devices = devices or max(jax.device_count(), jax.sharding.get_abstract_mesh().size)
  if wanted not in BACKENDS:
    raise ValueError(f'attention={wanted!r} is none of {", ".join(BACKENDS)}')
  no_splash = 'it is for TPUs' if platform == 'gpu' else ''
  reasons = {'xla': '', 'cudnn': _no_cudnn(config, platform), 'splash': no_splash}
  if sequence > 1:
    reasons |= dict.fromkeys(('cudnn', 'splash'), f'rows are split over mesh.sequence={sequence}')
  if wanted != 'auto':
    if reasons[wanted]:
      raise ValueError(f'attention={wanted}: {reasons[wanted]}; use auto or xla')
    return wanted
  if platform == 'gpu' and not reasons['cudnn']:
    return 'cudnn'
  fits = config.head_dim % _LANES == 0 and columns >= _LANES
  fits = fits and devices == 1 and not reasons['splash']
  return 'splash' if platform == 'tpu' and fits else 'xla'


def attend(backend: str, config: ModelConfig, positions: jax.Array, segments: jax.Array) -> Attend:
  """Attention of all layers over one batch, by a backend that `choose` gave.

  Args:
    backend: 'xla', 'cudnn' or 'splash'.
    config: of the model.
    positions: [B, T] int32.
    segments: [B, T] int32, 0 for padding, whose values are to be ignored.
  """
  if backend == 'splash':
    return functools.partial(_splash, config, segments)
  masks = attention.full_masks(config, positions, segments)
  attend_under = attention.attend_causal if backend == 'xla' else flash
  return functools.partial(_masked, attend_under, masks)


def attend_own_tokens(config: ModelConfig, positions: jax.Array, segments: jax.Array) -> Attend:
  """As `attend` by XLA, within `sharding.on_own_tokens`: a device has t of the T tokens.

  Keys and values of the others are gathered, layer by layer; scores are [t, T] on each device.

  Args:
    config: of the model.
    positions: [B, t] int32.
    segments: [B, t] int32, 0 for padding.
  """
  own = positions.shape[1]
  every = whole_tokens(positions), whole_tokens(segments)
  masks = attention.full_masks(config, *every, first_token(own), own)

  def gathered(q: jax.Array, k: jax.Array, v: jax.Array, sliding: bool | jax.Array) -> jax.Array:
    return _masked(attention.attend, masks, q, whole_tokens(k), whole_tokens(v), sliding)

  return gathered


def _masked(attend_under, masks: attention.Masks, q, k, v, sliding: bool | jax.Array) -> jax.Array:
  """Attention under the mask of a layer that has the window or not."""
  if masks.window is None:
    mask = masks.full
  elif isinstance(sliding, bool):
    mask = masks.window if sliding else masks.full
  else:
    mask = jnp.where(sliding, masks.window, masks.full)
  return attend_under(q, k, v, mask)


def flash(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, implementation: str = 'cudnn'
) -> jax.Array:
  """`jax.nn.dot_product_attention` under mask [B, T, T], with rows that see nothing kept finite."""
  columns = q.shape[1]
  mask = mask | jnp.eye(columns, dtype=bool)[None]  # padding sees itself: no row is empty
  if columns % 2:  # cuDNN wants an even number where there is a bias
    q, k, v = (_padded(x, columns + 1) for x in (q, k, v))
    mask = jnp.pad(mask, ((0, 0), (0, 1), (0, 1))).at[:, -1, -1].set(True)
  out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)
  return out[:, :columns]


def _splash(
  config: ModelConfig,
  segments: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  sliding: bool | jax.Array,
) -> jax.Array:
  columns = q.shape[1]
  whole = -(-columns // _LANES) * _LANES
  segments = _padded(segments, whole)
  q, k, v = (_padded(x, whole) for x in (q, k, v))
  causal = functools.partial(_kernel_over_mesh, None)
  if config.sliding_window is None:
    out = causal(q, k, v, segments)
  else:
    near = functools.partial(_kernel_over_mesh, config.sliding_window)
    if isinstance(sliding, bool):
      out = (near if sliding else causal)(q, k, v, segments)
    else:
      out = jax.lax.cond(sliding, near, causal, q, k, v, segments)
  return out[:, :columns]


def _kernel_over_mesh(window: int | None, *arrays: jax.Array) -> jax.Array:
  """`_kernel_over_rows` of q, k, v and segments, each device with its own rows and key heads."""
  q, k = ('batch', None, 'heads'), ('batch', None, 'kv_heads')
  kernel = functools.partial(_kernel_over_rows, window)
  return on_own_parts(kernel, arrays, (q, k, k, ('batch', None)), q)


def _kernel_over_rows(
  window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> jax.Array:
  """The kernel over rows and key heads, for T a multiple of 128."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  rows, columns, heads, width = q.shape
  group = heads // k.shape[2]
  shape = (columns, columns)
  mask = splash.CausalMask(shape)
  if window is not None:
    mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
  block = next(size for size in (512, 256, _LANES) if columns % size == 0)
  names = ('q', 'kv', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
  blocks = splash.BlockSizes(**{f'block_{name}': block for name in names})
  kernel = splash.make_splash_mqa_single_device(
    splash.MultiHeadMask([mask] * group), block_sizes=blocks, interpret=traced_for() != 'tpu'
  )
  q = (q * width**-0.5).reshape(rows, columns, -1, group, width).transpose(0, 2, 3, 1, 4)
  k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))  # [B, K, T, H]
  one_row = lambda q, k, v, s: jax.vmap(kernel, (0, 0, 0, None))(q, k, v, s)  # noqa: E731
  out = jax.vmap(one_row)(q, k, v, splash.SegmentIds(segments, segments))
  return out.transpose(0, 3, 1, 2, 4).reshape(rows, columns, heads, width).astype(q.dtype)


def _padded(x: jax.Array, columns: int) -> jax.Array:
  """x [B, T, ...] with zeros up to `columns`."""
  return jnp.pad(x, ((0, 0), (0, columns - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _no_cudnn(config: ModelConfig, platform: str) -> str:
  """Why cuDNN's flash attention cannot serve, or ''."""
  if platform != 'gpu':
    return f'it needs an NVIDIA GPU, found {platform}'
  if config.dtype not in _CUDNN_DTYPES:
    return f'it takes {" or ".join(_CUDNN_DTYPES)}, the model is {config.dtype}'
  if config.head_dim % 8 or config.head_dim > _CUDNN_WIDTH:
    return f'head_dim={config.head_dim} is no multiple of 8 up to {_CUDNN_WIDTH}'
  return ''

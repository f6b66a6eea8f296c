"""The decoder: an NNX module with stacked layers, and the static `Model` around it.

Shapes: B batch rows, T tokens, R decode rows, t new tokens, S cache columns,
D width, N query heads, K key/value heads, G = N / K, H head dimension, F MLP
width, V vocabulary. Outside `models/` a model is a hashable `Model` and a
nested dict of arrays; NNX is seen only here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from o1jax.models import attention, backends, lora
from o1jax.models.config import ModelConfig
from o1jax.models.ops import as_last, gated_silu, linear, rms_norm
from o1jax.parallel.ambient import on_own_tokens, token_ways

Params = dict[str, Any]
Cache = tuple[tuple[jax.Array, jax.Array], ...]
# Measured on 2 CPU cores: below this an unrolled loop beats lax.scan.
UNROLL_LAYERS = 8
# Up to so many bytes of parameters a loop is worth a second copy of them, see `Model.apart`.
_APART_BYTES = 1 << 26


class Layer(nnx.Module):
  """One block: attention and gated MLP, each on a normalised residual."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c, d = config, config.hidden_size
    std, dtype = config.initializer_range, jnp.dtype(config.dtype)

    def normal(shape, axes):
      return nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), axes=axes)

    def ones(shape, axes):
      return nnx.Param(jnp.ones(shape, dtype), axes=axes)

    def zeros(shape, axes):
      return nnx.Param(jnp.zeros(shape, dtype), axes=axes)

    self.attn_norm = ones((d,), ('embed',))
    self.q = normal((d, c.num_heads, c.head_dim), ('embed', 'heads', 'head_dim'))
    self.k = normal((d, c.num_kv_heads, c.head_dim), ('embed', 'kv_heads', 'head_dim'))
    self.v = normal((d, c.num_kv_heads, c.head_dim), ('embed', 'kv_heads', 'head_dim'))
    self.o = normal((c.num_heads, c.head_dim, d), ('heads', 'head_dim', 'embed'))
    if c.qkv_bias:
      self.q_bias = zeros((c.num_heads, c.head_dim), ('heads', 'head_dim'))
      self.k_bias = zeros((c.num_kv_heads, c.head_dim), ('kv_heads', 'head_dim'))
      self.v_bias = zeros((c.num_kv_heads, c.head_dim), ('kv_heads', 'head_dim'))
    if c.o_bias:
      self.o_bias = zeros((d,), ('embed',))
    if c.qk_norm:
      self.q_norm = ones((c.head_dim,), ('head_dim',))
      self.k_norm = ones((c.head_dim,), ('head_dim',))
    self.mlp_norm = ones((d,), ('embed',))
    self.gate = normal((d, c.intermediate_size), ('embed', 'mlp'))
    self.up = normal((d, c.intermediate_size), ('embed', 'mlp'))
    self.down = normal((c.intermediate_size, d), ('mlp', 'embed'))
    self.config = config

  def project(self, x: jax.Array, rope) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B,T,D] -> rotated q [B,T,N,H] and k [B,T,K,H], and v [B,T,K,H]."""
    c = self.config
    x = rms_norm(x, self.attn_norm[...], c.rms_norm_eps)
    q, k, v = (self._heads(x, name) for name in ('q', 'k', 'v'))
    if c.qk_norm:
      q = rms_norm(q, self.q_norm[...], c.rms_norm_eps)
      k = rms_norm(k, self.k_norm[...], c.rms_norm_eps)
    return attention.rotate(q, rope), attention.rotate(k, rope), v

  def _heads(self, x: jax.Array, name: str) -> jax.Array:
    kernel = getattr(self, name)[...]  # [D, heads, H]
    out = lora.product(x.reshape(-1, x.shape[-1]), kernel, linear)
    out = out.reshape(*x.shape[:-1], *lora.outputs(kernel))
    if self.config.qkv_bias:
      bias = getattr(self, f'{name}_bias')[...]
      out += bias.reshape((1,) * (out.ndim - 2) + bias.shape)
    return out

  def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
    """Residual x [B,T,D] and heads' output [B,T,N,H] -> the block's output."""
    c, shape = self.config, x.shape
    x, attended = x.reshape(-1, shape[-1]), attended.reshape(-1, c.num_heads * c.head_dim)
    mixed = lora.product(attended, self.o[...], linear)
    if c.o_bias:
      mixed += as_last(self.o_bias[...], mixed)
    x = x + mixed
    y = rms_norm(x, self.mlp_norm[...], c.rms_norm_eps)
    gate, up = (lora.product(y, kernel[...], linear) for kernel in (self.gate, self.up))
    return (x + lora.product(gated_silu(gate, up), self.down[...], linear)).reshape(shape)


class Decoder(nnx.Module):
  """Embedding, stacked layers [L, ...], final norm and (untied) output kernel."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    dtype = jnp.dtype(config.dtype)
    shape = (config.vocab_size, config.hidden_size)
    draw = functools.partial(jax.random.normal, shape=shape, dtype=dtype)
    axes = ('vocab', 'embed')
    self.embed = nnx.Param(config.initializer_range * draw(rngs.params()), axes=axes)
    stack = nnx.vmap(lambda r: Layer(config, r), in_axes=0, out_axes=0)
    self.layers = nnx.split_rngs(splits=config.num_layers)(stack)(rngs)
    self.norm = nnx.Param(jnp.ones((config.hidden_size,), dtype), axes=('embed',))
    if not config.tie_embeddings:
      self.lm_head = nnx.Param(config.initializer_range * draw(rngs.params()), axes=axes)


@functools.lru_cache(maxsize=64)
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, Params, Params]:
  """Graph definition of one layer; shapes and logical axes of all parameters."""
  decoder = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(params=jax.random.key(0))))
  graphdef, _ = nnx.split(decoder.layers)
  state = nnx.state(decoder, nnx.Param)
  shapes = nnx.to_pure_dict(state)
  is_leaf = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
  axes = nnx.to_pure_dict(jax.tree.map(lambda v: _Axes(v.axes), state, is_leaf=is_leaf))
  axes = jax.tree.map(lambda a: a.names, axes, is_leaf=lambda a: isinstance(a, _Axes))
  axes['layers'] = {name: ('layers', *names) for name, names in axes['layers'].items()}
  return graphdef, shapes, axes


@dataclasses.dataclass(frozen=True)
class _Axes:
  names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder as a hashable value: pure functions of a nested dict of parameters.

  `remat` recomputes each layer in the backward pass instead of keeping it; `attention` is one of
  `backends.BACKENDS`, for whole rows.
  """

  config: ModelConfig
  remat: bool = False
  attention: str = 'auto'

  def init(self, key: jax.Array) -> Params:
    """Random parameters: normal(0, initializer_range), norms one, biases zero."""
    return nnx.to_pure_dict(nnx.state(Decoder(self.config, nnx.Rngs(params=key)), nnx.Param))

  def shapes(self) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`, without allocating them."""
    return _abstract(self.config)[1]

  def logical_axes(self) -> Params:
    """For each parameter a tuple naming its axes, e.g. ('layers', 'embed', 'mlp')."""
    return _abstract(self.config)[2]

  def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
    """tokens [...] int32 -> their embedding rows [..., D]."""
    return jnp.take(params['embed'], tokens, axis=0)

  def hidden(
    self, params: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array
  ) -> jax.Array:
    """States after the final norm, [B, T, D].

    Token t attends to the tokens s <= t of its own segment. All three inputs
    are [B, T] int32; padding (`segments == 0`) yields values to be ignored.
    """
    return self.hidden_from_embeddings(params, self.embed(params, tokens), positions, segments)

  def hidden_from_embeddings(
    self, params: Params, x: jax.Array, positions: jax.Array, segments: jax.Array
  ) -> jax.Array:
    """Like `hidden`, from embeddings x [B, T, D].

    Where the ambient mesh has `sequence`, a device computes its own of the T tokens.

    Raises:
      ValueError: an attention that cannot run here; says why.
    """
    split = token_ways(x.shape[1])
    backend = backends.choose(self.attention, self.config, x.shape[1], sequence=split)
    if split == 1:
      attend = backends.attend(backend, self.config, positions, segments)
      return self._hidden(params, x, positions, attend)

    def own(weights, x, positions, segments):
      attend = backends.attend_own_tokens(self.config, positions, segments)
      return self._hidden(weights, x, positions, attend)

    weights = {name: params[name] for name in ('layers', 'norm')}
    return on_own_tokens(own, weights, x, positions, segments)

  def _hidden(
    self, params: Params, x: jax.Array, positions: jax.Array, attend: backends.Attend
  ) -> jax.Array:
    c = self.config
    rope = attention.rope_table(c, positions)

    def block(x, weights, sliding):
      layer = nnx.merge(_abstract(c)[0], weights)
      q, k, v = layer.project(x, rope)
      return layer.finish(x, attend(q, k, v, sliding))

    sliding = [window is not None for window in c.windows]
    if c.num_layers <= UNROLL_LAYERS:
      block = jax.checkpoint(block, static_argnums=2) if self.remat else block
      for weights, near in zip(_layers(params, c.num_layers), sliding, strict=True):
        x = block(x, weights, near)
    else:
      block = jax.checkpoint(block) if self.remat else block
      step = lambda x, inputs: (block(x, *inputs), None)  # noqa: E731
      x, _ = jax.lax.scan(step, x, (params['layers'], jnp.array(sliding)))
    return rms_norm(x, params['norm'], c.rms_norm_eps)

  def apart(self, params: Params) -> Params:
    """Within jit: the same parameters as `extend` and `logits` read them fastest, for a loop.

    Left as they are, XLA's CPU compiler takes the stacked layers apart and turns the output layer
    over in every step: half of a step's time at 8 rows. It costs a copy, so a large model, whose
    products take far longer than that, stays as it is.
    """
    if sum(x.nbytes for x in jax.tree.leaves(params)) > _APART_BYTES:
      return params
    layers, kernel = _layers(params, self.config.num_layers), self.output_rows(params).T
    return {**params, 'layers': layers, 'output_kernel': kernel}

  def output_rows(self, params: Params) -> jax.Array:
    """The output layer, [V, D]: the embedding where the two are tied."""
    return params['embed'] if self.config.tie_embeddings else params['lm_head']

  def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> next-token logits [..., V] in float32."""
    kernel = params.get('output_kernel')
    if kernel is None:
      return self.read_out(self.output_rows(params), hidden)
    return _logits(hidden, kernel)

  def read_out(self, rows: jax.Array, hidden: jax.Array) -> jax.Array:
    """As `logits`, by the output layer itself, [V, D]."""
    return _logits(hidden, rows.T)

  def empty_cache(self, rows: int, columns: int, dtype: jnp.dtype | None = None) -> Cache:
    """Zeroed keys and values of `rows` x `columns` tokens: a (k, v) pair for each layer.

    Axis 0 of every array is the row. Keys are [R, K, H, S] and values [R, K, S, H]:
    so both products of a decoding step read them as they lie.
    """
    c = self.config
    dtype = jnp.dtype(dtype or c.dtype)
    keys = (rows, c.num_kv_heads, c.head_dim, columns)
    values = (rows, c.num_kv_heads, columns, c.head_dim)
    return tuple((jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(c.num_layers))

  def extend(
    self,
    params: Params,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    column: jax.Array,
    valid: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    """Reads t new tokens a row and returns (hidden [R, t, D], the longer cache).

    Args:
      params: the parameters.
      cache: keys and values so far.
      tokens: [R, t] int32, written at columns `column .. column + t - 1`.
      positions: [R, t] int32, each row's own count of real tokens before.
      column: int32 scalar, the same for every row.
      valid: [R, S] bool, the columns that hold a real token of the row, the new
        ones included. A column that is not valid is never attended to.
    """
    x = self.embed(params, tokens)
    return self.extend_from_embeddings(params, cache, x, positions, column, valid)

  def extend_from_embeddings(
    self,
    params: Params,
    cache: Cache,
    x: jax.Array,
    positions: jax.Array,
    column: jax.Array,
    valid: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    """Like `extend`, from embeddings x [R, t, D]."""
    c = self.config
    rope = attention.rope_table(c, positions)
    masks = attention.cache_masks(c, positions, column, valid)
    grown = []
    layers = _layers(params, c.num_layers)
    for weights, (keys, values), window in zip(layers, cache, c.windows, strict=True):
      layer = nnx.merge(_abstract(c)[0], weights)
      q, k, v = layer.project(x, rope)
      k, v = k.transpose(0, 2, 3, 1).astype(keys.dtype), v.transpose(0, 2, 1, 3)
      keys = jax.lax.dynamic_update_slice_in_dim(keys, k, column, axis=3)
      values = jax.lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), column, axis=2)
      grown.append((keys, values))
      attended = attention.attend_cached(q, keys, values, masks.layer(window))
      x = layer.finish(x, attended)
    return rms_norm(x, params['norm'], c.rms_norm_eps), tuple(grown)


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
  """hidden [..., D] times kernel [D, V] -> [..., V] in float32."""
  rows = hidden.reshape(-1, hidden.shape[-1])
  return linear(rows, kernel, jnp.float32).reshape(*hidden.shape[:-1], -1)


def _layers(params: Params, count: int) -> tuple[Params, ...]:
  """The layers' parameters, one dict a layer: stacked [L, ...] in `params`, or `Model.apart`.

  By lax.split: its transpose is one concatenation, that of indexing is L full-size additions.
  """
  if isinstance(params['layers'], tuple):
    return params['layers']
  leaves, structure = jax.tree.flatten(params['layers'])
  parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
  return tuple(jax.tree.unflatten(structure, [part[i][0] for part in parts]) for i in range(count))

"""Low-rank adapters over frozen kernels (LoRA), shared and stacked without a copy of the base.

    y = x W + alpha / r * (x A) B        A [inputs, r], B [r, outputs], B = 0 at the start

Hu et al. 2021 (arXiv 2106.09685). In a tree of parameters the kernel of an adapted projection is an
`Adapted`: the kernel below it, which may be an array, an `Nf4` or again an `Adapted`, and the two
factors. So the tree itself says what is computed; policy, reference, TCG and PRM are trees over the
same base arrays, and a PRM can have an adapter of its own above the policy's.

Only the factors that `adapt` added last are trained: `partition` parts them from the rest, and
`combine` joins the two again. `detached` is what a checkpoint holds: the factors alone.

qwix was tried first (0.1.8). It makes the factors while it traces a model, at the `dot_general` in
which it meets a kernel; this decoder's products have a gradient of their own (`ops.linear`), and
inside of that it fails with `TraceContextError`. Its adapters also live inside one NNX module, a
set for each, where here several trees share a base. `tests/test_lora.py` holds products, codes and
exports against peft and qwix.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from o1jax import config
from o1jax.models.nf4 import Nf4, dequantise, quantise

# Our projection -> (the Hub's name of it, number of input axes).
PROJECTIONS = {
  name.removesuffix('_proj'): (name, 2 if name == 'o_proj' else 1) for name in config.PROJECTIONS
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
  """A kernel [*lead, *inputs, *outputs] with a low-rank term; `lead` is [L] where stacked."""

  base: Any  # an array, an `Nf4` or an `Adapted`
  a: jax.Array  # [*lead, *inputs, r] float32
  b: jax.Array  # [*lead, r, *outputs] float32
  scale: jax.Array  # [*lead] float32, alpha / r; constant
  frozen: bool = dataclasses.field(default=False, metadata={'static': True})  # not trained

  def __getitem__(self, index):
    """NNX reads a variable's value as `variable[...]`; so is this one read whole."""
    if index is not Ellipsis:
      raise TypeError(f'{index!r}: an adapted kernel is read whole, as kernel[...]')
    return self

  def axes(self, names: tuple[str, ...]) -> Adapted:
    """The same tree with names of axes in the place of arrays; `names` of a stacked kernel."""
    inputs = self.a.ndim - 1
    base = self.base.axes(names) if hasattr(self.base, 'axes') else names
    lead = names[: self.scale.ndim]
    return Adapted(
      base, (*names[:inputs], 'rank'), (*lead, 'rank', *names[inputs:]), lead, self.frozen
    )


@dataclasses.dataclass(frozen=True)
class Spec:
  """Which projections get adapters, and of what size. `modules` are patterns of Hub names."""

  rank: int
  alpha: float
  modules: tuple[str, ...] = ('*_proj',)

  @property
  def projections(self) -> tuple[str, ...]:
    """Our names of the projections that the patterns choose."""
    chosen = lambda name: any(fnmatch.fnmatchcase(name, m) for m in self.modules)  # noqa: E731
    return tuple(ours for ours, (hub, _) in PROJECTIONS.items() if chosen(hub))


def product(x: jax.Array, kernel: Any, linear: Callable) -> jax.Array:
  """x [M, I] times a kernel without stacked axes, [*inputs, *outputs] -> [M, O].

  `linear(x, matrix)` is the product with a plain matrix [I, O]. Factors take part in x's type.
  """
  if isinstance(kernel, Adapted):
    inner = linear(x, kernel.a.astype(x.dtype).reshape(x.shape[-1], -1))
    b = kernel.b.astype(x.dtype).reshape(inner.shape[-1], -1)
    scale = kernel.scale.astype(x.dtype)
    return product(x, kernel.base, linear) + linear(inner * scale, b)
  if isinstance(kernel, Nf4):
    kernel = dequantise(kernel, dtype=x.dtype)
  return linear(x, kernel.reshape(x.shape[-1], -1))


def outputs(kernel: Any) -> tuple[int, ...]:
  """Sizes of the output axes of a kernel with one input axis, without stacked axes."""
  if isinstance(kernel, Adapted):
    return kernel.b.shape[1:]
  return kernel.codes.shape[1:] if isinstance(kernel, Nf4) else kernel.shape[1:]


def adapt(params: Mapping[str, Any], spec: Spec, key: jax.Array) -> dict[str, Any]:
  """A model's parameters with new adapters over those projections that `spec` chooses.

  A is uniform in +-1 / sqrt(inputs), as peft draws it, B zero: the model computes what it did.
  `params` may have adapters already; these are below the new ones and frozen.
  """
  layers = {name: _frozen(kernel) for name, kernel in params['layers'].items()}
  for name in spec.projections:
    key, draw = jax.random.split(key)
    kernel, axes = layers[name], PROJECTIONS[name][1]
    shape = _shape(kernel)
    layer, inputs, rest = shape[:1], shape[1 : 1 + axes], shape[1 + axes :]
    bound = math.prod(inputs) ** -0.5
    a = jax.random.uniform(draw, (*layer, *inputs, spec.rank), minval=-bound, maxval=bound)
    scale = jnp.full(layer, spec.alpha / spec.rank, jnp.float32)
    layers[name] = Adapted(kernel, a, jnp.zeros((*layer, spec.rank, *rest)), scale)
  return {**params, 'layers': layers}


def factor_count(shapes: Mapping[str, Any], spec: Spec) -> int:
  """Numbers in the factors of `spec` over a model's (stacked) kernels."""
  found = 0
  for name in spec.projections:
    layers, *sizes = _shape(shapes['layers'][name])
    inputs = PROJECTIONS[name][1]
    found += layers * spec.rank * (math.prod(sizes[:inputs]) + math.prod(sizes[inputs:]))
  return found


def quantised(params: Mapping[str, Any]) -> dict[str, Any]:
  """A model's parameters with all seven projections in four bits.

  The arrays given are let go one by one if nobody else holds them.
  """
  params = dict(params)
  params['layers'] = layers = dict(params['layers'])
  pack = jax.jit(quantise, static_argnums=(1, 2))
  for name, (_, inputs) in PROJECTIONS.items():
    layers[name] = jax.block_until_ready(pack(layers.pop(name), inputs, 1))
  return params


def merged(params: Any, dtype: jnp.dtype | None = None) -> Any:
  """Plain arrays: every adapter added to its kernel, in `dtype` or that of the embedding.

  Works on any tree that contains models' parameters; what is no adapted kernel is passed on.
  """

  def model(node):
    kind = dtype or node['embed'].dtype
    whole = jax.tree.map(
      lambda x: _dense(x).astype(kind) if _is_kernel(x) else x, node['layers'], is_leaf=_is_kernel
    )
    return {**node, 'layers': whole}

  return _each_model(params, model)


def is_adapted(params: Any) -> bool:
  """Whether some kernel in the tree has an adapter."""
  found = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Adapted))
  return any(isinstance(x, Adapted) for x in found)


def partition(params: Any) -> tuple[Any, Any]:
  """(trained, frozen): two trees like `params`, each with None where the other has an array.

  In a model with adapters A and B of those that are not frozen are trained and nothing else; a
  model without any is trained whole, and so is what is no model, such as a head.
  """

  def mask(node):
    if not is_adapted(node):
      return jax.tree.map(lambda _: True, node)
    leaf = lambda x: isinstance(x, Adapted)  # noqa: E731
    return jax.tree.map(_factors_alone, node, is_leaf=leaf)

  chosen = _each_model(params, mask, otherwise=lambda _: True)
  trained = jax.tree.map(lambda m, x: x if m else None, chosen, params)
  return trained, jax.tree.map(lambda m, x: None if m else x, chosen, params)


def combine(trained: Any, frozen: Any) -> Any:
  """The tree that `partition` parted."""
  none = lambda x: x is None  # noqa: E731
  return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=none)


def detached(params: Any) -> Any:
  """What a checkpoint of a tree holds: of models with adapters {'layers': {name: factors}} alone.

  `factors` are {'a', 'b', 'scale'} and, with adapters below it, 'base': theirs; of a frozen adapter
  {'frozen': factors}.
  """

  def model(node):
    if not is_adapted(node):
      return node
    layers = {k: _factors(x) for k, x in node['layers'].items() if isinstance(x, Adapted)}
    return {'layers': layers}

  return _each_model(params, model)


def is_detached(saved: Any) -> bool:
  """Whether what a checkpoint holds needs a base below it."""
  if not isinstance(saved, Mapping):
    return False
  return saved.keys() == {'layers'} or any(is_detached(part) for part in saved.values())


def attached(base: Mapping[str, Any], saved: Any) -> Any:
  """The tree that `detached` gave `saved`, over the arrays of `base`, which are not copied.

  Raises:
    ValueError: the factors are of other shapes than the base's kernels.
  """
  if not isinstance(saved, Mapping):
    return saved
  if saved.keys() != {'layers'}:
    return {name: attached(base, part) for name, part in saved.items()}
  layers = dict(base['layers'])
  for name, factors in saved['layers'].items():
    layers[name] = _over(layers[name], factors, name)
  return {**base, 'layers': layers}


def blended(start: Any, trained: Any, share: float) -> Any:
  """The weights `share` of the way from `start` to `trained`.

  What was trained on some hundred problems fits these; half-way weights judge others better than
  either end (Wortsman et al. 2022, arXiv 2109.01903). Of an adapter that began with B = 0 it is
  the share of B, exactly; `start` and `trained` hold models in a dict.
  """
  if not is_adapted(trained):
    return jax.tree.map(lambda a, b: a + share * (b - a), start, trained)

  def model(node):
    scaled = lambda x: dataclasses.replace(x, b=share * x.b) if _is_trained(x) else x  # noqa: E731
    layers = {name: scaled(kernel) for name, kernel in node['layers'].items()}
    return {**node, 'layers': layers}

  between = {
    name: None if _is_model(part) else blended(start[name], part, share)
    for name, part in trained.items()
  }
  return {name: model(trained[name]) if x is None else x for name, x in between.items()}


def stacked(kernel: Any) -> tuple[jax.Array, jax.Array] | None:
  """All adapters of a kernel as one: (A [L, *inputs, R], B [L, R, *outputs]), scales in B.

  R is the sum of their ranks; None for a kernel without any.
  """
  found = []
  while isinstance(kernel, Adapted):
    scale = kernel.scale.reshape(-1, *(1,) * (kernel.b.ndim - 1))
    found.append((kernel.a, kernel.b * scale))
    kernel = kernel.base
  if not found:
    return None
  return jnp.concatenate([a for a, _ in found], -1), jnp.concatenate([b for _, b in found], 1)


def _is_model(node: Any) -> bool:
  return isinstance(node, Mapping) and 'layers' in node and 'embed' in node


def _is_kernel(x: Any) -> bool:
  return isinstance(x, Adapted | Nf4)


def _each_model(tree: Any, read: Callable, otherwise: Callable = lambda x: x) -> Any:
  """The tree with `read(model's parameters)` for each model and `otherwise(leaf)` elsewhere."""
  return jax.tree.map(lambda x: read(x) if _is_model(x) else otherwise(x), tree, is_leaf=_is_model)


def _is_trained(kernel: Any) -> bool:
  return isinstance(kernel, Adapted) and not kernel.frozen


def _frozen(kernel: Any) -> Any:
  return dataclasses.replace(kernel, frozen=True) if isinstance(kernel, Adapted) else kernel


def _factors_alone(kernel: Any) -> Any:
  """True for the factors of an adapter that is trained, False for what lies below and elsewhere."""
  nothing = jax.tree.map(lambda _: False, kernel)
  return dataclasses.replace(nothing, a=True, b=True) if _is_trained(kernel) else nothing


def _factors(kernel: Adapted) -> dict[str, Any]:
  own = {'a': kernel.a, 'b': kernel.b, 'scale': kernel.scale}
  own |= {'base': _factors(kernel.base)} if isinstance(kernel.base, Adapted) else {}
  return {'frozen': own} if kernel.frozen else own


def _over(kernel: Any, factors: Mapping[str, Any], name: str) -> Adapted:
  if 'frozen' in factors:
    return _frozen(_over(kernel, factors['frozen'], name))
  if 'base' in factors:
    kernel = _over(kernel, factors['base'], name)
  a, b, shape = factors['a'], factors['b'], _shape(kernel)
  if (*a.shape[:-1], *b.shape[2:]) != shape:
    raise ValueError(f'{name}: factors {a.shape} and {b.shape} are not of a kernel {shape}')
  return Adapted(kernel, a, b, factors['scale'])


def _shape(kernel: Any) -> tuple[int, ...]:
  """Shape of a stacked kernel of any kind, [L, *inputs, *outputs]."""
  if isinstance(kernel, Adapted):
    return _shape(kernel.base)
  if isinstance(kernel, Nf4):
    return (kernel.codes.shape[0], *kernel.inputs, *kernel.codes.shape[2:])
  return kernel.shape


@jax.jit
def _dense(kernel: Any) -> jax.Array:
  """A stacked kernel as one array, float32 where an adapter is added or codes are read."""
  if isinstance(kernel, Nf4):
    return dequantise(kernel, lead=1)
  if not isinstance(kernel, Adapted):
    return kernel.astype(jnp.float32)
  a = kernel.a.reshape(kernel.a.shape[0], -1, kernel.a.shape[-1])
  b = kernel.b.reshape(*kernel.b.shape[:2], -1)
  delta = jnp.einsum('lir,lro->lio', a, b, precision=jax.lax.Precision.HIGHEST)
  delta = delta * kernel.scale[:, None, None]
  base = _dense(kernel.base)
  return base + delta.reshape(base.shape)

"""Kernels in four bits: NormalFloat4 with a scale for each block of inputs (QLoRA).

Dettmers et al. 2023 (arXiv 2305.14314), appendix E, without double quantisation: a block of 64
weights of one output is divided by its largest magnitude, and each becomes the nearest of 16
values. Codes are packed in pairs, so a weight takes 4 bits and 1/2 bit of scale.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # inputs that share a scale; fewer where the kernel does not divide
# Quantiles of the normal distribution, with an exact zero.
VALUES = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4:
  """A quantised kernel [..., *inputs, *outputs]; leading axes are stacked layers."""

  codes: jax.Array  # [..., I / 2, *outputs] uint8: input 2i in the low four bits, 2i + 1 above
  scales: jax.Array  # [..., I / block, *outputs] float32
  inputs: tuple[int, ...] = dataclasses.field(metadata={'static': True})  # sizes of their axes

  def __getitem__(self, index):
    """NNX reads a variable's value as `variable[...]`; so is this one read whole."""
    if index is not Ellipsis:
      raise TypeError(f'{index!r}: a quantised kernel is read whole, as kernel[...]')
    return self

  def axes(self, names: tuple[str, ...]) -> Nf4:
    """The same tree with names of axes in the place of arrays; `names` of a stacked kernel."""
    # Of several input axes, which are flattened, the first is the outer one.
    kept = names[:2] + names[1 + len(self.inputs) :]
    return dataclasses.replace(self, codes=kept, scales=(kept[0], 'blocks', *kept[2:]))


def quantise(kernel: jax.Array, inputs: int, lead: int = 1) -> Nf4:
  """Quantises a kernel [*lead, *inputs, *outputs] of any float type.

  Args:
    kernel: the weights.
    inputs: number of input axes.
    lead: number of stacked axes in front of them.

  Raises:
    ValueError: the number of inputs is odd.
  """
  sizes = kernel.shape[lead : lead + inputs]
  front, rest, count = kernel.shape[:lead], kernel.shape[lead + inputs :], math.prod(sizes)
  block = math.gcd(count, BLOCK)
  if block % 2:
    raise ValueError(f'a kernel of {count} inputs cannot be packed in pairs; they must be even')
  blocks = kernel.astype(jnp.float32).reshape(*front, count // block, block, *rest)
  scales = jnp.max(jnp.abs(blocks), axis=lead + 1)
  shares = blocks / jnp.expand_dims(jnp.where(scales > 0, scales, 1.0), lead + 1)
  middles = jnp.asarray((VALUES[1:] + VALUES[:-1]) / 2)
  codes = jnp.searchsorted(middles, shares, side='left').astype(jnp.uint8)
  pairs = codes.reshape(*front, count // 2, 2, *rest)
  low, high = (jnp.take(pairs, i, axis=lead + 1) for i in (0, 1))
  return Nf4(low | (high << 4), scales, sizes)


def dequantise(kernel: Nf4, lead: int = 0, dtype: jnp.dtype | None = None) -> jax.Array:
  """The weights [*lead, *inputs, *outputs] that the codes stand for; float32 by default."""
  front, rest = kernel.codes.shape[:lead], kernel.codes.shape[lead + 1 :]
  table = jnp.asarray(VALUES)
  both = jnp.stack([kernel.codes & 15, kernel.codes >> 4], axis=lead + 1)
  blocks = kernel.scales.shape[lead]
  values = table[both.astype(jnp.int32)].reshape(*front, blocks, -1, *rest)
  values = values * jnp.expand_dims(kernel.scales, lead + 1)
  return values.reshape(*front, *kernel.inputs, *rest).astype(dtype or jnp.float32)

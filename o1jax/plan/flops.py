"""Floating-point operations of a decoder's passes, counted from its shape: 2 for each product.

Matrix products only, as MFU counts them; the masked half of causal attention is computed and so
it counts. XLA's own count (`cost_analysis`) reads a scanned layer once and is no use here.
Legend: L layers, D width, N query heads, K key heads, H their width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from o1jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Flops:
  """Operations of one call, over all devices."""

  computed: float  # what the program does, recomputation included
  useful: float  # without it: what MFU counts

  def __add__(self, other: Flops) -> Flops:
    return Flops(self.computed + other.computed, self.useful + other.useful)

  def times(self, count: float) -> Flops:
    """Those of `count` calls."""
    return Flops(self.computed * count, self.useful * count)


def layers(config: ModelConfig, tokens: int, context: int) -> float:
  """One pass of `tokens` through all layers, each attending to `context` columns."""
  d, heads = config.hidden_size, config.num_heads * config.head_dim
  projections = 2 * d * heads + 2 * d * config.num_kv_heads * config.head_dim  # q, o and k, v
  mlp = 3 * d * config.intermediate_size
  attention = 2 * heads * context  # scores, and the sum over values
  return 2.0 * tokens * config.num_layers * (projections + mlp + attention)


def logits(config: ModelConfig, tokens: int) -> float:
  """The output layer for `tokens` states."""
  return 2.0 * tokens * config.hidden_size * config.vocab_size


def forward(
  config: ModelConfig, rows: int, width: int, *, read: bool = True, extra: float = 0.0
) -> Flops:
  """`rows` of `width` tokens; `read`: through the output layer too; `extra` a token for a head."""
  tokens = rows * width
  total = layers(config, tokens, width) + extra * tokens
  total += logits(config, rows * (width - 1)) if read else 0.0
  return Flops(total, total)


def training(
  config: ModelConfig,
  rows: int,
  width: int,
  *,
  remat: bool,
  pieces: bool,
  read: bool = True,
  extra: float = 0.0,
  frozen: bool = False,
  adapters: float = 0.0,
) -> Flops:
  """Forward and backward pass: three times the forward pass, and what is computed again.

  `frozen`: only factors of adapters are trained, `adapters` numbers in all. Kernels below them have
  no gradients of their own, so their products count twice.

  `remat`: every layer is, but for its last product, whose result no gradient needs; `pieces`: the
  output layer is, as it is read in pieces.
  """
  tokens = rows * width
  useful = 3 * forward(config, rows, width, read=read, extra=extra + 2 * adapters).useful
  if frozen:
    useful -= layers(config, tokens, 0) + (logits(config, rows * (width - 1)) if read else 0.0)
  down = 2.0 * tokens * config.num_layers * config.hidden_size * config.intermediate_size
  again = layers(config, tokens, width) + 2 * adapters * tokens - down if remat else 0.0
  again += logits(config, rows * (width - 1)) if read and pieces else 0.0
  return Flops(useful + again, useful)


def decoding(
  config: ModelConfig, rows: int, new: int, columns: int, *, extra: float = 0.0
) -> Flops:
  """`new` tokens for each of `rows`, one at a time, over a cache of `columns`."""
  total = new * (layers(config, rows, columns) + logits(config, rows) + extra * rows)
  return Flops(total, total)

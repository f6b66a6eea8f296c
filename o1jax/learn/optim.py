"""The optimiser: one of optax behind a gradient clip, with warm-up and decay."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Share of the peak rate that is left at progress p in [0, 1], down to `final`.
_DECAYS = {
  'constant': lambda p, final: jnp.ones_like(p),
  'linear': lambda p, final: 1.0 - (1.0 - final) * p,
  'cosine': lambda p, final: final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * p)),
}


def make_schedule(
  lr: float, *, steps: int, schedule: str = 'cosine', warmup: int = 0, final: float = 0.0
) -> optax.Schedule:
  """Learning rate by update count: a linear rise to `lr`, then the decay.

  The first update already moves (rate `lr / warmup`), and the rate stays at
  `final * lr` past the end.

  Args:
    lr: peak rate.
    steps: updates in all, the warm-up included.
    schedule: 'cosine', 'linear' or 'constant'.
    warmup: updates until the peak.
    final: share of `lr` at the end.

  Raises:
    ValueError: an unknown schedule, or a warm-up that leaves no step.
  """
  if schedule not in _DECAYS:
    raise ValueError(f'schedule={schedule!r} is unknown; use one of {", ".join(_DECAYS)}')
  if warmup < 0 or steps < 1 or warmup >= steps:
    raise ValueError(f'warmup={warmup} does not fit in steps={steps}; use 0 <= warmup < steps')

  def rate(count: jax.Array) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    rise = jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))
    progress = jnp.clip((count - warmup) / (steps - warmup), 0.0, 1.0)
    return lr * rise * _DECAYS[schedule](progress, final)

  return rate


def make_optimizer(
  lr: float,
  *,
  steps: int,
  schedule: str = 'cosine',
  warmup: int = 0,
  final: float = 0.0,
  weight_decay: float = 0.0,
  clip: float | None = 1.0,
  optimizer: str = 'adamw',
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019) or another after a clip of the global gradient norm.

  'adafactor' keeps the second moments of a matrix by row and column, 'lion' one moment, 'sgd'
  a momentum of 0.9; their constants are optax's. Weight decay spares norms and biases.

  Args:
    lr: peak rate; so far, and `steps`, `schedule`, `warmup` and `final`, as in `make_schedule`.
    weight_decay: share of a weight taken off at each update, times the rate.
    clip: largest norm let through, None for no limit.
    optimizer: 'adamw', 'adafactor', 'lion' or 'sgd'.
    b1: decay of AdamW's first moment.
    b2: decay of its second.
    eps: its smallest divisor.

  Raises:
    ValueError: as `make_schedule`; a rate or clip that is not positive; an unknown optimiser.
  """
  if lr <= 0 or (clip is not None and clip <= 0):
    raise ValueError(f'lr={lr} and clip={clip} must be positive (clip may be None)')
  rate = make_schedule(lr, steps=steps, schedule=schedule, warmup=warmup, final=final)
  decayed = {'weight_decay': weight_decay, 'mask': _decayed}
  if optimizer == 'adafactor':
    # optax.adafactor itself does not multiply the decay by the rate.
    tx = optax.chain(
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(**decayed),
      optax.scale_by_learning_rate(rate),
    )
  elif optimizer == 'lion':
    tx = optax.lion(rate, **decayed)
  elif optimizer == 'sgd':
    tx = optax.chain(optax.add_decayed_weights(**decayed), optax.sgd(rate, momentum=0.9))
  elif optimizer == 'adamw':
    tx = optax.adamw(rate, b1, b2, eps, **decayed)
  else:
    raise ValueError(f'optimizer={optimizer!r} is unknown; use adamw, adafactor, lion or sgd')
  return tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)


def _decayed(params: Any) -> Any:
  """True for the parameters that weight decay may shrink."""
  spared = re.compile('norm|bias')
  return jax.tree.map_with_path(
    lambda path, _: spared.search(jax.tree_util.keystr(path)) is None, params
  )

"""Rewards of the method (O1-CODER, arXiv 2412.00154, sec. 2.5): outcome, phi, alpha.

Everything works on NumPy and JAX arrays alike, with any leading batch axes, and keeps
the floating dtype it is given. Departure from the released code, for the paper: gamma
counts from j = 1.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

ArrayT = TypeVar('ArrayT')  # np.ndarray or jax.Array


def _require_float(**arrays) -> None:
  for name, array in arrays.items():
    if not np.issubdtype(array.dtype, np.floating):
      raise ValueError(
        f'{name} has dtype {array.dtype}; rewards must be floating (an integer array would '
        'truncate 0.7 to 0): use float32'
      )


def step_rewards(R: ArrayT, r: ArrayT, mask: ArrayT, alpha: float, gamma: float) -> ArrayT:
  """Spread `phi` over the steps, so that the step rewards of a path sum to it.

  Step j gets `(1 - alpha) gamma^j r_j / m`; the last step also gets `alpha R`.

  Args:
    R: [...] outcome reward of each path.
    r: [..., M] process reward of each step, in [0, 1].
    mask: [..., M] 1 for real steps, which come first; 0 for padding.
    alpha: weight of the outcome, from a schedule below.
    gamma: discount of the process rewards, from j = 1.

  Returns:
    [..., M], 0 where masked. A path without steps has nowhere to put its outcome.

  Raises:
    ValueError: an array is not floating.
  """
  _require_float(R=R, r=r, mask=mask)
  j = mask.cumsum(-1)
  m = mask.sum(-1)[..., None]
  process = (1.0 - alpha) * mask * gamma**j * r / (m + (m == 0))
  last = mask * (j == m)
  return process + alpha * last * R[..., None]


def phi(R: ArrayT, r: ArrayT, mask: ArrayT, alpha: float, gamma: float) -> ArrayT:
  """Aggregate the rewards of a path: `alpha R + (1 - alpha) (1/m) sum_j gamma^j r_j`.

  Arguments as in `step_rewards`; returns [...]. A path without steps is worth `alpha R`.

  >>> import numpy as np
  >>> ones = np.ones(2, np.float32)
  >>> float(phi(np.float32(1.0), ones, ones, alpha=0.5, gamma=0.5).round(4))
  0.6875
  """
  _require_float(R=R, r=r, mask=mask)
  m = mask.sum(-1)
  process = (mask * gamma ** mask.cumsum(-1) * r).sum(-1) / (m + (m == 0))
  return alpha * R + (1.0 - alpha) * process


def linear_alpha(t: float, start: float = 1.0, end: float = 0.1, rate: float = 0.01) -> float:
  """`max(end, start - rate t)` at update t >= 0; the defaults are the paper's."""
  return max(end, start - rate * t)


def logarithmic_alpha(t: float, start: float = 1.0, end: float = 0.1, rate: float = 0.2) -> float:
  """`max(end, start - rate ln(1 + t))` at update t >= 0: fast at first, then slow.

  With the default rate it reaches 0.1 at t = 89, as the linear schedule does at 90.
  """
  return max(end, start - rate * math.log1p(t))


def outcome(
  pass_rate: ArrayT, tau_pass: float = 1.0, tau_fail: float = 0.0, use_share: bool = False
) -> ArrayT:
  """Outcome reward R: `tau_pass` if every test passes, else `tau_fail` or the pass share.

  Args:
    pass_rate: [...] share of tests passed, in [0, 1].
    tau_pass: reward of a program that passes all.
    tau_fail: reward of any other program.
    use_share: give any other program its pass share instead of `tau_fail`.

  Raises:
    ValueError: `pass_rate` is not floating.
  """
  _require_float(pass_rate=pass_rate)
  passed = (pass_rate >= 1.0).astype(pass_rate.dtype)
  failed = pass_rate if use_share else tau_fail
  return passed * tau_pass + (1.0 - passed) * failed


def terminal_reward(compiled, pass_rate, compile_weight: float):
  """Value of a finished path in the search: `a * compile + (1 - a) * pass`.

  Args:
    compiled: whether the program compiles, 0/1 or bool, scalar or [...].
    pass_rate: share of tests passed, in [0, 1], same shape.
    compile_weight: a in [0, 1]. Above 0 it pays for programs that only compile.

  Raises:
    ValueError: `compile_weight` lies outside [0, 1].
  """
  if not 0.0 <= compile_weight <= 1.0:
    raise ValueError(f'compile_weight={compile_weight} is not a share; use a value in [0, 1]')
  return compile_weight * compiled + (1.0 - compile_weight) * pass_rate

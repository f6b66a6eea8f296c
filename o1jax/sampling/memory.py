"""How large a pool of keys and values is, and whether it fits."""

from __future__ import annotations

import jax
import psutil

from o1jax.models.transformer import Model
from o1jax.sampling.kv_pool import state_bytes, token_bytes
from o1jax.sampling.sampler import round_up


def alike(count: int) -> int:
  """As much or up to an eighth more, so that pools of about one size share what is compiled."""
  return round_up(count, 1 << max(0, count.bit_length() - 4))


def check_memory(
  model: Model, *, slots: int, states: int, rows: int, columns: int, free: int | None = None
) -> None:
  """Refuses a search whose keys and values do not fit, before it starts.

  Args:
    model: the decoder.
    slots: tokens of the pool, which is up to an eighth larger.
    states: states of the pool, likewise.
    rows: decoded at once.
    columns: of their cache.
    free: bytes there, if they are known otherwise.

  Raises:
    ValueError: with the bytes needed, the bytes there and what to lower.
  """
  free = free_bytes() if free is None else free
  pool = alike(slots) * token_bytes(model) + alike(states) * state_bytes(model)
  working = 2 * rows * columns * token_bytes(model)  # the old and the new one while rows change
  if pool + working <= free:
    return
  fits = int(8 / 9 * (free - working) / (token_bytes(model) + state_bytes(model)))
  remedy = (
    f'lower pool_tokens to at most {fits} (what it cannot hold is read again), or the problems, '
    f'simulations or children of a search'
    if fits > 0
    else f'lower rows={rows}'
  )
  raise ValueError(
    f'the search needs {pool + working} bytes for keys and values ({pool} for a pool of '
    f'{slots} tokens, {working} for {rows} rows of {columns} columns), there are {free}; {remedy}'
  )


def free_bytes() -> int:
  """Bytes of the first local device that are free; on a CPU those of the host."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != 'cpu' else None
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats['bytes_in_use']
  return psutil.virtual_memory().available

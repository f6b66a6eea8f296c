"""Randomness by name: a row's key is folded from what the row is, not from where it stands."""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np


def stable_id(text: str) -> int:
  """A 32-bit number for a problem's id, the same in every process."""
  return zlib.crc32(text.encode())


def row_keys(seed: int, ids: np.ndarray) -> jax.Array:
  """Typed PRNG keys [R] for rows named by `ids` [R, P], e.g. (problem, node, child).

  The same seed and ids give the same key in whatever batch the row stands.
  """
  return fold(np.uint32(seed), jnp.asarray(np.asarray(ids, np.uint32)))


@jax.jit
def fold(seed: jax.Array, ids: jax.Array) -> jax.Array:
  """`row_keys` of a seed and ids [R, P], both uint32."""
  key = jax.random.key(seed)
  return jax.vmap(lambda row: functools.reduce(jax.random.fold_in, list(row), key))(ids)

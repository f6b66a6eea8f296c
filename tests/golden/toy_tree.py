"""An endless tree whose priors and values are hashed from the path: the same for every searcher."""

import jax.numpy as jnp

TREES, ACTIONS, SIMULATIONS = 64, 5, 64


def roots():
  """States [TREES] uint32 of the roots."""
  return mix(jnp.arange(TREES, dtype=jnp.uint32))


def mix(x):
  """A hash of uint32 (Wellons' lowbias32)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def child(state, action):
  """State after an action."""
  return mix(state * jnp.uint32(ACTIONS) + jnp.asarray(action, jnp.uint32) + jnp.uint32(1))


def value(state):
  """In [0, 1), a multiple of 2^-16."""
  return (mix(state ^ jnp.uint32(0x9E3779B9)) >> 16).astype(jnp.float32) / 65536


def logits(state):
  """Of the actions, [..., ACTIONS] in [-2, 2)."""
  actions = jnp.arange(ACTIONS, dtype=jnp.uint32).reshape(*(1,) * state.ndim, -1)
  hashed = mix(child(state[..., None], actions) ^ jnp.uint32(0x85EBCA6B))
  return (hashed >> 16).astype(jnp.float32) / 16384 - 2

"""Prefixes gathered once for some tokens, or at every token; last line one JSON object.

    python benchmarks/paged.py [--rows 256] [--repeats 5]

The bundled base model reads 16 given tokens a row, one after the other as decoding does, behind
prefixes in a pool of keys and values. *Gather* is the library's way (`sampling/paged.py`): the
prefixes are copied into a contiguous cache, the tokens go there, and back into the pool at the end.
*Paged* is attention through the table, as XLA has it without a kernel of its own: every token takes
the keys and values of its path out of the pool, and its own go there. The two take turns, medians;
their states must agree.
"""

from __future__ import annotations

import argparse
import functools
import importlib.resources
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models import hf
from o1jax.sampling.cache import DecodeState, read_tokens
from o1jax.sampling.kv_pool import KvPool, empty_pool, gather, store
from o1jax.sampling.rows import NONE

NEW = 16  # as many as the library draws between two replacements
WIDTHS = (32, 64, 128, 256)  # tokens of a prefix


def read_one(model, params, state: DecodeState, tokens: jax.Array) -> DecodeState:
  """The state after one more token of every row."""
  valid = jax.lax.dynamic_update_slice(
    state.valid, jnp.ones((state.rows, 1), bool), (0, state.column)
  )
  hidden, cache = read_tokens(
    model, params, state.cache, tokens[:, None], state.position[:, None], state.column, valid
  )
  return DecodeState(cache, valid, state.position + 1, hidden[:, 0], state.column + 1)


def put(pool: KvPool, state: DecodeState, slots: jax.Array, first: jax.Array | int) -> KvPool:
  """The pool with the tokens [R, n] of the columns from `first` on in `slots`."""
  rows, count = slots.shape
  columns = jnp.tile(first + jnp.arange(count), rows)
  where = (jnp.repeat(jnp.arange(rows), count), columns, slots.reshape(-1))
  return store(pool, state, where, state.hidden, (jnp.arange(rows), jnp.arange(rows)))


@functools.partial(jax.jit, static_argnames='model', donate_argnames='pool')
def by_gather(model, params, pool: KvPool, table, tokens, slots):
  """Hidden states [R, D] after the tokens [R, n], and the pool with these in `slots`."""
  rows, width = table.shape
  state = gather(model, pool, table, jnp.zeros(rows, jnp.int32), new=tokens.shape[1])
  state = jax.lax.fori_loop(
    0, tokens.shape[1], lambda t, s: read_one(model, params, s, tokens[:, t]), state
  )
  return state.hidden, put(pool, state, slots, width)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='pool')
def by_page(model, params, pool: KvPool, table, tokens, slots):
  """The same, every token through the table."""
  rows, count = tokens.shape
  table = jnp.pad(table, ((0, 0), (0, count)), constant_values=NONE)

  def one(t, carry):
    pool, table, _ = carry
    state = gather(model, pool, table, jnp.zeros(rows, jnp.int32), new=1)
    column = state.column
    state = read_one(model, params, state, tokens[:, t])
    own = jax.lax.dynamic_slice_in_dim(slots, t, 1, axis=1)
    pool = put(pool, state, own, column)
    return (
      pool,
      jax.lax.dynamic_update_slice_in_dim(table, own, column - count + t, 1),
      state.hidden,
    )

  hidden = jnp.zeros((rows, model.config.hidden_size), pool.hidden.dtype)
  pool, _, hidden = jax.lax.fori_loop(0, count, one, (pool, table, hidden))
  return hidden, pool


def filled(model, slots: int, states: int) -> KvPool:
  """A pool in which no two tokens are alike."""
  keys = jax.random.key(0)
  return jax.tree.map(lambda x: jax.random.normal(keys, x.shape), empty_pool(model, slots, states))


def measure(model, params, rows: int, width: int, repeats: int) -> dict[str, float]:
  """Tokens a second both ways."""
  rng = np.random.default_rng(width)
  slots = rng.permutation(rows * (width + NEW)).astype(np.int32).reshape(rows, -1)
  table, own = slots[:, :width], slots[:, width:]
  tokens = rng.integers(3, model.config.vocab_size, (rows, NEW), dtype=np.int32)
  seconds: dict[str, list[float]] = {'gather': [], 'paged': []}
  for repeat in range(repeats + 1):  # the first compiles
    states = []
    for name, way in (('gather', by_gather), ('paged', by_page)):
      pool = jax.block_until_ready(filled(model, slots.size, rows))
      start = time.perf_counter()
      hidden, _ = jax.block_until_ready(way(model, params, pool, table, tokens, own))
      if repeat:
        seconds[name].append(time.perf_counter() - start)
      states.append(hidden)
    np.testing.assert_allclose(*states, atol=1e-4)
  found = {n: round(rows * NEW / statistics.median(s)) for n, s in seconds.items()}
  return found | {'gather_over_paged': round(found['gather'] / found['paged'], 2)}


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', type=int, default=256)
  parser.add_argument('--repeats', type=int, default=5)
  options = parser.parse_args()
  folder = pathlib.Path(str(importlib.resources.files('o1jax') / 'base_model'))
  model, params = hf.load(folder)
  found = {}
  print('| prefix | gather, tokens/s | paged, tokens/s | ratio |\n|---|---|---|---|')
  for width in WIDTHS:
    found[width] = measure(model, params, options.rows, width, options.repeats)
    print('|', ' | '.join(map(str, (width, *found[width].values()))), '|', flush=True)
  print(json.dumps({'benchmark': 'paged', 'rows': options.rows, 'tokens_per_s': found}))


if __name__ == '__main__':
  main()

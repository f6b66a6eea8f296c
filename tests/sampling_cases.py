"""A tiny model that ends steps and rows often, and its full forward: for tests of sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models import Model, ModelConfig
from o1jax.sampling.guided import StepIds

VOCAB, EOS, STEP_END, TERMINAL = 40, 1, 2, 3
STEPS = StepIds(step_end=STEP_END, terminal=TERMINAL, eos=EOS)
MAX_NEW = 12
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [17]]
MODEL = Model(
  ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=32,
  )
)


@functools.cache
def tiny_params():
  rng = np.random.default_rng(5)  # a model that ends steps and rows often, not always

  def fill(path, shape):
    norm = 'norm' in jax.tree_util.keystr(path)
    # Wide, so that the distributions are far from uniform.
    return jnp.asarray(norm + 0.3 * rng.normal(size=shape.shape), jnp.float32)

  params = jax.tree_util.tree_map_with_path(fill, MODEL.shapes())
  return params | {'embed': params['embed'].at[jnp.array([EOS, STEP_END, TERMINAL])].mul(2.5)}


def pad(rows, width):
  tokens = np.zeros((len(rows), width), np.int32)
  for r, row in enumerate(rows):
    tokens[r, : len(row)] = row
  return tokens, np.array([len(r) for r in rows], np.int32)


@functools.cache
def forward_of(width):
  """Of rows of token ids: log-probs [n, width, V] after each prefix, by the uncached forward."""

  @jax.jit
  def forward(tokens, positions, segments):
    hidden = MODEL.hidden(tiny_params(), tokens, positions, segments)
    return jax.nn.log_softmax(MODEL.logits(tiny_params(), hidden))

  def of(rows):
    tokens, lengths = pad(rows, width)
    at = np.broadcast_to(np.arange(width), tokens.shape)
    return np.asarray(forward(tokens, at, (at < lengths[:, None]).astype(np.int32)))

  return of

"""Training and decoding speed of the decoder, last line one JSON object.

    python benchmarks/model.py [--reference] [--shape small|wide] [--repeats 5]

Random weights of the embedded default's size on whatever device JAX finds.
`--reference` runs transformers + torch (the `parity` extra) on the same shapes
in the same process. Best of the repeats, in generated or trained tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from o1jax.models import Model, ModelConfig, hf

SHAPES = {
  # The embedded default's neighbourhood, and the wider model of the first baseline.
  'small': ModelConfig(1024, 96, 3, 4, 1, 256, head_dim=24),
  'wide': ModelConfig(512, 128, 4, 4, 4, 352),
}
PROMPT, NEW = 48, 96
TRAIN_ROWS, TRAIN_TOKENS = 64, 96


def best_of(repeats, function):
  """Seconds of the fastest call, the first (compiling) one left out."""
  jax.block_until_ready(function())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def greedy(logits):
  """argmax [R, V] -> [R]; two plain passes, since XLA's CPU argmax is scalar."""
  best = logits == logits.max(-1, keepdims=True)
  return jnp.where(best, jnp.arange(logits.shape[-1])[None], logits.shape[-1]).min(-1)


def make_decode(model, rows):
  columns = PROMPT + NEW

  @jax.jit
  def generate(params, prompt):
    positions = jnp.tile(jnp.arange(PROMPT)[None], (rows, 1))
    valid = jnp.tile(jnp.arange(columns)[None] < PROMPT, (rows, 1))
    cache = model.empty_cache(rows, columns)
    hidden, cache = model.extend(params, cache, prompt, positions, jnp.int32(0), valid)
    first = greedy(model.logits(params, hidden[:, -1]))

    def step(i, carry):
      cache, valid, token, out = carry
      valid = valid | (jnp.arange(columns)[None] == PROMPT + i)
      position = jnp.full((rows, 1), PROMPT + i)
      hidden, cache = model.extend(params, cache, token[:, None], position, PROMPT + i, valid)
      out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], i, axis=1)
      return cache, valid, greedy(model.logits(params, hidden[:, 0])), out

    carry = (cache, valid, first, jnp.zeros((rows, NEW), jnp.int32))
    return jax.lax.fori_loop(0, NEW, step, carry)[-1]

  return generate


def make_train(model, tx):
  def loss(params, tokens, positions, segments):
    hidden = model.hidden(params, tokens, positions, segments)
    logits = model.logits(params, hidden[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

  @jax.jit
  def step(params, state, tokens):
    positions = jnp.tile(jnp.arange(tokens.shape[1])[None], (tokens.shape[0], 1))
    value, grads = jax.value_and_grad(loss)(params, tokens, positions, jnp.ones_like(tokens))
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  return step


def measure(model, params, repeats):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.integers(3, model.config.vocab_size, shape), jnp.int32)

  result = {}
  for rows in (16, 128, 512):
    generate, prompt = make_decode(model, rows), draw(rows, PROMPT)
    seconds = best_of(repeats, lambda g=generate, p=prompt: g(params, p))
    result[f'decode{rows}_tokens_per_s'] = rows * NEW / seconds
  tx = optax.adamw(1e-3)
  step, tokens, state = make_train(model, tx), draw(TRAIN_ROWS, TRAIN_TOKENS), tx.init(params)
  seconds = best_of(3 * repeats, lambda: step(params, state, tokens))
  result['train_tokens_per_s'] = TRAIN_ROWS * TRAIN_TOKENS / seconds
  return result


def measure_reference(model, params, repeats):
  """The same work by transformers on torch, from the same weights."""
  import torch
  import transformers

  with tempfile.TemporaryDirectory() as folder:
    hf.save(folder, model, params)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
  rng, result = np.random.default_rng(0), {}

  def draw(*shape):
    return torch.from_numpy(rng.integers(3, model.config.vocab_size, shape))

  def generate(prompt):
    return reference.generate(
      prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
    )

  for rows in (16, 128, 512):
    prompt = draw(rows, PROMPT)
    seconds = best_of(repeats, lambda p=prompt: generate(p))
    result[f'reference_decode{rows}_tokens_per_s'] = rows * NEW / seconds
  optimizer, tokens = torch.optim.AdamW(reference.parameters()), draw(TRAIN_ROWS, TRAIN_TOKENS)

  def step():
    optimizer.zero_grad()
    reference(tokens, labels=tokens).loss.backward()
    optimizer.step()

  seconds = best_of(repeats, step)
  result['reference_train_tokens_per_s'] = TRAIN_ROWS * TRAIN_TOKENS / seconds
  return result


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shape', choices=SHAPES, default='wide')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--reference', action='store_true', help='also run transformers + torch')
  args = parser.parse_args()
  model = Model(SHAPES[args.shape])
  params = jax.jit(model.init)(jax.random.key(0))
  result = {'shape': args.shape, 'parameters': sum(p.size for p in jax.tree.leaves(params))}
  result |= {'device': jax.devices()[0].device_kind, 'cores': os.cpu_count()}
  result |= measure(model, params, args.repeats)
  if args.reference:
    result |= measure_reference(model, params, args.repeats)
  print(json.dumps({k: round(v) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == '__main__':
  main()

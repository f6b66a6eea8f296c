"""Training and decoding speed of the decoder, last line one JSON object.

    python benchmarks/model.py [--reference] [--shape base|wide] [--repeats 5] [--data 1]

Random weights of the bundled base model's size on whatever device JAX finds, by the library's own
prefill, decoding loop and train step (SFT, AdamW behind a gradient clip), rows over `--data`
devices: on a CPU what `mesh.data` of a run starts, -1 one for each core.
`--reference` runs transformers + torch (the `parity` extra) on the same shapes
in the same process, case by case. Best of the repeats, in generated or trained tokens a
second. `--cpu` counts seconds of CPU instead of the clock's: on one core (`taskset -c 0`) they
compare on a busy machine too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from o1jax import cli
from o1jax.batch import TokenBatch
from o1jax.learn.objectives import sft_loss
from o1jax.learn.optim import make_optimizer
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.models import Model, ModelConfig, hf
from o1jax.parallel.ambient import spread
from o1jax.parallel.mesh import make_mesh, start_cpu_devices
from o1jax.parallel.sharding import param_shardings, shard
from o1jax.sampling.cache import prefill
from o1jax.sampling.decode import decode
from o1jax.sampling.draw import GREEDY

SHAPES = {
  # That of the bundled base model, and the wider one of the first baseline.
  'base': ModelConfig(949, 96, 3, 4, 1, 288, head_dim=24),
  'wide': ModelConfig(512, 128, 4, 4, 4, 352),
}
PROMPT, NEW, DECODE_ROWS = 48, 96, (16, 128)
TRAIN_ROWS, TRAIN_TOKENS = 64, 96
PAUSE_S = 0.5


def generate(model, params, prompt, keys):
  """NEW greedy tokens after each prompt, [R, NEW]."""
  lengths = np.full(len(prompt), prompt.shape[1], np.int32)
  state = prefill(model, params, prompt, lengths, columns=PROMPT + NEW)
  return decode(model, params, state, keys, max_new=NEW, stop_ids=(), how=GREEDY).tokens


def trainer(model, params, tokens):
  """Train steps on one batch, one a call."""
  tx = make_optimizer(1e-3, steps=10**6, schedule='constant')
  update = make_update(sft_loss(model), tx)
  state = init_state(jax.tree.map(jnp.copy, params), tx)
  place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  one = np.ones_like(tokens)
  batch = spread(TokenBatch(tokens, place, one, one.astype(np.float32)))

  def step():
    nonlocal state
    state, metrics = update(state, batch)
    return metrics

  return step


def ours(model, params):
  """Name -> (tokens, a function that generates or trains on so many)."""
  rng, cases = np.random.default_rng(0), {}

  def draw(*shape):
    return rng.integers(3, model.config.vocab_size, shape).astype(np.int32)

  for rows in DECODE_ROWS:
    prompt, keys = spread(draw(rows, PROMPT)), jax.random.split(jax.random.key(0), rows)
    function = functools.partial(generate, model, params, prompt, keys)
    cases[f'decode{rows}_tokens_per_s'] = rows * NEW, function
  step = trainer(model, params, draw(TRAIN_ROWS, TRAIN_TOKENS))
  return cases | {'train_tokens_per_s': (TRAIN_ROWS * TRAIN_TOKENS, step)}


def reference(model, params):
  """The same work by transformers on torch, from the same weights."""
  import torch
  import transformers

  with tempfile.TemporaryDirectory() as folder:
    hf.save(folder, model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  rng, cases = np.random.default_rng(0), {}

  def draw(*shape):
    return torch.from_numpy(rng.integers(3, model.config.vocab_size, shape))

  greedy = {'max_new_tokens': NEW, 'min_new_tokens': NEW, 'do_sample': False, 'pad_token_id': 0}
  for rows in DECODE_ROWS:
    function = functools.partial(theirs.generate, draw(rows, PROMPT), **greedy)
    cases[f'reference_decode{rows}_tokens_per_s'] = rows * NEW, function
  optimizer, tokens = torch.optim.AdamW(theirs.parameters()), draw(TRAIN_ROWS, TRAIN_TOKENS)

  def step():
    optimizer.zero_grad()
    theirs(tokens, labels=tokens).loss.backward()
    optimizer.step()

  return cases | {'reference_train_tokens_per_s': (TRAIN_ROWS * TRAIN_TOKENS, step)}


def measure(cases, repeats, clock):
  """Tokens a second of each case, the fastest of all repeats.

  The repeats of a case follow one another, and all cases come twice. Between cases is a pause: for
  a fifth of a second behind a call torch's threads wait at full speed, and take a core from what
  comes then.
  """
  seconds = dict.fromkeys(cases, float('inf'))
  for name, (_, function) in [*cases.items(), *cases.items()]:
    time.sleep(PAUSE_S)
    jax.block_until_ready(function())  # the first compiles
    for _ in range(repeats):
      start = clock()
      jax.block_until_ready(function())
      seconds[name] = min(seconds[name], clock() - start)
  return {name: round(tokens / seconds[name]) for name, (tokens, _) in cases.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shape', choices=SHAPES, default='base')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--data', type=int, default=1, help='devices; -1: all, or one for each core')
  parser.add_argument('--cpu', action='store_true', help='seconds of CPU, not of the clock')
  parser.add_argument('--reference', action='store_true', help='also run transformers + torch')
  args = parser.parse_args()
  start_cpu_devices({'data': args.data})
  model, mesh = Model(SHAPES[args.shape]), make_mesh({'data': args.data})
  params = jax.jit(model.init)(jax.random.key(0))
  result = {'shape': args.shape, 'parameters': sum(p.size for p in jax.tree.leaves(params))}
  result |= {'device': jax.devices()[0].device_kind, 'devices': mesh.size, 'cores': os.cpu_count()}
  with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
    placed = shard(params, param_shardings(mesh, model, params)) if mesh.size > 1 else params
    cases = ours(model, placed) | (reference(model, params) if args.reference else {})
    result |= measure(cases, args.repeats, time.process_time if args.cpu else time.perf_counter)
  print(json.dumps(result))


if __name__ == '__main__':
  cli.restart_with_huge_pages()
  main()

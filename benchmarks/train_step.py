"""Speed of a training step for each loss, beside torch + transformers; last line one JSON object.

    python benchmarks/train_step.py [--shape base|wide] [--rows 32] [--tokens 128] [--repeats 9]
      [--data 1]

One model with random weights, one batch a loss, AdamW behind a gradient clip on both sides,
float32, each side in a process of its own, with huge pages as training has; our rows lie over
`--data` devices, as in model.py. The first loss of both must agree, or nothing is measured. Then
the two take turns, each of many steps in a row as in training, and the median of the repeats
counts, in seconds of the clock, or with `--cpu` of CPU, which on one core (`taskset -c 0`) compare
on a busy machine too. `tokens_per_s` are tokens that the trunk reads (both sides of a preference
pair). `--no-reference` leaves torch (the `parity` extra) out.

`peak_bytes` is what XLA plans for the step on a device: its arguments, results that do not take the
place of arguments, and temporaries. `minimum_bytes` is what no such step can do without on one:
parameters, two moments and a gradient of 4 bytes each, the batch, and the input of every layer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np
import train_step_torch
from model import SHAPES

from o1jax import cli
from o1jax.batch import PairBatch, RolloutBatch, StepBatch, TokenBatch
from o1jax.learn import objectives, optim
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.models import Model, ScalarHead, StepHead, hf
from o1jax.parallel.ambient import spread
from o1jax.parallel.mesh import make_mesh, start_cpu_devices
from o1jax.parallel.sharding import param_shardings, shard

STEPS = 4  # reasoning steps of a row
LR, BETA, PAUSE_S = 1e-4, 0.1, 0.3
TURN = 20  # steps in a row: the first ones behind a pause find caches and memory cold
WARM_TURNS = 2  # not counted: threads, caches and pages of the process settle


@dataclasses.dataclass(frozen=True)
class Case:
  """A loss with what it trains and what it reads."""

  loss_fn: Callable | None
  params: Any
  batch: Any


def token_batch(rng, vocab, rows, tokens) -> TokenBatch:
  """Random rows without padding; the first quarter of each is the prompt."""
  ids = rng.integers(3, vocab, (rows, tokens)).astype(np.int32)
  place = np.broadcast_to(np.arange(tokens, dtype=np.int32), ids.shape).copy()
  return TokenBatch(ids, place, np.ones_like(ids), (place >= tokens // 4).astype(np.float32))


def step_ids_of(plain: TokenBatch) -> np.ndarray:
  counted = plain.loss_mask.cumsum(axis=1) - 1
  length = -(-int(plain.loss_mask[0].sum()) // STEPS)
  return ((counted // length + 1) * plain.loss_mask).astype(np.int32)


def rollout_batch(rng, plain: TokenBatch) -> RolloutBatch:
  mask = plain.loss_mask
  # Near what a policy with random weights says, so that the ratio is clipped here and there.
  usual = -np.log(plain.tokens.max())
  near = lambda mean: (mask * rng.normal(mean, 0.2, mask.shape)).astype(np.float32)  # noqa: E731
  floats = [near(usual), near(usual), near(0), near(0), near(0)]
  rows = np.zeros(len(mask))
  return RolloutBatch(
    *(plain.tokens, plain.positions, plain.segments, step_ids_of(plain), mask),
    *floats,
    rows.astype(np.float32),
    rows.astype(np.int32),
  )


def step_batch(rng, plain: TokenBatch) -> StepBatch:
  rows = len(plain.tokens)
  labels = rng.random((rows, STEPS)).astype(np.float32)
  first = np.arange(0, rows - 1, 2)
  pairs = np.stack([first, first + 1, rng.integers(1, STEPS + 1, len(first))], axis=1)
  return StepBatch(
    *(plain.tokens, plain.positions, plain.segments, step_ids_of(plain)),
    *(labels, np.ones_like(labels), pairs.astype(np.int32), np.ones(len(first), np.float32)),
  )


def make_cases(model: Model, params: Any, rows: int, tokens: int) -> dict[str, Case]:
  rng, vocab = np.random.default_rng(0), model.config.vocab_size
  draw = functools.partial(token_batch, rng, vocab, rows, tokens)
  refs = -np.log(vocab) * tokens * np.ones((2, rows), np.float32)
  key = jax.random.key(1)
  head = jax.tree.map(lambda x: 0.02 * jax.random.normal(key, x.shape), StepHead.init(model.config))
  value_fn = objectives.value_on_policy
  ppo = objectives.ppo_loss(model, kl_coef=0.1, value_fn=value_fn)
  critic = ScalarHead.init(model.config)
  return {
    'sft': Case(objectives.sft_loss(model), params, draw()),
    'ppo': Case(ppo, {'policy': params, 'critic': critic}, rollout_batch(rng, draw())),
    'dpo': Case(
      objectives.dpo_loss(model, BETA, nll=1.0), params, PairBatch(draw(), draw(), *refs)
    ),
    'prm': Case(
      objectives.prm_loss(model), {'trunk': params, 'head': head}, step_batch(rng, draw())
    ),
  }


def tokens_of(batch: Any) -> int:
  if isinstance(batch, PairBatch):
    return batch.chosen.tokens.size + batch.rejected.tokens.size
  return batch.tokens.size


def memory(update, state, batch, model: Model) -> dict[str, int]:
  plan = update.lower(state, batch).compile().memory_analysis()
  kept = plan.output_size_in_bytes - plan.alias_size_in_bytes
  peak = plan.argument_size_in_bytes + kept + plan.temp_size_in_bytes
  weights = sum(x.size for x in jax.tree.leaves(state.params))
  read = sum(x.nbytes for x in jax.tree.leaves(batch))
  layers = 4 * tokens_of(batch) * model.config.hidden_size * (model.config.num_layers + 1)
  return {'peak_bytes': peak, 'minimum_bytes': 16 * weights + read + layers}


def measure(
  name: str, case: Case, model: Model, repeats: int, clock: Callable[[], float], reference
) -> dict[str, float]:
  """Medians of our step and of the reference's, which take turns; see `train_step_torch.running`.

  Before a turn is a pause: for a fifth of a second behind a call torch's threads wait at full
  speed, and would take a core from our steps.
  """
  tx = optim.make_optimizer(
    LR, steps=10**6, schedule='constant', weight_decay=0.01, b1=0.9, b2=0.999
  )
  update = make_update(case.loss_fn, tx)
  params, mesh = jax.tree.map(jax.numpy.copy, case.params), jax.sharding.get_mesh()
  if not mesh.empty:
    params = shard(params, param_shardings(mesh, model, params))
  state, batch = init_state(params, tx), jax.device_put(spread(case.batch))
  row = memory(update, state, batch, model)
  state, metrics = update(state, batch)
  if reference is not None:
    plain = jax.tree.map(np.asarray, (case.params, case.batch))
    theirs, ours = asked(reference, (name, Case(None, *plain))), float(metrics['loss'])
    if abs(theirs - ours) > 1e-3 * max(1.0, abs(ours)):
      raise ValueError(f'{name}: our loss is {ours}, that of the reference {theirs}: not the same')

  def turn() -> float:
    nonlocal state
    start = clock()
    for _ in range(TURN):
      state, metrics = update(state, batch)
      jax.block_until_ready((state, metrics))
    return clock() - start

  sides = {'': turn}
  if reference is not None:
    sides['reference_'] = lambda: asked(reference, TURN)
  seconds: dict[str, list[float]] = {side: [] for side in sides}
  for _ in range(WARM_TURNS + repeats):
    for side, once in sides.items():
      time.sleep(PAUSE_S if reference is not None else 0)
      seconds[side].append(once() / TURN)
  for side, times in seconds.items():
    counted = statistics.median(times[WARM_TURNS:])
    row[f'{side}tokens_per_s'] = round(tokens_of(case.batch) / counted)
  return row


def asked(reference: Connection, question: Any) -> float:
  reference.send(question)
  return reference.recv()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shape', choices=SHAPES, default='base')
  parser.add_argument('--rows', type=int, default=32)
  parser.add_argument('--tokens', type=int, default=128)
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--data', type=int, default=1, help='devices; -1: all, or one for each core')
  parser.add_argument('--cpu', action='store_true', help='seconds of CPU, not of the clock')
  parser.add_argument('--no-reference', action='store_true', help='leave torch out')
  args = parser.parse_args()
  clock = time.process_time if args.cpu else time.perf_counter
  start_cpu_devices({'data': args.data})
  devices = jax.devices()[: args.data] if args.data > 0 else None
  model, mesh = Model(SHAPES[args.shape]), make_mesh({'data': args.data}, devices)
  params = jax.jit(model.init)(jax.random.key(0))
  result = {'shape': args.shape, 'rows': args.rows, 'tokens': args.tokens}
  result |= {'device': jax.devices()[0].device_kind, 'devices': mesh.size, 'cores': os.cpu_count()}
  ambient = jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()
  with ambient, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    hf.save(folder, model, params)
    reference = None
    if not args.no_reference:
      theirs = train_step_torch.running(folder, cpu=args.cpu, lr=LR, beta=BETA)
      reference = stack.enter_context(theirs)
    for name, case in make_cases(model, params, args.rows, args.tokens).items():
      result[name] = measure(name, case, model, args.repeats, clock, reference)
      print(name, result[name], flush=True)
  print(json.dumps(result))


if __name__ == '__main__':
  cli.restart_with_huge_pages()
  main()

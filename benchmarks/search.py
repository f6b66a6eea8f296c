"""Tree search: the released way, prefixes recomputed, and the pool; last line one JSON object.

    python benchmarks/search.py [--problems 64] [--depth 8] [--growth] [--no-reference]

The bundled base model searches problems of the train split from a depth of `--depth` steps: each
tree begins at a prompt and steps that the model wrote before. All ways sample K = 4 steps of every
chosen leaf. Ours and `recompute` (b) value them by a PRM (the policy's log-probabilities, as a PRM
begins) and run the programs in the sandbox; they differ in nothing but that (b) reads every prefix
again, the PRM's too. `released` (a) is transformers' `generate` on torch (the `parity` extra), one
step of one problem a call, its prefix re-read, without PRM and sandbox. Each way is compiled by a
first run that is not timed. `roll-outs` are the same search with every step rolled out to its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import json
import os
import pathlib
import random
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np

from o1jax.data.paths import PathEncoder
from o1jax.data.problems import load_split
from o1jax.data.tokens import Tokenizer
from o1jax.models import StepHead, hf
from o1jax.sampling import PrmScorer, Sampler, Search, StepIds, TreeScorer
from o1jax.sampling.sampler import pad_prompts
from o1jax.sandbox.pool import Pool
from o1jax.search import puct
from o1jax.stages.execute import Executor

CHILDREN, SIMULATIONS, ROWS, MAX_NEW = 4, 6, 256, 64
REFERENCE_S = 15  # seconds of the released way, which is measured by its rate


class Case:
  """The bundled model and its problems, each with a prefix of some steps."""

  def __init__(self, problems: int, pool: Pool):
    self.folder = pathlib.Path(str(importlib.resources.files('o1jax') / 'base_model'))
    self.model, self.params = hf.load(self.folder)
    self.tokenizer = Tokenizer(self.folder)
    self.encoder = PathEncoder(self.tokenizer)
    ids = self.tokenizer
    self.steps = StepIds(ids.step_end_id, ids.action_ids[2], ids.eos_id)
    self.problems = load_split('embedded', 'train', problems, seed=0)
    self.prompts = [self.encoder.prompt(p) for p in self.problems]
    self.executor = Executor(pool)
    self.prm = {'trunk': self.params, 'head': StepHead.init(self.model.config)}
    self.sampler = Sampler(self.model, MAX_NEW, (ids.eos_id,), rows=ROWS)
    self.written = self._write_steps()

  def _write_steps(self) -> list[tuple[int, ...]]:
    """Steps that the model writes, none of them terminal."""
    sampler = dataclasses.replace(self.sampler, stop_ids=self.steps.stops)
    found = sampler(self.params, self.prompts[:32], samples=4)
    steps = [tuple(found.ids(r)) for r in range(len(found.lengths)) if found.stopped[r]]
    return [s for s in steps if not self.steps.is_terminal(s)]

  def prefixes(self, count: int, depth: int) -> list[tuple[int, ...]]:
    """Prompts with `depth` - 1 steps after them: what is sampled next is step `depth`."""
    rng = random.Random(depth)
    chosen = [self.prompts[i % len(self.prompts)] for i in range(count)]
    return [sum(rng.choices(self.written, k=depth - 1), p) for p in chosen]

  def judge(self, jobs) -> list[float]:
    paths = [self.encoder.steps_of(tokens) for _, tokens in jobs]
    problems = [self.problems[i % len(self.problems)] for i, _ in jobs]
    verdicts = self.executor.judge(problems, paths)
    return [float('nan') if v is None or v.masked else v.pass_rate for v in verdicts]


def reread(sampler: Sampler, paths, todo, *, seed, ids, marks, keep):
  """`continue_paths` without a pool: each leaf's prefix is read for its K rows together."""
  del marks, keep
  leaves = list(dict.fromkeys(todo))
  prompts = [[*paths.prompts[p[0]], *sum(p[1:], ())] for p in leaves]
  names = ids[:: len(todo) // len(leaves), :-1]
  each = len(todo) // len(leaves)
  return sampler(paths.params, prompts, seed=seed, ids=names, samples=each)


def rescore(case: Case, prompts):
  """`TreeScorer` without a pool: the PRM reads the prefix of every leaf, then the steps."""
  scorer, computed = PrmScorer(case.model, case.prm), [0]

  def score(paths) -> np.ndarray:
    leaves = list(dict.fromkeys(p[:-1] for p in paths))
    index = {leaf: i for i, leaf in enumerate(leaves)}
    tokens, lengths = pad_prompts([[*prompts[p[0]], *sum(p[1:], ())] for p in leaves], len(leaves))
    state = scorer.start(tokens, lengths)
    steps = [p[-1] for p in paths]
    computed[0] += tokens.size + sum(map(len, steps))
    log_odds = scorer.score(state, np.array([index[p[:-1]] for p in paths]), steps)
    return 1 / (1 + np.exp(-log_odds))

  return score, lambda: computed[0]


def measure(
  case: Case, prompts, *, pool: bool, mix: float = 1.0, simulations: int = SIMULATIONS
) -> dict[str, float]:
  """Figures of one search, the second of two."""
  search = Search(
    case.sampler,
    case.steps,
    width=CHILDREN,
    simulations=simulations,
    max_depth=32,
    rule=puct,
    mix=mix,
  )
  if not pool:
    search = dataclasses.replace(search, extend=reread)
  for timed in (False, True):
    case.executor = Executor(case.executor._pool)  # it remembers no program
    case.executor.judge(case.problems, [()] * len(case.problems))  # the references' times
    score, read = rescore(case, prompts)
    if pool:
      tokens = sum(map(len, prompts)) + 32 * CHILDREN * simulations * len(prompts)
      nodes = len(prompts) * (1 + CHILDREN * simulations)
      score = TreeScorer(case.model, case.prm, prompts, case.steps, tokens=tokens, nodes=nodes)
      read = lambda score=score: score.paths.computed  # noqa: E731
    start = time.perf_counter()
    forest = search(case.params, prompts, case.judge, score=score if mix else None, seed=timed)
    seconds = time.perf_counter() - start
  drawn = int((forest.tree.size - 1).sum())
  new = sum(map(len, prompts)) + forest.generated
  return {
    'nodes': drawn,
    'seconds': round(seconds, 3),
    'nodes_per_s': round(drawn / seconds, 1),
    'new_tokens_per_s': round(forest.generated / seconds),
    'computed_per_new_token': round(forest.computed / new, 3),
    'prm_computed': read(),
    'read_again': forest.read_again,
    'sandbox_wait_share': round(forest.waited_s / seconds, 4),
    'select_backup_share': round(forest.tree_s / seconds, 4),
  }


def released(case: Case, prompts) -> dict[str, float] | None:
  """Nodes a second of transformers' generate, one step of one problem a call."""
  try:
    import torch
    import transformers
  except ImportError:
    return None
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_pretrained(case.folder).eval()

  def child(prompt):
    ids = torch.tensor([prompt])
    return model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=True,
      max_new_tokens=MAX_NEW,
      eos_token_id=list(case.steps.stops),
      pad_token_id=0,
    )

  child(prompts[0])
  nodes, start = 0, time.perf_counter()
  while time.perf_counter() - start < REFERENCE_S:
    child(prompts[nodes // CHILDREN % len(prompts)])
    nodes += 1
  return {'nodes_per_s': round(nodes / (time.perf_counter() - start), 2), 'nodes': nodes}


def peak_bytes() -> int:
  """Of the device, or on a CPU of the process."""
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats['peak_bytes_in_use']
  status = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in status if line.startswith('VmHWM'))


def show(name: str, figures) -> None:
  print(name, json.dumps(figures), file=sys.stderr, flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--problems', type=int, default=64)
  parser.add_argument('--depth', type=int, default=8)
  parser.add_argument('--simulations', type=int, default=SIMULATIONS)
  parser.add_argument('--growth', action='store_true', help='over B and depth; roll-outs')
  parser.add_argument('--no-reference', action='store_true', help='without transformers')
  args = parser.parse_args()
  with Pool() as pool:
    case = Case(args.problems, pool)
    prompts = case.prefixes(args.problems, args.depth)
    settings = {'simulations': args.simulations}
    ours = measure(case, prompts, pool=True, **settings)
    ours['peak_bytes'] = peak_bytes()
    show('ours', ours)
    show('recompute', recompute := measure(case, prompts, pool=False, **settings))
    if args.growth:
      show('ours, roll-outs', measure(case, prompts, pool=True, mix=0.0))
      show('recompute, roll-outs', measure(case, prompts, pool=False, mix=0.0))
      for count in (1, 16, 256):
        show(f'ours, B={count}', measure(case, case.prefixes(count, args.depth), pool=True))
      for depth in (2, 4, 12):
        show(f'ours, depth={depth}', measure(case, case.prefixes(64, depth), pool=True))
    reference = None if args.no_reference else released(case, prompts)
    show('released', reference)
  ours |= {
    'recompute_nodes_per_s': recompute['nodes_per_s'],
    'recompute_computed_per_new_token': recompute['computed_per_new_token'],
    'released_nodes_per_s': reference and reference['nodes_per_s'],
  }
  print(json.dumps(ours))


if __name__ == '__main__':
  main()

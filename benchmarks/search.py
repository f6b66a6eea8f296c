"""Tree search: the released way, prefixes recomputed, and the pool; last line one JSON object.

    python benchmarks/search.py [--problems 64] [--depth 8] [--growth] [--no-reference]

The bundled base model searches problems of the train split from a depth of `--depth` steps: each
tree begins at a prompt and steps that the model wrote before. All ways sample K = 4 steps of every
chosen leaf. Ours and `recompute` (b) value them by a PRM (the policy's log-probabilities, as a PRM
begins) and run the programs in the sandbox; (b) reads every prefix again, the PRM's too, and does
not replace rows that have stopped. `released` (a) is transformers' `generate` on torch (the extra
`parity`), one step of one problem a call, its prefix read again, without PRM and sandbox; and the
same with the PRM, which reads prefix and step again as a call of its own.
`roll-outs` are ours and (b) with every step rolled out to its end, without PRM.

Each search is compiled by a run that is not timed; then the ways take turns, and the fastest of
`--repeats` runs stands. A node is a step that was sampled, K for each leaf that is expanded, as the
released code has them; `distinct` are those that are left where equal siblings are merged, which
it does not do. New tokens are prompts, once, and tokens drawn; tokens computed are those that the
policy read or drew; positions are those, padding, and rows that have stopped. The share of
selection, expansion and backup is that of a run whose halves grow in turn, so that no half's
selection waits for the other's products.
"""

from __future__ import annotations

import argparse
import contextlib
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
import psutil

from o1jax.data.paths import PathEncoder
from o1jax.data.problems import load_split
from o1jax.data.tokens import Tokenizer
from o1jax.models import StepHead, hf
from o1jax.sampling import PrmScorer, Sampler, Search, StepIds, TreeScorer
from o1jax.sampling.paged import continue_paths
from o1jax.sampling.sampler import pad_prompts
from o1jax.sandbox.pool import Pool
from o1jax.search import puct
from o1jax.stages.execute import Executor

CHILDREN, SIMULATIONS, ROWS, MAX_NEW = 4, 6, 256, 64
POOL_TOKENS = 16  # that the pools hold of every node, whose steps have four in the mean
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
    self.pool, self.judged = pool, 0
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

  def forget_programs(self) -> None:
    """Programs run anew; how long the references take stays known."""
    self.executor, self.judged = Executor(self.pool), 0
    self.executor.judge(self.problems, [()] * len(self.problems))

  def judge(self, jobs) -> list[float]:
    self.judged += len(jobs)
    paths = (self.encoder.steps_of(tokens) for _, tokens in jobs)
    problems = [self.problems[i % len(self.problems)] for i, _ in jobs]
    verdicts = self.executor.judge(problems, paths)
    return [float('nan') if v is None or v.masked else v.pass_rate for v in verdicts]


class Continued:
  """`continue_paths`, its rows counted."""

  def __init__(self):
    self.steps: list[int] = []  # sampled, a number a call (which may come from two threads)
    self.read: list[int] = []  # tokens of prefixes read again, likewise

  def __call__(self, sampler: Sampler, paths, todo, **settings):
    self.steps.append(len(todo))
    return continue_paths(sampler, paths, todo, **settings)


class Reread(Continued):
  """The same without a pool: each leaf's prefix is read for its K rows together."""

  def __call__(self, sampler: Sampler, paths, todo, *, seed, ids, marks, keep):
    del marks, keep
    self.steps.append(len(todo))
    leaves = list(dict.fromkeys(todo))
    each = len(todo) // len(leaves)
    prompts = [[*paths.prompts[p[0]], *sum(p[1:], ())] for p in leaves]
    self.read.append(sum(map(len, prompts)))
    return sampler(paths.params, prompts, seed=seed, ids=ids[::each, :-1], samples=each)


def rescore(case: Case, prompts):
  """`TreeScorer` without a pool: the PRM reads the prefix of every leaf, then the steps."""
  scorer, computed = PrmScorer(case.model, case.prm), []

  def score(paths) -> np.ndarray:
    leaves = list(dict.fromkeys(p[:-1] for p in paths))
    index = {leaf: i for i, leaf in enumerate(leaves)}
    tokens, lengths = pad_prompts([[*prompts[p[0]], *sum(p[1:], ())] for p in leaves], len(leaves))
    state = scorer.start(tokens, lengths)
    steps = [p[-1] for p in paths]
    computed.append(tokens.size + sum(map(len, steps)))
    log_odds = scorer.score(state, np.array([index[p[:-1]] for p in paths]), steps)
    return 1 / (1 + np.exp(-log_odds))

  return score, lambda: sum(computed)


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to search; a call is one search from the start."""

  case: Case
  prompts: list[tuple[int, ...]]
  pool: bool
  mix: float = 1.0
  overlap: bool = True

  def __call__(self, seed: int) -> dict[str, float]:
    case, prompts = self.case, self.prompts
    extend = Continued() if self.pool else Reread()
    most = len(prompts) * (1 + CHILDREN * SIMULATIONS)
    tokens = sum(map(len, prompts)) + POOL_TOKENS * most
    search = Search(
      case.sampler,
      case.steps,
      width=CHILDREN,
      simulations=SIMULATIONS,
      max_depth=32,
      rule=puct,
      mix=self.mix,
      pool_tokens=tokens if self.mix else 0,
      overlap=self.overlap,
      extend=extend,
    )
    score, prm_positions = rescore(case, prompts)
    if self.pool:
      score = TreeScorer(case.model, case.prm, prompts, case.steps, tokens=tokens, nodes=most)
      prm_positions = lambda: sum(p.computed for p in score.pools)  # noqa: E731
    case.forget_programs()
    score = score if self.mix else None
    start, used = time.perf_counter(), cpu_seconds()
    forest = search(case.params, prompts, case.judge, score=score, seed=seed)
    seconds = time.perf_counter() - start
    own, sandbox = np.subtract(cpu_seconds(), used)
    nodes, read = sum(extend.steps), sum(map(len, prompts))
    distinct = int((forest.tree.size - 1).sum())
    new = read + forest.generated
    computed = new + forest.read_again if self.pool else sum(extend.read) + forest.generated
    return {
      'nodes': nodes,
      'programs': case.judged,
      'seconds': round(seconds, 3),
      'nodes_per_s': round(nodes / seconds, 1),
      'distinct': distinct,
      'distinct_per_s': round(distinct / seconds, 1),
      'new_tokens_per_s': round(forest.generated / seconds),
      'computed_per_new_token': round(computed / new, 3),
      'positions_per_new_token': round(forest.computed / new, 3),
      'prm_positions_per_new_token': round(prm_positions() / new, 3) if self.mix else None,
      'sandbox_wait_share': round(forest.waited_s / seconds, 4),
      'select_backup_share': round(forest.tree_s / seconds, 4),
      'cpu_s': round(own, 2),
      'sandbox_cpu_s': round(sandbox, 2),
    }


def cpu_seconds() -> tuple[float, float]:
  """CPU seconds of this process, and of the sandbox's workers with all that they ran."""
  own, rest = psutil.Process(), 0.0
  for worker in own.children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):
      rest += sum(worker.cpu_times()[:4])  # user, system, and those of children that have ended
  return sum(own.cpu_times()[:2]), rest


def fastest(repeats: int, *ways: Way) -> list[dict[str, float]]:
  """The fastest of the runs of each, which take turns; all search the same trees."""
  for way in ways:
    way(seed=0)
  runs = [[way(seed=0) for way in ways] for _ in range(repeats)]
  return [min(found, key=lambda run: run['seconds']) for found in zip(*runs, strict=True)]


def released(case: Case, prompts, scored: bool) -> dict[str, float] | None:
  """Nodes a second of transformers' generate, one step of one problem a call.

  With `scored` the log-probability of every step is computed too, in a call of its own.
  """
  try:
    import torch
    import transformers
  except ImportError:
    return None
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_pretrained(case.folder).eval()

  def child(prompt):
    ids = torch.tensor([prompt])
    whole = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=True,
      max_new_tokens=MAX_NEW,
      eos_token_id=list(case.steps.stops),
      pad_token_id=0,
    )
    if scored:
      with torch.inference_mode():
        logprobs = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logprobs.gather(-1, whole[0, len(prompt) :, None]).sum().item()

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
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--growth', action='store_true', help='over B and depth; roll-outs')
  parser.add_argument('--no-reference', action='store_true', help='without transformers')
  args = parser.parse_args()
  with Pool() as pool:
    case = Case(args.problems, pool)
    prompts = case.prefixes(args.problems, args.depth)
    fastest(1, Way(case, prompts, pool=True))
    peak = peak_bytes()  # before anything else is run
    ways = Way(case, prompts, pool=True), Way(case, prompts, pool=False)
    ours, recompute = fastest(args.repeats, *ways)
    (in_turn,) = fastest(args.repeats, dataclasses.replace(ways[0], overlap=False))
    ours['select_backup_share'] = in_turn['select_backup_share']
    show('ours', ours)
    show('ours, halves in turn', in_turn)
    show('recompute', recompute)
    if args.growth:
      rolled = [dataclasses.replace(way, mix=0.0) for way in ways]
      for name, found in zip(('ours', 'recompute'), fastest(args.repeats, *rolled), strict=True):
        show(f'{name}, roll-outs', found)
      for count, depth in ((1, 8), (16, 8), (256, 8), (64, 2), (64, 4), (64, 12)):
        way = Way(case, case.prefixes(count, depth), pool=True)
        show(f'ours, B={count}, depth={depth}', *fastest(args.repeats, way))
    references = [
      None if args.no_reference else released(case, prompts, scored) for scored in (False, True)
    ]
    show('released', references[0])
    show('released, with the PRM', references[1])
  ours |= {
    'peak_bytes': peak,
    'recompute_nodes_per_s': recompute['nodes_per_s'],
    'recompute_computed_per_new_token': recompute['computed_per_new_token'],
    'released_nodes_per_s': references[0] and references[0]['nodes_per_s'],
    'released_with_prm_nodes_per_s': references[1] and references[1]['nodes_per_s'],
  }
  print(json.dumps(ours))


if __name__ == '__main__':
  main()

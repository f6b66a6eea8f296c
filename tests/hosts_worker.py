"""One of several processes of test_hosts.py: `python hosts_worker.py FOLDER WHAT`."""

import dataclasses
import io
import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
from learn_cases import MODEL, params, rows

from o1jax import cli
from o1jax import config as config_lib
from o1jax.batch import TokenBatch
from o1jax.config import OptimConfig
from o1jax.data.pipeline import Batches, batches
from o1jax.learn.objectives import sft_loss
from o1jax.parallel import distributed, make_mesh, own_rows, param_shardings, shard
from o1jax.parallel.join import join
from o1jax.run.metrics import Metrics
from o1jax.run.progress import Progress
from o1jax.run.store import Store
from o1jax.sampling.sampler import Sampler
from o1jax.sandbox.protocol import Limits
from o1jax.stages.context import Workbench
from o1jax.stages.execute import Executor
from o1jax.stages.fit import fit
from o1jax.types import ACCEPTED, Problem, Step, TestCase, TestResult, Verdict

MESH = {'data': 4, 'fsdp': 2}
STEPS = 6
STOP_AT = 2  # batch at which process 1 sends itself SIGTERM


class Signalled(Batches):
  """Batches; process 1 is sent SIGTERM as it reads batch `STOP_AT`."""

  def rows(self, step, which):
    if step == STOP_AT and distributed.index() == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return super().rows(step, which)


def trained(folder, mesh, kind=Batches):
  """A training of the smallest model in `folder`, from its last save on: its parameters."""
  told = {
    'run': {'dir': str(folder), 'checkpoint_every_s': 1000},
    'metrics': {'tensorboard': False},
  }
  config = config_lib.check(told)
  plain = batches(TokenBatch(*rows(batch=40)), batch=8, seed=0)
  data = kind(plain._each, plain.batch)
  optim = OptimConfig(steps=STEPS, warmup=1, batch=8, lr=1e-2)
  with Store(config) as store, Metrics(store.dir, tensorboard=False) as metrics:
    bench = Workbench(store, metrics, Progress(io.StringIO()), mesh, log_every=1)
    start = jax.device_get(params())
    return fit(bench, 'stage', 'lm', MODEL, start, sft_loss(MODEL), data, optim)[0]


def sampled(mesh):
  """Tokens drawn with the smallest model over a mesh."""
  with jax.set_mesh(mesh):
    start = jax.device_get(params())
    placed = shard(start, param_shardings(mesh, MODEL, start))
    draw = Sampler(MODEL, max_new=6, stop_ids=(1,), rows=16)
    return draw(placed, [[2, 3], [4], [5, 6, 7]], samples=4, seed=5).tokens.tolist()


class Judge:
  """A sandbox that takes programs for right whose text has an even length, and remembers them."""

  limits = Limits()

  def __init__(self):
    self.ran = []

  def judge(self, jobs):
    jobs = list(jobs)
    self.ran += [job.code for job in jobs]
    return [
      Verdict(ACCEPTED if len(job.code) % 2 == 0 else 'wrong_answer', (TestResult(ACCEPTED, 0.5),))
      for job in jobs
    ]


def judged():
  """Verdicts of ten programs, and which of them this process ran."""
  problem = Problem('', '', (TestCase('1', '1'),))
  problems = [dataclasses.replace(problem, id=f'p{i % 5}') for i in range(10)]
  paths = [(Step(3, f'```python\nprint({10**i})\n```'),) for i in range(10)]
  sandbox = Judge()
  verdicts = Executor(sandbox).judge(problems, paths)
  return [dataclasses.asdict(v) for v in verdicts], sandbox.ran


def fault(number):
  if distributed.index() == number:
    raise LookupError(f'only process {number}')


def said(body):
  try:
    return body()
  except Exception as error:
    return f'{type(error).__name__}: {error}'


def work(arguments):
  """Everything that several processes do differently; then a training that is stopped."""
  join(arguments.config.distributed)
  folder = pathlib.Path(arguments.config.run.dir)
  mesh = make_mesh(MESH)
  verdicts, ran = judged()
  found = {
    'processes': distributed.count(),
    'rows': own_rows(mesh, 8).tolist(),
    'gathered': distributed.gather(lambda: ['x' * 300 * distributed.index(), 0.1]),
    'first': distributed.from_first(lambda: distributed.index()),
    'fault': said(lambda: distributed.together(lambda: fault(1))),
    'tokens': sampled(mesh),
    'verdicts': verdicts,
    'ran': ran,
  }
  path = folder.with_name(f'found{distributed.index()}.json')
  path.write_text(json.dumps(found))
  trained(folder, mesh, Signalled)


def die(arguments):
  """Process 1 is killed while process 0 waits for it."""
  join(arguments.config.distributed)
  distributed.gather(lambda: np.arange(3).tolist())
  if distributed.index() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  distributed.gather(lambda: None)


if __name__ == '__main__':
  body = {'work': work, 'die': die}[sys.argv[1]]
  sys.exit(cli.main(body, '', sys.argv[2:]))

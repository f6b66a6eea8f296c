"""What a run is told: typed sections, read from YAML and `section.key=value`.

A file lists only what differs from the defaults here. Every fault of a file and its overrides is
gathered into one `ConfigError`, before JAX is imported. The sections of the stages are in
`training`.

To add a setting, add a field with a default and a comment that gives its unit; a relation between
fields goes into the section's `relations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from o1jax.config.base import Count, Natural, NonNegative, Positive, Relation, Section
from o1jax.config.training import (
  LoraConfig,
  PolicySftConfig,
  PrmConfig,
  RlConfig,
  SearchConfig,
  TcgConfig,
)

# The loop's stages in the order of a run; synthesis to rl repeat for every round.
STAGES = ('tcg', 'synthesis', 'policy_sft', 'prm', 'rl', 'report')

# What may change between a run and its continuation without changing what it computes.
FREE_KEYS = (
  'run.dir',
  'run.checkpoint_every_s',
  'run.log_every',
  'run.compile_cache',
  'mesh',
  'distributed',
  'sandbox.workers',
  'sandbox.url',
  'metrics',
)


class RunConfig(Section):
  """Where the run lives and how long it goes on."""

  dir: str = 'runs/quickstart'
  seed: Natural = 0
  rounds: Count = 2  # of synthesis, policy SFT, PRM and RL
  checkpoint_every_s: Positive = 10.0  # seconds between saves inside a training stage
  log_every: Count = 10  # steps between two lines of metrics
  # Folder of compiled programs, for this run to go on with and for others; 'auto': in the user's
  # cache folder, if the run is one process; '': none (run/compiled.py).
  compile_cache: str = 'auto'


class MeshConfig(Section):
  """Devices along each named axis; one of them may be -1: as many as are left."""

  data: int = 1
  fsdp: int = 1
  sequence: int = 1  # the tokens of each row, in training
  tensor: int = 1
  # The weights while they sample: 'train' as they are trained, a number over so many `tensor`,
  # 'auto' the fewest that fit, where there is `fsdp` or `sequence` (stages/layout.py).
  sampling: Literal['auto', 'train'] | Count = 'auto'

  @property
  def axes(self) -> dict[str, int]:
    """Axis name -> size."""
    return self.model_dump(exclude={'sampling'})

  def relations(self) -> Iterator[Relation]:
    """Sizes are positive, save one that is -1."""
    sizes = self.axes
    for axis, size in sizes.items():
      if size < 1 and size != -1:
        yield (axis,), f'mesh.{axis}={size} is no size; use a positive number, or -1 to fill'
    filled = tuple(axis for axis, size in sizes.items() if size == -1)
    if len(filled) > 1:
      yield filled, f'mesh has -1 on {" and ".join(filled)}; leave it on one axis'


class DistributedConfig(Section):
  """The other processes of a run over several hosts; see `parallel/join.py`.

  On TPU pods, under SLURM and under Open MPI nothing is to be set. Elsewhere each process is told
  the three here, or in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  """

  coordinator: str | None = None  # host:port of process 0
  num_processes: Count | None = None
  process_id: Natural | None = None  # from 0; each process its own
  detect: bool = True  # look for a TPU pod, SLURM or Open MPI where nothing is given
  heartbeat_timeout_s: Count = 60  # a process unheard of for so long ends the run, and says who
  join_timeout_s: Count = 300  # until all processes are there

  def relations(self) -> Iterator[Relation]:
    """An address has a port, and the id is one of those there are."""
    if self.coordinator is not None and not self.coordinator.rpartition(':')[2].isdigit():
      text = f'distributed.coordinator={self.coordinator!r} has no port'
      yield ('coordinator',), f'{text}; use host:port, the same on every process'
    if None not in (self.num_processes, self.process_id) and self.process_id >= self.num_processes:
      text = f'distributed.process_id={self.process_id} is none of num_processes'
      keys = ('process_id', 'num_processes')
      yield keys, f'{text}={self.num_processes}; use 0 to {self.num_processes - 1}'


class ModelSection(Section):
  """Which base model to start from."""

  path: str = 'embedded'  # 'embedded' (o1jax/base_model), or a folder in the Hub's layout
  dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the weights and of the computation
  # Prompts go through the tokenizer's chat template, as the one message of a user.
  chat: bool = False
  # Of whole rows in training and scoring; 'auto' is by platform and shape (models/backends.py).
  attention: Literal['auto', 'xla', 'cudnn', 'splash'] = 'auto'
  remat: bool = False  # recompute each layer in the backward pass: less memory, a third more work


class DataConfig(Section):
  """Which problems there are, and how much of one is read."""

  source: str = 'embedded'  # 'embedded' (the procedural family), or problems (docs/data.md)
  train_problems: Count = 400
  # Train problems of a round: the next ones in each, around again at the end. It searches these; RL
  # draws from those of earlier rounds too. What is known for long leaves little to find. 0: all.
  per_round: Natural = 0
  # Further train problems, which PRMs alone learn from: in each round the fine-tuned policy tries
  # an equal share of them, and behind RL, where the PRM is made anew (`prm.renew`), the policy
  # tries all, each `prm.samples` times. On problems that it was trained on it hardly shows what
  # it gets wrong.
  judge_problems: Natural = 0
  dev_problems: Count = 200
  test_problems: Count = 500
  max_prompt_tokens: Count = 96
  max_path_tokens: Count = 96  # of all steps of one path together


class EvalConfig(Section):
  """What the report measures."""

  samples: Count = 4  # programs sampled for a problem: pass@1, majority, best-of-n
  temperature: Positive = 1.0
  rows: Count = 256  # decoded at once
  # How a problem is searched at test time: a descent that the PRM guides, or a tree of roll-outs
  # whose programs have votes, weighed by the PRM (stages/test_time.py).
  search: Literal['guided', 'voted'] = 'guided'
  search_children: Count = 6  # steps sampled at a node, of which the PRM chooses in a descent
  search_simulations: Count = 4  # of a tree: each rolls children steps out
  search_temperature: Positive = 0.7  # of a tree's roll-outs
  search_lead: Natural = 0  # votes that a program is ahead by ends a tree early; 0: all simulations
  search_prior: NonNegative = 0.0  # weight of a step's log-prob beside the PRM's log-odds (guided)
  prm_problems: Count = 200  # of the test problems, whose trees of roll-outs judge the PRM
  bootstrap: Count = 1000  # resamples of an interval
  sampling_control: bool = True  # synthesis beside plain sampling at equal tokens
  test_time: bool = True  # majority, best-of-n and search with the PRM

  def relations(self) -> Iterator[Relation]:
    """What belongs to descents is not set for trees, nor the other way round."""
    if self.search == 'guided' and self.search_lead:
      text = f"eval.search_lead={self.search_lead} has no meaning with eval.search='guided'"
      yield ('search_lead', 'search'), f"{text}; set it to 0, or use eval.search='voted'"
    if self.search == 'voted' and self.search_prior:
      text = f"eval.search_prior={self.search_prior} has no meaning with eval.search='voted'"
      yield ('search_prior', 'search'), f'{text}; set it to 0'


class SandboxConfig(Section):
  """Limits of one program under test."""

  workers: Count | None = None  # None: one a core
  cpu_s: Positive = 2.0  # CPU seconds for a test where no reference program tells
  headroom: Positive = 3.0  # else this times what the reference needs, and at least 0.1 s
  wall_factor: Positive = 10.0  # wall limit = this times the CPU limit
  memory_mb: Count = 256
  output_kb: Count = 64
  allow_unsafe: str = ''  # 'run programs without a sandbox', where the machine offers none
  url: str | None = None  # a judge service instead of local workers


class MetricsConfig(Section):
  """What is written beside metrics.jsonl."""

  tensorboard: bool = True


class Config(Section):
  """A whole run."""

  run: RunConfig = RunConfig()
  mesh: MeshConfig = MeshConfig()
  distributed: DistributedConfig = DistributedConfig()
  model: ModelSection = ModelSection()
  data: DataConfig = DataConfig()
  tcg: TcgConfig = TcgConfig()
  search: SearchConfig = SearchConfig()
  policy_sft: PolicySftConfig = PolicySftConfig()
  prm: PrmConfig = PrmConfig()
  rl: RlConfig = RlConfig()
  lora: LoraConfig = LoraConfig()
  eval: EvalConfig = EvalConfig()
  sandbox: SandboxConfig = SandboxConfig()
  metrics: MetricsConfig = MetricsConfig()

  def relations(self) -> Iterator[Relation]:
    """What sections ask of one another."""
    if self.tcg.problems > self.data.train_problems:
      text = f'tcg.problems={self.tcg.problems} exceeds data.train_problems'
      keys = ('tcg.problems', 'data.train_problems')
      yield keys, f'{text}={self.data.train_problems}; use at most that'
    first = 'per_round' if self.data.per_round else 'train_problems'  # what round 0 has
    if self.rl.problems > getattr(self.data, first):
      text = f'rl.problems={self.rl.problems} exceeds data.{first}={getattr(self.data, first)}'
      yield ('rl.problems', f'data.{first}'), f'{text}; use at most that'
    if (held := self.data.judge_problems) and not self.prm.samples:
      text = f'data.judge_problems={held} are for PRMs that learn from roll-outs'
      yield ('data.judge_problems', 'prm.samples'), f'{text}; set prm.samples to 16, or so'
    if self.data.per_round > self.data.train_problems:
      text = f'data.per_round={self.data.per_round} exceeds data.train_problems'
      keys = ('data.per_round', 'data.train_problems')
      yield keys, f'{text}={self.data.train_problems}; use at most that, or 0 for all'

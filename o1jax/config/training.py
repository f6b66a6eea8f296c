"""Settings of the stages: what is trained and searched, and how."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from o1jax.config.base import (
  Count,
  Natural,
  NonNegative,
  Positive,
  Relation,
  Schedule,
  Section,
  Share,
)

# 'adafactor' has next to no state beside the weights, 'lion' and 'sgd' half of AdamW's.
Optimizer = Literal['adamw', 'adafactor', 'lion', 'sgd']

# What an adapter can be for, by its name on the Hub.
PROJECTIONS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


class OptimConfig(Section):
  """An optimiser over a fixed number of steps."""

  optimizer: Optimizer = 'adamw'
  lr: Positive = 1e-3  # the peak
  schedule: Schedule = 'cosine'  # after the warm-up
  warmup: Natural = 10  # steps
  steps: Count = 200
  batch: Count = 64  # rows of one step, over all devices
  weight_decay: NonNegative = 0.0
  clip: NonNegative = 1.0  # global gradient norm; 0: not clipped
  accumulate: Count = 1  # micro-batches that one step is cut into

  def relations(self) -> Iterator[Relation]:
    """The micro-batches are equal, and the warm-up ends."""
    if self.batch % self.accumulate:
      text = f'batch={self.batch} does not divide by accumulate={self.accumulate}'
      yield ('batch', 'accumulate'), f'{text}; use a multiple of {self.accumulate}'
    if self.warmup >= self.steps:
      text = f'warmup={self.warmup} leaves none of steps={self.steps}'
      yield ('warmup', 'steps'), f'{text}; use at most {self.steps - 1}'


class TcgConfig(Section):
  """The test-case generator: SFT, then DPO on shuffled outputs."""

  sft: OptimConfig = OptimConfig(lr=3e-4, steps=60, batch=16)  # batch: packed rows
  dpo: OptimConfig = OptimConfig(lr=3e-5, steps=40, batch=16)  # batch: pairs
  beta: Positive = 0.1
  nll: NonNegative = 1.0  # weight of the NLL of the chosen side; without it DPO collapses
  label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # share of flipped pairs in DPO
  ipo: bool = False  # the squared loss in place of the sigmoid in DPO
  length_normalised: bool = False  # margins of means over tokens in DPO
  problems: Count = 400  # of the train split
  draws: Count = 4  # test parts of three real cases, drawn for each problem
  question_share: Share = 0.25  # of the parts that show the question without its program
  row_tokens: Count = 256  # of a packed row; longer documents are left out
  max_tokens: Count = 192  # of one generated test part
  samples: Count = 4  # test parts generated for a train problem
  temperature: NonNegative = 0.3  # of test parts: answers want a low one; 0: greedy
  min_tests: Count = 3  # confirmed tests of a problem that RL can use
  max_tests: Count = 6  # kept for a problem
  eval_problems: Count = 150  # of dev and of test, to measure quality on
  control: bool = True  # also train on the chosen side alone, for as many steps

  def relations(self) -> Iterator[Relation]:
    """What is kept is enough to be used, and DPO's settings go together."""
    if self.ipo and self.label_smoothing:
      text = f'tcg.label_smoothing={self.label_smoothing} has no meaning with tcg.ipo=true'
      yield ('label_smoothing', 'ipo'), f'{text}; set it to 0'
    if self.min_tests > self.max_tests:
      text = f'tcg.min_tests={self.min_tests} exceeds tcg.max_tests={self.max_tests}'
      yield ('min_tests', 'max_tests'), f'{text}; use at most {self.max_tests}'


class SearchConfig(Section):
  """Tree search over reasoning steps."""

  simulations: Count = 12  # roll-outs of one problem
  children: Count = 4  # steps sampled for an expansion
  depth_limit: Count = 9  # steps
  max_step_tokens: Count = 24  # of one step of a PRM-guided descent, its program excepted
  c: NonNegative = 2.0  # exploration
  c_schedule: Literal['constant', 'linear', 'exponential'] = 'constant'  # to a tenth
  temperature: Positive = 1.0
  top_k: Natural = 0  # 0: no truncation
  top_p: Share = 1.0
  guided_children: Count = 6  # of a PRM-guided descent, from round 1
  guided_descents: Natural = 2  # for each problem; 0: UCT in every round
  # How a leaf is chosen; 'guided' is a descent that the PRM guides, and UCT where there is no PRM:
  # in round 0, and with guided_descents=0 in every round. 'distinct' draws so many (simulations)
  # whole paths of a problem by the policy alone, none of them twice.
  rule: Literal['guided', 'uct', 'puct', 'gumbel', 'distinct'] = 'guided'
  mix: Share = 0.0  # of the PRM in a step's value, beside its roll-out; 1: nothing is rolled out
  widening: NonNegative = 0.0  # a node of n visits may have this times sqrt(n) steps; 0: children
  most_children: Natural = 0  # steps of a widened node; 0: 4 times children
  rows: Count = 256  # decoded at once
  # Tokens whose keys and values a search keeps on the device; what it cannot keep is read again.
  pool_tokens: Natural = 0  # 0: all that it can have
  keep_trees: bool = False  # also write every tree, with what was executed, as a file
  compile_weight: Share = 0.0  # the method's `a`: credit for a program that compiles

  def relations(self) -> Iterator[Relation]:
    """What belongs to trees is not set for other ways, and a widened node has room."""
    if self.rule in ('guided', 'distinct') and self.mix:
      text = f'search.mix={self.mix} has no meaning with search.rule={self.rule!r}'
      yield ('mix', 'rule'), f"{text}; use 'uct', 'puct' or 'gumbel', or set it to 0"
    if self.rule == 'distinct':
      for key, whole in (('temperature', 1.0), ('top_k', 0), ('top_p', 1.0)):
        if getattr(self, key) != whole:
          text = f"search.{key}={getattr(self, key)} has no meaning with search.rule='distinct'"
          yield (key, 'rule'), f'{text}, which draws as the policy would; set it to {whole:g}'
      for key in ('widening', 'keep_trees'):
        if value := getattr(self, key):
          text = f"search.{key}={value} has no meaning with search.rule='distinct'"
          yield (key, 'rule'), f"{text}; use 'guided', 'uct', 'puct' or 'gumbel', or leave it out"
    if self.most_children and self.most_children <= self.children:
      text = f'search.most_children={self.most_children} leaves no room above search.children'
      yield ('most_children', 'children'), f'{text}={self.children}; raise it, or set it to 0'


class PolicySftConfig(Section):
  """Policy SFT on the paths whose program passes every test."""

  optim: OptimConfig = OptimConfig(lr=1e-3, steps=200, batch=64)
  max_paths_per_problem: Count = 4


class PrmConfig(Section):
  """The process reward model."""

  optim: OptimConfig = OptimConfig(lr=1e-3, steps=200, batch=32)
  # Roll-outs of the fine-tuned policy for each problem of the round, to learn from beside those of
  # search: they hold the mistakes it still makes, and solve more than the policy that searched.
  samples: Natural = 0
  # Also train it anew behind each RL, or behind the last: from the policy that came of it, on its
  # roll-outs and on as many of `data.judge_problems`. What comes next judges by this one, else by
  # one that is older than RL.
  renew: Literal['last'] | bool = False
  renew_steps: Natural = 0  # updates of a renewed one; 0: optim.steps
  mode: Literal['pointwise', 'pairwise', 'both'] = 'both'
  # What a roll-out is worth to its steps: 1 if its program passes every test, else 0 (accepted), or
  # search's terminal reward, in which a wrong program that passes most tests is worth most.
  returns: Literal['accepted', 'terminal'] = 'accepted'
  labels: Literal['soft', 'hard'] = 'soft'  # a step's mean return, or whether it is above 0
  pair_margin: Share = 0.15  # siblings whose mean returns differ by more make a pair
  pair_coef: NonNegative = 1.0  # weight of the pair loss in 'both'
  blend: Share = 0.35  # of the way from the policy's weights to the trained ones; 1: all of it
  # What a step is scored by: a head on the states of its tokens (value), or the probability of
  # `good_token` against `bad_token` where it ends (token).
  readout: Literal['value', 'token'] = 'value'
  good_token: str = '+'  # each is one token of the tokenizer
  bad_token: str = '-'

  def optim_of(self, renewed: bool) -> OptimConfig:
    """How a PRM is trained, or one behind RL."""
    steps = self.renew_steps if renewed else 0
    return self.optim.model_copy(update={'steps': steps}) if steps else self.optim

  def renews(self, round_: int, rounds: int) -> bool:
    """Whether a PRM is made anew behind the RL of a round, of so many."""
    return self.renew is True or (self.renew == 'last' and round_ == rounds - 1)

  def relations(self) -> Iterator[Relation]:
    """A microbatch has room for two siblings, and the two words differ."""
    optim = self.optim
    if self.mode != 'pointwise' and optim.accumulate > 1 and optim.batch < 2 * optim.accumulate:
      text = f'prm.optim.batch={optim.batch} in prm.optim.accumulate={optim.accumulate} parts'
      keys = ('optim.batch', 'optim.accumulate', 'mode')
      yield keys, f"{text} parts siblings; use a larger batch, or prm.mode='pointwise'"
    if self.good_token == self.bad_token:
      text = f'prm.good_token and prm.bad_token are both {self.good_token!r}'
      yield ('good_token', 'bad_token'), f'{text}; use two tokens'


class RlConfig(Section):
  """Reinforcement on phi(R, r)."""

  algorithm: Literal['ppo', 'grpo', 'dpo'] = 'grpo'
  iterations: Count = 24
  problems: Count = 48  # of one iteration
  # Draw problems the oftener the more of their latest roll-outs failed, not all alike: a group that
  # succeeds as a whole teaches nothing (arXiv 2501.12599, sec. 2.3.4).
  prioritised: bool = False
  group: Count = 8  # rollouts of one problem
  minibatch: Count = 96  # rows of one update
  epochs: Count = 1  # passes over an iteration's rollouts
  optimizer: Optimizer = 'adamw'
  lr: Positive = 3e-4
  schedule: Schedule = 'constant'
  warmup: Natural = 0  # updates
  weight_decay: NonNegative = 0.0
  grad_clip: NonNegative = 1.0  # global gradient norm; 0: not clipped
  temperature: Positive = 1.0  # of the rollouts, which are never truncated
  clip: Positive = 0.2  # of the probability ratio
  kl_coef: NonNegative = 0.0
  kl_estimator: Literal['k1', 'k2', 'k3'] = 'k3'
  kl_in: Literal['loss', 'reward'] = 'loss'  # where the KL to the reference is paid
  reference: Literal['start', 'iteration'] = 'start'  # the policy of the stage's, or of each, start
  max_kl: NonNegative = 0.0  # nats a token from the sampling policy end an iteration; 0: none do
  entropy_coef: NonNegative = 0.0  # bonus for each nat of a token's entropy
  loss_mean: Literal['token', 'sequence'] = 'token'  # over all tokens, or over rows of their means
  importance_cap: NonNegative = 0.0  # of weights for rollouts of an older policy; 0: no weights
  # Iterations by which the policy that writes rollouts may be behind the one that learns from them;
  # 0: on policy. Programs then run while later rollouts are written and earlier ones learnt from.
  staleness: Natural = 0
  whiten: bool = False  # advantages of an iteration to mean 0 and variance 1
  normalise: bool = False  # divide a group's advantages by their deviation ('grpo')
  gamma: Share = 0.9
  alpha_start: Share = 1.0  # weight of the outcome in phi at the first iteration
  alpha_end: Share = 0.5  # and at the last
  alpha_schedule: Literal['linear', 'log', 'constant'] = 'linear'
  own_tests: bool = False  # of problems for which the TCG has no confirmed ones; else left out
  # Where generated tests have paid for a program that the problem's own tests refuse, the first of
  # these that it fails has to be passed too from the next iteration on.
  counterexamples: bool = True
  tau_pass: float = 1.0  # outcome of a program that passes all tests
  tau_fail: float = 0.0
  negative_scale: NonNegative = 1.0  # multiplies negative advantages
  imitation_coef: NonNegative = 0.0  # NLL of verified rollouts
  # Updates of an iteration, behind those on its rollouts, on the verified paths of the whole run
  # and of all iterations so far, as policy_sft makes them (self-imitation, arXiv 1806.05635).
  replay: Natural = 0
  gae_lambda: Share = 0.95
  gae: Literal['token', 'step'] = 'token'  # what lambda counts ('ppo')
  critic: Literal['policy', 'own'] = 'policy'  # the trunk of the critic's head ('ppo')
  value_coef: NonNegative = 0.5
  beta: Positive = 0.3  # of 'dpo'
  nll: NonNegative = 1.0  # of 'dpo'
  preference: NonNegative = 1.0  # of 'dpo'; 0: the control, SFT on the chosen sides
  label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # share of flipped pairs in 'dpo'
  ipo: bool = False  # the squared loss in place of the sigmoid in 'dpo'
  length_normalised: bool = False  # margins of means over tokens in 'dpo'
  pairs: Literal['paths', 'siblings', 'both'] = 'paths'  # what 'dpo' compares
  pair_margin: Share = 0.15  # siblings whose mean returns differ by more make a pair
  control: bool = True  # expert iteration beside it, on as many sampled tokens

  @property
  def rows(self) -> int:
    """Rollouts of one iteration."""
    return self.problems * self.group

  @property
  def updates(self) -> int:
    """Updates of the whole stage."""
    return self.iterations * (self.epochs * (self.rows // self.minibatch) + self.replay)

  @property
  def optim(self) -> OptimConfig:
    """The optimiser of the whole stage, counted in updates."""
    return OptimConfig(
      optimizer=self.optimizer,
      lr=self.lr,
      schedule=self.schedule,
      warmup=self.warmup,
      steps=self.updates,
      batch=self.minibatch,
      weight_decay=self.weight_decay,
      clip=self.grad_clip,
    )

  def relations(self) -> Iterator[Relation]:
    """Minibatches are full, a group has something to compare, alpha falls."""
    if self.rows % self.minibatch:
      divisors = [n for n in range(1, self.rows + 1) if self.rows % n == 0]
      near = min(divisors, key=lambda n: abs(n - self.minibatch))
      text = f'rl.minibatch={self.minibatch} does not divide rl.problems*rl.group={self.rows}'
      yield ('minibatch', 'problems', 'group'), f'{text}; use {near}'
    elif self.warmup >= self.updates:
      text = f'rl.warmup={self.warmup} leaves none of the {self.updates} updates'
      keys = ('warmup', 'iterations', 'epochs', 'minibatch', 'problems', 'group', 'replay')
      yield keys, f'{text}; use at most {self.updates - 1}'
    if self.algorithm in ('grpo', 'dpo') and self.group < 2:
      text = f'rl.group={self.group} has nothing to compare within a problem'
      yield ('group', 'algorithm'), f"{text}; use 2 or more, or rl.algorithm='ppo'"
    yield from self._dpo_relations()
    if self.staleness and not self.importance_cap and self.algorithm != 'dpo':
      text = f'rl.staleness={self.staleness} learns from rollouts of older policies unweighted'
      yield ('staleness', 'importance_cap'), f'{text}; set rl.importance_cap, to 2 say'
    if self.alpha_end > self.alpha_start:
      text = f'rl.alpha_end={self.alpha_end} is above rl.alpha_start={self.alpha_start}'
      yield ('alpha_end', 'alpha_start'), f'{text}; alpha falls: exchange the two'
    if self.tau_fail >= self.tau_pass:
      text = f'rl.tau_fail={self.tau_fail} is not below rl.tau_pass={self.tau_pass}'
      yield ('tau_fail', 'tau_pass'), f'{text}; a failure would be worth a success'

  def _dpo_relations(self) -> Iterator[Relation]:
    """What 'dpo' asks of its settings."""
    if self.algorithm != 'dpo':
      return
    if not (self.preference or self.nll):
      text = 'rl.preference=0 and rl.nll=0 leave nothing to learn'
      yield ('preference', 'nll'), f'{text}; raise one of them'
    if self.ipo and self.label_smoothing:
      text = f'rl.label_smoothing={self.label_smoothing} has no meaning with rl.ipo=true'
      yield ('label_smoothing', 'ipo'), f'{text}; set it to 0'
    if self.max_kl:
      text = f"rl.max_kl={self.max_kl} is not measured by rl.algorithm='dpo'"
      yield ('max_kl', 'algorithm'), f'{text}; set it to 0'


class AdapterConfig(Section):
  """A low-rank adapter in place of training all weights."""

  rank: Natural = 0  # 0: no adapter, all weights are trained
  alpha: Positive = 16.0  # the adapter's term is multiplied by alpha / rank
  # Patterns of the projections that have one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
  # down_proj; '*_proj' is all of them.
  modules: tuple[str, ...] = ('*_proj',)

  def relations(self) -> Iterator[Relation]:
    """Every pattern chooses something."""
    for pattern in self.modules:
      if not any(fnmatch.fnmatchcase(name, pattern) for name in PROJECTIONS):
        text = f'modules: {pattern!r} is none of {", ".join(PROJECTIONS)} and matches none'
        yield ('modules',), text
    if not self.modules:
      yield ('modules',), "modules=[] chooses nothing; use ['*_proj'], or rank=0 for no adapter"


class LoraConfig(Section):
  """Adapters by role over one frozen base; checkpoints then hold the adapters alone."""

  base: Literal['as_is', 'nf4'] = 'as_is'  # 'nf4': its projections in four bits (QLoRA)
  policy: AdapterConfig = AdapterConfig()
  tcg: AdapterConfig = AdapterConfig()
  prm: AdapterConfig = AdapterConfig()  # above the policy's

  @property
  def used(self) -> bool:
    """Whether some role has an adapter."""
    return any((self.policy.rank, self.tcg.rank, self.prm.rank))

  def relations(self) -> Iterator[Relation]:
    """Codes of four bits cannot be trained themselves."""
    if self.base == 'nf4':
      lacking = [r for r in ('policy', 'tcg', 'prm') if not getattr(self, r).rank]
      if lacking:
        text = f'lora.base=nf4 is frozen, but lora.{lacking[0]}.rank=0 trains all weights'
        yield ('base', *(f'{r}.rank' for r in lacking)), f'{text}; use a rank of 1 or more'

"""Train steps of all stages, and the passes over whole rows that only read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from o1jax.config import Config, OptimConfig
from o1jax.learn.logprobs import columns_at_once
from o1jax.learn.objectives import sft_loss
from o1jax.learn.update import LossFn, make_update
from o1jax.models import lora
from o1jax.models.transformer import Model
from o1jax.plan import flops
from o1jax.plan.arguments import Arguments
from o1jax.plan.flops import Flops
from o1jax.plan.step import Step, factors, step
from o1jax.stages import prm, rl, tcg
from o1jax.stages.fit import optimizer, over_frozen


@dataclasses.dataclass(frozen=True)
class Training:
  """The steps of each stage."""

  given: Arguments

  @property
  def config(self) -> Config:
    """Of the run."""
    return self.given.config

  @property
  def model(self) -> Model:
    """Of the run."""
    return self.given.model

  def tcg(self) -> list[Step]:
    """SFT, the reference's log-probabilities, DPO and its control."""
    config, given = self.config.tcg, self.given
    found = [self._update('tcg/sft', 'tcg.sft.batch', 'tcg', config.sft, sft_loss(self.model))]
    found.append(
      self._reading('tcg/logprobs', 'tcg.dpo.batch', 'tcg', config.dpo.batch, tcg.answer_logprobs)
    )
    for name, preference in {'dpo': 1.0, 'control': 0.0}.items():
      if preference or config.control:
        loss = tcg.pair_loss(self.model, config, preference)
        args = {'batch': given.pair_batch, 'sides': 2 if preference else 1}
        found.append(self._update(f'tcg/{name}', 'tcg.dpo.batch', 'tcg', config.dpo, loss, **args))
    return found

  def policy_sft(self) -> Step:
    """SFT on verified paths."""
    optim, key = self.config.policy_sft.optim, 'policy_sft.optim.batch'
    return self._update('policy_sft', key, 'policy', optim, sft_loss(self.model))

  def prm(self) -> Step:
    """The process reward model."""
    config, d = self.config.prm, self.model.config.hidden_size
    loss = prm.loss_of(self.model, config)
    args = {'batch': self.given.step_batch}
    args['extra'] = 2 * d * d if config.readout == 'value' else 0
    return self._update('prm', 'prm.optim.batch', 'prm', config.optim, loss, **args)

  def rl(self) -> list[Step]:
    """The update of the configured algorithm, and what it reads of the models."""
    config, key = self.config.rl, 'rl.minibatch'
    pairs, own = config.algorithm == 'dpo', config.algorithm == 'ppo' and config.critic == 'own'
    # Of pairs a minibatch has half as many; a DPO without preference reads the chosen side alone.
    rows = max(1, config.minibatch // 2) if pairs else config.minibatch
    args = {
      'batch': self.given.pair_batch if pairs else self.given.rollout_batch,
      'sides': 2 if pairs and config.preference else 1,
      'trunks': 2 if own else 1,
    }
    optim = config.optim.model_copy(update={'batch': rows})
    found = [self._update('rl', key, 'rl', optim, rl.loss_of(self.model, config), **args)]
    if config.replay:
      batch = self.config.policy_sft.optim.batch
      optim = optim.model_copy(update={'batch': batch})
      loss, replay_key = rl.imitation(self.model), 'policy_sft.optim.batch'
      found.append(self._update('rl/replay', replay_key, 'rl', optim, loss))
    if config.kl_coef or config.importance_cap or pairs:
      found.append(self._reading('rl/logprobs', key, 'policy', rows, rl.row_logprobs))
    if config.algorithm == 'ppo':
      values = lambda model, params, batch: rl.row_values.lower(  # noqa: E731
        model, config.critic, params, batch
      )
      found.append(self._reading('rl/values', key, 'rl', rows, values, read=False))
    rows = self.config.prm.optim.batch
    args = {'batch': self.given.step_batch}
    scores = self._reading('prm/scores', 'prm.optim.batch', 'prm', rows, prm.batch_scores, **args)
    return [*found, scores]

  def _update(
    self,
    name: str,
    key: str,
    role: str,
    optim: OptimConfig,
    loss: LossFn,
    *,
    batch: Callable[[int, int], Any] | None = None,
    sides: int = 1,
    trunks: int = 1,
    extra: float = 0.0,
  ) -> Step:
    """A train step: `sides` rows for each row of the batch, through `trunks` models."""
    given, model = self.given, self.model
    width = self._width(role)
    tx = optimizer(optim)
    update = make_update(over_frozen(loss), tx, accumulate=optim.accumulate)
    of_rows = batch or given.token_batch

    def lower(rows: int) -> jax.stages.Lowered:
      state, frozen = given.state(role, tx)
      return update.lower(state, of_rows(rows, width), frozen)

    def count(rows: int) -> Flops:
      at_once = columns_at_once(model, rows // optim.accumulate, width - 1, given.ways)
      args = {'remat': model.remat, 'extra': extra, 'adapters': factors(given, role)}
      args['frozen'] = lora.is_adapted(given.params(role))
      c, pieces = model.config, at_once < width - 1
      total = flops.training(c, rows * sides, width, pieces=pieces, **args)
      for _ in range(trunks - 1):
        total += flops.training(c, rows, width, pieces=False, read=False, **args)
      return total

    return step(given, name, key, optim.batch, width, lower, count, unit=optim.accumulate)

  def _reading(self, name, key, role, rows, function, *, batch=None, read=True) -> Step:
    """A forward pass over whole rows by a jitted `function(model, params, batch)`."""
    given, width = self.given, self._width(role)
    of_rows = batch or given.token_batch
    lower_it = getattr(function, 'lower', function)

    def lower(n: int) -> jax.stages.Lowered:
      return lower_it(self.model, given.params(role), of_rows(n, width))

    def count(n: int) -> Flops:
      extra = 2 * factors(given, role)
      return flops.forward(self.model.config, n, width, read=read, extra=extra)

    return step(given, name, key, rows, width, lower, count)

  def _width(self, role: str) -> int:
    return self.config.tcg.row_tokens if role == 'tcg' else self.given.width

"""The jitted steps of a run with abstract arguments: the run's own functions, ready to be compiled.

Arguments are shapes with the layout that the run gives them; nothing is allocated. Legend: B rows,
T tokens of a row, M steps of a path, P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from o1jax.batch import PairBatch, RolloutBatch, StepBatch, TokenBatch
from o1jax.config import Config, OptimConfig
from o1jax.learn.logprobs import columns_at_once
from o1jax.learn.objectives import sft_loss
from o1jax.learn.state import TrainState
from o1jax.learn.update import LossFn, make_update
from o1jax.models.heads import ScalarHead, StepHead, TokenHead
from o1jax.models.transformer import Model
from o1jax.parallel.mesh import meshes_that_fit
from o1jax.parallel.sharding import (
  RULES,
  batch_faults,
  batch_sharding,
  model_faults,
  param_shardings,
  replicated,
)
from o1jax.plan import flops
from o1jax.plan.flops import Flops
from o1jax.sampling import decode
from o1jax.sampling.cache import DecodeState, prefill
from o1jax.sampling.draw import Drawing
from o1jax.sampling.sampler import COLUMN_MULTIPLE, PROMPT_MULTIPLE, round_up
from o1jax.sampling.scorer import PrmScorer, score_candidates
from o1jax.stages import prm, rl, synthesis, tcg
from o1jax.stages.fit import optimizer


@dataclasses.dataclass(frozen=True)
class Step:
  """One jitted function of the run at the run's shapes."""

  name: str
  key: str  # the setting that says how many rows
  rows: int
  unit: int  # rows are a multiple of this
  width: int  # tokens of a row
  lower: Callable[[int], jax.stages.Lowered]  # for so many rows
  flops: Callable[[int], Flops]  # of one call with so many rows
  trips: int = 1  # of a loop that ends when its data says so: at most


def of_run(config: Config, model: Model, mesh: Mesh) -> list[Step]:
  """Every step of the run in the order of its stages.

  Raises:
    ValueError: parameters or batches do not divide over the mesh; names meshes over which all do.
  """
  make = _Maker(config, model, mesh)
  found = [*make.tcg(), *make.synthesis(), make.policy_sft(), make.prm(), *make.rl()]

  def faults(mesh: Mesh | AbstractMesh) -> list[str]:
    rows = {step.key: step.rows for step in found}
    batches = [f'{key}: {fault}' for key, n in rows.items() for fault in batch_faults(mesh, n)]
    return batches + model_faults(mesh, model, model.shapes())

  if faults(mesh):
    fit = meshes_that_fit(mesh.size, lambda other: not faults(other))
    raise ValueError(f'{"; ".join(faults(mesh))}; for all of it use the mesh {fit}')
  return found


@dataclasses.dataclass(frozen=True)
class _Maker:
  config: Config
  model: Model
  mesh: Mesh

  @property
  def width(self) -> int:
    """Tokens of a row that holds one prompt and one path."""
    return self.config.data.max_prompt_tokens + self.config.data.max_path_tokens

  @property
  def ways(self) -> int:
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']

  def tcg(self) -> list[Step]:
    config, width = self.config.tcg, self.config.tcg.row_tokens
    sft = self._training('tcg/sft', 'tcg.sft.batch', config.sft, sft_loss(self.model), width=width)
    pairs = {'dpo': 1.0, 'control': 0.0} if config.control else {'dpo': 1.0}

    def lower(rows: int) -> jax.stages.Lowered:
      batch, params = self._token_batch(rows, width), self._placed(self.model.shapes())
      return tcg.answer_logprobs.lower(self.model, params, batch)

    count = lambda n: flops.forward(self.model.config, n, width)  # noqa: E731
    rows = config.dpo.batch
    read = self._step('tcg/logprobs', 'tcg.dpo.batch', rows, width, lower, count)
    return [sft, read] + [
      self._training(
        f'tcg/{name}',
        'tcg.dpo.batch',
        config.dpo,
        tcg.pair_loss(self.model, config, preference),
        width=width,
        sides=2 if preference else 1,
        batch=self._pair_batch,
      )
      for name, preference in pairs.items()
    ]

  def policy_sft(self) -> Step:
    optim = self.config.policy_sft.optim
    return self._training('policy_sft', 'policy_sft.optim.batch', optim, sft_loss(self.model))

  def prm(self) -> Step:
    config, d = self.config.prm, self.model.config.hidden_size
    return self._training(
      'prm',
      'prm.optim.batch',
      config.optim,
      prm.loss_of(self.model, config),
      params=self._prm_params(),
      batch=self._step_batch,
      extra=2 * d * d if config.readout == 'value' else 0,
    )

  def rl(self) -> list[Step]:
    config = self.config.rl
    loss, params = rl.loss_of(self.model, config), self._rl_params()
    if config.algorithm == 'dpo':
      optim = config.optim.model_copy(update={'batch': max(1, config.minibatch // 2)})
      sides = 2 if config.preference else 1
      args = {'batch': self._pair_batch, 'sides': sides}
    else:
      optim = config.optim
      args = {'batch': self._rollout_batch, 'trunks': 1 + (config.critic == 'own')}
      args['trunks'] = args['trunks'] if config.algorithm == 'ppo' else 1
    found = [self._training('rl', 'rl.minibatch', optim, loss, params=params, **args)]
    args = {'rows': optim.batch, 'key': 'rl.minibatch'}  # as many at once as in an update
    if config.kl_coef or config.importance_cap or config.algorithm == 'dpo':
      found.append(self._reading('rl/logprobs', lower=self._lower_logprobs, **args))
    if config.algorithm == 'ppo':
      found.append(self._reading('rl/values', lower=self._lower_values, read=False, **args))
    rows = self.config.prm.optim.batch
    return [*found, self._reading('prm/scores', 'prm.optim.batch', rows, self._lower_scores)]

  def synthesis(self) -> list[Step]:
    """Prefill and decoding, of search, roll-outs and evaluation alike, and the PRM's scoring."""
    config, c = self.config, self.model.config
    rows = round_up(max(config.search.rows, config.eval.rows), self.ways)
    key = 'search.rows' if config.search.rows >= config.eval.rows else 'eval.rows'
    prompt = round_up(config.data.max_prompt_tokens, PROMPT_MULTIPLE)
    new = config.data.max_path_tokens
    columns = round_up(prompt + new, COLUMN_MULTIPLE)
    candidates = round_up(PrmScorer.rows, self.ways)
    step = 1 << (synthesis.MAX_STEP - 1).bit_length()
    head = 2 * c.hidden_size**2

    def scoring(n: int) -> Flops:
      total = flops.layers(c, n * step, columns + step) + flops.logits(c, n * step)
      return Flops(total + head * n * step, total + head * n * step)

    def reading(n: int) -> Flops:
      return flops.forward(c, n, prompt, read=False)

    return [
      self._step('prefill', key, rows, prompt, lambda n: self._lower_prefill(n, columns), reading),
      self._step(
        'decode',
        key,
        rows,
        new,
        lambda n: self._lower_decode(n, prompt, columns, new),
        lambda n: flops.decoding(c, n, new, columns),
        trips=new,
      ),
      self._step(
        'score', key, candidates, step, lambda n: self._lower_score(n, columns, step), scoring
      ),
    ]

  def _step(self, name, key, rows, width, lower, count, unit=1, trips=1) -> Step:
    def within(n: int) -> jax.stages.Lowered:
      with jax.set_mesh(self.mesh):  # as a run has it
        return lower(n)

    return Step(name, key, rows, self.ways * unit, width, within, count, trips)

  def _training(
    self,
    name: str,
    key: str,
    optim: OptimConfig,
    loss: LossFn,
    *,
    params: Any = None,
    batch: Callable[[int, int], Any] | None = None,
    width: int = 0,
    sides: int = 1,
    trunks: int = 1,
    extra: float = 0.0,
  ) -> Step:
    """A train step: `sides` rows for each row of the batch, through `trunks` models."""
    params = self.model.shapes() if params is None else params
    batch, width = batch or self._token_batch, width or self.width
    tx, c = optimizer(optim), self.model.config
    update = make_update(loss, tx, accumulate=optim.accumulate)

    def lower(rows: int) -> jax.stages.Lowered:
      def state_of(params):
        return TrainState(params, tx.init(params), jnp.int32(0), jnp.int32(0))

      state = self._placed(jax.eval_shape(state_of, params))
      return update.lower(state, batch(rows, width))

    def count(rows: int) -> Flops:
      at_once = columns_at_once(self.model, rows // optim.accumulate, width - 1, self.ways)
      pieces = at_once < width - 1
      args = {'remat': self.model.remat, 'pieces': pieces, 'extra': extra}
      total = flops.training(c, rows * sides, width, **args)
      for _ in range(trunks - 1):
        total += flops.training(c, rows, width, remat=self.model.remat, pieces=False, read=False)
      return total

    return self._step(name, key, optim.batch, width, lower, count, unit=optim.accumulate)

  def _reading(self, name, key, rows, lower, *, read=True) -> Step:
    """A forward pass over `rows` whole rows."""
    c = self.model.config
    count = lambda n: flops.forward(c, n, self.width, read=read)  # noqa: E731
    return self._step(name, key, round_up(rows, self.ways), self.width, lower, count)

  def _lower_logprobs(self, rows: int):
    batch = self._token_batch(rows, self.width)
    return rl.row_logprobs.lower(self.model, self._placed(self.model.shapes()), batch)

  def _lower_values(self, rows: int):
    batch, critic = self._token_batch(rows, self.width), self.config.rl.critic
    return rl.row_values.lower(self.model, critic, self._placed(self._rl_params()), batch)

  def _lower_scores(self, rows: int):
    batch = self._step_batch(rows, self.width)
    return prm.batch_scores.lower(self.model, self._placed(self._prm_params()), batch)

  def _lower_prefill(self, rows: int, columns: int):
    width = round_up(self.config.data.max_prompt_tokens, PROMPT_MULTIPLE)
    tokens, lengths = self._rows((rows, width)), self._rows((rows,))
    params = self._placed(self.model.shapes())
    return prefill.lower(self.model, params, tokens, lengths, columns=columns)

  def _lower_decode(self, rows: int, prompt: int, columns: int, new: int):
    search, eos = self.config.search, self.model.config.eos_token_id
    how = Drawing(
      search.temperature, search.top_k or None, None if search.top_p == 1 else search.top_p
    )

    def begun(state):
      row_keys = jax.random.split(jax.random.key(0), rows)
      return decode.begin(state, row_keys, jnp.ones(rows, bool), max_new=new)

    going = jax.eval_shape(begun, self._decode_state(rows, prompt, columns))
    going = dataclasses.replace(self._by_rows(going, rows), state=self._laid_out(going.state))
    stop = eos if isinstance(eos, tuple) else (eos or 0,)
    params = self._placed(self.model.shapes())
    return decode.run.lower(self.model, params, going, stop_ids=stop, how=how)

  def _lower_score(self, rows: int, columns: int, step: int):
    state = self._laid_out(self._decode_state(rows, columns, columns + step))
    args = (self._rows((rows,)), self._rows((rows, step)), self._rows((rows, step), bool))
    return score_candidates.lower(self.model, self._placed(self._prm_params()), state, *args)

  def _decode_state(self, rows: int, prompt: int, columns: int) -> DecodeState:
    """Shapes of R rows that have read a prompt."""
    tokens = jax.ShapeDtypeStruct((rows, prompt), jnp.int32)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    read = lambda p, t, n: prefill(self.model, p, t, n, columns=columns)  # noqa: E731
    return jax.eval_shape(read, self.model.shapes(), tokens, lengths)

  def _laid_out(self, state: DecodeState) -> DecodeState:
    """Rows over `data` and `fsdp`; key heads of the cache over `tensor`, if they divide."""
    ways = self.mesh.shape[RULES['kv_heads']]
    heads = RULES['kv_heads'] if self.model.config.num_kv_heads % ways == 0 else None
    spec = NamedSharding(self.mesh, PartitionSpec(RULES['batch'], heads))
    placed = self._by_rows(state, state.rows)
    return dataclasses.replace(placed, cache=jax.tree.map(lambda x: _at(x, spec), state.cache))

  def _by_rows(self, tree: Any, rows: int) -> Any:
    """Arrays of so many rows over `data` and `fsdp`, everything else whole."""
    split, whole = batch_sharding(self.mesh), replicated(self.mesh)
    return jax.tree.map(lambda x: _at(x, split if x.shape[:1] == (rows,) else whole), tree)

  def _placed(self, tree: Any) -> Any:
    """Parameters, or a state around them, in the run's layout."""
    return jax.tree.map(_at, tree, param_shardings(self.mesh, self.model, tree))

  def _prm_params(self) -> Any:
    c = self.model.config
    if self.config.prm.readout == 'value':
      init = lambda trunk: {'trunk': trunk, 'head': StepHead.init(c)}  # noqa: E731
    else:
      output = self.model.output_rows
      init = lambda trunk: {'trunk': trunk, 'head': TokenHead.init(output(trunk), 0, 1)}  # noqa: E731
    return jax.eval_shape(init, self.model.shapes())

  def _rl_params(self) -> Any:
    policy = self.model.shapes()
    if self.config.rl.algorithm != 'ppo':
      return policy
    head = jax.eval_shape(lambda: ScalarHead.init(self.model.config))
    own = self.config.rl.critic == 'own'
    return {'policy': policy, 'critic': {'trunk': policy, 'head': head} if own else head}

  def _rows(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh, shape[0]))

  def _token_batch(self, rows: int, width: int) -> TokenBatch:
    ids = self._rows((rows, width))
    return TokenBatch(ids, ids, ids, self._rows((rows, width), jnp.float32))

  def _pair_batch(self, rows: int, width: int) -> PairBatch:
    side, sums = self._token_batch(rows, width), self._rows((rows,), jnp.float32)
    return PairBatch(side, side, sums, sums)

  def _step_batch(self, rows: int, width: int) -> StepBatch:
    ids, pairs = self._rows((rows, width)), prm.PAIRS_A_ROW * rows
    labels = self._rows((rows, self.config.search.depth_limit), jnp.float32)
    weights = self._rows((pairs,), jnp.float32)
    return StepBatch(ids, ids, ids, ids, labels, labels, self._rows((pairs, 3)), weights)

  def _rollout_batch(self, rows: int, width: int) -> RolloutBatch:
    ids, values = self._rows((rows, width)), self._rows((rows, width), jnp.float32)
    floats = [values] * 6  # mask, three log-probs and values, advantages, returns
    return RolloutBatch(
      *(ids, ids, ids, ids), *floats, self._rows((rows,), jnp.float32), self._rows((rows,))
    )


def _at(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

"""The steps of sampling and search: prompts read, tokens drawn, rows laid out, steps scored."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from o1jax.models import lora
from o1jax.parallel.sharding import RULES
from o1jax.plan import flops
from o1jax.plan.arguments import Arguments, device_bytes
from o1jax.plan.flops import Flops
from o1jax.plan.step import Step, factors, step
from o1jax.sampling import decode, kv_pool
from o1jax.sampling.cache import DecodeState, prefill
from o1jax.sampling.paged import CHUNK
from o1jax.sampling.sampler import COLUMN_MULTIPLE, PROMPT_MULTIPLE, round_up
from o1jax.sampling.scorer import score_candidates
from o1jax.stages import synthesis
from o1jax.stages.layout import sampling_mesh


def of_run(given: Arguments, memory: int) -> list[Step]:
  """Prefill, expansion and decoding of the policy, and the PRM's scores of candidate steps.

  In the layout that sampling has (`stages/layout.py`) on devices of so many bytes: the first three
  with the policy alone, the scores with the policy and the PRM laid out together.
  """
  steps = []
  for make, roles in (
    (_prefill, ('policy',)),
    (_expand, ('policy',)),
    (_decode, ('policy',)),
    (_score, ('policy', 'prm')),
  ):
    trees = [given.params(role) for role in roles]
    mesh = sampling_mesh(given.config, given.model, given.mesh, trees, memory)
    over = given if mesh is None else dataclasses.replace(given, mesh=mesh)
    copies = 0 if mesh is None else _copies(given, over, roles)
    steps.append(dataclasses.replace(make(over), copies=copies))
  return steps


def _copies(given: Arguments, over: Arguments, roles: tuple[str, ...]) -> int:
  """Bytes of a device: the run's own of what is laid out, and what the step does not read of it."""
  *others, last = roles
  own = device_bytes(given.params(last))
  for role in others:
    tree = given.params(role)
    shared = lora.is_adapted(tree)
    own += device_bytes(lora.partition(tree)[0] if shared else tree)
    own += device_bytes(over.params(role))
  return own


@dataclasses.dataclass(frozen=True)
class _Shapes:
  """Of roll-outs and evaluation: whole paths after a prompt."""

  rows: int
  key: str  # the setting of the rows
  prompt: int
  new: int

  @property
  def columns(self) -> int:
    return round_up(self.prompt + self.new, COLUMN_MULTIPLE)


def _shapes(given: Arguments) -> _Shapes:
  search, evaluation, data = given.config.search, given.config.eval, given.config.data
  rows = round_up(max(search.rows, evaluation.rows), given.ways)
  key = 'search.rows' if search.rows >= evaluation.rows else 'eval.rows'
  prompt = round_up(data.max_prompt_tokens, PROMPT_MULTIPLE)
  return _Shapes(rows, key, prompt, data.max_path_tokens)


def _prefill(given: Arguments) -> Step:
  model, at = given.model, _shapes(given)

  def lower(n: int) -> jax.stages.Lowered:
    args = (given.params('policy'), given.rows(n, at.prompt), given.rows(n))
    return prefill.lower(model, *args, columns=at.columns)

  def count(n: int) -> Flops:
    extra = 2 * factors(given, 'policy')
    return flops.forward(model.config, n, at.prompt, read=False, extra=extra)

  return step(given, 'prefill', at.key, at.rows, at.prompt, lower, count)


def _decode(given: Arguments) -> Step:
  model, at, search = given.model, _shapes(given), given.config.search
  eos = model.config.eos_token_id

  def lower(n: int) -> jax.stages.Lowered:
    def begun(state):
      row_keys = jax.random.split(jax.random.key(0), n)
      return decode.begin(state, row_keys, jnp.ones(n, bool), max_new=at.new)

    going = jax.eval_shape(begun, _read(given, n, at.prompt, at.columns))
    going = dataclasses.replace(given.by_rows(going, n), state=_laid_out(given, going.state))
    stop, how = eos if isinstance(eos, tuple) else (eos or 0,), synthesis.drawing(search)
    return decode.run.lower(model, given.params('policy'), going, stop_ids=stop, how=how)

  def count(n: int) -> Flops:
    extra = 2 * factors(given, 'policy')
    return flops.decoding(model.config, n, at.new, at.columns, extra=extra)

  return step(given, 'decode', at.key, at.rows, at.new, lower, count, trips=at.new)


def _expand(given: Arguments) -> Step:
  """The rows of a tree search gathered from its pool of keys and values, for a chunk's problems."""
  model, at, config = given.model, _shapes(given), given.config
  rows = round_up(config.search.rows, given.ways)
  # As `Search` has it, the pools of both halves together: roll-outs begin at every depth.
  simulations = math.ceil(config.search.simulations / config.search.children)
  nodes = 1 + config.search.children * simulations
  problems = min(synthesis.CHUNK, config.data.per_round or config.data.train_problems)
  needed = problems * (config.data.max_prompt_tokens + (nodes - 1) * at.new)
  slots = min(config.search.pool_tokens or needed, needed)
  width = round_up(config.data.max_prompt_tokens + 2 * at.new, COLUMN_MULTIPLE)

  def lower(n: int) -> jax.stages.Lowered:
    pool = jax.eval_shape(lambda: kv_pool.empty_pool(model, slots, problems * nodes))
    # Any row may read any slot: a pool is split by key heads alone.
    keys, values = given.by_heads((pool.keys, pool.values), None)
    hidden = given.whole(*pool.hidden.shape, dtype=pool.hidden.dtype)
    pool = dataclasses.replace(pool, keys=keys, values=values, hidden=hidden)
    return kv_pool.gather.lower(model, pool, given.rows(n, width), given.rows(n), new=CHUNK)

  key = 'search.rows, search.pool_tokens'
  return step(given, 'expand', key, rows, width, lower, lambda n: Flops(0.0, 0.0))


def _score(given: Arguments) -> Step:
  model, at, c = given.model, _shapes(given), given.model.config
  rows = round_up(synthesis.score_rows(given.config.search), given.ways)
  tokens = 1 << (given.config.search.max_step_tokens - 1).bit_length()
  columns = round_up(at.columns + tokens, COLUMN_MULTIPLE)

  def lower(n: int) -> jax.stages.Lowered:
    state = _laid_out(given, _read(given, n, at.prompt, columns))
    args = (given.rows(n), given.rows(n, tokens), given.rows(n, tokens, dtype=bool))
    return score_candidates.lower(model, given.params('prm'), state, *args)

  def count(n: int) -> Flops:
    head = 2 * c.hidden_size**2 if given.config.prm.readout == 'value' else 0
    each = head + 2 * factors(given, 'prm')
    total = flops.layers(c, n * tokens, columns) + flops.logits(c, n * tokens) + each * n * tokens
    return Flops(total, total)

  return step(given, 'score', 'search.rows', rows, tokens, lower, count)


def _read(given: Arguments, rows: int, prompt: int, columns: int) -> DecodeState:
  """Shapes of rows that have read a prompt."""
  tokens = jax.ShapeDtypeStruct((rows, prompt), jnp.int32)
  lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
  read = lambda p, t, n: prefill(given.model, p, t, n, columns=columns)  # noqa: E731
  return jax.eval_shape(read, given.model.shapes(), tokens, lengths)


def _laid_out(given: Arguments, state: DecodeState) -> Any:
  """Rows over `data` and `fsdp`, key heads of the cache over `tensor` if they divide."""
  cache = given.by_heads(state.cache, RULES['batch'])
  return dataclasses.replace(given.by_rows(state, state.rows), cache=cache)

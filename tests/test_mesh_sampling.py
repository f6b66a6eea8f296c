"""Sampling, search and scoring over every mesh, in float32: the same tokens, and nothing whole."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from test_mesh_parity import MESHES

from o1jax.models import Model, ModelConfig, StepHead
from o1jax.parallel import make_mesh, param_shardings, repeated, shard
from o1jax.plan.hlo import Program
from o1jax.sampling import decode, kv_pool
from o1jax.sampling import paged as paged_module
from o1jax.sampling import paths as paths_module
from o1jax.sampling import sampler as sampler_module
from o1jax.sampling import scorer as scorer_module
from o1jax.sampling.cache import gather_rows, prefill
from o1jax.sampling.distinct import Distinct
from o1jax.sampling.guided import Guided, StepIds
from o1jax.sampling.mcts import Search
from o1jax.sampling.sampler import Sampler
from o1jax.sampling.scorer import PrmScorer
from o1jax.sampling.tree_scorer import _log_odds

STEPS = StepIds(step_end=2, terminal=3, eos=1)
MODEL = Model(ModelConfig(40, 16, 1, 4, 2, 32))
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [17], [18, 19]]
SAMPLER = Sampler(MODEL, max_new=8, stop_ids=(1,), rows=20)  # rounded up to what divides
# What makes a cache.
STATES = {'prefill', 'gather_rows', 'begin', 'run', '_begin'}
LARGE = 8 * 32  # bytes of the smallest cache, log-probs and tokens here


def weights():
  rng = np.random.default_rng(5)  # ends steps and rows often, not always
  fill = lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32)  # noqa: E731
  params = jax.tree.map(fill, MODEL.shapes())
  params['embed'][[1, 2, 3]] *= 2.5
  return {'trunk': params, 'head': jax.tree.map(fill, StepHead.init(MODEL.config))}


def judge(jobs):
  return [sum(t % 2 == 0 for t in path) / len(path) for _, path in jobs]


def everything(prm):
  """What is drawn, as plain values, and the log-probs and scores beside it."""
  few = dataclasses.replace(SAMPLER, rows=6)  # so that others wait for their places
  search = Search(few, STEPS, width=2, simulations=2, max_depth=3)
  forest = search(prm['trunk'], PROMPTS * 2, judge, seed=2)
  drawn = SAMPLER(prm['trunk'], PROMPTS, seed=3, samples=3)
  distinct = Distinct(few, 3)(prm['trunk'], PROMPTS * 2, seed=4).paths
  rule = Guided(MODEL, STEPS, children=3, max_step=8, max_program=8, max_depth=2, rows=20)
  descents = rule(prm['trunk'], PrmScorer(MODEL, prm, rows=20), PROMPTS, seed=1).descents
  children = [c for d in descents for choice in d.choices for c in choice.children]
  tokens = {
    'drawn': drawn.tokens.tolist(),
    'paths': forest.paths,
    'rollouts': [r.path for r in forest.rollouts],
    'visits': forest.tree.visits.tolist(),
    'distinct': [path.tokens for path in distinct],
    'descents': [d.tokens for d in descents],
    'children': [c.tokens for c in children],
  }
  return tokens, [
    drawn.logprobs,
    sum((r.logprobs for r in forest.rollouts), ()),
    sum((path.logprobs for path in distinct), ()),
    [c.score for c in children],
  ]


@pytest.fixture(scope='module')
def alone():
  return everything(weights())


@pytest.mark.parametrize('label', MESHES)
def test_the_same_tokens_over_every_mesh_and_no_cache_is_whole(alone, monkeypatch, label):
  mesh, whole, seen = make_mesh(MESHES[label]), [], collections.Counter()

  def spied(module, name):
    real = getattr(module, name)

    def spy(*args, **kwargs):
      result = real(*args, **kwargs)
      if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(result)):
        seen[name] += 1
        whole.extend(f'{name}{path}' for path in repeated(result, LARGE))
      return result

    monkeypatch.setattr(module, name, spy)

  for module in (sampler_module, paged_module, scorer_module):
    for name in STATES & vars(module).keys():
      spied(module, name)
  with jax.set_mesh(mesh):
    prm = weights()
    tokens, floats = everything(shard(prm, param_shardings(mesh, MODEL, prm)))
    state = prefill(MODEL, prm['trunk'], np.ones((24, 32), np.int32), np.ones(24, np.int32))
  assert seen.keys() == STATES and whole == []
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  part = state.cache[0][0].addressable_shards[0].data
  assert part.shape[:2] == (24 // ways, 2 // mesh.shape['tensor'])
  assert tokens == alone[0]
  for found, want in zip(floats, alone[1], strict=True):
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


ROWS, COLUMNS = 64, 256  # of a cache that is much larger than all else


def programs(prm):
  """What takes rows of a cache by their numbers, compiled over the ambient mesh."""
  trunk, at = prm['trunk'], np.arange(ROWS, dtype=np.int32)
  tokens, mask = np.ones((ROWS, 8), np.int32), np.ones((ROWS, 8), bool)
  state = prefill(MODEL, trunk, tokens, tokens[:, 0], columns=COLUMNS)
  score = scorer_module.score_candidates.lower(MODEL, prm, state, at, tokens, mask).compile()
  spread = gather_rows.lower(state, at).compile()
  keys = jax.random.split(jax.random.key(0), ROWS)
  rows = decode.begin(spread(state, at), keys, mask[:, 0], max_new=8)
  pool, table = kv_pool.empty_pool(MODEL, ROWS, ROWS), np.tile(at, (ROWS, 1))
  refill, store, read = kv_pool.refill, kv_pool.store, paths_module._read
  behind = (table, at), tokens, mask, (np.tile(at[:, None], (1, 8)), at)
  _, scored = score(prm, state, at, tokens, mask)
  return {
    'score': score,
    'adopt': scorer_module.adopt.lower(state, scored, at).compile(),
    'spread': spread,
    'compact': sampler_module._gather.lower(rows, at[::2], mask[::2, 0]).compile(),
    'refill': refill.lower(MODEL, pool, state, at, table, at, new=8).compile(),
    'read': read.lower(MODEL, trunk, prm['head'], pool, *behind, measure=_log_odds).compile(),
    'store': store.lower(pool, state, (at, at, at), state.hidden, (at, at)).compile(),
  }


@pytest.mark.parametrize('label', ['4x2', '2x2x2'])
def test_no_row_of_a_cache_goes_to_another_device(label):
  mesh, prm = make_mesh(MESHES[label]), weights()
  with jax.set_mesh(mesh):
    compiled = programs(shard(prm, param_shardings(mesh, MODEL, prm)))
  own = ROWS * COLUMNS * 2 * 4 * 4 // 8  # bytes of a device's part of the keys
  for name, program in compiled.items():
    sent = Program(program.as_text()).collectives
    assert [c for c in sent if c.payload >= own] == [], name


@pytest.mark.parametrize('label', ['4x2', '2x2x2'])
def test_the_cache_behind_which_a_step_is_read_is_in_parts(label):
  """It is no output of the program: its memory tells, behind prefixes that outweigh all else."""
  mesh, prm, width = make_mesh(MESHES[label]), weights(), 1024
  at = np.arange(ROWS, dtype=np.int32)
  token = at[:, None]
  with jax.set_mesh(mesh):
    prm = shard(prm, param_shardings(mesh, MODEL, prm))
    pool, table = kv_pool.empty_pool(MODEL, ROWS, ROWS), np.tile(at, (ROWS, width // ROWS))
    behind = (table, at), token % 40, token >= 0, (token, at)
    read = paths_module._read.lower(
      MODEL, prm['trunk'], prm['head'], pool, *behind, measure=_log_odds
    )
    held = read.compile().memory_analysis().temp_size_in_bytes
  whole = ROWS * width * kv_pool.token_bytes(MODEL)
  assert held < whole / 2


def test_rows_that_shrink_on_their_devices_draw_the_same(monkeypatch):
  real, sizes = sampler_module.compact, []
  monkeypatch.setattr(sampler_module, 'SMALLEST', 8)
  monkeypatch.setattr(sampler_module, 'SHRINK', 2)
  monkeypatch.setattr(sampler_module, 'compact', lambda *a: sizes.append(a[2]) or real(*a))
  sampler = dataclasses.replace(SAMPLER, max_new=16, rows=32, stop_ids=tuple(range(1, 40, 6)))
  mesh, trunk = make_mesh(MESHES['4x2']), weights()['trunk']
  prompts = PROMPTS[:2]  # fewer than the four parts: each is read in two
  alone = sampler(trunk, prompts, seed=3, samples=16)
  sizes.clear()
  with jax.set_mesh(mesh):
    placed = shard(trunk, param_shardings(mesh, MODEL, trunk))
    found = sampler(placed, prompts, seed=3, samples=16)
  assert found.tokens.tolist() == alone.tokens.tolist()
  assert sizes and max(sizes) < 32

"""The pool of keys and values against full forwards, and searches through it against others."""

import dataclasses
import functools
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from sampling_cases import (
  EOS,
  MAX_NEW,
  MODEL,
  PROMPTS,
  STEP_END,
  STEPS,
  forward_of,
  pad,
  tiny_params,
)

from o1jax.data import trees
from o1jax.models import StepHead
from o1jax.sampling import half_grown, paged
from o1jax.sampling.kv_pool import token_bytes
from o1jax.sampling.mcts import Search
from o1jax.sampling.memory import check_memory
from o1jax.sampling.paged import continue_paths
from o1jax.sampling.paths import Paths
from o1jax.sampling.sampler import Sampler
from o1jax.sampling.scorer import PrmScorer
from o1jax.sampling.tree_scorer import TreeScorer
from o1jax.search import UNVISITED, gumbel_interior, gumbel_root, puct, widening

SAMPLER = Sampler(MODEL, max_new=MAX_NEW, stop_ids=(EOS,), rows=32)


def make_paths(slots=400, states=64):
  return Paths(MODEL, tiny_params(), PROMPTS, slots=slots, states=states, rows=32)


def draw_paths(rng, depth):
  """A path of `depth` random steps after each prompt."""

  def step():
    return (*map(int, rng.integers(4, 40, rng.integers(1, 6))), STEP_END)

  return [(p, *(step() for _ in range(depth))) for p in range(len(PROMPTS))]


def assert_states_are_right(paths, some):
  """The pool's states give the next-token distributions of full forwards over the paths."""
  rows = [[*PROMPTS[p[0]], *sum(p[1:], ())] for p in some]
  logits = MODEL.logits(tiny_params(), paths.hidden(some, 32))
  got = np.asarray(jax.nn.log_softmax(logits))[: len(some)]
  full = forward_of(64)(rows)
  want = np.stack([full[r, len(row) - 1] for r, row in enumerate(rows)])
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_states_equal_full_forwards_at_every_depth():
  paths, deep = make_paths(), draw_paths(np.random.default_rng(0), 5)
  paths.read(deep)
  for depth in range(6):
    assert_states_are_right(paths, [p[: 1 + depth] for p in deep])
  real = sum(map(paths.length, deep))
  assert paths.read_again == 0 and paths.computed >= real
  before = paths.computed
  paths.read([p[:3] for p in deep])  # nothing is read twice
  assert paths.computed == before


def test_states_equal_full_forwards_after_eviction_and_reuse():
  rng = np.random.default_rng(1)
  paths = make_paths(slots=110)
  several = [draw_paths(rng, 4) for _ in range(4)]
  for some in [*several, *several]:  # each pushes others out, and comes back
    paths.read(some)
    for depth in range(5):
      assert_states_are_right(paths, [p[: 1 + depth] for p in some])
  assert paths.evicted > 20 and paths.read_again > 0
  assert all(p[:-1] in paths for p in paths._entries if len(p) > 1)
  with pytest.raises(ValueError, match='pool of 40 tokens'):
    make_paths(slots=40).read(several[0])


def test_pinned_paths_stay_and_retired_ones_go_first():
  rng = np.random.default_rng(2)
  paths = make_paths(slots=110)
  first, second, third = (draw_paths(rng, 2) for _ in range(3))
  paths.read(first + second)
  paths.pin(first[0], 1)
  for path in second:
    paths.retire(path)
  paths.read(third)
  assert not all(p in paths for p in second) and all(p in paths for p in first)
  paths.read(draw_paths(rng, 3))
  assert first[0] in paths


@pytest.mark.parametrize('rows, chunk', [(32, 16), (8, 5)])
def test_continued_paths_are_those_of_the_sampler(rows, chunk, monkeypatch):
  monkeypatch.setattr(paged, 'CHUNK', chunk)  # batches are refilled in mid-row
  deep = [p[: 1 + i] for i, p in enumerate(draw_paths(np.random.default_rng(3), 3))]
  prompts = [[*PROMPTS[p[0]], *sum(p[1:], ())] for p in deep]
  want = SAMPLER(tiny_params(), prompts, seed=4, ids=np.arange(4), samples=6)
  todo = [p for p in deep for _ in range(6)]
  ids = np.column_stack([np.repeat(np.arange(4), 6), np.tile(np.arange(6), 4)])
  paths = make_paths()
  sampler = dataclasses.replace(SAMPLER, rows=rows)
  got = continue_paths(sampler, paths, todo, seed=4, ids=ids, marks=STEPS.stops)
  for field in ('tokens', 'lengths', 'stopped'):
    np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
  np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
  # The first step of every row is in the pool, as a full forward would have it.
  steps = [got.ids(r) for r in range(len(todo))]
  ends = [next((t for t, x in enumerate(s) if x in STEPS.stops), None) for s in steps]
  new = {
    (*p, tuple(s[: e + 1])) for p, s, e in zip(todo, steps, ends, strict=True) if e is not None
  }
  assert len(new) > 8 and all(p in paths for p in new)
  assert_states_are_right(paths, sorted(new))
  further = [(*p, (9, STEP_END)) for p in sorted(new)[:8]]  # which read the keys of those steps
  paths.read(further)
  assert_states_are_right(paths, further)
  paths.read(draw_paths(np.random.default_rng(9), 4))  # nothing stayed pinned
  assert not any(e.pins for e in paths._entries.values())


def test_steps_behind_long_prompts_are_those_of_the_sampler():
  rng = np.random.default_rng(6)
  prompts = [rng.integers(4, 40, n).tolist() for n in (30, 33, 61, 64, 70)]
  sampler = dataclasses.replace(SAMPLER, stop_ids=STEPS.stops, rows=8)  # longer ones join shorter
  paths = Paths(MODEL, tiny_params(), prompts, slots=900, states=60, rows=8)
  todo = [(p,) for p in range(5) for _ in range(3)]
  ids = np.column_stack([np.arange(15), np.zeros(15, int)])
  for seed in (4, 5):  # the second time behind the steps that were found first
    begun = [[*prompts[p[0]], *sum(p[1:], ())] for p in todo]
    want = sampler(tiny_params(), begun, seed=seed, ids=ids[: len(todo), :1])
    got = continue_paths(sampler, paths, todo, seed=seed, ids=ids[: len(todo)], marks=STEPS.stops)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    ended = np.flatnonzero(got.stopped)
    todo = [(*todo[r], tuple(got.ids(r))) for r in ended]
  assert len(todo) > 3


def judge(jobs):
  """The return of a path: how many of its tokens are even; NaN for a few of them."""
  return [
    float('nan') if len(path) % 7 == 0 else sum(t % 2 == 0 for t in path) / len(path)
    for _, path in jobs
  ]


SEARCH = Search(SAMPLER, STEPS, width=2, simulations=5, max_depth=4, c=0.5)


def assert_same_forest(one, other):
  assert one.paths == other.paths
  assert [r.tokens for r in one.rollouts] == [r.tokens for r in other.rollouts]
  for a, b in zip(jax.tree.leaves(one.tree), jax.tree.leaves(other.tree), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.fixture(scope='module')
def forest():
  return SEARCH(tiny_params(), PROMPTS, judge, seed=2)


def test_a_search_reads_nothing_twice_and_finds_the_same_in_a_small_pool(forest):
  assert forest.read_again == 0 and max(forest.tree.depth.flat) > 1
  small = dataclasses.replace(SEARCH, pool_tokens=36)(tiny_params(), PROMPTS, judge, seed=2)
  assert small.read_again > 0
  assert_same_forest(small, forest)


def test_the_judge_works_beside_the_device_and_changes_nothing(forest):
  main, seen = threading.get_ident(), []

  def watched(jobs):
    seen.append((threading.get_ident(), {problem for problem, _ in jobs}))
    return judge(jobs)

  apart = SEARCH(tiny_params(), PROMPTS, watched, seed=2)
  assert_same_forest(apart, forest)
  assert all(thread != main for thread, _ in seen)
  assert all(asked <= {0, 1} or asked <= {2, 3} for _, asked in seen)  # the halves take turns
  together = dataclasses.replace(SEARCH, overlap=False)(tiny_params(), PROMPTS, judge, seed=2)
  assert_same_forest(together, forest)


def test_a_search_that_does_not_fit_says_so_before_it_starts():
  each = token_bytes(MODEL)
  assert each == 2 * 2 * 2 * 4 * 4  # keys and values, layers, heads, their width, float32
  sizes = {'slots': 993, 'states': 10, 'rows': 4, 'columns': 32}
  needed = 1024 * each + 10 * 64 + 2 * 4 * 32 * each
  check_memory(MODEL, **sizes, free=needed)
  with pytest.raises(ValueError, match=rf'needs {needed} bytes .* there are 60000; lower pool_tok'):
    check_memory(MODEL, **sizes, free=60_000)
  with pytest.raises(ValueError, match='lower rows=4'):
    check_memory(MODEL, **sizes, free=100)
  huge = dataclasses.replace(SEARCH, simulations=10**9)
  with pytest.raises(ValueError, match='lower pool_tokens'):
    huge(tiny_params(), PROMPTS, judge)


def test_the_room_that_a_search_is_told_to_take_is_there():
  free = 400_000
  sizes = {'states': 10, 'rows': 4, 'columns': 32, 'free': free}
  with pytest.raises(ValueError, match='lower pool_tokens to at most') as told:
    check_memory(MODEL, slots=5000, **sizes)
  most = int(re.search(r'at most (\d+)', str(told.value)).group(1))
  check_memory(MODEL, slots=most, **sizes)
  with pytest.raises(ValueError, match='lower pool_tokens'):
    check_memory(MODEL, slots=2 * most, **sizes)


def test_widths_are_few():
  wide = [paged._roomy(columns) for columns in range(1, 1025)]
  assert all(w >= columns for columns, w in enumerate(wide, start=1))
  assert sorted(set(wide)) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]


def tree_scores(paths):
  """A process reward that likes even tokens."""
  return [sum(t % 2 == 0 for t in p[-1]) / len(p[-1]) for p in paths]


@pytest.mark.parametrize('mix', [0.5, 1.0])
def test_values_are_process_rewards_returns_or_their_mix(mix):
  search = dataclasses.replace(SEARCH, mix=mix, rule=puct)
  out = search(tiny_params(), PROMPTS, judge, score=tree_scores, seed=2)
  tree, seen = out.tree, 0
  for b in range(len(PROMPTS)):
    for node in range(1, int(tree.size[b])):
      below = [c for c in tree.children[b, node] if c != UNVISITED]
      own = tree.visits[b, node] - sum(tree.visits[b, c] for c in below)
      total = tree.value_sum[b, node] - sum(tree.value_sum[b, c] for c in below)
      step = out.step(b, node)
      assert tree.score[b, node] == pytest.approx(tree_scores([(b, step)])[0], abs=1e-6)
      returns = [r.value for r in out.rollouts if (r.problem, r.node) == (b, node)]
      returns = [v for v in returns if not np.isnan(v)]
      if tree.terminal[b, node]:
        assert own == len(returns) and total == pytest.approx(sum(returns), abs=1e-4)
      elif mix == 1:
        assert total == pytest.approx(own * tree.score[b, node], abs=1e-4)
        assert not (tree.cut[b, node] and own)  # marked, and in no value
      else:
        want = sum(0.5 * v + 0.5 * tree.score[b, node] for v in returns)
        assert own == len(returns) and total == pytest.approx(want, abs=1e-4)
      seen += own > 0
  assert seen > 8
  with pytest.raises(ValueError, match='needs a score'):
    search(tiny_params(), PROMPTS, judge)


def test_tree_scores_are_those_of_the_descent():
  head = StepHead.init(MODEL.config)
  head = {n: head[n] + jax.random.normal(jax.random.key(3), a.shape) for n, a in head.items()}
  prm = {'trunk': tiny_params(), 'head': head}
  deep = draw_paths(np.random.default_rng(4), 3)
  scorer = PrmScorer(MODEL, prm, rows=3)  # two chunks of steps
  state = scorer.start(*pad(PROMPTS, 16))
  many = TreeScorer(MODEL, prm, PROMPTS, STEPS, tokens=400, nodes=64)
  small = TreeScorer(MODEL, prm, PROMPTS, STEPS, tokens=110, nodes=64)
  for depth in (1, 2, 3):
    log_odds = scorer.score(state, np.arange(4), [p[depth] for p in deep])
    want = 1 / (1 + np.exp(-log_odds))
    for tree in (many, small):
      for more in (50, 60):  # pushes others out
        small(draw_paths(np.random.default_rng(depth + more), 3))
      np.testing.assert_allclose(tree([p[: depth + 1] for p in deep]), want, atol=1e-4)
    state = scorer.advance(state, [p[depth] for p in deep])
  assert all(pool.read_again == 0 for pool in many.pools)
  assert all(pool.read_again > 0 for pool in small.pools)


class Killed(Exception):
  pass


@pytest.mark.parametrize('stop_after', [1, 4, 7])
@pytest.mark.parametrize('mix', [0.0, 1.0])
def test_a_search_stopped_half_way_goes_on_to_the_same_forest(mix, stop_after, monkeypatch):
  search = dataclasses.replace(SEARCH, mix=mix, allowed=widening(1.0, 0.5), slots=8)
  judged, kept, count = [], {}, 0

  def noted(jobs):
    judged.extend(jobs)
    return judge(jobs)

  def boundary(state):
    nonlocal count
    count += 1
    if count == stop_after:
      kept.update(state())
      raise Killed

  with_scores = functools.partial(search, tiny_params(), PROMPTS, score=tree_scores, seed=2)
  whole = with_scores(evaluate=judge)
  with pytest.raises(Killed):
    with_scores(evaluate=noted, boundary=boundary)
  assert judged or mix  # process rewards alone judge no roll-outs at first
  judged.clear()
  known, restore = set(), half_grown.restore

  def restored(growing, saved):
    restore(growing, saved)
    known.update((int(p.problems[b]), path) for p in growing for b, path in p.returns)

  monkeypatch.setattr(half_grown, 'restore', restored)
  on = with_scores(evaluate=noted, saved=kept)
  assert_same_forest(on, whole)
  assert [dataclasses.replace(r, logprobs=()) for r in on.rollouts if not np.isnan(r.value)] == [
    dataclasses.replace(r, logprobs=()) for r in whole.rollouts if not np.isnan(r.value)
  ]
  np.testing.assert_array_equal(on.masked, whole.masked)
  np.testing.assert_array_equal(on.tree.visits, whole.tree.visits)
  assert on.generated == whole.generated
  assert known or mix
  assert len(judged) == len(set(judged) - known)  # no program twice


def test_what_goes_wrong_in_one_half_ends_the_other():
  def broken(jobs):
    raise OSError('no sandbox')

  many = [PROMPTS[i % len(PROMPTS)] for i in range(8)]
  with pytest.raises(OSError, match='no sandbox'):
    SEARCH(tiny_params(), many, broken, seed=2)
  left = [thread.name for thread in threading.enumerate()]
  assert not any(name.startswith('ThreadPoolExecutor') for name in left)


def test_gumbel_and_widened_searches_are_independent_of_their_batch():
  gumbel = dataclasses.replace(
    SEARCH, rule=gumbel_interior, root_rule=gumbel_root(SEARCH.simulations - 1)
  )
  wide = dataclasses.replace(SEARCH, allowed=widening(1.0, 0.5), slots=40)
  for search in (gumbel, wide):
    together = search(tiny_params(), PROMPTS, judge, seed=2)
    alone = search(tiny_params(), [PROMPTS[2]], judge, seed=2, ids=np.array([2]))
    assert alone.paths[0] == together.paths[2]
    np.testing.assert_array_equal(alone.tree.visits[0], together.tree.visits[2])
  counts = (together.tree.children != UNVISITED).sum(-1)
  assert counts.max() > SEARCH.width
  with pytest.raises(ValueError, match='slots=2'):
    dataclasses.replace(wide, slots=2)


def test_the_same_trees_in_a_batch_of_1_8_and_64():
  prompts, ids = PROMPTS * 16, np.arange(64)
  search = dataclasses.replace(SEARCH, simulations=3)
  whole = search(tiny_params(), prompts, judge, seed=2, ids=ids)
  assert len({whole.paths[b] for b in range(0, 64, 4)}) > 8  # one prompt, named otherwise
  for size, first in ((8, 24), (1, 37)):
    own = slice(first, first + size)
    part = search(tiny_params(), prompts[own], judge, seed=2, ids=ids[own])
    assert part.paths == whole.paths[own]
    np.testing.assert_array_equal(part.tree.visits, whole.tree.visits[own])
    np.testing.assert_allclose(part.tree.value_sum, whole.tree.value_sum[own], atol=1e-6)


def test_trees_come_back_from_their_files_and_replay_the_search(forest, tmp_path):
  for b, prompt in enumerate(PROMPTS):
    (tmp_path / f'{b}.npz').write_bytes(
      trees.to_bytes(trees.tree_of(forest, b, f'problem {b}', prompt))
    )
  back = [trees.read(tmp_path / f'{b}.npz') for b in range(len(PROMPTS))]
  for b, tree in enumerate(back):
    assert tree.problem_id == f'problem {b}' and tree.prompt.tolist() == PROMPTS[b]
    assert len(tree.parent) == forest.tree.size[b]
    assert tree.steps == tuple(forest.step(b, n) for n in range(len(tree.parent)))
    for name in ('visits', 'value_sum', 'terminal', 'cut', 'closed', 'depth', 'prior'):
      want = getattr(forest.tree, name)[b, : len(tree.parent)]
      np.testing.assert_array_equal(getattr(tree, name), want)
    for path, node in zip(tree.rollouts, tree.rollout_node, strict=True):
      assert path[: len(forest.paths[b][node])] == forest.paths[b][node]
    ended = np.array([path[-1] == EOS for path in tree.rollouts])
    whole = ended & np.isnan(tree.rollout_value)
    assert tree.masked.sum() == len(set(tree.rollout_node[whole]))
  assert any(tree.masked.any() for tree in back)
  assert_same_forest(SEARCH(tiny_params(), PROMPTS, trees.recorded(back), seed=2), forest)
  with pytest.raises(KeyError, match='not recorded'):
    SEARCH(tiny_params(), PROMPTS, trees.recorded(back), seed=3)
  code = 'import sys, o1jax.data.trees as t; assert "jax" not in sys.modules; '
  code += f't.read({str(tmp_path / "0.npz")!r})'
  subprocess.run([sys.executable, '-c', code], check=True)
  with np.load(tmp_path / '0.npz') as file:
    np.savez(tmp_path / 'other.npz', **dict(file) | {'version': np.array(99)})
  with pytest.raises(ValueError, match='version 99'):
    trees.read(tmp_path / 'other.npz')

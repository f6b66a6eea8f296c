"""Decoding against full forwards, drawing against the softmax, descents against an oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import (
  EOS,
  MAX_NEW,
  MODEL,
  PROMPTS,
  STEP_END,
  STEPS,
  TERMINAL,
  forward_of,
  pad,
  tiny_params,
)

from o1jax.models import StepHead
from o1jax.sampling.cache import extend, gather_rows, grow, prefill, repeat_rows
from o1jax.sampling.decode import decode
from o1jax.sampling.draw import Drawing, draw, inverse_cdf
from o1jax.sampling.guided import Guided
from o1jax.sampling.keys import row_keys, stable_id
from o1jax.sampling.mcts import Search
from o1jax.sampling.sampler import Sampler
from o1jax.sampling.scorer import PrmScorer
from o1jax.search import ROOT, UNVISITED


@pytest.fixture(scope='module')
def model():
  return MODEL


@pytest.fixture(scope='module')
def params():
  return tiny_params()


@pytest.fixture(scope='module')
def full_logprobs():
  return forward_of(32)


@pytest.fixture(scope='module')
def sampler(model):
  return Sampler(model, max_new=MAX_NEW, stop_ids=(EOS,), rows=32)


def test_greedy_equals_greedy_by_full_forward(model, params, sampler, full_logprobs):
  greedy = dataclasses.replace(sampler, how=Drawing(greedy=True), stop_ids=(EOS, STEP_END))
  out = greedy(params, PROMPTS)
  for row, prompt in enumerate(PROMPTS):
    want = list(prompt)
    while len(want) < len(prompt) + MAX_NEW and want[-1] not in (EOS, STEP_END):
      want.append(int(full_logprobs([want])[0, len(want) - 1].argmax()))
    assert out.ids(row) == want[len(prompt) :]
    assert out.stopped[row] == (want[-1] in (EOS, STEP_END))


def test_logprobs_equal_those_of_a_full_forward(params, sampler, full_logprobs):
  cool = dataclasses.replace(sampler, how=Drawing(temperature=0.7))
  for one in (sampler, cool):  # the log-probs are of temperature 1 whatever was drawn from
    out = one(params, PROMPTS, samples=2, seed=3)
    rows = [[*PROMPTS[r // 2], *out.ids(r)] for r in range(len(out.tokens))]
    full = full_logprobs(rows)
    for r, row in enumerate(rows):
      start = len(PROMPTS[r // 2])
      want = [full[r, t - 1, row[t]] for t in range(start, len(row))]
      np.testing.assert_allclose(out.logprobs[r, : out.lengths[r]], want, atol=1e-4)
      assert not out.logprobs[r, out.lengths[r] :].any()


def test_a_row_draws_the_same_in_any_batch(params, sampler):
  ids = np.array([stable_id(f'problem {i}') for i in range(len(PROMPTS))])
  together = sampler(params, PROMPTS, ids=ids, samples=3, seed=7)
  order = [3, 0]
  apart = sampler(params, [PROMPTS[i] for i in order], ids=ids[order], samples=3, seed=7)
  for row, i in enumerate(order):
    for k in range(3):
      assert apart.ids(3 * row + k) == together.ids(3 * i + k)
  other = sampler(params, PROMPTS, ids=ids, samples=3, seed=8)
  assert not np.array_equal(other.tokens, together.tokens)
  assert len({tuple(together.ids(k)) for k in range(3)}) > 1  # samples of a prompt differ


def test_stop_tokens_end_rows_and_costs_are_counted(params, sampler):
  out = sampler(params, PROMPTS, samples=4)
  for row in range(len(out.tokens)):
    ids = out.ids(row)
    assert EOS not in ids[:-1] and not out.tokens[row, len(ids) :].any()
    assert out.stopped[row] == (ids[-1] == EOS)
    assert out.stopped[row] or len(ids) == MAX_NEW
  assert out.stopped.any() and not out.stopped.all()
  assert out.generated == out.lengths.sum() <= out.computed


def test_compaction_changes_nothing(params, sampler, monkeypatch):
  plain = sampler(params, PROMPTS, seed=1, samples=8)
  monkeypatch.setattr('o1jax.sampling.sampler.SMALLEST', 4)
  monkeypatch.setattr('o1jax.sampling.sampler.SHRINK', 2)
  compacted = sampler(params, PROMPTS, seed=1, samples=8)
  assert compacted.computed < plain.computed
  for field in ('tokens', 'lengths', 'stopped'):
    np.testing.assert_array_equal(getattr(compacted, field), getattr(plain, field))
  np.testing.assert_allclose(compacted.logprobs, plain.logprobs, atol=1e-5)


def test_empty_prompts_and_stray_ids_are_errors(params, sampler):
  with pytest.raises(ValueError, match='prompt 1 is empty'):
    sampler(params, [[5], []])
  with pytest.raises(ValueError, match='1 ids for 2 prompts'):
    sampler(params, [[5], [6]], ids=np.array([4]))
  with pytest.raises(ValueError, match='max_new of at most 2046'):
    dataclasses.replace(sampler, max_new=2047)(params, PROMPTS[1:2])
  state = prefill(sampler.model, params, *pad(PROMPTS, 8))
  with pytest.raises(ValueError, match='room for 0; grow it'):
    sampler.resume(params, state, np.arange(4), 0, np.arange(4)[:, None])


def test_holes_are_not_seen(model, params, full_logprobs):
  tokens, lengths = pad([[5, 6, 7], [8, 9]], 4)
  state = prefill(model, params, tokens, lengths, columns=16)
  state = grow(model, repeat_rows(state, 2), columns=24)
  # Rows read chunks of different lengths, some nothing at all, then move around.
  chunk, counts = pad([[20, 21], [22], [], [23, 24]], 3)
  mask = np.arange(3)[None] < counts[:, None]
  _, state = extend(model, params, state, chunk, mask)
  state = gather_rows(state, np.array([3, 1, 2, 0]))
  more, counts = pad([[30], [31, 32], [33], []], 3)
  hidden, state = extend(model, params, state, more, np.arange(3)[None] < counts[:, None])
  rows = [[8, 9, 23, 24, 30], [5, 6, 7, 22, 31, 32], [8, 9, 33], [5, 6, 7, 20, 21]]
  full = full_logprobs(rows)
  got = jax.nn.log_softmax(model.logits(params, state.hidden))
  for r, row in enumerate(rows):
    np.testing.assert_allclose(got[r], full[r, len(row) - 1], atol=1e-4)
  assert state.position.tolist() == [len(r) for r in rows]
  first = jax.nn.log_softmax(model.logits(params, hidden[:, 0]))
  np.testing.assert_allclose(first[1], full[1, 4], atol=1e-4)


def test_rows_that_are_not_live_stay_as_they_were(model, params):
  tokens, lengths = pad([[5, 6, 7], [8, 9]], 4)
  keys = row_keys(0, np.arange(2)[:, None])
  state = prefill(model, params, tokens, lengths, columns=16)
  alone = decode(model, params, state, keys, max_new=4, stop_ids=(), how=Drawing(), live=None)
  state = prefill(model, params, tokens, lengths, columns=16)
  live = jnp.array([True, False])
  half = decode(model, params, state, keys, max_new=4, stop_ids=(), how=Drawing(), live=live)
  assert half.lengths.tolist() == [4, 0]
  again = decode(model, params, half.state, keys, max_new=4, stop_ids=(), how=Drawing(), live=~live)
  np.testing.assert_array_equal(again.tokens[1], alone.tokens[1])
  np.testing.assert_array_equal(half.tokens[0], alone.tokens[0])
  with pytest.raises(ValueError, match='columns=2'):
    prefill(model, params, tokens, lengths, columns=2)


@pytest.mark.parametrize('size', [5, 33, 100])
def test_inverse_cdf_is_exact(size):
  rng = np.random.default_rng(size)
  weights = rng.gamma(0.3, size=size).astype(np.float32)
  weights[rng.random(size) < 0.3] = 0.0
  weights[-1] = 0.0  # a zero at the very end, where rounding would fall
  n = 40_000
  uniform = np.append((np.arange(n - 1) + 0.5) / (n - 1), 1 - 2**-24).astype(np.float32)
  index = np.asarray(inverse_cdf(jnp.tile(jnp.asarray(weights)[None], (n, 1)), uniform))
  share = weights / weights.sum()
  counts = np.bincount(index, minlength=size)
  # Even spacing: every count is its expectation to within the ends of its interval.
  np.testing.assert_allclose(counts, share * n, atol=2.0)
  assert not counts[weights == 0].any()


def test_no_rounding_leads_beyond_the_vocabulary():
  rng = np.random.default_rng(0)
  weights = rng.gamma(0.3, size=(20_000, 45)).astype(np.float32)  # its last block is not full
  index = np.asarray(inverse_cdf(jnp.asarray(weights), jnp.full(len(weights), 1 - 2**-24)))
  assert index.max() < 45 and (weights[np.arange(len(weights)), index] > 0).all()


def test_draws_follow_the_softmax():
  n, v = 30_000, 50
  logits = jax.random.normal(jax.random.key(0), (1, v)) * 2
  uniform = jax.random.uniform(jax.random.key(1), (n,))
  for how in (Drawing(), Drawing(temperature=0.6)):
    token, logprob = draw(jnp.tile(logits, (n, 1)), uniform, how)
    expected = np.asarray(jax.nn.softmax(logits[0] / how.temperature)) * n
    counts = np.bincount(np.asarray(token), minlength=v)
    keep = expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[keep].sum()
    assert chi2 < keep.sum() + 5 * np.sqrt(2 * keep.sum())
    np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[0, token], atol=1e-5)


def test_truncation_keeps_the_likeliest_and_no_others():
  shares = jnp.array([[0.05, 0.4, 0.15, 0.3, 0.1]])
  n = 2000
  logits, uniform = jnp.tile(jnp.log(shares), (n, 1)), (jnp.arange(n) + 0.5) / n
  token, logprob = draw(logits, uniform, Drawing(top_k=3))
  np.testing.assert_allclose(
    np.bincount(token, minlength=5) / n, [0, 0.4 / 0.85, 0.15 / 0.85, 0.3 / 0.85, 0], atol=2e-3
  )
  np.testing.assert_allclose(logprob, jnp.log(shares)[0, token], rtol=1e-5)  # not truncated
  token, _ = draw(logits, uniform, Drawing(top_p=0.6))
  np.testing.assert_allclose(
    np.bincount(token, minlength=5) / n, [0, 4 / 7, 0, 3 / 7, 0], atol=2e-3
  )
  assert set(np.asarray(draw(logits, uniform, Drawing(top_p=1e-6))[0])) == {1}
  token, _ = draw(logits, uniform, Drawing(top_k=3, top_p=0.5))  # .5 of what top-k left
  assert set(np.asarray(token)) == {1, 3}
  for wrong in ({'temperature': 0.0}, {'top_k': 0}, {'top_p': 1.5}):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      Drawing(**wrong)


class Oracle:
  """Likes a step the better the larger its first token; knows nothing of the model."""

  def start(self, tokens, lengths):
    return [list(t[:n]) for t, n in zip(tokens, lengths, strict=True)]

  def score(self, state, slots, steps):
    return np.array([float(step[0]) for step in steps])

  def advance(self, state, steps):
    return [a + list(s) for a, s in zip(state, steps, strict=True)]


@pytest.fixture(scope='module')
def guided(model):
  return Guided(model, STEPS, children=8, max_step=8, max_depth=3, rows=64, greedy_program=False)


def test_guided_descent_takes_what_the_oracle_likes(params, guided, full_logprobs):
  out = guided(params, Oracle(), PROMPTS)
  deep = 0
  for prompt, descent in zip(PROMPTS, out.descents, strict=True):
    path = list(prompt)
    for choice in descent.choices:
      taken = choice.children[choice.chosen]
      whole = [c for c in choice.children if not c.cut]
      assert taken.score == max(c.score for c in whole or choice.children)
      assert sum(c.count for c in choice.children) == guided.children
      assert len({c.tokens for c in choice.children}) == len(choice.children)
      for child in choice.children:  # every sibling's log-prob is that of its tokens
        row = [*path, *child.tokens]
        full = full_logprobs([row])[0]
        want = sum(full[t - 1, row[t]] for t in range(len(path), len(row)))
        np.testing.assert_allclose(child.logprob, want, atol=1e-3)
      path += taken.tokens
    deep += len(descent.choices) > 1
    last = descent.choices[-1].children[descent.choices[-1].chosen]
    assert descent.finished == (not last.cut and STEPS.is_terminal(last.tokens))
    assert descent.finished or last.cut or len(descent.choices) == guided.max_depth
    assert list(descent.tokens) == path[len(prompt) :]
  assert deep  # some went through the gathered caches
  nodes = [choice for d in out.descents for choice in d.choices]
  children = [c for choice in nodes for c in choice.children]
  assert out.generated == sum(c.count * len(c.tokens) for c in children) < out.computed
  assert out.scored == sum(len(c.tokens) for c in children) + sum(map(len, PROMPTS))


def test_guided_descent_is_independent_of_its_batch(params, guided):
  ids = np.array([[stable_id(str(i)), 0] for i in range(len(PROMPTS))])
  together = guided(params, Oracle(), PROMPTS, ids=ids).descents
  alone = guided(params, Oracle(), [PROMPTS[2]], ids=ids[[2]]).descents[0]
  assert [c.chosen for c in alone.choices] == [c.chosen for c in together[2].choices]
  assert alone.tokens == together[2].tokens
  varied = dataclasses.replace(guided, pick_temperature=50.0)
  several = [varied(params, Oracle(), [PROMPTS[2]], ids=[[0, a]]).descents[0] for a in range(4)]
  assert len({d.tokens for d in several}) > 1


def test_a_prior_weighs_the_log_probability_beside_the_score(params, guided):
  def choices(prior):
    rule = dataclasses.replace(guided, prior=prior)
    return [c for d in rule(params, Oracle(), PROMPTS).descents for c in d.choices]

  alone, both, most = ({c.children: c.chosen for c in choices(w)} for w in (0.0, 2.0, 1e6))
  for prior, picked in ((2.0, both), (1e6, most)):
    for children, chosen in picked.items():
      value = [-np.inf if c.cut else c.score + prior * c.logprob for c in children]
      assert chosen == np.argmax(value)
  common = alone.keys() & most.keys()  # the nodes that both came to
  assert any(alone[node] != most[node] for node in common)


def test_prm_scores_are_those_of_the_whole_row(model, params, guided):
  head = StepHead.init(model.config)
  key = jax.random.key(5)
  head = {n: jax.random.normal(jax.random.fold_in(key, len(n)), a.shape) for n, a in head.items()}
  scorer = PrmScorer(model, {'trunk': params, 'head': head})
  out = guided(params, scorer, PROMPTS[:3])

  @jax.jit
  def whole(tokens, steps):
    at = jnp.arange(tokens.shape[1])[None]
    hidden = model.hidden(params, tokens, at, jnp.ones_like(tokens))
    logits = jax.nn.log_softmax(model.logits(params, hidden[:, :-1]))
    logprobs = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    logprobs = jnp.pad(logprobs, ((0, 0), (1, 0)))
    return StepHead.apply(head, hidden, model.embed(params, tokens), logprobs, steps, 3)

  for prompt, descent in zip(PROMPTS[:3], out.descents, strict=True):
    path, ids = list(prompt), [0] * len(prompt)
    for j, choice in enumerate(descent.choices, start=1):
      for child in choice.children:
        tokens, _ = pad([[*path, *child.tokens]], 32)
        steps, _ = pad([[*ids, *[j] * len(child.tokens)]], 32)
        np.testing.assert_allclose(child.score, whole(tokens, steps)[0, j - 1], atol=2e-3)
      taken = choice.children[choice.chosen].tokens
      path, ids = path + list(taken), ids + [j] * len(taken)


def test_greedy_program_is_written_by_one_row(model, params):
  loud = params | {'embed': params['embed'].at[TERMINAL].mul(8.0)}
  prompts = [[a, b] for a in range(5, 13) for b in range(5, 9)]
  state = prefill(model, loud, *pad(prompts, 4))
  ready = np.asarray(jnp.argmax(model.logits(loud, state.hidden), -1)) == TERMINAL
  assert ready.any() and not ready.all()
  guided = Guided(model, STEPS, children=4, max_step=8, max_program=8, max_depth=2, rows=64)
  out = guided(loud, Oracle(), prompts)
  for now, descent in zip(ready, out.descents, strict=True):
    assert descent.choices[0].greedy == now
    last = descent.choices[-1]
    if last.greedy:
      assert len(last.children) == 1 and last.children[0].tokens[0] == TERMINAL
      assert descent.finished != last.children[0].cut
      assert not any(c.greedy for c in descent.choices[:-1])
  with pytest.raises(ValueError, match='children=9'):
    Guided(model, STEPS, children=9, rows=8)


def judge(jobs):
  """The return of a path: how many of its tokens are even; NaN for a few of them."""
  out = []
  for _, path in jobs:
    even = sum(t % 2 == 0 for t in path) / len(path)
    out.append(float('nan') if len(path) % 7 == 0 else even)
  return out


@pytest.fixture(scope='module')
def search(sampler):
  return Search(sampler, STEPS, width=2, simulations=4, max_depth=3, c=0.5)


def test_search_tree_holds_every_rollout(params, search):
  forest = search(params, PROMPTS[:4], judge, seed=2)
  assert len(forest.rollouts) <= 4 * 4 * 2
  assert sum(not np.isnan(r.value) for r in forest.rollouts) > 8
  for b in range(4):
    returns = [r.value for r in forest.rollouts if r.problem == b and not np.isnan(r.value)]
    assert forest.tree.visits[b, ROOT] == len(returns)
    np.testing.assert_allclose(forest.tree.value_sum[b, ROOT], sum(returns), atol=1e-5)
    assert forest.tree.size[b] == len(forest.paths[b])
    for node in range(1, len(forest.paths[b])):
      below = [
        r.value
        for r in forest.rollouts
        if r.problem == b
        and r.path[: len(forest.paths[b][node])] == forest.paths[b][node]
        and forest.tree.depth[b, r.node] >= forest.tree.depth[b, node]
      ]
      # A roll-out that merely passes through a node without being under it in the tree
      # does not count, so the tree has at most these.
      assert forest.tree.visits[b, node] <= sum(not np.isnan(v) for v in below)
      step = forest.step(b, node)
      assert forest.tree.terminal[b, node] == (STEPS.is_terminal(step) and step[-1] in STEPS.stops)
      assert STEP_END not in step[:-1]
  for r in forest.rollouts:
    assert r.node != UNVISITED and r.prefix == forest.paths[r.problem][r.leaf]
    assert r.tokens[-1] == EOS or np.isnan(r.value)
    assert r.path[: len(forest.paths[r.problem][r.node])] == forest.paths[r.problem][r.node]


def test_search_is_independent_of_its_batch(params, search):
  ids = np.array([stable_id(str(i)) for i in range(4)])
  together = search(params, PROMPTS[:4], judge, ids=ids)
  alone = search(params, [PROMPTS[2]], judge, ids=ids[[2]])
  assert alone.paths[0] == together.paths[2]
  np.testing.assert_array_equal(alone.tree.visits[0], together.tree.visits[2])
  np.testing.assert_allclose(alone.tree.value_sum[0], together.tree.value_sum[2], atol=1e-6)
  mine = [r for r in together.rollouts if r.problem == 2]
  assert [r.tokens for r in alone.rollouts] == [r.tokens for r in mine]

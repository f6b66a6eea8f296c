"""Rows, batches, the reasoning format and prefix trees, against their definitions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learn_cases import CASES, V, assert_close

from o1jax.batch import TokenBatch
from o1jax.data import steps as steps_lib
from o1jax.data import stepwise
from o1jax.data.pack import Document, pack, pad
from o1jax.data.paths import PathEncoder, step_ids_of
from o1jax.data.pipeline import batches, of_list
from o1jax.data.prefix_tree import PrefixTree, by_problem
from o1jax.data.step_batches import StepBatchShape, step_batches
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.types import (
  ACCEPTED,
  SANDBOX_FAILURE,
  WRONG_ANSWER,
  Problem,
  Step,
  StepLabel,
  TestResult,
  Trajectory,
  Verdict,
)

BOS, EOS, END = 1, 2, 3
TAGS = dict(zip((steps_lib.STEP_END, *steps_lib.ACTIONS), (END, 4, 5, 6), strict=True))
PIECES = re.compile('|'.join(map(re.escape, TAGS)) + '|.', re.DOTALL)


class FakeTokenizer:
  """One id a tag, one a character."""

  eos_id = EOS
  step_end_id = END

  def __init__(self):
    self.encoded = 0

  def encode(self, text: str) -> list[int]:
    self.encoded += 1
    return [TAGS.get(piece, 10 + ord(piece[0])) for piece in PIECES.findall(text)]

  def prompt_ids(self, prompt: str) -> list[int]:
    return [BOS, *self.encode(prompt)]

  def decode(self, ids) -> str:
    names = {i: tag for tag, i in TAGS.items()}
    return ''.join(names.get(i) or chr(i - 10) for i in ids if i not in (BOS, EOS))


PLAN = Step(1, 'plan')
GOOD, BAD, ODD = Step(2, 'good'), Step(2, 'bad'), Step(2, 'odd')
CODE, WRONG = steps_lib.program_step('print(1)'), steps_lib.program_step('print(2)')
PROBLEM = Problem('p', 'Print one.')


def rollout(*steps: Step, reward: float | None, problem: str = 'p') -> Trajectory:
  return Trajectory(problem, steps, reward=reward)


def small_tree() -> PrefixTree:
  """PLAN is visited 5 times (mean .5), GOOD 3 (5/6), BAD 2 (0); the cut-off path not at all."""
  return PrefixTree(
    [
      rollout(PLAN, GOOD, CODE, reward=1.0),
      rollout(PLAN, GOOD, CODE, reward=1.0),
      rollout(PLAN, GOOD, WRONG, reward=0.5),
      rollout(PLAN, BAD, WRONG, reward=0.0),
      rollout(PLAN, BAD, CODE, reward=0.0),
      rollout(PLAN, ODD, reward=None),
    ]
  )


# --- pack and pad ---

documents_strategy = st.lists(
  st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=30
)


def numbered(sizes) -> list[Document]:
  """Documents of the given (size, prompt), every token of them all different."""
  ids = itertools.count(100)
  return [Document(tuple(itertools.islice(ids, n)), prompt) for n, prompt in sizes]


def documents_in(batch: TokenBatch) -> list[tuple[tuple[int, ...], list[int], list[float]]]:
  """(ids, positions, mask) of every segment."""
  found = []
  for row in range(len(batch.tokens)):
    for segment in range(1, batch.segments[row].max() + 1):
      here = batch.segments[row] == segment
      fields = (batch.tokens, batch.positions, batch.loss_mask)
      ids, positions, mask = (x[row][here].tolist() for x in fields)
      found.append((tuple(ids), positions, mask))
  return found


@given(documents_strategy)
@settings(max_examples=60, deadline=None)
def test_pack_keeps_every_document_once_and_whole(sizes):
  documents = numbered(sizes)
  batch = pack(documents, 12)
  found = documents_in(batch)
  prompts = {d.ids: d.prompt for d in documents}
  assert sorted(ids for ids, _, _ in found) == sorted(prompts)
  for ids, positions, mask in found:
    assert positions == list(range(len(ids)))
    learnt = [float(t >= prompts[ids] and t > 0) for t in range(len(ids))]
    assert mask == learnt
  padding = batch.segments == 0
  assert padding.sum() == batch.tokens.size - sum(len(d.ids) for d in documents)
  assert not batch.loss_mask[padding].any() and not batch.tokens[padding].any()


def test_pack_joins_documents_that_fit_and_segments_are_runs():
  batch = pack(numbered([(5, 0), (4, 2), (7, 0), (3, 1)]), 9)
  assert batch.segments.tolist() == [[1] * 5 + [2] * 4, [1] * 7 + [0] * 2, [1] * 3 + [0] * 6]
  assert [x.dtype for x in (batch.tokens, batch.positions, batch.segments)] == [np.int32] * 3
  assert batch.loss_mask.dtype == np.float32


def test_pack_fills_an_earlier_row_first():
  batch = pack(numbered([(6, 0), (6, 0), (3, 0)]), 9)
  assert batch.segments[0].tolist() == [1] * 6 + [2] * 3
  assert len(batch.tokens) == 2


@pytest.mark.parametrize('rows', [pack, pad])
def test_a_document_that_is_too_long_is_an_error_that_names_both_lengths(rows):
  with pytest.raises(ValueError, match=r'10 tokens does not fit rows of 9'):
    rows(numbered([(3, 0), (10, 0)]), 9)


def test_pad_gives_each_document_its_own_row_in_order():
  documents = numbered([(3, 1), (2, 0), (4, 4)])
  batch = pad(documents, 5)
  assert batch.tokens.shape == (3, 5)
  assert [ids for ids, _, _ in documents_in(batch)] == [d.ids for d in documents]
  assert batch.loss_mask.tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0] * 5]
  assert pad([], 5).tokens.shape == (0, 5)


# --- pipeline ---


def rows_tree(count: int):
  index = np.arange(count)
  return {'index': index, 'square': np.stack([index**2, index], axis=1)}


@pytest.mark.parametrize(('count', 'batch'), [(12, 4), (10, 4), (3, 7)])
def test_every_row_comes_once_an_epoch_and_in_a_new_order(count, batch):
  data = batches(rows_tree(count), batch=batch, seed=3)
  elements = [data[i] for i in range(-(-3 * count // batch))]
  assert all(e['square'].shape == (batch, 2) for e in elements)
  stream = np.concatenate([e['index'] for e in elements])
  epochs = [stream[i * count : (i + 1) * count].tolist() for i in range(3)]
  assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) > 1
  squares = np.concatenate([e['square'] for e in elements])
  np.testing.assert_array_equal(squares[:, 0], stream**2)  # the leaves of a row stay together


def test_a_batch_depends_on_seed_and_index_only():
  def at(seed: int, order):
    data = batches(rows_tree(50), batch=8, seed=seed)
    return {i: data[i]['index'].tolist() for i in order}

  resumed = at(0, [5, 6, 7])  # without having read 0 to 4
  assert {i: at(0, range(8))[i] for i in (5, 6, 7)} == resumed == at(0, [7, 6, 5])
  assert at(1, [5]) != at(0, [5])


def test_batches_keep_the_type_of_the_tree():
  rows = pad(numbered([(3, 1)] * 6), 4)
  batch = batches(rows, batch=2, seed=0)[0]
  assert isinstance(batch, TokenBatch) and batch.tokens.shape == (2, 4)


def test_of_list_repeats_and_reshuffles_ready_made_batches():
  data = of_list([np.array(i) for i in range(6)], seed=1)
  epochs = [[int(data[i]) for i in range(e * 6, e * 6 + 6)] for e in range(3)]
  assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) > 1


def test_nothing_to_train_on_is_an_error():
  with pytest.raises(ValueError, match='no rows'):
    batches(rows_tree(0), batch=2, seed=0)
  with pytest.raises(ValueError, match='no batches'):
    of_list([], seed=0)


# --- the step format ---

# Characters of which tags, fences and the released prompts' brackets are made, among others.
texts = st.text(alphabet='ab <>[]`_1\n', max_size=20).filter(lambda text: '```' not in text)
codes = st.text(alphabet='ab(`\n =', max_size=20).filter(lambda code: '``' not in code + '`')
paths = st.builds(
  lambda first, code: (*first, *([steps_lib.program_step(code)] if code is not None else [])),
  st.lists(st.builds(Step, st.sampled_from([1, 2]), texts), max_size=5),
  st.none() | codes,
)


@given(paths)
@settings(max_examples=200, deadline=None)
def test_parse_reads_back_what_render_wrote(path):
  assert steps_lib.parse(steps_lib.render(path)) == path


@given(codes)
@settings(deadline=None)
def test_program_of_reads_back_the_program(code):
  assert steps_lib.program_of([PLAN, steps_lib.program_step(code)]) == code


def test_render_writes_the_documented_format():
  text = '<Action 1>plan<Step_End><Action 3>```python\nprint(1)\n```<Step_End>'
  assert steps_lib.render([PLAN, CODE]) == text


def test_parse_drops_what_follows_the_program():
  assert steps_lib.parse(steps_lib.render([PLAN, CODE, GOOD, WRONG])) == (PLAN, CODE)


def test_a_fenced_program_ends_the_path_whatever_its_action_says():
  fenced = Step(2, CODE.text)
  assert steps_lib.parse(steps_lib.render([fenced, GOOD])) == (CODE,)


def test_parse_bears_the_released_prompts_tags_and_missing_ends():
  text = 'Sure! <Step_Begin><Action 1>[Pseudo Start]plan[Pseudo End]<Action 2>good'
  assert steps_lib.parse(text) == (PLAN, GOOD)
  assert steps_lib.parse('no step at all') == ()


def test_there_is_no_program_without_a_fence_or_a_terminal_step():
  assert steps_lib.program_of([PLAN, GOOD]) is None
  assert steps_lib.program_of([PLAN, Step(3, 'print(1)')]) is None
  assert steps_lib.program_of([]) is None


@pytest.mark.parametrize('tag', ['<Action 1>', '<Action 2>', '<Action 3>', '<Step_End>'])
def test_a_statement_with_a_step_tag_is_refused(tag):
  with pytest.raises(ValueError, match=re.escape(repr(tag))):
    steps_lib.prompt_of(f'Print {tag} twice.')
  assert steps_lib.prompt_of('Print Action 1 twice.') == 'Print Action 1 twice.\n'


# --- paths as ids ---


def test_a_document_is_prompt_then_steps_then_eos_after_a_program():
  tokenizer = FakeTokenizer()
  encoder = PathEncoder(tokenizer)
  prompt = (BOS, *FakeTokenizer().encode('Print one.\n'))
  whole = encoder.document(PROBLEM, (PLAN, CODE))
  steps = FakeTokenizer().encode(steps_lib.render([PLAN, CODE]))
  assert whole == Document((*prompt, *steps, EOS), len(prompt))
  assert (
    EOS not in encoder.document(PROBLEM, (PLAN, GOOD)).ids
  )  # cut off: not to be learnt as an end
  assert encoder.steps_of(whole.ids[len(prompt) :]) == (PLAN, CODE)
  before = tokenizer.encoded
  encoder.document(PROBLEM, (PLAN, GOOD, CODE))
  assert tokenizer.encoded == before  # each step was encoded once


def test_step_ids_number_the_generated_tokens_by_step():
  ids = np.array(
    [
      [END, 9, 4, 9, END, 5, END, EOS, 0],  # a delimiter in the prompt does not count
      [7, 9, 4, 9, 9, 9, 0, 0, 0],  # cut off within the first step
      [7, 9, 9, 6, END, EOS, 0, 0, END],  # nor one in the padding
      [7, 9, 6, END, 9, 9, 0, 0, 0],  # cut off within the second step: a step of its own
    ]
  )
  generated = np.zeros(ids.shape, bool)
  generated[0, 2:8] = generated[1, 2:6] = generated[2, 3:6] = generated[3, 2:6] = True
  got = step_ids_of(ids, generated, END, EOS)
  assert got.dtype == np.int32
  assert got.tolist() == [
    [0, 0, 1, 1, 1, 2, 2, 2, 0],
    [0, 0, 1, 1, 1, 1, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 0, 0, 0],
    [0, 0, 1, 1, 2, 2, 0, 0, 0],
  ]


# --- prefix trees ---


def test_a_node_is_the_mean_of_the_rewards_that_passed_through_it():
  tree = small_tree()
  seen = {prefix: (node.value, node.visits) for prefix, node in tree.nodes.items()}
  assert seen == {
    (PLAN,): (0.5, 5),
    (PLAN, GOOD): (pytest.approx(5 / 6), 3),
    (PLAN, GOOD, CODE): (1.0, 2),
    (PLAN, GOOD, WRONG): (0.5, 1),
    (PLAN, BAD): (0.0, 2),
    (PLAN, BAD, WRONG): (0.0, 1),
    (PLAN, BAD, CODE): (0.0, 1),
  }
  assert len(tree.paths) == 4  # equal paths are one


def test_siblings_are_children_of_one_prefix():
  groups = {frozenset(p[-1] for p in group): group for group in small_tree().sibling_groups()}
  assert set(groups) == {frozenset([GOOD, BAD]), frozenset([CODE, WRONG])}
  for group in small_tree().sibling_groups():
    assert len({p[:-1] for p in group}) == 1


def test_labels_are_the_nodes():
  labels = small_tree().labels('p')
  assert StepLabel('p', (PLAN,), BAD, 0.0, 2) in labels
  assert StepLabel('p', (), PLAN, 0.5, 5) in labels
  assert len(labels) == 7


def test_pairs_are_siblings_further_apart_than_the_margin():
  def named(margin):
    return {(p.prefix, p.win, p.lose): p.margin for p in small_tree().pairs('p', margin)}

  wide = {((PLAN,), GOOD, BAD): pytest.approx(5 / 6)}
  narrow = {((PLAN, GOOD), CODE, WRONG): 0.5}
  assert named(0.0) == wide | narrow  # the two programs below BAD are equally bad
  assert named(0.5) == wide
  assert named(0.9) == {}


def test_valued_puts_the_trees_values_on_a_trajectory():
  tree = small_tree()
  path = tree.valued(rollout(PLAN, GOOD, WRONG, reward=0.5))
  assert path.values == (0.5, pytest.approx(5 / 6), 0.5) and path.visits == (5, 3, 1)
  cut = rollout(PLAN, ODD, reward=None)
  assert tree.valued(cut) == cut  # the tree does not know its last step


def test_by_problem_keeps_problems_apart():
  trees = by_problem(
    [
      rollout(PLAN, reward=1.0, problem='b'),
      rollout(PLAN, reward=0.0, problem='a'),
      rollout(PLAN, reward=0.0, problem='b'),
    ]
  )
  assert [(i, t.nodes[PLAN,].value) for i, t in trees.items()] == [('b', 0.5), ('a', 0.0)]


# --- PRM batches ---


def build(trees, shape, **options):
  problems = {i: Problem(i, f'Print {i}.') for i in trees}
  encoder = PathEncoder(FakeTokenizer())
  rng = np.random.default_rng(options.pop('seed', 0))
  options = {'margin': 0.15} | options
  return step_batches(trees, problems, encoder, shape, rng=rng, **options)


def rows_of(batch) -> list[tuple[str, tuple[Step, ...]]]:
  """(prompt, steps) of each filled row, read back from its tokens and step ids."""
  found = []
  for ids, steps, segments in zip(batch.tokens, batch.step_ids, batch.segments, strict=True):
    if segments.any():
      text = [
        FakeTokenizer().decode(ids[(steps == j) & (segments == 1)]) for j in range(steps.max() + 1)
      ]
      path = tuple(step for part in text[1:] for step in steps_lib.parse(part))
      assert len(path) == steps.max()
      found.append((text[0], path))
  return found


SHAPE = StepBatchShape(rows=8, tokens=100, steps=4, pairs=6)


def forest(count: int) -> dict[str, PrefixTree]:
  return {f'p{i}': small_tree() for i in range(count)}


def test_rows_hold_every_path_with_its_step_ids():
  found = build(forest(5), SHAPE)
  rows = [row for batch in found for row in rows_of(batch)]
  expected = [(f'Print p{i}.\n', path) for i in range(5) for path in small_tree().paths]
  key = lambda row: (row[0], steps_lib.render(row[1]))  # noqa: E731
  assert sorted(rows, key=key) == sorted(expected, key=key)
  assert all(b.tokens.shape == (8, 100) and b.pairs.shape == (6, 3) for b in found)
  for batch in found:
    assert (batch.positions == np.arange(100)).all()
    assert not batch.step_ids[batch.segments == 0].any()


@pytest.mark.parametrize('hard', [False, True])
def test_labels_are_node_values_and_weights_sum_to_the_root_of_the_visits(hard):
  tree = small_tree()
  for batch in build(forest(4), SHAPE, hard=hard):
    totals: dict = {}
    for row, (prompt, path) in enumerate(rows_of(batch)):
      for j in range(len(path)):
        value = tree.nodes[path[: j + 1]].value
        assert batch.labels[row, j] == pytest.approx(float(value > 0) if hard else value)
        name = prompt, path[: j + 1]
        totals[name] = totals.get(name, 0.0) + batch.weights[row, j]
      assert not batch.weights[row, len(path) :].any()
    assert not batch.weights[len(rows_of(batch)) :].any()
    for (_, prefix), total in totals.items():
      assert total == pytest.approx(tree.nodes[prefix].visits ** 0.5)


def test_pairs_point_to_rows_that_part_at_the_step():
  tree, seen = small_tree(), 0
  for batch in build(forest(4), SHAPE):
    rows = rows_of(batch)
    for (win, lose, step), weight in zip(batch.pairs, batch.pair_weights, strict=True):
      if weight == 0:
        continue
      seen += 1
      (prompt_a, a), (prompt_b, b) = rows[win], rows[lose]
      assert prompt_a == prompt_b and a[: step - 1] == b[: step - 1] and a[step - 1] != b[step - 1]
      better, worse = tree.nodes[a[:step]], tree.nodes[b[:step]]
      assert better.value - worse.value > 0.15
      assert weight == pytest.approx(min(better.visits, worse.visits) ** 0.5)
  assert seen == 8  # two pairs in each of four trees


@pytest.mark.parametrize('parts', [2, 4])
def test_siblings_share_a_microbatch_and_accumulation_changes_nothing(parts):
  shape = StepBatchShape(rows=16, tokens=100, steps=4, pairs=12, parts=parts)
  found = build(forest(6), shape)
  rows = [row for batch in found for row in rows_of(batch)]
  assert len(rows) == len(set(rows)) == 6 * min(len(small_tree().paths), 16 // parts)
  assert sum((b.pair_weights > 0).sum() for b in found) >= 6
  loss, make, _ = CASES['prm']
  tx = optax.sgd(1.0)
  for batch in found:
    assert (batch.pairs[:, 0] % parts == batch.pairs[:, 1] % parts).all()
    batch = dataclasses.replace(batch, tokens=batch.tokens % V)
    start = make()
    moved = [
      make_update(loss, tx, accumulate=n, donate=False)(init_state(start, tx), batch)[0].params
      for n in (1, parts)
    ]
    whole, cut = (jax.tree.leaves(jax.tree.map(jnp.subtract, start, after)) for after in moved)
    largest = max(float(jnp.abs(g).max()) for g in whole)
    assert_close(*([g / largest for g in side] for side in (whole, cut)), 1e-6)


def test_more_pairs_than_fit_are_drawn_among_and_fewer_are_padded():
  few = StepBatchShape(rows=8, tokens=100, steps=4, pairs=3)
  assert [(b.pair_weights > 0).sum() for b in build(forest(2), few)] == [3]
  many = StepBatchShape(rows=8, tokens=100, steps=4, pairs=9)
  assert [(b.pair_weights > 0).sum() for b in build(forest(2), many)] == [4]


def test_paths_that_do_not_fit_are_left_out():
  short = StepBatchShape(rows=8, tokens=100, steps=2, pairs=6)
  assert build(forest(1), short) == []
  assert build(forest(1), StepBatchShape(rows=8, tokens=20, steps=4, pairs=6)) == []


def test_a_problem_with_more_paths_than_rows_is_cut_to_them():
  (batch,) = build(forest(1), StepBatchShape(rows=3, tokens=100, steps=4, pairs=6))
  assert len(rows_of(batch)) == 3
  (batch,) = build(forest(1), SHAPE, paths_per_problem=2)
  assert len(rows_of(batch)) == 2


def test_step_batches_depend_on_the_generators_seed_only():
  first, again, other = (build(forest(6), SHAPE, seed=s) for s in (0, 0, 1))
  assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
  assert any((a.tokens != b.tokens).any() for a, b in zip(first, other, strict=True))


# --- D_process on disk and the records ---

JUDGED = Verdict(WRONG_ANSWER, (TestResult(ACCEPTED), TestResult(WRONG_ANSWER)))


@pytest.mark.parametrize(
  'trajectory',
  [
    Trajectory('p', (PLAN, CODE), (0.25, 0.5), (4, 2), JUDGED, 0.5, 3, 'round1/synthesis'),
    Trajectory('p', (PLAN, GOOD)),
    Trajectory('p', (PLAN, WRONG), (0.5, 0.0), (2, 1), Verdict(SANDBOX_FAILURE), None),
  ],
  ids=['judged', 'cut off', 'masked'],
)
def test_a_trajectory_survives_its_row(trajectory):
  row = json.loads(json.dumps(stepwise.to_row(trajectory, 'Print one.\n')))
  assert stepwise.from_row(row) == trajectory
  assert row['prompt'] == 'Print one.\n'


def test_a_row_labels_as_good_what_ever_led_to_a_reward():
  row = stepwise.to_row(Trajectory('p', (PLAN, CODE), (0.125, 0.0), (8, 1), JUDGED, 0.0), '')
  assert row['labels'] == [True, False] and row['values'] == [0.125, 0.0]
  assert row['completions'] == [PLAN.text, CODE.text] and row['actions'] == [1, 3]


def test_a_verdict_counts_its_tests_and_a_masked_one_says_nothing():
  assert (JUDGED.passed, JUDGED.pass_rate, JUDGED.compiled, JUDGED.masked) == (1, 0.5, True, False)
  failed = Verdict(SANDBOX_FAILURE)
  assert failed.masked and not failed.compiled and failed.pass_rate == 0.0
  assert Trajectory('p', (), verdict=Verdict(ACCEPTED)).accepted
  assert not Trajectory('p', (), verdict=JUDGED).accepted and not Trajectory('p', ()).accepted

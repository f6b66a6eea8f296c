"""Rows, batches, the reasoning format and prefix trees, against their definitions."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from o1jax.batch import TokenBatch
from o1jax.data import steps as steps_lib
from o1jax.data.pack import Document, pack, pad
from o1jax.data.paths import PathEncoder, step_ids_of
from o1jax.data.pipeline import batches, of_list
from o1jax.types import (
  Problem,
  Step,
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

"""Splits of folders and files, and what a run gets of them."""

import importlib
import random

import pytest
from reader_cases import (
  PLAIN,
  TACO_STDIN,
  WORDS,
  small,
  written,
)

from o1jax.data.problems import load_split
from o1jax.data.readers import (
  ReadError,
  data_files,
  read_problems,
)

rows_lib = importlib.import_module('o1jax.data.readers.rows')


@pytest.mark.parametrize(
  'names, split',
  [
    (['train.jsonl', 'test.jsonl'], 'test'),
    (['data/train-00000-of-00002.jsonl', 'data/validation-00000.jsonl'], 'dev'),
    (['test.jsonl', 'test2.jsonl', 'test6.jsonl'], 'test'),
    (['train/data-0.jsonl', 'test/data-0.jsonl', 'dataset_dict.json'], 'train'),
    (['openai_humaneval/test-00000.jsonl', '.cache/train.jsonl'], 'test'),
  ],
)
def test_splits_of_a_hub_folder(tmp_path, names, split):
  for name in names:
    written(tmp_path / name, [PLAIN])
  files = data_files(tmp_path)
  assert split in files and '' not in files
  kept = [n for n in names if not n.startswith('.') and n != 'dataset_dict.json']
  assert sum(map(len, files.values())) == len(kept)


def test_several_configurations_are_not_mixed(tmp_path):
  for name in ('full/train.jsonl', 'sanitized/train.jsonl'):
    written(tmp_path / name, [PLAIN])
  with pytest.raises(ReadError, match="'full', 'sanitized'; name the folder of one"):
    data_files(tmp_path)


def taco(i, text):
  return TACO_STDIN | {'question': f'{text} {i}'}


def words(i):
  """A statement of its own."""
  return ' '.join(random.Random(i).choices(WORDS, k=40))


def test_load_split_reads_a_folder_of_o1jax_files(tmp_path):
  for split in ('train', 'dev', 'test'):
    written(tmp_path / f'{split}.jsonl', [small(split), small('twin')])
    assert load_split(str(tmp_path), split, 1, seed=0)[0].id == f'p{split}'
  # In our own files nothing is dropped, and a bad row is an error.
  assert len(load_split(str(tmp_path), 'train', 9, seed=0)) == 2
  written(tmp_path / 'dev.jsonl', [small(1), {'id': 'x'}])
  with pytest.raises(ValueError, match=r'dev.jsonl, row 2: has no .statement.'):
    load_split(str(tmp_path), 'dev', 9, seed=0)
  (tmp_path / 'train.jsonl').unlink()
  with pytest.raises(FileNotFoundError, match='none for train'):
    load_split(str(tmp_path), 'train', 9, seed=0)


def test_load_split_divides_one_file(tmp_path):
  path = written(tmp_path / 'p.jsonl', [taco(i, words(i)) for i in range(300)])
  found = {s: load_split(str(path), s, 999, seed=0) for s in ('train', 'dev', 'test')}
  ids = [p.id for problems in found.values() for p in problems]
  assert len(ids) == len(set(ids)) == 300
  assert all(15 < len(found[s]) < 50 for s in ('dev', 'test'))
  # The order of the rows says nothing about the split.
  path.write_text(''.join(reversed(path.read_text().splitlines(keepends=True))))
  assert {p.id for p in load_split(str(path), 'test', 999, seed=0)} == {p.id for p in found['test']}


def test_load_split_holds_out_what_a_folder_lacks(tmp_path):
  written(tmp_path / 'train.jsonl', [taco(i, words(i)) for i in range(200)])
  written(tmp_path / 'test.jsonl', [taco(i, words(i)) for i in range(200, 220)])
  found = {s: load_split(str(tmp_path), s, 999, seed=0) for s in ('train', 'dev', 'test')}
  assert len(found['test']) == 20
  assert len(found['train']) + len(found['dev']) == 200 and 8 < len(found['dev']) < 40


def kept_id(folder):
  return next(read_problems(folder / 'test.jsonl')).id


def test_load_split_drops_twins_and_what_is_tested(tmp_path, caplog):
  story = words(0)
  written(tmp_path / 'test.jsonl', [taco(0, story), taco(0, story)])
  rows = [taco(1, words(1)), taco(2, words(1)), taco(3, f'{words(9)} {story} {words(8)}')]
  written(tmp_path / 'train.jsonl', [*rows, taco(4, words(4)), {'question': 1}])
  written(tmp_path / 'dev.jsonl', [taco(5, words(5))])
  kept = load_split(str(tmp_path), 'train', 9, seed=0)
  assert [p.statement[-1] for p in kept] == ['1', '4']
  dropped, left_out = sorted((r.message for r in caplog.records), key=len, reverse=True)
  assert '2 dropped' in dropped and 'resemblance 0.9' in dropped and 'containment 0.9' in dropped
  assert kept[0].id in dropped
  assert '1 row left out' in left_out and 'row 5' in left_out
  caplog.clear()
  assert len(load_split(str(tmp_path), 'test', 9, seed=0)) == 1  # one id, once
  assert f'test.jsonl, row 2: the id {kept_id(tmp_path)!r} was there before' in caplog.text


def test_load_split_without_problems_says_why(tmp_path):
  path = written(tmp_path / 'p.jsonl', [TACO_STDIN | {'input_output': ''}])
  with pytest.raises(ValueError, match=r"holds no problems for train.*\n.*has no 'inputs'"):
    load_split(str(path), 'train', 9, seed=0)
  with pytest.raises(FileNotFoundError, match='did you mean'):
    load_split(str(path) + 'x', 'train', 9, seed=0)

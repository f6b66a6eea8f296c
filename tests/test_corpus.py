"""The corpus of the base model, and the tokenizer that reads it."""

import collections
import itertools
import random
import re

import pytest
from test_family import execute

from o1jax.data import family, steps
from o1jax.data.family import spec as specs
from o1jax.data.family.ops import OPS
from o1jax.data.family.phrases import HEADS, VERBS
from o1jax.data.family.tokenizer import build_tokenizer, fragments


@pytest.fixture(scope='module')
def some():
  splits = (family.problems(split, 150, seed=3) for split in family.SPLITS)
  return list(itertools.chain(*splits))


@pytest.fixture(scope='module')
def documents():
  return list(family.corpus(seed=5, count=400))


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  transformers = pytest.importorskip('transformers')
  folder = tmp_path_factory.mktemp('tokenizer')
  build_tokenizer(folder)
  return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


# Corpus


def code_in(text):
  match = re.search(r'```python\n(.*?)\n```', text, re.DOTALL)
  return match and match.group(1)


def test_corpus_is_deterministic_and_mixed(documents):
  assert list(family.corpus(seed=5, count=400)) == documents
  kinds = collections.Counter(d.kind for d in documents)
  assert set(kinds) == set(family.MIX)
  assert {d.kind for d in family.corpus(0, 20, mix={'drill': 1.0})} == {'drill'}
  with pytest.raises(ValueError, match='solv'):
    family.corpus(0, 1, mix={'solv': 1.0})
  with pytest.raises(ValueError, match='positive'):
    family.corpus(0, 1, mix={'solve': 0.0})


def test_test_cases_in_the_corpus_are_true_for_the_code_beside_them(documents):
  for document in documents:
    if document.kind in ('tests', 'drill'):
      code = code_in(document.prompt)
      entry_point = 'solve' if 'def solve' in code else None
      tests = family.parse_tests(document.completion, entry_point)
      assert len(tests) == (3 if document.kind == 'tests' else 4)
      for test in tests:
        assert execute(code, entry_point, test.input) == test.output


def test_the_code_of_a_path_follows_its_steps(documents):
  by_pseudo = {op.pseudo: op.code for op in OPS.values()}
  for document in documents:
    if document.kind != 'solve':
      continue
    path = steps.parse(document.completion)
    lines = steps.program_of(path).split('\n')
    assert path[0].action == 1 and path[-1].action == 3
    assert len(lines) == len(path) - 1
    for step, line in zip(path[1:-2], lines[1:], strict=False):
      k = re.search(r' (\d+)$', step.text) if step.text not in by_pseudo else None
      pseudo = step.text if k is None else f'{step.text[: k.start()]} {{k}}'
      code = by_pseudo[pseudo].replace('{k}', k.group(1) if k else '')
      assert line.strip() == code


def without_numbers(text):
  return re.sub(r' \d+$', '', text)


def test_no_path_of_the_corpus_has_a_held_out_composition(documents):
  held_out = set()
  for split in ('dev', 'test'):
    for problem in family.problems(split, 300):
      spec = family.spec_of(problem.id)
      held_out.add((spec.kind, *(without_numbers(specs.pseudo(c)) for c in spec.clauses)))
  seen = set()
  for document in family.corpus(seed=7, count=1500, mix={'solve': 1.0}):
    plan, *refine, _ = steps.parse(document.completion)
    seen.add((plan.text.split()[1], *(without_numbers(s.text) for s in refine)))
  assert len(seen) > 1000 and not seen & held_out


# Tokenizer


def test_ids_and_size_of_the_vocabulary(tokenizer):
  ids = tokenizer.pad_token_id, tokenizer.unk_token_id
  assert (*ids, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2, 3)
  assert len(fragments()) + 260 < len(tokenizer) < 1024
  for fragment in fragments():
    assert len(tokenizer.encode(fragment, add_special_tokens=False)) == 1, fragment


@pytest.mark.parametrize(
  'text',
  [
    '',
    ' a  b\n\n\tc ',
    'def f(x):\n  return x**2 # 5%',
    'é 漢字 🙂',
    '<Action 4> 100 -21',
    '1) 2)',
  ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def intended(spec):
  """The tokens that the statement should be cut into."""
  tokens = [HEADS[spec.form, spec.kind]]
  for number, clause in enumerate(spec.clauses, 1):
    tokens.append(f' {number}) ')
    if number == len(spec.clauses):
      tokens.append(VERBS[spec.form])
    left, *right = specs.phrases_of(clause)[clause.phrase].split(' {k}')
    tokens.append(left)
    if right:
      tokens += [f' {clause.k}', *filter(None, right)]
  return tokens


def test_statements_are_cut_into_the_intended_fragments(tokenizer, some):
  for problem in some:
    tokens = tokenizer.tokenize(problem.statement)
    assert tokens == intended(family.spec_of(problem.id))


def test_documents_are_fragments_only_and_short(tokenizer, documents):
  known = set(fragments())
  lengths = collections.defaultdict(list)
  for document in documents:
    text = document.prompt + document.completion
    tokens = tokenizer.tokenize(text)
    assert ''.join(tokens) == text
    assert set(tokens) <= known, set(tokens) - known
    lengths[document.kind].append(len(tokens))
  mean = {kind: sum(n) / len(n) for kind, n in lengths.items()}
  assert mean['solve'] < 60 and mean['tests'] < 150


def test_every_number_and_word_of_a_test_is_one_token(tokenizer, some):
  rng = random.Random(0)
  for problem in some[:40]:
    for test in family.real_tests(problem, rng):
      assert len(tokenizer.tokenize(test.input)) == len(test.input.split())
      assert len(tokenizer.tokenize(test.output)) == len(test.output.split())


def test_the_tokenizer_is_written_alike_twice(tmp_path):
  for name in 'ab':
    build_tokenizer(tmp_path / name)
  for file in ('tokenizer.model', 'tokenizer_config.json'):
    assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()

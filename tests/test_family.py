import collections
import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys

import pytest

from o1jax.data import family, steps
from o1jax.data.family import draw
from o1jax.data.family import spec as specs
from o1jax.data.family.ops import CONFUSION_GROUP, OPS, READOUTS
from o1jax.data.family.phrases import CONTEXT_PHRASES, OP_PHRASES, READOUT_PHRASES


@pytest.fixture(scope='module')
def by_split():
  return {split: family.problems(split, 150, seed=3) for split in family.SPLITS}


@pytest.fixture(scope='module')
def some(by_split):
  return list(itertools.chain(*by_split.values()))


def execute(code, entry_point, given):
  """The output of a program in the encoding of test cases, or None where it raises."""
  out = io.StringIO()
  names = {'input': lambda: given}
  try:
    with contextlib.redirect_stdout(out):
      exec(code, names)
      if entry_point is None:
        return out.getvalue().removesuffix('\n')
      return json.dumps(names[entry_point](*json.loads(given)))
  except Exception:
    return None


def outputs(problem, code):
  return [execute(code, problem.entry_point, test.input) for test in problem.tests]


# Operations


def test_there_are_as_many_operations_and_phrasings_as_the_datasheet_says():
  on_ints = [op for op in OPS.values() if op.takes in ('int', 'any')]
  on_words = [op for op in OPS.values() if op.takes == 'str']
  assert len(on_ints) >= 22 and len(on_words) >= 8 and len(READOUTS) >= 8
  assert set(OP_PHRASES) == set(OPS) and set(READOUT_PHRASES) == set(READOUTS)
  for table in (OP_PHRASES, READOUT_PHRASES, CONTEXT_PHRASES):
    said = list(itertools.chain(*table.values()))
    assert len(set(said)) == len(said)
    assert all(len(phrases) >= 4 for phrases in table.values())
  for name, op in OPS.items():
    assert all(('{k}' in phrase) == bool(op.params) for phrase in OP_PHRASES[name])


def test_a_confusion_is_of_the_same_kind():
  for op in OPS.values():
    other = OPS[op.confusion]
    assert other is not op and bool(other.params) == bool(op.params)
    assert other.takes in (op.takes, 'any') and (op.gives != 'int' or other.gives == 'int')
    assert CONFUSION_GROUP[op.name] == CONFUSION_GROUP[other.name]
  for readout in READOUTS.values():
    assert READOUTS[readout.confusion] is not readout


def test_meaning_and_code_of_every_operation_agree_on_random_lists():
  rng = random.Random(0)
  for op, _ in itertools.product(OPS.values(), range(30)):
    k = rng.choice(op.params) if op.params else None
    kind = 'words' if op.takes == 'str' or (op.takes == 'any' and rng.random() < 0.5) else 'ints'
    values = draw.draw_input(rng, kind)
    names = {'a': list(values)}
    exec(op.code.replace('{k}', str(k)), names)
    before = list(values)
    assert op.fn(values, k) == names['a'], op.name
    assert values == before, f'{op.name} changed its argument'


# Problems


def test_reference_programs_print_or_return_what_the_tests_say(some):
  forms = collections.Counter(problem.entry_point for problem in some)
  assert min(forms[None], forms['solve']) > len(some) / 3
  for problem in some:
    assert outputs(problem, problem.solutions[0]) == [test.output for test in problem.tests]


def test_leaving_out_or_confusing_any_operation_changes_two_outputs_or_more(some):
  for problem in some:
    spec = family.spec_of(problem.id)
    mutants = []
    for i, clause in enumerate(spec.clauses):
      front, back = spec.clauses[:i], spec.clauses[i + 1 :]
      mutants.append((*front, specs.confused(clause), *back))
      if back:
        mutants.append((*front, *back))
    for clauses in mutants:
      code = family.program(dataclasses.replace(spec, clauses=clauses))
      wrong = outputs(problem, code)
      changed = sum(w != test.output for w, test in zip(wrong, problem.tests, strict=True))
      assert changed >= 2, (problem.id, code)


def test_a_problem_has_ten_distinct_inputs_and_enough_distinct_outputs(some):
  for problem in some:
    spec = family.spec_of(problem.id)
    assert len({test.input for test in problem.tests}) == 10
    wanted = 4 if spec.clauses[-1].op in ('count', 'words') else 6
    assert len({test.output for test in problem.tests}) >= wanted


def test_numbers_and_lists_stay_within_what_the_tokenizer_knows(some):
  for problem in some:
    spec = family.spec_of(problem.id)
    for test in problem.tests:
      values = json.loads(test.input)[0] if problem.entry_point else test.input.split()
      if spec.kind == 'ints':
        values = [int(v) for v in values]
      entries, _ = family.trace(spec, values)
      for _, after in entries:
        assert 1 <= len(after) <= 8
        assert all(isinstance(v, str) or -20 <= v <= 99 for v in after)


def test_lengths_follow_their_weights():
  counts = collections.Counter(
    len(family.spec_of(p.id).clauses) - 1 for p in family.problems('train', 600, seed=1)
  )
  for operations, share in {2: 0.30, 3: 0.30, 4: 0.25, 5: 0.15}.items():
    assert abs(counts[operations] / 600 - share) < 0.08  # four standard errors


def test_splits_share_no_composition_even_after_confusions(by_split):
  rng = random.Random(0)
  noise = family.NoiseTable(1)
  for split, problems in by_split.items():
    for problem in problems:
      spec = family.spec_of(problem.id)
      assert family.split_of(family.composition(spec)) == split
      misread = family.composition(noise.misread(spec, rng))
      assert family.split_of(misread) == split


def test_problems_are_deterministic_and_a_prefix_of_longer_lists():
  long = family.problems('dev', 30, seed=9)
  assert family.problems('dev', 12, seed=9) == long[:12]
  assert family.problems('dev', 12, seed=10) != long[:12]
  assert len({p.statement for p in long}) == len({p.id for p in long}) == 30


def test_problems_do_not_depend_on_the_hash_seed():
  code = (
    'from o1jax.data import family;'
    'print(family.problems("test", 5), list(family.corpus(1, 5)), family.NoiseTable(2).table())'
  )
  said = {
    subprocess.run(
      [sys.executable, '-c', code],
      env={**os.environ, 'PYTHONHASHSEED': seed},
      capture_output=True,
      check=True,
    ).stdout
    for seed in ('1', '2')
  }
  assert len(said) == 1


def test_a_problem_is_recovered_from_its_id(some):
  for problem in some[::10]:
    assert re.fullmatch(r'[\w.-]+', problem.id)
    assert family.problem_of(family.spec_of(problem.id)) == problem


@pytest.mark.parametrize(
  'identifier',
  [
    '',
    'HumanEval/3',
    'family-stdin-ints-sum..0',
    'family-stdin-ints-nosuch..0-sum..0',
    'family-stdin-ints-reverse..9-sum..0',
    'family-stdin-ints-upper..0-list..0',
    'family-mail-ints-reverse..0-sum..0',
    'family-stdin-ints-reverse..0-sum..0x',
  ],
)
def test_a_foreign_id_is_refused_with_its_name(identifier):
  with pytest.raises(ValueError, match=re.escape(repr(identifier))):
    family.spec_of(identifier)


def test_faulty_requests_are_refused():
  with pytest.raises(ValueError, match='valid'):
    family.problems('valid', 3)
  with pytest.raises(ValueError, match='-1'):
    family.problems('train', -1)
  with pytest.raises(ValueError, match='strong'):
    family.problem_of(family.spec_of('family-stdin-ints-reverse..0-sum..0'))


# Paths


def test_reference_steps_have_one_step_a_clause_and_the_reference_program(some):
  for problem in some:
    spec = family.spec_of(problem.id)
    path = family.reference_steps(spec)
    assert [s.action for s in path] == [1] + [2] * len(spec.clauses) + [3]
    assert steps.program_of(path) == problem.solutions[0]
    assert steps.parse(steps.render(path)) == path


def test_context_clauses_mean_what_the_clause_before_makes_of_them():
  assert specs.resolve('again', 'add', 3, None) == ('add', 3)
  assert specs.resolve('same', 'add', 3, 5) == ('add', 5)
  assert specs.resolve('opposite', 'drop_first', 2, None) == ('drop_last', 2)
  assert specs.resolve('more', 'rotl', 1, None) == ('rotl', 2)
  with pytest.raises(ValueError, match='twice'):
    specs.resolve('twice', 'add', 3, None)
  seen = set()
  for problem in family.problems('train', 400, seed=2):
    clauses = family.spec_of(problem.id).clauses
    for before, clause in itertools.pairwise(clauses):
      if clause.context:
        seen.add(clause.context)
        wanted = specs.resolve(clause.context, before.op, before.k, clause.k)
        assert (clause.op, clause.k) == wanted and OPS[before.op].repeatable
  assert seen == set(CONTEXT_PHRASES)


# Noise


def test_noise_misleads_a_third_of_the_phrases_and_no_read_out():
  table = family.NoiseTable(0).table()
  said = {**OP_PHRASES, **CONTEXT_PHRASES}
  truths = [table[name, i] for name in said for i in range(len(said[name]))]
  wrong = [p for p in truths if p < 0.5]
  assert len(wrong) == round(len(truths) / 3)
  assert all(0.25 <= p <= 0.40 for p in wrong)
  assert all(0.72 <= p <= 0.90 for p in truths if p > 0.5)
  readouts = [table[n, i] for n, phrases in READOUT_PHRASES.items() for i in range(len(phrases))]
  assert all(0.85 <= p <= 0.95 for p in readouts)
  assert family.NoiseTable(0).table() == table != family.NoiseTable(1).table()


def test_misreadings_come_as_often_as_the_table_says():
  noise, rng = family.NoiseTable(0), random.Random(0)
  spec = family.spec_of('family-stdin-ints-le.4.1-add.3.2-max..0')
  read = [noise.misread(spec, rng).clauses for _ in range(3000)]
  for i, clause in enumerate(spec.clauses):
    right = sum(clauses[i] == clause for clauses in read) / 3000
    assert abs(right - noise.truth(clause)) < 0.04
    assert {clauses[i] for clauses in read} == {clause, specs.confused(clause)}


def test_a_context_clause_is_misread_relative_to_the_step_before_it():
  noise, rng = family.NoiseTable(0), random.Random(0)
  spec = family.spec_of('family-stdin-ints-add.3.0-add.3.1.again-list..0')
  again = [c for c in (noise.misread(spec, rng).clauses for _ in range(3000)) if c[0].op == 'sub']
  right = sum(clauses[1].op == 'sub' for clauses in again) / len(again)
  assert abs(right - noise.truth(spec.clauses[1])) < 0.06


def test_the_base_is_wrong_often_enough_and_never_hopeless():
  noise = family.NoiseTable(0)
  problems = [family.spec_of(p.id) for p in family.problems('test', 500, seed=0)]
  assert 0.20 < sum(map(noise.greedy, problems)) / 500 < 0.32
  assert min(map(noise.sampled, problems)) > 0.0005


# Test cases as text


def test_tests_survive_rendering_and_parsing_in_both_forms(some):
  rng = random.Random(0)
  for problem in some:
    text = family.render_tests(family.real_tests(problem, rng))
    parsed = family.parse_tests(text, problem.entry_point)
    assert len(parsed) == 3 and all(test.origin == 'tcg' for test in parsed)
    own = {(test.input, test.output) for test in problem.tests}
    assert {(test.input, test.output) for test in parsed} <= own


def test_trace_lines_are_optional_and_ignored():
  text = 'Input: 3 1\nOutput: 4\nInput: 2 2\nTrace: anything -> at all\nOutput: 5\n'
  assert [t.output for t in family.parse_tests(text)] == ['4', '5']
  values = [t.output for t in family.parse_tests(text, 'solve')]
  assert values == ['4', '5']
  assert family.parse_tests('Input: ox\nOutput: ox - go\n', 'f')[0].output == '"ox - go"'
  assert family.parse_tests('Input: ox\nOutput: 3 -1\n', 'f')[0].output == '[3, -1]'


@pytest.mark.parametrize(
  'text',
  [
    '',
    'Input: 3 1\n',
    'Input: 3 1\nOutput: 4',
    'Input: 3 1\nOutput: \n',
    'Input: 3  1\nOutput: 4\n',
    'Output: 4\nInput: 3 1\n',
    'Input: 3 1\nOutput: 4\nInput: 3',
    'Input: 3 1\nOutput: 4\nInput: 3 1\nOutput: 4\n',
    'Here: Input: 3 1\nOutput: 4\n',
  ],
)
def test_malformed_test_parts_are_refused(text):
  assert family.parse_tests(text) is None


def test_a_trace_leads_to_the_answer():
  spec = family.spec_of('family-stdin-ints-le.4.1-square..0-sum..0')
  case = family.traced(spec, [3, 9, 1, 4])
  assert case == family.TracedTest(
    ' 3 9 1 4',
    'keep x <= 4 -> 3 1 4 | x * x -> 9 1 16 | output sum -> 9 10 26',
    ' 26',
  )
  with pytest.raises(ValueError, match='another input'):
    family.trace(spec, [9, 9])


def test_shuffled_answers_keep_inputs_and_answers_but_not_their_match(some):
  rng = random.Random(0)
  for problem in some[:60]:
    tests = family.real_tests(problem, rng)
    moved = family.shuffled_answers(rng, tests)
    if moved is None:
      assert len({t.output for t in tests}) == 1
      continue
    assert [t.input for t in moved] == [t.input for t in tests]
    pairs = [(t.trace, t.output) for t in tests]
    assert sorted((t.trace, t.output) for t in moved) == sorted(pairs)
    assert any(a.output != b.output for a, b in zip(tests, moved, strict=True))
  same = [family.TracedTest(' 1', '', ' 2'), family.TracedTest(' 3', '', ' 2')]
  assert family.shuffled_answers(rng, same) is None


def test_prompts_end_where_the_tests_begin(some):
  problem = some[0]
  code = problem.solutions[0]
  wanted = f'{problem.statement}\n```python\n{code}\n```\nTest Part:\n'
  assert family.tcg_prompt(problem, code) == wanted
  assert family.tcg_prompt(problem, None) == f'{problem.statement}\nTest Part:\n'

"""The test-case generator: its data, how its cases are counted, and what a run keeps of it."""

import dataclasses
import random
import shutil

import jax
import numpy as np
import pytest

from o1jax.config import Config
from o1jax.data import family, test_parts
from o1jax.data.family.tokenizer import build_tokenizer
from o1jax.data.paths import PathEncoder
from o1jax.data.tokens import Tokenizer
from o1jax.models.config import ModelConfig
from o1jax.models.transformer import Model
from o1jax.parallel.mesh import make_mesh
from o1jax.run.metrics import Metrics
from o1jax.run.progress import Progress
from o1jax.run.store import Store
from o1jax.sampling.sampler import Samples
from o1jax.sandbox.pool import Pool
from o1jax.stages import tcg
from o1jax.stages.context import Run, Workbench
from o1jax.stages.execute import Executor
from o1jax.types import Problem, TestCase

PROBLEMS = tuple(family.problems('train', 12))
DRAWS = {'draws': 2, 'bare': 0.25, 'seed': 0}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizer')
  build_tokenizer(folder)
  return Tokenizer(folder)


@pytest.fixture(scope='module')
def executor():
  with Pool(workers=1) as pool:
    yield Executor(pool)


@pytest.fixture
def run(tmp_path, tokenizer, executor):
  small = {'steps': 2, 'warmup': 1, 'batch': 4}
  tcg_config = {'sft': small, 'dpo': small, 'problems': 6, 'draws': 1, 'eval_problems': 4}
  config = Config.model_validate(
    {'run': {'dir': str(tmp_path / 'run')}, 'tcg': tcg_config, 'metrics': {'tensorboard': False}}
  )
  shape = {'hidden_size': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 1}
  model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, intermediate_size=16, **shape))
  mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  with Store(config) as store, Metrics(store.dir) as metrics:
    yield Run(
      config=config,
      bench=Workbench(store, metrics, Progress(), mesh),
      tokenizer=tokenizer,
      encoder=PathEncoder(tokenizer),
      model=model,
      base=model.init(jax.random.key(0)),
      train=PROBLEMS[:6],
      dev=PROBLEMS[6:9],
      test=PROBLEMS[9:],
      judge=(),
      executor=executor,
      wanted=frozenset({'tcg'}),
    )


def real(problem, first=0):
  """Three of a problem's own tests, as if they had been generated."""
  tests = problem.tests[first : first + 3]
  return tuple(dataclasses.replace(test, origin='tcg') for test in tests)


def spoilt(problem, part):
  """The part with an output in its last case that no program of the family prints."""
  wrong = '99999' if problem.entry_point is None else '[99999]'
  return (*part[:2], dataclasses.replace(part[2], output=wrong))


def test_parts_are_real_cases_in_both_forms():
  parts = test_parts.draw_parts(PROBLEMS * 8, **DRAWS)[:12]
  assert parts == test_parts.draw_parts(PROBLEMS, draws=1, bare=0.25, seed=0)
  assert parts != test_parts.draw_parts(PROBLEMS, draws=1, bare=0.25, seed=1)
  for problem, part in zip(PROBLEMS, parts, strict=True):
    cases = test_parts.read_cases(problem, family.render_tests(part.tests))
    assert {(c.input, c.output) for c in cases} <= {(t.input, t.output) for t in problem.tests}
    assert part.prompt in [family.tcg_prompt(problem, c) for c in (None, problem.solutions[0])]
  many = test_parts.draw_parts(PROBLEMS, draws=40, bare=0.25, seed=0)
  assert 0.15 < np.mean(['```' not in part.prompt for part in many]) < 0.35
  assert len({(part.prompt, part.tests) for part in many}) > 0.9 * len(many)


def test_documents_learn_the_cases_and_their_end(tokenizer):
  parts = test_parts.draw_parts(PROBLEMS, **DRAWS)
  documents = test_parts.documents(tokenizer, parts, 256)
  for part, document in zip(parts, documents, strict=True):
    read, learnt = document.ids[: document.prompt], document.ids[document.prompt :]
    assert tokenizer.decode(read) == part.prompt
    assert tokenizer.decode(learnt) == family.render_tests(part.tests)
    assert learnt[-1] == tokenizer.eos_id
  short = sorted(len(d.ids) for d in documents)[3]
  assert len(test_parts.documents(tokenizer, parts, short)) >= 4
  assert max(len(d.ids) for d in test_parts.documents(tokenizer, parts, short)) == short


def test_pairs_differ_in_their_outputs_alone(tokenizer, executor):
  parts = test_parts.draw_parts(PROBLEMS, draws=1, bare=0.25, seed=0)
  sides = test_parts.shuffled_pairs(tokenizer, parts, longest=256, most=8, seed=0)
  assert [len(side.tokens) for side in sides] == [8, 8]
  texts = [
    [tokenizer.decode(row[mask > 0]) for row, mask in zip(side.tokens, side.loss_mask, strict=True)]
    for side in sides
  ]
  kept = [i for i, part in enumerate(parts) if len({test.output for test in part.tests}) > 1][:8]
  problems = [PROBLEMS[i] for i in kept]
  chosen, rejected = (
    [test_parts.read_cases(p, text) for p, text in zip(problems, side, strict=True)]
    for side in texts
  )
  assert [[c.input for c in part] for part in chosen] == [
    [c.input for c in part] for part in rejected
  ]
  assert all(sum(flags) == 3 for flags in tcg.confirm(executor, problems, chosen))
  assert all(sum(flags) < 3 for flags in tcg.confirm(executor, problems, rejected))
  for side in sides:  # the prompt is read, not learnt
    for i, row, mask in zip(kept, side.tokens, side.loss_mask, strict=True):
      assert tokenizer.decode(row[: int(mask.argmax())]) == parts[i].prompt


PRINTED = Problem(
  'echo', 'Print it.', tuple(TestCase(f'{n}\na\\n b\n', f'{n}\na\\n b\n') for n in range(3))
)
CALLED = Problem(
  'add',
  'Add.',
  tuple(TestCase(f'[{n},  "a\\nb"]', f'{{"k": [{n}, null]}}') for n in range(4)),
  entry_point='add',
)


@pytest.mark.parametrize('problem', [PRINTED, CALLED], ids=lambda p: p.id)
def test_other_problems_keep_their_cases(problem):
  text = family.render_tests(test_parts.draw_cases(problem, random.Random(0)))
  assert text.count('\n') == 6
  cases = test_parts.read_cases(problem, text)
  own = {(t.input.strip(), t.output.strip()) for t in problem.tests}
  own |= {(a.replace(',  ', ', '), b) for a, b in own}
  assert {(c.input, c.output) for c in cases} <= own
  assert test_parts.draw_cases(dataclasses.replace(problem, tests=problem.tests[:2]), None) is None


@pytest.mark.parametrize(
  'spoil',
  [
    lambda text: text[:-1],
    lambda text: text + 'Input: 1\n',
    lambda text: text.replace('Output', 'Result', 1),
    lambda text: text.partition('Input')[1] * 2 + text,
    lambda text: '\n'.join(text.split('\n')[:4]) + '\n',
    lambda text: '\n'.join(text.split('\n')[:2]) * 3 + '\n',
    lambda text: '',
  ],
)
@pytest.mark.parametrize('problem', [PRINTED, CALLED, PROBLEMS[0]], ids=lambda p: p.id[:6])
def test_anything_else_is_no_test_part(problem, spoil):
  text = family.render_tests(test_parts.draw_cases(problem, random.Random(0)))
  assert test_parts.read_cases(problem, text) is not None
  assert test_parts.read_cases(problem, spoil(text)) is None


def test_arguments_that_are_no_json_list_are_no_case():
  for given, wanted in (('1', '1'), ('[1', '1'), ('[1]', 'x')):
    text = ''.join(f'Input: {given if n == 1 else f"[{n}]"}\nOutput: {wanted}\n' for n in range(3))
    assert test_parts.read_cases(CALLED, text) is None


def test_quality_counts_cases_that_the_reference_confirms(executor):
  a, b, c, d = PROBLEMS[:4]
  parts = [real(a), spoilt(b, real(b)), None, spoilt(d, real(d, 4))]
  found = tcg.quality(executor, (a, b, c, d), parts, resamples=500)
  assert found['parse_rate'] == 3 / 4
  assert found['correct'] == pytest.approx(7 / 9)
  assert found['correct_of_all'] == pytest.approx(7 / 12)
  assert found['n'] == 4
  assert found['ci95'][0] <= 7 / 9 <= found['ci95'][1]
  nothing = tcg.quality(executor, (a, b), [None, None], resamples=500)
  assert (nothing['parse_rate'], nothing['correct'], nothing['n']) == (0, 0, 2)


def test_what_the_sandbox_failed_to_judge_is_not_counted(executor):
  class Failing:
    def judge(self, problems, paths, tests):
      verdicts = executor.judge(problems, paths, tests)
      return [dataclasses.replace(verdicts[0], status='sandbox_failure'), *verdicts[1:]]

  a, b, c = PROBLEMS[:3]
  found = tcg.quality(Failing(), (a, b, c), [real(a), real(b), None], resamples=500)
  assert (found['parse_rate'], found['correct'], found['n']) == (0.5, 1.0, 2)


def test_kept_tests_are_confirmed_distinct_and_enough(run, monkeypatch):
  a, b, c = run.train[:3]
  written = {
    a.id: [real(a), real(a, 1), real(a, 4), real(a, 7)],  # eight inputs: six are kept
    b.id: [spoilt(b, real(b)), None, real(b, 1), None],  # four inputs are right
    c.id: [spoilt(c, real(c)), spoilt(c, real(c)), None, None],  # two are not enough
  }

  def fake(run, params, problems, *, samples, seed):
    return [part for p in problems for part in written.get(p.id, [None] * samples)]

  monkeypatch.setattr(tcg, 'generate', fake)
  kept = tcg.write_tests(run, run.base)
  assert kept == {a.id: real(a) + real(a, 3), b.id: real(b) + real(b, 3)[:1]}
  monkeypatch.delattr(tcg, 'generate')
  assert tcg.write_tests(run, run.base) == kept  # read back, not generated


def test_generation_stops_at_the_limit_without_a_test_part(run):
  long = dataclasses.replace(run.train[0], statement='1 ' * 300)  # is not even tried
  parts = tcg.generate(run, run.base, [run.train[0], long, run.train[1]], samples=2, seed=0)
  assert parts == [None] * 6  # a model that has learnt nothing
  assert tcg.generate(run, run.base, [], samples=2, seed=0) == []


def test_generated_text_goes_to_its_problem(run, monkeypatch):
  problems = [run.train[i] for i in (0, 3, 1)]
  texts = [family.render_tests(test_parts.draw_cases(p, random.Random(0))) for p in problems]
  tokenizer = run.tokenizer
  rows = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts for _ in range(2)]

  def fake(self, params, prompts, *, seed, ids, samples):
    read = [tokenizer.decode(prompt) for prompt in prompts]
    assert read == [family.tcg_prompt(p, p.solutions[0]) for p in problems]
    assert list(ids) == list(tcg.name_ids(problems))
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((6, lengths.max()), np.int32)
    for row, text in zip(tokens, rows, strict=True):
      row[: len(text)] = text
    stopped = np.array([True, False, True, True, True, True])
    return Samples(tokens, np.zeros_like(tokens, np.float32), lengths, stopped, 0, 0)

  monkeypatch.setattr(tcg.Sampler, '__call__', fake)
  parts = tcg.generate(run, run.base, problems, samples=2, seed=0)
  right = [test_parts.read_cases(p, text) for p, text in zip(problems, texts, strict=True)]
  assert parts == [right[0], None, right[1], right[1], right[2], right[2]]


def test_the_stage_trains_each_part_once(run, monkeypatch):
  def fake(run, params, problems, *, samples, seed):
    return [real(p) for p in problems for _ in range(samples)]

  fitted = []

  def counted(bench, stage, name, *arguments):
    fitted.append(name)
    return fit(bench, stage, name, *arguments)

  fit = tcg.fit
  monkeypatch.setattr(tcg, 'generate', fake)
  monkeypatch.setattr(tcg, 'fit', counted)
  params = tcg.train_tcg(run)
  store = run.bench.store
  assert fitted == ['sft', 'dpo', 'control']
  result = store.done('tcg')
  assert (result['dev_dpo_parse_rate'], result['dev_dpo_correct']) == (1, 1)
  assert (result['tested_problems'], result['untested_problems']) == (6, 0)
  assert [row['stage'] for row in tcg.tcg_table(run)] == ['base', 'sft', 'sft_control', 'dpo']

  # As after a kill during DPO: what is saved is read, the rest is trained to the same end.
  shutil.rmtree(store.path('tcg', 'dpo'))
  store.path('tcg', 'done.json').unlink()
  again = tcg.train_tcg(run)
  assert fitted == ['sft', 'dpo', 'control', 'dpo']
  jax.tree.map(np.testing.assert_array_equal, params, again)
  sft, control = (store.load_params('tcg', name) for name in ('sft', 'control'))
  assert not np.array_equal(*(np.asarray(jax.tree.leaves(tree)[0]) for tree in (sft, params)))
  assert not np.array_equal(*(np.asarray(jax.tree.leaves(tree)[0]) for tree in (control, params)))


def test_reference_logprobs_do_not_depend_on_the_blocks(run, tokenizer):
  parts = test_parts.draw_parts(run.train, draws=1, bare=0.25, seed=0)
  rows, _ = test_parts.shuffled_pairs(tokenizer, parts, longest=256, most=5, seed=0)
  whole, blocks = (tcg.reference_logprobs(run.model, run.base, rows, size) for size in (64, 2))
  np.testing.assert_allclose(blocks, whole, rtol=1e-5)
  learnt = rows.loss_mask.sum(axis=1)
  # An untrained model is about uniform over the vocabulary.
  np.testing.assert_allclose(whole, -learnt * np.log(tokenizer.vocab_size), rtol=0.05)


def test_rounds_take_the_next_problems_and_begin_again(run):
  data = run.config.data.model_copy(update={'per_round': 2})
  run = dataclasses.replace(
    run, train=run.train[:5], config=run.config.model_copy(update={'data': data})
  )
  a, b, c, d, e = run.train
  assert [run.new_problems(r) for r in range(3)] == [(a, b), (c, d), (e, a)]
  assert [len(run.known_problems(r)) for r in range(4)] == [2, 4, 5, 5]
  everything = dataclasses.replace(run, config=Config())
  assert everything.new_problems(3) == everything.known_problems(0) == run.train

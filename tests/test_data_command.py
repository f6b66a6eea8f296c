"""`python -m o1jax.data`: what each command says, writes, and refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from o1jax.data import export, o1coder, stepwise
from o1jax.data import steps as steps_lib
from o1jax.data.__main__ import main
from o1jax.data.prefix_tree import PrefixTree
from o1jax.data.readers import Faults, read_problems
from o1jax.types import Step, TestResult, Trajectory, Verdict

DATA = Path(os.environ.get('O1JAX_TEST_DATA', Path(__file__).parents[2] / 'shared' / 'data'))
TACO = DATA / 'taco_train_easy_10.json'
PRM = DATA / 'prm_soft_label_examples.json'


def taco(question, solutions, inputs, outputs, **more):
  tests = {'inputs': inputs, 'outputs': outputs, **more}
  return {'question': question, 'solutions': solutions, 'input_output': json.dumps(tests)}


ADD = taco('Add two numbers.', ['print(sum(map(int, input().split())))'], ['1 2\n'], ['3\n'])
DOUBLE = taco('Double it.', ['def f(x):\n  return 2 * x'], [[2], ['a']], [4, 'aa'], fn_name='f')
WRONG = taco('Print the larger one.', ['print(min(input().split()))'], ['1 2', '3 3'], ['2', '3'])
SECOND = taco('Print the number.', ['print(0)', 'print(input())'], ['5'], ['5'])
BARE = taco('Print nothing at all.', [], ['5'], [''])


def written(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


# --- inspect, clean ---------------------------------------------------------------------


def test_inspect(tmp_path, capsys):
  path = written(tmp_path / 'p.jsonl', [ADD, ADD, DOUBLE, {'question': 'x'}, BARE])
  tested = written(tmp_path / 'e.jsonl', [DOUBLE])
  assert main(['inspect', str(path), '--against', str(tested)]) == 0
  out = capsys.readouterr().out
  assert '4 problems' in out and f'({path.stat().st_size:,} bytes): 4 taco' in out
  assert '3 by stdin and stdout, 1 by calls' in out
  assert 'without a reference program: 1' in out
  assert 'tests a problem: 1 to 2, median 1' in out
  assert f"1 row left out\n  {path}, row 4: has no 'input_output'" in out
  assert 'Add two numbers.' in out and "'1 2\\n' -> '3\\n'" in out and 'print(sum(' in out
  assert '1 near-duplicates' in out and '1 overlap with evaluation sets' in out
  assert 'resemblance 1.00' in out and 'containment 1.00' in out


def test_inspect_takes_limit_split_and_format(tmp_path, capsys):
  written(tmp_path / 'train.jsonl', [ADD, DOUBLE])
  written(tmp_path / 'test.jsonl', [BARE])
  assert main(['inspect', str(tmp_path)]) == 0
  assert '3 problems' in capsys.readouterr().out
  assert main(['inspect', str(tmp_path), '--split', 'train', '--limit', '1']) == 0
  assert '1 problems' in capsys.readouterr().out
  assert main(['inspect', str(tmp_path), '--format', 'mbpp']) == 0
  out = capsys.readouterr().out
  assert '0 problems' in out and '3 rows left out' in out


def test_clean_writes_what_reads_back(tmp_path, capsys):
  path = written(tmp_path / 'p.jsonl', [ADD, DOUBLE, ADD | {'question': 'ADD two numbers.'}, BARE])
  tested = written(tmp_path / 'e.jsonl', [BARE])
  out = tmp_path / 'clean.jsonl'
  assert main(['clean', str(path), '--out', str(out), '--against', str(tested)]) == 0
  said = capsys.readouterr()
  assert list(read_problems(out, strict=True)) == list(read_problems(path))[:2]
  assert '2 problems written' in said.out
  assert 'resemblance 1.00' in said.err and 'containment 1.00' in said.err


def test_clean_keeps_an_id_once(tmp_path, capsys):
  own = [{'id': 'a', 'statement': text} for text in ('Print one.', 'Sort the list of names.')]
  path = written(tmp_path / 'p.jsonl', own)
  assert main(['clean', str(path), '--out', str(tmp_path / 'c.jsonl')]) == 0
  assert f"{path}, row 2: the id 'a' was there before" in capsys.readouterr().out
  assert lines_of(tmp_path / 'c.jsonl')[0]['statement'] == 'Print one.'


def test_a_file_appears_whole_or_not_at_all(tmp_path, capsys):
  path = written(tmp_path / 'p.jsonl', [ADD, {'question': 1}])
  assert main(['clean', str(path), '--out', str(tmp_path / 'c.jsonl'), '--strict']) == 2
  assert 'row 2: ' in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['p.jsonl']


# --- validate ---------------------------------------------------------------------------


def test_validate_says_which_rows_cannot_be_trusted(tmp_path, capsys):
  loud = taco('Print and fail.', ['raise SystemError("why")'], ['5'], ['5'])
  path = written(tmp_path / 'p.jsonl', [ADD, WRONG, DOUBLE, SECOND, BARE, loud])
  good = tmp_path / 'good.jsonl'
  options = ['--workers', '1', '--out', str(good)]
  assert main(['validate', str(path), *options]) == 1
  out = capsys.readouterr().out
  assert 'row 2 (taco/' in out and 'wrong_answer, 1 of 2 tests passed' in out
  assert 'row 4 (taco/' in out and 'row 5 (taco/' in out and 'has no reference program' in out
  assert 'row 6 (taco/' in out and 'runtime_error' in out and 'SystemError: why' in out
  assert 'row 1' not in out and 'row 3' not in out and '2 of 6 problems can be trusted' in out
  assert [row['statement'][:6] for row in lines_of(good)] == ['Add tw', 'Double']


def test_validate_tries_further_solutions(tmp_path, capsys):
  path = written(tmp_path / 'p.jsonl', [SECOND])
  good = tmp_path / 'good.jsonl'
  options = ['--workers', '1', '--solutions', '2', '--out', str(good)]
  assert main(['validate', str(path), *options]) == 0
  assert lines_of(good)[0]['solutions'] == ['print(input())', 'print(0)']


@pytest.mark.skipif(not TACO.exists(), reason=f'{TACO} is not there')
def test_validate_finds_the_row_whose_outputs_are_shuffled(capsys):
  assert main(['validate', str(TACO), '--workers', '2', '--cpu-s', '5']) == 1
  out = capsys.readouterr().out
  assert '9 of 10 problems can be trusted' in out
  assert f'{TACO}, row 9 (' in out and 'wrong_answer, 1 of 9' in out


# --- export -----------------------------------------------------------------------------

PLAN, REFINE, OTHER = Step(1, 'plan'), Step(2, 'refine'), Step(2, 'guess')
RIGHT, BAD = steps_lib.program_step('print(1)'), steps_lib.program_step('print(2)')
PROMPT = 'Print one.\n'


def trajectory(steps, reward, problem='p'):
  status = None if reward is None else 'accepted' if reward == 1 else 'wrong_answer'
  verdict = status and Verdict(status, (TestResult(status),))
  ones = (1.0,) * len(steps)
  return Trajectory(problem, tuple(steps), ones, (1,) * len(steps), verdict, reward)


FOUND = [
  trajectory([PLAN, REFINE, RIGHT], 1.0),
  trajectory([PLAN, REFINE, BAD], 0.0),
  trajectory([PLAN, OTHER, BAD], 0.0),
  trajectory([PLAN, REFINE], None),
]
LATER = [trajectory([PLAN, REFINE, RIGHT], 1.0), trajectory([PLAN, BAD], 0.0, 'q')]


@pytest.fixture
def run(tmp_path):
  for stage, found in (('round0/synthesis', FOUND), ('round0/rl', LATER)):
    rows = [stepwise.to_row(t, PROMPT) for t in found]
    written(tmp_path / 'run' / 'stages' / stage / 'trajectories' / '00000.jsonl', rows)
  return tmp_path / 'run'


def exported(run, format, *options):
  out = run / f'{format}.jsonl'
  assert main(['export', str(run), '--format', format, '--out', str(out), *options]) == 0
  return lines_of(out)


def test_export_sft(run):
  rows = exported(run, 'sft')
  assert rows == [{'prompt': PROMPT, 'completion': steps_lib.render([PLAN, REFINE, RIGHT])}]
  assert steps_lib.parse(rows[0]['completion']) == (PLAN, REFINE, RIGHT)


def test_export_preference(run):
  rows = exported(run, 'preference')
  assert [set(row) for row in rows] == [{'prompt', 'chosen', 'rejected'}] * 2
  steps, programs = sorted(rows, key=lambda row: len(row['prompt']))
  assert steps['prompt'] == PROMPT + steps_lib.render([PLAN])
  assert (steps['chosen'], steps['rejected']) == tuple(map(steps_lib.render_step, (REFINE, OTHER)))
  assert programs['prompt'] == PROMPT + steps_lib.render([PLAN, REFINE])
  assert (programs['chosen'], programs['rejected']) == tuple(
    map(steps_lib.render_step, (RIGHT, BAD))
  )


def test_export_stepwise(run):
  rows = exported(run, 'stepwise')
  assert len(rows) == 4  # distinct judged paths: the one that was cut off is not among them
  first = next(r for r in rows if r['completions'] == [PLAN.text, REFINE.text, RIGHT.text])
  # Means over both stages: 2 of 4 roll-outs through the plan, 2 of 3 through the refinement.
  assert first['values'] == [0.5, 0.666667, 1.0] and first['visits'] == [4, 3, 2]
  assert first['labels'] == [True, True, True] and first['prompt'] == PROMPT
  wrong = next(r for r in rows if r['completions'] == [PLAN.text, OTHER.text, BAD.text])
  assert wrong['labels'] == [True, False, False]
  for row in rows:
    assert len(row['completions']) == len(row['labels']) == len(row['values'])
    assert all(type(label) is bool for label in row['labels'])


def test_export_o1coder_comes_back(run):
  rows = exported(run, 'o1coder')
  assert {tuple(row) for row in rows} == {('prompt', 'response', 'has_final_step', 'label')}
  labels = list(o1coder.read_labels(run / 'o1coder.jsonl', Faults(strict=True)))
  expected = []
  for found in ([*FOUND, *LATER[:1]], LATER[1:]):
    nodes = PrefixTree(found).nodes
    expected += [(prefix, round(node.value, 6)) for prefix, node in nodes.items()]
  assert {((*x.prefix, x.step), x.value) for x in labels} == set(expected)
  assert len(labels) == len(expected) == 8
  hard = exported(run, 'o1coder-hard')
  assert [row['label'] == ['positive'] for row in hard] == [row['label'][0] > 0 for row in rows]


def test_export_trees(run):
  rows = exported(run, 'trees')
  assert [row['problem_id'] for row in rows] == ['p', 'q']
  nodes = rows[0]['nodes']
  roots = [node for node in nodes if node['parent'] == -1]
  assert [(n['text'], n['value'], n['visits']) for n in roots] == [('plan', 0.5, 4)]
  for node in nodes:
    children = [n for n in nodes if n['parent'] >= 0 and nodes[n['parent']] is node]
    assert not children or sum(n['visits'] for n in children) == node['visits']


def test_export_leaves_damaged_rows_out(run, capsys):
  path = next(run.glob('stages/**/rl/trajectories/*.jsonl'))
  path.write_text(path.read_text() + '{"problem_id": "p"}\n{"prob')
  assert len(exported(run, 'stepwise')) == 4
  err = capsys.readouterr().err
  assert '2 rows left out' in err and f'{path}, row 3: ' in err and f'{path}, row 4: ' in err
  assert main(['export', str(run), '--format', 'sft', '--strict']) == 2


def test_export_goes_to_the_terminal(run, capsys):
  assert main(['export', str(run), '--format', 'stepwise', '--limit', '2']) == 0
  out = capsys.readouterr().out
  assert [set(json.loads(line)) >= {'prompt', 'labels'} for line in out.splitlines()] == [True] * 2


def test_every_export_is_in_the_help():
  from o1jax.data import __main__ as command

  for name in export.EXPORTS:
    assert name in command.__doc__


# --- O1-CODER's files -------------------------------------------------------------------


def test_inspect_of_step_labels(tmp_path, capsys):
  rows = [o1coder.to_row('Do it.', [PLAN], REFINE, 0.25), o1coder.to_row('Do it.', [], PLAN, 0.0)]
  path = written(tmp_path / 'prm.jsonl', [*rows, rows[0] | {'label': []}])
  assert main(['inspect', str(path)]) == 0
  out = capsys.readouterr().out
  assert '2 labelled steps of 1 problems (O1-CODER): 1 above 0' in out
  assert '1 row left out' in out and 'first label: 0.25 for step 2:\nrefine' in out


@pytest.mark.skipif(not PRM.exists(), reason=f'{PRM} is not there')
def test_inspect_of_real_step_labels(capsys):
  assert main(['inspect', str(PRM), '--strict']) == 0
  assert '5 labelled steps of 1 problems (O1-CODER): 4 above 0' in capsys.readouterr().out


# --- bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
  'arguments, said',
  [
    (['inspekt', 'x'], "no command 'inspekt'; choose from inspect.*did you mean inspect"),
    (['inspect', 'p.jsonn'], "'p.jsonn': no such file or folder; did you mean p.jsonl"),
    (['inspect', 'p.jsonl', '--format', 'tako'], "no format 'tako'; known.*did you mean taco"),
    (['inspect', 'p.jsonl', '--split', 'test'], "no split 'test'; it has no file that names one"),
    (['inspect', 'empty.jsonl'], 'empty.jsonl holds no rows'),
    (['inspect', 'notes.txt'], "'notes.txt' ends in none of .jsonl"),
    (['validate', 'p.jsonl', '--allow-unsafe', 'yes'], "allow_unsafe='yes' must be empty or"),
    (['validate', 'p.jsonl', '--cpu-s', '0'], 'limits.cpu_s=0.0 must be a number above 0'),
    (['clean', 'p.jsonl', '--out', 'no/where.jsonl'], 'No such file or directory'),
    (['export', '.', '--format', 'stepwize'], "'stepwize' is no export.*did you mean stepwise"),
    (['export', '.', '--format', 'sft'], r"'\.' has no stages/\*\*/trajectories"),
    (['export', 'gone', '--format', 'sft'], "'gone': no such folder; name the run.dir of a run"),
  ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys, arguments, said):
  monkeypatch.chdir(tmp_path)
  written(tmp_path / 'p.jsonl', [ADD])
  (tmp_path / 'empty.jsonl').touch()
  (tmp_path / 'notes.txt').touch()
  assert main(arguments) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  assert re.search(said, line)


def test_it_runs_as_a_module_without_jax(tmp_path):
  path = written(tmp_path / 'p.jsonl', [ADD])
  code = (
    'import runpy, sys; sys.argv = ["data", "inspect", sys.argv[1]]\n'
    'try:\n  runpy.run_module("o1jax.data", run_name="__main__")\n'
    'except SystemExit as e:\n  assert e.code == 0\n'
    'assert "jax" not in sys.modules'
  )
  done = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert '1 problems' in done.stdout

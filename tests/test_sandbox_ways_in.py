"""Other ways into the pool: the command line, and a service that runs the programs."""

import contextlib
import io
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sandbox_cases import ECHO, LIMITS, RIGHT, WRONG

from o1jax import types
from o1jax.sandbox import Job, Pool, SandboxError
from o1jax.sandbox import __main__ as command
from o1jax.types import TestCase

# --- the command ----------------------------------------------------------------------------


def run_command(monkeypatch, lines, *options):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(lines)))
  with contextlib.redirect_stdout(io.StringIO()) as out:
    status = command.main(['--workers', '1', '--cpu-s', '0.5', *options])
  return status, [json.loads(line) for line in out.getvalue().splitlines()]


def test_lines_in_verdicts_out(monkeypatch):
  tests = [{'input': t.input, 'output': t.output} for t in ECHO]
  lines = [
    json.dumps({'id': 'a', 'code': RIGHT.code, 'tests': tests}),
    '{not json',
    '',
    json.dumps({'id': 'b', 'code': 'def f(): return 2', 'test_code': 'assert f() == 1'}),
  ]
  status, verdicts = run_command(monkeypatch, lines)
  assert status == 1
  assert [v.get('id') for v in verdicts] == ['a', None, 'b']
  assert verdicts[0]['passed'] == verdicts[0]['total'] == len(verdicts[0]['tests']) == 2
  assert verdicts[1]['line'] == 2 and 'Expecting' in verdicts[1]['error']
  assert verdicts[2]['status'] == types.WRONG_ANSWER
  assert run_command(monkeypatch, lines[:1])[0] == 0


def test_the_command_refuses_what_makes_no_sense(monkeypatch, capsys):
  assert run_command(monkeypatch, [], '--timeouts', '0')[0] == 2
  assert 'limits.timeouts=0' in capsys.readouterr().err
  assert run_command(monkeypatch, [], '--url', 'ftp://x')[0] == 2
  assert "sandbox.url='ftp://x'" in capsys.readouterr().err


def test_doctor(monkeypatch, capsys):
  monkeypatch.setattr(command, '_DOCTOR_S', 0.05)
  assert command.main(['--workers', '1', '--doctor']) == 0
  report = json.loads(capsys.readouterr().out)
  assert report['tier'] in 'ABC' and report['layers']
  assert report['per_second_and_worker']['programs_of_10_tests'] > 0


# --- a service --------------------------------------------------------------------------------


class Service(BaseHTTPRequestHandler):
  """A stand-in with the interface of SandboxFusion. Only for programs of this file."""

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    assert self.path == '/run_code' and body['language'] == 'python'
    try:
      run = subprocess.run(
        [sys.executable, '-I', '-S', '-c', body['code']],
        input=body['stdin'],
        capture_output=True,
        text=True,
        timeout=body['run_timeout'],
      )
      result = {
        'status': 'Finished' if run.returncode == 0 else 'Error', 'execution_time': 0.01,
        'return_code': run.returncode, 'stdout': run.stdout, 'stderr': run.stderr,
      }  # fmt: skip
    except subprocess.TimeoutExpired:
      result = {'status': 'TimeLimitExceeded', 'execution_time': 1.0, 'return_code': None,
                'stdout': '', 'stderr': None}  # fmt: skip
    status = 'Success' if result['return_code'] == 0 else 'Failed'
    if 'SERVICE_FAILS' in body['code']:
      status, result = 'SandboxError', None
    answer = json.dumps({'status': status, 'message': 'out of order', 'run_result': result})
    self.send_response(200)
    self.end_headers()
    self.wfile.write(answer.encode())

  def log_message(self, *args):
    pass


@pytest.fixture
def service():
  server = ThreadingHTTPServer(('127.0.0.1', 0), Service)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  yield f'http://127.0.0.1:{server.server_port}'
  server.shutdown()
  thread.join()
  server.server_close()


def test_a_service_judges_as_the_machine_does(service):
  equal = 'class E:\n  __eq__ = lambda *_: True\ndef f(n): return E()'
  pair = 'class P:\n  def __init__(self, n): self.n = n\ndef f(p): return [p.n]'
  calls = (TestCase('[2]', '[0, 1]'),)
  jobs = [
    RIGHT,
    WRONG,
    Job('print(', ECHO),
    Job('1 / 0', ECHO[:1]),
    Job('def f(n): return list(range(n))', calls, 'f'),
    Job('def f(n): return n', calls, 'f'),
    Job(equal, calls, 'f'),
    Job('def f(n): raise KeyError', calls, 'f'),
    Job('def f(n): return n + 1', (), 'f', 'def check(c):\n  assert c(1) == 2\n  assert c(2) == 3'),
    Job('def f(n): return 2', (), 'f', 'def check(c):\n  assert c(1) == 2\n  assert c(2) == 3'),
    Job(equal, (), 'f', 'assert f(1) == 1'),
    Job(pair, (), 'f', 'assert f(P(3)) == [3]\nassert f(P(4)) == [5]'),
    Job('import os\ndef f(n): os._exit(0)', (), 'f', 'assert f(1) == 1'),
    Job('def f(n):', (), 'f', 'assert f(1) == 1'),
  ]
  with Pool(4, LIMITS, url=service) as remote:
    assert remote.tier == 'remote'
    there = remote.judge(jobs)
  with Pool(2, LIMITS) as local:
    here = local.judge(jobs)
  assert [(v.status, v.passed, len(v.tests)) for v in there] == [
    (v.status, v.passed, len(v.tests)) for v in here
  ]


def test_a_service_that_fails_is_no_verdict(service):
  with Pool(1, LIMITS, url=service) as remote:
    assert remote.submit(Job('SERVICE_FAILS = 1', ECHO)).result().masked
  with pytest.raises(SandboxError, match=r'does not start: .*does not answer'):
    Pool(1, LIMITS, url='http://127.0.0.1:9')

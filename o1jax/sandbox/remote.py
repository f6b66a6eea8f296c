"""Judging elsewhere: an HTTP service that runs programs, spoken to as if it were a zygote.

For sites that must not run programs beside their accelerators. The service has the interface
of SandboxFusion (`POST /run_code`) and is trusted to confine what it runs; the verdicts stay
here. Expected outputs are not sent with the program: test code runs in a request of its own,
with the program's answers replayed to it, call by call.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import urllib.error
import urllib.request
from pathlib import Path

from o1jax.sandbox import wire
from o1jax.sandbox.judge import HarnessFailure, Reply

log = logging.getLogger(__name__)

# A service has a wall clock only: this many times the CPU limit, so that a loaded one is
# not unfair at once and an endless loop does not take too long.
_WALL_PER_CPU = 3.0
_MAX_CALLS = 400  # of the program, by one piece of test code
_OVERHEAD_S = 60.0
# What a request carries besides the program: the child's side of this package.
_BUNDLED = ('wire', 'codec', 'program', 'tester', 'remote_child')
_BOOT = """
import sys, types
def package(name, source):
  module = types.ModuleType(name)
  module.__path__ = []
  sys.modules[name] = module
  parent, _, last = name.rpartition('.')
  if parent: setattr(sys.modules[parent], last, module)
  exec(compile(source, name, 'exec'), module.__dict__)
for name, source in {sources!r}.items(): package(name, source)
from o1jax.sandbox import remote_child
remote_child.{entry}({arguments!r})
"""


def _bundle(entry: str, arguments: dict) -> str:
  folder = Path(__file__).parent
  sources = {'o1jax': '', 'o1jax.sandbox': ''}
  for name in _BUNDLED:
    sources[f'o1jax.sandbox.{name}'] = (folder / f'{name}.py').read_text()
  return _BOOT.format(sources=sources, entry=entry, arguments=arguments)


class Service:
  """Asks an HTTP service what a zygote would be asked.

  Args:
    url: where the service is, without `/run_code`.
  """

  layers = ('remote',)

  def __init__(self, url: str):
    if not url.startswith(('http://', 'https://')):
      raise ValueError(f'sandbox.url={url!r} must start with http:// or https://')
    self.url = url.rstrip('/')
    self.served = 0

  def close(self) -> None:
    """Nothing is kept open between requests."""

  def prove_again(self) -> None:
    """A service's layers are its own affair; the canaries still run."""

  def run(self, code: str, stdin: str, request: dict) -> dict:
    """One program run by the service: its `run_result`; raises HarnessFailure without one."""
    wall_s = math.ceil(request['cpu_s'] * _WALL_PER_CPU * max(1, request['tests']))
    body = {
      'code': code,
      'stdin': stdin,
      'language': 'python',
      'compile_timeout': wall_s,
      'run_timeout': wall_s,
      'memory_limit_MB': request['memory_bytes'] >> 20,
      'files': {},
      'fetch_files': [],
    }
    message = urllib.request.Request(
      self.url + '/run_code', json.dumps(body).encode(), {'Content-Type': 'application/json'}
    )
    try:
      with urllib.request.urlopen(message, timeout=wall_s + _OVERHEAD_S) as response:
        answer = json.loads(response.read())
      result = answer['run_result']
      if answer['status'] == 'SandboxError' or result is None:
        raise HarnessFailure(f'{self.url}: {answer.get("message") or answer["status"]}')
      return {'stdout': '', 'stderr': '', 'return_code': None, 'execution_time': 0.0} | {
        key: value for key, value in result.items() if value is not None
      }
    except (OSError, ValueError, KeyError, TypeError, urllib.error.URLError) as e:
      raise HarnessFailure(f'{self.url} does not answer: {type(e).__name__}: {e}') from None

  def ask(self, request: dict, test_code: str | None = None) -> Reply:
    """What a zygote would reply; raises HarnessFailure when the service fails."""
    self.served += 1
    if request['mode'] == wire.CHECK:
      return self._check(request, test_code or '')
    if request['mode'] == wire.BATCH:
      return self._compile(request)
    if request['entry_point'] is None:
      return _reply(self.run(request['code'], request['inputs'][0], request), [])
    return self._call('call_once', request, {'request': request})

  def _compile(self, request: dict) -> Reply:
    """Only says whether the program compiles: the tests then run one by one."""
    return self._call('compile_only', request, {'code': request['code']})

  def _call(self, entry: str, request: dict, arguments: dict) -> Reply:
    # The program shares the process and can read the token. It could only forge its own output.
    token = secrets.token_hex(8)
    result = self.run(_bundle(entry, {**arguments, 'token': token}), '', request)
    _, found, line = result['stdout'].rpartition(token)
    records = wire.unpack_records(_unhex(line), 1) if found else []
    return _reply({**result, 'stdout': ''}, records)

  def _check(self, request: dict, test_code: str) -> Reply:
    """Test code by record and replay: it stops at each call that has no answer yet."""
    calls: list[str] = []
    for _ in range(_MAX_CALLS):
      program, answers = self._replay('answer_calls', request, {'calls': calls})
      gone = len(answers) <= len(calls)  # the first answer is to no call: it says hello
      arguments = {'test_code': test_code, 'answers': answers[: len(calls) + 1], 'gone': gone}
      tester, said = self._replay('run_tests', request, arguments)
      if len(said) != 1:
        raise HarnessFailure(f'the tester ended without a word: {tester["stderr"][-300:]}')
      verb, _, payload = said[0].partition(' ')
      if verb == 'records':
        return _reply({**program, 'stdout': ''}, wire.unpack_records(_unhex(payload), 10**6))
      calls.append(payload)
    raise HarnessFailure(f'test code made more than {_MAX_CALLS} calls')

  def _replay(self, entry: str, request: dict, arguments: dict) -> tuple[dict, list[str]]:
    token = secrets.token_hex(8)
    bundle = _bundle(entry, {**arguments, 'request': request, 'token': token})
    result = self.run(bundle, '', request)
    said = [line for line in result['stdout'].splitlines() if line.startswith(token)]
    return result, [line[len(token) :] for line in said]


def _unhex(text: str) -> bytes:
  try:
    return bytes.fromhex(text.strip())
  except ValueError:
    return b''


def _reply(result: dict, records: list) -> Reply:
  """A service's result in the form of a zygote's reply."""
  code = result['return_code']
  late = result.get('status') == 'TimeLimitExceeded'
  return Reply(
    records=records,
    stdout=result['stdout'].encode(errors='surrogatepass'),
    stderr=result['stderr'][-wire.STDERR_TAIL :],
    stderr_full=False,
    exit=code if code is not None and code >= 0 else -1,
    signal=-code if code is not None and code < 0 else 0,
    killed=wire.WALL if late else wire.NOTHING,
    cpu_s=0.0,
    wall_s=float(result['execution_time'] or 0.0),
    rss_bytes=0,
    tester_killed=wire.WALL if late else wire.NOTHING,
  )

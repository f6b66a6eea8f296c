"""The command line that entry points share.

    python -m o1jax.train --config FILE [section.key=value ...] [--stages a,b] [--dry-run] [--force]

Exit codes: 0 done, 2 a fault of the config or of the files it names, 130 interrupted (Ctrl-C,
SIGINT), 143 terminated (SIGTERM). The last two come after the training under way is saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from o1jax import config as config_lib
from o1jax.config import STAGES, Config, ConfigError
from o1jax.run import stop

_HUGE_PAGES = 'glibc.malloc.hugetlb'


@dataclasses.dataclass(frozen=True)
class Arguments:
  """A checked command line."""

  config: Config
  stages: tuple[str, ...]  # in the order of the loop
  dry_run: bool  # check everything, do nothing
  force: bool  # go on in a folder whose run had another config


def main(
  body: Callable[[Arguments], None], description: str, argv: Sequence[str] | None = None
) -> int:
  """Parses, calls `body`, and returns the exit code; a `ConfigError` is printed as plain text."""
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    with stop.raising():
      body(parse(argv, description))
  except ConfigError as error:
    print(error, file=sys.stderr)
    return 2
  except Exception as error:
    if stop.alone():
      raise
    _leave(1, error)
  except KeyboardInterrupt as error:
    signum = getattr(error, 'signum', signal.SIGINT)
    word = 'terminated' if signum == signal.SIGTERM else 'interrupted'
    command = shlex.join([sys.executable, *sys.orig_argv[1:]])
    print(f'\n{word}; the same command goes on from here:\n  {command}', file=sys.stderr)
    if not stop.alone():
      _leave(stop.exit_code(signum))
    return stop.exit_code(signum)
  return 0


def answer(work: Callable[[], str]) -> int:
  """Prints what a one-off command returns; bad input is a line on stderr and exit code 2."""
  try:
    print(work())
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


def _leave(code: int, error: Exception | None = None) -> None:
  from o1jax.parallel import distributed

  distributed.leave(code, error)


def restart_with_huge_pages() -> None:
  """Starts this interpreter again with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, keeping its pid.

  On CPU a training step of a small model takes less time then: its buffers
  are some megabytes each, and are mapped anew for every step. Does nothing where the variable says
  something about huge pages already, or where the C library is not glibc. Programs under test run
  in an environment of their own and do not see it.
  """
  told = os.environ.get('GLIBC_TUNABLES', '')
  if not sys.platform.startswith('linux') or _HUGE_PAGES in told:
    return
  os.environ['GLIBC_TUNABLES'] = ':'.join(filter(None, (told, f'{_HUGE_PAGES}=1')))
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def parse(argv: Sequence[str], description: str = '') -> Arguments:
  """Reads the command line and the config it names.

  Raises:
    ConfigError: with every fault of the config, or of `--stages`.
    SystemExit: code 2, for an unknown option; code 0, for `--help`.
  """
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, metavar='FILE', help='YAML file of settings')
  parser.add_argument('overrides', nargs='*', metavar='section.key=value', help='set over the file')
  parser.add_argument('--stages', metavar='a,b', help=f'only these of: {",".join(STAGES)}')
  parser.add_argument('--dry-run', action='store_true', help='check everything, do nothing')
  parser.add_argument(
    '--force', action='store_true', help='go on in a folder whose run had another config'
  )
  options = parser.parse_intermixed_args(argv)
  config = config_lib.load(options.config, options.overrides)
  return Arguments(config, _stages(options.stages), options.dry_run, options.force)


def _stages(text: str | None) -> tuple[str, ...]:
  """The named stages in the order of the loop; all of them for None."""
  if text is None:
    return STAGES
  names = [name.strip() for name in text.split(',') if name.strip()]
  unknown = [name for name in names if name not in STAGES]
  faults = [f'no stage {name!r}{config_lib.closest(name, STAGES)}' for name in unknown]
  if faults or not names:
    raise ConfigError('--stages', [*faults, f'choose from {", ".join(STAGES)}'])
  return tuple(name for name in STAGES if name in names)

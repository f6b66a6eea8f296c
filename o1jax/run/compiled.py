"""Compiled programs that outlive their process: JAX's persistent compilation cache.

More than half of a small run is compiling (docs/benchmarks.md); a run that goes on, or one that
differs in a number of steps, finds the same programs again.
"""

from __future__ import annotations

import logging
import os
import pathlib

import filelock
import jax

from o1jax.parallel import distributed

logger = logging.getLogger(__name__)

_SHORT_S = 0.1  # programs that compile faster are not worth a file
_MOST_BYTES = 4 << 30  # beyond it those that were not read for longest are removed
_LOCK_S = 10.0  # as long as JAX waits for it


def keep_compiled(folder: str) -> pathlib.Path | None:
  """Has JAX keep compiled programs in a folder, and take from there what it has compiled before.

  Where `JAX_COMPILATION_CACHE_DIR` is set, JAX does so by itself, there and by its own variables.
  JAX names a program by all that its compilation depends on, of JAX's version to the processor, so
  that runs and machines may share the folder.

  Args:
    folder: 'auto' is `o1jax/compiled` in the user's cache folder (`XDG_CACHE_HOME`, `~/.cache`),
      but nothing in a run of several processes, of which JAX lets the first one alone write: give
      these a folder that all of them see. '' is none.

  Returns:
    The folder, or None where nothing is kept: a folder that cannot be written is a word in the
    log, not an error.
  """
  known = jax.config.jax_compilation_cache_dir
  if known:
    return pathlib.Path(known)
  if not folder or (folder == 'auto' and distributed.count() > 1):
    return None
  path = _of_the_user() if folder == 'auto' else pathlib.Path(folder).expanduser().absolute()
  try:
    path.mkdir(parents=True, exist_ok=True)
    _remove_half_written(path)
  except (OSError, filelock.Timeout):
    logger.warning('%s cannot be written: compiled programs are not kept', path)
    return None
  jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', _SHORT_S)
  jax.config.update('jax_compilation_cache_max_size', _MOST_BYTES)
  return path


def _remove_half_written(path: pathlib.Path) -> None:
  """Takes out programs whose writer was killed: JAX would stumble over each of them for ever.

  It writes a program in place, and when it is whole the time beside it, under this lock.
  """
  with filelock.FileLock(path / '.lockfile', timeout=_LOCK_S):
    for program in path.glob('*-cache'):
      if not program.with_name(program.name.removesuffix('-cache') + '-atime').exists():
        program.unlink()


def _of_the_user() -> pathlib.Path:
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(root).expanduser() / 'o1jax' / 'compiled'

"""The folder of a run: what it was told, which stages are done, and their results.

    run.dir/
      config.yaml           the resolved config
      run.json              the same, with versions, git state and every session
      metrics.jsonl         see metrics.py
      stages/<stage>/       done.json, data sets, parameters, checkpoints

A stage is done when its `done.json` is there, written last and in one move. A stage that is not
done goes on from its checkpoints and chunks, or starts again. The folder is on a disk or in a
bucket (`bucket.py`).
"""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import logging
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import uuid
from typing import Any

from o1jax import config as config_lib
from o1jax.config import Config, ConfigError
from o1jax.parallel import distributed
from o1jax.run import bucket, checkpoints, files
from o1jax.run.lease import Held, Lease

logger = logging.getLogger(__name__)

_PACKAGES = ('o1jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'chex')
_PACKAGES += ('transformers', 'sentencepiece', 'numpy')


class Store:
  """An opened run folder, held by one run at a time. A context manager.

  Of several processes the first alone holds, reads and writes it, save for parameters and
  checkpoints: the folder lies where all of them reach it.
  """

  def __init__(self, config: Config, force: bool = False):
    """Makes or reopens `config.run.dir`; `force` goes on where the config has changed.

    Raises:
      ConfigError: the folder cannot be written, holds something else, a run of another config, or a
        run under way.
    """
    self.config = config
    self.dir = _place(config)
    self.local = self.dir  # for files that grow, on a disk
    self._lock: Any = None
    self._mirror: bucket.Mirror | None = None
    self._temporary: tempfile.TemporaryDirectory | None = None
    if not bucket.on_disk(self.dir):
      self._temporary = tempfile.TemporaryDirectory(prefix='o1jax-')
      self.local = pathlib.Path(self._temporary.name)
    distributed.from_first(lambda: self._open(force))

  def __enter__(self) -> Store:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Lets another process have the folder."""
    try:
      self.sync()
    finally:
      if self._lock is not None:
        self._lock.close()
      if self._temporary is not None:
        self._temporary.cleanup()

  def sync(self) -> None:
    """Brings the growing files into the bucket, if it is one; done before every save.

    Raises:
      ConfigError: another process has taken the folder over.
    """
    if self._mirror is not None:
      try:
        self._lock.check()
      except Held as error:
        raise _refusal(
          self.dir, f'{error}; what this run did since its last save is lost'
        ) from None
      self._mirror.upload()

  def path(self, stage: str, name: str = '') -> bucket.Path:
    """`stages/<stage>/<name>`; the stage's folder is made where there is none.

    `stage` may hold slashes: `round0/rl`.
    """
    folder = self.dir / 'stages' / stage
    bucket.make(folder)
    return folder / name if name else folder

  def done(self, stage: str) -> dict[str, Any] | None:
    """The result that `finish` wrote, or None for a stage that is not done."""
    marker = self.dir / 'stages' / stage / 'done.json'
    return distributed.from_first(lambda: files.read_json(marker))

  def finish(self, stage: str, result: dict[str, Any]) -> None:
    """Marks a stage as done with its result, then frees its (closed) checkpoints' space."""
    if distributed.is_first():
      self.sync()
      files.write_json(self.path(stage, 'done.json'), result)
      self.drop_checkpoints(stage)

  def drop_checkpoints(self, stage: str) -> None:
    """Frees the space of the stage's (closed) checkpoints; what they led to is written."""
    if distributed.is_first():
      bucket.remove(self.dir / 'stages' / stage / 'checkpoints')

  def forget(self, stage: str) -> None:
    """Removes everything of a stage, so that it runs again from the start."""
    folder = self.dir / 'stages' / stage
    (folder / 'done.json').unlink(missing_ok=True)  # first: half removed is not done
    bucket.remove(folder)

  def chunks(self, stage: str, name: str) -> files.Chunks:
    """A data set of the stage that grows chunk by chunk."""
    return files.Chunks(self.path(stage, name))

  def checkpoints(self, stage: str, name: str = 'state', keep: int = 2) -> checkpoints.Checkpoints:
    """`Checkpoints` of the stage's training state, due every `run.checkpoint_every_s`."""
    folder = self.path(stage, f'checkpoints/{name}')
    every_s = self.config.run.checkpoint_every_s
    return checkpoints.Checkpoints(folder, keep, every_s, before=self.sync)

  def save_params(self, stage: str, name: str, params: Any) -> None:
    """Writes a final pytree of arrays of the stage."""
    checkpoints.save_tree(self.path(stage, name), params)

  def load_params(self, stage: str, name: str, placed: checkpoints.Placed | None = None) -> Any:
    """Reads it back, laid out by `placed` or else on one device; raises FileNotFoundError."""
    return checkpoints.load_tree(self.path(stage, name), placed=placed)

  def _open(self, force: bool) -> None:
    check_folder(self.config, force)
    bucket.make(self.dir)
    if bucket.on_disk(self.dir):
      self._lock = _lock(self.dir / '.lock')
    else:
      self._lock = _leased(self.dir)
      bucket.remove(self.dir / 'tensorboard')  # made anew from the metrics
      self._mirror = bucket.Mirror(self.local, self.dir, ('metrics.jsonl', 'run.log'))
    self._write_header()

  def _write_header(self) -> None:
    """The resolved config and the list of sessions, this one added."""
    path = self.dir / 'run.json'
    header = files.read_json(path) or {'config': None, 'sessions': []}
    resolved = self.config.model_dump(mode='json')
    session = {
      'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'command': sys.argv,
      'versions': versions(),
      'git': git_state(),
    }
    if header['config'] is not None:
      session['changed'] = config_lib.diff(header['config'], resolved, ignore=())
    sessions = [*header['sessions'], session]
    files.write_text(self.dir / 'config.yaml', config_lib.to_yaml(self.config))
    files.write_json(path, {'config': resolved, 'sessions': sessions})


def saved_params(folder: bucket.Path) -> list[str]:
  """What stages of the run have saved by `save_params`: 'round0/rl/policy', 'tcg/dpo'."""
  return checkpoints.trees_below(folder / 'stages')


def check_folder(config: Config, force: bool = False) -> None:
  """Raises `ConfigError` where a `Store` would refuse the folder; leaves nothing behind."""
  folder = _place(config)
  if bucket.on_disk(folder):
    _check_disk(folder)
  else:
    _check_bucket(folder)
  if not folder.exists():
    return
  try:
    header = files.read_json(folder / 'run.json')
  except ValueError as error:
    raise _refusal(folder, str(error)) from None
  if header is None:
    strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith('.'))
    strangers = [name for name in strangers if name != 'config.yaml']  # written before run.json
    if strangers:
      text = f'holds {", ".join(strangers[:3])} but no run; use an empty or a new folder'
      raise _refusal(folder, text)
    return
  changed = config_lib.diff(header['config'], config)
  if changed and not force:
    text = 'holds a run of another config; use another run.dir, or --force to go on with the new'
    raise _refusal(folder, '\n    '.join([f'{text}:', *changed]))


def _place(config: Config) -> bucket.Path:
  try:
    return bucket.place(config.run.dir)
  except ValueError as error:
    raise _refusal(config.run.dir, str(error)) from None


def _check_disk(folder: pathlib.Path) -> None:
  there = folder
  while not there.exists() and there != there.parent:
    there = there.parent
  try:
    tempfile.TemporaryFile(dir=there).close()  # permission bits say nothing to root
  except OSError as error:
    text = f'{there} cannot be written ({error.strerror}); choose another with run.dir=...'
    raise _refusal(folder, text) from None


def _check_bucket(folder: bucket.Path) -> None:
  """Writes an object and removes it again: nothing else tells what is allowed."""
  probe = folder / f'.probe-{uuid.uuid4().hex[:8]}'
  try:
    probe.write_bytes(b'')
    probe.unlink()
  except Exception as error:  # of the network, of Google's login, of gcsfs
    text = f'cannot be written ({type(error).__name__}: {error}); check its name and your access'
    raise _refusal(folder, text) from None


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide what a run computes."""
  found = {'python': platform.python_version(), 'platform': platform.platform()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def git_state() -> dict[str, Any] | None:
  """Commit of the code and whether files differ from it; None outside its repository."""
  here = pathlib.Path(__file__)

  def git(*arguments: str) -> str:
    command = ['git', '-C', str(here.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

  try:
    git('ls-files', '--error-unmatch', here.name)  # else the repository is someone else's
    commit = git('rev-parse', 'HEAD').strip()
    return {'commit': commit, 'dirty': bool(git('status', '--porcelain', '-uno').strip())}
  except (OSError, subprocess.SubprocessError):
    return None


def _lock(path: pathlib.Path) -> Any:
  """An open file that holds the folder for as long as this process lives, killed or not."""
  file = path.open('a+')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    holder = file.read().strip()
    file.close()
    text = f'process {holder} is running in it; wait for it, or use another run.dir'
    raise _refusal(path.parent, text) from None
  except OSError as error:  # some network file systems have no locks
    logger.warning('%s: cannot be locked (%s); keep other runs out of it', path.parent, error)
  file.truncate(0)
  file.write(str(os.getpid()))
  file.flush()
  return file


def _leased(folder: bucket.Path) -> Lease:
  try:
    return Lease(folder)
  except Held as error:
    raise _refusal(folder, f'{error}; wait for it, or use another run.dir') from None


def _refusal(folder: bucket.Path | str, text: str) -> ConfigError:
  return ConfigError(f'run.dir={str(folder)!r}', [text])

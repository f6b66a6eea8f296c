"""A run's folder in a bucket, `run.dir=gs://bucket/path`, and what a bucket has in place of a disk.

| a disk has | here |
|---|---|
| rename | nothing: an upload of one object is there as a whole or not at all |
| appending | a local folder, whose files are uploaded whole before every save (`Mirror`) |
| locks that end with their process | an object that its holder renews (`lease.py`) |

Orbax and TensorStore write checkpoints to `gs://` themselves; everything else goes through
`etils.epath` and gcsfs. Paths in a bucket have pathlib's names. Other stores (s3) are refused,
since Orbax does not write to them.
"""

from __future__ import annotations

import importlib.util
import logging
import pathlib
import posixpath
import shutil
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

SCHEME = 'gs://'

# A `pathlib.Path`, or an `epath.Path` of the same methods.
Path = Any


def place(folder: str) -> Path:
  """The folder that `run.dir` names, on a disk or in a bucket.

  Raises:
    ValueError: another store than Cloud Storage, a bucket without a folder in it, or no gcsfs.
  """
  scheme, separator, rest = folder.partition('://')
  if not separator:
    return pathlib.Path(folder)
  if f'{scheme}://' != SCHEME:
    raise ValueError(
      f'{scheme}:// cannot be written by Orbax; use {SCHEME}bucket/folder, or a bucket that is '
      'mounted as a folder'
    )
  if not posixpath.dirname(rest.strip('/')):
    raise ValueError(f'names no folder in the bucket; use {SCHEME}{rest or "bucket"}/runs/1')
  if set(rest) & set('*?['):
    raise ValueError('holds one of *?[, which gcsfs reads as a pattern; use another name')
  if importlib.util.find_spec('gcsfs') is None:
    raise ValueError("a bucket needs gcsfs: pip install 'o1jax[bucket]'")
  import fsspec
  from etils import epath

  for name in ('gs', 'gcs'):
    # TensorStore and other hosts write there too, which a kept listing would not know of.
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
  return epath.Path(folder)


def on_disk(path: Path) -> bool:
  """Whether a path is one of this machine's."""
  return isinstance(path, pathlib.Path)


def filesystem() -> Any:
  """gcsfs, for what has no pathlib name."""
  import fsspec

  return fsspec.filesystem('gcs')


def make(folder: Path) -> None:
  """Makes a folder where there is none; a bucket has no folders to make."""
  if on_disk(folder):
    folder.mkdir(parents=True, exist_ok=True)


def files_below(folder: Path) -> Iterator[Path]:
  """Every file under `folder`, in no order; none where there is no such folder."""
  if on_disk(folder):
    yield from (path for path in folder.rglob('*') if path.is_file())
  else:
    yield from (type(folder)(SCHEME + name) for name in filesystem().find(str(folder)))


def modified(path: Path) -> float:
  """When a file was written last, in seconds."""
  found = path.stat()
  return found.st_mtime if on_disk(path) else found.mtime


def remove(folder: Path) -> None:
  """Removes a folder with everything in it, where there is one."""
  if on_disk(folder):
    shutil.rmtree(folder, ignore_errors=True)
  else:
    folder.rmtree(missing_ok=True)


class Mirror:
  """A local folder of growing files, and its copy in a bucket.

  What was uploaded last is there after a kill; a run uploads before it saves, so that the lines of
  all steps that are not taken again are among it.
  """

  def __init__(self, local: pathlib.Path, remote: Path, fetch: tuple[str, ...]):
    """Downloads the files `fetch`, where they are there, to go on with them."""
    self.local, self._remote = local, remote
    self._sent: dict[str, tuple[int, int]] = {}
    for name in fetch:
      try:
        (local / name).write_bytes((remote / name).read_bytes())
      except FileNotFoundError:
        continue
      self._sent[name] = _stamp(local / name)

  def upload(self) -> None:
    """Uploads what has changed since the last time, and removes what is gone."""
    here = {path.relative_to(self.local).as_posix(): path for path in files_below(self.local)}
    for name, path in here.items():
      stamp = _stamp(path)
      if self._sent.get(name) != stamp:
        (self._remote / name).write_bytes(path.read_bytes())
        self._sent[name] = stamp
    for name in self._sent.keys() - here.keys():
      (self._remote / name).unlink(missing_ok=True)
      del self._sent[name]


def _stamp(path: pathlib.Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_mtime_ns, found.st_size

"""Which compositions are trained on and which are held out."""

from __future__ import annotations

import functools
import hashlib

from o1jax.data.family.ops import CONFUSION_GROUP

SPLITS = ('train', 'dev', 'test')


@functools.lru_cache(maxsize=1 << 16)
def split_of(names: tuple[str, ...]) -> str:
  """The split that a composition belongs to: train 80 %, dev 10 %, test 10 %.

  The hash is taken after replacing each name by its group of mutual confusions, so that what a
  misread train problem becomes is a train composition too, never one of dev or test.
  """
  text = ' '.join(CONFUSION_GROUP[name] for name in names)
  bucket = hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % 10
  return SPLITS[max(0, bucket - 7)]

"""Makes a copy of a model whose tokenizer has every step tag as one token, as the loop asks.

    python -m o1jax.prepare MODEL --out DIR

`<Action 1>`, `<Step_End>` and the others become special tokens. Each is given a row of the
embedding and of the output layer that begins as the mean of the rows that spelled it before. Both
folders have the Hub's layout; the model is held in memory twice.

Exit codes: 0 done, 2 a fault of what was asked for.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import jax

from o1jax import cli
from o1jax.data.tokens import add_tags
from o1jax.models import hf
from o1jax.models.vocabulary import with_tokens
from o1jax.run import files


def prepare(source: str | os.PathLike, out: str | os.PathLike) -> str:
  """Writes the copy; returns a line about it.

  Raises:
    FileNotFoundError: `source` is no Hub folder of a model.
    ValueError: it is one that cannot be read, or `out` is there already.
  """
  source, out = pathlib.Path(source), pathlib.Path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f'--out {str(out)!r} is there already; name a new folder')
  model, params = hf.load(source)
  out.mkdir(parents=True, exist_ok=True)
  new = add_tags(source, out)
  model, params = with_tokens(model, params, new)
  hf.save(out, model, params, generation_config=files.read_json(source / hf.GENERATION))
  count = sum(x.size for x in jax.tree.leaves(params))
  return f'wrote {out}: {len(new)} tags added, {count:,} parameters, {model.config.dtype}'


def main(argv: Sequence[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    'python -m o1jax.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('model', metavar='MODEL', help="folder in the Hub's layout")
  parser.add_argument('--out', required=True, metavar='DIR', help='folder to make')
  args = parser.parse_args(argv)
  return cli.answer(lambda: prepare(args.model, args.out))


if __name__ == '__main__':
  sys.exit(main())

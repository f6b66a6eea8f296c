"""Writes what a run trained as a Hub folder, which transformers opens.

    python -m o1jax.export RUN --out DIR [--stage round1/rl] [--dtype bfloat16] [--base DIR]
                           [--adapter] [--force]

A stage is a folder under the run's `stages/`; where it holds several models, one of them is named
as well: `tcg/dpo`. Default is the last policy. A PRM becomes its trunk, with the head beside it in
`prm_head.safetensors` (`o1jax.models.prm_folder.load` reads both). What a run trained as an adapter
is merged into the base as the run had it, or with --adapter written as a folder that peft opens.

Exit codes: 0 done, 2 a fault of what was asked for; nothing is half-written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from o1jax import cli
from o1jax import config as config_lib
from o1jax.config import closest
from o1jax.models import hf, lora, peft_folder, prm_folder
from o1jax.models.config import DTYPES
from o1jax.models.transformer import Model
from o1jax.run import checkpoints, files, store
from o1jax.stages.setup import model_folder

_WRITTEN = {
  peft_folder.CONFIG,
  peft_folder.WEIGHTS,
  hf.CONFIG,
  hf.WEIGHTS,
  hf.GENERATION,
  prm_folder.HEAD,
  *hf.TOKENIZER_FILES,
}
_POLICY = re.compile(r'round(\d+)/(policy_sft|rl)/policy')


def export(
  run: str | os.PathLike,
  out: str | os.PathLike,
  stage: str | None = None,
  *,
  dtype: str | None = None,
  base: str | os.PathLike | None = None,
  adapter: bool = False,
  force: bool = False,
) -> str:
  """Writes one model of a run as a Hub folder; returns a line about it.

  Args:
    run: the run's folder; it is only read.
    out: folder to make. What is there is replaced with `force`, if it is such a folder.
    stage: as `stages/` has it, e.g. 'round1/rl', 'round0/prm', 'tcg/sft'; None: the last policy.
    dtype: convert to this type; default is that of the base model. A PRM's head stays float32.
    base: folder of the model that the run started from, if it is elsewhere by now.
    adapter: write the adapter alone, for peft, in place of a whole model.

  Raises:
    FileNotFoundError: no run, or no base model.
    ValueError: no such stage or type, a base of other shapes, no adapter where one is asked for, or
      `out` cannot be replaced.
  """
  run, out = pathlib.Path(run), pathlib.Path(out).resolve()
  if dtype not in (None, *DTYPES):
    known = ', '.join(DTYPES)
    raise ValueError(f'--dtype {dtype!r} is none of {known}{closest(dtype, DTYPES)}')
  source = _base_folder(run, base)
  name = choose(store.saved_params(run), stage, run)
  _check_out(out, force)
  model = hf.read_model(source)
  params = _loaded(run, name, source)
  is_prm = prm_folder.is_prm(params)
  if adapter:
    return _export_adapter(out, name, params, source)
  params = lora.merged(params, dtype=dtype)
  trunk = params['trunk'] if is_prm else params
  _check_shapes(model, trunk, name, source)
  model = Model(dataclasses.replace(model.config, dtype=dtype or model.config.dtype))
  trunk = jax.tree.map(lambda x: x.astype(model.config.dtype), trunk)
  generation = files.read_json(source / hf.GENERATION)
  with _replacing(out) as folder:
    if is_prm:
      prm_folder.save(folder, model, params | {'trunk': trunk}, source, generation)
    else:
      hf.save(folder, model, trunk, source, generation)
  count = sum(x.size for x in jax.tree.leaves(params))
  return f'wrote {out}: {name}, {count:,} parameters, {model.config.dtype}'


def _loaded(run: pathlib.Path, name: str, source: pathlib.Path) -> Any:
  """The parameters as the run had them: adapters over its base, in four bits where that was so."""
  saved = checkpoints.load_tree(run / 'stages' / name)
  if not lora.is_detached(saved):
    return saved
  config = files.read_json(run / 'run.json')['config']
  base = hf.load(source, dtype=config['model']['dtype'])[1]
  if config['lora']['base'] == 'nf4':
    base = lora.quantised(base)
  try:
    return lora.attached(base, saved)
  except ValueError as error:
    text = f'{name} is not of the base model {str(source)!r}: {error}'
    raise ValueError(f'{text}; name the base model of the run by --base DIR') from None


def _export_adapter(out: pathlib.Path, name: str, params: Any, source: pathlib.Path) -> str:
  trunk = params['trunk'] if prm_folder.is_prm(params) else params
  if not lora.is_adapted(trunk):
    raise ValueError(f'--adapter: {name} has none, all of its weights were trained; leave it out')
  with _replacing(out) as folder:
    peft_folder.save(folder, trunk, source.resolve(), source)
    if prm_folder.is_prm(params):
      prm_folder.save_head(folder, params['head'])
  return f'wrote {out}: {name}, adapter for {source}'


def choose(saved: Sequence[str], stage: str | None, run: pathlib.Path) -> str:
  """The one of the `saved` names, such as 'tcg/dpo', that `stage` means.

  Raises:
    ValueError: none, or several; the text says which there are.
  """
  if not saved:
    raise ValueError(f'{str(run)!r} has trained nothing yet; let the run finish a stage')
  there = f'there are {", ".join(saved)}'
  if stage is None:
    policies = [name for name in saved if _POLICY.fullmatch(name)]
    if not policies:
      raise ValueError(f'{str(run)!r} has no policy yet; name another model by --stage: {there}')
    return max(policies, key=_age)
  wanted = stage.strip('/')
  found = [name for name in saved if wanted in (name, name.rpartition('/')[0])]
  if not found:
    candidates = {*saved, *(name.rpartition('/')[0] for name in saved)}
    near = closest(wanted, candidates)
    raise ValueError(f'--stage {stage!r} has no model in {str(run)!r}; {there}{near}')
  if len(found) > 1:
    raise ValueError(f'--stage {stage!r} has several models; name one of {", ".join(found)}')
  return found[0]


def _age(name: str) -> tuple[int, bool]:
  """Later policies compare as larger: by round, and RL comes after SFT."""
  round_, kind = _POLICY.fullmatch(name).groups()
  return int(round_), kind == 'rl'


def _base_folder(run: pathlib.Path, base: str | os.PathLike | None) -> pathlib.Path:
  """The Hub folder that the run started from: its config and tokenizer are the export's."""
  if not run.is_dir():
    near = closest(run.name, [path.name for path in run.parent.glob('*/')])
    raise FileNotFoundError(f'{str(run)!r}: no such folder; name the run.dir of a run{near}')
  header = files.read_json(run / 'run.json')
  if header is None:
    raise FileNotFoundError(f'{str(run)!r} has no run.json; name the run.dir of a run')
  path = str(header['config']['model']['path'] if base is None else base)
  if path != 'embedded' and not (pathlib.Path(path) / hf.CONFIG).is_file():
    option = f'--base {path!r}' if base is not None else f"the run's model.path={path!r}"
    raise FileNotFoundError(f'{option} holds no {hf.CONFIG}; name the base model by --base DIR')
  return model_folder(config_lib.check({'model': {'path': path}}))


def _check_shapes(model: Model, params: Any, name: str, source: pathlib.Path) -> None:
  def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): x.shape for path, x in leaves}

  saved, wanted = by_path(params), by_path(model.shapes())
  faults = [
    f'{key} {saved.get(key, "absent")} for {wanted.get(key, "absent")}'
    for key in sorted(saved.keys() | wanted.keys())
    if saved.get(key) != wanted.get(key)
  ]
  if faults:
    text = f'{name} is not of the base model {str(source)!r}: it has {"; ".join(faults)}'
    raise ValueError(f'{text}; name the base model of the run by --base DIR')


def _check_out(out: pathlib.Path, force: bool) -> None:
  """Raises unless `out` is free, or is a model's folder that `force` may replace."""
  if not out.exists():
    return
  if not out.is_dir():
    raise ValueError(f'--out {str(out)!r} is a file; name a folder')
  there = sorted(path.name for path in out.iterdir())
  if there and not force:
    raise ValueError(f'--out {str(out)!r} is not empty; name another folder, or replace by --force')
  strangers = [name for name in there if name not in _WRITTEN]
  if strangers:
    text = f'holds {", ".join(strangers[:3])}, which no export wrote'
    raise ValueError(f'--out {str(out)!r} {text}: --force does not replace it; name another folder')


@contextlib.contextmanager
def _replacing(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder beside `out`, which takes its place at the end, or is removed after an error."""
  out.parent.mkdir(parents=True, exist_ok=True)
  partial, old = (out.with_name(f'.{out.name}.{os.getpid()}.{kind}') for kind in ('new', 'old'))
  partial.mkdir()
  try:
    yield partial
    if out.exists():
      out.rename(old)
    partial.rename(out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
    if old.exists() and not out.exists():
      old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    'python -m o1jax.export',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('run', metavar='RUN', help='folder of a run')
  parser.add_argument('--out', required=True, metavar='DIR', help='folder to make')
  parser.add_argument('--stage', metavar='S', help='default: the last policy')
  parser.add_argument('--dtype', metavar='T', help=f'{", ".join(DTYPES)}; default: as the base')
  parser.add_argument('--base', metavar='DIR', help='base model; default: model.path of the run')
  parser.add_argument('--adapter', action='store_true', help='the adapter alone, for peft')
  parser.add_argument('--force', action='store_true', help='replace an earlier export')
  args = parser.parse_args(argv)
  chosen = {name: getattr(args, name) for name in ('dtype', 'base', 'adapter', 'force')}
  return cli.answer(lambda: export(args.run, args.out, args.stage, **chosen))


if __name__ == '__main__':
  sys.exit(main())

"""Makes the embedded base model: tokenizer, corpus, training, Hub folder.

python -m o1jax.pretrain --config configs/base.yaml
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
from typing import TYPE_CHECKING

from o1jax import cli
from o1jax import config as config_lib
from o1jax.config import ConfigError, MeshConfig, OptimConfig, Section
from o1jax.config.sections import RunConfig

if TYPE_CHECKING:
  from o1jax.batch import TokenBatch
  from o1jax.data.tokens import Tokenizer
  from o1jax.models.transformer import Model

_BLOCK = 20_000  # documents encoded and packed at once


class ArchConfig(Section):
  """Shape of the base model: Llama, tied embeddings."""

  hidden_size: int = 96
  num_layers: int = 3
  num_heads: int = 4
  num_kv_heads: int = 1
  intermediate_size: int = 288


class MixConfig(Section):
  """Shares of the corpus by kind of document (docs/family.md)."""

  solve: float = 0.2
  tests: float = 0.45
  question: float = 0.05
  drill: float = 0.3


class PretrainConfig(Section):
  """What `configs/base.yaml` sets."""

  run: RunConfig = RunConfig(dir='runs/base')
  mesh: MeshConfig = MeshConfig()
  arch: ArchConfig = ArchConfig()
  optim: OptimConfig = OptimConfig()
  out: str = 'o1jax/base_model'
  documents: int = 400_000  # of the corpus
  mix: MixConfig = MixConfig()
  row_tokens: int = 256  # of a packed row
  corpus_seed: int = 0  # of the drawing; the noise table is that of docs/family.md


def pretrain(config: PretrainConfig) -> None:
  """Trains the base model and writes it to `config.out`."""
  import jax

  from o1jax.data.family.tokenizer import build_tokenizer
  from o1jax.data.pipeline import batches
  from o1jax.data.tokens import Tokenizer
  from o1jax.learn.objectives import sft_loss
  from o1jax.models import hf
  from o1jax.parallel.mesh import make_mesh, start_cpu_devices
  from o1jax.run.compiled import keep_compiled
  from o1jax.run.metrics import Metrics
  from o1jax.run.progress import Progress
  from o1jax.run.store import Store
  from o1jax.stages.context import Workbench
  from o1jax.stages.fit import fit

  out = pathlib.Path(config.out)
  start_cpu_devices(config.mesh.axes)
  keep_compiled(config.run.compile_cache)
  with Store(config) as store, Metrics(store.local) as metrics:
    progress = Progress()
    bench = Workbench(store, metrics, progress, make_mesh(config.mesh.axes))
    folder = store.local / 'stages/pretrain/tokenizer'
    build_tokenizer(folder)
    tokenizer = Tokenizer(folder)
    progress.stage('corpus', f'{config.documents} documents')
    rows = corpus_rows(config, tokenizer)
    progress.say(f'{int((rows.segments > 0).sum())} tokens in {len(rows.tokens)} rows')
    model = base_model(config.arch, tokenizer)
    params = model.init(jax.random.key(config.run.seed))
    data = batches(rows, batch=config.optim.batch, seed=config.run.seed)
    params, _ = fit(bench, 'pretrain', 'lm', model, params, sft_loss(model), data, config.optim)
    hf.save(out, model, params, tokenizer_from=folder)
    progress.say(f'wrote {out}')


def corpus_rows(config: PretrainConfig, tokenizer: Tokenizer) -> TokenBatch:
  """The corpus, packed into rows of `config.row_tokens`; longer documents are left out."""
  import jax
  import numpy as np

  from o1jax.data import family
  from o1jax.data.pack import Document, pack

  texts = family.corpus(config.corpus_seed, config.documents, config.mix.model_dump())
  parts = []
  while block := list(itertools.islice(texts, _BLOCK)):  # text takes far more room than rows
    encoded = zip(
      tokenizer.encode_all([t.prompt for t in block]),
      tokenizer.encode_all([t.completion for t in block]),
      strict=True,
    )
    documents = [
      Document((tokenizer.bos_id, *prompt, *completion, tokenizer.eos_id), 1 + len(prompt))
      for prompt, completion in encoded
    ]
    parts.append(pack([d for d in documents if len(d.ids) <= config.row_tokens], config.row_tokens))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def base_model(arch: ArchConfig, tokenizer: Tokenizer) -> Model:
  """A Llama of that shape over the tokenizer's vocabulary, embeddings tied."""
  from o1jax.models.config import ModelConfig
  from o1jax.models.transformer import Model

  return Model(
    ModelConfig(
      vocab_size=tokenizer.vocab_size,
      hidden_size=arch.hidden_size,
      num_layers=arch.num_layers,
      num_heads=arch.num_heads,
      num_kv_heads=arch.num_kv_heads,
      head_dim=arch.hidden_size // arch.num_heads,
      intermediate_size=arch.intermediate_size,
      tie_embeddings=True,
      initializer_range=0.05,  # width 96: 0.02 starts too flat
      bos_token_id=tokenizer.bos_id,
      eos_token_id=tokenizer.eos_id,
      pad_token_id=tokenizer.pad_id,
    )
  )


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', required=True, metavar='FILE')
  parser.add_argument('overrides', nargs='*', metavar='section.key=value')
  options = parser.parse_args(argv)
  try:
    pretrain(config_lib.load(options.config, options.overrides, schema=PretrainConfig))
  except ConfigError as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  cli.restart_with_huge_pages()
  sys.exit(main())

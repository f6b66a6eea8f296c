"""Loading a checkpoint: bytes, peak host memory and seconds, last line one JSON object.

    python benchmarks/loading.py [--megabytes 1000] [--files 2] [--repeats 3] [--no-reference]

Random weights of a Llama shape are written to a temporary folder, and removed afterwards. Each
loading is a process of its own, `hf.load` and transformers' `from_pretrained` (the `parity` extra)
in turn, with the files in the page cache. A loading ends when every page of every parameter has
been touched: mapped files are read only then. Memory is the resident set, mapped pages included;
seconds are the median of the repeats, memory is the largest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from o1jax.models import Model, ModelConfig, hf

PAGE = 4096  # bytes
STATUS = pathlib.Path('/proc/self/status')


def shape_of(megabytes: int) -> ModelConfig:
  """A bfloat16 Llama of about that size; only the number of layers is free."""
  width, inner, vocab = (2048, 5632, 32000) if megabytes >= 400 else (512, 1536, 16000)
  config = ModelConfig(vocab, width, 1, 16, 8, inner, tie_embeddings=False, dtype='bfloat16')
  one = size_of(config)
  a_layer = one - 2 * (2 * vocab * width + width)
  layers = max(1, round((megabytes * 1e6 - one + a_layer) / a_layer))
  return ModelConfig(vocab, width, layers, 16, 8, inner, tie_embeddings=False, dtype='bfloat16')


def size_of(config: ModelConfig) -> int:
  """Bytes of the parameters."""
  return sum(2 * int(np.prod(shape)) for shape in hf.hub_shapes(Model(config)).values())


def write_checkpoint(folder: pathlib.Path, config: ModelConfig, files: int) -> None:
  """A Hub folder with random weights in `files` files, one in memory at a time."""
  rng, shapes = np.random.default_rng(0), hf.hub_shapes(Model(config))
  (folder / hf.CONFIG).write_text(json.dumps(config.to_hub()))
  names, weight_map = list(shapes), {}
  for i in range(files):
    file = hf.WEIGHTS if files == 1 else f'model-{i + 1:05d}-of-{files:05d}.safetensors'
    part = {
      name: (0.02 * rng.standard_normal(shapes[name], np.float32)).astype(ml_dtypes.bfloat16)
      for name in names[i::files]
    }
    save_file(part, folder / file, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(part, file)
  if files > 1:
    (folder / hf.INDEX).write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))


def resident(field: str) -> int:
  """Bytes of a line of the process's status: VmRSS now, VmHWM its peak."""
  lines = STATUS.read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{field}:'))


def load_ours(folder: str):
  import jax

  jax.device_put(np.zeros(1)).block_until_ready()  # the backend is there before the clock starts

  def load():
    params = hf.load(folder)[1]
    return [np.asarray(x).view(np.uint8) for x in jax.tree.leaves(params)]

  return load


def load_reference(folder: str):
  import torch
  import transformers

  transformers.AutoConfig.from_pretrained(folder)
  _ = transformers.LlamaForCausalLM  # imported on first use

  def load():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='auto')
    return [p.detach().view(torch.uint8).numpy() for p in model.parameters()]

  return load


def measure(load) -> dict[str, float]:
  """Seconds and bytes of one loading in this process."""
  gc.collect()
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here
  before, start = resident('VmRSS'), time.perf_counter()
  arrays = load()
  for array in arrays:
    array.reshape(-1)[::PAGE].sum()
  seconds = time.perf_counter() - start
  return {
    'seconds': seconds,
    'peak_bytes': resident('VmHWM') - before,
    'bytes': sum(array.nbytes for array in arrays),
  }


def in_a_process(loader: str, folder: str) -> dict[str, float]:
  command = [sys.executable, __file__, '--loader', loader, '--folder', folder]
  env = os.environ | {'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_OFFLINE': '1', 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  if done.returncode:
    raise SystemExit(f'{loader} failed:\n{done.stderr}')
  return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> dict[str, float]:
  """Both loaders in turn on one checkpoint."""
  config = shape_of(args.megabytes)
  largest = max(2 * int(np.prod(shape)) for shape in hf.hub_shapes(Model(config)).values())
  loaders = ['ours'] if args.no_reference else ['ours', 'reference']
  runs: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
  with tempfile.TemporaryDirectory(prefix='o1jax-loading-') as folder:
    write_checkpoint(pathlib.Path(folder), config, args.files)
    for repeat in range(args.repeats):
      for name in loaders if repeat % 2 == 0 else loaders[::-1]:
        runs[name].append(in_a_process(name, folder))
        print(name, runs[name][-1], file=sys.stderr)
  result = {'bytes': size_of(config), 'largest_tensor_bytes': largest, 'files': args.files}
  for name, found in runs.items():
    prefix = '' if name == 'ours' else 'reference_'
    peak = max(run['peak_bytes'] for run in found)
    result[f'{prefix}seconds'] = round(statistics.median(run['seconds'] for run in found), 3)
    result[f'{prefix}peak_bytes'] = peak
    result[f'{prefix}peak_above_parameters_bytes'] = peak - size_of(config)
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--megabytes', type=int, default=1000, help='of the checkpoint, 10^6 bytes')
  parser.add_argument('--files', type=int, default=2, help='1: one file, without an index')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--no-reference', action='store_true', help='without transformers')
  parser.add_argument('--loader', choices=('ours', 'reference'), help=argparse.SUPPRESS)
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.loader is None:
    print(json.dumps(compare(args)))
    return
  loader = {'ours': load_ours, 'reference': load_reference}[args.loader]
  print(json.dumps(measure(loader(args.folder))))


if __name__ == '__main__':
  main()

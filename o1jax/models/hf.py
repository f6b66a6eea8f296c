"""Hub folders in and out: `config.json`, safetensors, tokenizer files.

One table relates the Hub's tensors to ours and is read in both directions.
Loading first compares all names and shapes and reports every fault at once,
then reads slice by slice, so that no host ever holds more than it needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from o1jax.models.config import ModelConfig
from o1jax.models.transformer import Model, Params

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
INDEX = 'model.safetensors.index.json'
GENERATION = 'generation_config.json'
TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
)

# (ours, Hub, input axes). A kernel is [*inputs, *outputs] here and
# [outputs, inputs], flattened, on the Hub; 0 input axes: the same there and here.
_TOP = (
  ('embed', 'model.embed_tokens.weight', 0),
  ('norm', 'model.norm.weight', 0),
  ('lm_head', 'lm_head.weight', 0),
)
_LAYER = (
  ('attn_norm', 'input_layernorm.weight', 0),
  ('q', 'self_attn.q_proj.weight', 1),
  ('k', 'self_attn.k_proj.weight', 1),
  ('v', 'self_attn.v_proj.weight', 1),
  ('o', 'self_attn.o_proj.weight', 2),
  ('q_bias', 'self_attn.q_proj.bias', 0),
  ('k_bias', 'self_attn.k_proj.bias', 0),
  ('v_bias', 'self_attn.v_proj.bias', 0),
  ('o_bias', 'self_attn.o_proj.bias', 0),
  ('q_norm', 'self_attn.q_norm.weight', 0),
  ('k_norm', 'self_attn.k_norm.weight', 0),
  ('mlp_norm', 'post_attention_layernorm.weight', 0),
  ('gate', 'mlp.gate_proj.weight', 1),
  ('up', 'mlp.up_proj.weight', 1),
  ('down', 'mlp.down_proj.weight', 1),
)


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """One Hub tensor: where it goes (`layer` None: not stacked) and how it is laid out."""

  hub: str
  name: str
  layer: int | None
  inputs: int
  shape: tuple[int, ...]  # ours, without the layer axis

  @property
  def hub_shape(self) -> tuple[int, ...]:
    if self.inputs:
      return (int(np.prod(self.shape[self.inputs :])), int(np.prod(self.shape[: self.inputs])))
    return self.shape if self.layer is None else (int(np.prod(self.shape)),)

  def export(self, array: np.ndarray) -> np.ndarray:
    """Ours -> the Hub's layout."""
    if self.inputs:
      rows, columns = self.hub_shape
      return np.ascontiguousarray(array.reshape(columns, rows).T)
    return array.reshape(self.hub_shape)

  def read(self, source: Any, index: tuple[slice, ...]) -> np.ndarray:
    """Ours[index] from an open safetensors slice, reading only that part of it."""
    shape = tuple(len(range(*part.indices(n))) for part, n in zip(index, self.shape, strict=True))
    if self.inputs:
      rows = _flat(index[self.inputs :], self.shape[self.inputs :])
      columns = _flat(index[: self.inputs], self.shape[: self.inputs])
      return source[rows, columns].T.reshape(shape)
    if self.layer is None:
      return source[index]
    return source[_flat(index, self.shape)].reshape(shape)


def load(
  folder: str | os.PathLike,
  shardings: Callable[[Model], Params] | None = None,
  *,
  dtype: str | None = None,
) -> tuple[Model, Params]:
  """Reads a model from its Hub folder.

  Args:
    folder: holds `config.json` and `model.safetensors` or its sharded form.
    shardings: makes a tree of shardings from the model, for instance
      `lambda model: param_shardings(mesh, model, model.shapes())`; each device
      then reads only its own slices. Default: everything on the first device.
    dtype: convert to this type; default is what config.json says.

  Raises:
    FileNotFoundError: no folder, no config.json or no weights.
    ValueError: an architecture or field that is not implemented, or tensors that
      are missing, unexpected or of another shape, all of them in one message.
  """
  model = read_model(folder, dtype=dtype)
  with contextlib.ExitStack() as stack:
    files = _open_weights(Path(folder), stack)
    table = list(_tensors(model))
    _check(Path(folder), table, files, model)
    where = shardings(model) if shardings is not None else None
    params: Params = {}
    by_name: dict[tuple[bool, str], list[_Tensor]] = {}
    for tensor in table:
      by_name.setdefault((tensor.layer is not None, tensor.name), []).append(tensor)
    for (stacked, name), group in by_name.items():
      target = params.setdefault('layers', {}) if stacked else params
      placed = None
      if where is not None:
        placed = where['layers'][name] if stacked else where[name]
      target[name] = _read(group, files, placed, np.dtype(model.config.dtype))
  return model, params


def read_model(folder: str | os.PathLike, *, dtype: str | None = None) -> Model:
  """The model that `config.json` describes, without its weights; raises as `load` does."""
  path = Path(folder) / CONFIG
  if not path.is_file():
    raise FileNotFoundError(
      f'{path} does not exist; a model is a Hub folder with {CONFIG} and {WEIGHTS}'
    )
  try:
    hub = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  try:
    config = ModelConfig.from_hub(hub)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return Model(dataclasses.replace(config, dtype=dtype) if dtype else config)


def save(
  folder: str | os.PathLike,
  model: Model,
  params: Params,
  tokenizer_from: str | os.PathLike | None = None,
  generation_config: Mapping[str, Any] | None = None,
) -> None:
  """Writes a Hub folder that `load` and transformers open; bit-exact.

  Args:
    folder: created if it is not there; existing files of the same names are replaced.
    model: what `params` belong to.
    params: arrays, wherever they live.
    tokenizer_from: a folder whose tokenizer files are copied along.
    generation_config: written as `generation_config.json`, over the model's token ids.

  Raises:
    ValueError: if the Hub's architecture has no spelling for the model's switches.
  """
  folder, config = Path(folder), model.config
  hub = config.to_hub()
  if ModelConfig.from_hub(hub) != config:
    raise ValueError(f'{config.architecture} cannot express {config}')
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {}
  for tensor in _tensors(model):
    array = params[tensor.name] if tensor.layer is None else params['layers'][tensor.name]
    # One transfer a parameter would be fewer; one a layer keeps the host's memory small.
    array = array if tensor.layer is None else array[tensor.layer]
    arrays[tensor.hub] = tensor.export(np.asarray(jax.device_get(array)))
  _replace(folder / WEIGHTS, lambda path: save_file(arrays, path, metadata={'format': 'pt'}))
  ids = {k: hub[k] for k in ('bos_token_id', 'eos_token_id', 'pad_token_id') if hub[k] is not None}
  generation = ids | dict(generation_config or {})
  for name, content in ((GENERATION, generation), (CONFIG, hub)):
    text = json.dumps(content, indent=2, sort_keys=True) + '\n'
    _replace(folder / name, lambda path, text=text: path.write_text(text))
  if tokenizer_from is not None and Path(tokenizer_from).resolve() != folder.resolve():
    copy_tokenizer(tokenizer_from, folder)


def copy_tokenizer(source: str | os.PathLike, folder: str | os.PathLike) -> None:
  """Copies the tokenizer's files; FileNotFoundError if `source` has none."""
  found = [Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
  if not found:
    raise FileNotFoundError(f'{source} has no tokenizer files ({", ".join(TOKENIZER_FILES)})')
  for path in found:
    shutil.copyfile(path, Path(folder) / path.name)


def _tensors(model: Model) -> Iterator[_Tensor]:
  """Every tensor of the model's checkpoint, in one order for both directions."""
  shapes = model.shapes()
  for name, hub, inputs in _TOP:
    if name in shapes:
      yield _Tensor(hub, name, None, inputs, shapes[name].shape)
  for layer in range(model.config.num_layers):
    for name, hub, inputs in _LAYER:
      if name in shapes['layers']:
        shape = shapes['layers'][name].shape[1:]
        yield _Tensor(f'model.layers.{layer}.{hub}', name, layer, inputs, shape)


def _open_weights(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """Hub tensor name -> the open safetensors file that holds it."""
  if (folder / WEIGHTS).is_file():
    paths = [folder / WEIGHTS]
  elif (folder / INDEX).is_file():
    index = json.loads((folder / INDEX).read_text())
    paths = [folder / name for name in sorted(set(index['weight_map'].values()))]
  else:
    raise FileNotFoundError(f'{folder} has no weights: neither {WEIGHTS} nor {INDEX}')
  absent = [path.name for path in paths if not path.is_file()]
  if absent:
    raise FileNotFoundError(f'{folder} lacks {", ".join(absent)}, which {INDEX} names')
  files: dict[str, Any] = {}
  for path in paths:
    try:
      file = stack.enter_context(safe_open(path, framework='numpy'))
    except SafetensorError as error:
      raise ValueError(f'{path} is not a readable safetensors file: {error}') from error
    files |= dict.fromkeys(file.keys(), file)
  return files


def _check(folder: Path, table: list[_Tensor], files: Mapping[str, Any], model: Model) -> None:
  wanted = {tensor.hub: tensor.hub_shape for tensor in table}
  found = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
  ignored = {'lm_head.weight'} if model.config.tie_embeddings else set()
  faults = [f'missing {name} {list(wanted[name])}' for name in wanted.keys() - found.keys()]
  faults += [
    f'unexpected {name} {list(found[name])}'
    for name in found.keys() - wanted.keys() - ignored
    if not name.endswith('rotary_emb.inv_freq')  # a buffer that old exports carry
  ]
  faults += [
    f'{name} is {list(found[name])}, the config asks for {list(wanted[name])}'
    for name in wanted.keys() & found.keys()
    if wanted[name] != found[name]
  ]
  if faults:
    raise ValueError(f'{folder} does not fit its {CONFIG}:\n  ' + '\n  '.join(sorted(faults)))


def _read(group: list[_Tensor], files: Mapping[str, Any], placed: Any, dtype: np.dtype) -> Any:
  """One parameter from its Hub tensors (one, or one a layer), each device its slice."""
  slices = [files[tensor.hub].get_slice(tensor.hub) for tensor in group]

  def part(index: tuple[slice, ...]) -> np.ndarray:
    if group[0].layer is None:
      return group[0].read(slices[0], index).astype(dtype)
    layers = range(*index[0].indices(len(group)))
    return np.stack([group[i].read(slices[i], index[1:]).astype(dtype) for i in layers])

  shape = group[0].shape if group[0].layer is None else (len(group), *group[0].shape)
  placed = placed or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.make_array_from_callback(shape, placed, part)


def _flat(index: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
  """The slice of flattened axes that an index into the first of them makes."""
  start, stop, _ = index[0].indices(shape[0])
  inner = 1
  for part, size in zip(index[1:], shape[1:], strict=True):
    if part.indices(size) != (0, size, 1):
      raise ValueError(f'axes {shape} can be split along the first only, not as {index}')
    inner *= size
  return slice(start * inner, stop * inner)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
  """Writes beside and renames, so that a reader never sees half a file."""
  partial = path.with_name(path.name + '.partial')
  write(partial)
  os.replace(partial, path)

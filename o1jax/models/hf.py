"""Hub folders in and out: `config.json`, safetensors, tokenizer files.

One table relates the Hub's tensors to ours and is read in both directions.
Loading first compares all names and shapes and reports every fault at once,
then reads slice by slice, so that no host ever holds more than it needs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from o1jax.models.config import ModelConfig
from o1jax.models.transformer import Model, Params
from o1jax.models.weights import DTYPES, INDEX, WEIGHTS, Weights, empty

__all__ = ['CONFIG', 'GENERATION', 'INDEX', 'TOKENIZER_FILES', 'WEIGHTS', 'copy_tokenizer']
__all__ += ['hub_shapes', 'load', 'read_model', 'save']

CONFIG = 'config.json'
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

  def read(self, weights: Weights, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Fills `out` with ours[index], reading only that part of the Hub's tensor."""
    if self.inputs:
      rows = _flat(index[self.inputs :], self.shape[self.inputs :])
      columns = _flat(index[: self.inputs], self.shape[: self.inputs])
      turned = out.reshape(columns.stop - columns.start, rows.stop - rows.start).T
      weights.read(self.hub, (rows, columns), turned)
    elif self.layer is None:
      whole = zip(index, self.shape, strict=True)
      weights.read(self.hub, tuple(_flat((part,), (size,)) for part, size in whole), out)
    else:
      weights.read(self.hub, (_flat(index, self.shape),), out.reshape(-1))


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
  weights = Weights(Path(folder))
  _check(Path(folder), model, weights)
  where = shardings(model) if shardings is not None else None
  by_name: dict[tuple[bool, str], list[_Tensor]] = {}
  for tensor in _tensors(model):
    by_name.setdefault((tensor.layer is not None, tensor.name), []).append(tensor)
  params: Params = {}
  for (stacked, name), group in by_name.items():
    target = params.setdefault('layers', {}) if stacked else params
    placed = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if where is not None:
      placed = where['layers'][name] if stacked else where[name]
    target[name] = _read(group, weights, placed, np.dtype(model.config.dtype))
  return model, params


def read_model(folder: str | os.PathLike, *, dtype: str | None = None) -> Model:
  """The model that a folder's `config.json`, or such a file itself, describes; no weights are read.

  Raises as `load` does.
  """
  path = Path(folder)
  path = path if path.suffix == '.json' else path / CONFIG
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


def hub_shapes(model: Model) -> dict[str, tuple[int, ...]]:
  """Name and shape of every tensor that the model's checkpoint has."""
  return {tensor.hub: tensor.hub_shape for tensor in _tensors(model)}


def _check(folder: Path, model: Model, weights: Weights) -> None:
  wanted, found = hub_shapes(model), weights.shapes
  ignored = {'lm_head.weight'} if model.config.tie_embeddings else set()
  faults = [f'missing {name} {list(wanted[name])}' for name in wanted.keys() - found.keys()]
  faults += [
    f'unexpected {name} {list(found[name])}'
    for name in found.keys() - wanted.keys() - ignored
    if not name.endswith('rotary_emb.inv_freq')  # a buffer that old exports carry
  ]
  for name in wanted.keys() & found.keys():
    if wanted[name] != found[name]:
      faults.append(f'{name} is {list(found[name])}, the config asks for {list(wanted[name])}')
    if weights.dtypes[name] not in DTYPES:
      faults.append(f'{name} is {weights.dtypes[name]}, none of {", ".join(DTYPES)}')
  if faults:
    raise ValueError(f'{folder} does not fit its {CONFIG}:\n  ' + '\n  '.join(sorted(faults)))


def _read(group: list[_Tensor], weights: Weights, placed: Any, dtype: np.dtype) -> jax.Array:
  """One parameter from its Hub tensors (one, or one a layer), each device its slice.

  On CPU a device takes over the memory that its slice is read into. To other devices a slice goes
  layer by layer, so that the host holds one of them.
  """
  shape = group[0].shape if group[0].layer is None else (len(group), *group[0].shape)
  if not _is_remote(placed):
    return jax.make_array_from_callback(shape, placed, lambda i: _part(group, weights, i, dtype))
  shards = []
  for device, index in placed.addressable_devices_indices_map(shape).items():
    if group[0].layer is None:
      shards.append(jax.device_put(_part(group, weights, index, dtype), device))
    else:
      shards.append(_by_layer(group, weights, index, dtype, device))
    shards[-1].block_until_ready()  # the host's copy is free from here
  return jax.make_array_from_single_device_arrays(shape, placed, shards)


def _is_remote(placed: jax.sharding.Sharding) -> bool:
  return any(device.platform != 'cpu' for device in placed.addressable_devices)


def _part(group: list[_Tensor], weights: Weights, index: tuple, dtype: np.dtype) -> np.ndarray:
  """ours[index] of a parameter, on the host."""
  if group[0].layer is None:
    out = empty(_shape(index, group[0].shape), dtype)
    group[0].read(weights, index, out)
    return out
  out = empty(_shape(index, (len(group), *group[0].shape)), dtype)
  for place, layer in enumerate(range(*index[0].indices(len(group)))):
    group[layer].read(weights, index[1:], out[place])
  return out


def _by_layer(
  group: list[_Tensor], weights: Weights, index: tuple, dtype: np.dtype, device: jax.Device
) -> jax.Array:
  """ours[index] of a stacked parameter, written on the device layer by layer."""
  whole = jnp.zeros(_shape(index, (len(group), *group[0].shape)), dtype, device=device)
  for place, layer in enumerate(range(*index[0].indices(len(group)))):
    part = _part(group, weights, (slice(layer, layer + 1), *index[1:]), dtype)
    whole = _with_layer(whole, jax.device_put(part, device), place).block_until_ready()
  return whole


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(whole: jax.Array, part: jax.Array, place: int) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, part, place, axis=0)


def _shape(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of array[index] for an array of `shape`."""
  return tuple(len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True))


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

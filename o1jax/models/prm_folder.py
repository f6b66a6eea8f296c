"""A process reward model on disk: its trunk as an ordinary Hub model, its head in a file beside it.

transformers opens the folder as the language model that the trunk is, and passes over the head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from o1jax.models import hf
from o1jax.models.config import ModelConfig
from o1jax.models.heads import HeadParams, StepHead
from o1jax.models.transformer import Model, Params

HEAD = 'prm_head.safetensors'


def is_prm(params: Params) -> bool:
  """Whether parameters are a PRM's `{'trunk', 'head'}`."""
  return params.keys() == {'trunk', 'head'}


def save(
  folder: str | os.PathLike,
  model: Model,
  prm: Params,
  tokenizer_from: str | os.PathLike | None = None,
  generation_config: Mapping[str, Any] | None = None,
) -> None:
  """Writes `{'trunk', 'head'}`; arguments and errors are those of `hf.save`."""
  hf.save(folder, model, prm['trunk'], tokenizer_from, generation_config)
  save_head(folder, prm['head'])


def save_head(folder: str | os.PathLike, head: HeadParams) -> None:
  """Writes the head alone into a folder that is there."""
  arrays = {name: np.asarray(array) for name, array in jax.device_get(head).items()}
  save_file(arrays, Path(folder) / HEAD, metadata={'format': 'pt'})


def load(
  folder: str | os.PathLike,
  shardings: Callable[[Model], Params] | None = None,
  *,
  dtype: str | None = None,
) -> tuple[Model, Params]:
  """Reads a model and `{'trunk', 'head'}` back, the head in float32 on the first device.

  Arguments are those of `hf.load`, for the trunk.

  Raises:
    FileNotFoundError: no model, or no head beside it.
    ValueError: as `hf.load`, or the head is not of the trunk.
  """
  model, trunk = hf.load(folder, shardings, dtype=dtype)
  return model, {'trunk': trunk, 'head': load_head(folder, model.config)}


def load_head(folder: str | os.PathLike, config: ModelConfig) -> HeadParams:
  """The head alone: of a `StepHead` or a `TokenHead` on hidden states of `config`."""
  path = Path(folder) / HEAD
  if not path.is_file():
    raise FileNotFoundError(f'{path} does not exist; a PRM is a Hub folder with {HEAD}')
  try:
    head = load_file(path)
  except SafetensorError as error:
    raise ValueError(f'{path} is not a readable safetensors file: {error}') from error
  width = (config.hidden_size,)
  words = {'good': width, 'bad': width}
  steps = {k: v.shape for k, v in jax.eval_shape(lambda: StepHead.init(config)).items()}
  shapes = {name: array.shape for name, array in head.items()}
  if shapes not in (words, steps):
    raise ValueError(f'{path} holds {shapes}; a head of this trunk has {steps} or {words}')
  return jax.tree.map(jnp.asarray, head)

"""Adapters as the folder that `peft` opens over a Hub model: `adapter_config.json`, safetensors.

Adapters above one another become one, their factors side by side: the sum is the same.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from o1jax.models import hf, lora
from o1jax.models.transformer import Params

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.model.layers'
_PARTS = {'q': 'self_attn', 'k': 'self_attn', 'v': 'self_attn', 'o': 'self_attn'}


def save(
  folder: str | os.PathLike,
  params: Params,
  base: str | os.PathLike,
  tokenizer_from: str | os.PathLike | None = None,
) -> None:
  """Writes the adapters of a model's parameters.

  Args:
    folder: created if it is not there.
    params: of one model.
    base: folder of the model that the adapters are for; stands in the config.
    tokenizer_from: a folder whose tokenizer files are copied along.

  Raises:
    ValueError: there are no adapters.
  """
  folder, arrays, ranks = Path(folder), {}, {}
  for name, (hub, _) in lora.PROJECTIONS.items():
    factors = lora.stacked(params['layers'][name])
    if factors is None:
      continue
    a, b = (np.asarray(x) for x in jax.device_get(factors))
    ranks[hub] = rank = a.shape[-1]
    for layer in range(len(a)):
      module = f'{_PREFIX}.{layer}.{_PARTS.get(name, "mlp")}.{hub}'
      shrink = a[layer].reshape(-1, rank).T
      grow = b[layer].reshape(rank, -1).T
      arrays[f'{module}.lora_A.weight'] = np.ascontiguousarray(shrink)
      arrays[f'{module}.lora_B.weight'] = np.ascontiguousarray(grow)
  if not ranks:
    raise ValueError('the model has no adapters: all of its weights were trained')
  folder.mkdir(parents=True, exist_ok=True)
  save_file(arrays, folder / WEIGHTS, metadata={'format': 'pt'})
  text = json.dumps(_config(ranks, base), indent=2, sort_keys=True) + '\n'
  (folder / CONFIG).write_text(text)
  if tokenizer_from is not None:
    hf.copy_tokenizer(tokenizer_from, folder)


def _config(ranks: dict[str, int], base: str | os.PathLike) -> dict[str, Any]:
  """peft's `LoraConfig`; alpha equals the rank, for the scale is in B."""
  usual = Counter(ranks.values()).most_common(1)[0][0]
  others = {module: rank for module, rank in ranks.items() if rank != usual}
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': str(base),
    'r': usual,
    'lora_alpha': usual,
    'rank_pattern': others,
    'alpha_pattern': others,
    'target_modules': sorted(ranks),
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
  }

"""A layout of its own for sampling: weights that no decoded token has to wait for.

Over `fsdp` a layer's weights are gathered whenever they are used: once a step in training, once a
token in decoding. So before a phase of sampling they are laid out over the same devices with
`tensor` alone, once: whole on every device where they fit, else split as few ways as do.

    mesh.sampling=auto    the fewest ways that fit in 85 % of a device's memory, if there is `fsdp`
                          or `sequence`, whose devices would sample the same rows
    mesh.sampling=4       over tensor=4
    mesh.sampling=train   as they are trained
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from o1jax.config import Config
from o1jax.models.transformer import Model
from o1jax.parallel import distributed
from o1jax.parallel.mesh import tensor_mesh
from o1jax.parallel.sharding import model_faults

_SHARE = 0.85  # of a device's memory; the rest is for what a step needs beside weights and caches


def sampling_mesh(config: Config, model: Model, mesh: Mesh, trees: Any, memory: int) -> Mesh | None:
  """The mesh to sample over; None to sample over the one that is trained on.

  Args:
    config: of the run.
    model: gives axes, and the size of keys and values.
    mesh: the run's.
    trees: the parameters that sample together: arrays, or shapes with `dtype`.
    memory: bytes of a device.
  """
  setting = config.mesh.sampling
  as_trained = mesh.shape['fsdp'] == mesh.shape['sequence'] == 1
  if setting == 'train' or (setting == 'auto' and as_trained):
    return None
  if setting != 'auto':
    return tensor_mesh(mesh, setting)
  for ways in (n for n in range(1, mesh.size + 1) if mesh.size % n == 0):
    found = tensor_mesh(mesh, ways)
    if model_faults(found, model, model.shapes()):
      continue
    if device_bytes(config, model, mesh, ways, trees) <= _SHARE * memory:
      return found
  return None


def sampling_faults(config: Config, model: Model, mesh: Mesh) -> list[str]:
  """What cannot be sampled: paths beyond the model's positions, or over `mesh.sampling`."""
  return _length_faults(config, model) + _mesh_faults(config, model, mesh)


def _length_faults(config: Config, model: Model) -> list[str]:
  prompt, path = config.data.max_prompt_tokens, config.data.max_path_tokens
  longest, limit = prompt + 2 * path, model.config.max_position
  if longest <= limit:
    return []
  return [
    f'data.max_prompt_tokens={prompt} and twice data.max_path_tokens={path} are {longest} tokens, '
    f"which exceed the model's max_position={limit}; lower them (a search draws whole paths behind "
    'parts of others)'
  ]


def _mesh_faults(config: Config, model: Model, mesh: Mesh) -> list[str]:
  ways = config.mesh.sampling
  if isinstance(ways, str):
    return []
  if mesh.size % ways:
    return [f'mesh.sampling={ways} does not divide {mesh.size} devices; use auto']
  faults = model_faults(tensor_mesh(mesh, ways), model, model.shapes())
  return [f'mesh.sampling: {fault}; use auto' for fault in faults]


def device_bytes(config: Config, model: Model, mesh: Mesh, ways: int, trees: Any) -> int:
  """Bytes of a device while `trees` sample over `tensor=ways`: held, laid out, keys and values."""
  held = held_trees(config) * _bytes(model.shapes()) // (mesh.shape['fsdp'] * mesh.shape['tensor'])
  c, split = model.config, model.config.num_kv_heads % ways == 0
  columns = config.data.max_prompt_tokens + config.data.max_path_tokens
  rows = max(config.search.rows, config.eval.rows)
  each = 2 * c.num_layers * c.num_kv_heads * c.head_dim * jax.numpy.dtype(c.dtype).itemsize
  cache = rows * columns * each * (1 if split else ways) // mesh.size
  return held + _bytes(trees) // ways + cache


def held_trees(config: Config) -> int:
  """Sets of parameters that a run holds at most while it samples, those of the optimiser too.

  Base, TCG, the policy and two moments of RL; policies and PRMs of the rounds before.
  """
  before = config.run.rounds - 1
  return 5 + 3 * before + int(config.rl.control and before > 0)


@functools.cache
def device_memory() -> int:
  """Bytes of a device, the same on every process; of a virtual one its share of the host's."""
  return distributed.from_first(_device_memory)


def _device_memory() -> int:
  found = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  return found or psutil.virtual_memory().total // jax.local_device_count()


def _bytes(tree: Any) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

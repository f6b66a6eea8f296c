"""Where every array lives: one table from logical axes to mesh axes.

A model names the axes of its parameters (`Model.logical_axes`); nothing else in
the project names a mesh axis. XLA inserts the collectives.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES = {
  'batch': ('data', 'fsdp'),
  'vocab': 'tensor',
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'head_dim': None,
  'layers': None,
}
# Kept whole when they do not divide: one key head serves several query heads,
# and vocabularies have any size.
_MAY_REPEAT = ('kv_heads', 'vocab')


def param_shardings(mesh: Mesh, model: Any, params: Any) -> Any:
  """A `NamedSharding` for every leaf of `params`.

  Args:
    mesh: from `make_mesh`.
    model: anything with `logical_axes()`, the names of its parameters' axes.
    params: the model's parameters, or any pytree that contains such trees (a
      PRM's {'trunk', 'head'}, an optimiser's moments). Leaves outside them are
      repeated on every device. Arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: naming each parameter axis that its mesh axis does not divide.
  """
  axes = model.logical_axes()
  named = jax.tree.structure(axes, is_leaf=_is_names)
  faults: list[str] = []

  def is_model(node):
    return isinstance(node, dict) and node.keys() == axes.keys()

  def place(node):
    if not is_model(node):
      return NamedSharding(mesh, PartitionSpec())
    if jax.tree.structure(node) != named:
      raise ValueError(f'parameters {sorted(node)} do not have the structure of the model')
    spec = lambda names, leaf: _spec(mesh, names, leaf.shape, faults)  # noqa: E731
    return jax.tree.map(spec, axes, node, is_leaf=_is_names)

  shardings = jax.tree.map(place, params, is_leaf=is_model)
  if faults:
    raise ValueError('; '.join(dict.fromkeys(faults)))
  return shardings


def batch_sharding(mesh: Mesh, batch: int | None = None) -> NamedSharding:
  """Rows over `data` and `fsdp`, everything else whole.

  Args:
    mesh: from `make_mesh`.
    batch: number of rows, if it is to be checked.

  Raises:
    ValueError: if `batch` does not divide over the devices that share it.
  """
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if batch is not None and batch % ways:
    raise ValueError(
      f'batch={batch} does not divide over data*fsdp={ways}; use a multiple of {ways}'
    )
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def shard(tree: Any, shardings: Any) -> Any:
  """Places host (or device) arrays; `shardings` is one sharding or a matching tree."""
  return jax.device_put(tree, shardings)


def _is_names(node) -> bool:
  return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def _spec(mesh: Mesh, names, shape, faults: list[str]) -> NamedSharding:
  entries = []
  for name, size in zip(names, shape, strict=True):
    axis = RULES[name]
    ways = 1 if axis is None else mesh.shape[axis]
    if size % ways and name not in _MAY_REPEAT:
      faults.append(f'{name}={size} does not divide over {axis}={ways}; use a divisor of {size}')
    entries.append(axis if ways > 1 and size % ways == 0 else None)
  return NamedSharding(mesh, PartitionSpec(*entries))

"""Where every array lives: one table from logical axes to mesh axes.

A model names the axes of its parameters (`Model.logical_axes`); nothing else in
the project names a mesh axis. XLA inserts the collectives.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from o1jax.parallel.mesh import meshes_that_fit

RULES = {
  'batch': ('data', 'fsdp'),
  'tokens': 'sequence',
  'vocab': 'tensor',
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'head_dim': None,
  'layers': None,
  'rank': None,
  'blocks': None,
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
      repeated on every device. Arrays or `jax.ShapeDtypeStruct`s; a subtree in the
      place of one has `axes(names)`, the names of its own arrays.

  Raises:
    ValueError: naming each parameter axis that its mesh axis does not divide, and meshes that do.
  """
  shardings, faults = _placed(mesh, model, params)
  if faults:
    fit = meshes_that_fit(mesh.size, lambda other: not model_faults(other, model, params))
    raise ValueError(f'{"; ".join(faults)}; use {fit}')
  return shardings


def model_faults(mesh: Mesh | AbstractMesh, model: Any, params: Any) -> list[str]:
  """Each parameter axis that does not divide over its mesh axis, with both numbers."""
  return _placed(mesh, model, params)[1]


def batch_faults(mesh: Mesh | AbstractMesh, batch: int) -> list[str]:
  """What is wrong with `batch` rows over `data` and `fsdp`, with both numbers."""
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if batch % ways == 0:
    return []
  return [f'batch={batch} does not divide over data*fsdp={ways}']


def row_faults(mesh: Mesh | AbstractMesh, tokens: int) -> list[str]:
  """What is wrong with rows of so many tokens over `sequence`, with both numbers."""
  ways = mesh.shape['sequence']
  return [f'rows of {tokens} tokens do not divide over sequence={ways}'] if tokens % ways else []


def _placed(mesh: Mesh | AbstractMesh, model: Any, params: Any) -> tuple[Any, list[str]]:
  """The shardings of `params`, whole where they do not divide, and each such axis in words."""
  axes = model.logical_axes()
  faults: list[str] = []

  def is_model(node):
    return isinstance(node, dict) and node.keys() == axes.keys()

  def place(node):
    if not is_model(node):
      return NamedSharding(mesh, PartitionSpec())
    names_of = lambda names, leaf: leaf.axes(names) if hasattr(leaf, 'axes') else names  # noqa: E731
    try:
      whole = jax.tree.map(names_of, axes, node, is_leaf=_is_names)
    except ValueError:
      text = f'parameters {sorted(node)} do not have the structure of the model'
      raise ValueError(text) from None
    spec = lambda names, leaf: _spec(mesh, names, leaf.shape, faults)  # noqa: E731
    return jax.tree.map(spec, whole, node, is_leaf=_is_names)

  shardings = jax.tree.map(place, params, is_leaf=is_model)
  return shardings, list(dict.fromkeys(faults))


def batch_sharding(mesh: Mesh, batch: int | None = None) -> NamedSharding:
  """Rows over `data` and `fsdp`, everything else whole.

  Args:
    mesh: from `make_mesh`.
    batch: number of rows, if it is to be checked.

  Raises:
    ValueError: if `batch` does not divide over the devices that share it; names meshes that do.
  """
  faults = [] if batch is None else batch_faults(mesh, batch)
  if faults:
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    fit = meshes_that_fit(mesh.size, lambda other: not batch_faults(other, batch))
    raise ValueError(f'{faults[0]}; use a multiple of {ways}, or the mesh {fit}')
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def repeated(tree: Any, at_least: int) -> list[str]:
  """Paths of arrays of `at_least` bytes that lie whole on each of several devices.

  Args:
    tree: pytree of placed arrays.
    at_least: bytes below which a copy on every device is meant so (norms, biases, counters).
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [
    jax.tree_util.keystr(path)
    for path, leaf in leaves
    if leaf.nbytes >= at_least and leaf.sharding.num_devices > 1 and leaf.is_fully_replicated
  ]


def shard(tree: Any, shardings: Any) -> Any:
  """Places host (or device) arrays; `shardings` is one sharding or a matching tree.

  Over several hosts each places its own part of host arrays that are equal on all of them.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: _place(x, shardings), tree)
  return jax.tree.map(_place, tree, shardings)


def _place(x: Any, sharding: NamedSharding) -> jax.Array:
  if isinstance(x, jax.Array):
    return jax.device_put(x, sharding)
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def own_rows(mesh: Mesh, batch: int) -> np.ndarray:
  """Which rows of a batch the devices of this host read, [n] in ascending order."""
  parts = batch_sharding(mesh, batch).addressable_devices_indices_map((batch,)).values()
  return np.unique(np.concatenate([np.arange(batch)[part] for part in parts]))


def shard_own(tree: Any, mesh: Mesh, batch: int) -> Any:
  """Places a batch of which this host holds `own_rows` only, in that order."""
  rows = own_rows(mesh, batch)
  place = np.full(batch, -1)
  place[rows] = np.arange(len(rows))

  def put(x):
    part = lambda index: x[(place[index[0]], *index[1:])]  # noqa: E731
    return jax.make_array_from_callback((batch, *x.shape[1:]), batch_sharding(mesh), part)

  return jax.tree.map(put, tree)


def ways_of(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...] | None) -> int:
  """Over how many parts of the mesh an axis of an array goes; 1 for None."""
  axes = (axis,) if isinstance(axis, str) else axis or ()
  return math.prod(mesh.shape[name] for name in axes)


def _is_names(node) -> bool:
  return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def _spec(mesh: Mesh | AbstractMesh, names, shape, faults: list[str]) -> NamedSharding:
  entries = []
  for name, size in zip(names, shape, strict=True):
    axis = RULES[name]
    ways = 1 if axis is None else mesh.shape[axis]
    if size % ways and name not in _MAY_REPEAT:
      faults.append(f'{name}={size} does not divide over {axis}={ways}')
    entries.append(axis if ways > 1 and size % ways == 0 else None)
  return NamedSharding(mesh, PartitionSpec(*entries))

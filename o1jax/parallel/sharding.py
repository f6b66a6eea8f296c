"""Where every array lives: one table from logical axes to mesh axes.

A model names the axes of its parameters (`Model.logical_axes`); nothing else in
the project names a mesh axis. XLA inserts the collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def _ambient() -> dict[str, int]:
  """Sizes of the ambient mesh's axes (`jax.set_mesh`) that are left to split over.

  Within `sum_over_data` a device has only its own rows, and `data` is no axis of theirs.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def _left(name: str | None) -> tuple[str, ...] | None:
  """The ambient mesh's axes that a logical axis goes over; None for none."""
  axes = RULES[name] if name is not None else None
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return tuple(axis for axis in axes if axis in _ambient()) or None


def ambient_ways() -> int:
  """Over how many parts of the ambient mesh (`jax.set_mesh`) rows are spread; 1 without one."""
  shape = _ambient()
  return shape.get('data', 1) * shape.get('fsdp', 1)


def token_ways(tokens: int) -> int:
  """Over how many parts of the ambient mesh the tokens of such rows are spread: 1 or `sequence`."""
  ways = _ambient().get('sequence', 1)
  return ways if tokens % ways == 0 else 1


def sum_over_data(function: Callable[..., Any], batch: Any, *whole: Any) -> Any:
  """Within jit: `function(batch, *whole)` on each device's rows, summed over `data` at its end.

  For sums that a loop adds up: left to itself the compiler adds those of all devices in every turn.
  It does so still where the mesh has other axes too: XLA does not split a model over these within
  a part of the program that is split over `data` by hand (its check of gathers ends the process).

  Args:
    function: returns a pytree of sums over the rows of `batch`.
    batch: pytree of arrays with rows first, which divide over `data` and `fsdp`.
    whole: pytrees that are the same for all rows.
  """
  sizes = _ambient()
  if sizes.get('data', 1) != math.prod(sizes.values()) or not sizes:
    return function(batch, *whole)

  def local(batch, *whole):
    return jax.lax.psum(function(batch, *whole), 'data')

  specs = (PartitionSpec('data'), *[PartitionSpec()] * len(whole))
  mapped = jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
  return mapped(batch, *whole)


def spread(tree: Any) -> Any:
  """Host arrays by rows over the ambient mesh, whole if they do not divide; as is without one."""
  mesh, ways = jax.sharding.get_mesh(), ambient_ways()
  if mesh.empty:
    return tree
  rows, whole = batch_sharding(mesh), replicated(mesh)
  return jax.tree.map(lambda x: shard(x, whole if len(x) % ways else rows), tree)


def constrain(tree: Any, names: tuple[str | None, ...]) -> Any:
  """Within jit: arrays whose first axes have these logical `names`, over the ambient mesh.

  An axis that does not divide stays whole. Without an ambient mesh nothing is asked for.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not _ambient():
    return tree

  def pin(x):
    axes = [_left(name) for name in names]
    ways = [_ways(mesh, axis) for axis in axes]
    sizes = x.shape[: len(axes)]
    fits = [a if size % n == 0 else None for a, n, size in zip(axes, ways, sizes, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fits))

  return jax.tree.map(pin, tree)


def on_own_rows(
  function: Callable[..., Any],
  whole: jax.Array,
  names: tuple[str, ...],
  *rows: jax.Array,
  by_tokens: bool = False,
) -> Any:
  """Within jit: `function(whole, *rows)`, on each device of the ambient mesh with its own rows.

  `whole` is gathered before and its gradient summed over the devices after `function`, once. Left
  to itself the compiler does both in every turn of a loop within it.

  Args:
    function: of arrays as one device has them; what it returns has rows first.
    whole: the same for all rows.
    names: the logical axes of `whole`; over `tensor` it stays split.
    rows: arrays with rows first. Where they do not divide, and without a mesh, they are not split.
    by_tokens: their second axis, and that of the result, is tokens, each device has its own of.
  """
  mesh, split, parts = jax.sharding.get_abstract_mesh(), (), []
  if ambient_ways() > 1 and not any(len(x) % ambient_ways() for x in rows):
    split = _left('batch')
    parts = [split]
  if by_tokens and token_ways(rows[0].shape[1]) > 1:
    split, parts = (*split, RULES['tokens']), [split or None, RULES['tokens']]
  if not split:
    return function(whole, *rows)
  axes = [RULES[name] if RULES[name] in split else None for name in names]
  pairs = zip(axes, whole.shape, strict=True)
  axes = [axis if size % _ways(mesh, axis) == 0 else None for axis, size in pairs]

  def local(whole, *rows):
    for i, axis in enumerate(axes):
      if axis is not None:
        whole = jax.lax.all_gather(whole, axis, axis=i, tiled=True)
    return function(whole, *rows)

  by_rows = PartitionSpec(*parts)
  specs = (PartitionSpec(*axes), *[by_rows] * len(rows))
  mapped = jax.shard_map(
    local, in_specs=specs, out_specs=by_rows, axis_names=set(split), check_vma=False
  )
  return mapped(whole, *rows)


def on_own_tokens(function: Callable[..., jax.Array], whole: Any, *rows: jax.Array) -> jax.Array:
  """Within jit: `function(whole, *rows)`, on each device of `sequence` with its tokens of the rows.

  `whole_tokens` and `first_token` tell the function of the others. Gradients of `whole` are summed
  over the devices; all other axes of the mesh are the compiler's.

  Args:
    function: returns an array of [rows, tokens, ...].
    whole: a pytree, the same for all tokens.
    rows: arrays of [rows, tokens, ...]; the tokens divide, as `token_ways` says.
  """
  axis = RULES['tokens']
  own = PartitionSpec(None, axis)
  specs = (PartitionSpec(), *[own] * len(rows))
  mapped = jax.shard_map(
    function, in_specs=specs, out_specs=own, axis_names={axis}, check_vma=False
  )
  return mapped(whole, *rows)


def whole_tokens(x: jax.Array) -> jax.Array:
  """Within `on_own_tokens`: [rows, tokens, ...] with the tokens of all devices, in their order."""
  return jax.lax.all_gather(x, RULES['tokens'], axis=1, tiled=True)


def first_token(own: int) -> jax.Array:
  """Within `on_own_tokens`: the number of this device's first token, where each has `own`."""
  return jax.lax.axis_index(RULES['tokens']) * own


def on_own_parts(
  function: Callable[..., jax.Array],
  arrays: tuple[jax.Array, ...],
  names: tuple[tuple[str | None, ...], ...],
  out: tuple[str | None, ...],
) -> jax.Array:
  """Within jit: `function(*arrays)` on each device with its parts, where XLA cannot split a kernel.

  Args:
    function: of arrays as one device has them; axes of the same name are split alike.
    arrays: the whole ones.
    names: the logical names of each array's first axes.
    out: those of the result. A mesh axis is used where every axis of `names` that goes over it
      divides; otherwise, and without an ambient mesh, that axis is whole on every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if math.prod(_ambient().values()) == 1:
    return function(*arrays)
  sizes = [
    (_left(name), size)
    for array, axes in zip(arrays, names, strict=True)
    for name, size in zip(axes, array.shape, strict=False)
    if name is not None
  ]
  whole = {axis for axis, size in sizes if size % _ways(mesh, axis)}

  def spec(axes):
    rules = [_left(name) for name in axes]
    return PartitionSpec(*[None if rule in whole else rule for rule in rules])

  specs = tuple(spec(axes) for axes in names)
  mapped = jax.shard_map(
    function, in_specs=specs, out_specs=spec(out), axis_names=set(_ambient()), check_vma=False
  )
  return mapped(*arrays)


def _ways(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...] | None) -> int:
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

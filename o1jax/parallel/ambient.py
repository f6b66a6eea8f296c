"""Within jit, over the ambient mesh (`jax.set_mesh`): what is split, gathered and summed by hand.

Everything here computes the same without a mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from o1jax.parallel.sharding import RULES, batch_sharding, replicated, shard, ways_of


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
    ways = [ways_of(mesh, axis) for axis in axes]
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
  axes = [axis if size % ways_of(mesh, axis) == 0 else None for axis, size in pairs]

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
  whole = {axis for axis, size in sizes if size % ways_of(mesh, axis)}

  def spec(axes):
    rules = [_left(name) for name in axes]
    return PartitionSpec(*[None if rule in whole else rule for rule in rules])

  specs = tuple(spec(axes) for axes in names)
  mapped = jax.shard_map(
    function, in_specs=specs, out_specs=spec(out), axis_names=set(_ambient()), check_vma=False
  )
  return mapped(*arrays)

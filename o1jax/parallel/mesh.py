"""The device mesh: named axes `data`, `fsdp`, `sequence` and `tensor`, with errors that help.

`data` splits the batch and repeats the parameters, `fsdp` splits both, `sequence`
splits the tokens of each row in training (long context), `tensor` splits heads, MLP
and vocabulary. One program runs on any of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ('data', 'fsdp', 'sequence', 'tensor')
_COUNT, _THREADS = 'xla_force_host_platform_device_count', 'xla_cpu_multi_thread_eigen'


def start_cpu_devices(
  shape: Mapping[str, int], environ: MutableMapping[str, str] = os.environ
) -> None:
  """Before any other use of JAX: on a CPU, the virtual devices that a mesh asks for.

  The products of a small model are too small to be shared by threads: a device for each core, with
  its part of the rows and one thread, does more than one device with all threads. A number of
  devices in XLA_FLAGS stays, and so do the devices of an accelerator, and those of a process among
  several.

  Args:
    shape: as for `make_mesh`; an axis of -1 takes the cores that are left.
    environ: where XLA_FLAGS is read and, for devices of one thread, added to.
  """
  flags = environ.get('XLA_FLAGS', '')
  count = cpu_devices(shape, len(os.sched_getaffinity(0)))
  if count == 1 or _COUNT in flags or jax.distributed.is_initialized():
    return
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # JAX has started: the devices are what they are
    return
  if _THREADS not in flags:
    environ['XLA_FLAGS'] = f'{flags} --{_THREADS}=false'.strip()


def cpu_devices(shape: Mapping[str, int], cores: int) -> int:
  """How many virtual devices a mesh of this shape asks for; 1 where its sizes make no sense."""
  sizes = [shape.get(axis, 1) for axis in AXES]
  rest = math.prod(size for size in sizes if size != -1)
  if rest < 1 or sizes.count(-1) > 1:
    return 1
  return rest * max(1, cores // rest) if -1 in sizes else rest


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over all of `devices` (default: every device of the run).

  Args:
    shape: axis name -> size; a missing axis has size 1, one axis may be -1 and
      takes the devices that are left.
    devices: the devices to use, all of them.

  Raises:
    ValueError: an unknown axis, a size that is not positive, or a product that
      is not the number of devices; the message proposes meshes that fit.
  """
  devices = jax.devices() if devices is None else list(devices)
  unknown = sorted(set(shape) - set(AXES))
  if unknown:
    raise ValueError(f'unknown mesh axes {unknown}; the axes are {", ".join(AXES)}')
  sizes = _fill(shape, len(devices))
  if math.prod(sizes) != len(devices):
    raise ValueError(
      f'mesh {_spell(sizes)} needs {math.prod(sizes)} devices, found {len(devices)}; '
      f'use {meshes_that_fit(len(devices))}'
    )
  auto = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)


def tensor_mesh(mesh: Mesh, ways: int) -> Mesh:
  """The same devices in the same order, `tensor` over `ways` neighbours, `data` over the rest."""
  devices = mesh.devices.reshape(-1, 1, 1, ways)
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def meshes_that_fit(count: int, fits: Callable[[AbstractMesh], bool] = lambda mesh: True) -> str:
  """Up to three meshes over `count` devices, as text for an error.

  Those with the least tensor parallelism come first: it is what a step pays most for. Where no
  mesh over all devices passes `fits`, meshes over the largest smaller number that has one.
  """
  for devices in range(count, 0, -1):
    shapes = [AbstractMesh(sizes, AXES) for sizes in _factorisations(devices)]
    found = [_short(mesh) for mesh in shapes if fits(mesh)][:3]
    if found:
      text = ' or '.join(found)
      return text if devices == count else f'{text} on {devices} of the {count} devices'
  return f'other sizes: no mesh of up to {count} devices fits'


def _fill(shape: Mapping[str, int], count: int) -> tuple[int, ...]:
  sizes = [shape.get(axis, 1) for axis in AXES]
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f'mesh {_spell(sizes)}: sizes are positive, at most one may be -1')
  rest = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and count % rest:
    raise ValueError(
      f'mesh {_spell(sizes)} cannot be filled: {count} devices do not divide over {rest}; '
      f'use {meshes_that_fit(count)}'
    )
  return tuple(count // rest if size == -1 else size for size in sizes)


def _spell(sizes: Sequence[int]) -> str:
  return ' '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes, strict=True))


def _short(mesh: AbstractMesh) -> str:
  return ' '.join(f'{axis}={n}' for axis, n in mesh.shape.items() if n > 1) or 'data=1'


def _factorisations(count: int) -> list[tuple[int, int, int, int]]:
  """Sizes of `AXES` whose product is `count`, simple ones first; `sequence` is for who asks."""
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  sizes = [(count // f // t, f, t) for t in divisors for f in divisors if count % (f * t) == 0]
  sizes = sorted(sizes, key=lambda s: (s[2], sum(n > 1 for n in s), s[1]))
  return [(data, fsdp, 1, tensor) for data, fsdp, tensor in sizes]

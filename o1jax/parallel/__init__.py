"""Device meshes and the placement of parameters and batches on them."""

from o1jax.parallel.mesh import AXES, make_mesh, meshes_that_fit
from o1jax.parallel.sharding import (
  batch_faults,
  batch_sharding,
  model_faults,
  own_rows,
  param_shardings,
  repeated,
  replicated,
  shard,
)

__all__ = [
  'AXES',
  'batch_faults',
  'batch_sharding',
  'make_mesh',
  'meshes_that_fit',
  'model_faults',
  'own_rows',
  'param_shardings',
  'repeated',
  'replicated',
  'shard',
]

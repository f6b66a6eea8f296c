"""Device meshes and the placement of parameters and batches on them."""

from o1jax.parallel.mesh import AXES, make_mesh
from o1jax.parallel.sharding import batch_sharding, param_shardings, replicated, shard

__all__ = ['AXES', 'batch_sharding', 'make_mesh', 'param_shardings', 'replicated', 'shard']

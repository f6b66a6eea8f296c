"""All jitted steps of a run: the run's own functions with abstract arguments, never copies."""

from __future__ import annotations

from jax.sharding import AbstractMesh, Mesh

from o1jax.config import Config
from o1jax.models.transformer import Model
from o1jax.parallel.mesh import meshes_that_fit
from o1jax.parallel.sharding import batch_faults, model_faults, row_faults
from o1jax.plan import sampling
from o1jax.plan.arguments import Arguments
from o1jax.plan.step import Step
from o1jax.plan.training import Training
from o1jax.stages.layout import sampling_faults
from o1jax.stages.setup import row_widths


def of_run(config: Config, model: Model, mesh: Mesh, memory: int = 0) -> list[Step]:
  """Every step of the run in the order of its stages; `memory` are the bytes of a device.

  Raises:
    ValueError: parameters or batches do not divide over the mesh; names meshes over which all do.
  """

  def faults(mesh: Mesh | AbstractMesh) -> list[str]:
    batches = [f'{key}: {fault}' for key, n in _batches(config) for fault in batch_faults(mesh, n)]
    widths = row_widths(config).items()
    batches += [f'{key}: {fault}' for key, n in widths for fault in row_faults(mesh, n)]
    return batches + model_faults(mesh, model, model.shapes())

  if wrong := sampling_faults(config, model, mesh):
    raise ValueError('; '.join(wrong))
  if faults(mesh):
    fit = meshes_that_fit(mesh.size, lambda other: not faults(other))
    raise ValueError(f'{"; ".join(faults(mesh))}; for all of it use the mesh {fit}')
  given = Arguments(config, model, mesh)
  make = Training(given)
  return [*make.tcg(), *sampling.of_run(given, memory), make.policy_sft(), make.prm(), *make.rl()]


def _batches(config: Config) -> list[tuple[str, int]]:
  """The settings that say how many rows an update has, and the rows of one side."""
  halves = 2 if config.rl.algorithm == 'dpo' else 1
  return [
    ('tcg.sft.batch', config.tcg.sft.batch),
    ('tcg.dpo.batch', config.tcg.dpo.batch),
    ('policy_sft.optim.batch', config.policy_sft.optim.batch),
    ('prm.optim.batch', config.prm.optim.batch),
    ('rl.minibatch', max(1, config.rl.minibatch // halves)),
  ]

"""What a run is told: typed sections and the reading of them, without JAX."""

from o1jax.config.base import Section
from o1jax.config.load import ConfigError, check, closest, diff, load, to_yaml
from o1jax.config.sections import FREE_KEYS, STAGES, Config, DistributedConfig, MeshConfig
from o1jax.config.training import (
  PROJECTIONS,
  OptimConfig,
  PrmConfig,
  RlConfig,
  SearchConfig,
  TcgConfig,
)

__all__ = [
  'FREE_KEYS',
  'PROJECTIONS',
  'STAGES',
  'Config',
  'ConfigError',
  'DistributedConfig',
  'MeshConfig',
  'OptimConfig',
  'PrmConfig',
  'RlConfig',
  'SearchConfig',
  'Section',
  'TcgConfig',
  'check',
  'closest',
  'diff',
  'load',
  'to_yaml',
]

"""Joining the other processes of a run, found by itself or named in config or environment.

Order of precedence: `distributed.coordinator/num_processes/process_id` of the config, then
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then what a TPU pod, SLURM or Open
MPI says of the job. One process alone is not joined to anything.
"""

from __future__ import annotations

import ipaddress
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from o1jax.config import ConfigError, DistributedConfig

_VARIABLES = {
  'coordinator': 'JAX_COORDINATOR_ADDRESS',
  'num_processes': 'JAX_NUM_PROCESSES',
  'process_id': 'JAX_PROCESS_ID',
}


def join(config: DistributedConfig, environ: Mapping[str, str] = os.environ) -> None:
  """Joins the processes of the run, before any other use of JAX; does nothing for one alone.

  Called again in a process that has joined, it does nothing.

  Raises:
    ConfigError: settings that do not go together, or a coordinator that does not answer within
      `distributed.join_timeout_s`.
  """
  if jax.distributed.is_initialized():
    return
  arguments = found(config, environ)
  if arguments is None:
    return
  if jax.config.jax_platforms in (None, 'cpu') or 'cpu' in jax.config.jax_platforms:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=config.join_timeout_s,
      heartbeat_timeout_seconds=config.heartbeat_timeout_s,
      shutdown_timeout_seconds=config.heartbeat_timeout_s,
    )
  except (RuntimeError, ValueError) as error:
    first = str(error).partition('\n')[0]
    who = arguments.get('coordinator_address', 'the coordinator')
    text = f'could not join {who} within {config.join_timeout_s} s ({first}); are all processes up?'
    raise ConfigError('distributed', [text]) from None


def found(config: DistributedConfig, environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`, or None for one process alone.

  Raises:
    ConfigError: some of coordinator, number and id are given and others nowhere to be found.
  """
  told = {key: getattr(config, key) for key in _VARIABLES}
  told |= {
    key: environ[name] if key == 'coordinator' else _number(name, environ[name])
    for key, name in _VARIABLES.items()
    if told[key] is None and environ.get(name)
  }
  given = {key: value for key, value in told.items() if value is not None}
  if not given:
    return _cluster(environ) if config.detect else None
  missing = [key for key in _VARIABLES if key not in given]
  if missing:
    ways = ' and '.join(f'distributed.{key}=... or {_VARIABLES[key]}' for key in missing)
    raise ConfigError('distributed', [f'{", ".join(given)} is given; give {ways} too'])
  number, process = given['num_processes'], given['process_id']
  if not 0 <= process < number:
    text = f'process_id={process} is none of num_processes={number}; use 0 to {number - 1}'
    raise ConfigError('distributed', [text])
  if number == 1:
    return None
  return {
    'coordinator_address': given['coordinator'],
    'num_processes': number,
    'process_id': process,
    'cluster_detection_method': 'deactivate',
  } | _bound(given['coordinator'])


def _cluster(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """What JAX is to be told where it finds the job by itself; None outside jobs of several."""
  # SLURM sets the number for a batch script too, the node list of a step only within srun.
  if 'SLURM_STEP_NODELIST' in environ and int(environ.get('SLURM_NTASKS', 1)) > 1:
    alone = environ.get('SLURM_STEP_TASKS_PER_NODE', '').split('(')[0] == '1'
    gpus = environ.get('SLURM_GPUS_ON_NODE', '')
    return {'cluster_detection_method': 'slurm'} | _all_gpus(alone, gpus)
  if int(environ.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
    return {'cluster_detection_method': 'ompi'}
  hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES', '')
  if len(hosts.split(',')) > 1 or int(environ.get('MEGASCALE_NUM_SLICES') or 1) > 1:
    return {}
  return {} if _is_tpu_vm(environ) else None


def _all_gpus(alone: bool, gpus: str) -> dict[str, Any]:
  """JAX gives a SLURM task one GPU; a task that has its node to itself drives them all."""
  return {'local_device_ids': list(range(int(gpus)))} if alone and gpus.isdigit() else {}


def _is_tpu_vm(environ: Mapping[str, str]) -> bool:
  """A Cloud TPU VM, whose metadata know the other workers; not a machine that only has libtpu."""
  if 'TPU_SKIP_MDS_QUERY' in environ or environ.get('JAX_PLATFORMS', 'tpu').split(',')[0] != 'tpu':
    return False
  devices = pathlib.Path('/dev')
  return 'TPU_ACCELERATOR_TYPE' in environ or any(devices.glob('accel[0-9]*'))


def _bound(coordinator: str) -> dict[str, str]:
  """A coordinator on a loopback address is not to be reached from elsewhere."""
  host = coordinator.rpartition(':')[0].strip('[]')
  try:
    local = host == 'localhost' or ipaddress.ip_address(host).is_loopback
  except ValueError:
    local = False
  return {'coordinator_bind_address': coordinator} if local else {}


def _number(name: str, text: str) -> int:
  if not text.isdigit():
    raise ConfigError('distributed', [f'{name}={text!r} is no number'])
  return int(text)

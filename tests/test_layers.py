"""Imports point downward only, and brothers do not import each other: read from the sources."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / 'o1jax'

# Rooms by layer, from the ground up. What stands in none of them is an entry point: on top.
LAYERS = (
  ('types', 'batch', 'config'),
  ('parallel', 'losses', 'rewards', 'search'),
  ('models',),
  ('learn', 'sampling', 'data', 'sandbox', 'run'),
  ('stages',),
  ('plan',),
)
ENTRY = len(LAYERS)
# So does `__main__` of a room: it may join its room with others, and nothing may import it.
MAIN = '__main__'
GROUND = {('config', 'types')}  # the one import allowed on the ground floor

# Packages that only some rooms may import.
ONLY_IN = {'flax': {'models'}, 'orbax': {'run'}, 'tensorboardX': {'run'}, 'rich': {'run'}}
NEVER = {
  'types': {'jax', 'numpy'},
  'config': {'jax', 'numpy', 'transformers'},
  'sandbox': {'jax', 'jaxlib', 'flax', 'optax', 'numpy'},
}
# Rooms that import nothing of the project but themselves and the ground.
PURE = {'losses', 'rewards', 'sandbox'}


def level_of(room: str) -> int:
  return next((i for i, rooms in enumerate(LAYERS) if room in rooms), ENTRY)


def imported(source: str, package: tuple[str, ...]) -> set[str]:
  """Dotted names that a module imports; `package` is what its relative imports start from."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      start = package[: len(package) - node.level + 1] if node.level else ()
      module = '.'.join([*start, *(node.module.split('.') if node.module else ())])
      # `from o1jax import config` names the room in the alias.
      names |= {f'{module}.{alias.name}' for alias in node.names}
  return names


def faults_of(room: str, names: set[str], main: bool = False) -> list[str]:
  """What a module of `room` may not import, each as a sentence; `main` if it is its `__main__`."""
  faults = []
  for name in sorted(names):
    top, *rest = name.split('.')
    if top != 'o1jax':
      if top in NEVER.get(room, ()) or room not in ONLY_IN.get(top, {room}):
        faults.append(f'{room} may not import {top}')
      continue
    other = rest[0] if rest else ''
    if MAIN in rest:
      faults.append(f'{room} may not import {name}: it is an entry point')
    if other == room:
      continue
    below = level_of(other) < level_of(room)
    entry = main or level_of(room) == ENTRY  # entry points share modules such as cli
    if not (below or entry or (room, other) in GROUND):
      faults.append(f'{room} may not import {other}: it stands {where(room, other)}')
    elif room in PURE and level_of(other) > 0:
      faults.append(f'{room} may not import {other}: it is pure')
  return faults


def where(room: str, other: str) -> str:
  return 'beside' if level_of(other) == level_of(room) else 'above'


def modules() -> list[pathlib.Path]:
  return sorted(ROOT.rglob('*.py'))


@pytest.mark.parametrize('path', modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  if parts == ('__init__',):
    assert not any(n.startswith('o1jax') for n in imported(path.read_text(), ('o1jax',)))
    return
  names = imported(path.read_text(), ('o1jax', *parts[:-1]))
  assert faults_of(parts[0], names, main=parts[-1] == MAIN) == []


def test_every_folder_is_a_room():
  folders = {p.parent.relative_to(ROOT).parts[0] for p in modules() if p.parent != ROOT}
  assert folders <= {room for rooms in LAYERS for room in rooms}


@pytest.mark.parametrize(
  'room, source, faulty',
  [
    ('losses', 'from o1jax.models import heads', True),  # beside
    ('losses', 'from o1jax import batch', False),
    ('learn', 'from o1jax.losses import sft', False),
    ('learn', 'from ..sampling import decode', True),
    ('learn', 'from . import state', False),
    ('learn', 'import o1jax.stages.rl', True),  # above
    ('learn', 'def late():\n  from o1jax.data import steps', True),
    ('stages', 'from o1jax.run.store import Store', False),
    ('stages', 'from o1jax import cli', True),
    ('train', 'from o1jax import cli, stages', False),
    ('learn', 'from flax import nnx', True),
    ('models', 'from flax import nnx', False),
    ('sandbox', 'import jax.numpy', True),
    ('sandbox', 'from o1jax.losses import sft', True),
    ('sandbox', 'from o1jax.types import Problem', False),
    ('config', 'from o1jax import batch', True),
    ('data', 'from o1jax.sandbox import Pool', True),
    ('data', 'from o1jax.data import __main__', True),
    ('stages', 'from o1jax.data.__main__ import main', True),
  ],
)
def test_the_rules_bite(room, source, faulty):
  assert bool(faults_of(room, imported(source, ('o1jax', room)))) == faulty


@pytest.mark.parametrize(
  'room, source, faulty',
  [
    ('data', 'from o1jax.sandbox import Pool', False),  # an entry point joins brothers
    ('data', 'from o1jax.sandbox.__main__ import doctor', True),
    ('sandbox', 'from o1jax.data import readers', True),  # what is pure stays so
    ('sandbox', 'import numpy', True),
    ('data', 'from flax import nnx', True),
  ],
)
def test_the_rules_bite_a_room_s_entry_point(room, source, faulty):
  assert bool(faults_of(room, imported(source, ('o1jax', room)), main=True)) == faulty

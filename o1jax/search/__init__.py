"""Tree search over reasoning steps: pure, jitted, a forest of trees at once."""

from o1jax.search.backup import backup
from o1jax.search.expand import NewChildren, expand
from o1jax.search.gumbel import gumbel_interior, gumbel_root
from o1jax.search.select import (
  Allowed,
  ChildStats,
  Rule,
  constant,
  exponential,
  linear,
  puct,
  select,
  uct,
  widening,
)
from o1jax.search.tree import NO_PARENT, ROOT, UNVISITED, SearchTree, empty_tree

__all__ = [
  'NO_PARENT',
  'ROOT',
  'UNVISITED',
  'Allowed',
  'ChildStats',
  'NewChildren',
  'Rule',
  'SearchTree',
  'backup',
  'constant',
  'empty_tree',
  'expand',
  'exponential',
  'gumbel_interior',
  'gumbel_root',
  'linear',
  'puct',
  'select',
  'uct',
  'widening',
]

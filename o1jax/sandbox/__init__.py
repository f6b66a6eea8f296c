"""Runs programs that nobody vouches for, and says what they did. Never imports JAX."""

from __future__ import annotations

from typing import Any

_PUBLIC = {'Pool': 'pool', 'Job': 'protocol', 'Limits': 'protocol', 'SandboxError': 'protocol'}


def __getattr__(name: str) -> Any:
  # Loaded when asked for: a zygote imports this package and must stay small.
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  import importlib

  return getattr(importlib.import_module(f'o1jax.sandbox.{_PUBLIC[name]}'), name)

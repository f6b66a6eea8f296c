"""Which platform a program is traced for: the one it runs on, or one that a plan compiles for."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_planned: contextvars.ContextVar[str | None] = contextvars.ContextVar('planned', default=None)


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': what decides between forms of a program that compute the same."""
  return _planned.get() or jax.default_backend()


@contextmanager
def planned_for(name: str) -> Iterator[None]:
  """Within it programs are traced for a platform that is not there."""
  token = _planned.set(name)
  try:
    yield
  finally:
    _planned.reset(token)

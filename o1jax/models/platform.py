"""The platform that a model is compiled for, which `o1jax.plan` makes another than it runs on."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_compiled_for: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """What is traced inside is for 'cpu', 'gpu' or 'tpu', whatever JAX runs on here.

  What was traced and kept before by `jax.jit` is not traced again.
  """
  token = _compiled_for.set(platform)
  try:
    yield
  finally:
    _compiled_for.reset(token)


def target() -> str:
  """The platform to compile for: that of `compiling_for`, or else JAX's own."""
  return _compiled_for.get() or jax.default_backend()

"""What a statement has to say about the program that is asked for."""

from __future__ import annotations


def with_interface(statement: str, starter_code: str, entry_point: str | None) -> str:
  """The statement, followed by the starter code or the name of the function.

  A policy reads nothing but the statement, and a call-based problem cannot be solved without the
  name that is called. A problem of stdin and stdout stays as it is.
  """
  statement = statement.rstrip()
  if starter_code.strip():
    return f'{statement}\n\nStarter code:\n{starter_code.rstrip()}'
  if entry_point is not None:
    return f'{statement}\n\nWrite a function `{entry_point}`.'
  return statement

"""What can be wrong with a source as a whole, and with one of its rows."""

from __future__ import annotations

import dataclasses
import pathlib

SHOWN = 20  # faults that are kept word for word; the others are counted


class ReadError(ValueError):
  """A source that cannot be read at all; the text names the value and the remedy."""


class BadRow(ValueError):
  """A row that makes no problem; the text is the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
  """Where a row stands and why it is not used."""

  path: pathlib.Path
  row: int  # line of a JSON Lines file, else element or record, from 1
  reason: str

  def __str__(self) -> str:
    return f'{self.path}, row {self.row}: {self.reason}'


@dataclasses.dataclass
class Faults:
  """The rows that were left out: all counted, the first `SHOWN` kept.

  With `strict` the first one raises `ReadError` instead.
  """

  strict: bool = False
  count: int = 0
  first: list[Fault] = dataclasses.field(default_factory=list)

  def add(self, fault: Fault) -> None:
    """Counts a row; raises ReadError where none may be left out."""
    if self.strict:
      raise ReadError(str(fault))
    self.count += 1
    if len(self.first) < SHOWN:
      self.first.append(fault)

  def __str__(self) -> str:
    """The report: a line for each of the first faults, and how many more there are."""
    lines = [f'{self.count} {"row" if self.count == 1 else "rows"} left out']
    lines += [f'  {fault}' for fault in self.first]
    if self.count > len(self.first):
      lines.append(f'  and {self.count - len(self.first)} more')
    return '\n'.join(lines)

"""What a person sees of a run: bars on a terminal, a line now and then in a log, tables in both."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

from o1jax.parallel import distributed


class Progress:
  """Headers, bars and tables of one run.

  On a terminal a bar moves in place; elsewhere it is a plain line at most every `every_s` seconds,
  and one at the end. Of several processes the first shows something.
  """

  def __init__(
    self,
    stream: IO[str] | None = None,
    every_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    stream = stream or (sys.stdout if distributed.is_first() else io.StringIO())
    self._live = stream.isatty()
    self._console = rich.console.Console(
      file=stream,
      highlight=False,
      # A log has no width; tables must not be folded to that of some terminal.
      width=None if self._live else 160,
      no_color=not self._live,
    )
    self._every_s = every_s
    self._clock = clock
    self._started = clock()

  def say(self, text: str) -> None:
    """One line, with the time since the start of the process in front."""
    line = f'[{_clock_text(self._clock() - self._started)}] {text}'
    self._console.print(line, markup=False, soft_wrap=True)

  def stage(self, name: str, text: str = '') -> None:
    """The header of a stage."""
    self._console.print()
    self.say(f'== {name}' + (f': {text}' if text else ''))

  @contextmanager
  def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A count from `done` to `total`; the yielded bar takes `update(count, text)`."""
    if self._live:
      columns = (
        rich.progress.TextColumn('{task.description}', markup=False),
        rich.progress.BarColumn(bar_width=30),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn('{task.fields[text]}', markup=False),
      )
      with rich.progress.Progress(*columns, console=self._console) as display:
        task = display.add_task(name, total=total, completed=done, text='')

        def show(count: int, text: str) -> None:
          display.update(task, completed=count, text=text)

        yield Bar(show, done)
    else:
      bar = Bar(self._plain_bar(name, total), done)
      yield bar
      bar.finish()

  def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table; floats with three digits, None as a dash, columns of numbers to the right."""
    grid = rich.table.Table(
      title=title,
      title_justify='left',
      box=rich.box.ROUNDED if self._live else rich.box.ASCII,
    )
    for i, column in enumerate(columns):
      numeric = bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
      grid.add_column(column, justify='right' if numeric else 'left')
    for row in rows:
      grid.add_row(*(rich.text.Text(_cell(value)) for value in row))
    self._console.print()
    self._console.print(grid)

  def _plain_bar(self, name: str, total: int) -> Callable[[int, str], None]:
    """Prints a bar's state as a line, unless it printed one less than `every_s` ago."""
    shown_at = self._clock()

    def show(count: int, text: str, last: bool = False) -> None:
      nonlocal shown_at
      if last or self._clock() - shown_at >= self._every_s:
        shown_at = self._clock()
        self.say(f'{name} {count}/{total}' + (f'  {text}' if text else ''))

    return show


class Bar:
  """A moving count; made by `Progress.bar`."""

  def __init__(self, show: Callable[..., None], done: int):
    self._show = show
    self._state = (done, '')

  def update(self, count: int, text: str = '') -> None:
    """Shows `count` of the total, with a few words on how it goes."""
    self._state = (count, text)
    self._show(count, text)

  def finish(self) -> None:
    """Shows the last state once more, come what may."""
    self._show(*self._state, last=True)


def _clock_text(seconds: float) -> str:
  minutes, rest = divmod(int(seconds), 60)
  return f'{minutes:3d}:{rest:02d}'


def _cell(value: Any) -> str:
  if value is None:
    return '-'
  return f'{value:.3f}' if isinstance(value, float) else str(value)

"""Published problem sets into `Problem`: files and Hub folders, read one row at a time."""

from o1jax.data.readers.faults import BadRow, Fault, Faults, ReadError
from o1jax.data.readers.files import SPLITS, data_files
from o1jax.data.readers.formats import FORMATS, to_row
from o1jax.data.readers.read import Entry, chosen, entries, read_problems

__all__ = [
  'FORMATS',
  'SPLITS',
  'BadRow',
  'Entry',
  'Fault',
  'Faults',
  'ReadError',
  'chosen',
  'data_files',
  'entries',
  'read_problems',
  'to_row',
]

"""What the operations of the family do: meaning, pseudocode, code and confusion of each.

An operation maps a list to a list; a read-out, the final clause, maps a list to the answer. Every
one has exactly one *confusion*: another of its own kind, with the same parameter, that a hasty
reader could take it for. `fn` is the meaning, `code` the Python line that has the same meaning
(`tests/test_family.py` executes both). The English phrases stand in `phrases.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

INT, STR, ANY = 'int', 'str', 'any'
VOWELS = 'aeiouAEIOU'

# Words of two to six letters; half of them start with a vowel.
LEXICON = (
  'go', 'ox', 'ant', 'cat', 'egg', 'owl', 'fox', 'bear', 'iris', 'oven', 'lamp', 'apple', 'eagle',
  'stone', 'tiger', 'grape', 'orange', 'island', 'turtle', 'pepper',
)  # fmt: skip
LOWEST, HIGHEST = -20, 99  # every number that a program meets is one token of the tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
  """A list-to-list operation.

  `takes` is the item type it reads (`any`: both), `gives` the one it leaves. `{k}` stands for the
  parameter in `pseudo` and `code`; `params` are the values it may have (empty: no parameter).
  `repeatable` says that doing it twice differs from doing it once and from doing nothing, and
  `opposite` names the operation that "the opposite" means after it.
  """

  name: str
  takes: str
  gives: str
  pseudo: str
  code: str
  fn: Callable  # (list, parameter or None) -> new list; raises IndexError on some empty lists
  confusion: str
  params: tuple[int, ...] = ()
  repeatable: bool = False
  opposite: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Readout:
  """The final clause. `running` gives the values that lead to the answer, one an item."""

  name: str
  takes: str
  pseudo: str
  expression: str
  fn: Callable  # (list, None) -> answer
  confusion: str
  running: Callable | None = None
  needs: int = 1  # items that the list must have
  distinct: int = 6  # outputs that differ among the ten tests of a problem, at least


def _swap(a, k):
  b = list(a)
  b[0], b[-1] = b[-1], b[0]
  return b


def _keep(condition):
  return f'a = [x for x in a if {condition}]'


def _each(expression):
  return f'a = [{expression} for x in a]'


_LIMITS = (2, 3, 4, 5, 6, 7)
_AMOUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
_ENDS = (1, 2, 3)


def _filter(name, pseudo, condition, fn, confusion, params=(), takes=INT):
  return Op(name, takes, takes, pseudo, _keep(condition), fn, confusion, params)


def _map(name, pseudo, expression, fn, confusion, params=(), repeatable=False, opposite=''):
  return Op(name, INT, INT, pseudo, _each(expression), fn, confusion, params, repeatable, opposite)


def _order(name, pseudo, code, fn, confusion, params=(), repeatable=False, opposite='', takes=ANY):
  return Op(name, takes, takes, pseudo, code, fn, confusion, params, repeatable, opposite)


_INT_OPS = (
  _filter('le', 'keep x <= {k}', 'x <= {k}', lambda a, k: [x for x in a if x <= k], 'lt', _LIMITS),
  _filter('lt', 'keep x < {k}', 'x < {k}', lambda a, k: [x for x in a if x < k], 'le', _LIMITS),
  _filter('ge', 'keep x >= {k}', 'x >= {k}', lambda a, k: [x for x in a if x >= k], 'gt', _LIMITS),
  _filter('gt', 'keep x > {k}', 'x > {k}', lambda a, k: [x for x in a if x > k], 'ge', _LIMITS),
  _filter('even', 'keep even', 'x % 2 == 0', lambda a, k: [x for x in a if x % 2 == 0], 'odd'),
  _filter('odd', 'keep odd', 'x % 2 == 1', lambda a, k: [x for x in a if x % 2 == 1], 'even'),
  _map('add', 'x + {k}', 'x + {k}', lambda a, k: [x + k for x in a], 'sub', _AMOUNTS, True, 'sub'),
  _map('sub', 'x - {k}', 'x - {k}', lambda a, k: [x - k for x in a], 'add', _AMOUNTS, True, 'add'),
  _map('mod', 'x % {k}', 'x % {k}', lambda a, k: [x % k for x in a], 'div', (3, 4, 5)),
  _map('div', 'x // {k}', 'x // {k}', lambda a, k: [x // k for x in a], 'mod', (2, 3, 4), True),
  _map('square', 'x * x', 'x * x', lambda a, k: [x * x for x in a], 'double', (), True),
  _map('double', 'x * 2', 'x * 2', lambda a, k: [x * 2 for x in a], 'square', (), True),
  _map('absdiff', 'abs x - {k}', 'abs(x - {k})', lambda a, k: [abs(x - k) for x in a], 'sub',
       _LIMITS, True),
  _order('sort_asc', 'sort up', 'a = sorted(a)', lambda a, k: sorted(a), 'sort_desc', takes=INT),
  _order('sort_desc', 'sort down', 'a = sorted(a, reverse=True)',
         lambda a, k: sorted(a, reverse=True), 'sort_asc', takes=INT),
  _order('cumsum', 'running sum', 'a = [sum(a[:i + 1]) for i in range(len(a))]',
         lambda a, k: list(itertools.accumulate(a)), 'diffs', (), True, 'diffs', INT),
  _order('diffs', 'differences', 'a = [y - x for x, y in zip(a, a[1:])]',
         lambda a, k: [y - x for x, y in itertools.pairwise(a)], 'cumsum', (), True,
         'cumsum', INT),
  _order('dup', 'each twice', 'a = [x for x in a for _ in range(2)]',
         lambda a, k: [x for x in a for _ in (0, 1)], 'double', (), True, '', INT),
)  # fmt: skip

_ANY_OPS = (
  _order('reverse', 'reverse list', 'a = a[::-1]', lambda a, k: a[::-1], 'swap'),
  _order('swap', 'swap ends', 'a[0], a[-1] = a[-1], a[0]', _swap, 'reverse'),
  _order('dedupe', 'unique', 'a = list(dict.fromkeys(a))',
         lambda a, k: list(dict.fromkeys(a)), 'once'),
  _order('once', 'only singles', _keep('a.count(x) == 1'),
         lambda a, k: [x for x in a if a.count(x) == 1], 'dedupe'),
  _order('drop_first', 'drop first {k}', 'a = a[{k}:]', lambda a, k: a[k:], 'drop_last', _ENDS,
         True, 'drop_last'),
  _order('drop_last', 'drop last {k}', 'a = a[:-{k}]', lambda a, k: a[:-k], 'drop_first', _ENDS,
         True, 'drop_first'),
  _order('take_first', 'take first {k}', 'a = a[:{k}]', lambda a, k: a[:k], 'drop_first', (2, 3)),
  _order('rotl', 'rotate left {k}', 'a = a[{k}:] + a[:{k}]', lambda a, k: a[k:] + a[:k], 'rotr',
         _ENDS, True, 'rotr'),
  _order('rotr', 'rotate right {k}', 'a = a[-{k}:] + a[:-{k}]', lambda a, k: a[-k:] + a[:-k],
         'rotl', _ENDS, True, 'rotl'),
  _order('evpos', 'even places', 'a = a[::2]', lambda a, k: a[::2], 'odpos', (), True, 'odpos'),
  _order('odpos', 'odd places', 'a = a[1::2]', lambda a, k: a[1::2], 'evpos', (), True, 'evpos'),
)  # fmt: skip

_STR_OPS = (
  _filter('longer', 'keep len > {k}', 'len(x) > {k}', lambda a, k: [x for x in a if len(x) > k],
          'shorter', (3, 4), STR),
  _filter('shorter', 'keep len < {k}', 'len(x) < {k}', lambda a, k: [x for x in a if len(x) < k],
          'longer', (4, 5), STR),
  _filter('vowel', 'keep vowel start', f"x[0] in '{VOWELS}'",
          lambda a, k: [x for x in a if x[0] in VOWELS], 'consonant', (), STR),
  _filter('consonant', 'keep consonant start', f"x[0] not in '{VOWELS}'",
          lambda a, k: [x for x in a if x[0] not in VOWELS], 'vowel', (), STR),
  # `alpha` is `sort_asc` in other words: the words of a number and of a text differ.
  _order('alpha', 'sort up', 'a = sorted(a)', lambda a, k: sorted(a), 'alpha_desc', takes=STR),
  _order('alpha_desc', 'sort down', 'a = sorted(a, reverse=True)',
         lambda a, k: sorted(a, reverse=True), 'alpha', takes=STR),
  _order('sort_len', 'sort by len', 'a = sorted(a, key=len)', lambda a, k: sorted(a, key=len),
         'alpha', takes=STR),
  _order('upper', 'upper all', _each('x.upper()'), lambda a, k: [x.upper() for x in a],
         'upper_first', takes=STR),
  _order('upper_first', 'upper first', 'a[0] = a[0].upper()',
         lambda a, k: [a[0].upper(), *a[1:]], 'upper', takes=STR),
  _order('rev_each', 'reverse each', _each('x[::-1]'), lambda a, k: [x[::-1] for x in a],
         'reverse', takes=STR),
  Op('length', STR, INT, 'len of each', _each('len(x)'), lambda a, k: [len(x) for x in a],
     'vowels'),
  Op('vowels', STR, INT, 'vowels of each', _each(f"sum(c in '{VOWELS}' for c in x)"),
     lambda a, k: [sum(c in VOWELS for c in x) for x in a], 'length'),
)  # fmt: skip

_READOUTS = (
  Readout('list', ANY, 'output list', 'a', lambda a, k: a, 'join', needs=2),
  Readout('join', ANY, 'output joined', "' - '.join(map(str, a))",
          lambda a, k: ' - '.join(map(str, a)), 'list', needs=2),
  Readout('first', ANY, 'output first', 'a[0]', lambda a, k: a[0], 'last'),
  Readout('last', ANY, 'output last', 'a[-1]', lambda a, k: a[-1], 'first'),
  Readout('sum', INT, 'output sum', 'sum(a)', lambda a, k: sum(a), 'count',
          lambda a: list(itertools.accumulate(a))),
  Readout('count', INT, 'output count', 'len(a)', lambda a, k: len(a), 'sum',
          lambda a: list(range(1, len(a) + 1)), distinct=4),
  Readout('max', INT, 'output max', 'max(a)', lambda a, k: max(a), 'min',
          lambda a: list(itertools.accumulate(a, max))),
  Readout('min', INT, 'output min', 'min(a)', lambda a, k: min(a), 'max',
          lambda a: list(itertools.accumulate(a, min))),
  Readout('words', STR, 'output words', 'len(a)', lambda a, k: len(a), 'letters',
          lambda a: list(range(1, len(a) + 1)), distinct=4),
  Readout('letters', STR, 'output letters', 'sum(map(len, a))', lambda a, k: sum(map(len, a)),
          'words', lambda a: list(itertools.accumulate(map(len, a)))),
)  # fmt: skip

OPS: dict[str, Op] = {op.name: op for op in (*_INT_OPS, *_ANY_OPS, *_STR_OPS)}
READOUTS: dict[str, Readout] = {r.name: r for r in _READOUTS}


def _groups() -> dict[str, str]:
  """Op or read-out -> smallest name among those that chains of confusions connect it to."""
  group = {name: name for name in (*OPS, *READOUTS)}
  links = [(op.name, op.confusion) for op in (*OPS.values(), *READOUTS.values())]
  for _ in group:
    for one, other in links:
      group[one] = group[other] = min(group[one], group[other])
  return group


CONFUSION_GROUP = _groups()

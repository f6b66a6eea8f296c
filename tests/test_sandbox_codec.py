"""The sandbox's encodings: values and records, and what hostile bytes can do to them."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from o1jax.sandbox import codec, wire

SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats()
KEYS = st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
PLAIN = st.recursive(
  SCALARS,
  lambda inner: (
    st.lists(inner)
    | st.tuples(inner, inner)
    | st.dictionaries(KEYS, inner)
    | st.frozensets(KEYS).map(set)
  ),
  max_leaves=12,
)


def same(a, b):
  """Equal values of equal types, all the way down; NaN is itself."""
  if type(a) is not type(b):
    return False
  if isinstance(a, float):
    return math.isnan(b) if math.isnan(a) else (a, math.copysign(1, a)) == (b, math.copysign(1, b))
  if isinstance(a, list | tuple):
    return len(a) == len(b) and all(map(same, a, b))
  if isinstance(a, dict):
    return list(map(repr, a)) == list(map(repr, b)) and all(map(same, a.values(), b.values()))
  return a == b


@given(PLAIN)
def test_codec_keeps_values_and_types(value):
  assert same(codec.decode(codec.encode(value)), value)


def test_codec_writes_subclasses_as_what_they_hold():
  class Liar(int):
    def __eq__(self, other):
      return True

    __hash__ = int.__hash__
    __index__ = __add__ = __int__ = lambda self, *_: 99

  class Shelf(list):
    def __iter__(self):
      return iter('lies')

  decoded = codec.decode(codec.encode([Liar(5), Shelf([1, 2])]))
  assert decoded == [5, [1, 2]]
  assert [type(x) for x in decoded] == [int, list]


def test_codec_refuses_what_is_not_plain():
  cycle = []
  cycle.append(cycle)
  for value in (cycle, object(), int, (i for i in ()), {1: object()}):
    with pytest.raises(codec.NotPlain):
      codec.encode(value)
  with pytest.raises(codec.TooLarge):
    codec.encode([0] * (codec.MAX_NODES + 1))


@given(st.binary() | st.text().map(str.encode) | PLAIN.map(lambda v: repr(v).encode()))
def test_codec_reads_hostile_bytes_or_raises_value_error(payload):
  with contextlib.suppress(ValueError):
    codec.decode(payload)


@pytest.mark.parametrize(
  'payload',
  [
    '{"t":1}',
    '{"i":"zz"}',
    '{"f":"1"}',
    '{"s":[[1]]}',
    '{"r":0}',
    '{}',
    '{"t":[],"s":[]}',
    '[' * 9**5,
  ],
)
def test_codec_refuses_wrong_tags(payload):
  with pytest.raises(ValueError, match='canonical'):
    codec.decode(payload.encode())


@given(st.binary(max_size=200), st.integers(0, 5))
def test_records_never_fail_and_times_are_finite(report, limit):
  records = wire.unpack_records(report, limit)
  assert len(records) <= limit
  for kind, cpu_s, wall_s, _ in records:
    assert 0 <= kind <= wire.BAIL and 0 <= cpu_s < 1e6 and 0 <= wall_s < 1e6


def test_records_round_trip_and_end_at_rubbish():
  good = wire.pack_record(wire.OUTPUT, 0.5, 1.0, b'abc')
  assert wire.unpack_records(good + good[:-1], 9) == [(wire.OUTPUT, 0.5, 1.0, b'abc')]
  assert wire.unpack_records(wire.pack_record(wire.ERROR, -1.0, math.nan, b''), 9)[0][1:3] == (0, 0)

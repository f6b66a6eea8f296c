"""Reads a compiled program (HLO text): bytes on the interconnect, bytes of memory, large arrays.

What stands in a loop counts as often as the loop runs. Of the branches of a condition the dearest
counts. Bytes are those of one device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable

_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}
_ARRAY = re.compile(r'\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*)$')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{\s*$')
_OPCODE = re.compile(r' ([a-z][a-z0-9-]*)\(')
_OPERAND = re.compile(r'%([\w.-]+)')
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# What moves nothing: names of what is there, and what is computed on the fly.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'iota', 'after-all'}
_FREE |= {'partition-id', 'replica-id', 'opt-barrier', 'while', 'conditional', 'call'}
_SLICES = {'dynamic-slice', 'slice', 'gather'}


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array of a program."""

  dtype: str
  dims: tuple[int, ...]
  fast: bool  # in a memory of the chip itself (TPU: S(1) and up), not in the large one

  @property
  def bytes(self) -> int:
    """Without the padding of its layout."""
    return math.ceil(math.prod(self.dims) * _width(self.dtype))

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  results: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str  # what follows the operands
  is_root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective with how often it runs."""

  kind: str
  payload: int  # bytes: of the gathered result, of the operands of a reduction
  group: int  # devices that take part
  times: int

  @property
  def sent(self) -> float:
    """Bytes that one device sends in all, by the ring algorithm of its kind."""
    share = (self.group - 1) / self.group
    factor = {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share)
    return self.payload * factor * self.times


class Program:
  """A compiled program.

  `unknown_trips` is how often a loop runs whose count the program does not know: one that ends
  when its data says so, as decoding does.
  """

  def __init__(self, text: str, *, unknown_trips: int = 1):
    self._unknown_trips = unknown_trips
    self._computations: dict[str, dict[str, Instruction]] = {}
    self._devices = 1
    if found := re.search(r'num_partitions=(\d+)', text):
      self._devices = int(found[1])
    current, entry = {}, None
    for line in text.splitlines():
      if header := _COMPUTATION.match(line):
        current = self._computations.setdefault(header[2], {})
        entry = header[2] if header[1] else entry
      elif (parsed := _parse(line)) is not None:
        current[parsed.name] = parsed
    if entry is None:
      raise ValueError('this is no HLO module: it has no ENTRY computation')
    self._entry = entry

  @functools.cached_property
  def collectives(self) -> list[Collective]:
    """All that run, equal ones together."""
    counted = Counter()
    for (kind, payload, group), times in self._collectives_of(self._entry).items():
      counted[kind, payload, group] += times
    return [Collective(*key, times) for key, times in counted.items()]

  @property
  def sent(self) -> float:
    """Bytes that one device sends over the interconnect."""
    return sum(c.sent for c in self.collectives)

  @functools.cached_property
  def traffic(self) -> float:
    """Bytes read from and written to the large memory.

    Operands and results of everything that is not fused into something else. Of an array that is
    only sliced, or only changed in a slice, the slice counts.
    """
    return self._traffic_of(self._entry)

  def largest(self, count: int) -> list[tuple[Shape, str]]:
    """The largest arrays that are computed, with where in the source they come from."""
    found: dict[str, tuple[Shape, str]] = {}
    for name in self._running(self._entry):
      for line in self._computations[name].values():
        if line.opcode in _FREE:
          continue
        for shape in line.results:
          origin = re.search(r'op_name="([^"]*)"', line.attributes)
          found.setdefault(str(shape), (shape, origin[1] if origin else line.name))
    return sorted(found.values(), key=lambda item: -item[0].bytes)[:count]

  def _running(self, name: str) -> Iterable[str]:
    """The computations whose instructions have arrays of their own, not those of fusions."""
    yield name
    for line in self._computations[name].values():
      for inner in _called(line) if line.opcode != 'fusion' else ():
        yield from self._running(inner)

  @functools.cache  # noqa: B019 - a program is small beside what it describes
  def _collectives_of(self, name: str) -> Counter:
    counted: Counter = Counter()
    lines = self._computations[name]
    marks = ' '.join(line.attributes for line in lines.values() if line.opcode == 'custom-call')
    # TPU: a collective that is spread over several fusions stands in each; its start counts.
    again = name.startswith('async_collective_fusion') or 'AsyncCollectiveDone' in marks
    for line in lines.values():
      kind = line.opcode.removesuffix('-start')
      if kind in COLLECTIVES and not again:
        if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):
          kind = 'reduce-scatter'  # TPU: fused with the slice that is kept
        counted[kind, self._payload(kind, line, lines), self._group(line.attributes)] += 1
      for inner, times in self._calls(line, lambda c: _total(self._collectives_of(c))):
        for key, n in self._collectives_of(inner).items():
          counted[key] += n * times
    return counted

  @functools.cache  # noqa: B019
  def _traffic_of(self, name: str) -> float:
    lines = self._computations[name]
    total = 0.0
    for line in lines.values():
      total += self._own_traffic(line, lines)
      if line.opcode != 'fusion':
        calls = self._calls(line, self._traffic_of)
        total += sum(times * self._traffic_of(inner) for inner, times in calls)
    return total

  def _calls(self, line: Instruction, cost) -> list[tuple[str, int]]:
    """Computations that an instruction runs, and how often; of branches the one of most `cost`."""
    inner = _called(line)
    if line.opcode == 'while':
      trips = self._trips(line)
      return [(name, trips) for name in inner]
    if line.opcode == 'conditional':
      return [(max(inner, key=cost), 1)]
    return [(name, 1) for name in inner]

  def _trips(self, line: Instruction) -> int:
    """How often a loop runs: as XLA says, or as its condition compares a counter with a number."""
    if said := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line.attributes):
      return int(said[1])
    condition = self._computations[re.search(r'condition=%?([\w.-]+)', line.attributes)[1]]
    root = next(x for x in condition.values() if x.is_root)
    limits = [condition[o] for o in root.operands if condition[o].opcode == 'constant']
    if root.opcode == 'compare' and 'direction=LT' in root.attributes and len(limits) == 1:
      return int(re.match(r'\d+', limits[0].attributes)[0])
    return self._unknown_trips

  def _payload(self, kind: str, line: Instruction, lines: dict[str, Instruction]) -> int:
    if kind == 'all-gather':
      results = line.results
      if line.opcode.endswith('-start'):  # (operands..., results...)
        results = results[len(line.operands) : 2 * len(line.operands)]
      return sum(shape.bytes for shape in results)
    return sum(shape.bytes for o in line.operands for shape in lines[o].results)

  def _group(self, attributes: str) -> int:
    """Devices of a replica group, in any of HLO's four spellings."""
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', attributes):
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
      # A part of an axis is spelt 'axis':(before)size.
      names = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
      return math.prod(int(part or sizes[name]) for name, part in names)
    if found := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
      return int(found[2])
    if found := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
      return len(found[1].split(','))
    return self._devices

  def _own_traffic(self, line: Instruction, lines: dict[str, Instruction]) -> float:
    if line.opcode in _FREE or line.opcode.endswith(('-done', '-update')):
      return 0.0
    if line.opcode == 'fusion':
      return self._fusion_traffic(line, lines)
    sizes = [sum(_slow(shape) for shape in lines[o].results) for o in line.operands]
    if line.opcode in _SLICES:
      return 2.0 * sum(map(_slow, line.results))
    if line.opcode in ('dynamic-update-slice', 'scatter'):
      return 2.0 * sizes[-1 if line.opcode == 'scatter' else 1]
    results = line.results[: len(line.operands)] if line.opcode.endswith('-start') else line.results
    return sum(sizes) + sum(map(_slow, results))

  def _fusion_traffic(self, line: Instruction, lines: dict[str, Instruction]) -> float:
    body = _called(line)[0]
    written = self._written(body)
    total = sum(
      0 if shape.fast else size for shape, size in zip(line.results, written, strict=False)
    )
    for at, operand in enumerate(line.operands):
      full = sum(map(_slow, lines[operand].results))
      total += min(full, self._read(body, at, full)) if full else 0
    return total

  def _written(self, fusion: str) -> list[float]:
    """Bytes that a fusion writes of each of its results: of an array changed in a slice, that."""
    body = self._computations[fusion]
    root = next(x for x in body.values() if x.is_root)
    sizes: list[float] = []
    for part in [body[o] for o in root.operands] if root.opcode == 'tuple' else [root]:
      if part.opcode == 'dynamic-update-slice':
        sizes.append(body[part.operands[1]].results[0].bytes)
      elif part.opcode == 'fusion':
        sizes += self._written(_called(part)[0])
      else:
        sizes.append(sum(shape.bytes for shape in part.results))
    return sizes

  @functools.cache  # noqa: B019
  def _uses(self, fusion: str) -> dict[str, list[tuple[Instruction, int]]]:
    """Who reads each value of a fusion, and as which operand; parameters also by their number."""
    uses: dict[str, list[tuple[Instruction, int]]] = {}
    body = self._computations[fusion]
    for reader in body.values():
      for at, operand in enumerate(reader.operands):
        uses.setdefault(operand, []).append((reader, at))
    return uses | {
      re.match(r'\d+', x.attributes)[0]: uses.get(x.name, [])
      for x in body.values()
      if x.opcode == 'parameter'
    }

  def _read(self, fusion: str, operand: int | str, full: float) -> float:
    """Bytes that a fusion reads of an operand of `full` bytes; of a sliced one, the slices."""
    total = 0.0
    for reader, at in self._uses(fusion).get(str(operand), ()):
      if reader.opcode in _SLICES and at == 0:
        total += sum(shape.bytes for shape in reader.results)
      elif reader.opcode == 'bitcast':
        total += self._read(fusion, reader.name, full)
      elif reader.opcode == 'fusion':
        total += self._read(_called(reader)[0], at, full)
      elif not (reader.opcode == 'dynamic-update-slice' and at == 0):
        return full
    return total


def _parse(line: str) -> Instruction | None:
  found = _INSTRUCTION.match(line)
  opcode = found and _OPCODE.search(f' {found[3]}')
  if not opcode:
    return None
  shapes = f' {found[3]}'[: opcode.start()]
  rest = f' {found[3]}'[opcode.end() :]
  inside, attributes = _split_operands(rest)
  results = tuple(
    Shape(dtype, tuple(int(d) for d in dims.split(',') if d), bool(re.search(r'S\([1-9]', layout)))
    for dtype, dims, layout in _ARRAY.findall(shapes)
  )
  if opcode[1] in ('constant', 'parameter'):
    return Instruction(found[2], opcode[1], results, (), inside, bool(found[1]))
  operands = tuple(_OPERAND.findall(inside))
  return Instruction(found[2], opcode[1], results, operands, attributes, bool(found[1]))


def _split_operands(rest: str) -> tuple[str, str]:
  """Text after an opcode's parenthesis -> (what is inside, what follows)."""
  depth = 1
  for at, char in enumerate(rest):
    depth += (char == '(') - (char == ')')
    if not depth:
      return rest[:at], rest[at + 1 :]
  return rest, ''


def _called(line: Instruction) -> list[str]:
  """Computations that an instruction runs; not the scalar functions of reductions."""
  if line.opcode == 'while':
    return re.findall(r'body=%?([\w.-]+)', line.attributes)
  if line.opcode == 'conditional':
    if found := re.search(r'branch_computations=\{([^}]*)\}', line.attributes):
      return _OPERAND.findall(found[1])
    return re.findall(r'(?:true|false)_computation=%?([\w.-]+)', line.attributes)
  if line.opcode == 'call':
    return re.findall(r'to_apply=%?([\w.-]+)', line.attributes)
  if line.opcode in ('fusion', 'async-start'):
    return re.findall(r'calls=%?([\w.-]+)', line.attributes)
  return []


def _total(counted: Counter) -> float:
  return sum(Collective(*key, times).sent for key, times in counted.items())


def _slow(shape: Shape) -> int:
  return 0 if shape.fast else shape.bytes


def _width(dtype: str) -> float:
  """Bytes of one number."""
  if dtype in _BYTES:
    return _BYTES[dtype]
  bits = re.match(r'[a-z]+?(\d+)', dtype)
  return int(bits[1]) / 8 if bits and dtype != 'token' else 0

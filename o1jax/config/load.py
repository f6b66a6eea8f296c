"""Reads a config file and its overrides, and says everything that is wrong with them at once."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
import yaml

from o1jax.config.base import Section
from o1jax.config.sections import FREE_KEYS, Config

SectionT = TypeVar('SectionT', bound=Section)

_MODEL_FILES = ('config.json', '*.safetensors', 'tokenizer*')


class ConfigError(ValueError):
  """All faults of a config; `str()` is the text for the terminal, one fault a line."""

  def __init__(self, source: str, faults: Sequence[str]):
    self.faults = tuple(faults)
    count = 'one fault' if len(faults) == 1 else f'{len(faults)} faults'
    super().__init__('\n'.join([f'{source}: {count}', *(f'  {fault}' for fault in faults)]))


def load(
  path: str | pathlib.Path,
  overrides: Sequence[str] = (),
  schema: type[SectionT] = Config,
  *,
  need_files: bool = True,
) -> SectionT:
  """Reads the YAML file at `path`, applies `section.key=value` overrides, and checks the whole.

  Keys that neither names keep their defaults. Values of overrides are read as YAML, so `null`,
  `true` and `[1, 2]` mean what they mean in the file. `model.path` and `data.source` have to exist,
  unless `need_files` is False. `schema` is the section that holds all others: a program with other
  settings brings its own.

  Raises:
    ConfigError: with every fault of file and overrides. Relations between sections are judged
      with defaults in the place of faulty values, unless they speak of one of those.
  """
  given = _read(pathlib.Path(path))
  faults = _apply(given, overrides)
  return _resolve(schema, given, str(path), faults, need_files)


def check(
  given: Mapping[str, Any], source: str = 'config', schema: type[SectionT] = Config
) -> SectionT:
  """Checks a nested dictionary as `load` checks a file; raises `ConfigError`."""
  return _resolve(schema, _copy(given), source, [])


def to_yaml(config: Section) -> str:
  """The resolved config, every key spelled out; `load` reads it back to an equal one."""
  return yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)


def diff(
  old: Section | Mapping[str, Any],
  new: Section | Mapping[str, Any],
  ignore: Collection[str] = FREE_KEYS,
) -> list[str]:
  """Lines `key: old -> new` for every leaf in which two resolved configs differ.

  `ignore` holds keys and sections that do not matter. Keys of one side only are shown as absent.
  """
  before, after = (dict(_leaves(_plain(side))) for side in (old, new))
  lines = []
  for key in sorted(before.keys() | after.keys()):
    if any(key == name or key.startswith(f'{name}.') for name in ignore):
      continue
    values = [repr(side[key]) if key in side else '(absent)' for side in (before, after)]
    if values[0] != values[1]:
      lines.append(f'{key}: {values[0]} -> {values[1]}')
  return lines


def closest(word: str, candidates: Collection[str]) -> str:
  """`'; did you mean X?'` for the candidate nearest to `word`, or an empty string."""
  near = _near(word, candidates)
  return f'; did you mean {near[0]}?' if near else ''


def _near(word: str, candidates: Collection[str]) -> list[str]:
  return difflib.get_close_matches(word, sorted(candidates), n=1, cutoff=0.6)


class _Loader(yaml.SafeLoader):
  """A SafeLoader to which a repeated key is an error: plain YAML lets the last one win."""

  def construct_mapping(self, node, deep=False):
    seen = set()
    for key_node, _ in node.value:
      if not isinstance(key_node, yaml.ScalarNode):
        continue
      if key_node.value in seen:
        text = f'key {key_node.value!r} stands twice; remove one'
        raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
      seen.add(key_node.value)
    return super().construct_mapping(node, deep)


def _read(path: pathlib.Path) -> dict[str, Any]:
  """The file as a dictionary."""
  try:
    given = yaml.load(path.read_text(encoding='utf-8'), _Loader)
  except FileNotFoundError:
    there = [str(p) for p in path.parent.glob('*.yaml')]
    text = f'no such file{closest(str(path), there)}'
    if there and not text.endswith('?'):
      text += f'; there are {", ".join(sorted(there))}'
    raise ConfigError(str(path), [text]) from None
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(str(path), [f'cannot be read: {error}']) from None
  except yaml.MarkedYAMLError as error:
    mark = error.problem_mark
    where = f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''
    raise ConfigError(str(path), [f'not YAML: {where}{error.problem}']) from None
  except yaml.YAMLError as error:
    raise ConfigError(str(path), [f'not YAML: {error}']) from None
  if given is None:
    return {}
  if not isinstance(given, dict):
    text = f'holds a {type(given).__name__}; expected sections, as in `rl: {{lr: 1e-3}}`'
    raise ConfigError(str(path), [text])
  return _copy(given)


def _apply(given: dict[str, Any], overrides: Sequence[str]) -> list[str]:
  """Writes overrides into `given`; returns the faults of their form."""
  faults = []
  for override in overrides:
    key, equals, text = override.partition('=')
    names = key.strip().split('.')
    if not equals or not all(names):
      faults.append(f'{override!r} is no override; expected section.key=value')
      continue
    try:
      value = yaml.load(text, _Loader)
    except yaml.YAMLError:
      value = text
    inner = given
    for name in names[:-1]:
      if not isinstance(inner.get(name), dict):
        inner[name] = {}
      inner = inner[name]
    inner[names[-1]] = value
  return faults


def _resolve(
  schema: type[SectionT],
  given: dict[str, Any],
  source: str,
  faults: list[str],
  need_files: bool = True,
) -> SectionT:
  """The checked config; raises with `faults` and all that checking finds."""
  defaults = schema().model_dump()
  raw = _merge(defaults, given)
  faulty: set[str] = set()
  config, errors = _validate(schema, raw, defaults)
  while errors:
    concerned = [_concerned(error, defaults) for error in errors]
    for error, keys in zip(errors, concerned, strict=True):
      if error['type'] != 'relation' or not keys & faulty:
        faults.append(_describe(error, defaults))
    # Sound values in the place of faulty ones: what is left can then be judged.
    for key in set().union(*concerned):
      _reset(raw, defaults, key.split('.'))
      faulty.add(key)
    config, errors = _validate(schema, raw, defaults)
  faults += _missing_files(raw) if need_files else ()
  if faults:
    raise ConfigError(source, faults)
  return config


def _validate(
  schema: type[SectionT], raw: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[SectionT | None, list[Any]]:
  """The config, or pydantic's errors about it, one a key."""
  try:
    return schema.model_validate(raw), []
  except pydantic.ValidationError as error:
    return None, _by_key(error.errors(include_url=False), defaults)


def _by_key(errors: Sequence[Any], defaults: Mapping[str, Any]) -> list[Any]:
  """The errors with those of a key's several types joined: pydantic has one for each type."""
  found: list[Any] = []
  several: dict[tuple, Any] = {}  # by key, the error of its types together
  for error in errors:
    inner: Any = defaults
    length = 0
    for name in error['loc']:
      if not isinstance(inner, Mapping):
        break  # the name is that of one of the key's types
      inner = inner.get(name)
      length += 1
    loc = error['loc'][:length]
    if length == len(error['loc']):
      found.append(error)
    elif loc in several:
      several[loc]['msg'] += error['msg'].replace('Input should be', ' or')
    else:
      several[loc] = {**error, 'loc': loc}
      found.append(several[loc])
  return found


def _describe(error: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
  """One fault as a line: the key, its value, what was expected."""
  key = '.'.join(map(str, error['loc']))
  if error['type'] == 'relation':
    text = error['ctx']['text']
    spelled_out = text.startswith(key)  # relations of the whole have no key
    return text if spelled_out else f'{key}: {text}'
  if error['type'] == 'extra_forbidden':
    value = '' if isinstance(error['input'], dict) else f'={error["input"]!r}'
    return f'{key}{value}: no such key{_suggest(key, defaults)}'
  if error['type'] == 'model_type':
    return f'{key}={error["input"]!r}: expected a section of keys'
  expected = error['msg'].replace('Input should be', 'expected')
  return f'{key}={error["input"]!r}: {expected}'


def _suggest(key: str, defaults: Mapping[str, Any]) -> str:
  """The keys meant by an unknown one: of its name elsewhere, else of a like name here or there."""
  parent, _, name = key.rpartition('.')
  prefix = f'{parent}.' if parent else ''
  siblings: Any = defaults
  for part in parent.split('.') if parent else ():
    siblings = siblings[part]
  names: dict[str, list[str]] = {}
  for leaf, _ in _leaves(defaults):
    names.setdefault(leaf.rpartition('.')[2], []).append(leaf)
  here = [f'{prefix}{near}' for near in _near(name, siblings)]
  there = names.get(name) or (not here and [leaf for n in _near(name, names) for leaf in names[n]])
  meant = there or here
  inside = [leaf for leaf in meant if prefix and leaf.startswith(prefix)] or meant
  return f'; did you mean {" or ".join(inside[:3])}?' if inside else ''


def _concerned(error: Mapping[str, Any], defaults: Mapping[str, Any]) -> set[str]:
  """Dotted keys that an error speaks of, the one meant by a misspelt key among them."""
  loc = tuple(map(str, error['loc']))
  key = '.'.join(loc)
  if error['type'] == 'relation':
    return {'.'.join((*loc, name)) for name in error['ctx']['keys']}
  if error['type'] == 'extra_forbidden':
    meant = _suggest(key, defaults).removeprefix('; did you mean ').removesuffix('?')
    return {key, *(meant.split(' or ') if meant else ())}
  return {key}


def _reset(raw: dict[str, Any], defaults: Mapping[str, Any], names: Sequence[str]) -> None:
  """Puts the default at a dotted key, or removes a key that has none."""
  inner: Any = raw
  for name in names[:-1]:
    defaults = defaults[name]
    if not isinstance(inner[name], dict):  # the section itself is the fault
      inner[name] = _copy(defaults)
    inner = inner[name]
  if names[-1] in defaults:
    inner[names[-1]] = _copy(defaults[names[-1]])
  else:
    inner.pop(names[-1], None)


def _missing_files(raw: Mapping[str, Any]) -> Iterator[str]:
  """Faults of the two paths that a config names, where its schema has them."""
  model, source = raw.get('model', {}).get('path'), raw.get('data', {}).get('source')
  if isinstance(model, str) and model != 'embedded':
    folder = pathlib.Path(model)
    if not folder.is_dir():
      yield f"model.path={model!r}: no such folder; use a folder in the Hub's layout, or 'embedded'"
    else:
      lacking = [pattern for pattern in _MODEL_FILES if not any(folder.glob(pattern))]
      if lacking:
        yield f'model.path={model!r}: the folder lacks {", ".join(lacking)}'
  if isinstance(source, str) and source != 'embedded' and not pathlib.Path(source).exists():
    yield f"data.source={source!r}: no such file; use a file of problems, or 'embedded'"


def _copy(value: Any) -> Any:
  """Nested dictionaries copied, leaves shared."""
  return {str(k): _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _merge(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """`given` over `defaults`, section by section; an empty section keeps all of its defaults."""
  merged = _copy(defaults)
  for key, value in _copy(given).items():
    if isinstance(merged.get(key), dict) and isinstance(value, Mapping):
      merged[key] = _merge(merged[key], value)
    elif not (value is None and isinstance(merged.get(key), dict)):
      merged[key] = value
  return merged


def _plain(config: Section | Mapping[str, Any]) -> Mapping[str, Any]:
  return config.model_dump(mode='json') if isinstance(config, Section) else config


def _leaves(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Dotted key and value of everything that is no section."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value

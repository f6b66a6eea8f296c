"""Compiled programs are kept between processes, where they may be."""

import json
import os
import subprocess
import sys

import jax
import pytest

from o1jax.run.compiled import keep_compiled

# Compiles one program that takes its time, and tells the folder and how often the cache had it.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from o1jax.run.compiled import keep_compiled

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith('cache_hits')))
folder = keep_compiled(sys.argv[1])

def slow(x):
  for i in range(60):
    x = jnp.sin(x @ x + i) * jnp.cumsum(x, axis=i % 2)
  return x.sum()

value = float(jax.jit(jax.grad(slow))(jnp.ones((8, 8)) / 64)[0, 0])
print(json.dumps([str(folder), sum(hits), value]))
"""


def compiled(folder, **extra):
  env = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_COMPILATION', 'JAX_PERS'))}
  command = [sys.executable, '-W', 'error::UserWarning', '-c', PROGRAM, folder]
  got = subprocess.run(command, env=env | extra, capture_output=True, text=True, timeout=300)
  assert got.returncode == 0, got.stderr[-2000:]
  return json.loads(got.stdout)


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
  first = compiled('auto', XDG_CACHE_HOME=str(tmp_path))
  second = compiled('auto', XDG_CACHE_HOME=str(tmp_path))
  assert first[0] == second[0] == str(tmp_path / 'o1jax' / 'compiled')
  assert first[1] == 0 < second[1]
  assert first[2] == second[2]
  assert compiled(str(tmp_path / 'mine'))[1] == 0  # another folder, which is empty
  assert any((tmp_path / 'mine').iterdir())


def test_a_program_whose_writer_was_killed_is_compiled_and_kept_again(tmp_path):
  compiled(str(tmp_path))
  program = max(tmp_path.glob('*-cache'), key=lambda file: file.stat().st_size)
  program.write_bytes(program.read_bytes()[:100])
  program.with_name(program.name.removesuffix('cache') + 'atime').unlink()
  compiled(str(tmp_path))  # fails on a warning: JAX warns of what it cannot read or write
  assert program.stat().st_size > 100
  assert compiled(str(tmp_path))[1] == len(list(tmp_path.glob('*-cache')))


@pytest.fixture
def unset():
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  jax.config.update('jax_compilation_cache_dir', before)


def test_nothing_is_kept_where_it_may_not(unset, tmp_path, monkeypatch, caplog):
  assert keep_compiled('') is None
  (tmp_path / 'file').touch()
  assert keep_compiled(str(tmp_path / 'file' / 'below')) is None
  assert 'cannot be written' in caplog.text
  monkeypatch.setattr('o1jax.run.compiled.distributed.count', lambda: 2)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert keep_compiled('auto') is None
  assert jax.config.jax_compilation_cache_dir is None


def test_what_the_user_told_jax_stays(unset, tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  assert keep_compiled('auto') == keep_compiled('') == tmp_path

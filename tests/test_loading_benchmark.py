"""The loading benchmark runs, and loading holds to its bound on host memory."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / 'benchmarks' / 'loading.py'


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize('files', [1, 2])
def test_peak_host_memory_is_the_parameters_and_a_tensor(files):
  command = [sys.executable, str(SCRIPT), '--megabytes', '120', '--repeats', '1', '--no-reference']
  command += ['--files', str(files)]
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert 1e8 < result['bytes'] < 1.4e8
  assert result['peak_bytes'] > 0.9 * result['bytes']  # all of it was read
  assert result['peak_above_parameters_bytes'] < 1.1 * result['largest_tensor_bytes']

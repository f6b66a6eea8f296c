"""Eight virtual CPU devices, strict ranks, no network: set before JAX is imported."""

import os
import shutil
import signal
import tempfile

# What a shell starts in the background ignores Ctrl-C, and so would all programs started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs here are small: compiling them well takes far longer than running them.
FLAGS = ('--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0')
for flag in FLAGS:
  if flag.split('=')[0] not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()
# All processes of a session share what they compile, and leave nothing in the user's cache.
_COMPILED = None
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _COMPILED = os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='o1jax-compiled-')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['TRANSFORMERS_OFFLINE'] = '1'
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# A slow moment of a shared machine is no failure.
hypothesis.settings.register_profile('o1jax', deadline=None)
hypothesis.settings.load_profile('o1jax')


def pytest_unconfigure():
  if _COMPILED:  # in the process that made it
    shutil.rmtree(_COMPILED, ignore_errors=True)

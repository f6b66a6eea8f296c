"""Eight virtual CPU devices, strict ranks, no network: set before JAX is imported."""

import os
import signal

# What a shell starts in the background ignores Ctrl-C, and so would all programs started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs here are small: compiling them well takes far longer than running them.
FLAGS = ('--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0')
for flag in FLAGS:
  if flag.split('=')[0] not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['TRANSFORMERS_OFFLINE'] = '1'
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# A slow moment of a shared machine is no failure.
hypothesis.settings.register_profile('o1jax', deadline=None)
hypothesis.settings.load_profile('o1jax')

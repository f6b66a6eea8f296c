"""What a run takes on devices that are not there: memory, communication, time, cost.

    python -m o1jax.plan --config FILE --topology v5e:4x4 [section.key=value ...]
        [--model-config FILE] [--steps a,b] [--price USD] [--efficiency E] [--dump DIR] [--json]

Every jitted step of the run is compiled for the topology, without the hardware. TPUs (v5e, v5p,
v6e) take libtpu (`pip install 'o1jax[tpu-plan]'`). `h100` and `cpu` are compiled for as many
virtual CPU devices: layout and collectives are the program's, memory is by another compiler.
Only the model's config.json is read; `--model-config` names another one.

Exit codes: 0 all steps fit, 1 some do not, 2 a fault of the config or of the command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from o1jax import config as config_lib
from o1jax.config import ConfigError
from o1jax.plan import chips


def main(argv: Sequence[str] | None = None) -> int:
  """Command line; returns the exit code."""
  options = _parser().parse_intermixed_args(argv)
  try:
    topology = chips.parse(options.topology)
    config = config_lib.load(options.config, options.overrides, need_files=False)
    chips.prepare(topology)
    from o1jax.plan import plan  # JAX starts with what was prepared

    result = plan.make(
      config,
      topology,
      model_config=options.model_config,
      wanted=options.steps and options.steps.split(','),
      search=not options.no_search,
      efficiency=options.efficiency,
      price=options.price,
      dump=options.dump,
    )
  except ConfigError as error:
    print(error, file=sys.stderr)
    return 2
  if options.json:
    print(json.dumps(plan.to_json(result), indent=2))
  else:
    plan.show(result)
  return 0 if all(found.fits for found in result.estimates) else 1


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m o1jax.plan',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--config', required=True, metavar='FILE', help='YAML file of settings of a run')
  add('overrides', nargs='*', metavar='section.key=value', help='set over the file')
  add('--topology', required=True, metavar='CHIP:SHAPE', help='v5e:4x4, v5p:2x2x2, h100:8, cpu:8')
  add('--model-config', metavar='FILE', help="a Hub config.json in place of model.path's")
  add('--steps', metavar='a,b', help='only these steps')
  add('--no-search', action='store_true', help='do not look for the most rows that fit')
  add('--price', type=_positive, metavar='USD', help='of one chip for an hour')
  add(
    '--efficiency',
    type=_share,
    default=1.0,
    metavar='E',
    help='share of the roofline that is reached, for hours and cost; default 1: a lower bound',
  )
  add('--dump', metavar='DIR', help='keep the text of the compiled programs (HLO) there')
  add('--json', action='store_true', help='print JSON in place of tables')
  return parser


def _positive(text: str) -> float:
  value = float(text)
  if not value > 0:
    raise argparse.ArgumentTypeError(f'{text} is no price; use a positive number of dollars')
  return value


def _share(text: str) -> float:
  value = float(text)
  if not 0 < value <= 1:
    raise argparse.ArgumentTypeError(f'{text} is no share; use a number above 0, at most 1')
  return value


if __name__ == '__main__':
  sys.exit(main())

"""Judges the corpus in one tier and prints, as JSON, the tier and every disagreement.

`PYTHONPATH=. python tests/sandbox/run_corpus.py TIERS [DENY]`: TIERS as letters, strongest
first; DENY as words: `docker` takes away what Docker's default filter denies, `landlock` and
`seccomp` those layers.
"""

from __future__ import annotations

import json
import os
import sys

import broken
import correct
import deny
import forged
import hostile

from o1jax.sandbox.pool import Pool
from o1jax.sandbox.protocol import Limits

CASES = (
  *correct.CASES,
  *broken.CASES,
  *forged.CASES,
  *hostile.RESOURCES,
  *hostile.PROCESSES,
  *hostile.KERNEL,
  *hostile.FILES,
  *hostile.HUNTS,
)
LIMITS = Limits(cpu_s=0.25, timeouts=1)


def main(tiers: str, denied: list[str]) -> dict:
  if denied:
    deny.deny(denied)
  with Pool(6, LIMITS, tiers=tuple(tiers)) as pool:
    verdicts = pool.judge([case.job for case in CASES])
    tier, layers = pool.tier, pool.layers
  disagreements = [
    {'name': case.name, 'expected': case.expected, 'status': verdict.status,
     'tests': [test.status for test in verdict.tests], 'stderr': verdict.stderr[-300:]}
    for case, verdict in zip(CASES, verdicts, strict=True)
    if verdict.status not in case.expected
  ]  # fmt: skip
  return {
    'tier': tier,
    'uid': os.geteuid(),
    'layers': layers,
    'programs': len(CASES),
    'disagreements': disagreements,
  }


if __name__ == '__main__':
  print(json.dumps(main(sys.argv[1], sys.argv[2:]), indent=1))

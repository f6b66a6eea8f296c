"""The procedural problem family of the embedded default; `docs/family.md` is its datasheet."""

from o1jax.data.family.compose import problem_of, problems
from o1jax.data.family.corpus import MIX, Document, corpus
from o1jax.data.family.noise import NoiseTable
from o1jax.data.family.spec import (
  Clause,
  Spec,
  composition,
  problem_id,
  program,
  reference_steps,
  spec_of,
  statement,
  trace,
)
from o1jax.data.family.splits import SPLITS, split_of
from o1jax.data.family.testcases import (
  TracedTest,
  parse_tests,
  real_tests,
  render_tests,
  shuffled_answers,
  tcg_prompt,
  traced,
)

__all__ = [
  'MIX',
  'SPLITS',
  'Clause',
  'Document',
  'NoiseTable',
  'Spec',
  'TracedTest',
  'composition',
  'corpus',
  'parse_tests',
  'problem_id',
  'problem_of',
  'problems',
  'program',
  'real_tests',
  'reference_steps',
  'render_tests',
  'shuffled_answers',
  'spec_of',
  'split_of',
  'statement',
  'tcg_prompt',
  'trace',
  'traced',
]

"""Generation: cached decoding, the batch sampler, guided descent and tree search with roll-outs."""

from o1jax.sampling.distinct import Distinct, NewPath, NewPaths
from o1jax.sampling.draw import GREEDY, SAMPLE, Drawing
from o1jax.sampling.forest import Forest, Rollout
from o1jax.sampling.guided import Child, Choice, Descent, Descents, Guided, StepIds
from o1jax.sampling.keys import row_keys, stable_id
from o1jax.sampling.mcts import Search
from o1jax.sampling.sampler import Sampler, Samples
from o1jax.sampling.scorer import PrmScorer, Scorer
from o1jax.sampling.tree_scorer import TreeScorer

__all__ = [
  'GREEDY',
  'SAMPLE',
  'Child',
  'Choice',
  'Descent',
  'Descents',
  'Distinct',
  'Drawing',
  'Forest',
  'Guided',
  'NewPath',
  'NewPaths',
  'PrmScorer',
  'Rollout',
  'Sampler',
  'Samples',
  'Scorer',
  'Search',
  'StepIds',
  'TreeScorer',
  'row_keys',
  'stable_id',
]

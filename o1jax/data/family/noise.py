"""How often the base model's corpus reads a phrase rightly.

A real base model is wrong in places, and always in the same places. Here every phrase has its
own share of truth, fixed by a seed: a third of the phrases are more often taken for their
confusion than for what they say (truth U(.25, .40)), the others are mostly right (U(.72, .90)),
and read-outs nearly always (U(.85, .95)). Each occurrence in the corpus is drawn anew.
"""

from __future__ import annotations

import random

from o1jax.data.family import spec as specs
from o1jax.data.family.phrases import CONTEXT_PHRASES, OP_PHRASES, READOUT_PHRASES
from o1jax.data.family.spec import Clause, Spec

MISLEADING, RELIABLE, READOUT = (0.25, 0.40), (0.72, 0.90), (0.85, 0.95)


class NoiseTable:
  """P(truth) of every phrase; the rest of the mass is the confusion of the operation it means.

  Args:
    seed: fixes the whole table; the bundled base model was trained on that of seed 0.
  """

  def __init__(self, seed: int = 0):
    rng = random.Random(f'noise table {seed}')
    self._truth: dict[tuple[str, int], float] = {}
    said = {**OP_PHRASES, **CONTEXT_PHRASES}
    # Each name has one misleading phrase or two (of four), a third in all: with a coin for every
    # phrase the strength of the base would depend on the seed.
    twice = set(rng.sample(sorted(said), round(len(said) / 3)))
    for name, phrases in said.items():
      misleading = rng.sample(range(len(phrases)), 2 if name in twice else 1)
      for i in range(len(phrases)):
        self._truth[name, i] = rng.uniform(*(MISLEADING if i in misleading else RELIABLE))
    for name, said in READOUT_PHRASES.items():
      for i in range(len(said)):
        self._truth[name, i] = rng.uniform(*READOUT)

  def truth(self, clause: Clause) -> float:
    """The probability that an occurrence of the clause's phrase is read rightly."""
    return self._truth[clause.key, clause.phrase]

  def table(self) -> dict[tuple[str, int], float]:
    """(operation, read-out or kind of context clause; index of the phrase) -> P(truth)."""
    return dict(self._truth)

  def misread(self, spec: Spec, rng: random.Random) -> Spec:
    """The spec as one occurrence in the corpus reads it: each clause right or confused by chance.

    A context clause speaks of the step before it as that was read.
    """
    read: list[Clause] = []
    for clause in spec.clauses:
      if clause.context:
        before = read[-1]
        op, k = specs.resolve(clause.context, before.op, before.k, clause.k)
        taken = clause._replace(op=op, k=k)
      else:
        taken = clause
      read.append(taken if rng.random() < self.truth(clause) else specs.confused(taken))
    return Spec(spec.form, spec.kind, tuple(read))

  def greedy(self, spec: Spec) -> float:
    """1.0 where the likelier reading of every clause is the true one, else 0.0."""
    return float(all(self.truth(clause) > 0.5 for clause in spec.clauses))

  def sampled(self, spec: Spec) -> float:
    """The probability that every clause is read rightly."""
    product = 1.0
    for clause in spec.clauses:
      product *= self.truth(clause)
    return product

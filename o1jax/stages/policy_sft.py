"""Step 3: fine-tune the policy on paths whose program passes every test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from o1jax.data.pack import Document, pack
from o1jax.data.pipeline import batches
from o1jax.learn.objectives import sft_loss
from o1jax.stages.context import Run
from o1jax.stages.evaluate import brief
from o1jax.stages.fit import fit
from o1jax.types import Problem, Trajectory


def verified_documents(
  run: Run, trajectories: Iterable[Trajectory], *, limit: int, seed: int
) -> list[Document]:
  """Distinct accepted paths, at most `limit` a problem, the most sampled first.

  A path that the policy finds often is no better evidence than another, but the
  programs of rare paths are the likelier ones to be right by accident.
  """
  problems: dict[str, Problem] = {p.id: p for p in run.train}
  counts: dict[str, dict[tuple, float]] = {}
  for t in trajectories:
    if t.accepted:
      paths = counts.setdefault(t.problem_id, {})
      paths[t.steps] = paths.get(t.steps, 0.0) + t.weight
  documents = []
  for problem_id, paths in counts.items():
    best = sorted(paths, key=lambda steps: (-paths[steps], len(steps)))[:limit]
    documents += [run.encoder.document(problems[problem_id], steps) for steps in best]
  # Text that is encoded anew can have more tokens than the sampler took to write it.
  documents = [d for d in documents if len(d.ids) <= run.row_tokens]
  order = np.random.default_rng(seed).permutation(len(documents))
  return [documents[i] for i in order]


def finetune_policy(run: Run, round_: int, params: Any, found: Sequence[Trajectory]) -> Any:
  """The policy after SFT on everything verified so far."""
  name = f'round{round_}/policy_sft'
  config, params = run.config.policy_sft, run.adapted(params, 'policy')

  def body() -> dict[str, Any]:
    seed = run.config.run.seed * 1000 + round_
    documents = verified_documents(run, found, limit=config.max_paths_per_problem, seed=seed)
    if not documents:
      run.bench.progress.say(f'{name}: skipped: no program passed its tests; the policy stays')
      run.save(name, 'policy', params)
      return {'paths': 0} | brief(run, params, seed=seed)
    rows = pack(documents, run.row_tokens)
    data = batches(rows, batch=config.optim.batch, seed=seed)
    trained, last = fit(
      run.bench, name, 'sft', run.model, params, sft_loss(run.model), data, config.optim
    )
    run.save(name, 'policy', trained)
    result = {'paths': len(documents), 'rows': len(rows.tokens), 'loss': last['loss']}
    return result | brief(run, trained, seed=seed)

  run.stage(name, 'policy SFT on verified paths', body)
  return run.load(name, 'policy')

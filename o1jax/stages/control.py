"""The control of RL: expert iteration on as many sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from o1jax.data.pack import pack
from o1jax.data.pipeline import batches
from o1jax.learn.objectives import sft_loss
from o1jax.sampling.draw import Drawing
from o1jax.stages.context import Run
from o1jax.stages.evaluate import brief, name_ids, sampler
from o1jax.stages.fit import fit
from o1jax.stages.policy_sft import verified_documents
from o1jax.stages.synthesis import as_trajectories
from o1jax.types import Trajectory


def expert_iteration(
  run: Run, policy: Any, found: Sequence[Trajectory], tokens: int, *, seed: int
) -> Any:
  """The control of round 0's RL: SFT on verified samples, with as many sampled tokens.

  Samples come from the policy that RL started from, the same number for every problem; SFT starts
  from it too, takes as many updates as RL if those are more than it takes by itself, and also sees
  the verified paths that its own SFT saw.
  """
  name = 'expert_iteration/rl'
  config = run.config

  def body() -> dict[str, Any]:
    drawn: list[Trajectory] = []
    spent = 0
    draw = sampler(run, Drawing(config.rl.temperature), config.search.rows)
    problems = run.known_problems(0)
    prompts = [run.encoder.prompt(p) for p in problems]
    while spent < tokens:  # one path a problem and pass
      with run.sampling(policy) as (params,):
        batch = draw(params, prompts, seed=seed + spent, ids=name_ids(problems))
      spent += batch.generated
      paths = [run.encoder.steps_of(batch.ids(i)) for i in range(len(problems))]
      drawn += as_trajectories(run, problems, paths, origin=name, version=0)
    limit = config.policy_sft.max_paths_per_problem
    documents = verified_documents(run, [*found, *drawn], limit=limit, seed=seed)
    if not documents:
      run.bench.progress.say(f'{name}: skipped: no program passed its tests; the policy stays')
      run.save(name, 'policy', policy)
      return {'sampled_tokens': spent} | brief(run, policy, seed=seed)
    data = batches(pack(documents, run.row_tokens), batch=config.policy_sft.optim.batch, seed=seed)
    optim = config.policy_sft.optim
    optim = optim.model_copy(update={'steps': max(optim.steps, config.rl.updates)})
    trained, _ = fit(run.bench, name, 'sft', run.model, policy, sft_loss(run.model), data, optim)
    run.save(name, 'policy', trained)
    return {'sampled_tokens': spent} | brief(run, trained, seed=seed)

  run.stage(name, 'control: SFT on verified samples, no RL', body)
  return run.load(name, 'policy')

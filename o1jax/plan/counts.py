"""How often a run calls each step, and the tokens of it: from its config alone.

Upper limits: every path takes `data.max_path_tokens`, every search all of its simulations, no
iteration of RL ends early. Sampling is counted in tokens and given as full calls of `decode`.
"""

from __future__ import annotations

import math

from o1jax.config import Config
from o1jax.plan.step import Step
from o1jax.stages import prm


def trained(config: Config) -> dict[str, int]:
  """Updates of each train step over the whole run."""
  rounds = config.run.rounds
  found = {
    'tcg/sft': config.tcg.sft.steps,
    'tcg/dpo': config.tcg.dpo.steps,
    'tcg/control': config.tcg.dpo.steps if config.tcg.control else 0,
    'policy_sft': config.policy_sft.optim.steps * (rounds + config.rl.control),
    'prm': config.prm.optim.steps * rounds + config.prm.optim_of(True).steps * _renewed(config),
    'rl': config.rl.iterations
    * config.rl.epochs
    * (config.rl.rows // config.rl.minibatch)
    * rounds,
    'rl/replay': config.rl.iterations * config.rl.replay * rounds,
  }
  return {name: steps for name, steps in found.items() if steps}


def sampled(config: Config) -> dict[str, int]:
  """Paths (for `tcg`: test parts) that are sampled, by what for."""
  rounds, evaluated = config.run.rounds, 1 + config.eval.samples
  new = config.data.per_round or config.data.train_problems
  search = config.search
  distinct = search.rule == 'distinct'
  width = 1 if distinct else search.children
  first = math.ceil(search.simulations / width) * width
  guided = search.guided_descents if search.rule == 'guided' else 0
  later = guided * _descent(config, search.guided_children) if guided else first
  # Of the searches that are held against sampling.
  controlled = rounds * first if distinct else (rounds - 1) * later if guided else 0
  rollouts = config.rl.iterations * config.rl.rows
  trainings = 2 * rounds + config.rl.control
  prms = _prms(config)
  tried = config.data.judge_problems
  held = tried // rounds * rounds  # by the fine-tuned policies, a share in each round
  judged = min(config.eval.prm_problems, config.data.test_problems)
  found = {
    'search': new * (first + (rounds - 1) * later),
    'search control': new * controlled if config.eval.sampling_control else 0,
    'prm': (new * rounds + held + tried * _renewed(config)) * config.prm.samples,
    'rl': rollouts * rounds,
    'rl control': rollouts if config.rl.control else 0,
    'dev': trainings * evaluated * config.data.dev_problems,
    'prm dev': prms * prm.SAMPLES * min(prm.DEV_PROBLEMS, config.data.dev_problems),
    'test': (1 + trainings) * evaluated * config.data.test_problems,
    'prm test': (rounds + prms) * judged * prm.SAMPLES,
  }
  if config.eval.test_time:
    each = _descent(config, config.eval.search_children)
    if config.eval.search == 'voted':
      each = config.eval.search_children * config.eval.search_simulations
    found['search test'] = 3 * 2 * each * config.data.test_problems
  return {name: int(paths) for name, paths in found.items() if paths}


def generated(config: Config) -> int:
  """Tokens that are sampled, at most."""
  tcg = config.tcg
  tables = 2 + 3 + tcg.control  # of quality: on dev twice, on test one for each training
  parts = config.data.train_problems * tcg.samples + tables * tcg.eval_problems
  return sum(sampled(config).values()) * config.data.max_path_tokens + parts * tcg.max_tokens


def calls(config: Config, steps: list[Step]) -> dict[str, float]:
  """Calls of each step over the run; of sampling as many full ones as the tokens make."""
  by_name = {step.name: step for step in steps}
  rl, rounds = config.rl, config.run.rounds
  found: dict[str, float] = dict(trained(config))
  if 'decode' in by_name:
    found['decode'] = generated(config) / (by_name['decode'].rows * by_name['decode'].width)
  if 'prefill' in by_name:  # a prompt for every path, though siblings share theirs
    found['prefill'] = sum(sampled(config).values()) / by_name['prefill'].rows
  if 'expand' in by_name:
    found['expand'] = sampled(config)['search'] / by_name['expand'].rows
  if 'score' in by_name:
    found['score'] = _scored(config) / by_name['score'].rows
  # As many rows at once as in an update, so that an iteration has as many calls as updates.
  reads = 2 if rl.algorithm == 'dpo' else bool(rl.kl_coef) + bool(rl.importance_cap)
  once = rounds * rl.iterations * (rl.rows // rl.minibatch)
  found['tcg/logprobs'] = 2 * config.tcg.dpo.steps  # both sides of every pair
  found |= {'rl/logprobs': once * reads, 'rl/values': once}
  paths = sampled(config)
  scored = paths['rl'] + paths['prm dev'] + paths['prm test']
  if renewed := _renewed(config):  # two PRMs judge the steps of the policy behind RL
    each = min(config.eval.prm_problems, config.data.test_problems) * prm.SAMPLES
    scored += renewed * each
  if 'prm/scores' in by_name:
    found['prm/scores'] = scored / by_name['prm/scores'].rows
  return {name: float(n) for name, n in found.items() if name in by_name}


def _prms(config: Config) -> int:
  """PRMs that are trained: one a round, and one behind its RL where it is renewed."""
  return config.run.rounds + _renewed(config)


def _renewed(config: Config, before_last: bool = False) -> int:
  """PRMs that are made anew, over all rounds or without the last."""
  rounds = config.run.rounds
  return sum(config.prm.renews(round_, rounds) for round_ in range(rounds - before_last))


def _descent(config: Config, children: int) -> float:
  """Paths' worth of tokens of one guided descent: K candidates a step, and the program once."""
  limit = config.data.max_path_tokens
  steps = min(limit, config.search.max_step_tokens * config.search.depth_limit)
  return (children * steps + limit) / limit


def _scored(config: Config) -> float:
  """Steps that the PRM scores: of descents, of trees, and of roll-outs that have votes."""
  search, data, depth = config.search, config.data, config.search.depth_limit
  trees = 0 if search.rule in ('guided', 'distinct') else search.simulations
  guided = search.guided_descents if search.rule == 'guided' else 0
  new = data.per_round or data.train_problems
  found = (config.run.rounds - 1) * new * (trees + guided * depth * search.guided_children)
  if config.eval.test_time:
    voted = config.eval.search == 'voted'
    each = (depth + 1) * config.eval.search_simulations if voted else depth
    found += 3 * data.test_problems * each * config.eval.search_children
  return found


def kept(config: Config, step: str) -> dict[str, int]:
  """Whole sets of parameters that the run holds beside a step's own arguments, in its last round.

  `o1jax.train` keeps the policies and PRMs of every round for its report. By role; 'base' is that
  of the base model where no role shares it, 'moments' are those of RL while it samples.
  """
  before, control = config.run.rounds - 1, int(config.rl.control and config.run.rounds > 1)
  renewed = _renewed(config, before_last=True)
  if step.startswith('tcg/'):
    return {'base': 1, 'tcg': int(step in ('tcg/dpo', 'tcg/control'))}
  found = {'base': 1, 'tcg': 1, 'policy': 2 * before + control, 'prm': before + renewed}
  if step == 'policy_sft':
    return found
  found['policy'] += 1
  if step == 'prm':  # the last: behind RL, where it is made anew there
    return found | {name: found[name] + (_renewed(config) > renewed) for name in ('policy', 'prm')}
  if step.startswith('rl'):  # the state's own parameters are arguments
    found['prm'] += 1
  # What samples or scores within RL has the whole state of it beside, but for its own arguments.
  within = step not in ('rl', 'rl/replay')
  return found | ({'moments': 2} if within else {})

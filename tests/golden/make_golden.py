"""Writes golden.json: what TRL's own functions, and torch's, say on fixed random inputs.

    python tests/golden/make_golden.py        # once with trl==0.11.4, once with trl==0.24.0

Kept beside its numbers and not run in CI. TRL 0.11.4 has PPO's advantages, losses and KL
penalties as methods; 0.24.0 has those of DPO, GRPO and the reward model. Each method is
called unbound on a stand-in that holds the settings it reads, in float64 on inputs that
float32 represents exactly. A run replaces the sections that its TRL has.
"""

from __future__ import annotations

import collections
import json
import pathlib
import types

import numpy as np
import torch
import trl

HERE = pathlib.Path(__file__).parent
ROWS, TOKENS, VOCAB, GROUP = 4, 7, 5, 4


class Inputs:
  """Named random arrays, rounded to float32 and kept for the file."""

  def __init__(self, seed: int):
    self.rng = np.random.default_rng(seed)
    self.kept: dict[str, np.ndarray] = {}

  def normal(self, name: str, *shape: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return self.keep(name, self.rng.normal(mean, scale, shape))

  def keep(self, name: str, array: np.ndarray) -> torch.Tensor:
    self.kept[name] = np.asarray(array, np.float32)
    return torch.from_numpy(self.kept[name].astype(np.float64))

  def mask(self) -> torch.Tensor:
    lengths = self.rng.integers(2, TOKENS + 1, ROWS)
    return self.keep('mask', np.arange(TOKENS)[None] < lengths[:, None])


class Alone:
  """Stands in for an accelerator of one process."""

  device = 'cpu'
  num_processes = 1

  @staticmethod
  def gather(x):
    return x

  gather_for_metrics = gather


def section(inputs: Inputs, settings: dict, outputs: dict[str, torch.Tensor]) -> dict:
  lists = lambda arrays: {k: np.asarray(v).tolist() for k, v in arrays.items()}  # noqa: E731
  outputs = {k: v.detach() for k, v in outputs.items()}
  return {'trl': trl.__version__, 'settings': settings} | {
    'inputs': lists(inputs.kept),
    'outputs': lists(outputs),
  }


def ppo() -> dict:
  """Advantages, targets, clipped losses and penalties of PPOTrainer (TRL 0.11.4)."""
  x = Inputs(0)
  mask = x.mask()
  settings = {'gamma': 0.95, 'lam': 0.9, 'cliprange': 0.2, 'cliprange_value': 0.3}
  config = types.SimpleNamespace(
    **settings, whiten_rewards=False, vf_coef=1.0, ratio_threshold=10.0, kl_penalty='kl'
  )
  trainer = types.SimpleNamespace(config=config)
  rewards, values = x.normal('rewards', ROWS, TOKENS), x.normal('values', ROWS, TOKENS)
  _, whitened, targets = trl.PPOTrainer.compute_advantages(trainer, values, rewards, mask)
  old = x.normal('old_logprobs', ROWS, TOKENS, mean=-1.5, scale=0.5)
  new = x.normal('logprobs', ROWS, TOKENS, mean=-1.5, scale=0.5).requires_grad_()
  now = x.normal('new_values', ROWS, TOKENS).requires_grad_()
  logits = x.normal('logits', ROWS, TOKENS, VOCAB)
  policy, value, stats = trl.PPOTrainer.loss(
    trainer, old, values * mask, logits, now, new, mask, whitened, targets
  )
  (policy + value).backward()
  outputs = {
    'targets': targets * mask,
    'advantages': (targets - values * mask) * mask,
    'whitened': whitened * mask,
    'policy_loss': policy,
    'policy_gradient': new.grad,
    'value_loss': value,
    'value_gradient': now.grad,
    'entropy': stats['policy/entropy'],
    'clip_fraction': stats['policy/clipfrac'],
    'k1': trl.PPOTrainer._kl_penalty(trainer, new, old),
  }
  config.kl_penalty = 'mse'
  outputs['k2'] = trl.PPOTrainer._kl_penalty(trainer, new, old)
  return section(x, settings, outputs)


def dpo() -> dict:
  """Preference losses of DPOTrainer (TRL 0.24.0), a loss for each pair."""
  x = Inputs(1)
  names = ('chosen', 'rejected', 'ref_chosen', 'ref_rejected')
  scores = [x.normal(name, ROWS, mean=-20, scale=4) for name in names]
  lengths = [x.keep(n, x.rng.integers(3, 20, ROWS)) for n in ('chosen_length', 'rejected_length')]
  means = [s / lengths[i % 2] for i, s in enumerate(scores)]
  settings = {'beta': 0.3, 'label_smoothing': 0.1}
  shared = {'accelerator': Alone, 'reference_free': False, 'f_divergence_type': None, 'beta': 0.3}

  def loss(kind: str, logprobs, smoothing: float) -> torch.Tensor:
    trainer = types.SimpleNamespace(**shared, label_smoothing=smoothing)
    return trl.DPOTrainer.dpo_loss(trainer, *logprobs, kind)[0]

  outputs = {
    'sigmoid': loss('sigmoid', scores, 0.0),
    'smoothed': loss('sigmoid', scores, 0.1),
    'ipo': loss('ipo', means, 0.0),  # this trainer hands IPO means over tokens
    'length_normalised': loss('sigmoid', means, 0.0),
  }
  return section(x, settings, outputs)


def grpo() -> dict:
  """The loss of GRPOTrainer (TRL 0.24.0) with k3 inside and truncated importance weights."""
  x = Inputs(2)
  mask = x.mask()
  new = x.normal('logprobs', ROWS, TOKENS, mean=-1.5, scale=0.5).requires_grad_()
  old, ref, behaviour = (
    x.normal(name, ROWS, TOKENS, mean=-1.5, scale=0.5)
    for name in ('old_logprobs', 'ref_logprobs', 'behaviour_logprobs')
  )
  rewards = x.normal('rewards', 2 * GROUP)
  settings = {'beta': 0.2, 'clip_low': 0.2, 'clip_high': 0.28, 'cap': 1.5, 'group': GROUP}
  # The three lines that the trainer has in the midst of generation.
  grouped = rewards.view(-1, GROUP)
  centred = grouped - grouped.mean(dim=1, keepdim=True)
  divided = centred / (grouped.std(dim=1, keepdim=True) + 1e-4)
  weights = torch.clamp(torch.exp(old - behaviour), max=settings['cap'])
  advantages = x.normal('advantages', ROWS)
  batch = {name: torch.zeros(ROWS, 1) for name in ('prompt_ids', 'prompt_mask')} | {
    'completion_ids': torch.zeros(ROWS, TOKENS),
    'completion_mask': mask,
    'ref_per_token_logps': ref,
    'old_per_token_logps': old,
    'importance_sampling_ratio': weights,
    'advantages': advantages,
  }

  def loss(kind: str) -> torch.Tensor:
    trainer = types.SimpleNamespace(
      _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new)),
      _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
      accelerator=Alone,
      args=types.SimpleNamespace(delta=None),
      beta=settings['beta'],
      current_gradient_accumulation_steps=1,
      epsilon_high=settings['clip_high'],
      epsilon_low=settings['clip_low'],
      importance_sampling_level='token',
      loss_type=kind,
      model=types.SimpleNamespace(training=True),
      top_entropy_quantile=1.0,
      use_vllm=True,
      vllm_importance_sampling_correction=True,
    )
    return trl.GRPOTrainer._compute_loss(trainer, None, batch)

  outputs = {'centred': centred, 'divided': divided, 'weights': weights * mask}
  for kind, name in (('grpo', 'by_sequence'), ('bnpo', 'by_token')):
    total = loss(kind)
    outputs |= {name: total, f'{name}_gradient': torch.autograd.grad(total, new)[0]}
  return section(x, settings, outputs)


def reward() -> dict:
  """Bradley-Terry loss of RewardTrainer (TRL 0.24.0), and torch's cross-entropy on soft labels."""
  x = Inputs(3)
  win, lose = x.normal('win', ROWS, scale=3), x.normal('lose', ROWS, scale=3)
  labels = x.keep('labels', x.rng.random(ROWS))
  trainer = types.SimpleNamespace(
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    _total_train_tokens=0,
    accelerator=Alone,
    args=types.SimpleNamespace(center_rewards_coefficient=None),
    model=types.SimpleNamespace(training=False),
  )
  logits = torch.cat([win, lose])[:, None]
  model = lambda **inputs: types.SimpleNamespace(logits=logits)  # noqa: E731
  outputs = {
    'pairwise': trl.RewardTrainer.compute_loss(trainer, model, {}),
    'pointwise': torch.nn.functional.binary_cross_entropy_with_logits(win, labels),
  }
  return section(x, {}, outputs)


def sft() -> dict:
  """torch's cross-entropy and its gradient, the mean over the tokens that are not ignored."""
  x = Inputs(4)
  mask = x.mask()
  logits = x.normal('logits', ROWS, TOKENS, VOCAB, scale=2).requires_grad_()
  targets = x.keep('targets', x.rng.integers(0, VOCAB, (ROWS, TOKENS))).long()
  wanted = torch.where(mask > 0, targets, -100)
  loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
  loss.backward()
  return section(x, {}, {'loss': loss, 'gradient': logits.grad}) | {
    'trl': f'torch {torch.__version__}'
  }


def main() -> None:
  made = (ppo,) if trl.__version__.startswith('0.11.') else (dpo, grpo, reward, sft)
  path = HERE / 'golden.json'
  golden = json.loads(path.read_text()) if path.exists() else {}
  golden |= {function.__name__: function() for function in made}
  path.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + '\n')
  print(f'trl {trl.__version__}: wrote {", ".join(f.__name__ for f in made)}')


if __name__ == '__main__':
  main()

"""The learners learn: a bandit and a copying decoder, and neither with a flipped sign."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from o1jax.batch import PairBatch, RolloutBatch, TokenBatch
from o1jax.learn import logprobs, objectives, optim
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.losses import dpo, ppo, returns
from o1jax.models.config import ModelConfig
from o1jax.models.heads import ScalarHead
from o1jax.models.transformer import Model

ARMS = np.array([0.1, 0.9, 0.3, 0.5])  # chance that an arm pays
BEST = 1


def bandit_logprobs(weights, arms):
  return jax.nn.log_softmax(weights['logits'])[arms]


def grouped(weights, batch):
  """PPO on one-token trajectories whose advantages were made by the group."""
  arms, old, advantages = batch
  logprob = bandit_logprobs(weights, arms)[:, None]
  loss, count = jax.vmap(ppo.policy_loss)(
    logprob, old[:, None], advantages[:, None], jnp.ones_like(logprob)
  )
  return loss.sum(), count.sum(), {}


def with_critic(weights, batch):
  """PPO whose baseline is a learnt value."""
  arms, old, rewards = batch
  value = jnp.broadcast_to(weights['value'], (len(arms), 1))
  ones = jnp.ones_like(value)
  advantages = jax.vmap(returns.gae, (0, 0, 0, None, None))(rewards[:, None], value, ones, 1.0, 1.0)
  loss, count, _ = grouped(weights, (arms, old, advantages[:, 0]))
  error, _ = jax.vmap(ppo.value_loss)(value, value, rewards[:, None], ones)
  return loss + error.sum(), count, {}


def preferring(weights, batch):
  """DPO on pairs of arms against a uniform reference."""
  win, lose = (bandit_logprobs(weights, arms) for arms in batch)
  ref = jnp.full_like(win, -np.log(len(ARMS)))
  loss = jax.vmap(lambda m: dpo.dpo_loss(m, 0.5))(jax.vmap(dpo.margin)(win, lose, ref, ref))
  return loss.sum(), jnp.float32(len(loss)), {}


def play(loss_fn, sign, steps=150):
  """Probability of the best arm after training on what the policy itself tries."""
  rng, tx = np.random.default_rng(0), optax.adam(0.1)
  update = make_update(loss_fn, tx)
  state = init_state({'logits': jnp.zeros(len(ARMS)), 'value': jnp.zeros(())}, tx)
  for _ in range(steps):
    p = np.asarray(jax.nn.softmax(state.params['logits']), np.float64)
    arms = rng.choice(len(ARMS), size=32, p=p / p.sum())
    paid = (rng.random(32) < ARMS[arms]).astype(np.float32)
    old = np.log(p[arms]).astype(np.float32)
    if loss_fn is preferring:
      better = sign * (ARMS[arms[:16]] - ARMS[arms[16:]]) >= 0
      batch = np.where(better, arms[:16], arms[16:]), np.where(better, arms[16:], arms[:16])
    elif loss_fn is grouped:
      batch = arms, old, sign * returns.group_advantages(jnp.asarray(paid), jnp.ones(32), True)
    else:
      batch = arms, old, sign * paid
    state, _ = update(state, jax.tree.map(jnp.asarray, batch))
  return float(jax.nn.softmax(state.params['logits'])[BEST])


@pytest.mark.parametrize('loss_fn', [grouped, with_critic, preferring])
def test_a_bandit_is_solved_and_its_mirror_is_not(loss_fn):
  assert play(loss_fn, sign=1) > 0.9
  assert play(loss_fn, sign=-1) < 0.05


COPY = Model(
  ModelConfig(
    vocab_size=6,
    hidden_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    intermediate_size=32,
    initializer_range=0.2,
  )
)
COPIES, GROUP = 32, 8  # prompts an update, answers a prompt


@jax.jit
def answer(weights, tokens, key):
  """Continue two prompt tokens by two sampled ones; rows are [a, b, ?, ?]."""
  ones = jnp.ones_like(tokens)
  place = jnp.broadcast_to(jnp.arange(4)[None], tokens.shape)
  for t, k in zip((2, 3), jax.random.split(key), strict=True):
    hidden = COPY.hidden(weights, tokens, place, ones)
    sampled = jax.random.categorical(k, COPY.logits(weights, hidden[:, t - 1]))
    tokens = tokens.at[:, t].set(sampled)
  return tokens, logprobs.token_logprobs(COPY, weights, tokens, place, ones)


def right_tokens(tokens):
  """1 for each answered token that repeats the prompt's: [rows, 2]."""
  return (tokens[:, 2:] == tokens[:, :2]).astype(jnp.float32)


def answered(tokens):
  """Arrays that every batch of answers has: positions, segments and the answer's mask."""
  place = jnp.broadcast_to(jnp.arange(4)[None], tokens.shape)
  return place, jnp.ones_like(tokens), jnp.zeros(tokens.shape).at[:, 2:].set(1.0)


def rollouts(tokens, logprob, values, advantages, targets):
  """Answers as PPO's batch; the last two are [rows, 2], for the answered tokens."""
  place, whole, mask = answered(tokens)
  rows = jnp.zeros(len(tokens))
  return RolloutBatch(
    tokens=tokens,
    positions=place,
    segments=whole,
    step_ids=jnp.broadcast_to(jnp.array([[0, 0, 1, 2]]), tokens.shape),
    mask=mask,
    old_logprobs=mask * logprob,
    ref_logprobs=mask * logprob,
    old_values=mask * values,
    advantages=mask.at[:, 2:].set(advantages),
    returns=mask.at[:, 2:].set(targets),
    imitate=rows,
    version=rows.astype(jnp.int32),
  )


def by_group(weights, tokens, logprob, sign):
  """Each token is a step that earns 1 if it repeats the prompt; group-relative by step."""
  del weights
  right = right_tokens(tokens)
  to_go = jax.vmap(returns.returns_to_go)(right, jnp.ones_like(right)).reshape(COPIES, GROUP, 2)
  advantages = sign * jax.vmap(returns.group_step_advantages)(to_go, jnp.ones_like(to_go))
  flat = advantages.reshape(-1, 2)
  return rollouts(tokens, logprob, jnp.zeros_like(logprob), flat, flat)


def by_critic(weights, tokens, logprob, sign):
  """The same rewards; what a learnt value did not expect of them is the advantage."""
  place, whole, _ = answered(tokens)
  hidden = COPY.hidden(weights['policy'], tokens, place, whole)
  values = objectives.value_on_policy(weights['critic'], hidden, None)
  right = right_tokens(tokens)
  gae = functools.partial(returns.gae, discount=1.0, lam=0.95)
  advantages = jax.vmap(gae)(right, values[:, 2:], jnp.ones_like(right))
  targets = advantages + values[:, 2:]
  return rollouts(tokens, logprob, values, sign * advantages, targets)


def by_preference(weights, tokens, logprob, sign):
  """Iterative DPO: the best of a group against its worst; the policy of now is the reference."""
  del logprob
  # Half of the answers are guesses: a policy that has settled draws nothing to prefer.
  key = jax.random.key(jnp.sum(tokens * jnp.arange(tokens.size).reshape(tokens.shape)))
  guesses = tokens.at[:, 2:].set(jax.random.randint(key, (len(tokens), 2), 0, 6))
  tokens = jnp.where(jnp.arange(len(tokens))[:, None] % 2 == 0, guesses, tokens)
  place, whole, mask = answered(tokens)
  reference = mask * logprobs.token_logprobs(COPY, weights, tokens, place, whole)
  score = sign * right_tokens(tokens).sum(axis=1).reshape(COPIES, GROUP)
  first = GROUP * jnp.arange(COPIES)
  differ = (score.max(axis=1) > score.min(axis=1))[:, None]
  sides = [first + score.argmax(axis=1), first + score.argmin(axis=1)]
  batches = [TokenBatch(tokens[r], place[r], whole[r], differ * mask[r]) for r in sides]
  return PairBatch(*batches, *[jnp.sum(differ * reference[r], axis=1) for r in sides])


# Loss, batch, learning rate, updates. Without the bonus (for DPO: the guesses and the NLL
# term) some prompts settle on a wrong token before the right one was tried.
CRITIC = objectives.ppo_loss(COPY, entropy_coef=0.15, value_fn=objectives.value_on_policy)
LEARNERS = {
  'group': (objectives.ppo_loss(COPY, entropy_coef=0.1), by_group, 1e-2, 80),
  'critic': (CRITIC, by_critic, 5e-3, 120),
  'dpo': (objectives.dpo_loss(COPY, beta=0.5, nll=0.3), by_preference, 1e-2, 80),
}


@pytest.mark.parametrize('name', LEARNERS)
@pytest.mark.parametrize('sign', [1, -1])
def test_a_decoder_learns_to_copy_by_rewards_alone(name, sign):
  loss_fn, build, lr, steps = LEARNERS[name]
  build = jax.jit(build, static_argnums=3)
  tx = optim.make_optimizer(lr, steps=steps)
  update = make_update(loss_fn, tx)
  policy = COPY.init(jax.random.key(1))
  own = name == 'critic'
  start = {'policy': policy, 'critic': ScalarHead.init(COPY.config)} if own else policy
  state = init_state(start, tx)
  rng, copied_right = np.random.default_rng(0), []
  for key in jax.random.split(jax.random.key(2), steps):
    prompts = np.repeat(rng.integers(0, 6, (COPIES, 2)), GROUP, axis=0)
    tokens = jnp.asarray(np.pad(prompts, ((0, 0), (0, 2))), jnp.int32)
    tokens, logprob = answer(state.params['policy'] if own else state.params, tokens, key)
    copied_right.append(float(jnp.all(right_tokens(tokens) > 0, axis=1).mean()))
    state, _ = update(state, build(state.params, tokens, logprob, sign))
  assert copied_right[0] < 0.2
  final = np.mean(copied_right[-5:])
  assert final > 0.95 if sign == 1 else final < 0.02


def test_the_forty_lines_of_the_docs_do_what_they_say():
  page = pathlib.Path(__file__).parent.parent / 'docs' / 'ppo_on_a_toy.md'
  code = page.read_text().split('```python\n')[1].split('```')[0]
  lines = [line for line in code.splitlines() if line.strip()]
  assert len(lines) == 40
  imports = {line.split()[1] for line in lines if line.startswith(('import', 'from'))}
  assert imports == {'functools', 'jax', 'jax.numpy', 'optax', 'o1jax.losses'}
  told, mirrored = {}, {}
  exec(compile(code, str(page), 'exec'), told)
  assert told['history'][0] < 0.4 and told['history'][-1] > 0.95
  flipped = code.replace('advantages = gae(', 'advantages = -gae(')
  assert flipped != code
  exec(compile(flipped, str(page), 'exec'), mirrored)
  assert mirrored['history'][-1] < 0.05

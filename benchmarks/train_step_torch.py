"""The steps of train_step.py by torch + transformers, from the same weights and batches."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


@contextlib.contextmanager
def running(folder: str, **settings: Any) -> Iterator[Connection]:
  """A process that does nothing but steps, as a training does; see `serve`."""
  ours, theirs = multiprocessing.Pipe()
  child = multiprocessing.get_context('spawn').Process(
    target=serve, args=(theirs, folder), kwargs=settings, daemon=True
  )
  child.start()
  theirs.close()
  try:
    yield ours
  finally:
    ours.close()
    child.join()


def serve(pipe: Connection, folder: str, *, cpu: bool, lr: float, beta: float) -> None:
  """Answers a loss's name and case by its first loss, a number by the seconds of so many steps."""
  clock, step = time.process_time if cpu else time.perf_counter, None
  with contextlib.suppress(EOFError):
    while True:
      asked = pipe.recv()
      if isinstance(asked, int):
        start = clock()
        for _ in range(asked):
          step()
        pipe.send(clock() - start)
      else:
        step = stepper(folder, *asked, lr=lr, beta=beta)
        pipe.send(step())


def stepper(folder: str, name: str, case: Any, *, lr: float, beta: float) -> Callable[[], float]:
  """One training step as a function without arguments; it returns the loss before the step."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  heads = {'ppo': 'critic', 'prm': 'head'}
  trained = case.params[heads[name]] if name in heads else {}
  head = {k: torch.nn.Parameter(torch.from_numpy(np.array(v))) for k, v in trained.items()}
  parameters = [*model.parameters(), *head.values()]
  optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.01)
  tensor = lambda x: torch.from_numpy(np.array(x))  # noqa: E731
  loss_fn = {'sft': sft, 'ppo': ppo, 'dpo': dpo, 'prm': prm}[name]

  def step() -> float:
    optimizer.zero_grad()
    loss = loss_fn(model, head, case.batch, tensor, beta)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()

  return step


def logprobs_of(logits, tokens):
  """Log-probabilities of the tokens [B, T - 1] that follow the first."""
  picked = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
  return picked - logits[:, :-1].logsumexp(-1)


def sft(model, head, batch, tensor, beta):
  tokens, mask = tensor(batch.tokens).long(), tensor(batch.loss_mask)[:, 1:]
  return -(mask * logprobs_of(model(tokens).logits, tokens)).sum() / mask.sum()


def ppo(model, head, batch, tensor, beta):
  tokens, mask = tensor(batch.tokens).long(), tensor(batch.mask)[:, 1:]
  out = model(tokens, output_hidden_states=True)
  new = logprobs_of(out.logits, tokens)
  values = (out.hidden_states[-1] @ head['kernel'] + head['bias'])[:, :-1]
  names = ('old_logprobs', 'ref_logprobs', 'old_values', 'advantages', 'returns')
  old, ref, old_values, advantages, returns = (tensor(getattr(batch, n))[:, 1:] for n in names)
  ratio = (new - old).exp()
  surrogate = -(ratio * advantages).minimum(ratio.clamp(0.8, 1.2) * advantages)
  kl = (ref - new).expm1() - (ref - new)
  near = old_values + (values - old_values).clamp(-0.2, 0.2)
  error = 0.5 * ((values - returns) ** 2).maximum((near - returns) ** 2)
  return (mask * (surrogate + 0.1 * kl + 0.5 * error)).sum() / mask.sum()


def dpo(model, head, batch, tensor, beta):
  import torch

  sides = (batch.chosen, batch.rejected)  # one pass over both
  tokens = torch.cat([tensor(s.tokens) for s in sides]).long()
  mask = torch.cat([tensor(s.loss_mask) for s in sides])[:, 1:]
  chosen, rejected = (mask * logprobs_of(model(tokens).logits, tokens)).sum(-1).chunk(2)
  margin = (chosen - tensor(batch.ref_chosen)) - (rejected - tensor(batch.ref_rejected))
  nll = -chosen / mask.chunk(2)[0].sum(-1)
  return (nll - torch.nn.functional.logsigmoid(beta * margin)).mean()


def prm(model, head, batch, tensor, beta):
  import torch

  tokens, ids = tensor(batch.tokens).long(), tensor(batch.step_ids)
  hidden = model.model(tokens).last_hidden_state
  logprobs = torch.nn.functional.pad(logprobs_of(model.lm_head(hidden), tokens), (1, 0))
  before = torch.nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
  following = torch.nn.functional.pad(ids[:, 1:], (0, 1))
  each = ((before @ head['bilinear']) * model.model.embed_tokens(tokens)).sum(-1)
  each = each + head['logprob'] * logprobs
  each = each + (ids != following) * (hidden @ head['kernel'] + head['bias'])
  labels = tensor(batch.labels)
  members = ids[:, :, None] == torch.arange(1, labels.shape[1] + 1)
  scores = (each[:, :, None] * members).sum(1)
  point = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction='sum')
  win, lose, step = tensor(batch.pairs).long().T
  pair = -torch.nn.functional.logsigmoid(scores[win, step - 1] - scores[lose, step - 1]).sum()
  return (point + pair) / (labels.numel() + len(win))

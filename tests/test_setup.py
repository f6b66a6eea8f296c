"""What a run makes of its problems before the first step, and what it says it needs."""

import dataclasses
import json
import logging

import pytest
import tiny_checkpoint

from o1jax import config
from o1jax.config import ConfigError
from o1jax.data.paths import PathEncoder
from o1jax.data.tokens import Tokenizer
from o1jax.models import Model, ModelConfig
from o1jax.stages import setup


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
  return tiny_checkpoint.write(tmp_path_factory.mktemp('hub'), 'qwen2.5-coder-1.5b')


@pytest.fixture
def source(tmp_path):
  """Ten problems for each split: one of train is very long, one has a control token in it."""
  for name in ('train', 'dev', 'test'):
    rows = [
      {
        'id': f'{name}{i}',
        'statement': f'{name} {i}: say {i}',
        'tests': [{'input': '', 'output': '1'}],
      }
      for i in range(10)
    ]
    if name == 'train':
      rows[2]['statement'] += ' and so on' * 100
      rows[5]['statement'] += ' <|im_start|> <|im_end|>'
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (tmp_path / f'{name}.jsonl').write_text(lines)
  return tmp_path


def read(source, hub, split, chat=False, **data):
  few = {'tcg': {'problems': 1}, 'rl': {'problems': 1, 'minibatch': 8}}
  given = config.check({'data': {'source': str(source), **data}, **few})
  return setup.read_split(given, split, PathEncoder(Tokenizer(hub, chat=chat)))


def test_prompts_that_do_not_fit_are_left_out_and_the_count_is_filled(hub, source, caplog):
  with caplog.at_level(logging.WARNING, logger='o1jax'):
    found = read(source, hub, 'train', train_problems=6)
  assert [p.id for p in found] == ['train0', 'train1', 'train3', 'train4', 'train6', 'train7']
  (said,) = [r.getMessage() for r in caplog.records if 'left out' in r.getMessage()]
  assert said.startswith('train: 2 problems left out: 1 have more than data.max_prompt_tokens=96')
  assert "1 spell out a special token (train5 spells out '<|im_" in said


def test_the_last_train_problems_are_held_back_for_the_prm(hub, source):
  few = {
    'tcg': {'problems': 1},
    'rl': {'problems': 1, 'minibatch': 8},
    'prm': {'samples': 2, 'renew': 'last'},
  }

  def split(**data):
    given = config.check({'data': {'source': str(source), **data}, **few})
    found = setup.read_split(given, 'train', PathEncoder(Tokenizer(hub)))
    return [[p.id for p in part] for part in setup.held_back(given, found)]

  assert split(train_problems=3) == [['train0', 'train1', 'train3'], []]
  held = split(train_problems=3, judge_problems=2)
  assert held == [['train0', 'train1', 'train3'], ['train4', 'train6']]
  # Of fewer than are asked for, the policy has what is left.
  assert split(train_problems=40, judge_problems=3)[1] == ['train7', 'train8', 'train9']
  with pytest.raises(
    ConfigError, match=r'judge_problems=5 of the 8 train problems of .* leave 3 to'
  ):
    split(train_problems=40, judge_problems=5)


def test_the_run_is_refused_if_none_is_left(hub, source):
  with pytest.raises(ConfigError, match=r'dev: 10 problems left out: 10 have more than.*=3 tokens'):
    read(source, hub, 'dev', max_prompt_tokens=3)


def test_a_chat_prompt_is_what_the_template_makes(hub, source):
  tokenizer = Tokenizer(hub, chat=True)
  (problem,) = read(source, hub, 'dev', chat=True, dev_problems=1)
  text = tokenizer.decode(PathEncoder(tokenizer).prompt(problem))
  # `decode` drops eos, which <|im_end|> is here.
  assert text == '<|im_start|>user\ndev 0: say 0\n\n<|im_start|>assistant\n'
  ids = tokenizer.prompt_ids('x')
  assert ids[0] == tokenizer.single('<|im_start|>') and tokenizer.eos_id in ids


def test_a_model_without_a_template_is_no_chat_model():
  base = setup.model_folder(config.check({}))
  with pytest.raises(ValueError, match='has no chat template'):
    Tokenizer(base, chat=True)


def test_a_tokenizer_without_tags_names_the_remedy(hub):
  with pytest.raises(ValueError, match=r"'<Step_End>' is \d+ tokens .*python -m o1jax.prepare"):
    _ = Tokenizer(hub).step_end_id


def test_bytes_of_a_step_count_the_base_once():
  model = Model(ModelConfig(1000, 64, 2, 4, 2, 128))
  count = sum(x.size for x in setup.jax.tree.leaves(model.shapes()))
  bytes_of = lambda **lora: setup.state_bytes(config.check({'lora': lora}), model)  # noqa: E731
  assert bytes_of() == 16 * count
  adapter = {'rank': 2, 'modules': ['q_proj']}
  roles = dict.fromkeys(('policy', 'tcg', 'prm'), adapter)
  factors = 2 * 2 * (64 + 64)
  assert bytes_of(**roles) == 4 * count + 16 * factors
  kernels = count - 2 * 64 * 2 - 64 - 1000 * 64  # without norms and embedding
  packed = bytes_of(base='nf4', **roles)
  assert packed == pytest.approx(4 * (count - kernels) + kernels * 9 / 16 + 16 * factors, abs=1)
  assert bytes_of(**(roles | {'prm': {}})) == 4 * count + 16 * count
  half = Model(dataclasses.replace(model.config, dtype='bfloat16'))
  assert setup.state_bytes(config.check({}), half) == 8 * count


def test_the_embedded_problems_spell_out_nothing_special(caplog):
  """Its tokenizer has pieces such as ' 1' that transformers lists among the special ones."""
  encoder = PathEncoder(Tokenizer(setup.model_folder(config.check({}))))
  with caplog.at_level(logging.WARNING, logger='o1jax'):
    found = setup.read_split(config.check({'data': {'dev_problems': 50}}), 'dev', encoder)
  assert len(found) == 50 and not caplog.records

"""Tiny random checkpoints of real architectures, with a byte-level BPE tokenizer as theirs have."""

import dataclasses
import json
import pathlib

import jax

from o1jax.models import Model, ModelConfig, RopeScaling, hf

_SMALL = {'hidden_size': 32, 'num_layers': 1, 'num_heads': 4, 'intermediate_size': 64}
_QWEN = ModelConfig(
  400,
  **_SMALL,
  num_kv_heads=2,
  architecture='Qwen2ForCausalLM',
  qkv_bias=True,
  rope_theta=1e6,
  max_position=4096,
  dtype='bfloat16',
)
# By the config in configs/ that they stand in for.
ARCHITECTURES = {
  'qwen2.5-coder-1.5b': _QWEN,
  'qwen2.5-coder-7b': dataclasses.replace(_QWEN, tie_embeddings=False),
  'deepseek-coder-1.3b-tcg': ModelConfig(
    400,
    **_SMALL,
    num_kv_heads=4,
    rope_scaling=RopeScaling('linear', 4.0),
    rope_theta=1e5,
    tie_embeddings=False,
    max_position=4096,
    dtype='bfloat16',
  ),
}
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
_CORPUS = ('Read two numbers and print their sum.', 'print(sum(map(int, input().split())))')


def write(folder: pathlib.Path, name: str, seed: int = 0) -> pathlib.Path:
  """A checkpoint of random weights in the Hub's layout, whose tokenizer knows no step tag."""
  import tokenizers
  from transformers import PreTrainedTokenizerFast

  config = ARCHITECTURES[name]
  model = Model(config)
  hf.save(folder, model, model.init(jax.random.key(seed)))
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=special,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  bpe.train_from_iterator(_CORPUS, trainer)
  hub = PreTrainedTokenizerFast(
    tokenizer_object=bpe, eos_token='<|im_end|>', pad_token='<|endoftext|>'
  )
  hub.add_special_tokens({'additional_special_tokens': ['<|im_start|>']})
  hub.chat_template = TEMPLATE
  hub.save_pretrained(folder)
  return folder


def _words(i: int, count: int) -> str:
  """Words that no other i has in this order: statements must not be near-duplicates."""
  return ' '.join(f'w{(i * 31 + j * (7 + i)) % 97:02d}' for j in range(count))


def human_eval_rows(count: int) -> list[dict]:
  """Rows in HumanEval's spelling, as long as those of `taco_rows`: equal shapes compile once."""
  return [
    {
      'task_id': f'HumanEval/{i}',
      'prompt': f'def add_{i:02d}(x):\n    """ Return {i:02d} more. {_words(i + 50, 12)} """\n',
      'entry_point': f'add_{i:02d}',
      'canonical_solution': f'    return x + {i}\n',
      'test': f'def check(candidate):\n    assert candidate(1) == {1 + i}\n',
    }
    for i in range(count)
  ]


def taco_rows(count: int) -> list[dict]:
  """Rows in TACO's spelling, lists in strings of JSON: one has a tag in it, one is very long."""
  rows = []
  for i in range(count):
    shift = i % 7 + 1
    inputs = [f'{a} {a + i}\n' for a in range(4)]
    outputs = [f'{2 * a + i + shift}\n' for a in range(4)]
    code = f'a, b = map(int, input().split())\nprint(a + b + {shift})'
    words = _words(i, 14)
    rows.append(
      {
        'question': f'Task {i:02d}: {words}. Print the sum of two numbers and {shift}.',
        'solutions': json.dumps([code]),
        'starter_code': '',
        'input_output': json.dumps({'inputs': inputs, 'outputs': outputs}),
        'difficulty': 'EASY',
      }
    )
  rows[0]['question'] += ' ' + 'and on and on ' * 500
  rows[1]['question'] += ' <Step_End>'
  return rows

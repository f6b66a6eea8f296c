"""The tokenizer of the embedded default: the family's fragments as whole tokens.

A sentencepiece model whose user-defined symbols are everything that the family writes; other
text falls back to characters and bytes, so that any text survives. `AutoTokenizer` is the truth
about the ids: it finds symbols with spaces inside, which sentencepiece's own `encode` does not.
A number and a word are one token with the space before them.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from o1jax.data.family import spec as specs
from o1jax.data.family.ops import HIGHEST, LEXICON, LOWEST, OPS, READOUTS
from o1jax.data.family.phrases import (
  CONTEXT_PHRASES,
  HEADS,
  OP_PHRASES,
  READOUT_PHRASES,
  VERBS,
)
from o1jax.data.family.testcases import FENCE_CLOSE, FENCE_OPEN, JOINT, PART
from o1jax.data.steps import ACTIONS, STEP_END

PAD, UNK, BOS, EOS = '<pad>', '<unk>', '<s>', '</s>'  # ids 0 to 3
_SLOT = ' {k}'  # a number takes the space before it along
_LABEL = ' {k}) '


def _code_fragments() -> Iterator[str]:
  yield from ('def solve(a):\n', '    ', 'a = list(map(int, input().split()))\n')
  yield 'a = input().split()\n'
  for op in OPS.values():
    line = f'{op.code}\n'
    if _SLOT in line and _LABEL not in line:
      yield from line.split(_SLOT)
    else:  # a number without a space before it, or one that looks like a clause's: whole lines
      yield from (line.replace('{k}', str(k)) for k in op.params or ('',))
  for readout in READOUTS.values():
    star = '*' if readout.name == 'list' else ''
    yield from (f'print({star}{readout.expression})', f'return {readout.expression}')


def _statement_fragments() -> Iterator[str]:
  yield from HEADS.values()
  yield from (f' {n}) ' for n in range(1, 7))
  yield from VERBS.values()
  for phrases in (OP_PHRASES, READOUT_PHRASES, CONTEXT_PHRASES):
    for said in phrases.values():
      for phrase in said:
        yield from phrase.split(_SLOT)


def fragments() -> list[str]:
  """Every text that is one token, specials and byte fallback apart, in the order of their ids."""
  found = [*ACTIONS, STEP_END, '\n', '```python\n', FENCE_OPEN, FENCE_CLOSE, PART]
  found += ['Input:', '\nTrace: ', '\nOutput:', ' ->', ' | ', JOINT.rstrip()]
  found += [f' {n}' for n in range(LOWEST, HIGHEST + 1)]
  for word in LEXICON:
    found += [f' {form}' for form in (word, word.upper(), word[::-1], word[::-1].upper())]
  found += [f'{form} {kind}' for form in specs.FORMS for kind in specs.KINDS]
  found += [f' ops {verb.strip()}' for verb in VERBS.values()]
  for op in (*OPS.values(), *READOUTS.values()):
    found += op.pseudo.split(_SLOT)
  found += [*_code_fragments(), *_statement_fragments()]
  return [fragment for fragment in dict.fromkeys(found) if fragment]


def build_tokenizer(folder: str | Path) -> int:
  """Writes `tokenizer.model` and `tokenizer_config.json` into `folder`; returns the tokens' number.

  The same bytes every time. Needs no corpus: all tokens are given, nothing is learnt.
  """
  symbols = fragments()
  letters = sorted(set(string.ascii_letters + string.digits + string.punctuation))
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([' '.join(letters)]),
    model_writer=model,
    model_type='bpe',
    vocab_size=4 + 256 + len(symbols) + len(letters) + 1,
    user_defined_symbols=symbols,
    byte_fallback=True,
    character_coverage=1.0,
    pad_id=0,
    unk_id=1,
    bos_id=2,
    eos_id=3,
    pad_piece=PAD,
    unk_piece=UNK,
    bos_piece=BOS,
    eos_piece=EOS,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
    num_threads=1,
    minloglevel=2,
  )
  config = {
    'tokenizer_class': 'LlamaTokenizer',
    'legacy': False,
    'add_prefix_space': False,
    'add_bos_token': True,
    'add_eos_token': False,
    'clean_up_tokenization_spaces': False,
    'pad_token': PAD,
    'unk_token': UNK,
    'bos_token': BOS,
    'eos_token': EOS,
    'model_max_length': 1024,
  }
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'tokenizer.model').write_bytes(model.getvalue())
  (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
  processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  return processor.get_piece_size()

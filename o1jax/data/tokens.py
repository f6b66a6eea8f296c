"""Text to token ids and back, by the checkpoint's own tokenizer."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

from o1jax.data import steps as steps_lib


class Tokenizer:
  """The Hub tokenizer of a model folder, with the few ids that o1jax needs.

  `transformers` is the only truth for ids: sentencepiece's own `encode` can
  differ from them.
  """

  def __init__(self, folder: str | pathlib.Path, *, chat: bool = False):
    """Opens the tokenizer of `folder` (a Hub folder, read offline).

    With `chat`, prompts are put into its chat template.

    Raises:
      ValueError: `chat`, and it has no template.
    """
    from transformers import AutoTokenizer  # seconds to import: only when used

    self.folder = pathlib.Path(folder)
    self._hub = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    self.bos_id = self._hub.bos_token_id
    self.eos_id = self._hub.eos_token_id
    self.pad_id = self._hub.pad_token_id if self._hub.pad_token_id is not None else self.eos_id
    self.vocab_size = len(self._hub)
    self.chat = chat
    if chat and not self._hub.chat_template:
      raise ValueError(f'{self.folder} has no chat template; set model.chat=false')

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, no special tokens added."""
    return self._hub.encode(text, add_special_tokens=False)

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts, in one call of the fast tokenizer."""
    if not texts:
      return []
    return self._hub(list(texts), add_special_tokens=False)['input_ids']

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens dropped."""
    kept = [int(i) for i in ids if i not in (self.bos_id, self.eos_id, self.pad_id)]
    return self._hub.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

  def prompt_ids(self, prompt: str) -> list[int]:
    """A document's beginning: bos where the model has one, then the prompt.

    Of a chat model: what its template makes of the prompt as a user's message, up to where the
    model's answer begins.
    """
    if self.chat:
      messages = [{'role': 'user', 'content': prompt}]
      text = self._hub.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
      return self.encode(text)  # the template writes bos itself
    bos = [] if self.bos_id is None else [self.bos_id]
    return bos + self.encode(prompt)

  def control_text(self, text: str) -> str | None:
    """A special token that `text` spells out, which would be read as one; None without any."""
    return next((token for token in self._special if token in text), None)

  @functools.cached_property
  def _special(self) -> tuple[str, ...]:
    hub = self._hub  # whose `all_special_tokens` count a tokenizer's user-defined pieces too
    named = {hub.bos_token, hub.eos_token, hub.pad_token, hub.unk_token} - {None}
    added = {t.content for t in hub.added_tokens_decoder.values() if t.special}
    return tuple(sorted(named | added | set(steps_lib.TAGS)))

  @functools.cached_property
  def step_end_id(self) -> int:
    """Id of the step delimiter.

    Raises:
      ValueError: the tokenizer has no single token for it.
    """
    return self.single(steps_lib.STEP_END)

  @functools.cached_property
  def action_ids(self) -> tuple[int, int, int]:
    """Ids of the three action tags."""
    return tuple(self.single(tag) for tag in steps_lib.ACTIONS)

  def single(self, tag: str) -> int:
    """The one id of `tag`.

    Raises:
      ValueError: the tokenizer cuts it into several.
    """
    ids = self.encode(tag)
    if len(ids) != 1:
      raise ValueError(
        f'{tag!r} is {len(ids)} tokens in {self.folder}; make a copy that has it as one: '
        f'python -m o1jax.prepare {self.folder} --out DIR'
      )
    return ids[0]


def add_tags(source: str | pathlib.Path, folder: str | pathlib.Path) -> dict[int, list[int]]:
  """Writes the tokenizer of `source` into `folder` with every step tag as one special token.

  Returns:
    For each token that was added, its id and the ids that the tag was cut into before.
  """
  from transformers import AddedToken, AutoTokenizer

  hub = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
  pieces = {tag: hub.encode(tag, add_special_tokens=False) for tag in steps_lib.TAGS}
  new = [tag for tag, ids in pieces.items() if len(ids) != 1]
  hub.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in new])
  hub.save_pretrained(str(folder))
  return {hub.convert_tokens_to_ids(tag): pieces[tag] for tag in new}

"""What a Llama-shaped decoder is made of, and how the Hub spells it.

`ModelConfig.from_hub` reads `config.json` in the spellings of transformers 4
(`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`). A field that would change the numbers and is not implemented is an
error that names it, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# Hub architecture -> (model_type, family defaults that config.json may leave out).
ARCHITECTURES = {
  'LlamaForCausalLM': ('llama', {}),
  'MistralForCausalLM': ('mistral', {'num_key_value_heads': 8}),
  'Qwen2ForCausalLM': ('qwen2', {'num_key_value_heads': 32}),
  'Qwen3ForCausalLM': ('qwen3', {'num_key_value_heads': 32, 'head_dim': 128}),
}
DTYPES = ('float32', 'bfloat16', 'float16')

# Fields that must have one of these values if they are there at all: anything
# else asks for arithmetic that this decoder does not do.
_ONLY = {
  'hidden_act': ('silu', 'swish'),
  'mlp_bias': (False, None),
  'pretraining_tp': (1, None),
  'partial_rotary_factor': (1, 1.0, None),
  'quantization_config': (None,),
  'is_encoder_decoder': (False, None),
  'add_cross_attention': (False, None),
}
# Attention and layer scalings, expert routing and the like, by other families:
# a config that sets one of them is not Llama-shaped whatever its architecture says.
_FOREIGN = (
  'attn_logit_softcapping',
  'final_logit_softcapping',
  'query_pre_attn_scalar',
  'attention_multiplier',
  'embedding_multiplier',
  'residual_multiplier',
  'logits_scaling',
  'logit_scale',
  'num_experts',
  'num_local_experts',
  'no_rope_layers',
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How RoPE frequencies are stretched beyond the length first trained on.

  `kind` is 'linear' (all frequencies divided by `factor`) or 'llama3' (low
  frequencies divided, high ones kept, a ramp between).
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and switches of one decoder. Hashable, so it can be a static argument.

  `sliding_window` is in tokens and counts the query itself; `sliding_layers[i]`
  says whether layer i uses it (empty: every layer does).
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  intermediate_size: int
  head_dim: int = 0  # 0: hidden_size // num_heads
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rms_norm_eps: float = 1e-6
  tie_embeddings: bool = True
  qkv_bias: bool = False
  o_bias: bool = False
  qk_norm: bool = False
  max_position: int = 2048  # tokens; a position past it may give NaN
  sliding_window: int | None = None
  sliding_layers: tuple[bool, ...] = ()
  initializer_range: float = 0.02
  architecture: str = 'LlamaForCausalLM'
  dtype: str = 'float32'
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None
  pad_token_id: int | None = None

  def __post_init__(self):
    if not self.head_dim:
      _require(
        self.hidden_size % self.num_heads == 0,
        f'hidden_size={self.hidden_size} does not divide over num_heads={self.num_heads}; '
        'set head_dim',
      )
      object.__setattr__(self, 'head_dim', self.hidden_size // self.num_heads)
    _require(
      self.num_heads % self.num_kv_heads == 0,
      f'num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}',
    )
    _require(self.head_dim % 2 == 0, f'head_dim={self.head_dim} is odd; RoPE needs an even one')
    _require(
      len(self.sliding_layers) in (0, self.num_layers),
      f'sliding_layers names {len(self.sliding_layers)} layers, the model has {self.num_layers}',
    )
    _require(self.dtype in DTYPES, f'dtype={self.dtype!r} is not one of {", ".join(DTYPES)}')
    _require(
      self.architecture in ARCHITECTURES,
      f'architecture {self.architecture!r} is not implemented; one of {", ".join(ARCHITECTURES)}',
    )

  @property
  def windows(self) -> tuple[int | None, ...]:
    """Attention window of each layer in tokens; None where it sees everything."""
    if self.sliding_window is None:
      return (None,) * self.num_layers
    layers = self.sliding_layers or (True,) * self.num_layers
    return tuple(self.sliding_window if sliding else None for sliding in layers)

  @classmethod
  def from_hub(cls, hub: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hub `config.json`.

    Raises:
      ValueError: naming the architecture or every field that is missing or
        that asks for something this decoder does not compute.
    """
    architecture = (hub.get('architectures') or [None])[0]
    if architecture not in ARCHITECTURES:
      raise ValueError(
        f'architecture {architecture!r} (model_type {hub.get("model_type")!r}) is not implemented;'
        f' one of {", ".join(ARCHITECTURES)}'
      )
    model_type, defaults = ARCHITECTURES[architecture]
    hub = defaults | {k: v for k, v in hub.items() if v is not None}
    _check_fields(hub)
    theta, scaling = _read_rope(hub)
    heads = hub['num_attention_heads']
    window, sliding_layers = _read_windows(model_type, hub)
    eos = hub.get('eos_token_id')
    return cls(
      vocab_size=hub['vocab_size'],
      hidden_size=hub['hidden_size'],
      num_layers=hub['num_hidden_layers'],
      num_heads=heads,
      num_kv_heads=hub.get('num_key_value_heads', heads),
      intermediate_size=hub['intermediate_size'],
      head_dim=hub.get('head_dim', 0),
      rope_theta=theta,
      rope_scaling=scaling,
      rms_norm_eps=hub.get('rms_norm_eps', 1e-6),
      tie_embeddings=hub.get('tie_word_embeddings', False),
      qkv_bias=model_type == 'qwen2' or hub.get('attention_bias', False),
      o_bias=model_type != 'qwen2' and hub.get('attention_bias', False),
      qk_norm=model_type == 'qwen3',
      max_position=hub.get('max_position_embeddings', 2048),
      sliding_window=window,
      sliding_layers=sliding_layers,
      initializer_range=hub.get('initializer_range', 0.02),
      architecture=architecture,
      dtype=hub.get('dtype', hub.get('torch_dtype', 'float32')),
      bos_token_id=hub.get('bos_token_id'),
      eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
      pad_token_id=hub.get('pad_token_id'),
    )

  def to_hub(self) -> dict[str, Any]:
    """The Hub spelling, with both the old and the new names where they differ."""
    rope: dict[str, Any] = {'rope_type': 'default', 'rope_theta': self.rope_theta}
    if (s := self.rope_scaling) is not None:
      rope |= {'rope_type': s.kind, 'factor': s.factor}
      if s.kind == 'llama3':
        rope |= {
          'low_freq_factor': s.low_freq_factor,
          'high_freq_factor': s.high_freq_factor,
          'original_max_position_embeddings': s.original_max_position,
        }
    hub = {
      'architectures': [self.architecture],
      'model_type': ARCHITECTURES[self.architecture][0],
      'vocab_size': self.vocab_size,
      'hidden_size': self.hidden_size,
      'num_hidden_layers': self.num_layers,
      'num_attention_heads': self.num_heads,
      'num_key_value_heads': self.num_kv_heads,
      'head_dim': self.head_dim,
      'intermediate_size': self.intermediate_size,
      'hidden_act': 'silu',
      'rms_norm_eps': self.rms_norm_eps,
      'rope_theta': self.rope_theta,
      'rope_scaling': None if self.rope_scaling is None else rope,
      'rope_parameters': rope,
      'tie_word_embeddings': self.tie_embeddings,
      'max_position_embeddings': self.max_position,
      'initializer_range': self.initializer_range,
      'torch_dtype': self.dtype,
      'dtype': self.dtype,
      'bos_token_id': self.bos_token_id,
      'eos_token_id': list(self.eos_token_id)
      if isinstance(self.eos_token_id, tuple)
      else self.eos_token_id,
      'pad_token_id': self.pad_token_id,
    }
    return hub | self._hub_switches()

  def _hub_switches(self) -> dict[str, Any]:
    model_type = ARCHITECTURES[self.architecture][0]
    out: dict[str, Any] = {}
    if model_type in ('llama', 'qwen3'):
      out['attention_bias'] = self.o_bias
    if model_type == 'mistral':
      out['sliding_window'] = self.sliding_window
    if model_type in ('qwen2', 'qwen3'):
      windows = self.windows
      out['use_sliding_window'] = self.sliding_window is not None
      out['sliding_window'] = self.sliding_window
      out['layer_types'] = ['full_attention' if w is None else 'sliding_attention' for w in windows]
    return out


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _check_fields(hub: Mapping[str, Any]) -> None:
  needed = (
    'vocab_size',
    'hidden_size',
    'num_hidden_layers',
    'num_attention_heads',
    'intermediate_size',
  )
  faults = [f'{name} is missing' for name in needed if name not in hub]
  faults += [
    f'{name}={hub[name]!r} is not implemented (only {allowed[0]!r})'
    for name, allowed in _ONLY.items()
    if name in hub and hub[name] not in allowed
  ]
  faults += [f'{name}={hub[name]!r} is not implemented' for name in _FOREIGN if hub.get(name)]
  if faults:
    raise ValueError('config.json: ' + '; '.join(faults))


def _read_rope(hub: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  rope = dict(hub.get('rope_parameters') or {})
  # transformers lets the old spelling win where a config has both.
  rope |= hub.get('rope_scaling') or {}
  theta = float(rope.pop('rope_theta', None) or hub.get('rope_theta', 10000.0))
  kind = rope.pop('rope_type', None) or rope.get('type', 'default')
  rope.pop('type', None)
  known = {
    'default': (),
    'linear': ('factor',),
    'llama3': (
      'factor',
      'low_freq_factor',
      'high_freq_factor',
      'original_max_position_embeddings',
    ),
  }
  _require(
    kind in known, f'config.json: rope type {kind!r} is not implemented; one of {", ".join(known)}'
  )
  if rope.get('partial_rotary_factor') == 1:
    rope.pop('partial_rotary_factor')
  extra = sorted(k for k, v in rope.items() if k not in known[kind] and v is not None)
  _require(not extra, f'config.json: rope fields {extra} are not implemented for type {kind!r}')
  if kind == 'default':
    return theta, None
  _require(rope.get('factor') is not None, f'config.json: rope type {kind!r} needs a factor')
  if kind == 'linear':
    return theta, RopeScaling('linear', float(rope['factor']))
  return theta, RopeScaling(
    'llama3',
    float(rope['factor']),
    float(rope.get('low_freq_factor', 1.0)),
    float(rope.get('high_freq_factor', 4.0)),
    int(rope.get('original_max_position_embeddings') or hub['max_position_embeddings']),
  )


def _read_windows(model_type: str, hub: Mapping[str, Any]) -> tuple[int | None, tuple[bool, ...]]:
  window = hub.get('sliding_window')
  if model_type == 'llama':
    _require(not window, f'config.json: sliding_window={window} is not implemented for llama')
    return None, ()
  if model_type == 'mistral':
    return window, ()
  if not hub.get('use_sliding_window') or window is None:
    return None, ()
  layers = hub['num_hidden_layers']
  types = hub.get('layer_types') or [
    'sliding_attention' if i >= hub.get('max_window_layers', 28) else 'full_attention'
    for i in range(layers)
  ]
  unknown = sorted(set(types) - {'full_attention', 'sliding_attention'})
  _require(not unknown, f'config.json: layer_types {unknown} are not implemented')
  return window, tuple(t == 'sliding_attention' for t in types)

"""FLOPs counted from a model's shape, beside those that XLA counts."""

import jax
import jax.numpy as jnp

from o1jax.batch import TokenBatch
from o1jax.learn.logprobs import columns_at_once
from o1jax.learn.objectives import sft_loss
from o1jax.models import Model, ModelConfig
from o1jax.parallel.platform import planned_for
from o1jax.plan import flops

ARCH = ModelConfig(512, 64, 2, 4, 2, 160, max_position=256)


def xla_flops(function, *args) -> float:
  return jax.jit(function).lower(*args).cost_analysis()['flops']


def test_flops_agree_with_xla_s_count_of_an_unrolled_model():
  arch = ModelConfig(2048, 256, 3, 4, 2, 768, max_position=512)  # three layers: no scan
  ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
  batch = TokenBatch(ids, ids, ids, jax.ShapeDtypeStruct((2, 512), jnp.float32))
  for remat in (False, True):
    model = Model(arch, remat=remat)

    def loss(params, batch, model=model):
      with planned_for('tpu'):  # on a CPU attention leaves out what is masked
        return sft_loss(model)(params, batch)[0]

    pieces = columns_at_once(model, 2, 511, 1) < 511
    assert not pieces
    counted = flops.training(arch, 2, 512, remat=remat, pieces=pieces)
    xla = xla_flops(jax.grad(loss), model.shapes(), batch)
    # XLA counts what is element by element too: softmax, norms, rotations.
    assert counted.computed < xla < 1.08 * counted.computed
    forward = flops.forward(arch, 2, 512)
    assert forward.useful < xla_flops(loss, model.shapes(), batch) < 1.08 * forward.useful
    assert counted.useful == 3 * forward.useful


def test_flops_of_logits_in_pieces_count_the_second_reading():
  # 128 columns of 512 rows of 2048 logits: 512 MiB, in 8 pieces.
  assert columns_at_once(Model(ModelConfig(2048, 64, 2, 4, 2, 96)), 512, 127, 1) == 16
  whole, cut = (flops.training(ARCH, 8, 64, remat=False, pieces=p) for p in (False, True))
  assert cut.computed - whole.computed == flops.logits(ARCH, 8 * 63)


def test_flops_of_decoding_are_those_of_reading_one_token_at_a_time():
  one = flops.layers(ARCH, 16, 64) + flops.logits(ARCH, 16)
  assert flops.decoding(ARCH, 16, 32, 64).computed == 32 * one

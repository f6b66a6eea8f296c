"""Decoders: configuration, forward passes, read-outs and Hub folders."""

from o1jax.models.config import ModelConfig, RopeScaling
from o1jax.models.heads import ScalarHead, StepHead, TokenHead
from o1jax.models.transformer import Model

__all__ = ['Model', 'ModelConfig', 'RopeScaling', 'ScalarHead', 'StepHead', 'TokenHead']

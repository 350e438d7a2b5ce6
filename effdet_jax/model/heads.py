"""The class network and the box network: equal in form, separate in parameters (Tan, Pang, Le 2020, section 4.1)."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effdet_jax.model import layers

# Before training every anchor says "object" with this probability, so that the many negatives do not swamp the first
# steps (Lin et al. 2017, section 4.1).
PRIOR_PROBABILITY = 0.01
CLASS_BIAS = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)


class Head(nn.Module):
    """`num_layers` separable convolutions, then a predictor of `outputs` numbers per anchor.

    Convolutions are shared by all levels; each level has batch-norm layers of its own. Maps `[B, H_l, W_l, F]`, P3
    upward, become `[B, N, outputs]`, ordered level, y, x, anchor.
    """

    outputs: int
    num_anchors: int  # per position
    num_layers: int
    channels: int
    min_level: int
    activation: str
    norm: layers.Norm
    bias_init: Callable
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: list[Float[Array, 'B _ _ F']], train: bool) -> Float[Array, 'B N O']:
        def conv(channels: int, name: str, bias_init: Callable = nn.initializers.zeros) -> nn.Module:
            return layers.SeparableConv(
                channels, layers.depthwise_fan_in, layers.fan_in, bias_init, self.dtype, name=name
            )

        convs = [conv(self.channels, f'conv_{i}') for i in range(self.num_layers)]
        predict = conv(self.num_anchors * self.outputs, 'predict', self.bias_init)
        levels = []
        for level, x in enumerate(features, start=self.min_level):
            for i, convolve in enumerate(convs):
                x = self.norm(f'bn_{i}_p{level}', self.activation)(convolve(x), train)
            levels.append(predict(x).reshape(x.shape[0], -1, self.outputs))
        return jnp.concatenate(levels, axis=1)

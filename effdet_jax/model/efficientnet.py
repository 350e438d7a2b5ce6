"""EfficientNet B0-B7 and Lite0-4 as a backbone: image -> features P3, P4, P5.

Tan, Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table 1 and section 3.3. The Lite
variants drop squeeze-excite, use relu6 and do not scale the stem, the first and the last stage.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effdet_jax.model import layers


class Stage(NamedTuple):
    kernel: int
    repeats: int
    stride: int
    expansion: int
    channels: int


STEM_CHANNELS = 32
STAGES = (
    Stage(3, 1, 1, 1, 16),
    Stage(3, 2, 2, 6, 24),
    Stage(5, 2, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(5, 3, 1, 6, 112),
    Stage(5, 4, 2, 6, 192),
    Stage(3, 1, 1, 6, 320),
)
SQUEEZE_RATIO = 0.25


class Variant(NamedTuple):
    width: float
    depth: float
    lite: bool = False


VARIANTS = {
    'b0': Variant(1.0, 1.0),
    'b1': Variant(1.0, 1.1),
    'b2': Variant(1.1, 1.2),
    'b3': Variant(1.2, 1.4),
    'b4': Variant(1.4, 1.8),
    'b5': Variant(1.6, 2.2),
    'b6': Variant(1.8, 2.6),
    'b7': Variant(2.0, 3.1),
    'lite0': Variant(1.0, 1.0, lite=True),
    'lite1': Variant(1.0, 1.1, lite=True),
    'lite2': Variant(1.1, 1.2, lite=True),
    'lite3': Variant(1.2, 1.4, lite=True),
    'lite4': Variant(1.4, 1.8, lite=True),
    'nano': Variant(0.5, 0.5),  # ours, for laptops and tests
}


class Block(NamedTuple):
    """One inverted residual block of the table, with every size worked out."""

    kernel: int
    stride: int
    expansion: int
    in_channels: int
    out_channels: int
    ends_level: int | None  # the feature level that this block's output is, e.g. 3 for P3


def round_channels(channels: float) -> int:
    """Nearest multiple of 8, at least 8, never more than a tenth below the argument."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def stem_channels(variant: Variant) -> int:
    return STEM_CHANNELS if variant.lite else round_channels(STEM_CHANNELS * variant.width)


def block_table(variant: Variant) -> tuple[Block, ...]:
    """All blocks of a backbone in order. A level ends where the next block strides, and at the last block."""
    sizes = []  # kernel, stride, expansion, in, out
    in_channels = stem_channels(variant)
    for i, stage in enumerate(STAGES):
        fixed = variant.lite and i in (0, len(STAGES) - 1)
        repeats = stage.repeats if fixed else math.ceil(variant.depth * stage.repeats)
        out_channels = round_channels(stage.channels * variant.width)
        for r in range(repeats):
            sizes.append((stage.kernel, stage.stride if r == 0 else 1, stage.expansion, in_channels, out_channels))
            in_channels = out_channels
    blocks, level = [], 1  # the stem has halved the image once
    for i, (kernel, stride, *rest) in enumerate(sizes):
        level += stride == 2
        ends = i + 1 == len(sizes) or sizes[i + 1][1] == 2
        blocks.append(Block(kernel, stride, *rest, ends_level=level if ends else None))
    return tuple(blocks)


class MBConv(nn.Module):
    """Inverted residual: expand 1x1, depthwise, squeeze-excite, project 1x1, add the input.

    `[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), out]`; no activation after the projection.
    """

    block: Block
    lite: bool
    drop_rate: float
    norm: layers.Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C'], train: bool) -> Float[Array, 'B h w D']:
        b, activation = self.block, 'relu6' if self.lite else 'swish'
        conv = functools.partial(layers.PointwiseConv, kernel_init=layers.fan_out, dtype=self.dtype)
        residual = x
        if b.expansion != 1:
            x = conv(b.in_channels * b.expansion, use_bias=False, name='expand_conv')(x)
            x = self.norm('expand_bn', activation)(x, train)
        x = layers.DepthwiseConv(b.kernel, b.stride, layers.depthwise_fan_out, self.dtype, name='dw_conv')(x)
        x = self.norm('dw_bn', activation)(x, train)
        gate = None
        if not self.lite:
            # The reduction is relative to the block's input, before the expansion.
            squeezed = max(1, int(b.in_channels * SQUEEZE_RATIO))
            gate = jnp.mean(x, axis=(1, 2), keepdims=True)
            gate = nn.swish(conv(squeezed, name='se_reduce')(gate))
            gate = conv(x.shape[-1], name='se_expand')(gate)
            gate = nn.sigmoid(gate)
        x = conv(b.out_channels, use_bias=False, name='project_conv')(x, gate, train)  # of x * gate
        x = self.norm('project_bn')(x, train)
        if b.stride == 1 and b.in_channels == b.out_channels:
            x = layers.StochasticDepth(self.drop_rate, self.norm.axis_name)(x, train) + residual
        return x


class EfficientNet(nn.Module):
    """Backbone named `variant`: normalised images `[B, H, W, 3]` -> `{3: P3, 4: P4, 5: P5}`, strides 8, 16, 32."""

    variant: str
    stochastic_depth: float
    norm: layers.Norm
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, 'B H W 3'], train: bool) -> dict[int, Float[Array, 'B _ _ _']]:
        variant = VARIANTS[self.variant]
        activation = 'relu6' if variant.lite else 'swish'
        block_class: Any = nn.remat(MBConv, static_argnums=(2,)) if self.remat else MBConv
        x = images.astype(self.dtype)
        x = layers.Stem(stem_channels(variant), self.norm, activation, self.dtype, name='stem')(x, train)
        blocks = block_table(variant)
        features = {}
        for i, block in enumerate(blocks):
            drop_rate = self.stochastic_depth * i / len(blocks)
            x = block_class(block, variant.lite, drop_rate, self.norm, self.dtype, name=f'blocks_{i}')(x, train)
            if block.ends_level in (3, 4, 5):
                features[block.ends_level] = x
        return features

"""The layers that the three parts of the detector share. NHWC; float32 parameters; `dtype` is the compute precision."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effdet_jax.kernels.depthwise import depthwise_conv
from effdet_jax.kernels.layers import double, max_pool, pointwise_conv, stem_conv
from effdet_jax.model.batch_norm import BatchNorm

# Initialisers: fan-out in the backbone, Glorot in the feature network, fan-in in the heads. A depthwise kernel is
# [k, k, 1, C] here; the official code computes its fans as if it were [k, k, C, 1], which the last two reproduce
# (docs/reference.md, Backbone).
fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
glorot = nn.initializers.glorot_uniform()
fan_in = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


def depthwise_fan_out(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jax.random.normal(key, shape, dtype) * (2.0 / (shape[0] * shape[1])) ** 0.5


def _on_transposed_shape(init: Callable) -> Callable:
    def initialise(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return init(key, (shape[0], shape[1], shape[3], shape[2]), dtype).swapaxes(2, 3)

    return initialise


depthwise_glorot = _on_transposed_shape(glorot)
depthwise_fan_in = _on_transposed_shape(fan_in)


@dataclasses.dataclass(frozen=True)
class Norm:
    """Makes batch-norm layers: `norm(name, activation)(x, train)`; `axis_name` is that of the mapped devices."""

    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __call__(self, name: str, activation: str = 'none') -> BatchNorm:
        return BatchNorm(activation, self.dtype, self.axis_name, name=name)


class PointwiseConv(nn.Module):
    """1x1 convolution of x, or of x * gate, `[B, H, W, C] -> [B, H, W, F]`; kernel `[1, 1, C, F]`."""

    features: int
    kernel_init: Callable
    use_bias: bool = True
    bias_init: Callable = nn.initializers.zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B H W C'], gate: Float[Array, 'B 1 1 C'] | None = None, train: bool = False
    ) -> Float[Array, 'B H W F']:
        kernel = self.param('kernel', self.kernel_init, (1, 1, x.shape[-1], self.features), jnp.float32)
        bias = self.param('bias', self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        return pointwise_conv(x.astype(self.dtype), kernel, bias, gate, train)


class DepthwiseConv(nn.Module):
    """`[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), C]`, SAME padding, no bias; kernel `[k, k, 1, C]`."""

    kernel_size: int
    stride: int
    kernel_init: Callable
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        return depthwise_conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class SeparableConv(nn.Module):
    """Depthwise 3x3 (`dw`, no bias), then pointwise 1x1 with bias (`pw`). Both kernels are shared by repeated calls."""

    features: int
    depthwise_init: Callable
    pointwise_init: Callable
    bias_init: Callable = nn.initializers.zeros
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.dw = DepthwiseConv(3, 1, self.depthwise_init, self.dtype)
        self.pw = PointwiseConv(self.features, self.pointwise_init, True, self.bias_init, self.dtype)

    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W F']:
        return self.pw(self.dw(x))


class Stem(nn.Module):
    """First layer of the backbone: 3x3 convolution with stride 2, batch norm, activation."""

    features: int
    norm: Norm
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W 3'], train: bool) -> Float[Array, 'B h w F']:
        x = StemConv(self.features, self.dtype, name='conv')(x)
        return self.norm('bn', self.activation)(x, train)


class StemConv(nn.Module):
    """3x3 convolution with stride 2 and SAME padding, no bias; kernel `[3, 3, C, F]`."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w F']:
        kernel = self.param('kernel', fan_out, (3, 3, x.shape[-1], self.features), jnp.float32)
        return stem_conv(x.astype(self.dtype), kernel.astype(self.dtype))


class StochasticDepth(nn.Module):
    """In training, drops a residual branch for whole samples with probability `rate` and divides the rest by 1 - rate.

    Huang et al. 2016. The draw depends on the step's key and on the sample's place in the *global* batch, so it does
    not change with the number of devices. Needs the rng stream `stochastic_depth`.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C'], train: bool) -> Float[Array, 'B H W C']:
        if not train or self.rate == 0.0:
            return x
        key, batch = self.make_rng('stochastic_depth'), x.shape[0]
        first = jax.lax.axis_index(self.axis_name) * batch if self.axis_name else 0
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(batch))
        keep_B = jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - self.rate))(keys_B)
        return x * (keep_B.astype(x.dtype) / (1.0 - self.rate))[:, None, None, None]


def resize_to(x: Float[Array, 'B H W C'], height: int, width: int) -> Float[Array, 'B h w C']:
    """A feature map at another level's size: max-pool down, nearest neighbour up (docs/reference.md, Resampling).

    Raises:
      ValueError: where one side would grow and the other shrink.
    """
    h, w = x.shape[1:3]
    if (h, w) == (height, width):
        return x
    if h >= height and w >= width:
        return max_pool(x, ((h - 1) // height + 1, (w - 1) // width + 1))
    if h <= height and w <= width:
        return upsample_nearest(x, height, width)
    raise ValueError(f'cannot resize {h}x{w} to {height}x{width}: one side grows and the other shrinks')


def upsample_nearest(x: Float[Array, 'B H W C'], height: int, width: int) -> Float[Array, 'B h w C']:
    """Source index = floor(target * in / out), so 3 -> 5 reads 0, 0, 1, 1, 2 (docs/reference.md, Resampling)."""
    h, w = x.shape[1:3]
    if (height, width) == (2 * h, 2 * w):  # the common case
        return double(x)
    return x[:, jnp.arange(height) * h // height][:, :, jnp.arange(width) * w // width]

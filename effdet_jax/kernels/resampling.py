"""Pooling and upsampling between neighbouring levels, with cheap gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effdet_jax.kernels.windows import shifted_slices


def plain_max_pool(x: Array, strides: tuple[int, int]) -> Array:
    """The definition."""
    return nn.max_pool(x, (strides[0] + 1, strides[1] + 1), strides=strides, padding='SAME')


@functools.partial(jax.jit, static_argnums=1)  # so that each shape is traced once
def max_pool(x: Float[Array, 'B H W C'], strides: tuple[int, int]) -> Float[Array, 'B h w C']:
    """Maximum over windows of stride + 1 per side, SAME padding with minus infinity.

    Between neighbouring levels this is 3x3 with stride 2, written as a chain of maxima of shifted slices: the gradient
    of XLA's window operation is ten times slower on CPU. Where inputs tie, the gradient is shared among them.
    """
    if strides != (2, 2):
        return plain_max_pool(x, strides)
    return functools.reduce(jnp.maximum, [tap for _, _, tap in shifted_slices(x, 3, 2, fill=-jnp.inf)])


def double(x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
    """`x.repeat(2, axis=1).repeat(2, axis=2)`. The gradient of a stack is a sum of slices, not a scatter."""
    batch, height, width, channels = x.shape
    x = jnp.stack([x, x], axis=3).reshape(batch, height, 2 * width, channels)
    return jnp.stack([x, x], axis=2).reshape(batch, 2 * height, 2 * width, channels)

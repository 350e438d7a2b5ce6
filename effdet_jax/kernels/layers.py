"""The layers of `model.layers` in forms that are quicker on CPU, above all in their gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effdet_jax.kernels.dispatch import by_platform
from effdet_jax.kernels.windows import pad_same, shifted_slices, strided


def plain_stem_conv(x: Array, kernel: Array) -> Array:
    """The definition."""
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def stem_conv(x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C F']) -> Float[Array, 'B h w F']:
    """3x3 convolution with stride 2 and SAME padding."""
    return by_platform(x, kernel, cpu=_as_product, plain=plain_stem_conv)


def _as_product(x: Array, kernel: Array) -> Array:
    """A row of 9 C numbers for each position, times a matrix: with 3 channels XLA's form is 2.5 times slower on CPU."""
    height, width = strided((x.shape[1], x.shape[2]), 2)
    padded = pad_same(x, 3, 2)
    batch, h, w, channels = padded.shape
    pairs = padded.reshape(batch, h // 2, 2, w // 2, 2 * channels)  # of columns, and of rows
    columns = []
    for i in range(3):
        row = pairs[:, i // 2 :, i % 2][:, :height]
        columns += [row[:, :, :width], row[:, :, 1:, :channels][:, :, :width]]
    patches = jnp.concatenate(columns, axis=-1)
    return (patches.reshape(-1, 9 * channels) @ kernel.reshape(9 * channels, -1)).reshape(batch, height, width, -1)


def pointwise_conv(
    x: Float[Array, 'B H W C'],
    kernel: Float[Array, '1 1 C F'],
    bias: Float[Array, 'F'] | None = None,
    gate: Float[Array, 'B 1 1 C'] | None = None,
    train: bool = False,
) -> Float[Array, 'B H W F']:
    """`lax.conv_general_dilated(x * gate, kernel, (1, 1), 'SAME') + bias`, computed in the type of x.

    XLA's convolution is as fast forwards, but its gradients are several times slower on CPU. Inference multiplies the
    gate onto the kernel, which is smaller than x; training is faster with `x * gate`.
    """
    if gate is not None and train:
        x, gate = x * gate, None
    matrix = kernel[0, 0].astype(x.dtype)
    if gate is None:
        rows = x.reshape(-1, x.shape[-1]) @ matrix
    else:
        rows = x.reshape(x.shape[0], -1, x.shape[-1]) @ (gate[:, 0, 0, :, None] * matrix)
    if bias is not None:
        rows += bias.astype(x.dtype)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


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

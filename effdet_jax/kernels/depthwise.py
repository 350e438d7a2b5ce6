"""Depthwise convolution with a gradient of its own, chosen per platform when the program is lowered.

XLA's grouped convolution is slow on CPU, above all backwards. There it is written as k*k shifted multiply-adds, which
XLA fuses into one pass over the image; the kernel gradient is accumulated row by row. Other platforms use XLA's form.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effdet_jax.kernels.dispatch import by_platform
from effdet_jax.kernels.windows import pad_same, same_padding, strided, taps


def plain_depthwise_conv(x: Array, kernel: Array, stride: int) -> Array:
    """The definition."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=x.shape[-1]
    )


def depthwise_conv(
    x: Float[Array, 'B H W C'], kernel: Float[Array, 'k k 1 C'], stride: int = 1
) -> Float[Array, 'B h w C']:
    """Each channel with its own k x k kernel (k odd), SAME padding as TensorFlow places it; h = ceil(H / stride)."""
    return _conv(x, kernel, stride, (x.shape[1], x.shape[2]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, stride: int, size: tuple[int, int]) -> Array:
    """`size` is the height and width of x, for the gradient."""
    cpu, plain = (functools.partial(form, stride=stride) for form in (_shifted, plain_depthwise_conv))
    return by_platform(x, kernel, cpu=cpu, plain=plain)


@functools.partial(jax.jit, static_argnums=(2, 3))  # so that each shape is traced once, as in the gradient
def _forward(x: Array, kernel: Array, stride: int, size: tuple[int, int]) -> tuple[Array, tuple[Array, Array]]:
    if not _trains_on_cpu():
        return plain_depthwise_conv(x, kernel, stride), (x, kernel)
    padded = pad_same(x, kernel.shape[0], stride)  # kept in the place of x, so that it is padded once
    return _sum_of_taps(padded, kernel, stride, *strided(size, stride)), (padded, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    stride: int, size: tuple[int, int], residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    if not _trains_on_cpu():
        return jax.vjp(functools.partial(plain_depthwise_conv, stride=stride), *residuals)[1](gradient)
    padded, kernel = residuals
    k = kernel.shape[0]
    margin = k // 2 if stride == 1 else k // stride + 1
    below = margin + (stride == 1)  # as `taps` wants it
    gradient = jnp.pad(gradient, ((0, 0), (margin, below), (margin, margin), (0, 0)))  # once for both
    return (
        _input_gradient(gradient, kernel, stride, margin, size),
        _kernel_gradient(padded, gradient, k, stride, margin, strided(size, stride)).astype(kernel.dtype),
    )


_conv.defvjp(_forward, _backward)


def _trains_on_cpu() -> bool:
    """What the two forms keep for the backward pass differs in shape, so they are told apart when tracing."""
    return jax.default_backend() == 'cpu'


TAPS_IN_CACHE = 8192  # of a kernel: so many numbers stay there beside what they meet
CHANNELS_AT_ONCE = 192


def _shifted(x: Array, kernel: Array, stride: int) -> Array:
    """Of larger kernels so many channels at a time as stay in a core's first cache from one position to the next."""
    k, channels = kernel.shape[0], kernel.shape[-1]
    at_once = channels if kernel.size <= TAPS_IN_CACHE else CHANNELS_AT_ONCE
    padded, size = pad_same(x, k, stride), strided((x.shape[1], x.shape[2]), stride)
    parts = [
        _sum_of_taps(padded, kernel, stride, *size, slice(first, first + at_once))
        for first in range(0, channels, at_once)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _sum_of_taps(
    padded: Array, kernel: Array, stride: int, height: int, width: int, channels: slice = slice(None)
) -> Array:
    """Row by row, as shorter chains of additions, of which a CPU has several under way."""
    k = kernel.shape[0]
    products = [tap[..., channels] * kernel[i, j, 0, channels] for i, j, tap in taps(padded, k, stride, height, width)]
    rows = [functools.reduce(jnp.add, products[first : first + k]) for first in range(0, k * k, k)]
    return functools.reduce(jnp.add, rows)


def _input_gradient(padded: Array, kernel: Array, stride: int, margin: int, size: tuple[int, int]) -> Array:
    """Of an input of height and width `size`; `padded` is the gradient with `margin` zeros on every side."""
    k, (height, width) = kernel.shape[0], size
    if stride == 1:
        return _sum_of_taps(padded, kernel[::-1, ::-1], 1, height, width)
    # x[s*a + p] met gradient[a - t] through tap i = p + low + s*t: each phase p of the input is a small convolution of
    # the gradient with every s-th tap; the phases are then interleaved.
    batch, channels = padded.shape[0], padded.shape[3]
    lows = [same_padding(n, k, stride)[0] for n in size]
    counts = strided(size, stride)

    def meets(phase: int, low: int) -> list[tuple[int, int]]:
        """(tap, shift) pairs with tap = phase + low - stride*shift: input s*a + phase meets gradient a + shift."""
        return [(tap, (phase + low - tap) // stride) for tap in range(k) if (phase + low - tap) % stride == 0]

    rows = []
    for p in range(stride):
        columns = []
        for q in range(stride):
            total = jnp.zeros((), padded.dtype)
            for i, shift_i in meets(p, lows[0]):
                for j, shift_j in meets(q, lows[1]):
                    window = padded[:, margin + shift_i :, margin + shift_j :][:, : counts[0], : counts[1]]
                    total = total + window * kernel[i, j, 0]
            columns.append(jnp.broadcast_to(total, (batch, *counts, channels)))
        rows.append(jnp.stack(columns, axis=3))
    interleaved = jnp.stack(rows, axis=2)  # [B, h, stride, w, stride, C]
    full = interleaved.reshape(batch, counts[0] * stride, counts[1] * stride, channels)
    return full[:, :height, :width]


ROWS_AT_ONCE = 2  # of the kernel gradient's loop: more rows, fewer passes over the sums, a longer compilation


def _kernel_gradient(x: Array, gradient: Array, k: int, stride: int, margin: int, size: tuple[int, int]) -> Array:
    """`[k, k, 1, C]`: for each tap, the sum over images and positions of input x gradient, both padded.

    A plain reduction of k*k products is 4 to 11 times slower: XLA's loop over the reduced axes is scalar. Here every
    step adds a few rows of one image to k sums of shape [k, W, C], which vectorises over channels and stays in cache.
    The padded arrays are not reshaped for the loop, because XLA would make each of them a second time.
    """
    images, channels = x.shape[0], x.shape[3]
    height, width = size
    rows = next(n for n in range(ROWS_AT_ONCE, 0, -1) if height % n == 0)

    def add_rows(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        image, first = step // (height // rows), step % (height // rows) * rows

        def column(r: int, j: int) -> Array:
            """[k, W, C]: what the j-th column of taps meets along one row, times the gradient there."""
            place = (image, margin + first + r, margin, 0)
            line = jax.lax.dynamic_slice(gradient, place, (1, 1, width, channels))[0]
            start, span = (image, (first + r) * stride, j, 0), (width - 1) * stride + 1
            met = jax.lax.dynamic_slice(x, start, (1, k, span, channels))[0, :, ::stride]
            return (met * line).astype(jnp.float32)

        return tuple(total + sum(column(r, j) for r in range(rows)) for j, total in enumerate(sums))

    zeros = (jnp.zeros((k, width, channels), jnp.float32),) * k
    sums = jax.lax.fori_loop(0, images * (height // rows), add_rows, zeros)
    return jnp.stack([total.sum(axis=1) for total in sums], axis=1)[:, :, None]

"""The taps of a k x k window with SAME padding, as TensorFlow places it: shifted slices of one padded array."""

import jax.numpy as jnp
from jaxtyping import Array


def same_padding(size: int, k: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + k - size, 0)
    return total // 2, total - total // 2


def strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width of the output."""
    return -(-size[0] // stride), -(-size[1] // stride)


def pad_same(x: Array, k: int, stride: int, fill: float = 0.0) -> Array:
    """SAME padding, and then enough at the end for a whole number of strides; with stride 1, one row more (`taps`)."""
    pads = []
    for size in x.shape[1:3]:
        low, high = same_padding(size, k, stride)
        out = -(-size // stride)
        pads.append((low, max(high, (out - 1) * stride + k - size - low) + -(size + low + high) % stride))
    (above, below), sides = pads
    return jnp.pad(x, ((0, 0), (above, below + (stride == 1)), sides, (0, 0)), constant_values=fill)


def shifted_slices(x: Array, k: int, stride: int, fill: float = 0.0) -> list[tuple[int, int, Array]]:
    """(row, column, the input under that tap at every output position `[B, h, w, C]`)."""
    return taps(pad_same(x, k, stride, fill), k, stride, *strided((x.shape[1], x.shape[2]), stride))


def taps(padded: Array, k: int, stride: int, height: int, width: int) -> list[tuple[int, int, Array]]:
    """`shifted_slices` of what `pad_same` returned.

    Strided slices come from one reshape: column = stride * index + phase. With stride 1 all positions form one line and
    the taps are shifts of it, without the last columns; the last shift ends in the extra row. XLA would read the middle
    one of plain slices from the unpadded input, and compute that twice.
    """
    b, h, w, c = padded.shape
    if stride == 1:
        line = padded.reshape(b, h * w, c)

        def tap(i: int, j: int) -> Array:
            return line[:, i * w + j :][:, : height * w].reshape(b, height, w, c)[:, :, :width]
    else:
        phases = padded.reshape(b, h // stride, stride, w // stride, stride, c)

        def tap(i: int, j: int) -> Array:
            return phases[:, i // stride :, i % stride, j // stride :, j % stride][:, :height, :width]

    return [(i, j, tap(i, j)) for i in range(k) for j in range(k)]

"""The device's half of preprocessing, the same in training, evaluation and prediction: uint8 pixels -> network input.

Training and evaluation decode, resize and pad on the host (data/transforms.py) and normalise here. The detector resizes
here too, from images of any size in one program.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from effdet_jax.kernels.loops import computed_apart


def normalize(
    images: UInt8[Array, 'B H W 3'] | Float[Array, 'B H W 3'],
    valid_size: Int[Array, 'B 2'],
    mean: Sequence[float],
    std: Sequence[float],
    padding: float = 0.0,
) -> Float[Array, 'B H W 3']:
    """(image - mean) / std per channel, RGB in 0..255; exactly `padding` outside `valid_size`.

    `valid_size` is the height and width of the picture inside the padded input. A padding of 0 is the mean colour.
    """
    normalized = (images.astype(jnp.float32) - jnp.asarray(mean)) / jnp.asarray(std)
    _, height, width, _ = images.shape
    inside_BH = jnp.arange(height) < valid_size[:, :1]
    inside_BW = jnp.arange(width) < valid_size[:, 1:]
    inside_BHW1 = (inside_BH[:, :, None] & inside_BW[:, None, :])[..., None]
    return jnp.where(inside_BHW1, normalized, padding)


def resize_and_pad(
    pixels: UInt8[Array, 'P 3'], sizes: Int[Array, 'B 2'], image_size: tuple[int, int]
) -> tuple[UInt8[Array, 'B H W 3'], Int[Array, 'B 2'], Float[Array, 'B']]:
    """What data.transforms.resize_and_pad does on the host, for B images of any sizes, to within a grey level.

    `pixels` holds the images row by row, one after the other, and may have more at its end: so its length alone is
    part of the program, and the sizes (height, width), at least 1, are not. B * H * W and P must stay below 2^31.
    Returns (images, valid_size, image_scale), the last to multiply boxes with on their way back; beyond `valid_size`
    an image repeats its last row and column, which `normalize` covers.
    """
    areas_B = sizes[:, 0] * sizes[:, 1]
    starts_B = jnp.cumsum(areas_B) - areas_B

    valid_size, scale = jax.vmap(scaled_size, (0, None))(sizes, image_size)
    neighbours = jax.vmap(_neighbours, (None, 0, 0))
    rows, columns = (neighbours(image_size[i], sizes[:, i], valid_size[:, i]) for i in (0, 1))

    def resize(pixels: Array, *of_images: Any) -> Array:
        return jax.vmap(_resize, (None, 0, 0, 0, 0))(pixels, *of_images)

    images = computed_apart(resize, (pixels, starts_B, sizes[:, 1], rows, columns), positive=sizes)
    return images, valid_size, 1 / scale


def scaled_size(size: Int[Array, '2'], target_hw: tuple[int, int]) -> tuple[Int[Array, '2'], Float[Array, '']]:
    """data.transforms.scaled_size on the device: float32, truncated, at least one pixel."""
    size_2 = size.astype(jnp.float32)
    scale = jnp.min(jnp.asarray(target_hw, jnp.float32) / size_2)
    return jnp.maximum((size_2 * scale).astype(jnp.int32), 1), scale


def _resize(pixels: Array, start: Array, width: Array, rows: Any, columns: Any) -> Array:
    """Bilinear with half-pixel centres and without antialiasing: the four neighbours of each pixel.

    In whole numbers of 11 bits, cut where OpenCV's cv2.resize cuts them: so that a detector sees what evaluation saw.
    `rows` and `columns` are `_neighbours` along each side of the resized image; the image has `width` columns.
    """
    (left_W, before_W), (right_W, after_W) = columns

    def along_row(y: Array) -> Array:
        def at(x_W: Array) -> Array:
            return pixels.at[start + y * width + x_W].get(mode='promise_in_bounds').astype(jnp.int32)

        return (at(left_W) * before_W[:, None] + at(right_W) * after_W[:, None]) >> 4

    def row(above: tuple[Array, Array], below: tuple[Array, Array]) -> Array:
        top, bottom = ((along_row(y) * weight) >> 16 for y, weight in (above, below))
        return ((top + bottom + 2) >> 2).astype(jnp.uint8)

    return jax.vmap(row)(*rows)


def _neighbours(count: int, old: Array, new: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(index, weight of 2048) before and after each of `count` output pixels, along a side that is scaled old -> new.

    (i + 0.5) * old / new - 0.5 in integers: as a float32, it is off by a thousandth of a pixel in a large photograph.
    """
    numerator = (2 * jnp.arange(count, dtype=jnp.int32) + 1) * old - new
    before = numerator // (2 * new)
    share = (numerator - before * 2 * new).astype(jnp.float32) / (2 * new).astype(jnp.float32)

    def neighbour(index: Array, weight: Array) -> tuple[Array, Array]:
        return jnp.clip(index, 0, old - 1), jnp.round(weight * 2048).astype(jnp.int32)

    return neighbour(before, 1 - share), neighbour(before + 1, share)

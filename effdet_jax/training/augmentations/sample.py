"""A training picture with its boxes, and what becomes of boxes that are cut, covered or too many."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

MIN_VISIBLE = 0.25  # of a box's area: with less of it left, nothing says any more what the object is
MIN_SIDE = 1.0  # pixels


class Sample(NamedTuple):
    """One image, or with a leading axis a batch. Boxes yxyx in pixels inside `valid_size` (height, width).

    Boxes whose label is -1 are padding and stand at the end.
    """

    image: UInt8[Array, '*B H W 3']
    boxes: Float[Array, '*B M 4']
    labels: Int[Array, '*B M']
    valid_size: Int[Array, '*B 2']


def inside(sample: Sample) -> Bool[Array, 'H W 1']:
    """True on the picture, False on the padding at its right and bottom."""
    height, width, _ = sample.image.shape
    rows_H, columns_W = jnp.arange(height) < sample.valid_size[0], jnp.arange(width) < sample.valid_size[1]
    return (rows_H[:, None] & columns_W)[..., None]


def areas(boxes: Float[Array, '*N 4']) -> Float[Array, '*N']:
    """Square pixels; 0 where a side is negative."""
    return jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(axis=-1)


def intersections(boxes: Float[Array, '*N 4'], windows: Float[Array, '*#N 4']) -> Float[Array, '*N 4']:
    """What of each box lies in its window; a side is negative where nothing does."""
    corner = jnp.maximum(boxes[..., :2], windows[..., :2])
    return jnp.concatenate([corner, jnp.minimum(boxes[..., 2:], windows[..., 2:])], axis=-1)


def cut(
    boxes: Float[Array, '*N 4'], labels: Int[Array, '*N'], windows: Float[Array, '*#N 4']
) -> tuple[Float[Array, '*N 4'], Int[Array, '*N']]:
    """Boxes cut at their windows. Label -1 where less than a quarter of the area or than a pixel's side is left."""
    cut_N4 = intersections(boxes, windows)
    visible_N = areas(cut_N4) >= MIN_VISIBLE * areas(boxes)
    long_enough_N = (cut_N4[..., 2:] - cut_N4[..., :2] >= MIN_SIDE).all(axis=-1)
    return cut_N4, jnp.where(visible_N & long_enough_N, labels, -1)


def largest(
    boxes: Float[Array, 'N 4'], labels: Int[Array, 'N'], most: int
) -> tuple[Float[Array, 'M 4'], Int[Array, 'M']]:
    """The `most` largest boxes in falling order of their areas, then padding: label -1 and a box of zeros.

    Where there are too many, it is the smallest ones that are hardest to see, and so to miss.
    """
    order_M = jnp.argsort(jnp.where(labels >= 0, -areas(boxes), 1.0), stable=True)[:most]
    labels_M = labels[order_M]
    return jnp.where(labels_M[:, None] >= 0, boxes[order_M], 0.0), labels_M

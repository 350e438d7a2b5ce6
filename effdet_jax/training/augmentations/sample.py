"""A training image with its boxes, and the rules for boxes that are clipped, covered or too many."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

MIN_VISIBLE = 0.25  # of a box's area: with less, the object can hardly be recognized
MIN_SIDE = 1.0  # pixels


class Sample(NamedTuple):
    """One image, or a batch of them. Boxes are yxyx in pixels, inside `valid_size` (height, width).

    Boxes with label -1 are padding; they come last.
    """

    image: UInt8[Array, '*B H W 3']
    boxes: Float[Array, '*B M 4']
    labels: Int[Array, '*B M']
    valid_size: Int[Array, '*B 2']


def inside(sample: Sample) -> Bool[Array, 'H W 1']:
    """True on the image, False on the padding to the right and below."""
    height, width, _ = sample.image.shape
    rows_H, columns_W = jnp.arange(height) < sample.valid_size[0], jnp.arange(width) < sample.valid_size[1]
    return (rows_H[:, None] & columns_W)[..., None]


def areas(boxes: Float[Array, '*N 4']) -> Float[Array, '*N']:
    """In square pixels; 0 if a side is negative."""
    return jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(axis=-1)


def intersections(boxes: Float[Array, '*N 4'], windows: Float[Array, '*#N 4']) -> Float[Array, '*N 4']:
    """The part of each box inside its window; a side is negative if there is none."""
    corner = jnp.maximum(boxes[..., :2], windows[..., :2])
    return jnp.concatenate([corner, jnp.minimum(boxes[..., 2:], windows[..., 2:])], axis=-1)


def cut(
    boxes: Float[Array, '*N 4'], labels: Int[Array, '*N'], windows: Float[Array, '*#N 4']
) -> tuple[Float[Array, '*N 4'], Int[Array, '*N']]:
    """Clips boxes to windows. Label -1 if less than a quarter of the area, or less than a pixel of a side, is left."""
    cut_N4 = intersections(boxes, windows)
    visible_N = areas(cut_N4) >= MIN_VISIBLE * areas(boxes)
    long_enough_N = (cut_N4[..., 2:] - cut_N4[..., :2] >= MIN_SIDE).all(axis=-1)
    return cut_N4, jnp.where(visible_N & long_enough_N, labels, -1)


def largest(
    boxes: Float[Array, 'N 4'], labels: Int[Array, 'N'], most: int
) -> tuple[Float[Array, 'M 4'], Int[Array, 'M']]:
    """The `most` largest boxes by descending area, then padding (label -1, a box of zeros).

    If there are too many, the smallest go: they are the hardest to see.
    """
    order_M = jnp.argsort(jnp.where(labels >= 0, -areas(boxes), 1.0), stable=True)[:most]
    labels_M = labels[order_M]
    return jnp.where(labels_M[:, None] >= 0, boxes[order_M], 0.0), labels_M
